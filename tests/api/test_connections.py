"""Connections for submits: a submit goes over a warm one, and never over one that the far end is about to close."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Sequence
from itertools import pairwise

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from support.far import FarGateway
from support.responses import jpeg
from support.scripted import ScriptedGateway
from support.virtual_time import hold_up

from flux2max_async import FixedSchedule, FluxSession, GenerationRequest, TransportError
from flux2max_async._api.codec import HttpRequest, build_submit
from flux2max_async._api.connections import ConnectionUse, SubmitConnector, connection_use
from flux2max_async._api.idle_limit import FIRST_LIMIT, MAX_LIMIT, IdleLimit
from flux2max_async._api.submit_payload import SubmitPayload
from flux2max_async._api.transport import Transport

BURST = 24
TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"


def session_on(gateway: FarGateway, *, polled_every: float = 3600.0) -> FluxSession:
    return FluxSession(
        "test-key-1234567890", base_url=gateway.url, schedule=FixedSchedule(polled_every), max_in_flight=100_000,
        task_timeout=None,
    )  # fmt: skip


def connector_of(session: FluxSession) -> SubmitConnector:
    connector = session._parts.transport._connector
    assert connector is not None
    return connector


async def submit_in_bursts(session: FluxSession, gaps: Sequence[float], burst: int = 1) -> list[float]:
    """Submit after each gap, which begins with the last answer; return when each burst began."""
    started = []
    for number, gap in enumerate(gaps):
        await anyio.sleep(gap)
        started.append(anyio.current_time())
        await asyncio.gather(*(session.submit(f"{number}-{each}") for each in range(burst)))
    return started


# ---------------------------------------------------------------------- the limit

OPEN, DROP, WAIT = "open", "drop", "wait"


@pytest.mark.parametrize(
    ("events", "limit"),
    [
        pytest.param([], FIRST_LIMIT, id="nothing known"),
        pytest.param([(OPEN, 0.3)], FIRST_LIMIT, id="open for a short time"),
        pytest.param([(OPEN, 3.0), (OPEN, 2.0)], 1.5, id="half of what one was seen to last"),
        pytest.param([(OPEN, 60.0)], MAX_LIMIT, id="never more than a few seconds"),
        pytest.param([(DROP, 60.0)], MAX_LIMIT, id="dropped later"),
        pytest.param([(OPEN, 60.0), (DROP, 3.0), (DROP, 1.0), (DROP, 2.0)], 0.5, id="half of the shortest drop"),
        pytest.param([(DROP, 0.6)], 0.3, id="less than at first"),
        pytest.param([(DROP, 1.0), (DROP, 1.1), (DROP, 1.0)], 0.5, id="three alike may be chance"),
        pytest.param([(DROP, 1.0), (DROP, 1.1), (DROP, 1.0), (DROP, 1.0)], 0.7, id="four alike are a timeout"),
        pytest.param([(DROP, 1.0), (DROP, 1.3), (DROP, 1.0), (DROP, 1.0)], 0.5, id="four that differ"),
        pytest.param([(DROP, 0.25)], 0.05, id="never in the last round trip"),
        pytest.param([(DROP, 0.1)], -0.1, id="nothing is fresh"),
        pytest.param([(DROP, 1.0), (WAIT, 59.0)], 0.5, id="remembered for a minute"),
        pytest.param([(OPEN, 60.0), (DROP, 1.6), (WAIT, 61.0)], 0.8, id="then forgotten, but not trusted as before"),
        pytest.param([(DROP, 1.0), (WAIT, 61.0), (OPEN, 4.0)], 2.0, id="trust is regained"),
    ],
)
def test_idle_limit(events: list[tuple[str, float]], limit: float) -> None:
    """The limit follows from how long connections lasted, and after which time they were closed."""
    learned, now = IdleLimit(), 1000.0
    for event, seconds in events:
        if event == OPEN:
            learned.on_open(seconds)
        elif event == DROP:
            learned.on_drop(seconds, now)
        else:
            now += seconds

    assert learned.seconds(now, round_trip=0.2) == pytest.approx(limit)


# ---------------------------------------------------------------------- never twice, never uncertain


@pytest.mark.parametrize(
    ("options", "gap"),
    [
        pytest.param({"idle": 0.7}, 0.7, id="idle for 0.7 s"),
        pytest.param({"idle": 1.0}, 1.0, id="idle for 1 s"),
        pytest.param({"idle": 2.0}, 2.0, id="idle for 2 s"),
        pytest.param({"idle": 5.0}, 5.0, id="idle for 5 s"),
        pytest.param({"idle": 9.0}, 9.0, id="idle for 9 s"),
        pytest.param({"idle": 60.0, "unused": 0.7}, 0.7, id="unused for 0.7 s"),
        pytest.param({"idle": 0.7, "unused": 60.0}, 0.7, id="idle for 0.7 s, but unused ones last"),
        pytest.param({"requests": 1}, 0.3, id="after each answer"),
        pytest.param({"requests": 3}, 0.3, id="after three answers"),
        pytest.param({"restart": 2.0}, 1.5, id="restarts"),
        pytest.param({"idle": 1.0, "complaint": TIMEOUT}, 1.0, id="with a 408"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("polled_every", [3600.0, 1.3], ids=["without polls", "with polls"])
async def test_no_submit_is_lost(options: dict[str, float], gap: float, polled_every: float) -> None:
    """Whenever the far end closes connections, each submit arrives once, and its answer too."""
    generator = random.Random(1)
    ranges = [(0.0, 0.2), (0.0, gap), (gap - 0.25, gap + 0.1)]
    async with FarGateway(**options) as gateway, session_on(gateway, polled_every=polled_every) as session:  # type: ignore[arg-type]
        await submit_in_bursts(session, [generator.uniform(*generator.choice(ranges)) for _ in range(60)])
        await submit_in_bursts(session, [generator.uniform(*generator.choice(ranges)) for _ in range(10)], BURST)

    assert len(gateway.submits) == 60 + 10 * BURST


async def test_the_far_end_of_these_tests_does_lose_submits() -> None:
    """A client that reuses a connection that is just being closed gets no answer."""
    async with FarGateway(idle=1.0) as gateway, aiohttp.ClientSession() as http:
        url, body = f"{gateway.url}/model/v1/generation", {"input": [{"params": {"prompt": "a cat"}}]}
        await (await http.post(url, json=body)).read()
        await anyio.sleep(0.95)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await http.post(url, json=body)


# ---------------------------------------------------------------------- one round trip


@pytest.mark.parametrize("idle", [float("inf"), 5.0, 2.0, 1.0], ids=["never", "5 s", "2 s", "1 s"])
@pytest.mark.parametrize(
    ("gap", "burst", "count"),
    [
        pytest.param(0.2, 1, 20, id="every 0.3 s"),
        pytest.param(2.9, 1, 10, id="every 3 s"),
        pytest.param(19.9, 1, 5, id="every 20 s"),
        pytest.param(0.6, BURST, 12, id="bursts of 24"),
    ],
)
async def test_submits_use_warm_connections(idle: float, gap: float, burst: int, count: int) -> None:
    """At each rhythm, after the first few, submits go over connections that were open before."""
    async with FarGateway(idle=idle) as gateway, session_on(gateway) as session:
        started = await submit_in_bursts(session, [gap] * count, burst)
    bursts = [gateway.submits[number * burst :][:burst] for number in range(count)]
    warm = [sum(submit.opened < begin for submit in each) for each, begin in zip(bursts, started, strict=True)]

    assert warm[0] == 0
    assert sum(each == burst for each in warm) >= count - 3


async def test_a_connection_is_kept_ready_for_a_minute() -> None:
    """After a submit, a connection is kept open for the next one, for a minute, by opening new ones."""
    async with FarGateway() as gateway, session_on(gateway) as session:
        assert gateway.opened == []
        await session.submit("a cat")
        await anyio.sleep(59.0)
        opened = len(gateway.opened)
        await session.submit("a dog")
        await anyio.sleep(1000.0)
        total = len(gateway.opened)
        await session.submit("a cow")
    first, second, third = gateway.submits

    # First every half a second, and then, as it turns out that they last, every four.
    assert 15 < opened < 25
    assert second.opened == pytest.approx(first.opened + 59.0, abs=MAX_LIMIT)
    assert 30 < total < 45
    assert third.opened == max(gateway.opened[: total + 1])


async def test_polls_keep_connections_fresh() -> None:
    """As long as polls are answered, no connection has to be opened to be kept ready."""
    async with FarGateway() as gateway, session_on(gateway, polled_every=0.2) as session:
        for number in range(30):
            await session.generate(f"{number}")

    assert len(gateway.opened) < 5


async def test_a_connection_is_opened_while_an_image_is_encoded() -> None:
    """The first submit with an image finds an open connection, if encoding takes long enough; a closed one does no harm."""
    async with FarGateway() as gateway:
        session = session_on(gateway)
        async with session:
            session._parts.transport.expect_submit()
            await anyio.sleep(0.1)
            started = anyio.current_time()
            await session.submit("a cat", input_images=[jpeg()])
        session._parts.transport.expect_submit()

    assert gateway.submits[0].opened < started


@pytest.mark.parametrize(
    ("options", "most"),
    [
        pytest.param({"unused": 0.15}, 150, id="closed at once"),
        pytest.param({"unused": 1.0}, 150, id="closed after a second"),
    ],
)
async def test_spare_connections_are_not_opened_all_the_time(options: dict[str, float], most: int) -> None:
    """Even if the far end soon closes unused connections, only some are opened."""
    async with FarGateway(**options) as gateway, session_on(gateway) as session:  # type: ignore[arg-type]
        await session.submit("a cat")
        await anyio.sleep(61.0)

    assert len(gateway.opened) < most


async def test_a_far_end_that_refuses_connections() -> None:
    """If no connection can be opened in advance, it is tried again every five seconds, and nothing fails."""
    attempts = []

    async def open_spare() -> bool:
        attempts.append(anyio.current_time())
        return False

    connector = SubmitConnector(limit=10, open_spare=open_spare)
    connector.expect_submit()
    await anyio.sleep(100.0)
    await connector.close()

    assert [after - before for before, after in pairwise(attempts)] == pytest.approx([5.0] * 11, abs=0.1)


async def test_a_session_without_a_far_end() -> None:
    """Opening a connection in advance fails silently; the submit says why."""
    async with FarGateway() as gateway:
        url = gateway.url
    async with FluxSession("test-key-1234567890", base_url=url, task_timeout=20.0) as session:
        with pytest.raises(TransportError, match="no connection"):
            await session.submit("a cat")


async def test_closing_while_a_connection_is_being_opened() -> None:
    """A connection that is being opened in advance is given up when the session is closed."""
    cancelled = False

    async def open_spare() -> bool:
        nonlocal cancelled
        try:
            return await asyncio.sleep(1000.0, True)
        except asyncio.CancelledError:
            cancelled = True
            raise

    connector = SubmitConnector(limit=10, open_spare=open_spare)
    connector.expect_submit()
    await anyio.sleep(0.1)
    await connector.close()

    assert cancelled


async def test_an_unasked_answer_is_not_taken_for_the_answer_to_a_submit() -> None:
    """A connection on which the far end has sent something unasked isn't used, even if it is still open."""
    async with FarGateway(idle=0.2, complaint=TIMEOUT, linger=1000.0) as gateway, session_on(gateway) as session:
        await submit_in_bursts(session, [0.0, 0.4, 0.4])

    assert len({submit.connection for submit in gateway.submits}) == 3


async def test_a_suspended_machine() -> None:
    """The time for which the machine was suspended counts as idle."""
    async with FarGateway() as gateway, session_on(gateway) as session:
        await submit_in_bursts(session, [0.0, 0.2])
        connector_of(session).suspended = lambda: 3600.0
        await submit_in_bursts(session, [0.2])
    first, second, third = gateway.submits

    assert first.connection == second.connection
    assert third.opened > second.opened


@pytest.mark.parametrize("idle", [0.0, 0.3], ids=["closed at once", "closed when idle"])
async def test_a_blocked_event_loop(idle: float) -> None:
    """A connection that is closed while the loop is blocked isn't taken for one that was idle for all that time."""
    async with FarGateway() as gateway, session_on(gateway) as session:
        await session.submit("a cat")
        await anyio.sleep(idle)
        for connection in gateway.open:
            connection.transport.close()
        await anyio.lowlevel.checkpoint()
        hold_up(3.0)
        await anyio.sleep(0.5)
        connector = connector_of(session)
        limits = [limit.seconds(anyio.current_time(), 0.0) for limit in (connector._after_answer, connector.unused)]

    assert max(limits) <= FIRST_LIMIT


async def test_the_loop_is_blocked_just_before_it_looks_at_connections() -> None:
    """A connection that is closed after the loop's last read isn't taken for one that is still open."""

    def close_and_hold_up() -> None:
        for connection in gateway.open:
            connection.transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
        hold_up(3.0)

    async with FarGateway() as gateway, session_on(gateway) as session:
        await session.submit("a cat")
        connector = connector_of(session)
        assert connector._timer is not None
        # Both timers are due in the same iteration of the loop, this one first.
        asyncio.get_running_loop().call_at(connector._timer.when() - 1e-10, close_and_hold_up)
        await anyio.sleep(3.5)

    assert connector._after_answer.seconds(anyio.current_time(), 0.0) <= FIRST_LIMIT


async def test_an_end_that_the_event_loop_has_not_read_yet() -> None:
    """A connection that was closed while the loop was busy isn't used, although the loop still takes it for open."""
    async with FarGateway() as gateway, session_on(gateway) as session:
        await session.submit("a cat")
        await anyio.sleep(0.3)
        for connection in list(gateway.open):
            connection.transport.close()
        await anyio.lowlevel.checkpoint()
        # From here until a connection is chosen, nothing yields to the loop.
        await session._parts.transport.exchange(build_submit(GenerationRequest("a dog")))
    first, second = gateway.submits

    assert second.opened > first.opened


@pytest.mark.parametrize(("blocked", "is_written"), [(0.0, True), (3.0, True), (5.0, False), (3600.0, False)])
async def test_the_loop_is_blocked_after_a_connection_was_opened(blocked: float, is_written: bool) -> None:
    """A new connection gets nothing if it was never used for so long that the far end may have closed it meanwhile."""

    async def hold_up_before_writing(*_: object) -> None:
        hold_up(blocked)

    async def never() -> bool:
        return False

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(hold_up_before_writing)
    connector = SubmitConnector(limit=10, open_spare=never)
    payload = SubmitPayload(b'{"input": [{"params": {"prompt": "a cat"}}]}', connector.may_write)
    no_timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
    async with (
        FarGateway() as gateway,
        aiohttp.ClientSession(connector=connector, trace_configs=[tracing], timeout=no_timeout) as http,
    ):
        connection_use.set(ConnectionUse.WARM)
        with contextlib.nullcontext() if is_written else pytest.raises(aiohttp.ClientConnectionError):
            await http.post(gateway.url, data=payload)

    assert payload.is_written is is_written


async def test_the_loop_is_blocked_just_before_a_submit_is_written() -> None:
    """A connection that was fresh when it was chosen, but isn't any more, gets nothing; the submit can be repeated."""
    blocked = 0.0

    async def hold_up_before_writing(*_: object) -> None:
        hold_up(blocked)

    async def never() -> bool:
        return False

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(hold_up_before_writing)
    connector = SubmitConnector(limit=10, open_spare=never)
    payloads = [SubmitPayload(b'{"input": [{"params": {"prompt": "a cat"}}]}', connector.may_write) for _ in range(4)]
    async with FarGateway() as gateway, aiohttp.ClientSession(connector=connector, trace_configs=[tracing]) as http:

        async def submit(payload: SubmitPayload) -> None:
            connection_use.set(ConnectionUse.WARM)
            async with http.post(gateway.url, data=payload) as response:
                await response.read()

        for payload in payloads[:2]:
            await submit(payload)
            await anyio.sleep(0.2)
        blocked = 1.0
        with pytest.raises(aiohttp.ClientConnectionError):
            await submit(payloads[2])
        await submit(payloads[3])

    assert [payload.is_written for payload in payloads] == [True, True, False, True]
    assert [submit.connection == gateway.submits[0].connection for submit in gateway.submits] == [True, True, False]


async def test_the_pool_is_limited() -> None:
    """Before a connection is opened that would be one too many, the oldest idle one is closed; a spare may be added."""
    async with FarGateway() as gateway, session_on(gateway) as session:
        connector_of(session)._limit = BURST // 2
        await submit_in_bursts(session, [0.0, 2.0, 2.0], BURST)
        await anyio.sleep(0.3)
        assert len(gateway.open) <= BURST // 2 + 1


@pytest.mark.parametrize(("borrowed", "connections"), [(False, 2), (True, 3)], ids=["own session", "borrowed session"])
async def test_a_poll_over_a_fresh_connection(scripted: ScriptedGateway, borrowed: bool, connections: int) -> None:
    """A poll can be made over a new connection; no submit over a borrowed session reuses that."""
    submit, poll = HttpRequest("POST", "/model/v1/generation", b"{}"), HttpRequest("GET", "/model/v1/task/t1")
    async with aiohttp.ClientSession() as http:
        transport = Transport("key", scripted.url, timeout=30.0, http=http if borrowed else None)
        transport.open(10)
        for _ in range(2):
            await transport.exchange(poll)
        assert scripted.connections == 1

        await transport.exchange(poll, fresh_connection=True)
        assert scripted.connections == 2

        await anyio.sleep(0.2)
        await transport.exchange(submit)
        await transport.exchange(poll)
        await transport.close()

    assert scripted.connections == connections
