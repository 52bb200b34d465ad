"""The command `batch`: read and check the file, show the plan and ask for consent, run it, and print the summary."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import attrs
import typer

import flux2max_async as flux
from flux2max_async.cli._config import ServiceSettings
from flux2max_async.cli._file_formats import FORMATS, guess_format
from flux2max_async.cli._gallery import write_outputs
from flux2max_async.cli._journals import share_limit, without_password
from flux2max_async.cli._output_dir import OutputDir
from flux2max_async.cli._own_files import reject_foreign_files
from flux2max_async.cli._plan import Action, Plan, find_orphans, make_plan, reject_key_conflicts, round_up
from flux2max_async.cli._requests_file import Line, RequestsFile, read_requests_file
from flux2max_async.cli._runner import Batch, Report, run
from flux2max_async.cli._stored_pictures import StoredPictures
from flux2max_async.cli._summary import Command, display_state, suggest_command, summary
from flux2max_async.cli._terminal import (
    Terminal,
    can_prompt,
    describe_error,
    format_pictures,
    print_error,
    print_status,
    print_verbatim,
    to_single_line,
)
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._lookup import ReusePolicy
from flux2max_async.storage import ObjectStorage

_STANDARD_INPUT = "-"
_MAX_SHOWN_KEYS = 3
"""The number of requests that a message names."""
_MAX_VALUE_LENGTH = 100
"""Characters of a parameter that a dry run shows."""


@attrs.frozen(kw_only=True)
class BatchOptions:
    """The options of the command."""

    file: str
    file_format: str | None
    """One of `FORMATS`; None infers it from the suffix, or from the content of standard input."""
    defaults: Mapping[str, Any] = attrs.field(repr=False)
    """The fields of lines that don't set them."""
    repeat: int
    skip_bad: bool
    out: Path | None
    journal: str | None = attrs.field(repr=False)
    """The path or address of a journal; None if it is in the output folder."""
    store: str | None = None
    """The URL of the object storage for the pictures; None if they go into the output folder."""
    settings: ServiceSettings
    emulated: bool
    """Whether an emulator takes the place of the service."""
    max_in_flight: int
    task_timeout: float
    budget: Decimal | None
    price_guess: Decimal | None
    reuse_policy: ReusePolicy
    dry_run: bool
    yes: bool
    as_json: bool
    command: Command
    """The command line itself."""


def run_batch(options: BatchOptions) -> int:
    """Run a batch, or continue it, and return the exit code.

    Raises:
        FluxError: The batch couldn't be started.
    """
    with contextlib.ExitStack() as stack:
        return _run_batch(options, stack)


def _run_batch(options: BatchOptions, stack: contextlib.ExitStack) -> int:
    storage = None if options.store is None else ObjectStorage.from_url(options.store)
    requests_file = _read_requests(options)
    if options.journal is not None:
        options.settings.check_addresses()  # before anything is read there
        if options.emulated:
            raise flux.ConfigurationError(
                "--emulator has a journal of its own, in the output folder: leave --journal out"
            )
    output_dir = OutputDir(
        options.out or _default_folder(options),
        emulated=options.emulated,
        shared_journal=options.journal,
        keys={line.key for line in requests_file.lines},
    )
    reject_foreign_files(output_dir.path)
    entries = asyncio.run(output_dir.open_journal())  # reports a folder that can't be read
    output_dir.reject_mixture()
    requests_file = reject_key_conflicts(requests_file, entries)
    if not _check_lines(options, requests_file):
        return 2
    orphans, lost = find_orphans(requests_file.lines, entries)
    lines = [*requests_file.lines, *orphans]
    plan = _make_plan(options, output_dir, lines, entries, options.reuse_policy)
    settings = _start_emulator(options, entries, stack) if options.emulated else options.settings
    session = settings.create_session(
        needs_key=not options.dry_run,
        max_in_flight=share_limit(options.journal, options.max_in_flight),
        task_timeout=options.task_timeout,
        budget=options.budget,
        price_guess=options.price_guess,
        journal=output_dir.open_session_journal(),
    )
    _report_lost(plan, output_dir)
    if options.dry_run:
        _show_dry_run(options, plan)
        return 0
    _show_plan(options, plan, orphans, lost)
    if (code := _ask_for_consent(options, plan)) is not None:
        return code
    output_dir.create()
    output_dir.update_rows(lines, entries)
    batch = Batch(
        output_dir=output_dir,
        storage=storage,
        stored=None if options.store is None else StoredPictures.from_url(options.store),
        plan=plan,
        session=session,
        schedule=cast("flux.LearnedSchedule", session.schedule),  # the session's own: none was given
        max_in_flight=options.max_in_flight,
        budget=options.budget,
        as_json=options.as_json,
    )
    report = asyncio.run(run(batch))
    code = _finish(options, batch, requests_file.lines, orphans, report)
    if report.output_blocked:
        os._exit(code)
    return code


def _make_plan(
    options: BatchOptions,
    output_dir: OutputDir,
    lines: Sequence[Line],
    entries: Sequence[JournalEntry],
    reuse_policy: ReusePolicy,
) -> Plan:
    plan = make_plan(lines, entries, reuse_policy, options.price_guess, lost=output_dir.lost)
    return attrs.evolve(plan, committed=plan.committed + output_dir.committed_elsewhere)


def _start_emulator(
    options: BatchOptions, entries: Sequence[JournalEntry], stack: contextlib.ExitStack
) -> ServiceSettings:
    """Run an emulator until the stack is closed, and return the settings to use it."""
    from flux2max_async.cli._emulated import run_emulator  # noqa: PLC0415 - it needs the extra `emulator`

    gateway = stack.enter_context(run_emulator(entries, options.max_in_flight))
    return options.settings.with_emulator(gateway.url, gateway.api_key)


def _default_folder(options: BatchOptions) -> Path:
    """Return an output folder named after the file.

    Raises:
        ConfigurationError: The name would be another one in the next run, which then would pay for everything again.
    """
    suffix = "-emulator" if options.emulated else ""
    if options.file == _STANDARD_INPUT:
        return Path(f"flux2max-batch{suffix}")
    if not Path(options.file).is_file():
        raise flux.ConfigurationError(f"{options.file!r} is not a regular file: specify the output folder with --out")
    return Path(f"flux2max-{Path(options.file).stem}{suffix}")


def _read_requests(options: BatchOptions) -> RequestsFile:
    """Read the requests file.

    Raises:
        ConfigurationError: The file can't be read, or its format is unknown.
    """
    is_stdin, path = options.file == _STANDARD_INPUT, Path(options.file)
    try:
        data = sys.stdin.buffer.read() if is_stdin else path.read_bytes()
    except OSError as error:
        raise flux.ConfigurationError(f"can't read {options.file!r}: {error.strerror}") from error
    file_format = options.file_format
    if file_format is None and is_stdin:
        file_format = guess_format(data)
        if file_format is None:
            raise flux.ConfigurationError("standard input may be prompts or a table: specify the format with --as")
    file_format = file_format or path.suffix.lower().removeprefix(".")
    if file_format not in FORMATS:
        listed = f"{', '.join(f'.{name}' for name in FORMATS[:-1])} or .{FORMATS[-1]}"
        raise flux.ConfigurationError(f"{options.file!r} is not {listed}: specify the format with --as")
    folder = Path() if is_stdin else path.parent
    return read_requests_file(data, file_format, folder=folder, defaults=options.defaults, repeat=options.repeat)


def _check_lines(options: BatchOptions, requests_file: RequestsFile) -> bool:
    """Report bad lines, and check whether the batch can go on."""
    for note in requests_file.notes:
        print_status(f"{options.file}: {note}")
    for bad in requests_file.bad_lines:
        print_status(f"{options.file}:{bad.number}: {bad.field}: {bad.reason}")
    if requests_file.bad_lines and not options.skip_bad:
        count = len({bad.number for bad in requests_file.bad_lines})
        problem = "1 line is bad" if count == 1 else f"{count} lines are bad"
        advice = "; --skip-bad skips bad lines" if requests_file.lines else ""
        print_error(f"{problem}, so nothing was sent{advice}")
        return False
    if not requests_file.lines:
        print_error(f"{options.file} has no {'other lines' if requests_file.bad_lines else 'prompts'}")
        return False
    return True


def _show_plan(options: BatchOptions, plan: Plan, orphans: Sequence[Line], lost: Sequence[JournalEntry]) -> None:
    note = " (by the emulator: nothing is paid)" if options.emulated else ""
    print_status(f"{plan.describe(options.budget)}{note}")
    if orphans:
        print_status(f"{len(orphans)} of them: no longer in {options.file}, but already paid for")
    for entry in lost:
        print_error(
            f"{options.file} no longer has {entry.key}, which was submitted; "
            f"to save its picture: flux2max download {entry.task_id}"
        )


def _report_lost(plan: Plan, output_dir: OutputDir) -> None:
    """Name the requests that are not submitted because they may be paid for, although the journal doesn't know it."""
    skipped = [key for key, action in plan.actions.items() if action is Action.SKIP_LOST]
    if output_dir.shared_journal is not None:
        if skipped:
            print_error(
                f"the journal {without_password(output_dir.shared_journal)} was pruned, is damaged, or is another one: "
                f"it lacks {format_pictures(len(skipped))} that {output_dir.results_path.name} has as paid for, so "
                f"they are not submitted: {_shorten_list(skipped)}; to pay for them again: --resubmit-uncertain"
            )
        return
    journal, results = output_dir.journal_path, output_dir.results_path.name
    if keys := [key for key in skipped if key not in output_dir.damaged]:
        print_error(
            f"{journal} was lost or replaced, or pruned: it lacks {format_pictures(len(keys))} that {results} has as "
            f"paid for, so they are not submitted: {_shorten_list(keys)}; put the right {journal.name} and "
            f"{journal.name}-wal back, or pay for them again with --resubmit-uncertain"
        )
    if keys := [key for key in skipped if key in output_dir.damaged]:
        print_error(
            f"{journal} is damaged where it has {format_pictures(len(keys))}, which may be paid for and are not "
            f"submitted: {_shorten_list(keys)}; put a backup of {journal.name} back, or pay for them again with "
            "--resubmit-uncertain"
        )


def _shorten_list(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_MAX_SHOWN_KEYS]) + (", …" if len(keys) > _MAX_SHOWN_KEYS else "")


def _show_dry_run(options: BatchOptions, plan: Plan) -> None:
    """Print the requests that would be submitted; as JSON, print all requests."""
    for item in plan.lines:
        price = plan.prices.get(item.key)
        params = dict(item.content.description)
        if options.as_json:
            action = plan.actions[item.key].value
            cost = None if price is None else str(round_up(price))
            row = {"key": item.key, "line": item.number, "fate": action, "cost": cost, "params": params}
            typer.echo(json.dumps(row))
        elif price is not None:
            prompt = params.pop("prompt")
            others = "".join(f", {name} {_truncate(value)}" for name, value in params.items())
            typer.echo(to_single_line(f"{item.key}: {prompt}{others}, ${round_up(price)}"))
    print_status(f"dry run: {plan.describe(options.budget)}")


def _truncate(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 1]}…"


def _ask_for_consent(options: BatchOptions, plan: Plan) -> int | None:
    """Ask on the terminal before money is spent; return the exit code without consent, and None with it.

    Without a terminal, no consent is needed.
    """
    if options.yes or options.emulated or not plan.prices:
        return None
    if can_prompt():
        if typer.confirm("Go on?", err=True):
            return None
        print_error("nothing was sent")
        return 1
    if sys.stderr.isatty():
        print_error("can't ask for confirmation, so nothing was sent: add --yes to go ahead")
        return 2
    return None


def _finish(options: BatchOptions, batch: Batch, lines: Sequence[Line], orphans: Sequence[Line], report: Report) -> int:
    """Write the results and the gallery, print the summary, and return the exit code.

    Args:
        options: The options of the command.
        batch: The batch.
        lines: The requests in the file.
        orphans: The requests that an earlier run has left.
        report: The result of the run.
    """
    output_dir, gallery = batch.output_dir, batch.gallery
    # The journal decides: it also has what other processes have done meanwhile.
    entries = asyncio.run(output_dir.read_journal())
    output_dir.update_rows([*lines, *orphans], entries)
    write_error = write_outputs(output_dir, list(output_dir.rows.values()), gallery, running=False)
    rows = [output_dir.rows[item.key] for item in lines]
    next_plan = _make_plan(options, output_dir, lines, entries, ReusePolicy())
    Terminal(sys.stderr if options.as_json else sys.stdout).show(
        *summary(rows, report, next_plan.spent, emulated=options.emulated)
    )
    if write_error is not None:
        print_error(write_error)
    if report.error is not None:
        print_error(f"stopped: {describe_error(report.error)}")
    done = sum(display_state(row) == "done" for row in rows)
    hint = "" if write_error else f"; to view them: {gallery.path}"
    print_status(f"{done} of {format_pictures(len(rows))} in {output_dir.path}{hint}")
    if (suggestion := suggest_command(options.command, rows, report, next_plan, options.budget)) is not None:
        purpose, command = suggestion
        condition = " (with the same standard input)" if options.file == _STANDARD_INPUT else ""
        print_verbatim(f"{purpose}{condition}: {command}")
    elif options.emulated:
        # In a folder of its own: the emulator's pictures are no part of it.
        print_verbatim(f"for pictures of the service: {options.command.render(without=('--emulator', '--out'))}")
    if done == len(rows) and write_error is None and not report.stdout_failed and not report.output_blocked:
        return 0
    return 128 + report.signals[0] if report.signals else 1
