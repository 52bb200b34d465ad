"""The subcommands of `flux2max`. Results go to stdout, all messages to stderr.

`flux2max --help` must be quick, so each subcommand imports what it needs when it runs.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import flux2max_async as flux
from flux2max_async.cli import _journal as journal_commands
from flux2max_async.cli import _options as options

if TYPE_CHECKING:
    from flux2max_async.cli._config import ServiceSettings

_FORMATS: dict[str, Literal["jpeg", "png"]] = {".jpeg": "jpeg", ".jpg": "jpeg", ".png": "png"}
"""The image formats by the suffixes of output files."""
_UNFINISHED_HINT = "unfinished tasks continue at the service; flux2max download TASK_ID saves the picture"

# rich is off: without its panels, help and usage errors are plain text and come in half the time, and its tracebacks
# with the values of variables could show the API key.
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_requested: bool) -> None:  # noqa: FBT001 - typer passes it by position
    if is_requested:
        typer.echo(f"flux2max {flux.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: flux2max batch prompts.txt --out pictures")
def flux2max(
    context: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001 - its callback handles it
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate pictures with FLUX.2 [max].

    The API key comes from the variable FLUX2MAX_API_KEY, from --key-file, or from a prompt. Options can be set by
    variables as well: --max-in-flight by FLUX2MAX_MAX_IN_FLIGHT. A file .env in the working folder can contain all
    variables.
    """
    if Path(".env").exists():
        from flux2max_async.cli._config import read_dotenv
        from flux2max_async.cli._terminal import report_errors

        with report_errors():
            context.obj = read_dotenv()
        # As defaults, because options and environment variables take precedence over the file.
        context.default_map = {
            name: {option.name: context.obj[option.envvar] for option in command.params if option.envvar in context.obj}
            for name, command in context.command.commands.items()  # type: ignore[attr-defined]
        }


def _settings(
    context: typer.Context, key_file: Path | None, base_url: str | None, *, allow_plain_http: bool
) -> "ServiceSettings":
    from flux2max_async.cli._config import ServiceSettings

    return ServiceSettings.create(context, base_url, key_file, allow_plain_http=allow_plain_http)


# ---------------------------------------------------------------------- single tasks


@app.command(epilog="Example: flux2max generate 'my cat on the moon' -i cat.jpeg -o moon.png")
def generate(
    context: typer.Context,
    prompt: options.Prompt,
    *,
    image: options.Images = None,
    width: options.Width = None,
    height: options.Height = None,
    seed: options.Seed = None,
    output_format: options.ImageFormat = None,
    safety_tolerance: options.SafetyTolerance = None,
    output: options.Output = None,
    force: options.Force = False,
    task_timeout: options.TaskTimeout = 600.0,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
    allow_plain_http: options.AllowPlainHttp = False,
    emulator: options.UseEmulator = False,
) -> None:
    """Generate one picture and save it.

    Without --format, the suffix of the output file sets the format. The path of the file is printed on stdout,
    everything else on stderr.
    """
    import asyncio

    from flux2max_async.cli import _tasks as tasks
    from flux2max_async.cli._requests_file import resolve_image_source
    from flux2max_async.cli._terminal import StderrLogHandler, attach_log_handler, report_errors

    with report_errors(lambda: _UNFINISHED_HINT), attach_log_handler(StderrLogHandler(logging.WARNING)):
        request = flux.GenerationRequest(
            prompt,
            input_images=[resolve_image_source(source, Path()) for source in image or ()],
            width=width,
            height=height,
            seed=seed,
            output_format=output_format or (_FORMATS.get(output.suffix.lower()) if output else None),
            safety_tolerance=safety_tolerance,
        )
        settings = None if emulator else _settings(context, key_file, base_url, allow_plain_http=allow_plain_http)
        session = tasks.open_session(settings, task_timeout)
        asyncio.run(tasks.generate(session, request, output, force=force))


@app.command(epilog="Example: flux2max status 6a107b75677f6cbdcc22af58")
def status(
    context: typer.Context,
    task_id: options.TaskId,
    *,
    as_json: options.AsJson = False,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
    allow_plain_http: options.AllowPlainHttp = False,
) -> None:
    """Show the status of a task."""
    import asyncio

    from flux2max_async.cli import _tasks as tasks
    from flux2max_async.cli._terminal import report_errors

    with report_errors():
        settings = _settings(context, key_file, base_url, allow_plain_http=allow_plain_http)
        asyncio.run(tasks.status(settings, task_id, as_json=as_json))


@app.command(epilog="Example: flux2max download 6a107b75677f6cbdcc22af58 -o moon.png")
def download(
    context: typer.Context,
    task_id: options.TaskId,
    *,
    output: options.Output = None,
    force: options.Force = False,
    task_timeout: options.TaskTimeout = 600.0,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
    allow_plain_http: options.AllowPlainHttp = False,
) -> None:
    """Save the picture of a task.

    If the task has not ended yet, wait for it. It may have been submitted on another machine.
    """
    import asyncio

    from flux2max_async.cli import _tasks as tasks
    from flux2max_async.cli._terminal import StderrLogHandler, attach_log_handler, report_errors

    with report_errors(), attach_log_handler(StderrLogHandler(logging.WARNING)):
        settings = _settings(context, key_file, base_url, allow_plain_http=allow_plain_http)
        session = tasks.open_session(settings, task_timeout)
        asyncio.run(tasks.download(session, task_id, output, force=force))


# ---------------------------------------------------------------------- batches


@app.command(epilog="Example: flux2max batch prompts.csv --width 1024 --repeat 4 --budget 20")
def batch(
    context: typer.Context,
    file: options.RequestsFile,
    *,
    out: options.Out = None,
    journal: options.Journal = None,
    store: options.Store = None,
    file_format: options.FileFormat = None,
    repeat: options.Repeat = 1,
    prompt: options.DefaultPrompt = None,
    image: options.Images = None,
    width: options.Width = None,
    height: options.Height = None,
    seed: options.Seed = None,
    output_format: options.ImageFormat = None,
    safety_tolerance: options.SafetyTolerance = None,
    webhook_url: options.WebhookUrl = None,
    extra: options.Extra = None,
    max_in_flight: options.MaxInFlight = 24,
    budget: options.Budget = None,
    price_guess: options.PriceGuess = None,
    task_timeout: options.TaskTimeout = 600.0,
    retry_failed: options.RetryFailed = False,
    resubmit_uncertain: options.ResubmitUncertain = False,
    skip_bad: options.SkipBad = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
    allow_plain_http: options.AllowPlainHttp = False,
    emulator: options.UseEmulator = False,
) -> None:
    """Generate the pictures of a file.

    If an earlier run has left some of them, continue it.

    FILE has one prompt per line (.txt), one JSON object per line (.jsonl), an array of objects or prompts (.json), or
    is a table (.csv, .xlsx). The columns are named like the fields of the objects: prompt, input_images, seed, width,
    height, safety_tolerance, output_format, webhook_url, webhook_secret, extra, key. Options apply to all lines that
    don't set the field. All lines are checked before anything is sent.

    DIR contains the pictures, index.html to view them, results.jsonl, and journal.db: with it, running the same command
    again pays for nothing twice. Ctrl-C stops submitting and waits for the running tasks; a second Ctrl-C exits at
    once.

    Several hosts that run the same command with the same --journal postgresql://... share the work, --budget and
    --max-in-flight. Each has a DIR of its own, and ends with all pictures and results. The password is best kept in
    ~/.pgpass or PGPASSWORD.
    """
    from flux2max_async._config import parse_dollars
    from flux2max_async.cli._batch import BatchOptions, run_batch
    from flux2max_async.cli._requests_file import parse_defaults
    from flux2max_async.cli._summary import Command
    from flux2max_async.cli._terminal import report_errors
    from flux2max_async.journal._lookup import ReusePolicy

    settings = _settings(context, key_file, base_url, allow_plain_http=allow_plain_http)
    with report_errors(lambda: "run the same command again to go on"):
        defaults = parse_defaults(
            extra or (),
            prompt=prompt,
            input_images=image,
            width=width,
            height=height,
            seed=seed,
            output_format=output_format,
            safety_tolerance=safety_tolerance,
            webhook_url=webhook_url,
            # There is no option for the secret: the shell's history would keep it.
            webhook_secret=settings.get_variable("FLUX2MAX_WEBHOOK_SECRET"),
        )
        batch_options = BatchOptions(
            file=file,
            file_format=file_format,
            defaults=defaults,
            repeat=repeat,
            skip_bad=skip_bad,
            out=out,
            journal=journal,
            store=store,
            settings=settings,
            emulated=emulator,
            max_in_flight=max_in_flight,
            task_timeout=task_timeout,
            budget=parse_dollars("budget", budget),
            price_guess=parse_dollars("price_guess", price_guess),
            reuse_policy=ReusePolicy(retry_failed, resubmit_uncertain),
            dry_run=dry_run,
            yes=yes,
            as_json=as_json,
            command=Command.create(context),
        )
        code = run_batch(batch_options)
    raise typer.Exit(code)


app.add_typer(journal_commands.journal, name="journal")


@app.command(epilog="Example: flux2max gallery pictures")
def gallery(folder: options.BatchFolder) -> None:
    """Write the page of a batch again.

    It writes index.html and results.jsonl from the batch's journal.
    """
    from flux2max_async.cli._inspect import rebuild_gallery
    from flux2max_async.cli._terminal import report_errors

    with report_errors():
        rebuild_gallery(folder)


# ---------------------------------------------------------------------- the emulator


@app.command(epilog="Example: flux2max demo --count 60 --seconds 4 --out pictures")
def demo(
    *,
    count: options.Count = 24,
    out: options.DemoFolder = Path("flux2max-demo"),
    seconds: options.Seconds = 8.0,
    failing: options.Failing = 0.0,
) -> None:
    """Generate pictures with an emulator.

    They are made 24 at a time. The emulator runs in this process and needs no key; submits, polls and downloads are
    real HTTP calls.
    """
    from flux2max_async.cli._demo import Demo
    from flux2max_async.emulator import Emulator

    raise typer.Exit(Demo(count, out, Emulator(seconds=seconds, failing=failing)).run())


@app.command(epilog="Example: flux2max emulate --port 8765 --fault server_error=0.1")
def emulate(
    *,
    port: options.Port = 8765,
    seconds: options.Seconds = 8.0,
    spread: options.Spread = 0.3,
    failing: options.Failing = 0.0,
    fault: options.Faults = None,
    balance: options.Balance = None,
    seed: options.EmulatorSeed = None,
) -> None:
    """Serve an emulated gateway.

    It listens on 127.0.0.1. To try things out for free, put the two lines that it prints into a file .env in another
    folder and run flux2max there.

    The README explains the names of the faults; a wrong name is answered with all of them.
    """
    from flux2max_async._config import parse_dollars
    from flux2max_async.cli._emulate import parse_faults
    from flux2max_async.cli._terminal import report_errors
    from flux2max_async.emulator import Emulator
    from flux2max_async.emulator.__main__ import PortUnavailableError, serve

    with report_errors():
        gateway = Emulator(
            port=port,
            seconds=seconds,
            spread=spread,
            failing=failing,
            faults=parse_faults(fault or ()),
            balance=parse_dollars("balance", balance),
            seed=seed,
            api_key="emulated",  # always the same, so that a .env file stays valid
        )
        try:
            serve(gateway)
        except PortUnavailableError as error:
            raise flux.ConfigurationError(str(error)) from error
