"""The state and rules of the emulated service: tasks, prices, limits and faults. No I/O; times are arguments."""

import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal, get_args

import attrs

from flux2max_async.emulator._validation import MEGAPIXEL, MODEL, ServiceError, SubmitRequest

Endpoint = Literal["submit", "poll", "download"]

_HIDDEN_SECONDS = 2.0
"""How long a new task is not found if it meets `Fault.NOT_FOUND`."""


class Fault(StrEnum):
    """What can go wrong with a call. Unless it says that the call takes effect, the service is unchanged."""

    RATE_LIMITED = "rate_limited"
    """429 with Retry-After."""
    SERVER_ERROR = "server_error"
    """500."""
    UNAVAILABLE = "unavailable"
    """503."""
    RESET_BEFORE = "reset_before"
    """The connection is reset before the body of the call is read."""
    RESET_AFTER = "reset_after"
    """The call takes effect, then the connection is reset."""
    HANG = "hang"
    """The call takes effect and is never answered."""
    CUT = "cut"
    """The call takes effect, and the connection is closed after half of the response."""
    GARBAGE = "garbage"
    """The call takes effect, and the response is an HTML page."""
    NOT_FOUND = "not_found"
    """404. As a share of the submits: polls do not find the new task in its first two seconds."""


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
    fate: Literal["completed", "failed", "moderated"] = "completed"
    """How the task ends."""
    visible: float = 0.0
    """The time from which polls find the task."""
    webhook_url: str | None = None
    webhook_secret: str | None = attrs.field(default=None, repr=False)
    polls: int = 0


def _parse_fault(name: str) -> Fault:
    try:
        return Fault(name)
    except ValueError:
        raise ValueError(f"a fault must be one of {', '.join(Fault)}, not {name!r}") from None


def _parse_faults(shares: Mapping[Any, float]) -> dict[Fault, float]:
    return {_parse_fault(name): share for name, share in shares.items()}


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
        faults: Share of submits and polls that meet each fault.
        url_lifetime: Seconds until a result URL expires.
        balance: US dollars in the account; None for unlimited.
        seed: Makes durations, ids and faults the same in every run.

    Raises:
        ValueError: There is no such fault.
    """

    seconds: float
    spread: float
    time_scale: float
    max_in_flight: int
    failing: float
    moderated: float
    faults: Mapping[Fault, float] = attrs.field(converter=_parse_faults)
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

    def script(self, endpoint: str, faults: Iterable[str | None]) -> None:
        """Queue faults for the next calls to an endpoint.

        Raises:
            ValueError: There is no such endpoint or fault.
        """
        if endpoint not in get_args(Endpoint):
            raise ValueError(f"an endpoint must be one of {', '.join(get_args(Endpoint))}, not {endpoint!r}")
        parsed = [None if name is None else _parse_fault(name) for name in faults]
        self._scripts[endpoint].extend(parsed)

    def next_fault(self, endpoint: Endpoint) -> Fault | None:
        """Count a call, and return the fault that it meets."""
        self.calls[endpoint] += 1
        if self._scripts[endpoint]:
            return self._scripts[endpoint].popleft()
        if endpoint == "download":
            return None
        remaining = self._random.random()
        for fault, share in self.faults.items():
            if fault is not Fault.NOT_FOUND:
                remaining -= share
                if remaining < 0:
                    return fault
        return None

    def accept(self, request: SubmitRequest, *, now: float, epoch: float) -> EmulatedTask:
        """Create the task for a submit.

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
        self.tasks[task.id] = task
        self._running.add(task.id)
        self.accepted[task.prompt] += 1
        return task

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

    def describe(self, task: EmulatedTask, result_url: str, now: float) -> dict[str, Any]:
        """Return the task object of the protocol, as of `now`."""
        common = {"id": task.id, "model": MODEL, "created_at": int(task.created_at)}
        if now < task.ends:
            progress = (now - task.begins) / (task.ends - task.begins)
            return {**common, "status": "pending" if progress < 0.05 else "in_progress", "progress": round(progress, 2)}
        match task.fate:
            case "completed":
                image = {"type": "image", "url": result_url, "jobId": f"job-{task.id}"}
                return {
                    **common,
                    "status": "completed",
                    "progress": 1.0,
                    "output": [{"content": [image]}],
                    "usage": {"cost": str(task.cost), "discount": 1},
                    "metadata": {},
                }
            case "failed":
                error = {"code": "generation_failed", "message": "the model gave up"}
            case _:
                error = {"code": "content_policy_violation", "message": "Request Moderated"}
        return {**common, "status": "failed", "error": error}

    def raise_for_fault(self, fault: Fault | None) -> None:
        """Raise the error response of a fault, if it has one."""
        match fault:
            case Fault.RATE_LIMITED:
                raise self.rate_limited("too many requests")
            case Fault.SERVER_ERROR:
                raise ServiceError(500, "internal_error", "something broke")
            case Fault.UNAVAILABLE:
                raise ServiceError(503, "unavailable", "try again later")
            case Fault.NOT_FOUND:
                raise self.not_found()
            case _:
                pass

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
