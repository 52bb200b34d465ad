"""Whether a session can serve requests: what ends of calls reveal, and what is logged about it."""

import asyncio
import gc
import itertools
import json
import logging
import math
import weakref
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ports import free_port
from support.scripted import ScriptedGateway, answer, completed, hang, reset, running, session_on

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConfigurationError,
    ContentModeratedError,
    DeadlineExceededError,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationRequest,
    InsufficientBalanceError,
    JournalError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ServerError,
    SessionClosedError,
    SessionHealth,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async._api.poll_timeout import SlowPollError
from flux2max_async._config import NoKeyError
from flux2max_async._health import HealthMonitor

# What one error of a submit and of a poll reveals: "refused" (no call will succeed), "failed" (five in a row are too
# many), "answered" (ends a row) or "nothing".
REVEALED: dict[str, tuple[FluxError, str, str]] = {
    "wrong key": (AuthenticationError("m", status=401), "refused", "refused"),
    "no balance": (InsufficientBalanceError("m", status=402), "refused", "refused"),
    "no balance, by its words": (InsufficientBalanceError("m", status=400), "refused", "refused"),
    "forbidden": (PermissionDeniedError("m", status=403), "refused", "failed"),
    "no key": (NoKeyError("m"), "refused", "refused"),
    "wrong base_url": (ConfigurationError("m"), "refused", "refused"),
    "certificate": (TransportError("m", fault="certificate"), "refused", "refused"),
    "no TLS": (TransportError("m", fault="tls"), "refused", "refused"),
    "proxy": (TransportError("m", fault="proxy"), "refused", "refused"),
    "unknown host": (TransportError("m", fault="unknown_host"), "failed", "failed"),
    "no connection": (TransportError("m", maybe_sent=False), "failed", "failed"),
    "timeout": (TransportError("m"), "failed", "failed"),
    "slow poll": (SlowPollError("m"), "failed", "failed"),
    "unreadable": (ProtocolError("m"), "failed", "failed"),
    **{f"{status}": (ServerError("m", status=status), "failed", "failed") for status in (500, 502, 503, 504)},
    "408": (BadRequestError("m", status=408), "failed", "failed"),
    "a firewall's 401": (AuthenticationError("m", status=401, from_api=False), "failed", "failed"),
    "a firewall's 402": (InsufficientBalanceError("m", status=402, from_api=False), "failed", "failed"),
    "a firewall's 403": (PermissionDeniedError("m", status=403, from_api=False), "failed", "failed"),
    "a firewall's 404": (TaskNotFoundError("m", status=404, from_api=False), "failed", "failed"),
    "429": (RateLimitedError("m", status=429), "answered", "answered"),
    "a proxy's 429": (RateLimitedError("m", status=429, from_api=False), "answered", "answered"),
    "400": (BadRequestError("m", status=400), "answered", "answered"),
    "404": (TaskNotFoundError("m", status=404), "answered", "answered"),
    "moderation": (ContentModeratedError("m"), "answered", "answered"),
    "budget": (BudgetExceededError("m"), "nothing", "nothing"),
    "journal": (JournalError("m"), "nothing", "nothing"),
    "closed": (SessionClosedError("m"), "nothing", "nothing"),
    "not sent in time": (DeadlineExceededError("m"), "nothing", "nothing"),
}


def reveal(name: str, *, is_poll: bool) -> tuple[FluxError, str]:
    error, of_submit, of_poll = REVEALED[name]
    return error, of_poll if is_poll else of_submit


def health_of(monitor: HealthMonitor, now: float = 0.0) -> SessionHealth:
    return monitor.check("open", now, waiting=0, in_flight=0)


def fail(monitor: HealthMonitor, error: FluxError, now: float = 0.0, *, is_poll: bool = False) -> None:
    monitor.on_error(error, now, is_poll=is_poll, is_reported=False)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("is_poll", [False, True], ids=["submit", "poll"])
@pytest.mark.parametrize("name", REVEALED)
def test_what_an_error_reveals(name: str, caplog: pytest.LogCaptureFixture, *, is_poll: bool) -> None:
    """A refused account is a reason not to be ready at once, silence after five calls in a row; one line says so."""
    error, revealed = reveal(name, is_poll=is_poll)
    monitor = HealthMonitor()
    ok: list[bool] = []
    counts: list[int] = []
    for number in range(6):
        fail(monitor, error, number / 10, is_poll=is_poll)
        ok.append(health_of(monitor, 1.0).ok)
        counts.append(health_of(monitor, 1.0).consecutive_failures)

    expected = {"refused": [False] * 6, "failed": [True] * 4 + [False] * 2}.get(revealed, [True] * 6)
    is_failure = revealed in {"refused", "failed"}
    assert ok == expected
    assert counts == ([1, 2, 3, 4, 5, 6] if is_failure else [0] * 6)
    assert len(lines(caplog)) == is_failure
    assert (health_of(monitor).last_error is not None) == is_failure
    assert health_of(monitor).last_success is None


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (AuthenticationError("m", status=401), "check the API key (api_key, FLUX2MAX_API_KEY)"),
        (InsufficientBalanceError("m", status=402), "check the balance of the account"),
        (PermissionDeniedError("m", status=403), "check what the account and its API key may be used for"),
        (NoKeyError("api_key() has raised OSError"), "check the settings of the session"),
        (TransportError("m", fault="proxy"), "check base_url, the proxy and the certificates"),
    ],
)
def test_the_line_says_what_to_check(error: FluxError, advice: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first refusal is logged with its reason and what to check, then each minute, whatever happens in between."""
    monitor = HealthMonitor()
    for second in range(121):
        fail(monitor, error, float(second))
        if second % 7 == 0:
            monitor.on_success(float(second), is_poll=False)

    assert lines(caplog) == [f"every request fails like this one: {error}: {advice}"] * 3


def test_different_problems_have_lines_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    """That the balance is used up is logged also if it follows a wrong key, and silence beside both."""
    monitor = HealthMonitor()
    fail(monitor, AuthenticationError("m", status=401))
    fail(monitor, InsufficientBalanceError("m", status=402))
    for _ in range(9):
        fail(monitor, ServerError("m", status=502), is_poll=True)

    assert len(lines(caplog)) == 3
    assert lines(caplog)[-1] == "5 polls in a row without an answer of the service: m (HTTP 502)"


def test_what_an_outage_reports_is_not_said_twice(caplog: pytest.LogCaptureFixture) -> None:
    """Failures that are reported elsewhere count, without a line."""
    monitor = HealthMonitor()
    for _ in range(9):
        monitor.on_error(TransportError("m"), 0.0, is_poll=True, is_reported=True)

    assert lines(caplog) == []
    assert not health_of(monitor).ok


@pytest.mark.parametrize("is_poll", [False, True], ids=["submit", "poll"])
def test_success(*, is_poll: bool) -> None:
    """A success ends a row of failures of its kind, and a refusal; those of the other kind stand."""
    monitor = HealthMonitor()
    fail(monitor, InsufficientBalanceError("m", status=402), is_poll=is_poll)
    monitor.on_success(3.0, is_poll=not is_poll)
    before = health_of(monitor, 4.0)
    monitor.on_success(5.0, is_poll=is_poll)
    after = health_of(monitor, 7.0)

    assert (before.ok, before.consecutive_failures, before.last_success) == (False, 1, 1.0)
    assert (after.ok, after.consecutive_failures, after.last_success) == (True, 0, 2.0)
    assert isinstance(after.last_error, InsufficientBalanceError)


def test_other_answers_do_not_accept_the_account() -> None:
    """A 400 ends a row of failures, but no refusal of the account: it may have been found before the key was checked."""
    monitor = HealthMonitor()
    for _ in range(4):
        fail(monitor, ServerError("m", status=503))
    fail(monitor, BadRequestError("m", status=400))
    after_silence = health_of(monitor).consecutive_failures
    fail(monitor, AuthenticationError("m", status=401))
    fail(monitor, BadRequestError("m", status=400))

    assert after_silence == 0
    assert not health_of(monitor).ok


def test_failures_count_for_a_minute() -> None:
    """A server that isn't ready gets no requests: it is ready again after a minute, until one more call fails."""
    monitor = HealthMonitor()
    for _ in range(5):
        fail(monitor, TransportError("m"), 10.0)
    ok = [health_of(monitor, now).ok for now in (10.0, 69.9, 70.0)]
    fail(monitor, TransportError("m"), 71.0)

    assert ok == [False, False, True]
    assert not health_of(monitor, 71.0).ok


EVENT = st.tuples(st.sampled_from([None, *REVEALED]), st.booleans(), st.floats(0.0, 100.0))


@given(st.lists(EVENT, max_size=60))
def test_any_history(events: list[tuple[str | None, bool, float]]) -> None:
    """Whatever happens, health follows from the last calls of each kind, and a problem is logged once a minute."""
    monitor, now, last_success = HealthMonitor(), 0.0, -math.inf
    rows: dict[bool, list[tuple[str, float]]] = {False: [], True: []}
    handler = _Lines()
    logging.getLogger("flux2max_async.health").addHandler(handler)
    for name, is_poll, pause in events:
        now += pause
        handler.now = now
        row = rows[is_poll]
        if name is None:
            monitor.on_success(now, is_poll=is_poll)
            last_success, revealed = now, "succeeded"
        else:
            error, revealed = reveal(name, is_poll=is_poll)
            fail(monitor, error, now, is_poll=is_poll)
        if revealed == "succeeded" or (revealed == "answered" and all(kind != "refused" for kind, _ in row)):
            row.clear()
        elif revealed in {"refused", "failed"}:
            row.append((revealed, now))
        health = health_of(monitor, now)

        failing = [
            row[-1][1] + 60.0 > now and (len(row) >= 5 or any(kind == "refused" for kind, _ in row))
            for row in rows.values()
            if row
        ]
        assert health.ok is not any(failing)
        assert health.consecutive_failures == max(map(len, rows.values()))
        assert health.last_success == (None if last_success == -math.inf else now - last_success)
        assert not any(failing) or handler.times
    logging.getLogger("flux2max_async.health").removeHandler(handler)

    for times in handler.times.values():
        assert all(later - earlier >= 60.0 for earlier, later in itertools.pairwise(times))


class _Lines(logging.Handler):
    """Collects the times of the lines about each problem."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.times: dict[str, list[float]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.times.setdefault(str(record.args[1]), []).append(self.now)


def test_to_dict() -> None:
    """json.dumps takes the dictionary as it is; the service's words in it are cut and printable."""
    monitor = HealthMonitor()
    empty = health_of(monitor).to_dict()
    monitor.on_success(0.0, is_poll=True)
    fail(monitor, AuthenticationError("no\n" + 1000 * "x", status=401, code="c"), 1.0)
    data = monitor.check("draining", 2.5, waiting=3, in_flight=4).to_dict()

    assert json.loads(json.dumps(empty)) == {
        "state": "open",
        "ok": True,
        "waiting": 0,
        "in_flight": 0,
        "last_success": None,
        "last_error": None,
        "consecutive_failures": 0,
    }
    error = data.pop("last_error")
    assert json.loads(json.dumps(data)) == {
        "state": "draining",
        "ok": False,
        "waiting": 3,
        "in_flight": 4,
        "last_success": 2.5,
        "consecutive_failures": 1,
    }
    assert error["kind"] == "AuthenticationError"
    assert error["message"].startswith("no\\nxxx")
    assert len(error["message"]) < 250


# ---------------------------------------------------------------------- sessions

UNAUTHORIZED = answer(401, {"error": {"code": "invalid_key", "message": "wrong key"}})
UNAVAILABLE = answer(503, {"error": {"code": "down", "message": "down"}})
NOT_ACCEPTED = answer(422, {"error": {"code": "invalid", "message": "no such size"}})


async def expect(session: FluxSession, error: type[Exception]) -> None:
    with pytest.raises(error):
        await session.generate("a cat")


async def test_states(scripted: ScriptedGateway) -> None:
    """A session is closed until it is entered and after its end, and draining in between; health() needs no task."""
    scripted.polls = deque([answer(200, running()), answer(200, completed(), after=2.0)])
    session = session_on(scripted, max_in_flight=1)
    before = session.health()
    async with session:
        at_first = await asyncio.to_thread(session.health)
        waits = [asyncio.create_task(session.generate("a cat", key=f"{number}")) for number in range(3)]
        await asyncio.sleep(1.5)
        busy = session.health()
        closing = asyncio.create_task(session.aclose(drain=30.0))
        await asyncio.sleep(0.5)
        draining = session.health()
        await closing
    after = session.health()
    await asyncio.gather(*waits, return_exceptions=True)

    assert before == after == SessionHealth(state="closed", ok=False)
    assert at_first == SessionHealth(state="open", ok=True)
    assert (busy.state, busy.ok, busy.waiting, busy.in_flight, busy.last_error) == ("open", True, 2, 1, None)
    assert busy.last_success is not None
    assert (draining.state, draining.ok, draining.in_flight) == ("draining", False, 1)


async def test_closing(scripted: ScriptedGateway) -> None:
    """A session that is closing without a drain is closed for its health, too, while a submit is still awaited."""
    scripted.submits = deque([answer(200, running(), after=1.0)])
    async with session_on(scripted) as session:
        wait = asyncio.create_task(session.generate("a cat"))
        await asyncio.sleep(0.5)
        closing = asyncio.create_task(session.aclose())
        await asyncio.sleep(0.1)
        state = session.health().state
        await closing
    with pytest.raises(SessionClosedError):
        await wait

    assert state == "closed"


def test_a_session_whose_event_loop_has_ended() -> None:
    """It is closed for its health."""
    session = FluxSession("key", base_url="http://127.0.0.1:1")
    asyncio.run(session.__aenter__())
    health = session.health()
    asyncio.run(session._parts.transport.close())  # nobody else does

    assert health == SessionHealth(state="closed", ok=False)


async def test_wrong_key(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong key is one line in the log for many requests; the session is ok again once the service accepts one."""
    scripted.submits = deque([*[UNAUTHORIZED] * 20, answer(200, running())])
    async with session_on(scripted) as session:
        await asyncio.gather(*(expect(session, AuthenticationError) for _ in range(20)))
        health = session.health()
        calls = len(scripted.received)
        await session.generate("a cat")
        later = session.health()

    assert (health.ok, health.consecutive_failures, health.last_success) == (False, 20, None)
    assert isinstance(health.last_error, AuthenticationError)
    assert calls == 20
    assert (later.ok, later.consecutive_failures) == (True, 0)
    (line,) = lines(caplog)
    assert line.startswith(
        "every request fails like this one: wrong key (HTTP 401, code invalid_key): check the API key"
    )
    assert scripted.api_key not in caplog.text


async def test_a_key_function_that_fails(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """It is the same: not ok, and one line; a poll that fails for it is repeated."""
    keys: deque[str | Exception] = deque(["key-1", OSError("the vault is sealed"), OSError("sealed"), "key-2"])

    def get_key() -> str:
        key = keys.popleft() if len(keys) > 1 else keys[0]
        if isinstance(key, Exception):
            raise key
        return str(key)

    async with FluxSession(get_key, base_url=scripted.url, schedule=FixedSchedule(2.0)) as session:
        task = await session.submit("a cat")
        await asyncio.sleep(2.5)
        health = session.health()
        await task
        later = session.health()

    assert (health.ok, type(health.last_error)) == (False, NoKeyError)
    assert later.ok
    assert lines(caplog) == [
        "every request fails like this one: api_key() has raised OSError: check the settings of the session"
    ]


async def test_gateway_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """Without a connection, the session isn't ok after five attempts, and a single line is written about it."""
    async with FluxSession("key", base_url=f"http://127.0.0.1:{free_port()}", task_timeout=30.0) as session:
        waits = [asyncio.create_task(expect(session, TransportError)) for _ in range(3)]
        await asyncio.sleep(0.1)
        at_first = session.health()
        await asyncio.sleep(6.0)
        health = session.health()
        await asyncio.gather(*waits)

    assert (at_first.ok, at_first.consecutive_failures) == (True, 3)
    assert not health.ok
    assert health.consecutive_failures >= 5
    notices = [record for record in caplog.records if record.name in {"flux2max_async.health", "flux2max_async.api"}]
    assert len([record for record in notices if "sending it again" not in record.message]) == 1


SILENCE = {
    "503": UNAVAILABLE,
    "a proxy's 502": answer(502, b"<html>Bad Gateway</html>"),
    "a firewall's 403": answer(403, b"<html>Blocked</html>"),
    "reset": reset,
    "no answer": hang,
}


@pytest.mark.parametrize("name", SILENCE)
async def test_silent_service(scripted: ScriptedGateway, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A service that fails, or doesn't answer, isn't ok after five polls, whatever was sent; one line reports it."""
    scripted.polls = deque([SILENCE[name]])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        health = session.health()
        async with asyncio.timeout(300.0):
            while health.ok:
                await asyncio.sleep(0.5)
                health = session.health()
        await asyncio.sleep(20.0)
        scripted.polls = deque([answer(200, completed())])
        await task
        later = session.health()

    assert health.consecutive_failures == 5
    assert (later.ok, later.consecutive_failures) == (True, 0)
    reports = [
        record
        for record in caplog.records
        if record.name == "flux2max_async.health" or getattr(record, "is_notice", False)
    ]
    assert len(reports) == 1


async def test_refusals_of_requests(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """Requests and tasks that the service refuses, and its 429s, say nothing against it."""
    limited = answer(429, {"error": {"code": "busy", "message": "busy"}}, [("Retry-After", "1")])
    missing = answer(404, {"error": {"code": "not_found", "message": "no such task"}})
    scripted.submits = deque([*[NOT_ACCEPTED] * 6, *[limited] * 6, answer(200, running())])
    scripted.polls = deque([*[missing] * 6, *[limited] * 6, answer(200, completed())])
    async with session_on(scripted) as session:
        for _ in range(6):
            await expect(session, BadRequestError)
        for _ in range(6):
            with pytest.raises(TaskNotFoundError):
                await session.fetch("t0")
        health = session.health()
        await session.generate("a cat")

    assert (health.ok, health.consecutive_failures, health.last_error) == (True, 0, None)
    assert lines(caplog) == []


async def test_an_error_keeps_no_request_in_memory(scripted: ScriptedGateway) -> None:
    """The newest error holds neither the frames in which it was raised nor its cause."""
    scripted.submits = deque([UNAUTHORIZED])
    async with session_on(scripted) as session:
        request = GenerationRequest("a cat")
        reference = weakref.ref(request)
        with pytest.raises(AuthenticationError):
            await session.generate(request)
        error = session.health().last_error
        del request
        await asyncio.sleep(1.0)
        gc.collect()

        assert reference() is None
        assert error is not None
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)
