"""The arguments and options of all subcommands, as annotated types.

An option that `_setting()` creates can also be set by an environment variable, which `.env` may contain as well.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _setting(name: str, *, metavar: str, help: str, **options: Any) -> Any:
    """Create an option that the environment variable of its name sets, such as FLUX2MAX_MAX_IN_FLIGHT."""
    variable = f"FLUX2MAX_{name.removeprefix('--').replace('-', '_').upper()}"
    return typer.Option(name, metavar=metavar, help=help, envvar=variable, show_envvar=False, **options)


# Parameters of requests

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")]
DefaultPrompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Prompt for lines that have none.")]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", "-i", metavar="IMAGE", help="A reference picture: a URL or a file; up to 8."),
]
Width = Annotated[int | None, _setting("--width", metavar="PIXELS", help="At least 64.")]
Height = Annotated[int | None, _setting("--height", metavar="PIXELS", help="At least 64.")]
Seed = Annotated[int | None, _setting("--seed", metavar="NUMBER", help="The same seed gives the same picture.")]
ImageFormat = Annotated[
    Literal["jpeg", "png"] | None,
    _setting("--format", metavar="jpeg|png", help="The service's default is jpeg."),
]
SafetyTolerance = Annotated[
    int | None,
    _setting("--safety-tolerance", metavar="0-5", help="0 is strictest; the service's default is 2."),
]
WebhookUrl = Annotated[
    str | None, _setting("--webhook-url", metavar="URL", help="Where the service posts finished tasks.")
]
Extra = Annotated[
    list[str] | None, typer.Option("--extra", metavar="NAME=VALUE", help="Another parameter of the service.")
]

# The service

KeyFile = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", dir_okay=False, help="File that contains the API key.")
]
BaseUrl = Annotated[str | None, _setting("--base-url", metavar="URL", help="The service's address.")]
AllowPlainHttp = Annotated[
    bool,
    typer.Option(
        "--allow-plain-http",
        envvar="FLUX2MAX_ALLOW_PLAIN_HTTP",
        show_envvar=False,
        help="Accept http:// for another host, inside your own network.",
    ),
]
TaskTimeout = Annotated[float, _setting("--task-timeout", metavar="SECONDS", help="Maximum time for one task.")]
UseEmulator = Annotated[bool, typer.Option("--emulator", help="Try it without a key: an emulator draws pictures.")]

# Single tasks

TaskId = Annotated[str, typer.Argument(metavar="TASK_ID", help="The task's id.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Default: flux2max-<task id>.<format>."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]

# Batches

RequestsFile = Annotated[
    str, typer.Argument(metavar="FILE", help="A .txt, .jsonl, .json, .csv or .xlsx file, or - for stdin.")
]
FileFormat = Annotated[
    Literal["txt", "jsonl", "json", "csv", "xlsx"] | None,
    typer.Option("--as", metavar="FORMAT", help="txt, jsonl, json, csv or xlsx, if FILE's suffix doesn't show it."),
]
BatchFolder = Annotated[
    Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="The output folder of a batch.")
]


def _check_place(place: str) -> str:
    if "://" not in place and not Path(place).exists():
        raise typer.BadParameter(f"Path {place!r} does not exist.")
    return place


JournalPlace = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        callback=_check_place,
        help="The output folder of a batch, a journal's file, or postgresql://USER@HOST/DATABASE.",
    ),
]
OlderThan = Annotated[
    str, typer.Option("--older-than", metavar="TIME", help="How long ago they ended: 30d, 12h, 90m or 45s.")
]
Out = Annotated[Path | None, _setting("--out", metavar="DIR", help="Output folder. Default: flux2max-<FILE's name>.")]
Repeat = Annotated[int, _setting("--repeat", metavar="N", min=1, help="Pictures per line, with consecutive seeds.")]
Journal = Annotated[
    str | None,
    _setting(
        "--journal",
        metavar="PATH",
        help="Journal that several hosts share: postgresql://USER@HOST/DATABASE, or a file.",
    ),
]
MaxInFlight = Annotated[
    int,
    _setting(
        "--max-in-flight", metavar="N", help="Maximum number of tasks at once, of all hosts that share a journal."
    ),
]
Budget = Annotated[str | None, _setting("--budget", metavar="DOLLARS", help="Limit for all runs together.")]
PriceGuess = Annotated[
    str | None,
    _setting("--price-guess", metavar="DOLLARS", help="Assumed price of a picture until one is paid."),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Submit failed tasks again.")]
ResubmitUncertain = Annotated[
    bool,
    typer.Option("--resubmit-uncertain", help="Submit again what may exist already (may be paid twice)."),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Put the pictures into object storage: s3://bucket/prefix, gs://, az://. AWS_* and the like set it up.",
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip bad lines.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and what it would cost.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before money is spent.")]

# The emulator

Count = Annotated[int, typer.Option("--count", metavar="NUMBER", min=1, help="How many pictures to generate.")]
DemoFolder = Annotated[Path, typer.Option("--out", metavar="DIR", file_okay=False, help="Where to save them.")]
Port = Annotated[
    int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="Port to listen on; 0 takes any free port.")
]
Seconds = Annotated[float, typer.Option("--seconds", min=0.0, metavar="SECONDS", help="Typical duration of a task.")]
Spread = Annotated[
    float,
    typer.Option("--spread", min=0.0, metavar="SHARE", help="Spread of the durations; 0 makes them equal."),
]
Failing = Annotated[
    float,
    typer.Option("--failing", min=0.0, max=1.0, metavar="SHARE", help="Share of tasks that fail, from 0 to 1."),
]
Faults = Annotated[
    list[str] | None,
    typer.Option(
        "--fault",
        metavar="NAME=SHARE",
        help="Share of calls, or of tasks, with a fault, such as server_error=0.1. May be repeated.",
    ),
]
Balance = Annotated[
    str | None, typer.Option("--balance", metavar="DOLLARS", help="The account's balance; large by default.")
]
EmulatorSeed = Annotated[int | None, typer.Option("--seed", metavar="NUMBER", help="Makes runs repeatable.")]
