"""Blocks that end when the visitor leaves, for each kind of request."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message
from starlette.websockets import WebSocket
from support.virtual_time import VirtualTimeLoop, hold_up

from flux2max_async.web import Visit, cancel_on_disconnect

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}
DISCONNECT = {"type": "http.disconnect"}


def chunk(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


class Channel:
    """The messages of an ASGI server.

    Args:
        steps: Steps of the event loop between taking a message and returning it. A caller who is cancelled in between
            loses the message, as in BaseHTTPMiddleware.
    """

    def __init__(self, *messages: Message, steps: int = 0) -> None:
        self._messages = deque(messages)
        self._changed = asyncio.Event()
        self._steps = steps
        self.calls = 0
        """Running calls of receive()."""

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._changed.set()

    async def receive(self) -> Message:
        self.calls += 1
        assert self.calls == 1, "two calls at once"
        try:
            while not self._messages:
                self._changed.clear()
                await self._changed.wait()
            message = self._messages[0]
            if message != DISCONNECT:  # which servers repeat
                self._messages.popleft()
            for _ in range(self._steps):
                await asyncio.sleep(0)
            return message
        finally:
            self.calls -= 1


class Visitor:
    """A visitor whose request is of some kind, with a body that has been received."""

    def __init__(self, kind: str) -> None:
        self._channel = Channel(chunk(b"{}"))
        self._transport = SimpleNamespace(is_closing=lambda: False)
        self.request: Any
        match kind:
            case "starlette":
                self.request = Request(SCOPE, self._channel.receive)
            case "raw":
                self.request = SimpleNamespace(scope=SCOPE, receive=self._channel.receive)
            case _:
                self.request = SimpleNamespace(transport=self._transport)

    def leave(self) -> None:
        self._channel.put(DISCONNECT)
        self._transport.is_closing = lambda: True


@pytest.fixture(params=["starlette", "raw", "aiohttp"])
def visitor(request: pytest.FixtureRequest) -> Visitor:
    """Provide a visitor for each kind of request."""
    return Visitor(request.param)


async def settle() -> None:
    """Let everything happen that happens at this moment, and what the next look at a connection shows."""
    await asyncio.sleep(0.5)


def current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def wait_in_block(visitor: Visitor, wait: Callable[[], Awaitable[Any]]) -> Visit:
    """Wait in a block and check that nothing of a cancellation is left after it."""
    async with cancel_on_disconnect(visitor.request) as visit:
        await wait()
    assert current_task().cancelling() == 0
    await asyncio.sleep(1.0)
    return visit


async def forever() -> None:
    await asyncio.Event().wait()


# ------------------------------------------------------------------ leaving


async def test_visitor_leaves(visitor: Visitor) -> None:
    """When the visitor leaves, the wait in the block ends, and the handler goes on after the block."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    loop.call_later(5.0, visitor.leave)
    visit = await wait_in_block(visitor, forever)

    assert visit.disconnected
    assert 5.0 <= loop.time() - begun - 1.0 < 5.3


async def test_visitor_stays(visitor: Visitor) -> None:
    """If the block ends by itself, the visitor may leave later: nothing is cancelled."""
    async with cancel_on_disconnect(visitor.request) as visit:
        await asyncio.sleep(5.0)
    visitor.leave()
    await settle()

    assert not visit.disconnected


async def test_visitor_has_left(visitor: Visitor) -> None:
    """If the visitor has left before, the first wait in a block ends, and so does that of the next block."""
    visitor.leave()
    visits = [await wait_in_block(visitor, forever) for _ in range(3)]

    assert [visit.disconnected for visit in visits] == [True, True, True]


async def test_block_without_waits(visitor: Visitor) -> None:
    """A block that doesn't wait is not cancelled, nor is what comes after it."""
    visitor.leave()
    async with cancel_on_disconnect(visitor.request) as visit:
        pass
    await settle()

    assert not visit.disconnected


async def test_cancellation_is_handled_in_the_block(visitor: Visitor) -> None:
    """Code in the block may handle the cancellation; then the block goes on, and is not cancelled again."""

    async def wait() -> None:
        with suppress(asyncio.CancelledError):
            await forever()
        await asyncio.sleep(1.0)

    asyncio.get_running_loop().call_later(1.0, visitor.leave)
    visit = await wait_in_block(visitor, wait)

    assert visit.disconnected


async def test_nested_blocks(visitor: Visitor) -> None:
    """Blocks within each other end together."""
    asyncio.get_running_loop().call_later(5.0, visitor.leave)
    async with cancel_on_disconnect(visitor.request) as outer:
        inner = await wait_in_block(visitor, lambda: asyncio.sleep(0.1))
        async with cancel_on_disconnect(visitor.request):
            await forever()
        await forever()

    assert (outer.disconnected, inner.disconnected) == (True, False)
    assert current_task().cancelling() == 0


async def test_block_in_a_block_that_goes_on(visitor: Visitor) -> None:
    """A block within one that has handled its cancellation is cancelled by itself; the outer one is not once more."""
    asyncio.get_running_loop().call_later(1.0, visitor.leave)
    async with cancel_on_disconnect(visitor.request) as outer:
        with suppress(asyncio.CancelledError):
            await forever()
        async with cancel_on_disconnect(visitor.request) as inner:
            await forever()
        await asyncio.sleep(1.0)

    assert (outer.disconnected, inner.disconnected) == (True, True)
    assert current_task().cancelling() == 0


async def test_blocks_in_several_tasks(visitor: Visitor) -> None:
    """Blocks of one request in several tasks all end; one that ends earlier doesn't disturb the others."""
    asyncio.get_running_loop().call_later(2.0, visitor.leave)
    waits = [forever, lambda: asyncio.sleep(1.0), forever]
    visits = await asyncio.gather(*(wait_in_block(visitor, wait) for wait in waits))

    assert [visit.disconnected for visit in visits] == [True, False, True]


# ------------------------------------------------------------------ errors and other cancellations


async def test_errors_pass(visitor: Visitor) -> None:
    """An error in the block leaves it, also if it comes from the cancellation."""

    async def fail() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise LookupError from None

    with pytest.raises(ZeroDivisionError):
        async with cancel_on_disconnect(visitor.request):
            raise ZeroDivisionError
    visitor.leave()
    with pytest.raises(LookupError):
        await wait_in_block(visitor, fail)
    assert current_task().cancelling() == 0


async def leave_now(visitor: Visitor, visit: Visit) -> None:
    """Let the visitor leave, and return when the handler is cancelled, but has not run since."""
    visitor.leave()
    while not visit.disconnected:
        hold_up(0.01)
        await asyncio.sleep(0)


@pytest.mark.parametrize("leaves", [False, True])
async def test_cancelled_by_others(visitor: Visitor, leaves: bool) -> None:
    """A cancellation from outside is not swallowed, also if the visitor leaves at the same moment."""
    visits: list[Visit] = []

    async def handle() -> None:
        async with cancel_on_disconnect(visitor.request) as visit:
            visits.append(visit)
            await forever()

    task = asyncio.create_task(handle())
    await settle()
    if leaves:
        await leave_now(visitor, visits[0])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert visits[0].disconnected == leaves
    assert task.cancelling() == 1


@pytest.mark.parametrize("leaves", [False, True])
async def test_timeout_around(visitor: Visitor, leaves: bool) -> None:
    """A time limit around the block ends it with its TimeoutError, also if the visitor leaves at the same moment."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout, cancel_on_disconnect(visitor.request) as visit:
            await settle()
            watch = asyncio.create_task(expire_when_left(visitor, visit, timeout, leaves=leaves))
            await forever()
    await watch

    assert visit.disconnected == leaves
    assert current_task().cancelling() == 0


async def expire_when_left(visitor: Visitor, visit: Visit, time_limit: asyncio.Timeout, *, leaves: bool) -> None:
    """Let a time limit expire, in the same step of the event loop in which a visitor leaves."""
    if leaves:
        await leave_now(visitor, visit)
    time_limit._on_timeout()  # type: ignore[attr-defined]


@pytest.mark.parametrize("leaves", [False, True])
async def test_timeout_inside(visitor: Visitor, leaves: bool) -> None:
    """A time limit in the block raises its TimeoutError there, if the visitor doesn't leave before or at that moment."""
    expired = False
    async with cancel_on_disconnect(visitor.request) as visit:
        try:
            async with asyncio.timeout(None) as timeout:
                await settle()
                watch = asyncio.create_task(expire_when_left(visitor, visit, timeout, leaves=leaves))
                await forever()
        except TimeoutError:
            expired = True
    await watch

    assert (visit.disconnected, expired) == (leaves, not leaves)
    assert current_task().cancelling() == 0


async def test_task_group_around(visitor: Visitor) -> None:
    """A task group that ends because a sibling has failed ends the block, and has the sibling's error."""
    reached = False

    async def handle() -> None:
        nonlocal reached
        async with cancel_on_disconnect(visitor.request):
            await forever()
        reached = True

    async def fail() -> None:
        await asyncio.sleep(1.0)
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.TaskGroup() as group:
            group.create_task(handle())
            group.create_task(fail())

    assert raised.group_contains(ZeroDivisionError)
    assert not reached


async def test_task_group_inside(visitor: Visitor) -> None:
    """When the visitor leaves, the tasks of a group in the block are cancelled."""
    ended: list[str] = []

    async def wait(name: str) -> None:
        try:
            await forever()
        finally:
            ended.append(name)

    async def wait_for_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait("a"))
            group.create_task(wait("b"))

    asyncio.get_running_loop().call_later(1.0, visitor.leave)
    visit = await wait_in_block(visitor, wait_for_group)

    assert visit.disconnected
    assert sorted(ended) == ["a", "b"]


async def test_task_group_that_fails_inside(visitor: Visitor) -> None:
    """Errors that tasks of a group in the block raise when the visitor leaves are not lost."""

    async def fail() -> None:
        try:
            await forever()
        finally:
            raise ZeroDivisionError

    async def wait_for_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    asyncio.get_running_loop().call_later(1.0, visitor.leave)
    with pytest.raises(ExceptionGroup) as raised:
        await wait_in_block(visitor, wait_for_group)

    assert raised.group_contains(ZeroDivisionError)
    assert current_task().cancelling() == 0


@pytest.mark.parametrize("scope_is_around", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_anyio_scopes(visitor: Visitor, scope_is_around: bool, leaves: bool) -> None:
    """Cancel scopes of anyio around the block and in it end what is in them, and leave nothing cancelled."""
    if leaves:
        asyncio.get_running_loop().call_later(1.0, visitor.leave)
    with anyio.move_on_after(2.0 if scope_is_around else None) as outer:
        async with cancel_on_disconnect(visitor.request) as visit:
            with anyio.move_on_after(None if scope_is_around else 2.0) as inner:
                await forever()
    await asyncio.sleep(1.0)

    assert visit.disconnected == leaves
    assert (outer if scope_is_around else inner).cancelled_caught != leaves
    assert current_task().cancelling() == 0


# ------------------------------------------------------------------ bodies


def make_request(channel: Channel, kind: str) -> tuple[Any, Callable[[], Awaitable[bytes]]]:
    """Return a request and a function that reads its body."""
    if kind == "starlette":
        request = Request(SCOPE, channel.receive)
        return request, request.body
    raw = SimpleNamespace(scope=SCOPE, receive=channel.receive)
    return raw, lambda: Request(SCOPE, raw.receive).body()


ASGI_KINDS = pytest.mark.parametrize("kind", ["starlette", "raw"])


@ASGI_KINDS
@pytest.mark.parametrize("when", ["before", "inside", "after", "around"])
async def test_body(kind: str, when: str) -> None:
    """The body is complete, whether it is read before, in or after the block, or arrives in the meantime."""
    channel = Channel(chunk(b"a" * 1000, more=True))
    request, read = make_request(channel, kind)
    end = asyncio.get_running_loop().call_later(3.0 if when == "around" else 0.5, channel.put, chunk(b"b"))
    body = await read() if when == "before" else None
    async with cancel_on_disconnect(request) as visit:
        body = await read() if when == "inside" else body
        await asyncio.sleep(1.0)
    if when in {"after", "around"}:
        body = await read()

    assert body == b"a" * 1000 + b"b"
    assert not visit.disconnected
    assert not end.cancelled()


class PoorFuture(asyncio.Future[Message]):
    """A future for which only one can wait."""

    callbacks = 0

    def add_done_callback(self, callback: Any, *, context: Any = None) -> None:
        self.callbacks += 1
        assert self.callbacks == 1
        super().add_done_callback(callback, context=context)


async def test_receive_that_returns_a_future() -> None:
    """The server's receive() may return any awaitable, even one that only one can wait for."""
    futures = [PoorFuture() for _ in range(3)]
    calls = iter(futures)
    request = SimpleNamespace(scope=SCOPE, receive=lambda: next(calls))
    for number, message in enumerate([chunk(b"a", more=True), chunk(b"b"), DISCONNECT]):
        asyncio.get_running_loop().call_later(number + 1.0, futures[number].set_result, message)
    async with cancel_on_disconnect(request) as visit:
        body = await Request(SCOPE, request.receive).body()
        await forever()

    assert body == b"ab"
    assert visit.disconnected


@ASGI_KINDS
async def test_visitor_leaves_within_the_body(kind: str) -> None:
    """If the visitor leaves before the body is complete, reading it ends, in the block and after it."""
    channel = Channel(chunk(b"a", more=True))
    request, read = make_request(channel, kind)
    asyncio.get_running_loop().call_later(1.0, channel.put, DISCONNECT)
    async with cancel_on_disconnect(request) as visit:
        await read()
    with pytest.raises(ClientDisconnect):
        await make_request(channel, kind)[1]()
    with pytest.raises(ClientDisconnect):
        await Request(SCOPE, request.receive).body()
    with pytest.raises(ClientDisconnect):
        await Request(SCOPE, request.receive).body()

    assert visit.disconnected


@ASGI_KINDS
async def test_large_body_is_not_read_ahead(kind: str) -> None:
    """Only the beginning of a large body is read ahead; the visitor's leaving shows when the handler has read the rest."""
    messages = [chunk(b"%2d" % number * 10_000, more=number < 9) for number in range(10)]
    channel = Channel(*messages, DISCONNECT)
    request, read = make_request(channel, kind)
    async with cancel_on_disconnect(request) as visit:
        await settle()
        unread = len(channel._messages)
        body = await read()
        disconnected_before = visit.disconnected
        await forever()

    assert unread == 1 + 10 - 4
    assert body == b"".join(message["body"] for message in messages)
    assert (disconnected_before, visit.disconnected) == (False, True)


@ASGI_KINDS
@pytest.mark.parametrize("taken", [False, True])
async def test_part_of_the_body_that_arrives_as_the_block_ends(kind: str, taken: bool) -> None:
    """A part of the body that a layer has taken, but not yet returned, when the block ends, is not lost."""
    channel = Channel(steps=3)
    request, read = make_request(channel, kind)
    async with cancel_on_disconnect(request):
        await settle()
        channel.put(chunk(b"a", more=True))
        for _ in range(2 * taken):
            await asyncio.sleep(0)
        assert len(channel._messages) == 1 - taken
    channel.put(chunk(b"b"))

    assert await read() == b"ab"


@given(
    sizes=st.lists(st.sampled_from([0, 1, 40_000, 70_000]), max_size=6),
    pauses=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=7, max_size=7),
    steps=st.integers(0, 3),
    actions=st.lists(
        st.tuples(st.sampled_from(["wait", "wait in block", "read", "read in block"]), st.integers(0, 5)), max_size=8
    ),
    leaves=st.booleans(),
)
def test_no_message_is_lost(
    sizes: list[int], pauses: list[float], steps: int, actions: list[tuple[str, int]], leaves: bool
) -> None:
    """The handler gets each message once, in order, however its blocks and calls fall between their arrivals."""
    messages = [chunk(b"%d" % number * size, more=number < len(sizes)) for number, size in enumerate([*sizes, 1])]
    messages += [DISCONNECT] * leaves

    async def handle() -> list[Message]:
        channel = Channel(steps=steps)
        request = SimpleNamespace(scope=SCOPE, receive=channel.receive)
        received: list[Message] = []

        async def send() -> None:
            for message, pause in zip(messages, [*pauses, 1.0], strict=False):
                await asyncio.sleep(pause)
                channel.put(message)

        async def read() -> None:
            if len(received) < len(messages):
                received.append(await request.receive())

        async def act(action: str, number: int) -> None:
            if "read" in action:
                await read()
            else:
                await pass_time(number)

        sender = asyncio.create_task(send())
        for action, number in actions:
            async with cancel_on_disconnect(request) if "block" in action else nullcontext():
                await act(action, number)
        await sender
        for _ in messages:
            await read()
        return received

    assert anyio.run(handle, backend_options={"loop_factory": VirtualTimeLoop}) == messages


async def pass_time(number: int) -> None:
    """Wait for seconds, and then for some steps of the event loop."""
    await asyncio.sleep(number // 2)
    for _ in range(number):
        await asyncio.sleep(0)


# ------------------------------------------------------------------ the end of the block


@ASGI_KINDS
async def test_nothing_is_left_running(kind: str) -> None:
    """After the block no call of the server's receive() is running, if the body has been read."""
    tasks = asyncio.all_tasks()
    channel = Channel(chunk(b"{}"))
    request, read = make_request(channel, kind)
    calls: list[int] = []
    for _ in range(2):
        async with cancel_on_disconnect(request):
            await settle()
            calls.append(channel.calls)
        await settle()
        calls.append(channel.calls)
    await read()

    assert calls == [1, 0, 1, 0]
    assert asyncio.all_tasks() == tasks


async def test_call_ends_with_the_handler() -> None:
    """A call that may bring a part of the body outlives the block, but not the task of the handler."""
    channel = Channel()
    request = Request(SCOPE, channel.receive)
    after_block = 0

    async def handle() -> None:
        nonlocal after_block
        async with cancel_on_disconnect(request):
            await settle()
        await settle()
        after_block = channel.calls

    await asyncio.create_task(handle())
    await settle()

    assert (after_block, channel.calls) == (1, 0)


async def test_reader_goes_on_after_the_block() -> None:
    """A task that waits for a message in receive() gets the next one, whether it comes in the block or after it."""
    channel = Channel(chunk(b"a"))
    request = SimpleNamespace(scope=SCOPE, receive=channel.receive)
    async with cancel_on_disconnect(request):
        assert await request.receive() == chunk(b"a")
        reader = asyncio.create_task(request.receive())
        await settle()
    await settle()
    channel.put(DISCONNECT)

    assert await reader == DISCONNECT


@pytest.mark.parametrize("fails", [False, True])
async def test_call_that_resists(fails: bool) -> None:
    """A call that ends with a message although it was cancelled loses nothing; an error of it is of no interest."""
    channel = Channel(chunk(b"a"))

    async def receive() -> Message:
        try:
            return await channel.receive()
        except asyncio.CancelledError:
            if fails:
                raise OSError from None
            return DISCONNECT

    request = SimpleNamespace(scope=SCOPE, receive=receive)
    async with cancel_on_disconnect(request):
        await settle()
    await settle()
    assert await request.receive() == chunk(b"a")
    async with cancel_on_disconnect(request) as visit:
        await settle()

    assert visit.disconnected != fails


async def test_receive_fails(caplog: pytest.LogCaptureFixture) -> None:
    """If receive() fails, one warning says so, the block goes on, and the handler gets the error when it reads."""
    request = Request(SCOPE)
    async with cancel_on_disconnect(request) as visit:
        await asyncio.sleep(5.0)
    errors = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            await request.receive()
        errors.append(str(raised.value))

    assert not visit.disconnected
    assert errors == ["Receive channel has not been made available"] * 2
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            "flux2max_async.web",
            logging.WARNING,
            "a request goes on even if its visitor leaves: receive() failed: Receive channel has not been made available",
        )
    ]


@pytest.mark.parametrize(
    "request_",
    [
        object(),
        SCOPE,
        SimpleNamespace(scope=SCOPE),
        WebSocket({"type": "websocket"}, Channel().receive, lambda _: asyncio.sleep(0)),
    ],
    ids=["object", "scope", "scope without receive", "websocket"],
)
async def test_wrong_requests(request_: Any) -> None:
    """Anything but an HTTP request is a TypeError before the block begins."""
    with pytest.raises(TypeError, match=r"needs an HTTP request .*, not \w+$"):
        async with cancel_on_disconnect(request_):
            pytest.fail("the block has begun")


# ------------------------------------------------------------------ frameworks


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("reads_body", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_base_http_middleware(layers: int, reads_body: bool, leaves: bool) -> None:
    """Beside BaseHTTPMiddleware, which wraps receive(), leaving is noticed, and the whole body is there."""
    bodies: list[bytes] = []
    visits: list[Visit] = []
    sent: list[Message] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive, send)
        if reads_body:
            await request.body()
        async with cancel_on_disconnect(request) as visit:
            await asyncio.sleep(3.0)
        visits.append(visit)
        bodies.append(await request.body())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def send(message: Message) -> None:
        sent.append(message)

    app: ASGIApp = handle
    for _ in range(layers):
        app = BaseHTTPMiddleware(app, dispatch=lambda request, call_next: call_next(request))
    channel = Channel(chunk(b"a", more=True), chunk(b"b"))
    if leaves:
        asyncio.get_running_loop().call_later(1.0, channel.put, DISCONNECT)
    await app({**SCOPE}, channel.receive, send)
    await settle()

    assert [visit.disconnected for visit in visits] == [leaves]
    assert bodies == [b"ab"]
    assert b"".join(message.get("body", b"") for message in sent) == b"done"
    assert channel.calls == 0


@asynccontextmanager
async def running_aiohttp_app(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], **options: Any
) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/", handler)
    runner = web.AppRunner(app, **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("handler_cancellation", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_aiohttp(handler_cancellation: bool, leaves: bool) -> None:
    """Under aiohttp.web, leaving ends the block; with handler_cancellation, the server's cancellation ends the handler."""
    reached: list[bool] = []
    ended = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        try:
            async with cancel_on_disconnect(request) as visit:
                await asyncio.sleep(3.0)
            reached.append(visit.disconnected)
            return web.Response(text=await request.text())
        finally:
            ended.set()

    async with (
        running_aiohttp_app(handle, handler_cancellation=handler_cancellation) as url,
        httpx.AsyncClient() as http,
    ):
        with pytest.raises(httpx.ReadTimeout) if leaves else nullcontext():
            response = await http.post(url, content=b"body", timeout=1.0 if leaves else 10.0)
            assert response.text == "body"
        await ended.wait()

    assert reached == ([] if leaves and handler_cancellation else [leaves])
