"""The command `demo`: generate many pictures at once with the emulator, with a live display on a terminal.

The pictures get a page like those of a batch; with them comes a file of prompts, to try a batch with.
"""

import asyncio
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import typer
from rich.text import Text

import flux2max_async as flux
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._own_files import reject_foreign_files
from flux2max_async.cli._progress import ProgressDisplay, polls_per_task
from flux2max_async.cli._rows import Row
from flux2max_async.cli._terminal import (
    Counts,
    Terminal,
    attach_log_handler,
    describe_error,
    format_polls,
    print_error,
    report_errors,
)

if TYPE_CHECKING:
    from flux2max_async.emulator import Emulator


@attrs.define
class Demo:
    """One run of the demo."""

    count: int
    folder: Path
    gateway: "Emulator"
    terminal: Terminal = attrs.field(factory=lambda: Terminal(sys.stdout))
    saved: int = 0
    failed: int = 0
    task_seconds: float = 0.0
    """The total duration of the tasks whose pictures were saved."""
    rows: dict[str, Row] = attrs.field(factory=dict[str, Row])
    """What the page shows, by the names of the requests."""

    def run(self) -> int:
        """Generate all pictures and return the exit code."""
        with report_errors(self._result), attach_log_handler(logging.NullHandler()):
            reject_foreign_files(self.folder)
            display = asyncio.run(self._run())
            self._print_summary(display)
            if self.saved:
                self._write_page()
                self._suggest_batch()
        if self.failed:
            print_error(f"{self.failed} of {self.count} pictures failed")
        return 1 if self.failed else 0

    async def _run(self) -> ProgressDisplay:
        saves: set[asyncio.Task[None]] = set()
        schedule = flux.LearnedSchedule()
        async with (
            self.gateway,
            flux.FluxSession(self.gateway.api_key, base_url=self.gateway.url, schedule=schedule) as session,
        ):
            display = ProgressDisplay(self.count, session, schedule, 24, self.terminal, emulated=True)
            with display.live():
                try:
                    async with session.stream(_requests(self.count)) as stream:
                        async for outcome in stream:
                            # In a task of its own, so that a slow download doesn't delay the next outcome.
                            saves.add(asyncio.create_task(self._save(outcome, session, display)))
                finally:
                    await _wait_for_saves(saves)
        for save in saves:
            save.result()  # raises if standard output is closed
        return display

    async def _save(self, outcome: "flux.Outcome", session: "flux.FluxSession", display: ProgressDisplay) -> None:
        """Save the picture of an outcome, or print why there is none."""
        assert outcome.request is not None
        name = str(outcome.request.key)
        row = self.rows[name] = Row(name, outcome.request.prompt)
        row.update(outcome)
        try:
            completed = outcome.unwrap()
            path = await session.save(completed.images[0], self.folder / f"{name}.jpeg")
            row.files = [path.name]
        except flux.FluxError as error:
            row.set_error(describe_error(error))
            self.failed += 1
            display.failed += 1
            self._print(Text.assemble(("failed", "red"), f" {name}: {describe_error(error)}"))
        else:
            self.saved += 1
            self.task_seconds += completed.elapsed
            display.record(name, outcome)
            if not self.terminal.is_interactive:
                self._print(Text(f"saved {name}.jpeg ({completed.elapsed:.1f} s, {format_polls(completed)})"))

    def _result(self) -> str:
        return f"{self.saved} of {self.count} pictures are saved in {self.folder}"

    def _print_summary(self, display: ProgressDisplay) -> None:
        stats = display.session.stats
        cells = {
            "done": str(self.saved),
            "failed": str(self.failed),
            "wall seconds": f"{display.elapsed:.1f}",
            "seconds per task": f"{self.task_seconds / self.saved:.1f}" if self.saved else "-",
            "polls per task": f"{polls_per_task(stats):.1f}",
            "spent": f"${stats.spent:.2f}",
        }
        self.terminal.show(Counts(cells), self._result())

    def _write_page(self) -> None:
        gallery = Gallery(self.folder, emulated=True)
        gallery.write([row for _, row in sorted(self.rows.items())], running=False)
        self.terminal.show(f"to view them: {gallery.path.resolve().as_uri()}")

    def _suggest_batch(self) -> None:
        """Print a command to try next, with a file of prompts that is written unless there is one already."""
        prompts_file = self.folder / "prompts.txt"
        try:
            with prompts_file.open("x", encoding="utf-8") as file:
                file.writelines(f"{prompt}\n" for prompt in _PROMPTS[:_BATCH_SIZE])
        except FileExistsError:
            pass  # that of an earlier run, which the user may have changed
        self.terminal.show(f"next: flux2max batch {shlex.quote(str(prompts_file))} --emulator")

    def _print(self, text: Text) -> None:
        if self.terminal.is_interactive:
            self.terminal.print(text, soft_wrap=True)
        else:
            # Not terminal.print(): on a broken pipe, rich raises SystemExit, which would break out of the event loop.
            typer.echo(text.plain)


async def _wait_for_saves(saves: "set[asyncio.Task[None]]") -> None:
    """Wait until all saves have ended, even if this wait is cancelled (by Ctrl-C), before or meanwhile."""
    all_saves = asyncio.gather(*saves, return_exceptions=True)
    try:
        await asyncio.shield(all_saves)
    except asyncio.CancelledError:
        await all_saves
        raise


def _requests(count: int) -> "Iterator[flux.GenerationRequest]":
    """Yield requests with the names of their files as keys; the prompts repeat with a number added."""
    digits = max(2, len(str(count)))
    for index in range(count):
        repetition, position = divmod(index, len(_PROMPTS))
        prompt = f"{_PROMPTS[position]}, no. {repetition + 1}" if repetition else _PROMPTS[position]
        words = re.findall(r"\w+", prompt.lower())
        yield flux.GenerationRequest(prompt, key="-".join([f"{index + 1:0{digits}}", *words]))


_BATCH_SIZE = 6
"""The number of prompts in the file for a first batch."""
_PROMPTS = (
    "a lighthouse at dawn",
    "a caravan of camels in the dunes",
    "northern lights over a frozen lake",
    "a cabin in an autumn forest",
    "a sailing boat at sunset",
    "a city on a rainy night",
    "cherry blossoms by a quiet river",
    "a volcano under the stars",
    "a mountain village in the snow",
    "mist between tall pines",
    "fishing boats in the harbour",
    "a storm over the ocean",
    "a desert canyon in the evening",
    "a full moon above the sea",
    "a cottage in a spring garden",
    "an island on a summer day",
    "a neon city at dusk",
    "wolf tracks in a winter forest",
    "a farm on a summer morning",
    "rivers of lava between black hills",
    "the first frost on the hills",
    "a yacht on a windy morning",
    "a lonely cactus at noon",
    "a galaxy above a sleeping town",
)
