"""SharedLearning: a session's own schedule, whose state its journal keeps for the next sessions, on any host."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from flux2max_async._exceptions import ConfigurationError, SessionClosedError
from flux2max_async._polling.learned import EndedTask, LearnedSchedule
from flux2max_async._polling.learned_state import is_newer
from flux2max_async._text import get_logger
from flux2max_async.journal._protocol import Journal

log = get_logger("polling")

_NAME = "learned_schedule"
_FIRST_SAVE = 20
"""The state is saved when so many tasks have ended, and when that number has doubled, so that a session that is killed
loses little; and when the session closes."""
_MAX_TASKS_BETWEEN_SAVES = 2000
_MAX_PENDING = 400
"""Of more tasks than this, the older ones have next to no influence on a schedule."""
_SAVE_TIMEOUT = 2.0
"""Seconds that closing a session may take longer: what was learned is worth no more."""


class SharedLearning:
    """Loads what earlier sessions have learned, and adds what this one learns.

    Each task that ends here is added to the journal's state once, by replaying it there: the state is what one schedule
    would know that had followed the tasks of all sessions, and what was loaded is never added again. Nothing that goes
    wrong with the state is an error for a request.

    Args:
        journal: Open while the methods are called.
    """

    def __init__(self, journal: Journal) -> None:
        self.schedule = LearnedSchedule()
        self._journal = journal
        self._pending: deque[EndedTask] = deque(maxlen=_MAX_PENDING)
        """Ended tasks that the journal's state doesn't have yet."""
        self._ended = 0
        self._save_at = _FIRST_SAVE

    async def load(self, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        """Begin with the journal's state.

        Args:
            spawn: Runs a coroutine in the background of the session that begins.
        """
        self.schedule.on_end(partial(self._on_end, spawn))
        try:
            state = await self._journal.load_state(_NAME)
            if state is None:
                return
            self.schedule.restore(state)
        except Exception as error:  # noqa: BLE001 - the journal may be the caller's own
            log.warning("what earlier sessions have learned about durations can't be used: %s", error)
        else:
            for task in self._pending:
                self.schedule.replay(task)

    async def save(self) -> None:
        """Add what was learned since the last call to the journal's state."""
        tasks, self._pending = self._pending, deque(maxlen=_MAX_PENDING)
        if not tasks:
            return
        try:
            async with asyncio.timeout(_SAVE_TIMEOUT):
                await self._journal.update_state(_NAME, partial(_learn_from, tuple(tasks)))
        except Exception as error:  # noqa: BLE001 - the journal may be the caller's own
            reason = str(error) or "the journal doesn't respond"
            log.warning("what was learned about durations can't be kept: %s", reason)
            self._pending = deque([*tasks, *self._pending], _MAX_PENDING)

    def _on_end(self, spawn: Callable[[Coroutine[Any, Any, None]], object], task: EndedTask) -> None:
        self._pending.append(task)
        self._ended += 1
        if self._ended >= self._save_at:
            self._save_at += min(self._ended, _MAX_TASKS_BETWEEN_SAVES)
            with contextlib.suppress(SessionClosedError):  # closing saves it
                spawn(self.save())


def _learn_from(tasks: Sequence[EndedTask], state: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a state that knows these tasks as well; one of a newer version is kept, one that is invalid replaced."""
    schedule = LearnedSchedule()
    if state is not None:
        if is_newer(state):
            return state
        with contextlib.suppress(ConfigurationError):  # loading it has logged that
            schedule.restore(state)
    for task in tasks:
        schedule.replay(task)
    return schedule.state()
