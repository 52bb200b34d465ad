"""The commands of `flux2max`: arguments become requests, and outcomes become files and lines on a terminal.

What is asked for goes to stdout, and what is said about it to stderr. The package is used through its own name here, so
that the HTTP client isn't imported before a command runs: help must be quick.
"""

import asyncio
import logging
import os
import re
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import flux2max_async as flux
from flux2max_async._board import Board, line, polls

if TYPE_CHECKING:
    from flux2max_async.emulator import Emulator

_FORMATS: dict[str, Literal["jpeg", "png"]] = {".jpeg": "jpeg", ".jpg": "jpeg", ".png": "png"}

# Without rich's panels, help and usage errors are plain text everywhere, and come in half the time. Tracebacks with the
# values of variables, the other thing that typer could do with rich, might show the API key.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"flux2max {flux.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: flux2max demo")
def flux2max(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate pictures with FLUX.2 [max].

    The key is read from FLUX2MAX_API_KEY, and the gateway's address from FLUX2MAX_BASE_URL if that is set.
    """


# ---------------------------------------------------------------------- one picture


@app.command(epilog="Example: flux2max generate 'my cat on the moon' -i cat.jpeg -o moon.png")
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    *,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="IMAGE", help="A reference picture, as a URL or a file; up to 8."),
    ] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="At least 64.")] = None,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="At least 64.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="The same seed gives the same picture.")] = None,
    output_format: Annotated[
        Literal["jpeg", "png"] | None,
        typer.Option("--format", metavar="jpeg|png", help="Without it, FILE's ending decides, else it is jpeg."),
    ] = None,
    safety_tolerance: Annotated[
        int | None, typer.Option(metavar="0-5", help="0 is strictest; the service's default is 2.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Default: flux2max-<task id>.<format>."),
    ] = None,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the task.")] = 600.0,
    emulator: Annotated[
        bool, typer.Option("--emulator", help="Try it out without a key: the picture is a drawing made on the spot.")
    ] = False,
) -> None:
    """Generate one picture and save it.

    The file's path goes to stdout, everything else to stderr.
    """
    with _errors_as_lines(), _log_to(_Complaints(logging.WARNING)):
        request = flux.GenerationRequest(
            prompt,
            input_images=[source if _is_url(source) else Path(source) for source in image or ()],
            width=width,
            height=height,
            seed=seed,
            output_format=output_format or (_FORMATS.get(output.suffix.lower()) if output else None),
            safety_tolerance=safety_tolerance,
        )
        gateway = _emulator(seconds=2.0) if emulator else None
        picture, paths = asyncio.run(_generate(request, output, deadline, gateway))
    for path in paths:
        typer.echo(path)
    cost = picture.usage and picture.usage.cost
    bill = "" if cost is None else f", ${cost:f}"
    _tell(f"{picture.elapsed:.1f} s, {polls(picture)}{bill}")


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


async def _generate(
    request: "flux.GenerationRequest", output: Path | None, deadline: float, gateway: "Emulator | None"
) -> "tuple[flux.Completed, list[Path]]":
    async with _session(gateway, deadline) as session:
        with _status_line() as show:
            task = await session.submit(request)
            _tell(f"task {task.id} submitted")
            async for snapshot in task.updates():
                progress = "" if snapshot.progress is None else f", {snapshot.progress:.0%}"
                show(snapshot.status.replace("_", " ") + progress)
            picture = await task
            targets = _targets(picture, request, output)
            try:
                return picture, [
                    await session.save(image, target) for image, target in zip(picture.images, targets, strict=True)
                ]
            except flux.DownloadError as error:
                raise flux.DownloadError(f"task {task.id} is completed, but not saved: {error}") from error


@asynccontextmanager
async def _session(gateway: "Emulator | None", deadline: float) -> "AsyncGenerator[flux.FluxSession]":
    # Somebody is watching one task: what is refused is told early, and the line moves every second.
    watched = flux.ExponentialSchedule(0.25, factor=1.5, maximum=1.0)
    if gateway is not None:
        async with (
            gateway,
            flux.FluxSession(gateway.api_key, base_url=gateway.url, schedule=watched, deadline=deadline) as session,
        ):
            yield session
    elif not os.environ.get("FLUX2MAX_API_KEY"):
        raise flux.ConfigurationError("no API key: set FLUX2MAX_API_KEY, or try it without one with --emulator")
    else:
        async with flux.FluxSession(schedule=watched, deadline=deadline) as session:
            yield session


def _targets(picture: "flux.Completed", request: "flux.GenerationRequest", output: Path | None) -> list[Path]:
    """Name the files, one for each of the task's pictures."""
    # The id may be anything: keep what is safe in a file's name.
    name = re.sub(r"[^\w.-]+", "-", picture.task_id)
    first = output or Path(f"flux2max-{name}.{request.output_format or 'jpeg'}")
    return [first, *(first.with_stem(f"{first.stem}-{number}") for number in range(2, len(picture.images) + 1))]


@contextmanager
def _status_line() -> Generator[Callable[[str], None]]:
    """Show a line on a terminal while something is done; what is given changes it."""
    console = _console(sys.stderr)
    line = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
    )
    row = line.add_task("submitting", total=None)
    with line if console.is_interactive else nullcontext():
        yield lambda text: line.update(row, description=text)


# ---------------------------------------------------------------------- many pictures


@app.command(epilog="Example: flux2max demo --count 60 --seconds 4 --out pictures")
def demo(
    *,
    count: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="How many pictures.")] = 24,
    out: Annotated[Path, typer.Option(metavar="FOLDER", file_okay=False, help="Where they are saved.")] = Path(
        "flux2max-demo"
    ),
    seconds: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="How long most tasks take.")] = 8.0,
    failing: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="SHARE", help="How many fail, from 0 to 1.")
    ] = 0.0,
) -> None:
    """Generate many pictures at once with an emulated service.

    It runs in this process and needs no key; submits, polls and downloads are as real as with the service itself.
    """
    board = Board(count, out, _console(sys.stdout))
    with _errors_as_lines(result=board.result), _log_to(logging.NullHandler()):
        asyncio.run(_demo(board, _emulator(seconds=seconds, failing=failing)))
    board.summarize()
    if board.failed:
        _complain(f"{board.failed} of {count} pictures failed")
        raise typer.Exit(1)


async def _demo(board: Board, gateway: "Emulator") -> None:
    saving: set[asyncio.Task[None]] = set()
    async with gateway, flux.FluxSession(gateway.api_key, base_url=gateway.url) as session:
        with board.shown(session):
            try:
                async with session.stream(_requests(board.count)) as stream:
                    async for outcome in stream:
                        # Beside the stream, so that the next outcome needn't wait.
                        saving.add(asyncio.create_task(board.take(outcome, session)))
            finally:
                # What has come is saved, after Ctrl-C as well.
                await asyncio.gather(*saving, return_exceptions=True)
    for task in saving:
        task.result()  # raises where nobody reads the pipe


def _requests(count: int) -> "Iterator[flux.GenerationRequest]":
    """Give requests whose keys are their files' names."""
    for index in range(count):
        again, place = divmod(index, len(_PROMPTS))
        prompt = f"{_PROMPTS[place]}, no. {again + 1}" if again else _PROMPTS[place]
        words = re.findall(r"\w+", prompt.lower())
        yield flux.GenerationRequest(prompt, key="-".join([f"{index + 1:0{max(2, len(str(count)))}}", *words]))


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


# ---------------------------------------------------------------------- what both need


def _emulator(*, seconds: float, failing: float = 0.0) -> "Emulator":
    from flux2max_async.emulator import Emulator  # noqa: PLC0415 - it needs an extra

    return Emulator(seconds=seconds, failing=failing)


def _console(file: TextIO) -> Console:
    # Rich would send escape codes down a pipe where FORCE_COLOR is set, as it is on many CI services.
    return Console(file=file, force_terminal=file.isatty(), highlight=False)


@contextmanager
def _errors_as_lines(result: Callable[[], str] | None = None) -> Generator[None]:
    """Say what went wrong in one line, and exit with the code for it.

    Args:
        result: Tells what there is when Ctrl-C ends it.
    """
    try:
        yield
    except (flux.InvalidRequestError, flux.ConfigurationError) as error:
        _complain(error)
        raise typer.Exit(2) from error
    except flux.FluxError as error:
        _complain(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _complain(f"stopped: {result()}" if result else "stopped")
        raise typer.Exit(130) from None


@contextmanager
def _log_to(handler: logging.Handler) -> Generator[None]:
    """Let a handler have the library's log; without one, Python prints warnings on its own."""
    log = logging.getLogger("flux2max_async")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Complaints(logging.Handler):
    """Says what is logged: a call that has to be made again, or a paid task that is left unfinished."""

    def emit(self, record: logging.LogRecord) -> None:
        _complain(record.getMessage())


def _complain(said: object) -> None:
    _tell(f"flux2max: {said}")


def _tell(said: object) -> None:
    # Not typer.echo(): it writes past what rich puts in the place of stderr, into the middle of a live line.
    sys.stderr.write(f"{line(said)}\n")
