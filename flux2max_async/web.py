"""For handlers of web applications: end a wait when the visitor has left. No framework is needed.

::

    async with cancel_on_disconnect(request) as visit:
        done = await session.generate(prompt)
    if visit.disconnected:
        return Response(status_code=499)  # nobody sees it
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, MutableMapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import attrs

from flux2max_async._text import get_logger

__all__ = ["Visit", "cancel_on_disconnect"]

_logger = get_logger("web")

_READ_AHEAD = 64 * 1024
"""Bytes of a body that are read before the handler asks for them."""
_CHECK_INTERVAL = 0.2
"""Seconds between two looks at a connection whose server reports no disconnect."""

_Message = MutableMapping[str, Any]


@attrs.define(eq=False)
class Visit:
    """What `cancel_on_disconnect()` knows about the visitor."""

    disconnected: bool = False
    """Whether the visitor left before the block had ended, so that the block was cancelled."""


@asynccontextmanager
async def cancel_on_disconnect(request: Any, /) -> AsyncGenerator[Visit]:
    """Cancel the block when the visitor leaves, and go on after it, with `disconnected` true.

    The block ends like that of `asyncio.timeout()`, but no error leaves it. Cancelled, `generate()` withdraws a request
    that waits for a slot; a submitted request goes on. Any other cancellation (by the server, a time limit, a task
    group) and any error leave the block as usual. If the block ends by itself first, `disconnected` stays false, even
    if the visitor leaves later.

    The body may be read before, in or after the block. While more than 64 KiB of it are unread, the server can't see
    that the visitor leaves: read large bodies first. With some servers, uvicorn among them, the same holds while a
    further request waits on the same connection (HTTP pipelining, which browsers don't use).

    With ASGI, the block reads ahead. Nothing is lost, because it replaces the `receive` of `request` by one that
    returns what has been read. Unless the whole body was read before, a raw ASGI application must therefore call
    `request.receive()` after it has entered the block, not the server's own function.

    Args:
        request: A `Request` of Starlette or FastAPI, an `aiohttp.web.Request` (with or without `handler_cancellation`),
            or any object with the attributes `scope` and `receive`, of which the latter can be set.

    Raises:
        TypeError: It is none of these, or a WebSocket.
    """
    task = asyncio.current_task()
    assert task is not None, "asyncio runs coroutines in tasks only"
    cancelling = task.cancelling()
    visit = Visit()

    # The event loop calls this while the task is suspended within the block, never while it runs, and never after the
    # block has ended. So the CancelledError is raised in the block for certain.
    def end_block() -> None:
        if not visit.disconnected:
            visit.disconnected = True
            task.cancel()

    try:
        with _find_watch(request)(request, end_block):
            yield visit
    except asyncio.CancelledError:
        # As in asyncio.timeout(): if somebody else has cancelled the task as well, the cancellation is theirs.
        if not visit.disconnected or task.cancelling() > cancelling + 1:
            raise
    finally:
        if visit.disconnected:
            task.uncancel()


def _find_watch(request: Any) -> "Callable[[Any, Callable[[], None]], AbstractContextManager[None]]":
    """Return the context manager that watches the visitor of such a request."""
    if hasattr(request, "scope") and hasattr(request, "receive"):
        if request.scope["type"] == "http":
            return _watch_receive
    elif hasattr(request, "transport"):
        return _watch_transport
    raise TypeError(
        f"cancel_on_disconnect() needs an HTTP request of Starlette, FastAPI or aiohttp.web, or an object with the "
        f"attributes `scope` and `receive`, not {type(request).__qualname__}"
    )


# ------------------------------------------------------------------ aiohttp.web


@contextmanager
def _watch_transport(request: Any, on_disconnect: Callable[[], None]) -> Generator[None]:
    """Call a function when the connection of a request is closed.

    Without `handler_cancellation`, aiohttp tells a handler in no other way. The body is left alone.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.Handle

    def check() -> None:
        nonlocal timer
        transport = request.transport
        if transport is None or transport.is_closing():
            on_disconnect()
        else:
            timer = loop.call_later(_CHECK_INTERVAL, check)

    timer = loop.call_soon(check)
    try:
        yield
    finally:
        timer.cancel()


# ------------------------------------------------------------------ ASGI


@contextmanager
def _watch_receive(request: Any, on_disconnect: Callable[[], None]) -> Generator[None]:
    """Call a function when an ASGI server reports that the visitor has left."""
    # Starlette's own methods, and FastAPI's, read the body with the function in `_receive`.
    name = "_receive" if hasattr(request, "_receive") else "receive"
    receive = getattr(request, name)
    if not isinstance(receive, _Receive):
        receive = _Receive(receive)
        setattr(request, name, receive)
    receive.add_watcher(on_disconnect)
    try:
        yield
    finally:
        receive.remove_watcher(on_disconnect, body_is_read=getattr(request, "_stream_consumed", False))


class _Receive:
    """The `receive` of one request; while somebody watches the visitor, it is called ahead of the handler.

    At most one call of the server's function runs at a time. While there are watchers, the calls are made in tasks,
    and their results wait in `_results` until the handler asks for them. Without watchers, its calls are passed on.
    """

    def __init__(self, receive: Callable[[], Awaitable[_Message]]) -> None:
        self._receive = receive
        self._results = deque[_Message | BaseException]()
        self._size = 0
        self._call: asyncio.Task[_Message] | None = None
        self._is_cancelled = False
        self._watchers: list[Callable[[], None]] = []
        self._body_has_ended = False
        self._disconnected = False

    async def __call__(self) -> _Message:
        """Return the next message of the request."""
        while not self._results:
            if self._disconnected:
                return {"type": "http.disconnect"}
            if self._call is None:
                message = await self._receive()
                self._note(message)
                return message
            await asyncio.wait([self._call])
        result = self._results.popleft()
        if isinstance(result, BaseException):
            raise result
        self._size -= len(result.get("body", b""))
        self._read_ahead()
        return result

    def add_watcher(self, on_disconnect: Callable[[], None]) -> None:
        self._watchers.append(on_disconnect)
        if self._disconnected:
            asyncio.get_running_loop().call_soon(self._report)
        self._read_ahead()

    def remove_watcher(self, on_disconnect: Callable[[], None], *, body_is_read: bool) -> None:
        """Stop calling a function; end the running call if nobody needs it.

        A call that may bring a part of the body is not cancelled, as the part could be lost, for example in
        BaseHTTPMiddleware. It ends with that part, or with the task of the handler.
        """
        self._watchers.remove(on_disconnect)
        call = self._call
        if self._watchers or call is None:
            return
        if body_is_read or self._body_has_ended:
            self._is_cancelled = call.cancel()
        else:
            task = asyncio.current_task()
            assert task is not None, "asyncio runs coroutines in tasks only"
            task.add_done_callback(lambda _: call.cancel())

    def _read_ahead(self) -> None:
        if self._watchers and self._call is None and self._size < _READ_AHEAD and not self._disconnected:
            self._call = asyncio.create_task(self._call_server())
            self._call.add_done_callback(self._on_result)

    async def _call_server(self) -> _Message:
        # Not every awaitable that servers return is a whole future: granian's have one callback only.
        return await self._receive()

    def _on_result(self, call: "asyncio.Task[_Message]") -> None:
        was_cancelled, self._is_cancelled = self._is_cancelled, False
        self._call = None
        error = None if call.cancelled() else call.exception()
        if was_cancelled and (call.cancelled() or error):
            self._read_ahead()  # another block may have begun since
        elif error:
            self._results.append(error)
            _logger.warning("a request goes on even if its visitor leaves: receive() failed: %s", error)
        elif not call.cancelled():
            message = call.result()
            self._results.append(message)
            self._size += len(message.get("body", b""))
            self._note(message)
            self._report()
            self._read_ahead()

    def _note(self, message: _Message) -> None:
        if message["type"] == "http.disconnect":
            self._disconnected = True
        elif not message.get("more_body", False):
            self._body_has_ended = True

    def _report(self) -> None:
        if self._disconnected:
            for on_disconnect in tuple(self._watchers):
                on_disconnect()
