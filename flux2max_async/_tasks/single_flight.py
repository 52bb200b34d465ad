"""One runner for each request and for each task, however many callers ask for them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux2max_async._tasks.runner import TaskRunner


class SingleFlight:
    """The unfinished runners of a session. A runner enters `by_task_id` itself, and removes itself at its end."""

    def __init__(self) -> None:
        self.by_key: dict[str, TaskRunner] = {}
        """By the key of their request."""
        self.by_task_id: dict[str, TaskRunner] = {}

    def get_or_create(self, key: str, create: "Callable[[], TaskRunner]") -> "TaskRunner":
        """Return the runner of a key; create it if there is none.

        A runner whose submit was cancelled, because everybody who waited for it has left, is taken up again if that is
        still possible, and otherwise replaced: it sends nothing more.
        """
        runner = self.by_key.get(key)
        if runner is None or not runner.rejoin():
            runner = self.by_key[key] = create()
        return runner
