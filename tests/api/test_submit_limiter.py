"""The pace: what 429s teach, in scripted histories and in a simulated rush."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async._api.submit_limiter import MAX_PAUSE, SubmitLimiter

Step = Callable[[SubmitLimiter], object]

# ---------------------------------------------------------------------- the words of a history


def started() -> Step:
    """A submit goes out."""
    return lambda pace: pace.submit_started()


def accepted(in_flight: int, *, probe: bool = False) -> Step:
    """A submit became a task."""
    return lambda pace: pace.submit_accepted(in_flight, probe=probe)


def refused(at: float, in_flight: int, wait: float | None = None, *, probe: bool = False) -> Step:
    """A submit was answered with 429."""
    return lambda pace: pace.submit_refused(at, in_flight, wait, probe=probe)


def lost(*, probe: bool = False) -> Step:
    """A submit ended in a way that teaches nothing."""
    return lambda pace: pace.submit_ended(probe=probe)


def poll_refused(at: float, wait: float | None = None) -> Step:
    """A poll was answered with 429."""
    return lambda pace: pace.poll_refused(at, wait)


def after(*steps: Step, places: int = 24) -> SubmitLimiter:
    """Give the pace after a history."""
    pace = SubmitLimiter(places)
    for step in steps:
        step(pace)
    return pace


# ---------------------------------------------------------------------- scripted histories

NEVER = math.inf
PROBING = (started(), refused(100, 5, 2), started())
"""One submit refused, and then a probe on its way."""


@pytest.mark.parametrize(
    ("steps", "now", "in_flight", "delay"),
    [
        pytest.param([], 100, 0, 0, id="nothing happened: at once"),
        pytest.param([], 100, 23, 0, id="nothing happened, nearly all places taken: at once"),
        pytest.param([started(), started(), accepted(1), accepted(2)], 100, 2, 0, id="all accepted: at once"),
        pytest.param([started(), lost()], 100, 0, 0, id="a lost answer teaches nothing"),
        pytest.param([refused(100, 5, 2)], 100, 4, 2, id="refused: as long as the service says"),
        pytest.param([refused(100, 5, 2)], 101.5, 4, 0.5, id="refused: the rest of what the service says"),
        pytest.param([refused(100, 5, 2)], 102, 4, 0, id="refused: what the service says is over"),
        pytest.param([refused(100, 5, 0)], 100, 4, 0, id="refused, but at once again"),
        pytest.param([refused(100, 5, 0.25)], 100, 4, 0.25, id="refused for a quarter of a second"),
        pytest.param([refused(100, 5, 120)], 100, 4, 120, id="refused for two minutes"),
        pytest.param([refused(100, 5, 86400)], 100, 4, 120, id="refused for a day: two minutes"),
        pytest.param([refused(100, 5, None)], 100, 4, 1, id="refused without a time: a second"),
        pytest.param([refused(100, 0, 2)], 102, 0, 0, id="refused with nothing in flight: one may try"),
        pytest.param([refused(100, 5, 2)], 102, 5, 28, id="as many in flight as were refused: half a minute in all"),
        pytest.param([refused(100, 5, 60)], 102, 5, 58, id="half a minute never shortens what the service says"),
        pytest.param([refused(100, 5, 2)], 130, 5, 0, id="after half a minute one looks again"),
        pytest.param([refused(100, 5, 2)], 131, 9, 0, id="after half a minute one looks again, whatever is in flight"),
        pytest.param(PROBING, 103, 4, NEVER, id="a probe is out: wait for its end"),
        pytest.param(PROBING, 200, 0, NEVER, id="a probe is out: wait for its end, however long"),
        pytest.param([*PROBING, lost(probe=True)], 103, 4, 0, id="a lost probe makes room for another one"),
        pytest.param([*PROBING, accepted(5, probe=True)], 103, 4, 0, id="an accepted probe makes room for another one"),
        pytest.param([*PROBING, accepted(5, probe=True), started()], 103, 4, NEVER, id="and that one is a probe again"),
        pytest.param([*PROBING, refused(103, 4, 2, probe=True)], 103, 3, 2, id="a refused probe: wait again"),
        pytest.param([*PROBING, refused(103, 4, 2, probe=True)], 105, 3, 0, id="a refused probe: then another one"),
        pytest.param([*PROBING, refused(103, 4, 2, probe=True)], 105, 4, 28, id="a refused probe lowers the ceiling"),
        pytest.param([*PROBING, lost()], 103, 4, NEVER, id="the end of an older submit doesn't end the probe"),
        pytest.param(
            [*PROBING, accepted(6)], 103, 4, NEVER, id="an older submit that is accepted doesn't end the probe"
        ),
        pytest.param(
            [started(), started(), refused(100, 5, 2), refused(100.5, 5, 2)], 100.5, 4, 2, id="the later answer counts"
        ),
        pytest.param(
            [refused(100, 5, 9), refused(101, 5, 2)], 101, 4, 8, id="a shorter wait doesn't shorten a longer one"
        ),
        pytest.param([poll_refused(100, 2)], 100, 0, 2, id="a refused poll holds submits as well"),
        pytest.param([poll_refused(100, None)], 100, 0, 1, id="a refused poll without a time: a second"),
        pytest.param([poll_refused(100, 86400)], 100, 0, 120, id="a poll refused for a day: two minutes"),
        pytest.param([poll_refused(100, 2)], 102, 23, 0, id="a refused poll says nothing about tasks in flight"),
        pytest.param(
            [poll_refused(100, 2), started()], 102, 1, NEVER, id="after a refused poll, submits are probes too"
        ),
    ],
)
def test_a_history_gives_a_delay(steps: list[Step], now: float, in_flight: int, delay: float) -> None:
    """After each of these histories, the next submit starts after exactly so many seconds."""
    pace = after(*steps)

    assert pace.submit_delay(now, in_flight) == delay


@pytest.mark.parametrize(
    ("steps", "limited"),
    [
        pytest.param([], False, id="nothing happened"),
        pytest.param([started(), lost()], False, id="a lost answer"),
        pytest.param([refused(100, 5, 2)], True, id="refused"),
        pytest.param([refused(100, 0, 2)], True, id="refused with nothing in flight"),
        pytest.param([refused(100, 23, 2)], True, id="refused with one place left"),
        pytest.param([refused(100, 24, 2)], True, id="refused with as many in flight as there are places"),
        pytest.param([refused(100, 40, 2)], True, id="refused with attached tasks beyond the places"),
        pytest.param([poll_refused(100, 2)], True, id="a refused poll"),
        pytest.param(
            [refused(100, 23, 2), started(), accepted(24, probe=True)], False, id="accepted at the last place"
        ),
        pytest.param(
            [poll_refused(100, 2), *itertools.repeat(accepted(1, probe=True), 3)], False, id="a refused poll, long ago"
        ),
    ],
)
def test_after_a_refusal_submits_go_one_at_a_time(steps: list[Step], limited: bool) -> None:
    """A 429 makes every further submit a probe, until the service has taken as many as there are places."""
    pace = after(*steps)
    probe = pace.submit_started()

    assert pace.limited is limited
    assert probe is limited
    assert (pace.submit_delay(1000, 0) == NEVER) is limited


@pytest.mark.parametrize("wait", [0.0, 0.5, 1.0, 7.0, 60.0, 119.5, 120.0, 121.0, 1e9])
@pytest.mark.parametrize("times", [1, 2, 5, 20])
def test_the_pause_is_exactly_what_the_service_says(times: int, wait: float) -> None:
    """However often it refuses, nothing rests longer or shorter than the service says, up to two minutes."""
    pace = SubmitLimiter(24)
    now = 1024.0
    pauses = []
    for _ in range(times):
        probe = pace.submit_started()
        pace.submit_refused(now, 2, wait, probe=probe)
        pauses.append(pace.pause(now))
        now += 256

    assert pauses == [min(wait, MAX_PAUSE)] * times


def test_polls_rest_only_as_long_as_the_service_says() -> None:
    """Patience of our own with submits, which the service refuses again and again, doesn't keep polls from looking."""
    pace = SubmitLimiter(24)
    now = 1024.0
    resting = 0.0
    for _ in range(20):
        probe = pace.submit_started()
        pace.submit_refused(now, 2, 1.0, probe=probe)
        resting += pace.pause(now)
        now += 32

    assert resting == 20.0


@pytest.mark.parametrize("wait", [0.0, 1.0, 7.0])
def test_no_submit_starts_before_the_service_says(wait: float) -> None:
    """At no moment before the end of the wait is the delay shorter than the rest of it."""
    pace = after(refused(1024, 5, wait))
    moments = [1024 + wait * share / 8 for share in range(9)]

    assert all(pace.submit_delay(moment, 0) == 1024 + wait - moment for moment in moments)


@pytest.mark.parametrize("wait", [None, 0.0])
def test_without_a_time_refusals_wait_longer_and_longer(wait: float | None) -> None:
    """Where the service says no useful time, each refused probe waits longer than the last, up to half a minute."""
    pace = SubmitLimiter(24)
    now = 1024.0
    delays = []
    for _ in range(20):
        probe = pace.submit_started()
        pace.submit_refused(now, 0, wait, probe=probe)
        delays.append(pace.submit_delay(now, 0))
        now += 64

    assert delays == sorted(delays)
    assert delays[0] == (1.0 if wait is None else 0.0)
    assert 2.0 <= delays[3] < delays[6] < delays[-1] == 30.0


def test_a_burst_of_refusals_is_one_lesson() -> None:
    """Twenty submits that were out together and come back refused wait no longer than one."""
    pace = after(*[started()] * 20, *[refused(100, 4, None)] * 20)

    assert pace.submit_delay(100, 3) == 1.0


def test_an_accepted_submit_ends_the_growing_patience() -> None:
    """Once the service takes a task again, the next refusal starts with a short wait."""
    pace = SubmitLimiter(24)
    for moment in range(100, 1000, 100):
        probe = pace.submit_started()
        pace.submit_refused(moment, 0, None, probe=probe)
    pace.submit_accepted(1, probe=pace.submit_started())
    pace.submit_refused(2000, 1, None, probe=pace.submit_started())

    assert pace.submit_delay(2000, 0) == 1.0


def test_the_ceiling_rises_until_it_is_gone() -> None:
    """With each accepted submit a little more may be in flight, until nothing limits any more."""
    pace = after(refused(100, 3, 1), places=8)
    in_flight = 3
    for _ in range(200):
        if pace.submit_delay(101, in_flight) == 0:
            probe = pace.submit_started()
            in_flight = min(in_flight + 1, 8)
            pace.submit_accepted(in_flight, probe=probe)
        else:
            in_flight -= 1  # a task has ended

    assert not pace.limited
    assert pace.submit_delay(101, 7) == 0


def test_one_place_needs_no_ceiling() -> None:
    """With a single place, a refusal pauses, and the next submit comes when the service says."""
    pace = after(refused(100, 0, 2), places=1)

    assert pace.submit_delay(100, 0) == 2
    assert pace.submit_delay(102, 0) == 0


WAITS = st.none() | st.floats(0, 1e9)
COUNTS = st.integers(0, 30)
EVENTS = st.one_of(
    st.just("start"),
    st.just("end"),
    COUNTS.map(lambda count: ("accept", count)),
    st.tuples(COUNTS, WAITS),
    WAITS.map(lambda wait: ("poll", wait)),
    st.floats(0, 300),
)
"""A submit starts, ends, is accepted, or is refused; a poll is refused; seconds pass."""


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=30), st.integers(1, 30), st.integers(0, 40))
def test_no_history_makes_a_senseless_delay(history: list[Any], places: int, in_flight: int) -> None:
    """Whatever happens, a delay is never negative, endless only while a probe is out, and else two minutes at most."""
    pace = SubmitLimiter(places)
    now = 1000.0
    out: list[bool] = []
    for event in history:
        match event:
            case "start":
                out.append(pace.submit_started())
            case "end" if out:
                pace.submit_ended(probe=out.pop(0))
            case ("accept", count) if out:
                pace.submit_accepted(count, probe=out.pop(0))
            case ("poll", wait):
                pace.poll_refused(now, wait)
            case (int(count), wait) if out:
                pace.submit_refused(now, count, wait, probe=out.pop(0))
            case float(seconds):
                now += seconds
    delay = pace.submit_delay(now, in_flight)

    assert 0 <= pace.pause(now) <= MAX_PAUSE + 1e-6
    assert pace.pause(now) <= delay
    assert delay <= MAX_PAUSE + 1e-6 or (delay == NEVER and any(out))


# ---------------------------------------------------------------------- a simulated rush


@attrs.define
class Rush:
    """Many clients on one pace, against a service that runs only so many tasks at once; time is only counted."""

    limit: Callable[[float], int]
    """How many tasks the service runs at once, so many seconds after the start."""
    tasks: int = 240
    clients: int = 24
    seconds: float = 8.0
    """How long a task takes."""
    retry_after: float | None = 1.0
    latency: float = 0.125
    lag: float = 0.25
    """How long after its end a task is seen to have ended."""

    submits: int = attrs.field(default=0, init=False)
    done: int = attrs.field(default=0, init=False)
    now: float = attrs.field(default=0.0, init=False)
    early: int = attrs.field(default=0, init=False)
    """Submits that started while the service had asked to wait."""
    most_probes: int = attrs.field(default=0, init=False)
    """The most submits that were out at once after a refusal."""
    busiest: dict[int, int] = attrs.field(factory=dict[int, int], init=False)
    """The most tasks that ran at once in each minute."""

    _waiting: int = attrs.field(default=attrs.Factory(lambda self: self.tasks, takes_self=True), init=False)
    _taken: int = attrs.field(default=0, init=False)
    """Clients that are submitting, or whose task is running as far as they know."""
    _in_flight: int = attrs.field(default=0, init=False)
    _at_service: int = attrs.field(default=0, init=False)
    _out: list[bool] = attrs.field(factory=list[bool], init=False)
    """For each submit that is out, whether it is a probe."""
    _forbidden_until: float = attrs.field(default=0.0, init=False)
    _events: list[tuple[float, int, Step]] = attrs.field(factory=list[tuple[float, int, Step]], init=False)
    _order: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    def run(self) -> Self:
        pace = SubmitLimiter(self.clients)
        while self._waiting or self._events:
            may_submit = self._waiting > 0 and self._taken < self.clients
            delay = pace.submit_delay(self.now, self._in_flight) if may_submit else math.inf
            if delay <= 0:
                self._submit(pace.submit_started())
            elif self._events and self._events[0][0] <= self.now + delay:
                self.now, _, event = heapq.heappop(self._events)
                event(pace)
            else:
                assert delay < math.inf, "every client waits, and nothing will happen"
                self.now += delay
        return self

    def _later(self, seconds: float, event: Step) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def _submit(self, probe: bool) -> None:
        self.submits += 1
        self.early += self.now < self._forbidden_until
        self._waiting -= 1
        self._taken += 1
        self._out.append(probe)
        self.most_probes = max(self.most_probes, sum(self._out))
        self._later(self.latency / 2, lambda _: self._arrive(probe))

    def _arrive(self, probe: bool) -> None:
        if self._at_service < self.limit(self.now):
            self._at_service += 1
            minute = int(self.now / 60)
            self.busiest[minute] = max(self.busiest.get(minute, 0), self._at_service)
            self._later(self.seconds, lambda _: self._end())
            self._later(self.latency / 2, lambda pace: self._accept(pace, probe))
        else:
            self._later(self.latency / 2, lambda pace: self._refuse(pace, probe))

    def _accept(self, pace: SubmitLimiter, probe: bool) -> None:
        self._out.remove(probe)
        self._in_flight += 1
        pace.submit_accepted(self._in_flight, probe=probe)

    def _refuse(self, pace: SubmitLimiter, probe: bool) -> None:
        self._out.remove(probe)
        self._waiting += 1
        self._taken -= 1
        self._forbidden_until = self.now + (self.retry_after or 0.0)
        pace.submit_refused(self.now, self._in_flight, self.retry_after, probe=probe)

    def _end(self) -> None:
        self._at_service -= 1
        self._later(self.lag, lambda _: self._see_end())

    def _see_end(self) -> None:
        self._in_flight -= 1
        self._taken -= 1
        self.done += 1


def test_a_narrow_service_gets_all_tasks_done_with_few_submits() -> None:
    """24 clients, 3 places, 8 s a task: all get done with fewer than 4 submits each, and the places are kept busy."""
    rush = Rush(lambda _: 3).run()

    assert rush.done == rush.tasks
    assert rush.submits < 4 * rush.tasks
    assert rush.early == 0
    assert rush.now < 1.25 * rush.tasks * rush.seconds / 3


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 23, 24, 100])
@pytest.mark.parametrize("retry_after", [None, 0.0, 1.0, 5.0])
def test_any_limit_gets_all_tasks_done(limit: int, retry_after: float | None) -> None:
    """Whatever the limit, and whatever the service says about waiting, all tasks get done, one probe at a time."""
    rush = Rush(lambda _: limit, tasks=60, retry_after=retry_after).run()

    assert rush.done == rush.tasks
    assert rush.submits < 4 * rush.tasks
    assert rush.early == 0
    assert rush.most_probes == (1 if limit < 24 else 0)


@pytest.mark.parametrize("limit", [2, 3, 8])
def test_a_limit_that_stays_is_met_seldom(limit: int) -> None:
    """Against a limit that doesn't change, one refused probe buys several accepted submits."""
    rush = Rush(lambda _: limit, tasks=600).run()

    assert rush.done == rush.tasks
    assert rush.submits - rush.tasks < rush.tasks / 4


def test_it_opens_up_after_the_limit_is_lifted() -> None:
    """When the service takes more again, all 24 places are used within minutes, and then nothing is probed any more."""
    rush = Rush(lambda now: 3 if now < 60 else 100, tasks=800).run()

    assert rush.done == rush.tasks
    assert rush.busiest[0] == 3
    assert rush.busiest[4] == 24
    assert rush.submits < 1.1 * rush.tasks


def test_it_closes_down_when_the_limit_falls() -> None:
    """When the service takes less than before, the pace follows, and comes back when that is over."""
    rush = Rush(lambda now: 4 if 60 <= now < 240 else 24, tasks=900).run()

    assert rush.done == rush.tasks
    assert rush.early == 0
    assert rush.busiest[0] == 24
    assert rush.busiest[2] == 4
    assert rush.busiest[6] == 24
    assert rush.submits < 1.2 * rush.tasks


def test_a_closed_service_is_asked_seldom() -> None:
    """While the service takes nothing at all for ten minutes, it is asked dozens of times, not hundreds of times."""
    rush = Rush(lambda now: 0 if now < 600 else 24, tasks=24).run()

    assert rush.done == rush.tasks
    assert rush.submits < 24 + 24 + 60
    assert rush.now < 600 + 120
