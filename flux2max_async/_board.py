"""The board of the demo: how many pictures are saved, failed and under way, live on a terminal or as plain lines."""

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import attrs
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import flux2max_async as flux


@attrs.define
class Board:
    """How the demo stands, and what it shows of that."""

    count: int
    folder: Path
    console: Console
    began: float = attrs.field(factory=time.monotonic, init=False)
    """The moment of the start, on the clock of `time.monotonic()`."""
    saved: int = attrs.field(default=0, init=False)
    failed: int = attrs.field(default=0, init=False)
    newest: str = attrs.field(default="", init=False)
    """The name of the picture that was saved last."""
    seconds: float = attrs.field(default=0.0, init=False)
    """What the saved pictures' tasks took, together."""
    wall: float = attrs.field(default=0.0, init=False)
    """The seconds that all of it took."""
    _session: "flux.FluxSession" = attrs.field(init=False)

    @contextmanager
    def shown(self, session: "flux.FluxSession") -> Generator[None]:
        """Show the board on a terminal while something is done."""
        self._session = session
        self.began = time.monotonic()
        live = Live(self, console=self.console, refresh_per_second=8, transient=True)
        with live if self.console.is_interactive else nullcontext():
            yield
        self.wall = time.monotonic() - self.began

    async def take(self, outcome: "flux.Outcome", session: "flux.FluxSession") -> None:
        """Save an outcome's picture, or tell why there is none."""
        assert outcome.request is not None
        name = str(outcome.request.key)
        try:
            picture = outcome.unwrap()
            await session.save(picture.images[0], self.folder / f"{name}.jpeg")
        except flux.FluxError as error:
            self.failed += 1
            self._print(Text.assemble(("failed", "red"), f" {name}: {line(error)}"))
        else:
            self.saved += 1
            self.seconds += picture.elapsed
            self.newest = f"{name}.jpeg"
            if not self.console.is_interactive:
                self._print(Text(f"saved {name}.jpeg ({picture.elapsed:.1f} s, {polls(picture)})"))

    def result(self) -> str:
        """Tell what is saved."""
        return f"{self.saved} of {self.count} pictures are saved in {self.folder}"

    def summarize(self) -> None:
        """Tell what it all came to."""
        stats = self._session.stats
        table = Table()
        for name in ("done", "failed", "wall seconds", "seconds per task", "polls per task", "spent"):
            table.add_column(name, justify="right")
        table.add_row(
            str(self.saved),
            str(self.failed),
            f"{self.wall:.1f}",
            f"{self.seconds / self.saved:.1f}" if self.saved else "-",
            f"{_polls_per_task(stats):.1f}",
            f"${stats.spent:.2f}",
        )
        self.console.print(table)
        self._print(Text(self.result()))

    def __rich__(self) -> Group:
        stats = self._session.stats
        ended = self.saved + self.failed
        top = Table.grid(expand=True, padding=(0, 1, 0, 0))
        top.add_column(ratio=1)
        top.add_column(justify="right")
        top.add_column(justify="right", min_width=7)
        top.add_row(
            ProgressBar(total=self.count, completed=ended),
            f"{ended} of {self.count}",
            f"{time.monotonic() - self.began:.1f} s",
        )
        numbers = (
            f"{stats.in_flight} in flight, {self.saved} done, {self.failed} failed, "
            f"{_polls_per_task(stats):.1f} polls per task, ${stats.spent:.2f} spent"
        )
        return Group(
            top,
            Text(numbers, no_wrap=True, overflow="ellipsis"),
            Text(self.newest, style="dim", no_wrap=True, overflow="ellipsis"),
        )

    def _print(self, text: Text) -> None:
        if self.console.is_interactive:
            self.console.print(text, soft_wrap=True)
        else:
            # Where nobody reads the pipe any more, rich would raise SystemExit, which tears the event loop apart.
            typer.echo(text.plain)


def _polls_per_task(stats: "flux.SessionStats") -> float:
    return stats.polls / max(stats.submitted, 1)


def polls(picture: "flux.Completed") -> str:
    return "1 poll" if picture.polls == 1 else f"{picture.polls} polls"


def line(said: object) -> str:
    """Bring what the service, say, has said into one line that leaves the terminal alone."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(said)).split())
