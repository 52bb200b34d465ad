"""The subcommands of `flux2max journal`."""

from typing import Any

import typer
from typer.core import TyperGroup

from flux2max_async.cli import _options as options


class _JournalGroup(TyperGroup):
    """The group; earlier versions took the folder in the place of a subcommand."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"{args[0]!r} is not a subcommand; to show a journal: {ctx.command_path} show PATH")
        return super().resolve_command(ctx, args)


journal = typer.Typer(cls=_JournalGroup, no_args_is_help=True, rich_markup_mode=None)


@journal.callback(epilog="Example: flux2max journal show pictures")
def _journal() -> None:
    """Show a batch's journal, or prune it."""


@journal.command(epilog="Example: flux2max journal show pictures")
def show(path: options.JournalPlace, *, as_json: options.AsJson = False) -> None:
    """Show what a journal contains.

    Prints counts, dollars, and the requests that are running or uncertain.
    """
    from flux2max_async.cli._inspect import print_journal
    from flux2max_async.cli._terminal import report_errors

    with report_errors():
        print_journal(path, as_json=as_json)


@journal.command(epilog="Example: flux2max journal prune pictures --older-than 30d")
def prune(path: options.JournalPlace, *, older_than: options.OlderThan) -> None:
    """Forget old requests that have ended, and make the file smaller.

    Running and uncertain requests are kept, and so are all pictures. What was paid still counts against a budget. A
    program that makes a forgotten request again pays for it again; flux2max batch does so only with
    --resubmit-uncertain, as long as results.jsonl is there.
    """
    from flux2max_async.cli._inspect import prune_journal
    from flux2max_async.cli._terminal import report_errors

    with report_errors():
        prune_journal(path, older_than)
