"""One picture or one task: generated, looked at, or fetched, while somebody watches."""

import json
import re
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import flux2max_async as flux
from flux2max_async.cli._config import Access
from flux2max_async.cli._terminal import Screen, line, polls, tell

if TYPE_CHECKING:
    from flux2max_async.emulator import Emulator

Opened = AbstractAsyncContextManager["flux.FluxSession"]

_ENDINGS = (".jpeg", ".jpg", ".png", ".webp")


def watched() -> "flux.PollSchedule":
    """Give the schedule for one task while somebody is watching: a refusal is told early, and the line moves."""
    return flux.ExponentialSchedule(0.25, factor=1.5, maximum=1.0)


@asynccontextmanager
async def session_on(gateway: "Emulator", task_timeout: float) -> "AsyncGenerator[flux.FluxSession]":
    """Give a session on an emulated service."""
    async with (
        gateway,
        flux.FluxSession(gateway.api_key, base_url=gateway.url, schedule=watched(), task_timeout=task_timeout) as session,
    ):
        yield session


async def generate(opened: Opened, request: "flux.GenerationRequest", output: Path | None) -> None:
    """Generate a picture and save it."""
    async with opened as session:
        with _status_line("submitting") as show:
            task = await session.submit(request)
            tell(f"task {task.id} submitted")
            picture = await _followed(task, show)
            ending = f".{request.output_format or 'jpeg'}"
            paths = await _save(session, picture, output, ending)
    _show_result(picture, paths)


async def fetch(opened: Opened, task_id: str, output: Path | None) -> None:
    """Wait for the end of a task and save its pictures."""
    async with opened as session:
        with _status_line("looking") as show:
            picture = await _followed(session.attach(task_id), show)
            ending = Path(urlsplit(picture.images[0].url).path).suffix.lower()
            paths = await _save(session, picture, output, ending if ending in _ENDINGS else ".jpeg")
    _show_result(picture, paths)


async def status(access: Access, task_id: str, *, as_json: bool) -> None:
    """Look at a task once and say how it stands."""
    async with access.session() as session:
        seen = await session.fetch(task_id)
    if as_json:
        typer.echo(json.dumps(seen.raw, ensure_ascii=True))
        return
    progress = "" if seen.progress is None or seen.status.ended else f", {seen.progress:.0%}"
    rows = [("status", seen.status.replace("_", " ") + progress)]
    if seen.created_at is not None:
        rows.append(("created", f"{seen.created_at:%Y-%m-%d %H:%M:%S} UTC"))
    if seen.usage is not None and seen.usage.cost is not None:
        rows.append(("cost", f"${seen.usage.cost:f}"))
    if seen.error is not None:
        rows.append(("error", seen.error.message))
    rows += [("url", image.url) for image in seen.images]
    for name, value in rows:
        typer.echo(f"{name:<8} {line(value)}")


async def _followed(task: "flux.GenerationTask", show: Callable[[str], None]) -> "flux.Completed":
    async for snapshot in task.updates():
        progress = "" if snapshot.progress is None else f", {snapshot.progress:.0%}"
        show(snapshot.status.replace("_", " ") + progress)
    return await task


async def _save(session: "flux.FluxSession", picture: "flux.Completed", output: Path | None, ending: str) -> list[Path]:
    """Save a task's pictures, each into a file of its own."""
    # The id may be anything: keep what is safe in a file's name.
    name = re.sub(r"[^\w.-]+", "-", picture.task_id)
    first = output or Path(f"flux2max-{name}{ending}")
    targets = [first, *(first.with_stem(f"{first.stem}-{number}") for number in range(2, len(picture.images) + 1))]
    try:
        return [await session.save(image, target) for image, target in zip(picture.images, targets, strict=True)]
    except flux.DownloadError as error:
        raise flux.DownloadError(f"task {picture.task_id} is completed, but not saved: {error}") from error


def _show_result(picture: "flux.Completed", paths: list[Path]) -> None:
    for path in paths:
        typer.echo(path)
    cost = picture.usage and picture.usage.cost
    bill = "" if cost is None else f", ${cost:f}"
    tell(f"{picture.elapsed:.1f} s, {polls(picture)}{bill}")


@contextmanager
def _status_line(first: str) -> Generator[Callable[[str], None]]:
    """Show a line on a terminal while something is done; what is given changes it."""
    screen = Screen(sys.stderr)
    live = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        redirect_stdout=False,
    )
    row = live.add_task(first, total=None)
    with live if screen.is_interactive else nullcontext():
        yield lambda text: live.update(row, description=text)
