"""The trust in webhooks: polls become rare only as far as webhooks arrive, and arrive before polls would."""

import math
from collections import deque
from collections.abc import Callable, Generator
from heapq import heapify, heappop, heapreplace
from random import Random
from statistics import mean, quantiles

import anyio
import attrs
import pytest
from support.scripted import ScriptedGateway, answer, completed, running
from support.webhooks import InboxServer, deliver, session_on

from flux2max_async import FixedSchedule, GenerationRequest, LearnedSchedule, PollPlan, PollSchedule
from flux2max_async._polling.schedules import ScaledPlan
from flux2max_async.emulator import Emulator, Webhooks
from flux2max_async.webhooks._reliability import WebhookReliability

# ---------------------------------------------------------------------- the rule


def end_by_poll(reliability: WebhookReliability, late: float | None = None, *, interval: float = 1.0) -> None:
    """Record an end that a poll noticed first, whose webhook comes `late` seconds later, or never."""
    reliability.record_poll("t1", 10.0, interval=interval, cost_factor=reliability.cost_factor)
    if late is not None:
        reliability.record_delivery("t1", 10.0 + late)


def trusted() -> WebhookReliability:
    reliability = WebhookReliability()
    for _ in range(40):
        reliability.record_webhook()
    return reliability


def test_cost_factor_is_bounded() -> None:
    """Whatever share of webhooks arrives, a poll costs between 1 and 64 times its usual price."""
    reliability = WebhookReliability()
    for _ in range(20_000):
        reliability.record_webhook()
    highest = reliability.cost_factor
    for _ in range(20_000):
        end_by_poll(reliability)
    lowest = reliability.cost_factor
    for _ in range(40):
        reliability.record_webhook()
    recovered = reliability.cost_factor

    assert (highest, lowest, recovered) == (64.0, 1.0, 64.0)


def test_trust_is_earned() -> None:
    """Before the first webhooks have arrived, polls cost what they cost without webhooks."""
    reliability = WebhookReliability()
    factors = [reliability.cost_factor]
    for _ in range(40):
        reliability.record_webhook()
        factors.append(reliability.cost_factor)

    assert factors[0] == 1.0
    assert factors == sorted(factors)
    assert factors[-1] == 64.0


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        pytest.param(0.0, 64.0, id="at the same time"),
        pytest.param(0.001, 16.0, id="a moment later"),
        pytest.param(0.5, 1.0, id="half an interval later"),
        pytest.param(None, 2.0, id="never"),
        pytest.param(1.0, 2.0, id="later than the next poll"),
        pytest.param(300.0, 2.0, id="after an outage"),
    ],
)
def test_one_late_webhook(late: float | None, expected: float) -> None:
    """The later a webhook, the less trust is left; one that is very late is as good as none."""
    reliability = trusted()
    end_by_poll(reliability, late)

    assert reliability.cost_factor == expected


def test_a_repeated_delivery_counts_once() -> None:
    """The second delivery for a task, and one for an unknown task, change nothing."""
    reliability = trusted()
    end_by_poll(reliability, 0.001)
    before = reliability.cost_factor
    for task_id in ("t1", "unknown"):
        reliability.record_delivery(task_id, 10.5)

    assert reliability.cost_factor == before


def test_only_so_many_late_webhooks_are_awaited() -> None:
    """The oldest of more than a thousand is forgotten, and all are when a new session starts."""
    reliability = trusted()
    for number in range(1_001):
        reliability.record_poll(f"t{number}", 10.0, interval=1.0, cost_factor=1.0)
    factors = []
    for number in (0, 1, 2):
        if number == 2:
            reliability.reset()
        for _ in range(40):
            reliability.record_webhook()
        reliability.record_delivery(f"t{number}", 10.9)
        factors.append(reliability.cost_factor)

    assert factors == [64.0, 2.0, 64.0]


# ---------------------------------------------------------------------- sessions


async def test_late_webhooks_in_a_session(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery for a task whose end a poll has noticed tells how late webhooks are; a prompt one does no harm."""
    reliability = inbox_server.inbox.dispatcher.registry.reliability
    factors = []
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        for number, late in enumerate((0.0, 0.5), 1):
            for _ in range(40):
                reliability.record_webhook()
            scripted.polls = deque([answer(200, running()), answer(200, completed(f"t{number}"))])
            scripted.submits = deque([answer(200, {"id": f"t{number}", "status": "in_progress"})])
            await session.generate(f"picture {number}")
            await anyio.sleep(late)
            await deliver(inbox_server.inbox, completed(f"t{number}"))
            factors.append(reliability.cost_factor)

    assert factors[0] >= 32.0
    assert factors[1] == 1.0


async def test_ends_without_poll_or_webhook_say_nothing(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A task that has ended in the answer to its submit tells nothing about webhooks."""
    reliability = inbox_server.inbox.dispatcher.registry.reliability
    scripted.submits = deque([answer(200, completed("t1"))])
    async with session_on(scripted, inbox_server.inbox) as session:
        for _ in range(5):
            await session.generate("a cat")
        first = reliability.cost_factor
        for _ in range(2):
            reliability.record_webhook()

    assert (first, reliability.cost_factor) == (1.0, 2.0)


@attrs.define(eq=False)
class RecordingSchedule:
    """Polls every second, and records what it could have learned. It is the plan of all tasks."""

    learned: list[tuple[float, float]] = attrs.field(factory=list[tuple[float, float]])

    def begin(self, request: GenerationRequest | None) -> PollPlan:
        return self

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        return 1.0

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        self.learned.append((not_before, by))


@pytest.mark.parametrize(("dropped", "delay"), [(0.5, 0.0), (0.5, 1.0), (0.0, 1.0)])
async def test_session_with_bad_webhooks(inbox_server: InboxServer, dropped: float, delay: float) -> None:
    """Ends are noticed no later than by polls alone, and the schedule doesn't take late webhooks for ends."""
    schedule, seconds = RecordingSchedule(), 6.5
    webhooks = Webhooks(dropped=dropped, delay=delay)
    async with (
        Emulator(seconds=seconds, spread=0.0, seed=1, pictures=False, webhooks=webhooks) as gateway,
        session_on(gateway, inbox_server.inbox, schedule=schedule, max_polls_per_second=None) as session,
    ):
        delays = [outcome.elapsed - seconds async for outcome in session.stream(str(number) for number in range(120))]
        polls = session.stats.polls / 120

    assert quantiles(delays, n=20)[-1] <= 1.2
    assert polls <= 7.5
    if delay:
        # Rarely, several webhooks in a row beat the polls and are trusted.
        assert sum(not_before > seconds + 0.1 for not_before, _ in schedule.learned) < 12


# ---------------------------------------------------------------------- any share and delay, simulated

COUNT, SLOTS = 1_500, 24


@attrs.frozen
class Measured:
    """By how many seconds ends were noticed late, and polls for each task."""

    p95: float
    mean: float
    polls: float


@attrs.define(eq=False)
class Simulation:
    """Tasks of about eight seconds in 24 slots, whose polls a schedule and the trust in webhooks decide.

    Args:
        schedule: When to poll.
        arriving: The share of the webhooks that arrive.
        late: Seconds from an end to its webhook.
        expected: Whether polls depend on webhooks at all.
    """

    schedule: PollSchedule
    arriving: float = 0.0
    late: float = 0.0
    expected: bool = True
    reliability: WebhookReliability = attrs.field(factory=WebhookReliability)
    delays: list[float] = attrs.field(factory=list[float])
    polls: int = 0

    def run(self) -> Measured:
        random = Random(1)
        tasks = [(8.0 * math.exp(random.gauss(0.0, 0.4)), random.random() < self.arriving) for _ in range(COUNT)]
        # Each slot is a generator that yields the time of its next event.
        slots = [self.slot(tasks[number::SLOTS], str(number)) for number in range(SLOTS)]
        events = [(next(slot), number) for number, slot in enumerate(slots)]
        heapify(events)
        while events:
            _, number = events[0]
            try:
                heapreplace(events, (next(slots[number]), number))
            except StopIteration:
                heappop(events)
        return Measured(quantiles(self.delays, n=20)[-1], mean(self.delays), self.polls / COUNT)

    def slot(self, tasks: list[tuple[float, bool]], task_id: str) -> Generator[float]:
        """Run tasks one after the other; a webhook that comes after a poll is taken in when the next task is polled."""
        now, delivered_at = 0.0, math.inf
        for duration, arrives in tasks:
            plan, running_until, ended = ScaledPlan(self.schedule, None), 0.0, now + duration
            started, told_at = now, ended + self.late if arrives else math.inf
            while True:
                factor = self.reliability.cost_factor if self.expected else 1.0
                poll_at = now + plan.next_delay(running_until, None, cost_factor=factor)
                now = min(poll_at, told_at)
                if delivered_at <= now:
                    yield delivered_at
                    self.reliability.record_delivery(task_id, delivered_at)
                    delivered_at = math.inf
                yield now
                self.polls += poll_at <= told_at
                if now >= ended:
                    break
                running_until = now - started
            by_webhook = told_at < poll_at
            if by_webhook:
                self.reliability.record_webhook()
            else:
                interval = now - started - running_until
                self.reliability.record_poll(task_id, now, interval=interval, cost_factor=factor)
                delivered_at = told_at
            exact = by_webhook and self.reliability.is_prompt
            by = (now if exact else poll_at) - started
            plan.finish(by if exact else running_until, by, completed=True)
            self.delays.append(now - ended)


@pytest.fixture(scope="module", params=["learned", "fixed"])
def schedule(request: pytest.FixtureRequest) -> tuple[Callable[[], PollSchedule], Measured]:
    """Return how to make a schedule, and how it does alone."""
    make: Callable[[], PollSchedule] = LearnedSchedule if request.param == "learned" else lambda: FixedSchedule(1.0)
    return make, Simulation(make(), expected=False).run()


@pytest.mark.parametrize("late", [0.0, 0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("arriving", [0.0, 0.25, 0.5, 0.75, 0.95, 1.0])
def test_webhooks_never_make_it_worse(
    schedule: tuple[Callable[[], PollSchedule], Measured], arriving: float, late: float
) -> None:
    """Whatever share of webhooks arrives, and however late, ends are noticed as soon as by polling alone."""
    make, alone = schedule
    measured = Simulation(make(), arriving, late).run()

    assert measured.p95 <= 1.2 * alone.p95
    assert measured.mean <= 1.1 * alone.mean
    assert measured.polls <= 1.02 * alone.polls
    if arriving == 1.0 and not late:
        assert measured.polls <= 0.1 * alone.polls
