"""Log lines about statuses that this library doesn't know."""

from flux2max_async._api.statuses import KNOWN_STATUSES, status_of
from flux2max_async._api.task_object import reported_status
from flux2max_async._models.results import TaskSnapshot
from flux2max_async._text import get_logger

log = get_logger("api")

_MAX_KINDS = 100
_MAX_LENGTH = 80


class UnknownStatuses:
    """The unknown statuses that a session has seen; each is logged once."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def log(self, snapshot: TaskSnapshot) -> None:
        """Log the status of a task that counts as running, if it is unknown and new."""
        status = reported_status(snapshot)
        if status is None or status in KNOWN_STATUSES or status_of(status) is not None:
            return
        # Some statuses hold a counter: by its letters alone, each kind is logged once.
        kind = "".join(filter(str.isalpha, status))[:_MAX_LENGTH]
        if kind not in self.kinds and len(self.kinds) < _MAX_KINDS:
            self.kinds.add(kind)
            log.warning("unknown task status %r: taken for still running", status[:_MAX_LENGTH])
