"""Finds the saved images of replayed outcomes, of many at once: a call of a thread costs more than a look at a file."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

import anyio.to_thread
import attrs

from flux2max_async._downloads.saver import ImageSaver
from flux2max_async._exceptions import SessionClosedError
from flux2max_async._models.results import Completed
from flux2max_async.journal._entry import SavedFile

_MAX_OUTCOMES = 100
"""Outcomes that one call of a thread looks for."""


@attrs.frozen(eq=False)
class _Look:
    outcome: Completed
    files: Sequence[SavedFile]
    on_found: Callable[[tuple[Path, ...] | None], None]


class SavedImageFinder:
    """Looks for the images of outcomes; those that come meanwhile are looked for together.

    Args:
        saver: Knows where images are saved.
        spawn: Runs a coroutine in the background; raises SessionClosedError if the session is closed.
    """

    def __init__(self, saver: ImageSaver, spawn: "Callable[[Coroutine[None, None, None]], asyncio.Task[None]]") -> None:
        self._saver = saver
        self._spawn = spawn
        self._looks: list[_Look] = []
        self._searching = False

    def find(
        self, outcome: Completed, files: Sequence[SavedFile], on_found: Callable[[tuple[Path, ...] | None], None]
    ) -> None:
        """Look for the images of an outcome.

        Args:
            outcome: The outcome.
            files: What the journal knows about its images.
            on_found: Called with the paths of the images if all are there, and with None if not, or if the session is
                closed first.
        """
        self._looks.append(_Look(outcome, files, on_found))
        if not self._searching:
            try:
                searching = self._spawn(self._search())
            except SessionClosedError:
                self._give_up()
            else:
                self._searching = True
                searching.add_done_callback(self._on_search_done)

    async def _search(self) -> None:
        while looks := self._looks[:_MAX_OUTCOMES]:
            found = await anyio.to_thread.run_sync(self._find_all, looks)
            for paths in found:
                self._looks.pop(0).on_found(paths)

    def _find_all(self, looks: list[_Look]) -> list[tuple[Path, ...] | None]:
        return [self._saver.find_all_saved(look.outcome, look.files) for look in looks]

    def _on_search_done(self, searching: "asyncio.Task[None]") -> None:
        self._searching = False
        if not searching.cancelled():
            searching.exception()  # marks it as retrieved
        self._give_up()

    def _give_up(self) -> None:
        looks, self._looks = self._looks, []
        for look in looks:
            look.on_found(None)
