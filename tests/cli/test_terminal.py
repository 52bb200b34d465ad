"""What the commands show: tables that fit the terminal, and reasons that are whole."""

import io
from decimal import Decimal
from pathlib import Path

import pytest
from rich.console import Console
from support.commands import Command, visible_lines

import flux2max_async as flux
from flux2max_async.cli._progress import ProgressDisplay
from flux2max_async.cli._rows import Row
from flux2max_async.cli._terminal import Counts, Terminal, describe_error
from flux2max_async.journal._entry import EntryState, JournalEntry

WORDS = " ".join(f"reason{number}" for number in range(40))
PATH = f"can't write to '/{'folder/' * 40}cat.jpeg': No space left on device"


@pytest.mark.parametrize("width", [24, 36, 37, 80])
def test_counts(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """A table that is wider than the terminal becomes a line for each cell; nothing is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    file = io.StringIO()
    Terminal(file).show(Counts({"done": "1,000", "seconds per task": "2.5", "spent": "$70.00"}))
    lines = file.getvalue().splitlines()

    assert max(map(len, lines)) <= width
    if width < 37:
        assert lines == ["done               1,000", "seconds per task     2.5", "spent             $70.00"]
    else:
        assert [cell.strip() for cell in lines[1].split("┃")[1:-1]] == ["done", "seconds per task", "spent"]
        assert [cell.strip() for cell in lines[3].split("│")[1:-1]] == ["1,000", "2.5", "$70.00"]
        assert {len(line) for line in lines} == {37}


@pytest.mark.parametrize(
    ("emulated", "cost"), [(False, "$0.07 of $1.00 spent"), (True, "$0.07 of $1.00 if it were paid")]
)
async def test_cost_in_status_lines(*, emulated: bool, cost: str) -> None:
    """With an emulator, nothing is said to be spent."""
    session = flux.FluxSession("key", base_url="http://127.0.0.1:1")
    display = ProgressDisplay(
        total=1,
        session=session,
        schedule=flux.LearnedSchedule(),
        max_in_flight=1,
        console=Console(file=io.StringIO()),
        budget=Decimal(1),
        spent_before=Decimal("0.07"),
        emulated=emulated,
    )

    assert display.format_rates() == f"{cost}, 0.0 polls a task"


@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.usefixtures("empty_folder")
def test_summary_of_a_demo_on_a_narrow_terminal(
    flux2max: Command, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """At 40 columns, the summary has a line for each number; a file of prompts that is there is left as it is."""
    monkeypatch.setenv("COLUMNS", columns)
    Path("flux2max-demo").mkdir()
    Path("flux2max-demo/prompts.txt").write_text("a cat\n", encoding="utf-8")
    run = flux2max("demo", "--count", "1", "--seconds", "0.05")

    assert run.code == 0
    assert ("spent             $0.07\n" in run.out) is (columns == "40")
    assert ("┃ spent ┃" in run.out) is (columns == "80")
    assert Path("flux2max-demo/prompts.txt").read_text(encoding="utf-8") == "a cat\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (flux.DownloadError(PATH), PATH),
        (flux.TransportError(WORDS), WORDS),
        (flux.DownloadError("x" * 3000), "x" * 1999 + "…"),
        (flux.DownloadError("two\nlines\x1b[2J"), "two lines [2J"),
        (flux.TaskFailedError("no\r\nway", task_id="t1"), "no way"),
        (flux.TaskFailedError("x" * 300, task_id="t1"), "x" * 199 + "…"),
        (
            flux.BadRequestError("x" * 300, status=400, code="7", request_id="r1"),
            "x" * 199 + "… (HTTP 400, code 7, request r1)",
        ),
    ],
)
def test_describe_error(error: flux.FluxError, text: str) -> None:
    """Only what the service says is shortened, and what follows it is kept."""
    assert describe_error(error) == text


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (flux.TransportError(WORDS, maybe_sent=False), "TransportError", WORDS),
        (flux.BadRequestError("x" * 300, status=400), "BadRequestError", "x" * 199 + "…"),
        (flux.ContentModeratedError("x" * 300, task_id="t1"), "ContentModeratedError", "x" * 199 + "…"),
    ],
)
def test_reasons_of_rows(error: flux.FluxError, kind: str, text: str) -> None:
    """A row's reason is whole, unless it is the service's, whether it is of this run, the journal or results.jsonl."""
    request = flux.GenerationRequest("a cat", key="k")
    row = Row("k", "a cat")
    row.update(flux.Failed(task_id=None, request=request, error=error, elapsed=0.0, polls=0))
    entry = JournalEntry(
        key="k",
        fingerprint="f",
        request={"prompt": "a cat"},
        state=EntryState.REFUSED,
        result={"error": {"kind": kind, "message": error.message}},
    )
    written = row.to_dict()

    assert row.reason == text
    assert written["error"] == text
    assert Row.from_entry(entry, Path()).reason == text
    assert Row.from_dict(written).reason == text


async def test_reasons_on_the_display() -> None:
    """The display wraps reasons, and cuts none."""
    session = flux.FluxSession("key", base_url="http://127.0.0.1:1")
    file = io.StringIO()
    console = Console(file=file, width=40, force_terminal=True, color_system=None)
    display = ProgressDisplay(2, session, flux.LearnedSchedule(), 1, console)
    request = flux.GenerationRequest("a cat", key="k")
    error = flux.TransportError(WORDS, maybe_sent=False)
    display.record("cat", flux.Failed(task_id=None, request=request, error=error, elapsed=0.0, polls=0))
    display.log_message = PATH
    console.print(display)
    lines = visible_lines(file.getvalue())
    shown = "".join(line.strip() for line in lines).replace(" ", "")

    assert all(len(line) <= 40 for line in lines)
    assert WORDS.replace(" ", "") in shown
    assert PATH.replace(" ", "") in shown
