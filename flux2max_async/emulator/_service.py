"""What the emulated service knows and decides: its tasks, prices, limits and faults. No I/O; moments are arguments."""

import base64
import binascii
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal

import attrs

from flux2max_async.emulator._images.input_images import size_of

Endpoint = Literal["submit", "poll", "download"]

_MEGAPIXEL = 1024 * 1024
_INPUTS = ["input_image", *(f"input_image_{number}" for number in range(2, 9))]


class Fault(StrEnum):
    """What can go wrong with one call. A fault that names no effect leaves the service as it was."""

    RATE_LIMITED = "rate_limited"
    """429 with Retry-After."""
    SERVER_ERROR = "server_error"
    """500."""
    UNAVAILABLE = "unavailable"
    """503."""
    RESET_BEFORE = "reset_before"
    """The connection is reset before the call's body is read."""
    RESET_AFTER = "reset_after"
    """The call takes effect, then the connection is reset."""
    HANG = "hang"
    """The call takes effect and is never answered."""
    CUT = "cut"
    """The call takes effect and half of the answer is sent."""
    GARBAGE = "garbage"
    """The call takes effect and is answered with a page that is no JSON."""
    NOT_FOUND = "not_found"
    """404; as a probability: the new task can't be seen for its first two seconds."""


@attrs.define(eq=False)
class EmulatedTask:
    """A task as the service keeps it."""

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
    """On the service's clock, like every moment here."""
    ends: float
    fate: Literal["completed", "failed", "moderated"] = "completed"
    visible: float = 0.0
    """The moment from which polls find it."""
    webhook_url: str | None = None
    webhook_secret: str | None = attrs.field(default=None, repr=False)
    polls: int = 0


@attrs.frozen
class Refusal(Exception):  # noqa: N818 - it is an answer, not an accident
    """An answer that is an error."""

    status: int
    code: str
    message: str
    retry_after: float | None = None


@attrs.define
class Service:
    """The emulated service.

    Args:
        seconds: The median of a task's duration, which is lognormal.
        spread: The standard deviation of its logarithm.
        time_scale: How many seconds of the service pass in one real second.
        max_in_flight: Tasks running at once before submits are refused with 429.
        failing: The share of tasks that fail; a prompt with "[fail]" always does.
        moderated: The share of tasks that moderation refuses; a prompt with "[moderate]" always is.
        faults: The share of submits and polls that meet each fault.
        url_lifetime: Seconds that a result's url is valid.
        balance: US dollars that the account holds; None for plenty.
        seed: Makes durations, ids and faults the same in each run.
    """

    seconds: float
    spread: float
    time_scale: float
    max_in_flight: int
    failing: float
    moderated: float
    faults: Mapping[Fault, float]
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

    def script(self, endpoint: Endpoint, faults: Iterable[Fault | None]) -> None:
        self._scripts[endpoint].extend(faults)

    def next_fault(self, endpoint: Endpoint) -> Fault | None:
        """Count a call, and decide what goes wrong with it."""
        self.calls[endpoint] += 1
        if self._scripts[endpoint]:
            return self._scripts[endpoint].popleft()
        if endpoint == "download":
            return None
        chance = self._random.random()
        for fault, share in self.faults.items():
            if fault is not Fault.NOT_FOUND:
                chance -= share
                if chance < 0:
                    return fault
        return None

    def accept(self, ask: "Ask", *, now: float, epoch: float) -> EmulatedTask:
        """Take a submit, or refuse it."""
        params = ask.params
        width, height = (params.get(side) or 1024 for side in ("width", "height"))
        cost = _price(width * height, ask.pixels)
        if self.in_flight(now) >= self.max_in_flight:
            raise self.too_many(f"more than {self.max_in_flight} tasks in flight")
        if self.balance is not None:
            if self.balance < cost:
                raise Refusal(402, "40201", "insufficient balance")
            self.balance -= cost
        lot, duration = self._random.random(), self.seconds * math.exp(self._random.gauss(0, self.spread))
        moderated = "[moderate]" in params["prompt"] or lot < self.moderated
        failing = "[fail]" in params["prompt"] or lot < self.moderated + self.failing
        hidden = self._random.random() < self.faults.get(Fault.NOT_FOUND, 0.0)
        seed = params.get("seed")
        task = EmulatedTask(
            id=f"{self._random.getrandbits(96):024x}",
            prompt=params["prompt"],
            seed=self._random.getrandbits(32) if seed is None else seed,
            width=width,
            height=height,
            output_format=params.get("output_format") or "jpeg",
            input_images=ask.input_images,
            cost=cost,
            created_at=epoch,
            begins=now,
            ends=now + duration / self.time_scale,
            fate="moderated" if moderated else "failed" if failing else "completed",
            visible=now + 2 / self.time_scale if hidden else now,
            webhook_url=params.get("webhook_url"),
            webhook_secret=params.get("webhook_secret"),
        )
        self.tasks[task.id] = task
        self._running.add(task.id)
        self.accepted[task.prompt] += 1
        return task

    def find(self, task_id: str, now: float) -> EmulatedTask:
        """Give a task that can be seen."""
        task = self.tasks.get(task_id)
        if task is None or now < task.visible:
            raise self.not_found()
        return task

    def in_flight(self, now: float) -> int:
        """Count the tasks that are running."""
        # A test may have let the service forget some of its tasks.
        self._running = {
            task_id for task_id in self._running if (task := self.tasks.get(task_id)) is not None and task.ends > now
        }
        return len(self._running)

    def describe(self, task: EmulatedTask, result_url: str, now: float) -> dict[str, Any]:
        """Give the task object as the service shows it at this moment."""
        common = {"id": task.id, "model": "flux_2_max", "created_at": int(task.created_at)}
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

    def refuse(self, fault: Fault | None) -> None:
        """Answer as a fault says that is an answer."""
        match fault:
            case Fault.RATE_LIMITED:
                raise self.too_many("too many requests")
            case Fault.SERVER_ERROR:
                raise Refusal(500, "internal_error", "something broke")
            case Fault.UNAVAILABLE:
                raise Refusal(503, "unavailable", "try again later")
            case Fault.NOT_FOUND:
                raise self.not_found()
            case _:
                pass

    def too_many(self, message: str) -> Refusal:
        """Refuse for now."""
        return Refusal(429, "rate_limit_exceeded", message, retry_after=1 / self.time_scale)

    def not_found(self) -> Refusal:
        """Refuse for what isn't there."""
        return Refusal(404, "task_not_found", "no such task")


@attrs.frozen
class Ask:
    """A submit whose parameters are right."""

    params: dict[str, Any]
    input_images: tuple[bytes, ...]
    """Those that came as base64."""
    pixels: list[int]
    """Of all input pictures; one that came as a URL counts as a megapixel."""


def read_submit(body: object) -> Ask:
    """Check the body of a submit as the vendor's page says."""
    params = _checked_params(body)
    return Ask(params, *_checked_inputs(params))


def _price(output: int, inputs: Iterable[int]) -> Decimal:
    """$0.07 for the first megapixel, $0.03 for each further one, output and input alike, each picture rounded up."""
    megapixels = sum(math.ceil(pixels / _MEGAPIXEL) for pixels in (output, *inputs))
    return Decimal("0.07") + Decimal("0.03") * (megapixels - 1)


def _checked_params(body: object) -> dict[str, Any]:
    match body:
        case {"model": "flux_2_max", "input": [{"params": dict(params)}]}:
            pass
        case {"model": "flux_2_max"}:
            raise _wrong("input", 'must be [{"params": {…}}]')
        case _:
            raise _wrong("model", "must be flux_2_max")
    if "prompt" not in params:
        raise _wrong("prompt", "is required")
    for name, (is_right, rule) in _RULES.items():
        value = params.get(name)
        if name in params and not (is_right(value) or (value is None and name != "prompt")):
            raise _wrong(name, rule)
    return params


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_integer(value) and (value == 0 or value >= 64)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda value: isinstance(value, str) and bool(value.strip()), "must be text that is not blank"),
    "seed": (_is_integer, "must be an integer"),
    "width": (_is_side, "must be an integer of at least 64"),
    "height": (_is_side, "must be an integer of at least 64"),
    "safety_tolerance": (lambda value: _is_integer(value) and 0 <= value <= 5, "must be an integer from 0 to 5"),
    "output_format": (lambda value: value in ("jpeg", "png"), "must be jpeg or png"),
    "webhook_url": (
        lambda value: isinstance(value, str) and 1 <= len(value) <= 2083,
        "must be a URL of 1 to 2083 characters",
    ),
    "webhook_secret": (lambda value: isinstance(value, str), "must be text"),
}
"""Whether a value is right, and what would be [S]."""


def _checked_inputs(params: Mapping[str, Any]) -> tuple[tuple[bytes, ...], list[int]]:
    inputs: list[bytes] = []
    pixels: list[int] = []
    for name in _INPUTS:
        match params.get(name):
            case None:
                pass
            case str(url) if url.startswith(("http://", "https://")):
                pixels.append(_MEGAPIXEL)
            case str(text):
                try:
                    data = base64.b64decode(text, validate=True)
                    width, height = size_of(data)
                except (binascii.Error, ValueError) as error:
                    raise _wrong(name, "must be a URL or a picture as base64") from error
                inputs.append(data)
                pixels.append(width * height)
            case _:
                raise _wrong(name, "must be a URL or a picture as base64")
    return tuple(inputs), pixels


def _wrong(name: str, message: str) -> Refusal:
    return Refusal(400, "invalid_parameter", f"{name} {message}")
