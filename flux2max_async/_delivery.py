"""What a webhook delivers: whether it comes from the service, and what it says of a task.

Sources are named as in `_wire`. The service documents that it posts the finished task, not in which shape: both that
are known are read, and told apart by their keys.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from flux2max_async._errors import InvalidRequestError, ProtocolError, WebhookSignatureError
from flux2max_async._reply import problem
from flux2max_async._task import TaskSnapshot
from flux2max_async._wire import moment, snapshot_of, task_id_of

MAX_BODY = 1_000_000
"""Bytes of a delivery; a finished task takes about one thousand."""
SIGNATURE_HEADER = "X-BFL-Signature"  # [B]
MAX_AGE = 300.0


# ------------------------------------------------------------------ is it the service's


def verify(
    body: bytes,
    headers: Mapping[str, str],
    secret: str | Iterable[str],
    *,
    header: str = SIGNATURE_HEADER,
    max_age: float | None = MAX_AGE,
    now: datetime | None = None,
) -> None:
    """Make sure that a delivery was signed by somebody who knows the secret, and not long ago.

    Args:
        body: As it came, byte by byte: JSON that was read and written again has another signature.
        headers: Of the delivery; their names are compared without regard to case.
        secret: What was sent as `webhook_secret`; several while an old one is being replaced. Empty ones never verify.
        header: Which of the headers holds the signature, `sha256=<hex>` or the hexadecimal digits alone. [B]
        max_age: Seconds after which a delivery whose body tells when it was sent counts as replayed; None for any.
        now: The present, timezone-aware; by default, this machine's clock says.

    Raises:
        WebhookSignatureError: The signature is missing, malformed or wrong, or the delivery is too old.
        InvalidRequestError: The body isn't given as bytes, a secret isn't text, or `now` has no time zone.
    """
    body = _raw(body)
    if now is not None and now.tzinfo is None:
        raise InvalidRequestError("now must be timezone-aware", "now")
    expected = [hmac.new(key, body, hashlib.sha256).hexdigest() for key in _keys(secret)]
    given = [value for name, value in headers.items() if name.lower() == header.lower()]
    if not given:
        raise WebhookSignatureError(f"the delivery has no {header} header")
    signatures = [found[1].lower() for value in given if (found := _SIGNATURE.fullmatch(value.strip()))]
    if not signatures:
        raise WebhookSignatureError(f"the {header} header holds no signature: it must look like sha256=<64 hex digits>")
    matches = [hmac.compare_digest(one, other) for one in signatures for other in expected]
    if not any(matches):
        raise WebhookSignatureError("the signature is wrong: another secret, or not the bytes that were signed")
    sent = None if max_age is None else _sent_at(body)
    if max_age is not None and sent is not None and ((now or datetime.now(UTC)) - sent).total_seconds() > max_age:
        raise WebhookSignatureError(
            f"the delivery was sent more than {max_age:g} s ago: it is a replayed one, or this machine's clock is wrong"
        )


_SIGNATURE = re.compile(r"(?:sha256=)?([0-9a-f]{64})", re.ASCII | re.IGNORECASE)


def _keys(secret: str | Iterable[str]) -> list[bytes]:
    secrets = [secret] if isinstance(secret, str) or not isinstance(secret, Iterable) else list(secret)
    if not all(isinstance(one, str) for one in secrets):
        raise InvalidRequestError("secret must be text, or several texts", "secret")
    return [one.encode(errors="surrogatepass") for one in secrets if one]


def _sent_at(body: bytes) -> datetime | None:
    """Read when a delivery was sent. [B] It stands in the body, where the signature covers it."""
    try:
        return moment(_object(body).get("timestamp")) if b'"timestamp"' in body else None
    except ProtocolError:
        return None


def _raw(body: bytes) -> bytes:
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(
            f"body must be the bytes of the delivery as they came, not {type(body).__name__}", "body"
        )
    return bytes(body)


# ------------------------------------------------------------------ what it says


def parse(body: bytes) -> TaskSnapshot:
    """Read what a delivery says of its task; verify it first.

    Args:
        body: The task object as polls answer it, or the maker's own: `{"id", "status": "Ready", "result": {"sample"}}`,
            `{"id", "status": "Error", "error", "message"}` [B].

    Returns:
        The task; one that failed has an `error`, a ContentModeratedError where moderation refused it. The maker's own
        payload names no cost.

    Raises:
        ProtocolError: It is larger than 1 MB, no JSON object, has no id or no status, or says that the task is
            completed and holds no output. Its `task_id` names the task where there is an id.
        InvalidRequestError: The body isn't given as bytes.
    """
    return read_delivery(_raw(body))


def read_delivery(body: bytes, secrets: tuple[str, ...] = ()) -> TaskSnapshot:
    """Read a delivery, keeping secrets that the service has echoed out of the error in it."""
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a delivery has at most {MAX_BODY} bytes, not {len(body)}")
    told = _object(body)
    if (task_id := task_id_of(told)) is None:
        raise ProtocolError("the delivery names no task: its id is missing")
    try:
        return snapshot_of(task_id, _task_object(told), raw=told, secrets=secrets)
    except ProtocolError as error:
        error.task_id = task_id
        raise


def is_not_found(snapshot: TaskSnapshot) -> bool:
    """Tell whether a delivery says that there is no such task, which whoever sends it can't well know."""
    return snapshot.error is not None and str(snapshot.raw.get("status")).strip().lower() == _NOT_FOUND


def _object(body: bytes) -> dict[str, Any]:
    told: object = None
    try:
        told = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ProtocolError("the delivery is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the delivery is no JSON that could be read: {error}") from error
    if not isinstance(told, dict):
        raise ProtocolError(f"the delivery must be a JSON object, not {type(told).__name__}")
    return told


_NOT_FOUND = "task not found"
# [B] The maker's statuses, in the gateway's words.
_STATUSES = {
    "ready": "completed",
    "error": "failed",
    "request moderated": "failed",
    "content moderated": "failed",
    _NOT_FOUND: "failed",
}


def _task_object(told: dict[str, Any]) -> dict[str, Any]:
    """Give the maker's payload the shape of the task object [B], which stays as it is."""
    task = dict(told)
    result, status = told.get("result"), told.get("status")
    if isinstance(result, dict) and isinstance(result.get("sample"), str) and not told.get("output"):
        about = {name: value for name, value in result.items() if name != "sample"}
        task["output"] = [{"content": [{**about, "type": "image", "url": result["sample"]}]}]
    if isinstance(status, str) and (ours := _STATUSES.get(status.strip().lower())):
        task["status"] = ours
        # A status that says more than the error does, as that of moderation may, becomes its code.
        if ours == "failed" and (not told.get("error") or "moderated" in status.lower()):
            _, message = problem(told) or (None, status)
            task["error"] = {"code": status, "message": message}
    return task
