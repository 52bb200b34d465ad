"""HTTP responses, task objects and images for tests."""

import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from multidict import CIMultiDict
from PIL import Image

from flux2max_async._api.response import HttpResponse

RECEIVED = datetime(2025, 11, 22, 10, 0, 0, tzinfo=UTC)
"""When each response was received, by this machine's clock: a Saturday."""


def make_response(body: object = b"", status: int = 200, headers: Mapping[str, str] | None = None) -> HttpResponse:
    """Return a response whose body is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpResponse(status, CIMultiDict(headers or {}), content, RECEIVED)


def finished(**changes: object) -> dict[str, object]:
    """Return the documented example of a completed task object, with changes; `...` removes a field."""
    task = {
        "id": "t1",
        "status": "completed",
        "model": "flux_2_max",
        "created_at": 1763800000,
        "progress": 1.0,
        "output": [{"content": [{"type": "image", "url": "https://pictures.example/0.jpeg", "jobId": "j1"}]}],
        "usage": {"cost": "0.07", "discount": 1},
        "metadata": {},
        **changes,
    }
    return {name: value for name, value in task.items() if value is not ...}


def picture(image_format: str = "PNG") -> bytes:
    """Return an encoded image of 4 by 4 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "navy").save(file, image_format)
    return file.getvalue()


def jpeg(payload: bytes = b"") -> bytes:
    """Return an encoded image of 4 by 4 pixels that contains a payload as comments."""
    image = picture("JPEG")
    parts = [payload[start : start + 65_533] for start in range(0, len(payload), 65_533)]
    comments = b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
    return image[:2] + comments + image[2:]
