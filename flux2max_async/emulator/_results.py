"""The results of tasks: their images, their URLs, and downloads."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import anyio.to_thread
from aiohttp import web

from flux2max_async.emulator._answers import GARBAGE, LATE
from flux2max_async.emulator._descriptions import describe
from flux2max_async.emulator._faults import Fault
from flux2max_async.emulator._images.scenes import draw
from flux2max_async.emulator._responses import build_response, send_half_without_length
from flux2max_async.emulator._service import EmulatedTask, Service
from flux2max_async.emulator._traits import INLINE
from flux2max_async.emulator._validation import ServiceError

_LATE_SECONDS = 2.0
"""How long the link of a finished task does not work with one of the traits `Fault.LATE_…`."""


class Results:
    """The results of the service's tasks.

    Args:
        service: The service that owns the tasks.
        base_url: Returns the URL of the server.
        draws_images: False returns the same tiny image for every task.
    """

    def __init__(self, service: Service, base_url: Callable[[], str], *, draws_images: bool) -> None:
        self._service = service
        self._base_url = base_url
        self._draws_images = draws_images

    async def describe(self, task: EmulatedTask, now: float, *, maker: bool = False) -> dict[str, Any]:
        """Return the task object of a task, with a URL whose lifetime starts at `now`."""
        is_inline = task.trait in INLINE and task.fate == "completed" and now >= task.ends
        picture = await self._image(task) if is_inline else b""
        expires = now + self._service.url_lifetime / self._service.time_scale
        target = _signed_target(task, expires) if task.trait is Fault.SIGNED_LINK else _target(task, expires)
        return describe(task, self._base_url() + target, picture, now, maker=maker)

    async def download(self, request: web.Request) -> web.StreamResponse:
        """Respond to a download.

        Raises:
            ServiceError: There is no such result, or its URL has expired or is not spelled as it was signed.
        """
        now = asyncio.get_running_loop().time()
        task_id, _, _ = request.match_info["id"].rpartition(".")
        task = self._service.tasks.get(task_id)
        if task is None:
            raise self._service.not_found()
        expires = float(request.query.get("expires", "0"))
        if now > expires:
            raise ServiceError(403, "expired", "the url has expired")
        # Byte for byte, as object stores compare.
        if "name" in request.match_info and request.raw_path != _signed_target(task, expires):
            raise ServiceError(403, "SignatureDoesNotMatch", "the signature does not match the request")
        task.downloads += 1
        return await self._respond(request, task, now, expires)

    async def _respond(
        self, request: web.Request, task: EmulatedTask, now: float, expires: float
    ) -> web.StreamResponse:
        time_scale = self._service.time_scale
        match task.trait:
            case Fault.REDIRECTED_LINK | Fault.REDIRECTED_LINK_RELATIVE if "name" not in request.match_info:
                host = self._base_url() if task.trait is Fault.REDIRECTED_LINK else ""
                return web.Response(status=302, headers={"Location": host + _signed_target(task, expires)})
            case Fault() as fault if fault in LATE and now < task.ends + _LATE_SECONDS / time_scale:
                return build_response(LATE[fault], time_scale)
            case Fault.HTML_LINK if task.downloads == 1:
                return build_response(GARBAGE, time_scale)
            case Fault.CUT_LINK if task.downloads == 1:
                return send_half_without_length(request, await self._image(task), f"image/{task.output_format}")
            case _:
                return _image_response(request, task, await self._image(task))

    async def _image(self, task: EmulatedTask) -> bytes:
        if not self._draws_images:
            return _draw("", 0, 64, 64, task.output_format, ())
        return await anyio.to_thread.run_sync(
            _draw, task.prompt, task.seed, task.width, task.height, task.output_format, task.input_images
        )


def _target(task: EmulatedTask, expires: float) -> str:
    return f"/results/{task.id}.{task.output_format}?expires={expires!r}"


def _signed_target(task: EmulatedTask, expires: float) -> str:
    """Return a target whose percent-encoded characters a client must leave as they are."""
    signature = f"Policy=eyJ%2FabC%40%3A+d%2be&Signature=%2B{task.id}%2f%3D%3D&picture=%E2%9C%93"
    name = f"flux%2Fmax%40v2%3A0+1.{task.output_format}"
    return f"/signed/{task.id}.{task.output_format}/{name}?expires={expires!r}&{signature}"


def _image_response(request: web.Request, task: EmulatedTask, image: bytes) -> web.Response:
    """Return an image, or the rest of it that the request names."""
    content_type = f"image/{task.output_format}"
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{task.id}"'}
    start = request.http_range.start or 0
    if start and request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
        headers["Content-Range"] = f"bytes {start}-{len(image) - 1}/{len(image)}"
        return web.Response(status=206, body=image[start:], content_type=content_type, headers=headers)
    return web.Response(body=image, content_type=content_type, headers=headers)


@functools.lru_cache(maxsize=32)
def _draw(prompt: str, seed: int, width: int, height: int, output_format: str, inputs: tuple[bytes, ...]) -> bytes:
    return draw(prompt, seed=seed, width=width, height=height, output_format=output_format, input_images=inputs)
