"""timeout=: one call ends in time whatever it waits for, and what it has submitted is neither lost nor sent twice."""

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, reset, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    DeadlineExceededError,
    FluxSession,
    GenerationRequest,
    InvalidRequestError,
    JournalEntry,
    TransportError,
)

BUSY = answer(429, b"", [("Retry-After", "100")])
TASK = answer(200, {"id": "t1"})


def warnings(caplog: pytest.LogCaptureFixture, text: str = "nobody waits") -> list[str]:
    """Return the warnings about tasks that nobody waits for."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in messages if text in message]


class SlowJournal(VirtualJournal):
    """A journal that takes a minute to find an entry."""

    async def find(self, key: str, /) -> JournalEntry | None:
        await asyncio.sleep(60.0)
        return await super().find(key)


async def fill(session: FluxSession) -> None:
    """Fill the only slot."""
    await session.submit("the first")


async def pause(session: FluxSession) -> None:
    """Let the service ask all submits to wait."""
    for number in range(6):
        with contextlib.suppress(DeadlineExceededError):
            await session.submit(f"refused {number}", timeout=0.01)


async def nothing(_: FluxSession) -> None:
    pass


def set_up(scripted: ScriptedGateway, **scripts: Any) -> None:
    for name, script in scripts.items():
        setattr(scripted, name, deque(script))


# ---------------------------------------------------------------------- in time, whatever it waits for


@pytest.mark.parametrize("method", ["generate", "submit"])
@pytest.mark.parametrize(
    ("scripts", "options", "prepare", "posts"),
    [
        pytest.param({"polls": [answer(200, running())]}, {"max_in_flight": 1}, fill, 1, id="a slot"),
        pytest.param({"submits": [BUSY]}, {}, nothing, 1, id="its own pause"),
        pytest.param({"submits": [answer(503, b"", [("Retry-After", "100")])]}, {}, nothing, 1, id="a full service"),
        pytest.param({"submits": [hang]}, {"http_timeout": 60.0}, nothing, 1, id="the answer"),
        pytest.param({}, {"journal": SlowJournal}, nothing, 0, id="the journal"),
    ],
)
async def test_without_a_task_in_time(
    scripted: ScriptedGateway, tmp_path: Path, method: str, scripts: Any, options: Any, prepare: Any, posts: int
) -> None:
    """Whatever a call without a task waits for, it ends in time, without an id, and submits nothing any more."""
    set_up(scripted, **scripts)
    if "journal" in options:
        options = {"journal": options["journal"](tmp_path / "run.db")}
    async with session_on(scripted, **options) as session:
        await prepare(session)
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError, match=r"timeout of 5 s .*no task yet") as caught:
            await getattr(session, method)("a cat", timeout=5)
        seconds = anyio.current_time() - began
        set_up(scripted, submits=[TASK])
        await anyio.sleep(300)

    assert seconds == pytest.approx(5.0, abs=0.1)
    assert caught.value.task_id is None
    assert len(scripted.of("POST")) == posts


async def test_pause_that_the_service_asked_of_others(scripted: ScriptedGateway) -> None:
    """While all submits wait, a call ends in time, and nothing was sent for it."""
    set_up(scripted, submits=[BUSY])
    async with session_on(scripted) as session:
        await asyncio.gather(*[pause(session) for _ in range(2)])
        posts, began = len(scripted.of("POST")), anyio.current_time()
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat", timeout=5)
        seconds = anyio.current_time() - began

    assert seconds == pytest.approx(5.0, abs=0.1)
    assert [received.params["prompt"] for received in scripted.of("POST")[posts:]] in ([], ["a cat"])


@pytest.mark.parametrize("polls", [[answer(200, running())], [hang]])
async def test_with_a_task_in_time(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture, polls: Any) -> None:
    """A task that has not ended in time is named by the error, goes on, and needs no warning."""
    set_up(scripted, polls=[*polls, answer(200, completed())])
    async with session_on(scripted, http_timeout=20.0) as session:
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError, match=r"timeout of 0.5 s .*task t1 goes on") as caught:
            await session.generate("a cat", timeout=0.5)
        seconds = anyio.current_time() - began
        await anyio.sleep(60)

        assert session.stats.completed == 1
    assert seconds == pytest.approx(0.5, abs=0.1)
    assert caught.value.task_id == "t1"
    assert warnings(caplog) == []
    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize("method", ["generate", "submit"])
async def test_submit_on_the_wire(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture, method: str) -> None:
    """A submit that is on the wire when the time is over is finished, its id is logged once, and its task polled."""
    set_up(scripted, submits=[answer(200, {"id": "t1"}, after=3.0)])
    async with session_on(scripted) as session:
        with pytest.raises(DeadlineExceededError):
            await getattr(session, method)("a cat", timeout=1.0)
        logged = warnings(caplog)
        await anyio.sleep(10)

        assert (session.stats.submitted, session.stats.completed) == (1, 1)
    assert logged == []
    assert ["t1" in message for message in warnings(caplog)] == [True]


async def test_timeout_of_submit_is_for_its_call_alone(scripted: ScriptedGateway) -> None:
    """Once submit() has returned, its timeout has no effect on the task."""
    set_up(scripted, polls=[*[answer(200, running())] * 9, answer(200, completed())])
    async with session_on(scripted) as session:
        task = await session.submit("a cat", timeout=2.0)
        outcome = await task

    assert outcome.elapsed > 8


@pytest.mark.parametrize(
    ("of_call", "of_task", "text"), [(3.0, 8.0, "timeout of 3 s"), (8.0, 3.0, "has not ended within 3 s")]
)
async def test_whichever_comes_first(scripted: ScriptedGateway, of_call: float, of_task: float, text: str) -> None:
    """The timeout of the call and the session's task_timeout both hold."""
    set_up(scripted, polls=[answer(200, running())])
    async with session_on(scripted, task_timeout=of_task) as session:
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError, match=text) as caught:
            await session.generate("a cat", timeout=of_call)

        assert anyio.current_time() - began == pytest.approx(3.0, abs=0.1)
    assert caught.value.task_id == "t1"


async def test_others_that_share_the_request_go_on(
    scripted: ScriptedGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If one of two callers that share a request has no more time, it is submitted for the other one."""
    set_up(scripted, polls=[*[answer(200, running())] * 3, answer(200, completed())])
    async with session_on(scripted, max_in_flight=1, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await session.submit("the first")
        other = asyncio.ensure_future(session.generate("a cat"))
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat", timeout=1.0)
        await other

    assert len(scripted.of("POST")) == 2
    assert warnings(caplog) == []


async def test_waiting_for_the_answer_of_another_call(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A call that would submit again what might become uncertain ends in time, and leaves nothing behind."""
    set_up(scripted, submits=[answer(200, {"id": "t1"}, after=10.0)])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        other = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(1)
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat", timeout=2.0, resubmit_uncertain=True)
        seconds = anyio.current_time() - began
        await other

    assert seconds == pytest.approx(2.0, abs=0.1)
    assert len(scripted.of("POST")) == 1


async def test_enough_time(scripted: ScriptedGateway) -> None:
    """A call that ends in time returns its outcome, or raises its own error."""
    set_up(scripted, submits=[TASK, answer(401, {"error": {"message": "no such key"}})])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat", timeout=60)
        with pytest.raises(Exception, match="no such key"):
            await session.submit("a cat", timeout=60)

    assert outcome.task_id == "t1"


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, True, "5", pytest.param(10**400, id="too large")])
@pytest.mark.parametrize("method", ["generate", "submit"])
async def test_invalid_timeout(scripted: ScriptedGateway, method: str, seconds: Any) -> None:
    """Anything but a finite number above 0 is refused by name, before anything is sent."""
    async with session_on(scripted) as session:
        with pytest.raises(InvalidRequestError, match="timeout must be a finite number") as caught:
            await getattr(session, method)("a cat", timeout=seconds)

    assert caught.value.field == "timeout"
    assert scripted.received == []


# ---------------------------------------------------------------------- waits that are cancelled


async def cancel(waits: list[Any], after: float = 3.0) -> None:
    """Cancel waits one after the other."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    for task in tasks:
        await anyio.sleep(after)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


CAT = GenerationRequest("a cat", key="cat")


async def handle(session: FluxSession) -> None:
    await (await session.submit(CAT))


async def poll_again_and_again(session: FluxSession) -> None:
    """Wait for a task again and again, never for long."""
    task = await session.submit(CAT)
    for _ in range(3):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(task.outcome(), 0.1)


async def watch(session: FluxSession) -> None:
    """Follow the progress of a task while another wait for it is cancelled."""
    task = await session.submit(CAT)
    async for _ in task.updates():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(task.outcome(), 0.1)
        break


async def consume(session: FluxSession) -> None:
    async with session.stream([CAT]) as stream:
        await anext(stream)


@pytest.mark.parametrize(
    ("waits", "is_logged"),
    [
        pytest.param([lambda session: session.generate(CAT)], True, id="generate"),
        pytest.param([handle], True, id="a handle"),
        pytest.param([poll_again_and_again], True, id="a handle, again and again"),
        pytest.param([watch], False, id="a handle whose updates are followed"),
        pytest.param([lambda session: session.generate(CAT)] * 2, True, id="two, one after the other"),
        pytest.param([lambda session: session.generate(CAT), handle], True, id="generate and a handle"),
        pytest.param([handle, lambda session: session.generate(CAT)], True, id="a handle and generate"),
        pytest.param([consume], False, id="a stream, which has `unfinished`"),
    ],
)
async def test_cancelled_waits(
    scripted: ScriptedGateway,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    waits: list[Callable[[FluxSession], Any]],
    is_logged: bool,
) -> None:
    """When the last wait for a task is cancelled, its id is logged, once; the task goes on."""
    set_up(scripted, polls=[*[answer(200, running())] * 19, answer(200, completed())])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        began = anyio.current_time()
        await cancel([wait(session) for wait in waits])
        logged, seconds = warnings(caplog), anyio.current_time() - began
        await anyio.sleep(30)

        assert session.stats.completed == 1
    assert seconds < 15
    assert ["task t1 " in message for message in logged] == [True] * is_logged
    assert warnings(caplog) == logged


@pytest.mark.parametrize("others", [lambda session: session.generate(CAT), handle, consume])
async def test_cancelled_while_somebody_else_waits(
    scripted: ScriptedGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture, others: Any
) -> None:
    """A wait that is cancelled while another one goes on needs no warning."""
    set_up(scripted, polls=[*[answer(200, running())] * 9, answer(200, completed())])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        other = asyncio.ensure_future(others(session))
        await anyio.sleep(1)
        await cancel([session.generate(CAT), handle(session)], after=1.0)
        await other

    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("scripts", "options", "prepare"),
    [
        pytest.param({"polls": [answer(200, running())]}, {"max_in_flight": 1}, fill, id="waits for a slot"),
        pytest.param({"submits": [answer(401, {}, after=4.0)]}, {}, nothing, id="refused afterwards"),
        pytest.param({"polls": [answer(200, completed(), after=0.0)]}, {}, nothing, id="has ended"),
    ],
)
async def test_cancelled_without_a_task(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture, scripts: Any, options: Any, prepare: Any
) -> None:
    """Where nothing was submitted, or nothing is left to follow, nothing is logged as a warning."""
    set_up(scripted, **scripts)
    async with session_on(scripted, **options) as session:
        await prepare(session)
        await cancel([session.generate("a cat")])
        await anyio.sleep(10)

    assert warnings(caplog) == []


async def test_cancelled_on_the_wire(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """The id of a submit that is on the wire when its wait is cancelled is logged as soon as it is known."""
    set_up(scripted, submits=[answer(200, {"id": "t1"}, after=5.0)])
    async with session_on(scripted) as session:
        await cancel([session.generate("a cat")])
        logged = warnings(caplog)
        await anyio.sleep(2.5)

    assert logged == []
    assert ["task t1 " in message for message in warnings(caplog)] == [True]


async def test_cancelled_on_the_wire_and_taken_up_again(
    scripted: ScriptedGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If somebody waits again by the time the id is known, nothing is logged."""
    set_up(scripted, submits=[answer(200, {"id": "t1"}, after=5.0)])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await cancel([session.generate(CAT)])
        await session.generate(CAT)

    assert len(scripted.of("POST")) == 1
    assert warnings(caplog) == []


async def test_cancelled_and_uncertain(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A submit whose answer is lost after its wait was cancelled is logged, because it may cost money."""

    async def lose(connection: Any) -> None:
        await asyncio.sleep(5.0)
        await reset(connection)

    set_up(scripted, submits=[lose])
    async with session_on(scripted) as session:
        await cancel([session.generate("a cat")])
        await anyio.sleep(10)

    assert ["may exist and cost money" in message for message in warnings(caplog)] == [True]


# ---------------------------------------------------------------------- task_timeout


async def refuse_all(session: FluxSession) -> None:
    """Submit until the service has asked all submits to wait for 120 s."""
    calls = [asyncio.ensure_future(session.submit(f"refused {number}")) for number in range(8)]
    await anyio.sleep(0.5)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_task_timeout_counts_from_the_slot(scripted: ScriptedGateway) -> None:
    """A request that is held back past its deadline fails in time, and nothing is sent for it."""
    set_up(scripted, submits=[answer(429, b"", [("Retry-After", "120")])])
    async with session_on(scripted, task_timeout=10.0) as session:
        await refuse_all(session)
        posts, began = len(scripted.of("POST")), anyio.current_time()
        with pytest.raises(DeadlineExceededError, match="not sent within its task_timeout") as caught:
            await session.generate("a cat")
        seconds = anyio.current_time() - began
        await anyio.sleep(200)

    assert seconds == pytest.approx(7.5, abs=0.1)
    assert caught.value.task_id is None
    assert len(scripted.of("POST")) == posts


async def test_pause_is_part_of_the_task_timeout(scripted: ScriptedGateway) -> None:
    """A task whose submit was held back is given up when its request has held a slot for task_timeout."""
    set_up(scripted, submits=[*[answer(429, b"", [("Retry-After", "6")])] * 8, TASK], polls=[answer(200, running())])
    async with session_on(scripted, task_timeout=20.0) as session:
        await refuse_all(session)
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError, match="has not ended within 20 s") as caught:
            await session.generate("a cat")

        assert anyio.current_time() - began == pytest.approx(20.0, abs=0.1)
    assert caught.value.task_id == "t1"


async def test_waiting_for_a_slot_is_not_part_of_the_task_timeout(scripted: ScriptedGateway) -> None:
    """However long a request has waited for its slot, it then has the whole task_timeout."""
    set_up(
        scripted,
        submits=[answer(200, {"id": "t1"}), answer(200, {"id": "t2"})],
        polls=[*[answer(200, running("t1"))] * 15, answer(200, completed("t1")), answer(200, running("t2"))],
    )
    async with session_on(scripted, task_timeout=20.0, max_in_flight=1) as session:
        await session.submit("the first")
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat")

        assert anyio.current_time() - began == pytest.approx(36.0, abs=1.0)


async def test_refused_until_the_deadline(scripted: ScriptedGateway) -> None:
    """A submit that was sent, and can't be sent again in time, fails with what it was told last."""
    set_up(scripted, submits=[answer(503, b"", [("Retry-After", "120")])])
    async with session_on(scripted, task_timeout=10.0) as session:
        began = anyio.current_time()
        with pytest.raises(Exception, match="503") as caught:
            await session.generate("a cat")

        assert anyio.current_time() - began == pytest.approx(7.5, abs=0.5)
    assert not isinstance(caught.value, (DeadlineExceededError, TransportError))
