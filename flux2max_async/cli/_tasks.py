"""The commands `generate`, `status` and `download`, each for a single task."""

import json
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import flux2max_async as flux
from flux2max_async._models.results import is_inline
from flux2max_async.cli._config import ServiceSettings
from flux2max_async.cli._picture_files import (
    GENERATED_SUFFIXES,
    PICTURE_SUFFIXES,
    check_output,
    default_output,
    numbered_paths,
    suffix_of_url,
)
from flux2max_async.cli._terminal import Terminal, describe_error, format_polls, print_status, shorten, to_single_line

SessionContext = AbstractAsyncContextManager["flux.FluxSession"]


def open_session(settings: ServiceSettings | None, task_timeout: float) -> SessionContext:
    """Return a context that opens a session with the settings; if they are None, with an emulator.

    Raises:
        ConfigurationError: There is no API key, or an option is invalid.
    """
    if settings is None:
        return _emulator_session(task_timeout)
    return settings.create_session(schedule=_interactive_schedule(), task_timeout=task_timeout)


@asynccontextmanager
async def _emulator_session(task_timeout: float) -> "AsyncGenerator[flux.FluxSession]":
    from flux2max_async.emulator import Emulator  # noqa: PLC0415 - it needs the extra `emulator`

    async with Emulator(seconds=2.0) as gateway:
        session = flux.FluxSession(
            gateway.api_key, base_url=gateway.url, schedule=_interactive_schedule(), task_timeout=task_timeout
        )
        async with session:
            yield session


def _interactive_schedule() -> "flux.PollSchedule":
    """Return a schedule for a user who waits at the terminal: early first polls, then one per second."""
    return flux.ExponentialSchedule(0.25, factor=1.5, maximum=1.0)


async def generate(
    context: SessionContext, request: "flux.GenerationRequest", output: Path | None, *, force: bool
) -> None:
    """Generate and save a picture.

    Args:
        context: Opens the session.
        request: The request to submit.
        output: The file to write; None names it after the task.
        force: Whether files that are there already are replaced.

    Raises:
        ConfigurationError: The file can't be written; nothing was sent.
    """
    check_output(output, GENERATED_SUFFIXES, force=force)
    async with context as session:
        with _status_line("submitting") as show_status:
            task = await session.submit(request)
            print_status(f"task {shorten(task.id)} submitted")
            completed = await _wait_for(task, show_status)
            first = output or default_output(completed.task_id, f".{request.output_format or 'jpeg'}")
            paths = await _save(session, completed, first, force=force)
    _print_result(completed, paths, "{}")


async def download(context: SessionContext, task_id: str, output: Path | None, *, force: bool) -> None:
    """Wait until a task has ended and save its pictures.

    Args:
        context: Opens the session.
        task_id: The task's id.
        output: The file to write; None names it after the task.
        force: Whether files that are there already are replaced.

    Raises:
        ConfigurationError: The file can't be written; nothing was sent.
    """
    check_output(output, PICTURE_SUFFIXES, force=force)
    async with context as session:
        with _status_line("connecting") as show_status:
            completed = await _wait_for(session.attach(task_id), show_status)
            first = output or default_output(completed.task_id, suffix_of_url(completed.images[0].url))
            paths = await _save(session, completed, first, force=force)
    _print_result(completed, paths, "already paid: {}")


async def status(settings: ServiceSettings, task_id: str, *, as_json: bool) -> None:
    """Poll a task once and print its status."""
    async with settings.create_session() as session:
        snapshot = await session.fetch(task_id)
    if as_json:
        typer.echo(json.dumps(snapshot.raw, ensure_ascii=True))
        return
    rows = [("status", _describe_status(snapshot))]
    if snapshot.created_at is not None:
        rows.append(("created", f"{snapshot.created_at:%Y-%m-%d %H:%M:%S} UTC"))
    if snapshot.usage is not None and snapshot.usage.cost is not None:
        rows.append(("cost", f"${snapshot.usage.cost:f}"))
    if snapshot.error is not None:
        rows.append(("error", shorten(snapshot.error.message)))
    if snapshot.partial_error is not None:
        rows.append(("missing", shorten(snapshot.partial_error.message)))
    rows += [("url", _describe_url(image.url)) for image in snapshot.images]
    for name, value in rows:
        typer.echo(f"{name:<8} {to_single_line(value)}")


def _describe_url(url: str) -> str:
    return f"(inline, {len(url)} characters)" if is_inline(url) else url


async def _wait_for(task: "flux.GenerationTask", show_status: Callable[[str], None]) -> "flux.Completed":
    async for snapshot in task.updates():
        show_status(_describe_status(snapshot))
    return await task


def _describe_status(snapshot: "flux.TaskSnapshot") -> str:
    progress = "" if snapshot.progress is None or snapshot.status.ended else f", {snapshot.progress:.0%}"
    return snapshot.status.replace("_", " ") + progress


async def _save(session: "flux.FluxSession", completed: "flux.Completed", first: Path, *, force: bool) -> list[Path]:
    """Save each image of a task to its own file; number the files from the second on."""
    paths = numbered_paths(first, force=force)
    try:
        return [await session.save(image, next(paths)) for image in completed.images]
    except flux.DownloadError as error:
        raise flux.DownloadError(f"task {shorten(completed.task_id)} is completed, but not saved: {error}") from error


def _print_result(completed: "flux.Completed", paths: list[Path], cost_text: str) -> None:
    """Print the paths of the pictures, and what it took; the text for the cost has braces where the amount belongs."""
    for path in paths:
        typer.echo(path)
    cost = completed.usage and completed.usage.cost
    charge = "" if cost is None else f", {cost_text.format(f'${cost:f}')}"
    print_status(f"{completed.elapsed:.1f} s, {format_polls(completed)}{charge}")
    if completed.partial_error is not None:
        print_status(f"further pictures are missing: {describe_error(completed.partial_error)}")


@contextmanager
def _status_line(text: str) -> Generator[Callable[[str], None]]:
    """Show a status line while the terminal is interactive; yield the function that changes its text."""
    terminal = Terminal(sys.stderr)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=terminal,
        transient=True,
        redirect_stdout=False,
    )
    row = progress.add_task(text, total=None)
    with progress if terminal.is_interactive else nullcontext():
        yield lambda description: progress.update(row, description=description)
