"""The commands of `flux2max` and their options; what they do stands in the rooms beside, imported when it is done.

What is asked for goes to stdout, and what is said about it to stderr.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.core import TyperOption

import flux2max_async as flux
from flux2max_async.cli import _options as options

if TYPE_CHECKING:
    from flux2max_async.cli._config import Access
    from flux2max_async.cli._summary import Command

_FORMATS: dict[str, Literal["jpeg", "png"]] = {".jpeg": "jpeg", ".jpg": "jpeg", ".png": "png"}

# Without rich's panels, help and usage errors are plain text everywhere, and come in half the time. Tracebacks with the
# values of variables, the other thing that typer could do with rich, might show the API key.
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"flux2max {flux.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: flux2max batch prompts.txt --out pictures")
def flux2max(
    context: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001 - it is its callback that answers
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate pictures with FLUX.2 [max].

    The key is read from the variable FLUX2MAX_API_KEY, from --key-file, or asked for. Options have variables, too:
    --max-in-flight is FLUX2MAX_MAX_IN_FLIGHT. A file .env in the working folder can hold them all.
    """
    if Path(".env").exists():
        from flux2max_async.cli._config import read_dotenv
        from flux2max_async.cli._terminal import errors_as_lines

        with errors_as_lines():
            context.obj = read_dotenv()
        # Options and variables come before what stands there.
        context.default_map = {
            name: {option.name: context.obj[option.envvar] for option in command.params if option.envvar in context.obj}
            for name, command in context.command.commands.items()  # type: ignore[attr-defined]
        }


def _typed(context: typer.Context) -> "Command":
    """Give the command as it was typed, with what stood in the environment written out."""
    import sys

    from flux2max_async.cli._summary import Command

    given = [option for option in context.command.params if isinstance(option, TyperOption)]
    spelled: list[str] = []
    for option in given:
        source = context.get_parameter_source(str(option.name))
        # The gateway's address stands there beside the key, which can't be written out: whoever goes on sets both.
        if source is not None and source.name == "ENVIRONMENT" and option.name != "base_url":
            spelled += [option.opts[0], os.environ[str(option.envvar)]]
    valued = [name for option in given if not option.is_flag for name in option.opts]
    name, *rest = sys.argv[1:]
    return Command([name, *spelled, *rest], valued)


def _access(context: typer.Context, key_file: Path | None, base_url: str | None) -> "Access":
    from flux2max_async.cli._config import Access

    return Access(context.obj or {}, base_url, key_file)


def _unfinished() -> str:
    return "what is unfinished goes on; flux2max fetch TASK_ID saves it"


# ---------------------------------------------------------------------- one picture


@app.command(epilog="Example: flux2max generate 'my cat on the moon' -i cat.jpeg -o moon.png")
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    *,
    image: options.Images = None,
    width: options.Width = None,
    height: options.Height = None,
    seed: options.Seed = None,
    output_format: options.Format = None,
    safety_tolerance: options.Tolerance = None,
    output: options.Output = None,
    task_timeout: options.TaskTimeout = 600.0,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
    emulator: Annotated[
        bool, typer.Option("--emulator", help="Try it out without a key: the picture is a drawing made on the spot.")
    ] = False,
) -> None:
    """Generate one picture and save it.

    Without --format, the ending of the output file decides. The file's path goes to stdout, everything else to stderr.
    """
    import asyncio
    import logging

    from flux2max_async.cli import _tasks as single
    from flux2max_async.cli._requests_file import picture
    from flux2max_async.cli._terminal import Complaints, errors_as_lines, log_to

    with errors_as_lines(_unfinished), log_to(Complaints(logging.WARNING)):
        request = flux.GenerationRequest(
            prompt,
            input_images=[picture(source, Path()) for source in image or ()],
            width=width,
            height=height,
            seed=seed,
            output_format=output_format or (_FORMATS.get(output.suffix.lower()) if output else None),
            safety_tolerance=safety_tolerance,
        )
        opened: single.Opened
        if emulator:
            from flux2max_async.emulator import Emulator

            opened = single.session_on(Emulator(seconds=2.0), task_timeout)
        else:
            opened = _access(context, key_file, base_url).session(schedule=single.watched(), task_timeout=task_timeout)
        asyncio.run(single.generate(opened, request, output))


@app.command(epilog="Example: flux2max status 6a107b75677f6cbdcc22af58")
def status(
    context: typer.Context,
    task_id: options.TaskId,
    *,
    as_json: options.AsJson = False,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
) -> None:
    """Look at a task once and say how it stands."""
    import asyncio

    from flux2max_async.cli import _tasks as single
    from flux2max_async.cli._terminal import errors_as_lines

    with errors_as_lines():
        asyncio.run(single.status(_access(context, key_file, base_url), task_id, as_json=as_json))


@app.command(epilog="Example: flux2max fetch 6a107b75677f6cbdcc22af58 -o moon.png")
def fetch(
    context: typer.Context,
    task_id: options.TaskId,
    *,
    output: options.Output = None,
    task_timeout: options.TaskTimeout = 600.0,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
) -> None:
    """Wait for the end of a task and save its picture.

    It may have been submitted here or on any other machine.
    """
    import asyncio
    import logging

    from flux2max_async.cli import _tasks as single
    from flux2max_async.cli._terminal import Complaints, errors_as_lines, log_to

    with errors_as_lines(), log_to(Complaints(logging.WARNING)):
        opened = _access(context, key_file, base_url).session(schedule=single.watched(), task_timeout=task_timeout)
        asyncio.run(single.fetch(opened, task_id, output))


# ---------------------------------------------------------------------- many pictures


@app.command(epilog="Example: flux2max batch prompts.csv --width 1024 --repeat 4 --budget 20")
def batch(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .txt, .jsonl or .csv file, or - for standard input.")],
    *,
    out: Annotated[
        Path | None,
        options.option("--out", metavar="DIR", text="Output folder. Default: flux2max-<FILE's name>.", variable="OUT"),
    ] = None,
    form: Annotated[
        Literal["txt", "jsonl", "csv"] | None,
        typer.Option("--as", metavar="txt|jsonl|csv", help="What FILE is, if its ending doesn't tell."),
    ] = None,
    repeat: Annotated[
        int,
        options.option(
            "--repeat", metavar="N", min=1, text="Pictures per line, with consecutive seeds.", variable="REPEAT"
        ),
    ] = 1,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Prompt for lines that have none.")] = None,
    image: options.Images = None,
    width: options.Width = None,
    height: options.Height = None,
    seed: options.Seed = None,
    output_format: options.Format = None,
    safety_tolerance: options.Tolerance = None,
    webhook_url: Annotated[
        str | None,
        options.option("--webhook-url", metavar="URL", text="Where finished tasks are posted.", variable="WEBHOOK_URL"),
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another parameter of the service.")
    ] = None,
    max_in_flight: Annotated[
        int, options.option("--max-in-flight", metavar="N", text="Tasks running at once.", variable="MAX_IN_FLIGHT")
    ] = 24,
    budget: Annotated[
        str | None,
        options.option("--budget", metavar="DOLLARS", text="Limit for all runs together.", variable="BUDGET"),
    ] = None,
    price_guess: Annotated[
        str | None,
        options.option(
            "--price-guess", metavar="DOLLARS", text="Assumed for a picture until one is paid.", variable="PRICE_GUESS"
        ),
    ] = None,
    task_timeout: options.TaskTimeout = 600.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Submit again what has failed.")] = False,
    resubmit_uncertain: Annotated[
        bool, typer.Option("--resubmit-uncertain", help="Submit again what may exist already (may be paid twice).")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out the lines that are bad.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, and what it would cost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before money is spent.")] = False,
    as_json: options.AsJson = False,
    key_file: options.KeyFile = None,
    base_url: options.BaseUrl = None,
) -> None:
    """Generate the pictures of a file, or go on with them.

    FILE holds a prompt a line (.txt), an object a line (.jsonl), or a table (.csv), whose columns are named as the
    fields: prompt, input_images, seed, width, height, safety_tolerance, output_format, webhook_url, webhook_secret,
    extra, key. Options hold for all lines that don't say otherwise. All lines are checked before anything is sent.

    DIR holds the pictures, index.html to look at them, results.jsonl, and journal.db: with it, the same command again
    pays for nothing twice. Ctrl-C stops submitting and waits for what is running; twice leaves at once.
    """
    from flux2max_async._config import validate_dollars
    from flux2max_async.cli._batch import Batch, do
    from flux2max_async.cli._requests_file import defaults_of
    from flux2max_async.cli._terminal import errors_as_lines
    from flux2max_async.journal._context import ReusePolicy

    access = _access(context, key_file, base_url)
    with errors_as_lines(result=lambda: "the same command goes on"):
        defaults = defaults_of(
            extra or (),
            prompt=prompt,
            input_images=image,
            width=width,
            height=height,
            seed=seed,
            output_format=output_format,
            safety_tolerance=safety_tolerance,
            webhook_url=webhook_url,
            # Not as an option: it would stay in the shell's history.
            webhook_secret=access.variable("FLUX2MAX_WEBHOOK_SECRET"),
        )
        code = do(
            Batch(
                file=file,
                form=form,
                defaults=defaults,
                repeat=repeat,
                skip_bad=skip_bad,
                out=out,
                access=access,
                max_in_flight=max_in_flight,
                task_timeout=task_timeout,
                budget=validate_dollars("budget", budget),
                price_guess=validate_dollars("price_guess", price_guess),
                terms=ReusePolicy(retry_failed, resubmit_uncertain),
                dry_run=dry_run,
                yes=yes,
                as_json=as_json,
                command=_typed(context),
            )
        )
    raise typer.Exit(code)


@app.command(epilog="Example: flux2max journal pictures")
def journal(folder: options.Folder, *, as_json: options.AsJson = False) -> None:
    """Tell what a batch's journal knows.

    Counts, dollars, what is running, and what is uncertain.
    """
    from flux2max_async.cli._inspect import tell_journal
    from flux2max_async.cli._terminal import errors_as_lines

    with errors_as_lines():
        tell_journal(folder, as_json=as_json)


@app.command(epilog="Example: flux2max gallery pictures")
def gallery(folder: options.Folder) -> None:
    """Make a batch's index.html anew, and its results.jsonl."""
    from flux2max_async.cli._inspect import make_gallery
    from flux2max_async.cli._terminal import errors_as_lines

    with errors_as_lines():
        make_gallery(folder)


# ---------------------------------------------------------------------- without a key


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
    from flux2max_async.cli._demo import Demo
    from flux2max_async.emulator import Emulator

    raise typer.Exit(Demo(count, out, Emulator(seconds=seconds, failing=failing)).run())


@app.command(epilog="Example: flux2max emulate --port 8765 --fault server_error=0.1")
def emulate(
    *,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Where to listen; 0 takes any free port.")
    ] = 8765,
    seconds: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="How long most tasks take.")] = 8.0,
    spread: Annotated[
        float, typer.Option(min=0.0, metavar="SHARE", help="Spread of their durations; 0: all alike.")
    ] = 0.3,
    failing: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="SHARE", help="How many tasks fail, from 0 to 1.")
    ] = 0.0,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", help="Share of calls that meet it, as server_error=0.1."),
    ] = None,
    balance: Annotated[
        str | None, typer.Option(metavar="DOLLARS", help="Money in the account; by default, plenty.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="Makes runs repeatable.")] = None,
) -> None:
    """Serve an emulated gateway on 127.0.0.1.

    It is there to try things out without a bill. Put the two lines that it prints into a file .env in another folder,
    and run flux2max there.
    """
    from flux2max_async._config import validate_dollars
    from flux2max_async.cli._emulate import faults_of
    from flux2max_async.cli._terminal import errors_as_lines
    from flux2max_async.emulator import Emulator
    from flux2max_async.emulator.__main__ import serve

    with errors_as_lines():
        gateway = Emulator(
            port=port,
            seconds=seconds,
            spread=spread,
            failing=failing,
            faults=faults_of(fault or ()),
            balance=validate_dollars("balance", balance),
            seed=seed,
            api_key="emulated",  # the same each time, for who has written it down
        )
        serve(gateway)
