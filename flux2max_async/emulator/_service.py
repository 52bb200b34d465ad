"""The state and rules of the emulated service: tasks, prices, limits and faults. No I/O; times are arguments."""

import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal, get_args

import attrs

from flux2max_async.emulator._answers import RESPONSES
from flux2max_async.emulator._faults import Fault
from flux2max_async.emulator._traits import TRAITS, Fate
from flux2max_async.emulator._validation import MEGAPIXEL, ServiceError, SubmitRequest

Endpoint = Literal["submit", "poll", "download"]

_HIDDEN_SECONDS = 2.0
"""How long a new task is not found if it meets `Fault.NOT_FOUND`."""


@attrs.define(eq=False)
class EmulatedTask:
    """A task of the emulated service."""

    id: str
    prompt: str
    seed: int
    width: int
    height: int
    output_format: str
    input_images: tuple[bytes, ...] = attrs.field(repr=False)
    cost: Decimal
    """US dollars."""
    created_at: float
    """Seconds since the epoch."""
    begins: float
    """Start time, in seconds on the event loop's clock, like all times here."""
    ends: float
    fate: Fate = "completed"
    """How the task ends."""
    visible: float = 0.0
    """The time from which polls find the task."""
    webhook_url: str | None = None
    webhook_secret: str | None = attrs.field(default=None, repr=False)
    polls: int = 0
    downloads: int = 0
    trait: Fault | None = None
    """What is different about the task."""


_DOWNLOAD_FAULTS = [fault for fault in Fault if fault not in TRAITS and fault not in RESPONSES]


def _parse_fault(name: str, endpoint: Endpoint | None = None) -> Fault:
    valid, subject = (_DOWNLOAD_FAULTS, "a fault of downloads") if endpoint == "download" else ([*Fault], "a fault")
    if name not in valid:
        raise ValueError(f"{subject} must be one of {', '.join(valid)}, not {name!r}")
    return Fault(name)


def parse_shares(shares: Mapping[Any, float]) -> dict[Fault, float]:
    """Return the shares by fault.

    Raises:
        ValueError: There is no such fault, or a share is negative, or the shares of calls or those of tasks are more
            than 1 together.
    """
    parsed = {_parse_fault(name): share for name, share in shares.items()}
    hidden = {fault: share for fault, share in parsed.items() if fault is Fault.NOT_FOUND}
    for group in (_call_shares(parsed), _trait_shares(parsed), hidden):
        # With a tolerance, because a hundred shares of 0.01 are a little more than 1.
        if not (all(share >= 0 for share in group.values()) and sum(group.values()) < 1.000001):
            raise ValueError(f"the shares of {', '.join(group)} must be at least 0, and at most 1 together")
    return parsed


def _call_shares(shares: Mapping[Fault, float]) -> dict[Fault, float]:
    """Return the shares of the faults of which a call meets at most one."""
    return {fault: share for fault, share in shares.items() if fault not in TRAITS and fault is not Fault.NOT_FOUND}


def _trait_shares(shares: Mapping[Fault, float]) -> dict[Fault, float]:
    return {fault: share for fault, share in shares.items() if fault in TRAITS}


def _draw(shares: Mapping[Fault, float], number: float) -> Fault | None:
    """Return the fault in whose share a number from 0 to 1 falls."""
    for fault, share in shares.items():
        number -= share
        if number < 0:
            return fault
    return None


@attrs.define(kw_only=True)
class Service:
    """The emulated service.

    Args:
        seconds: Median duration of a task. Durations are lognormal.
        spread: Standard deviation of the logarithm of a duration.
        time_scale: Seconds of the service per real second.
        max_in_flight: Limit on running tasks; further submits are refused with 429.
        failing: Share of tasks that fail; a prompt that contains "[fail]" always does.
        moderated: Share of tasks that moderation refuses; a prompt that contains "[moderate]" always is.
        faults: Share of submits and polls that meet each fault, and share of tasks that have each trait.
        url_lifetime: Seconds until a result URL expires.
        balance: US dollars in the account; None for unlimited.
        seed: Makes durations, ids and faults the same in every run.

    Raises:
        ValueError: There is no such fault, or shares are more than 1 together.
    """

    seconds: float
    spread: float
    time_scale: float
    max_in_flight: int
    failing: float
    moderated: float
    faults: Mapping[Fault, float] = attrs.field(converter=parse_shares)
    url_lifetime: float
    balance: Decimal | None
    seed: int | None

    tasks: dict[str, EmulatedTask] = attrs.field(factory=dict[str, EmulatedTask], init=False)
    accepted: Counter[str] = attrs.field(factory=Counter[str], init=False)
    calls: Counter[str] = attrs.field(factory=Counter[str], init=False)
    _scripts: defaultdict[str, deque[Fault | None]] = attrs.field(factory=lambda: defaultdict(deque), init=False)
    _running: set[str] = attrs.field(factory=set[str], init=False)
    _random: random.Random = attrs.field(
        default=attrs.Factory(lambda self: random.Random(self.seed), takes_self=True), init=False
    )

    def script(self, endpoint: Endpoint, faults: Iterable[str | None]) -> None:
        """Queue faults for the next calls to an endpoint.

        Raises:
            ValueError: There is no such endpoint, or no such fault of it.
        """
        if endpoint not in get_args(Endpoint):
            raise ValueError(f"an endpoint must be one of {', '.join(get_args(Endpoint))}, not {endpoint!r}")
        parsed = [None if name is None else _parse_fault(name, endpoint) for name in faults]
        self._scripts[endpoint].extend(parsed)

    def next_fault(self, endpoint: Endpoint) -> Fault | None:
        """Count a call, and return the fault that it meets."""
        self.calls[endpoint] += 1
        if self._scripts[endpoint]:
            return self._scripts[endpoint].popleft()
        if endpoint == "download":
            return None
        return _draw(_call_shares(self.faults), self._random.random())

    def accept(self, request: SubmitRequest, *, now: float, epoch: float, trait: Fault | None = None) -> EmulatedTask:
        """Create the task for a submit; without a trait it may get one by the shares.

        Raises:
            ServiceError: Too many tasks are in flight, or the balance is too low.
        """
        params = request.params
        width, height = (params.get(side) or 1024 for side in ("width", "height"))
        cost = _price(width * height, request.input_pixels)
        if self.in_flight(now) >= self.max_in_flight:
            raise self.rate_limited(f"more than {self.max_in_flight} tasks in flight")
        if self.balance is not None:
            if self.balance < cost:
                raise ServiceError(402, "40201", "insufficient balance")
            self.balance -= cost
        number, duration = self._random.random(), self.seconds * math.exp(self._random.gauss(0, self.spread))
        moderated = "[moderate]" in params["prompt"] or number < self.moderated
        failing = "[fail]" in params["prompt"] or number < self.moderated + self.failing
        hidden = self._random.random() < self.faults.get(Fault.NOT_FOUND, 0.0)
        seed = params.get("seed")
        task = EmulatedTask(
            id=f"{self._random.getrandbits(96):024x}",
            prompt=params["prompt"],
            seed=self._random.getrandbits(32) if seed is None else seed,
            width=width,
            height=height,
            output_format=params.get("output_format") or "jpeg",
            input_images=request.input_images,
            cost=cost,
            created_at=epoch,
            begins=now,
            ends=now + duration / self.time_scale,
            fate="moderated" if moderated else "failed" if failing else "completed",
            visible=now + _HIDDEN_SECONDS / self.time_scale if hidden else now,
            webhook_url=params.get("webhook_url"),
            webhook_secret=params.get("webhook_secret"),
        )
        # Not from the service's generator, so that traits do not change ids, durations and fates.
        trait = trait or _draw(_trait_shares(self.faults), random.Random(f"trait of {task.id}").random())
        if trait is not None:
            self.give_trait(task, trait)
        self.tasks[task.id] = task
        self._running.add(task.id)
        self.accepted[task.prompt] += 1
        return task

    def give_trait(self, task: EmulatedTask, trait: Fault) -> None:
        """Replace the trait of a task."""
        task.trait = trait
        task.fate = TRAITS[trait].fate or task.fate

    def find(self, task_id: str, now: float) -> EmulatedTask:
        """Return a task that polls can find.

        Raises:
            ServiceError: There is no such task, or it is not visible yet.
        """
        task = self.tasks.get(task_id)
        if task is None or now < task.visible:
            raise self.not_found()
        return task

    def in_flight(self, now: float) -> int:
        """Count the running tasks."""
        # Tests may remove tasks from `tasks`.
        self._running = {
            task_id for task_id in self._running if (task := self.tasks.get(task_id)) is not None and task.ends > now
        }
        return len(self._running)

    def rate_limited(self, message: str) -> ServiceError:
        """Return a 429 that suggests to wait a second."""
        return ServiceError(429, "rate_limit_exceeded", message, retry_after=1 / self.time_scale)

    def not_found(self) -> ServiceError:
        """Return a 404."""
        return ServiceError(404, "task_not_found", "no such task")


def _price(output_pixels: int, input_pixels: Iterable[int]) -> Decimal:
    """Return $0.07 for the first megapixel and $0.03 for each further one, rounded up for each image."""
    megapixels = sum(math.ceil(pixels / MEGAPIXEL) for pixels in (output_pixels, *input_pixels))
    return Decimal("0.07") + Decimal("0.03") * (megapixels - 1)
