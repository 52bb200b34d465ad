"""Closing a session at each step of its event loop: whatever was pulled from a stream is delivered, and nothing hangs."""

import asyncio
import io
import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import attrs
import pytest
from PIL import Image
from support.scripted import Connection, ScriptedGateway, answer, completed, running, session_on
from support.virtual_time import VirtualTimeLoop

from flux2max_async import Completed, FluxSession, Outcome, SessionClosedError

REQUESTS = 4


class SteppedLoop(VirtualTimeLoop):
    """A loop on virtual time that counts its iterations, and calls something before certain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.calls: dict[int, Callable[[], object]] = {}

    def _run_once(self) -> None:
        self.step += 1
        if (call := self.calls.pop(self.step, None)) is not None:
            call()
        super()._run_once()  # type: ignore[misc]


@attrs.define
class Result:
    """What happened in one run."""

    steps: int = 0
    pulled: int = 0
    outcomes: list[Outcome] = attrs.field(factory=list)
    drained_at: float = math.inf
    submitted_at: list[float] = attrs.field(factory=list)


def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "navy").save(file, "PNG")
    return file.getvalue()


IMAGE = image()


def close(session: FluxSession, seconds: float | None, closing: set[asyncio.Task[None]], result: Result) -> None:
    """Begin the drain, or begin to close the session."""
    if seconds is None:
        session.begin_drain()
        result.drained_at = asyncio.get_running_loop().time()
    else:
        closing.add(asyncio.get_running_loop().create_task(session.aclose(drain=seconds)))


async def stream_and_close(folder: Path, closings: dict[int, float | None], result: Result) -> None:
    """Stream with saving, and call `aclose(drain=...)` at the given numbers of steps after the session was entered.

    With None, call `begin_drain()`.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SteppedLoop)
    async with ScriptedGateway() as scripted:

        async def poll(connection: Connection) -> None:
            task_id = connection.call.path.rpartition("/")[2]
            await answer(200, completed(task_id, url=f"{scripted.url}/{task_id}.png"))(connection)

        scripted.submits = deque(answer(200, running(f"t{number}"), after=0.2) for number in range(REQUESTS))
        scripted.polls = deque([poll])
        scripted.downloads = deque([answer(200, IMAGE, after=0.7)])

        def requests() -> Iterator[str]:
            for number in range(REQUESTS):
                result.pulled += 1
                yield f"cat {number}"

        async def consume() -> None:
            async for outcome in session.stream(requests(), save_to=folder):
                result.outcomes.append(outcome)

        session = session_on(scripted, max_in_flight=2)
        await session.__aenter__()
        start = loop.step
        closing: set[asyncio.Task[None]] = set()
        for step, seconds in closings.items():
            loop.calls[start + step] = partial(close, session, seconds, closing, result)
        consumer = asyncio.create_task(consume())
        done, _ = await asyncio.wait([consumer], timeout=1000.0)
        result.steps = loop.step - start
        loop.calls.clear()
        assert done, "the stream never ended"
        if consumer.exception() is not None and not isinstance(consumer.exception(), SessionClosedError):
            raise consumer.exception()  # type: ignore[misc]
        if closing:
            await asyncio.wait(closing)
        await session.aclose()
        result.submitted_at = [call.at for call in scripted.of("POST")]


def run(folder: Path, closings: dict[int, float | None]) -> Result:
    result = Result()
    anyio.run(stream_and_close, folder, closings, result, backend_options={"loop_factory": SteppedLoop})
    return result


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of steps that a whole run takes."""
    result = run(tmp_path_factory.mktemp("whole"), {})
    assert len(result.outcomes) == REQUESTS
    assert all(isinstance(outcome, Completed) and outcome.saved for outcome in result.outcomes)
    return result.steps


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({0: 0.0}, id="at once"),
        pytest.param({0: 0.4}, id="with a drain that is too short"),
        pytest.param({0: 60.0}, id="with a drain"),
        pytest.param({0: 60.0, 1: 0.0}, id="twice, the second time at once"),
        pytest.param({0: 60.0, 7: 0.0}, id="twice, the second time soon"),
        pytest.param({0: None}, id="drained, and closed at the end"),
    ],
)
def test_every_outcome_is_delivered_wherever_the_session_is_closed(
    tmp_path: Path, steps: int, how: dict[int, float | None]
) -> None:
    """At whichever step the session is closed: the stream ends, and each request that was pulled has one outcome."""
    for step in range(1, steps):
        result = run(tmp_path / str(step), {step + later: seconds for later, seconds in how.items()})

        assert len(result.outcomes) == result.pulled, f"closed at step {step} of {steps}"
        prompts = [outcome.request and outcome.request.prompt for outcome in result.outcomes]
        assert len(set(prompts)) == len(prompts)
        for outcome in result.outcomes:
            if isinstance(outcome, Completed):
                assert bool(outcome.saved) is (outcome.save_error is None)
        assert max(result.submitted_at, default=0.0) <= result.drained_at
        if None in how.values():
            assert sum(isinstance(outcome, Completed) for outcome in result.outcomes) == len(result.submitted_at)
