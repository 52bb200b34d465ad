"""The traits of tasks: a table of how they change the task objects.

Texts in braces are placeholders, which `_descriptions` replaces. The letters name the sources, as in `_answers`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from flux2max_async.emulator._answers import ABSENT
from flux2max_async.emulator._faults import Fault

Fate = Literal["completed", "failed", "moderated"]


@attrs.frozen
class Trait:
    """How a trait changes a task. The fields of the task object that it names replace the usual ones."""

    fate: Fate | None = None
    """How the task ends; None leaves that as it is."""
    running: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """Fields while the task runs."""
    completed: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """Fields when it has completed."""
    failed: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """Fields when it has failed, by moderation or otherwise."""


# Spelled in all the ways that occur, because readers must ignore case, hyphens, spaces and underscores [C].
_RUNNING = {
    Fault.STATUS_PENDING: "Pending",
    Fault.STATUS_IN_PROGRESS: "IN-PROGRESS",
    Fault.STATUS_PROCESSING: "Processing",
    Fault.STATUS_QUEUED: "QUEUED",
    Fault.STATUS_SUBMITTED: "submitted",
    Fault.STATUS_STARTING: "Starting",
    Fault.STATUS_RUNNING: "RUNNING",
}
_COMPLETED = {
    Fault.STATUS_COMPLETED: "COMPLETED",
    Fault.STATUS_SUCCESS: "Success",
    Fault.STATUS_SUCCEEDED: "succeeded",
    Fault.STATUS_READY: "Ready",
    Fault.STATUS_DONE: "DONE",
}
_FAILED = {
    Fault.STATUS_FAILED: "FAILED",
    Fault.STATUS_ERROR: "Error",
    Fault.STATUS_CANCELLED: "CANCELLED",
    Fault.STATUS_CANCELED: "canceled",
    Fault.STATUS_ABORTED: "Aborted",
    Fault.STATUS_TIMEOUT: "time-out",
    Fault.STATUS_EXPIRED: "Expired",
    Fault.STATUS_REJECTED: "REJECTED",
}
_MODERATED = {
    Fault.STATUS_MODERATED: "moderated",
    Fault.STATUS_REQUEST_MODERATED: "Request Moderated",
    Fault.STATUS_CONTENT_MODERATED: "CONTENT_MODERATED",
}
_ERROR = {"code": "generation_failed", "message": "the model gave up"}
_TIME_AS_TEXT = {"created_at": "{created_at_text}"}
_REFUSAL = {"code": "content_policy_violation", "message": "2 of 3 images were moderated"}


def _output(**content: Any) -> dict[str, Any]:
    return {"output": [{"content": [content]}]}


TRAITS: dict[Fault, Trait] = {
    **{fault: Trait(running={"status": word}) for fault, word in _RUNNING.items()},
    **{fault: Trait(completed={"status": word}) for fault, word in _COMPLETED.items()},
    **{fault: Trait("failed", failed={"status": word, "error": ABSENT}) for fault, word in _FAILED.items()},
    **{fault: Trait("moderated", failed={"status": word, "error": ABSENT}) for fault, word in _MODERATED.items()},
    # Other task objects
    Fault.STATUS_UNKNOWN: Trait(
        running={"status": "Denoising {step}/28"}, completed={"status": "Finalized"}, failed={"status": "Unfulfilled"}
    ),
    Fault.STATUS_UNKNOWN_FAILED: Trait(
        "failed", running={"status": "Denoising {step}/28"}, failed={"status": "Unfulfilled"}
    ),
    Fault.ERROR_WHILE_RUNNING: Trait(
        running={"status": "in_progress", "error": {"code": "SYNC_TIMEOUT", "message": "the task is still running"}}
    ),
    Fault.ERROR_AS_TEXT: Trait("failed", failed={"error": "the model gave up"}),
    Fault.ERROR_WITH_NUMBER: Trait("failed", failed={"error": {"code": 123, "error_message": "the model gave up"}}),
    Fault.COMPLETED_WITH_ERROR: Trait("failed", failed={"status": "completed", "output": [], "error": _ERROR}),
    Fault.COMPLETED_WITHOUT_OUTPUT: Trait("failed", failed={"status": "completed", "output": [], "error": ABSENT}),
    Fault.PROGRESS_MISSING: Trait(running={"progress": ABSENT}, completed={"progress": ABSENT}),
    Fault.PROGRESS_STUCK: Trait(running={"progress": 0}),
    Fault.CREATED_AT_TEXT: Trait(running=_TIME_AS_TEXT, completed=_TIME_AS_TEXT, failed=_TIME_AS_TEXT),
    Fault.COST_NUMBER: Trait(
        completed={"usage": {"cost": "{cost_number}", "quantity": 1, "unit_price": "{cost}", "used": 1}}
    ),
    Fault.COST_EMPTY: Trait(completed={"usage": {"cost": "", "discount": 1}}),
    Fault.COST_NULL: Trait(completed={"usage": {"cost": None, "discount": None}}),
    Fault.USAGE_MISSING: Trait(completed={"usage": ABSENT}),
    # Pictures
    Fault.INLINE_DATA_URI: Trait(completed=_output(type="image", url="{data_uri}")),
    Fault.INLINE_B64_JSON: Trait(completed=_output(type="image", b64_json="{base64}")),
    Fault.INLINE_BASE64: Trait(completed=_output(type="image", base64="{base64}")),
    Fault.IMAGE_URL_TYPE: Trait(completed=_output(type="image_url", url="{url}")),
    Fault.IMAGE_URL_TEXT: Trait(completed=_output(type="image_url", image_url="{url}")),
    Fault.IMAGE_URL_OBJECT: Trait(completed=_output(type="image_url", image_url={"url": "{url}"})),
    Fault.MAKER_RESULT: Trait(),
    Fault.SEVERAL_GROUPS: Trait(
        completed={
            "output": [
                {"content": [{"type": "image", "url": "{url}"}, {"type": "image", "url": "{url}&picture=2"}]},
                {"content": [{"type": "image", "url": "{url}&picture=3"}]},
            ]
        }
    ),
    Fault.PARTIAL: Trait(completed={"error": _REFUSAL, "usage": {"cost": "{cost}", "discount": 1, "quantity": 3}}),
    # Links: `_results` changes the URLs and the downloads
    Fault.SIGNED_LINK: Trait(),
    Fault.REDIRECTED_LINK: Trait(),
    Fault.REDIRECTED_LINK_RELATIVE: Trait(),
    Fault.LATE_404: Trait(),
    Fault.LATE_403: Trait(),
    Fault.LATE_202: Trait(),
    Fault.LATE_425: Trait(),
    Fault.LATE_429: Trait(),
    Fault.LATE_503: Trait(),
    Fault.HTML_LINK: Trait(),
    Fault.CUT_LINK: Trait(),
}

INLINE = frozenset((Fault.INLINE_DATA_URI, Fault.INLINE_B64_JSON, Fault.INLINE_BASE64))
"""The traits with which a picture is in the task object."""
