"""Counts and logs what an inbox receives, in bounded memory and few log lines whatever is sent."""

import contextlib
import hashlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from typing import Literal

import attrs

from flux2max_async._text import get_logger

log = get_logger("webhooks")

Kind = Literal[
    "accepted",
    "repeated",
    "unknown",
    "forged",
    "stale",
    "unreadable",
    "too_large",
    "too_slow",
    "too_many",
    "not_processed",
    "failed",
]

_SUMMARIES: dict[Kind, tuple[int, str]] = {
    "repeated": (logging.INFO, "webhook repeated"),
    "unknown": (logging.INFO, "webhook about an unknown task"),
    "forged": (logging.WARNING, "webhook refused"),
    "stale": (logging.WARNING, "webhook refused"),
    "unreadable": (logging.WARNING, "webhook unreadable"),
    "too_large": (logging.WARNING, "webhook refused"),
    "too_slow": (logging.WARNING, "webhook refused"),
    "too_many": (logging.WARNING, "webhook refused; the service may send it again"),
    "not_processed": (logging.WARNING, "webhook not processed; the service may send it again"),
    "failed": (logging.ERROR, "webhook failed with an unexpected error"),
}
"""The level and the beginning of the log lines of each kind."""
_LOG_INTERVAL = 1.0
"""Seconds between two log lines of a kind."""
_MAX_REMEMBERED = 1_000
"""How many deliveries are remembered to recognize repeated ones."""


@attrs.frozen
class WebhookStats:
    """The counts of an inbox since it was created; `inbox.stats` returns a copy of the moment."""

    accepted: int = 0
    """Deliveries that were signed, readable and processed, repeated and unknown ones included."""
    repeated: int = 0
    """Accepted deliveries that had been accepted before, byte for byte, among the last 1,000."""
    unknown: int = 0
    """Other accepted deliveries about a task that was neither followed nor recorded here at that moment."""
    forged: int = 0
    """Deliveries whose signature is missing, malformed or wrong."""
    stale: int = 0
    """Signed deliveries that are too old, or too far in the future."""
    unreadable: int = 0
    """Signed deliveries whose content can't be read, and bodies over the limit that were passed to `deliver()`."""
    too_large: int = 0
    """Bodies over the limit, which the endpoint answered with 413."""
    too_slow: int = 0
    """Bodies that did not arrive in time, which the endpoint answered with 408."""
    too_many: int = 0
    """Deliveries that the endpoint answered with 503 because it was reading too many bodies at once."""
    not_processed: int = 0
    """Signed deliveries that no session was open for, or that the journal could not record."""
    failed: int = 0
    """Deliveries that the endpoint answered with 500, because of an unexpected error."""


@attrs.define(eq=False)
class DeliveryMonitor:
    """Counts deliveries by kind, and logs each kind at most once a second. It may be used from several threads."""

    _clock: Callable[[], float] = time.monotonic
    _counts: Counter[str] = attrs.field(factory=Counter[str], init=False)
    _logged: dict[Kind, tuple[float, int]] = attrs.field(factory=dict[Kind, tuple[float, int]], init=False)
    """The time of each kind's last log line, and its count then."""
    _accepted: OrderedDict[bytes, None] = attrs.field(factory=OrderedDict[bytes, None], init=False)
    """The digests of the last accepted bodies, the newest at the end."""
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    @property
    def stats(self) -> WebhookStats:
        """A copy of the counts."""
        with self._lock:
            return WebhookStats(**self._counts)

    def record(self, kind: Kind, reason: str | Exception, *, error: Exception | None = None) -> None:
        """Count a delivery, and log it unless its kind was logged within the last second.

        Args:
            kind: What is wrong with it.
            reason: Details for the log line.
            error: An error whose traceback is logged, too.
        """
        now, (level, summary) = self._clock(), _SUMMARIES[kind]
        with self._lock:
            self._counts[kind] += 1
            last, logged = self._logged.get(kind, (None, 0))
            if last is not None and now - last < _LOG_INTERVAL:
                return
            count = self._counts[kind] - logged
            self._logged[kind] = (now, self._counts[kind])
        total = f" ({count} since the last line like this)" if count > 1 else ""
        log.log(level, "%s%s: %s", summary, total, reason, exc_info=error)

    @contextlib.contextmanager
    def recording(self, kind: Kind, *errors: type[Exception]) -> Generator[None]:
        """Return a context that records the given errors as deliveries of a kind, and lets them pass."""
        try:
            yield
        except errors as error:
            self.record(kind, error)
            raise

    def accept(self, body: bytes, task_id: str, *, known: bool) -> None:
        """Count a delivery that was processed.

        Args:
            body: Its content.
            task_id: The task that it is about.
            known: Whether the task is followed, expected or recorded here.
        """
        digest = hashlib.sha256(body).digest()
        with self._lock:
            self._counts["accepted"] += 1
            repeated = digest in self._accepted
            self._accepted[digest] = None
            self._accepted.move_to_end(digest)
            if len(self._accepted) > _MAX_REMEMBERED:
                self._accepted.popitem(last=False)
        if repeated:
            self.record("repeated", f"task {task_id}")
        elif not known:
            self.record("unknown", f"task {task_id}")
