"""Task objects: how the service describes a task in responses and webhooks. No I/O; times are arguments.

Texts in braces are placeholders, which `fill()` replaces. The letters name the sources: [S] the vendor's page for the
model, [C] the vendor's clients, [B] the documentation of the model's maker.
"""

import base64
from datetime import UTC, datetime
from typing import Any

from flux2max_async.emulator._answers import fill
from flux2max_async.emulator._faults import Fault
from flux2max_async.emulator._service import EmulatedTask
from flux2max_async.emulator._traits import TRAITS, Trait
from flux2max_async.emulator._validation import MODEL

_COMMON = {"id": "{id}", "model": MODEL, "created_at": "{created_at}"}
# As in [S] and [C].
_TASK: dict[str, dict[str, Any]] = {
    "running": {**_COMMON, "status": "{status}", "progress": "{progress}"},
    "completed": {
        **_COMMON,
        "status": "completed",
        "progress": 1.0,
        "output": [{"content": [{"type": "image", "url": "{url}", "jobId": "job-{id}"}]}],
        "usage": {"cost": "{cost}", "discount": 1},
        "metadata": {},
    },
    "failed": {**_COMMON, "status": "failed", "error": {"code": "{error}", "message": "{message}"}},
}
# As in [B].
_MAKER: dict[str, dict[str, Any]] = {
    "running": {"id": "{id}", "status": "Pending"},
    "completed": {
        "id": "{id}",
        "status": "Ready",
        "result": {"sample": "{sample}", "prompt": "{prompt}", "seed": "{seed}"},
    },
    "failed": {"id": "{id}", "status": "Error", "error": "{error}", "message": "{message}"},
}
# Code and message of the errors.
_FAILED = "generation_failed", "the model gave up"
_MODERATED = "content_policy_violation", "Request Moderated"


def describe(task: EmulatedTask, url: str, picture: bytes, now: float, *, maker: bool = False) -> dict[str, Any]:
    """Return the task object of a task, as its trait has it.

    Args:
        task: The task.
        url: The URL of its result.
        picture: Its result, if the trait puts it into the task object; empty otherwise.
        now: The time.
        maker: Use the format of the model's maker, of whose fields a trait changes only the status.
    """
    trait = Trait() if task.trait is None else TRAITS[task.trait]
    if now < task.ends:
        phase, fields = "running", trait.running
    elif task.fate == "completed":
        phase, fields = "completed", trait.completed
    else:
        phase, fields = "failed", trait.failed
    if maker or task.trait is Fault.MAKER_RESULT:
        template = _MAKER[phase] | {name: value for name, value in fields.items() if name == "status"}
    else:
        template = _TASK[phase] | dict(fields)
    description: dict[str, Any] = fill(template, _values(task, url, picture, now))
    return description


def _values(task: EmulatedTask, url: str, picture: bytes, now: float) -> dict[str, Any]:
    """Return what the placeholders stand for."""
    progress = (now - task.begins) / (task.ends - task.begins) if now < task.ends else 1.0
    encoded = base64.b64encode(picture).decode()
    data_uri = f"data:image/{task.output_format};base64,{encoded}"
    error, message = _MODERATED if task.fate == "moderated" else _FAILED
    return {
        "id": task.id,
        "created_at": int(task.created_at),
        "created_at_text": datetime.fromtimestamp(task.created_at, UTC).isoformat(),
        "status": "pending" if progress < 0.05 else "in_progress",
        "progress": round(progress, 2),
        "step": int(28 * progress),
        "url": url,
        "base64": encoded,
        "data_uri": data_uri,
        "sample": data_uri if picture else url,
        "cost": str(task.cost),
        "cost_number": float(task.cost),
        "prompt": task.prompt,
        "seed": task.seed,
        "error": error,
        "message": message,
    }
