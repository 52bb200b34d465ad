"""SubmitLimiter: sequences of events, and simulations of many clients."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async._api.recent_refusals import pause_after
from flux2max_async._api.retry import MAX_PAUSE
from flux2max_async._api.submit_limiter import SubmitLimiter

Event = Callable[[SubmitLimiter], object]

# ---------------------------------------------------------------------- events


def started() -> Event:
    """A submit is sent."""
    return lambda limiter: limiter.submit_started(0.0)


def accepted(in_flight: int, *, probe: bool = False) -> Event:
    """A submit is accepted."""
    return lambda limiter: limiter.submit_accepted(in_flight, probe=probe)


def refused(at: float, in_flight: int, retry_after: float | None = None, *, probe: bool = False) -> Event:
    """A submit is refused with 429."""
    return lambda limiter: limiter.submit_refused(at, in_flight, retry_after, probe=probe)


def ended(*, probe: bool = False) -> Event:
    """A submit ends with neither a task nor a 429."""
    return lambda limiter: limiter.submit_ended(probe=probe)


def limited(at: float, in_flight: int, retry_after: float | None = None) -> Event:
    """Four submits that were on the wire at the same time are refused with 429."""

    def refuse(limiter: SubmitLimiter) -> None:
        for _ in range(4):
            limiter.submit_refused(at, in_flight, retry_after, probe=False)

    return refuse


def limiter_after(*events: Event, max_in_flight: int = 24) -> SubmitLimiter:
    """Return a limiter after a sequence of events."""
    limiter = SubmitLimiter(max_in_flight)
    for event in events:
        event(limiter)
    return limiter


# ---------------------------------------------------------------------- sequences of events

INFINITE = math.inf
PROBING = (limited(100, 5, 2), started())
"""Four submits are refused, and then a probe is on the wire."""
RECOVERING = (limited(100, 22, 2), started(), accepted(23, probe=True))


@pytest.mark.parametrize(
    ("events", "now", "in_flight", "delay"),
    [
        pytest.param([], 100, 0, 0, id="no events: no delay"),
        pytest.param([], 100, 23, 0, id="no events, one slot free: no delay"),
        pytest.param([started(), started(), accepted(1), accepted(2)], 100, 2, 0, id="all accepted: no delay"),
        pytest.param([started(), ended()], 100, 0, 0, id="lost response: no delay"),
        pytest.param([refused(100, 5, 2)] * 3, 100, 5, 0, id="three refused: no delay for others"),
        pytest.param([limited(100, 5, 2)], 100, 4, 2, id="refused: the requested wait"),
        pytest.param([limited(100, 5, 2)], 101.5, 4, 0.5, id="refused: the rest of the requested wait"),
        pytest.param([limited(100, 5, 2)], 102, 4, 0, id="refused: the requested wait is over"),
        pytest.param([limited(100, 5, 0)], 100, 4, 0, id="refused with a wait of 0"),
        pytest.param([limited(100, 5, 0.25)], 100, 4, 0.25, id="refused with a wait of 0.25 s"),
        pytest.param([limited(100, 5, 120)], 100, 4, 120, id="refused with a wait of two minutes"),
        pytest.param([limited(100, 5, 86400)], 100, 4, 120, id="refused with a wait of a day: two minutes"),
        pytest.param([limited(100, 5, None)], 100, 4, 1, id="refused without a wait: 1 s"),
        pytest.param([refused(100, 5, 9), *[refused(101, 5, 2)] * 3], 101, 4, 8, id="the longest wait of the four"),
        pytest.param([limited(100, 0, 2)], 102, 0, 0, id="refused with nothing in flight: one submit is allowed"),
        pytest.param([limited(100, 5, 2)], 102, 5, 0, id="refused once: the same number is tried once more"),
        pytest.param([limited(100, 5, 2)], 102, 6, 28, id="ceiling reached: 30 s after the refusal"),
        pytest.param([limited(100, 5, 60)], 102, 6, 58, id="ceiling reached: never less than the requested wait"),
        pytest.param([limited(100, 5, 2)], 130, 6, 0, id="ceiling reached: a probe after 30 s"),
        pytest.param([limited(100, 5, 2)], 131, 9, 0, id="ceiling exceeded: a probe after 30 s"),
        pytest.param(PROBING, 103, 4, INFINITE, id="probe on the wire: wait for its end"),
        pytest.param(PROBING, 200, 0, INFINITE, id="probe on the wire for long: wait for its end"),
        pytest.param([*PROBING, ended(probe=True)], 103, 4, 0, id="lost probe: another one may start"),
        pytest.param([*PROBING, accepted(5, probe=True)], 103, 4, 0, id="accepted probe: another one may start"),
        pytest.param(
            [*PROBING, accepted(5, probe=True), started()],
            103,
            4,
            INFINITE,
            id="second probe on the wire: wait for its end",
        ),
        pytest.param([*PROBING, refused(103, 5, 2, probe=True)], 103, 3, 2, id="refused probe: the requested wait"),
        pytest.param(
            [*PROBING, refused(103, 5, 2, probe=True)], 105, 4, 0, id="refused probe: another one after the wait"
        ),
        pytest.param(
            [*PROBING, refused(103, 5, 2, probe=True)], 105, 5, 28, id="refused at the same number: a lower ceiling"
        ),
        pytest.param(
            [*PROBING, refused(103, 4, 2, probe=True)], 105, 4, 0, id="refused at a lower number: tried once more"
        ),
        pytest.param([*PROBING, ended()], 103, 4, INFINITE, id="an older submit ends: still wait for the probe"),
        pytest.param(
            [*PROBING, accepted(6)], 103, 4, INFINITE, id="an older submit is accepted: still wait for the probe"
        ),
        pytest.param([limited(100, 5, 2), refused(100.5, 5, 2)], 100.5, 4, 2, id="the later refusal counts"),
        pytest.param(
            [limited(100, 5, 9), refused(101, 5, 2)], 101, 4, 8, id="a shorter wait doesn't shorten a longer one"
        ),
        pytest.param(RECOVERING, 103, 23, 0, id="recovering: no delay"),
        pytest.param([*RECOVERING, *[refused(103, 23, 2)] * 3], 103, 23, 0, id="recovering: three refused, no delay"),
        pytest.param([*RECOVERING, limited(103, 23, 2)], 103, 22, 2, id="recovering: limited again"),
    ],
)
def test_delay_after_events(events: list[Event], now: float, in_flight: int, delay: float) -> None:
    """After each of these sequences, the next submit has exactly this delay."""
    limiter = limiter_after(*events)

    assert limiter.submit_delay(now, in_flight, 0) == delay


@pytest.mark.parametrize(
    ("events", "is_limited"),
    [
        pytest.param([], False, id="no events"),
        pytest.param([started(), ended()], False, id="lost response"),
        pytest.param([refused(100, 5, 2)], False, id="refused once"),
        pytest.param([refused(100, 5, 2)] * 3, False, id="refused three times"),
        pytest.param([refused(100, 5, 2)] * 4, True, id="refused four times"),
        pytest.param([*[refused(100, 5, 2)] * 3, *[accepted(6)] * 16, refused(100, 5, 2)], True, id="four of 20"),
        pytest.param([*[refused(100, 5, 2)] * 3, *[ended()] * 17, refused(100, 5, 2)], False, id="four of 21"),
        pytest.param([limited(100, 0, 2)], True, id="refused with nothing in flight"),
        pytest.param([limited(100, 23, 2)], True, id="refused with one free slot"),
        pytest.param([limited(100, 24, 2)], True, id="refused with no free slot"),
        pytest.param([limited(100, 40, 2)], True, id="refused with more tasks in flight than slots"),
        pytest.param([limited(100, 23, 2), started(), accepted(24, probe=True)], False, id="accepted in the last slot"),
    ],
)
def test_submits_after_frequent_429s_are_probes(events: list[Event], is_limited: bool) -> None:
    """Four 429s among 20 submits make every submit a probe, until the ceiling is what the session allows."""
    limiter = limiter_after(*events)
    probe = limiter.submit_started(1000)

    assert limiter.is_limited is is_limited
    assert probe is is_limited
    assert (limiter.submit_delay(1000, 0, 1) == INFINITE) is is_limited


@pytest.mark.parametrize("refusals", [0, 1, 5])
def test_concurrency_doubles_while_it_recovers(refusals: int) -> None:
    """Once there is no ceiling, each accepted submit allows one more on the wire, from two on if the limit was confirmed."""
    limiter = limiter_after(limited(100, 20, 1), *[refused(110, 20, 1, probe=True)] * refusals)
    while limiter.is_limited:
        limiter.submit_accepted(20, probe=limiter.submit_started(1000))
    allowed = []
    while (on_wire := next((n for n in range(100) if limiter.submit_delay(1000, 20, n) == INFINITE), 0)) > 0:
        allowed.append(on_wire)
        limiter.submit_accepted(20, probe=limiter.submit_started(1000))

    assert allowed == list(range(2 if refusals else 3, 24))


@pytest.mark.parametrize("retry_after", [0.0, 0.5, 1.0, 7.0, 60.0, 119.5, 120.0, 121.0, 1e9])
@pytest.mark.parametrize("times", [1, 2, 5, 20])
def test_pause_is_what_the_service_requests(times: int, retry_after: float) -> None:
    """However often it refuses, from the fourth time on the pause is exactly what it requests, up to two minutes."""
    limiter = SubmitLimiter(24)
    now = 1024.0
    pauses = []
    for _ in range(3 + times):
        probe = limiter.submit_started(now)
        limiter.submit_refused(now, 2, retry_after, probe=probe)
        pauses.append(limiter.pause_remaining(now))
        now += 256

    assert pauses == [0.0] * 3 + [min(retry_after, MAX_PAUSE)] * times


@pytest.mark.parametrize("retry_after", [0.0, 1.0, 7.0])
def test_no_submit_starts_during_the_pause(retry_after: float) -> None:
    """At any time during the pause, the delay is the rest of it."""
    limiter = limiter_after(limited(1024, 5, retry_after))
    times = [1024 + retry_after * eighth / 8 for eighth in range(9)]

    assert all(limiter.submit_delay(time, 0, 0) == 1024 + retry_after - time for time in times)


@pytest.mark.parametrize("retry_after", [None, 0.0])
def test_backoff_of_refused_probes(retry_after: float | None) -> None:
    """If the service requests no useful wait, the delay grows with each refused probe, up to 30 s."""
    limiter = SubmitLimiter(24)
    now = 1024.0
    delays = []
    for _ in range(23):
        probe = limiter.submit_started(now)
        limiter.submit_refused(now, 0, retry_after, probe=probe)
        delays.append(limiter.submit_delay(now, 0, 0))
        now += 64

    delays = delays[3:]
    assert delays == sorted(delays)
    assert delays[0] == (1.0 if retry_after is None else 0.0)
    assert 2.0 <= delays[3] < delays[6] < delays[-1] == 30.0


def test_refusals_of_concurrent_submits_count_once() -> None:
    """Twenty refused submits that were on the wire at the same time cause the same delay as one."""
    limiter = limiter_after(*[started()] * 20, *[refused(100, 4, None)] * 20)

    assert limiter.submit_delay(100, 3, 0) == 1.0


def test_accepted_submit_resets_the_backoff() -> None:
    """After an accepted submit, the next refusal has a short delay again."""
    limiter = SubmitLimiter(24)
    for now in range(100, 1000, 100):
        probe = limiter.submit_started(now)
        limiter.submit_refused(now, 0, None, probe=probe)
    limiter.submit_accepted(1, probe=limiter.submit_started(1900))
    limiter.submit_refused(2000, 1, None, probe=limiter.submit_started(2000))

    assert limiter.submit_delay(2000, 0, 0) == 1.0


def test_ceiling_rises_until_there_is_no_limit() -> None:
    """Each accepted submit raises the ceiling, until submits are not limited any more."""
    limiter = limiter_after(limited(100, 3, 1), max_in_flight=8)
    in_flight = 3
    for _ in range(200):
        if limiter.submit_delay(101, in_flight, 0) == 0:
            probe = limiter.submit_started(101)
            in_flight = min(in_flight + 1, 8)
            limiter.submit_accepted(in_flight, probe=probe)
        else:
            in_flight -= 1  # a task has ended

    assert not limiter.is_limited
    assert limiter.submit_delay(101, 7, 7) == 0


def test_refusal_with_a_single_slot() -> None:
    """With a single slot, a refusal causes a pause and nothing else."""
    limiter = limiter_after(limited(100, 0, 2), max_in_flight=1)

    assert limiter.submit_delay(100, 0, 0) == 2
    assert limiter.submit_delay(102, 0, 0) == 0


def rate_limited() -> SubmitLimiter:
    """Return a limiter whose refusals came at 4 and 10 tasks in flight, with six accepted in the two seconds between."""
    limiter = limiter_after(limited(100, 4, 1), max_in_flight=100)
    for in_flight in range(5, 11):
        limiter.submit_accepted(in_flight, probe=limiter.submit_started(101))
    limiter.submit_refused(102, 10, 1, probe=limiter.submit_started(102))
    return limiter


def test_refused_with_ever_more_tasks_in_flight() -> None:
    """If the number in flight isn't the reason, submits are spread at the rate at which they were accepted before."""
    limiter = rate_limited()
    limiter.submit_started(103)
    limiter.submit_accepted(11, probe=True)

    assert limiter.submit_delay(103, 11, 0) == pytest.approx(1 / 3)
    assert limiter.submit_delay(103 + 1 / 3, 11, 0) == pytest.approx(0)


def test_refused_with_the_same_number_in_flight() -> None:
    """If two more tasks were in flight at most, which may have ended unnoticed, submits are not spread."""
    limiter = limiter_after(limited(100, 4, 1), max_in_flight=100)
    for in_flight in (5, 6, 6, 6, 6, 6):
        limiter.submit_accepted(in_flight, probe=limiter.submit_started(101))
    limiter.submit_refused(102, 5, 1, probe=limiter.submit_started(102))
    limiter.submit_started(103)
    limiter.submit_accepted(4, probe=True)

    assert limiter.submit_delay(103, 4, 0) == 0


def test_answers_to_one_burst_in_any_order() -> None:
    """Of a burst of twelve, in whichever order the answers come, the refused ones count as one, at what was accepted."""
    limiter = limiter_after(limited(100, 2, 1), *[accepted(n) for n in (3, 4)], limited(100, 4, 1), accepted(5))
    few_more = limiter.submit_delay(101, 6, 0)
    limiter.submit_accepted(6, probe=limiter.submit_started(101))
    limiter.submit_refused(102, 6, 1, probe=limiter.submit_started(102))
    limiter.submit_started(104)
    limiter.submit_ended(probe=True)

    assert few_more == 0  # nothing is confirmed
    assert limiter.submit_delay(104, 5, 0) == 0  # no rate
    assert limiter.submit_delay(104, 6, 0) > 20  # confirmed at 6


def test_time_without_waiting_submits_does_not_lower_the_rate() -> None:
    """Ten seconds in which nobody wanted to submit are not part of the time in which the rate is measured."""
    limiter, now = rate_limited(), 103.0
    for number in range(40):
        now += 10.0 if number == 6 else 0.0
        limiter.submit_accepted(6, probe=limiter.submit_started(now))
        now += limiter.submit_delay(now, 5, 0)
    limited(now, 10, 0)(limiter)
    limiter.submit_started(200)
    limiter.submit_ended(probe=True)

    assert 1 / limiter.submit_delay(200, 0, 0) > 3.0


@pytest.mark.parametrize(
    ("accepted", "seconds", "expected"),
    [
        pytest.param(8, 2.0, 4.0, id="what was accepted meanwhile"),
        pytest.param(3, 2.0, 2.7, id="no less than nine tenths of what it was"),
        pytest.param(5, 0.5, 5.0, id="counted as a second"),
    ],
)
def test_rate_after_the_next_refusal(accepted: int, seconds: float, expected: float) -> None:
    """Each further refusal sets the rate anew."""
    limiter = rate_limited()
    for _ in range(accepted):
        limiter.submit_accepted(6, probe=limiter.submit_started(103))
    limited(102 + seconds, 10, 0)(limiter)
    limiter.submit_started(200)
    limiter.submit_ended(probe=True)

    assert limiter.submit_delay(200, 0, 0) == pytest.approx(1 / expected)


def test_rate_is_given_up() -> None:
    """Each accepted submit raises the rate; after seventy without a refusal, there is none."""
    limiter = rate_limited()
    delays = []
    for now in range(200, 280):
        probe = limiter.submit_started(now)
        limiter.submit_accepted(6, probe=probe)
        delays.append(limiter.submit_delay(now, 0, 0))

    assert delays == sorted(delays, reverse=True)
    assert delays[68] > 1 / 6
    assert delays[71] == 0


WAITS = st.none() | st.floats(0, 1e9)
COUNTS = st.integers(0, 30)
EVENTS = st.one_of(
    st.just("start"),
    st.just("end"),
    COUNTS.map(lambda count: ("accept", count)),
    st.tuples(COUNTS, WAITS),
    st.floats(0, 300),
)
"""A submit starts, ends, is accepted, or is refused; time passes."""


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=60), st.integers(1, 30), st.integers(0, 40))
def test_delay_is_bounded_after_any_events(events: list[Any], max_in_flight: int, in_flight: int) -> None:
    """A delay is never negative, infinite only while submits are on the wire, and otherwise at most two minutes.

    The ceiling stays within its bounds. Afterwards, if every submit is accepted, the limit is gone.
    """
    limiter = SubmitLimiter(max_in_flight)
    now, asked = 1000.0, -math.inf
    on_wire: list[bool] = []
    for event in events:
        match event:
            case "start":
                on_wire.append(limiter.submit_started(now))
            case "end" if on_wire:
                limiter.submit_ended(probe=on_wire.pop(0))
            case ("accept", count) if on_wire:
                limiter.submit_accepted(count, probe=on_wire.pop(0))
            case (int(count), retry_after) if on_wire:
                limiter.submit_refused(now, count, retry_after, probe=on_wire.pop(0))
                asked = max(asked, now + min(1.0 if retry_after is None else retry_after, MAX_PAUSE))
                if limiter.is_limited:
                    assert limiter.submit_delay(now, 0, len(on_wire)) >= asked - now
            case float(seconds):
                now += seconds
        assert 1 <= limiter._ceiling <= max_in_flight
    delay = limiter.submit_delay(now, in_flight, len(on_wire))

    assert 0 <= limiter.pause_remaining(now) <= MAX_PAUSE + 1e-6
    assert limiter.pause_remaining(now) <= delay
    assert delay <= MAX_PAUSE + 1e-6 or (delay == INFINITE and on_wire)

    for probe in on_wire:
        limiter.submit_ended(probe=probe)
    now += 1000
    for _ in range(16 * max_in_flight + max_in_flight):
        assert limiter.submit_delay(now, 0, 0) == 0
        limiter.submit_accepted(1, probe=limiter.submit_started(now))
        now += 30
    assert not limiter.is_limited
    assert limiter.submit_delay(now, 0, 99) == 0


# ---------------------------------------------------------------------- simulations


@attrs.define
class Simulation:
    """Simulates many clients that share one limiter, and a service that runs a limited number of tasks at a time."""

    limit: Callable[[float], int]
    """Returns how many tasks the service runs at a time, some seconds after the start."""
    tasks: int = 240
    clients: int = 24
    rate: float = 1e9
    """How many submits the service accepts in a second, and how many at once."""
    seconds: float = 8.0
    """The duration of a task."""
    retry_after: float | None = 1.0
    latency: float = 0.125
    detection_delay: float = 0.25
    """Seconds from the end of a task until its client knows of it."""

    submits: int = attrs.field(default=0, init=False)
    completed: int = attrs.field(default=0, init=False)
    now: float = attrs.field(default=0.0, init=False)
    early_submits: int = attrs.field(default=0, init=False)
    """Submits that started during a pause."""
    peak_probes: int = attrs.field(default=0, init=False)
    """Maximum number of probes that were on the wire at the same time."""
    peak_running: dict[int, int] = attrs.field(factory=dict[int, int], init=False)
    """Maximum number of tasks that ran at the same time, for each minute."""

    _pending: int = attrs.field(default=attrs.Factory(lambda self: self.tasks, takes_self=True), init=False)
    _busy_clients: int = attrs.field(default=0, init=False)
    """Clients that are submitting, or whose task is running to their knowledge."""
    _in_flight: int = attrs.field(default=0, init=False)
    _running: int = attrs.field(default=0, init=False)
    _on_wire: list[bool] = attrs.field(factory=list[bool], init=False)
    """For each submit on the wire, whether it is a probe."""
    _tokens: float = attrs.field(default=1e9, init=False)
    _tokens_at: float = attrs.field(default=0.0, init=False)
    _events: list[tuple[float, int, Event]] = attrs.field(factory=list[tuple[float, int, Event]], init=False)
    _order: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    def run(self) -> Self:
        limiter = SubmitLimiter(self.clients)
        while self._pending or self._events:
            may_submit = self._pending > 0 and self._busy_clients < self.clients
            on_wire = len(self._on_wire)
            delay = limiter.submit_delay(self.now, self._in_flight, on_wire) if may_submit else math.inf
            if delay <= 0:
                self.early_submits += limiter.pause_remaining(self.now) > 0
                self._submit(limiter.submit_started(self.now))
            elif self._events and self._events[0][0] <= self.now + delay:
                self.now, _, event = heapq.heappop(self._events)
                event(limiter)
            else:
                assert delay < math.inf, "deadlock: every client waits"
                self.now += delay
        return self

    def _schedule(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def _submit(self, probe: bool) -> None:
        self.submits += 1
        self._pending -= 1
        self._busy_clients += 1
        self._on_wire.append(probe)
        self.peak_probes = max(self.peak_probes, sum(self._on_wire))
        self._schedule(self.latency / 2, lambda _: self._arrive(probe))

    def _arrive(self, probe: bool) -> None:
        self._tokens = min(self._tokens + (self.now - self._tokens_at) * self.rate, self.rate)
        self._tokens_at = self.now
        if self._running < self.limit(self.now) and self._tokens >= 1:
            self._tokens -= 1
            self._running += 1
            minute = int(self.now / 60)
            self.peak_running[minute] = max(self.peak_running.get(minute, 0), self._running)
            self._schedule(self.seconds, lambda _: self._end())
            self._schedule(self.latency / 2, lambda limiter: self._accept(limiter, probe))
        else:
            self._schedule(self.latency / 2, lambda limiter: self._refuse(limiter, probe))

    def _accept(self, limiter: SubmitLimiter, probe: bool) -> None:
        self._on_wire.remove(probe)
        self._in_flight += 1
        limiter.submit_accepted(self._in_flight, probe=probe)

    def _refuse(self, limiter: SubmitLimiter, probe: bool) -> None:
        self._on_wire.remove(probe)
        self._schedule(pause_after(self.retry_after), lambda _: self._wait_again())
        limiter.submit_refused(self.now, self._in_flight, self.retry_after, probe=probe)

    def _wait_again(self) -> None:
        self._pending += 1
        self._busy_clients -= 1

    def _end(self) -> None:
        self._running -= 1
        self._schedule(self.detection_delay, lambda _: self._detect_end())

    def _detect_end(self) -> None:
        self._in_flight -= 1
        self._busy_clients -= 1
        self.completed += 1


def test_service_with_a_low_limit() -> None:
    """With 24 clients, a limit of 3 and 8 s per task, all tasks complete with fewer than 4 submits each and little idle time."""
    simulation = Simulation(lambda _: 3).run()

    assert simulation.completed == simulation.tasks
    assert simulation.submits < 4 * simulation.tasks
    assert simulation.early_submits == 0
    assert simulation.now < 1.25 * simulation.tasks * simulation.seconds / 3


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 23, 24, 100])
@pytest.mark.parametrize("retry_after", [None, 0.0, 1.0, 5.0])
def test_all_tasks_complete_with_any_limit(limit: int, retry_after: float | None) -> None:
    """Whatever the limit and the requested wait, all tasks complete, with one probe at a time."""
    simulation = Simulation(lambda _: limit, tasks=60, retry_after=retry_after).run()

    assert simulation.completed == simulation.tasks
    assert simulation.submits < 4 * simulation.tasks
    assert simulation.early_submits == 0
    assert simulation.peak_probes <= (1 if limit < 24 else 0)


@pytest.mark.parametrize("limit", [2, 3, 8])
def test_constant_limit_is_rarely_exceeded(limit: int) -> None:
    """With a constant limit, there are several accepted submits for one refused probe."""
    simulation = Simulation(lambda _: limit, tasks=600).run()

    assert simulation.completed == simulation.tasks
    assert simulation.submits - simulation.tasks < simulation.tasks / 4


def test_concurrency_recovers_after_the_limit_is_raised() -> None:
    """When the service raises its limit, all 24 slots are in use within minutes, without probes."""
    simulation = Simulation(lambda now: 3 if now < 60 else 100, tasks=800).run()

    assert simulation.completed == simulation.tasks
    assert simulation.peak_running[0] == 3
    assert simulation.peak_running[4] == 24
    assert simulation.submits < 1.1 * simulation.tasks


def test_concurrency_follows_a_falling_limit() -> None:
    """When the service lowers its limit, the concurrency follows, and recovers afterwards."""
    simulation = Simulation(lambda now: 4 if 60 <= now < 240 else 24, tasks=900).run()

    assert simulation.completed == simulation.tasks
    assert simulation.early_submits == 0
    assert simulation.peak_running[0] == 24
    assert simulation.peak_running[2] == 4
    assert simulation.peak_running[6] == 24
    assert simulation.submits < 1.2 * simulation.tasks


def test_few_submits_while_the_service_accepts_nothing() -> None:
    """While the service accepts nothing for ten minutes, it gets dozens of submits, not hundreds."""
    simulation = Simulation(lambda now: 0 if now < 600 else 24, tasks=24).run()

    assert simulation.completed == simulation.tasks
    assert simulation.submits < 24 + 24 + 60
    assert simulation.now < 600 + 120


@pytest.mark.parametrize("clients", [24, 100])
def test_service_with_a_limited_rate(clients: int) -> None:
    """With five submits a second, at least nine tenths of them are used, and few are refused after the first burst."""
    seconds = 1.5 if clients == 24 else 8.0
    simulation = Simulation(lambda _: 1000, tasks=800, clients=clients, rate=5.0, seconds=seconds).run()

    assert simulation.completed == simulation.tasks
    assert simulation.early_submits == 0
    assert simulation.now < 800 / 5 / 0.9 + seconds
    assert simulation.submits - clients < 1.2 * simulation.tasks
