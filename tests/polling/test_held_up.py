"""A blocked loop, a stopped process or a suspended machine ends no task that has not had an honest poll since."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import pytest
from support.scripted import Behaviour, ScriptedGateway, answer, completed, hang, reset, running
from support.virtual_time import hold_up
from support.webhooks import SECRET, sign

from flux2max_async import (
    Completed,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxSession,
    LearnedSchedule,
    Outcome,
    WebhookInbox,
)
from flux2max_async._polling.deadline import GRACE_PERIOD

COMPLETED, RUNNING = answer(200, completed()), answer(200, running())
TIMEOUT = 60.0
COUNT = 10


@attrs.frozen
class State:
    """What ten tasks wait for when everything is held up.

    Args:
        held_up_at: Seconds after the start.
        polls: The answers to polls before that.
        options: Of the session.
    """

    held_up_at: float
    polls: list[Behaviour] = attrs.field(factory=lambda: [RUNNING])
    options: dict[str, Any] = attrs.field(factory=dict[str, Any])


RARE = {"schedule": FixedSchedule(1000.0)}
STATES = {
    "before the first poll": State(0.5, options=RARE),
    "between two polls": State(30.0),
    "before the final poll": State(58.9, options=RARE),
    "after the final poll": State(59.5),
    "after the final poll of a schedule": State(59.5, options=RARE),
    "poll on the wire": State(30.0, [hang]),
    "final poll on the wire": State(59.5, [hang], RARE),
    "poll on the wire until the deadline": State(59.5, [hang], {"http_timeout": 1000.0}),
    "answer on its way": State(30.0, [answer(200, completed(), after=20.0)], {"schedule": FixedSchedule(20.0)}),
    "retry delay": State(30.0, [answer(503, b"")]),
    "retry delay that the service asked for": State(30.0, [answer(503, b"", [("Retry-After", "50")])]),
    "pause": State(30.0, [answer(429, b"", [("Retry-After", "100")])]),
    "poll limit": State(30.0, options={"max_polls_per_second": 0.05}),
}


def session_on(scripted: ScriptedGateway, **options: Any) -> FluxSession:
    options = {"schedule": FixedSchedule(1.0), "task_timeout": TIMEOUT, **options}
    return FluxSession(scripted.api_key, base_url=scripted.url, **options)


async def follow(
    scripted: ScriptedGateway, state: State, gap: float, afterwards: Behaviour, *, attached: bool
) -> tuple[list[Outcome], float]:
    """Follow ten tasks through a gap; return their outcomes, and how long after the gap the last one ended."""
    scripted.submits = deque(answer(200, running(f"t{number}")) for number in range(COUNT))
    scripted.polls = deque(state.polls)
    resumed_at = 0.0

    def pass_gap() -> None:
        nonlocal resumed_at
        scripted.polls = deque([afterwards])
        hold_up(gap)
        resumed_at = asyncio.get_running_loop().time()

    async with session_on(scripted, **state.options) as session:
        asyncio.get_running_loop().call_later(state.held_up_at, pass_gap)
        if attached:
            tasks = [session.attach(f"t{number}") for number in range(COUNT)]
        else:
            tasks = [await session.submit("a cat") for _ in range(COUNT)]
        outcomes = [await task.outcome() for task in tasks]
    return outcomes, anyio.current_time() - resumed_at


@pytest.mark.parametrize("attached", [False, True], ids=["submitted", "attached"])
@pytest.mark.parametrize("gap", [60.0, 3600.0, 30 * 3600.0])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
async def test_tasks_that_ended_meanwhile(scripted: ScriptedGateway, state: State, gap: float, attached: bool) -> None:
    """Whatever ten tasks waited for, and however long nothing ran past their deadline, they come out completed."""
    outcomes, _ = await follow(scripted, state, gap, COMPLETED, attached=attached)

    assert [type(outcome) for outcome in outcomes] == [Completed] * COUNT


@pytest.mark.parametrize("gap", [1.1, 3.0, 8.0])
@pytest.mark.parametrize("polls", [RUNNING, hang], ids=["sleeping", "on the wire"])
async def test_short_gaps_at_the_deadline(scripted: ScriptedGateway, polls: Behaviour, gap: float) -> None:
    """A gap of a second is enough to miss an answer that is already there."""
    state = State(58.9 if polls is RUNNING else 59.5, [polls], RARE)
    outcomes, _ = await follow(scripted, state, gap, COMPLETED, attached=polls is hang)

    assert [type(outcome) for outcome in outcomes] == [Completed] * COUNT


async def test_no_poll_without_time(scripted: ScriptedGateway) -> None:
    """A poll that is due before the gap is not sent with no time for its answer: one is enough."""
    outcomes, _ = await follow(scripted, STATES["before the first poll"], 3600.0, COMPLETED, attached=False)

    assert [outcome.polls for outcome in outcomes] == [1] * COUNT


@pytest.mark.parametrize(
    ("afterwards", "longest"),
    [
        pytest.param(RUNNING, 0.1, id="running"),
        pytest.param(reset, GRACE_PERIOD + 0.1, id="resets"),
        pytest.param(hang, GRACE_PERIOD + 0.1, id="hangs"),
        pytest.param(answer(503, b""), GRACE_PERIOD + 0.1, id="503"),
        pytest.param(answer(200, completed(), after=4.0), 4.1, id="answers slowly"),
    ],
)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
async def test_end_after_an_honest_poll(
    scripted: ScriptedGateway, state: State, afterwards: Behaviour, longest: float
) -> None:
    """A poll that finds the task running ends it, and so do failures for five seconds; a slow answer is waited for.

    An answer that has come during the gap is read, and needs no other poll.
    """
    outcomes, took = await follow(scripted, state, 3600.0, afterwards, attached=False)

    ends = {type(outcome.error) if isinstance(outcome, Failed) else Completed for outcome in outcomes}
    is_completed = longest == 4.1 or state is STATES["answer on its way"]
    assert ends == {Completed if is_completed else DeadlineExceededError}
    assert took <= longest


async def test_a_pause_goes_on_after_the_gap(scripted: ScriptedGateway) -> None:
    """The rest of the wait that the service asked for is waited out before the honest polls."""
    scripted.submits = deque([answer(200, running()), answer(200, running("t2"))])
    scripted.polls = deque([*[answer(429, b"", [("Retry-After", "100")])] * 2, COMPLETED])
    async with session_on(scripted) as session:
        tasks = [await session.submit("a cat") for _ in range(2)]
        await anyio.sleep(30.0)
        hold_up(40.0)
        outcomes = [await task.outcome() for task in tasks]

    assert [outcome.ok for outcome in outcomes] == [True, True]
    polls = [request.at for request in scripted.of("GET")]
    assert all(at - polls[0] >= 99.9 for at in polls[2:])
    assert polls[-1] - polls[0] < 103.0


async def test_a_pause_past_the_deadline(scripted: ScriptedGateway) -> None:
    """Without a gap, a pause that the service asked for doesn't put the deadline off."""
    scripted.polls = deque([answer(429, b"", [("Retry-After", "100")]), COMPLETED])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()

    assert isinstance(outcome, Failed)
    assert type(outcome.error) is DeadlineExceededError
    assert outcome.elapsed == pytest.approx(TIMEOUT)


async def test_refused_polls_after_the_gap(scripted: ScriptedGateway) -> None:
    """If the honest poll of the first task is refused with 429, the others still get theirs after the pause."""
    scripted.submits = deque(answer(200, running(f"t{number}")) for number in range(COUNT))
    scripted.polls = deque([RUNNING])
    async with session_on(scripted) as session:
        tasks = [await session.submit("a cat") for _ in range(COUNT)]
        await anyio.sleep(30.0)
        scripted.polls = deque([answer(429, b"", [("Retry-After", "20")]), COMPLETED])
        hold_up(3600.0)
        outcomes = [await task.outcome() for task in tasks]

    assert sum(outcome.ok for outcome in outcomes) >= COUNT - 1


async def test_webhook_in_the_moment_of_the_deadline(scripted: ScriptedGateway) -> None:
    """A webhook that is processed in the same step as the timer of the deadline ends the task."""
    scripted.polls = deque([RUNNING])
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    async with session_on(scripted, webhooks=inbox) as session:
        task = await session.submit("a cat")
        poller = task._runner.poller
        assert poller is not None
        scripted.polls = deque([COMPLETED])
        snapshot = await session.fetch("t1")
        scripted.polls = deque([RUNNING])
        # Timers of the same time run in the order in which they were set: this one after the poller's.
        await anyio.sleep(TIMEOUT - 0.5)
        asyncio.get_running_loop().call_at(poller._start.deadline, poller.on_webhook, snapshot)
        outcome = await task.outcome()

    assert outcome.ok


# ---------------------------------------------------------------------- a suspended machine


@pytest.mark.parametrize("hours", [0.01, 1.0, 8.0])
async def test_a_suspended_machine_polls_soon_after_it_resumes(scripted: ScriptedGateway, hours: float) -> None:
    """The loop's clock stands still in a suspension: the end is noticed within ten seconds of waking all the same."""
    scripted.polls = deque([COMPLETED])
    async with session_on(scripted, schedule=FixedSchedule(75.0), task_timeout=600.0) as session:
        suspend = _suspensions(session)
        task = await session.submit("a cat")
        await anyio.sleep(20.0)
        suspend(hours * 3600)
        resumed_at = anyio.current_time()
        outcome = await task.outcome()

    assert outcome.ok
    assert outcome.polls == 1
    assert anyio.current_time() - resumed_at <= 10.1


async def test_a_dead_connection_after_a_suspension(scripted: ScriptedGateway) -> None:
    """The first poll after a suspension has five seconds: its connection may be dead without a sign."""
    scripted.polls = deque([RUNNING, hang, COMPLETED])
    async with session_on(scripted, schedule=FixedSchedule(9.0), task_timeout=600.0) as session:
        suspend = _suspensions(session)
        task = await session.submit("a cat")
        await anyio.sleep(15.0)
        suspend(3600.0)
        outcome = await task.outcome()

    first, _, last = [request.at for request in scripted.of("GET")]
    assert outcome.ok
    assert last - first <= 9.3 + GRACE_PERIOD + 1.0


async def test_a_suspension_does_not_cut_what_the_service_asked_for(scripted: ScriptedGateway) -> None:
    """After a refused poll the wait that the service asked for is kept; clocks that merely drift change nothing."""
    scripted.polls = deque([answer(503, b"", [("Retry-After", "60")]), RUNNING, COMPLETED])
    async with session_on(scripted, schedule=FixedSchedule(40.0), task_timeout=600.0) as session:
        suspend = _suspensions(session)
        task = await session.submit("a cat")
        await anyio.sleep(50.0)
        suspend(3600.0)
        await anyio.sleep(60.0)
        suspend(0.5)
        outcome = await task.outcome()

    first, second, third = [request.at for request in scripted.of("GET")]
    assert outcome.ok
    assert second - first == pytest.approx(60.0, abs=0.5)
    assert third - second == pytest.approx(40.0, abs=0.5)


def _suspensions(session: FluxSession) -> Callable[[float], None]:
    """Replace a session's clock of suspensions; return the function that suspends the machine."""
    assert session._supervisor is not None
    client, total = session._supervisor.client, 1_000_000.0

    def suspend(seconds: float) -> None:
        nonlocal total
        total += seconds

    client.suspended = lambda: total
    return suspend


# ---------------------------------------------------------------------- what is learned


class RecordingSchedule:
    """Records the intervals that its plans learn."""

    def __init__(self) -> None:
        self.learned: list[tuple[float, float]] = []

    def begin(self, request: object) -> "RecordingSchedule":
        return self

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        return 20.0

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        self.learned.append((not_before, by))


@pytest.mark.parametrize("by_webhook", [False, True], ids=["poll", "webhook"])
@pytest.mark.parametrize(
    ("held_up", "suspended", "expected"),
    [
        pytest.param(0.0, 0.0, (20.0, 40.0), id="neither"),
        pytest.param(3600.0, 0.0, (20.0, 3630.0), id="held up"),
        pytest.param(0.0, 3600.0, (20.0, 3630.0), id="suspended"),
        pytest.param(0.0, 0.4, (20.0, 40.0), id="clocks that drift"),
    ],
)
async def test_a_gap_is_not_learned_as_a_duration(
    scripted: ScriptedGateway, by_webhook: bool, held_up: float, suspended: float, expected: tuple[float, float]
) -> None:
    """A task that ended in a gap ended between the poll before it and the moment after it, and nobody knows when."""
    schedule = RecordingSchedule()
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    scripted.polls = deque([RUNNING, COMPLETED])
    async with session_on(scripted, schedule=schedule, webhooks=inbox, task_timeout=100_000.0) as session:
        suspend = _suspensions(session)
        task = await session.submit("a cat")
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(task))  # so that polls are as frequent as without webhooks
            await anyio.sleep(30.0)
            hold_up(held_up)
            suspend(suspended)
            if by_webhook:
                await anyio.sleep(0.1)  # the delivery is read after the late timers
                await inbox.deliver(*sign(completed()))
            await watching

    ((not_before, by),) = schedule.learned
    if by_webhook and expected[1] == 40.0:
        assert not_before == by == pytest.approx(30.1)
    else:
        assert not_before == pytest.approx(expected[0], abs=2.1)
        assert by == pytest.approx(expected[1], abs=10.5)  # a watched sleep of 10 s, and the jitter of two delays


async def _watch(task: Any) -> None:
    async for _ in task.updates():
        pass


async def test_a_poll_after_a_gap_is_learned_from_again(scripted: ScriptedGateway) -> None:
    """A webhook that comes after a poll which found the task running tells the moment of the end again."""
    schedule = RecordingSchedule()
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    scripted.polls = deque([RUNNING])
    async with session_on(scripted, schedule=schedule, webhooks=inbox, task_timeout=100_000.0) as session:
        task = await session.submit("a cat")
        hold_up(3600.0)
        while not scripted.of("GET"):  # noqa: ASYNC110 - the server has no event for it
            await anyio.sleep(1.0)
        await anyio.sleep(1.0)
        await inbox.deliver(*sign(completed()))
        await task

    ((not_before, by),) = schedule.learned
    assert not_before == by


async def test_a_learned_schedule_stays_what_it_was(scripted: ScriptedGateway) -> None:
    """One task that ended in a gap of hours doesn't change what a schedule knows of the others."""
    schedule = LearnedSchedule()
    for _ in range(50):
        schedule.begin(None).finish(7.9, 8.1, completed=True)
    before = schedule.percentile(50)
    scripted.polls = deque([COMPLETED])
    async with session_on(scripted, schedule=schedule) as session:
        task = await session.submit("a cat")
        await anyio.sleep(1.0)
        hold_up(8 * 3600.0)
        await task

    assert before is not None
    assert schedule.percentile(50) == pytest.approx(before, rel=0.1)
