"""What an inbox counts and logs: each kind of delivery, in bounded memory and few lines."""

import logging
import threading
import time
import tracemalloc
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from support.scripted import ScriptedGateway, answer, completed, running
from support.virtual_time import VirtualJournal
from support.webhooks import InboxServer, deliver, session_on, sign

from flux2max_async import JournalEntry, JournalError, ProtocolError, SessionClosedError, WebhookSignatureError
from flux2max_async.webhooks import MAX_BODY, WebhookStats
from flux2max_async.webhooks._dispatcher import Receipt
from flux2max_async.webhooks._monitor import DeliveryMonitor, Kind

LOGGER = "flux2max_async.webhooks"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@attrs.define
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------------- the monitor


def test_each_kind_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """A kind is logged at once, and then at most once a second, with the number since its last line."""
    monitor = DeliveryMonitor(clock := Clock())
    for moment in range(25):  # ten a second
        clock.now = moment / 10
        monitor.record("forged", f"forgery {moment}")
        if moment % 20 == 0:
            monitor.record("stale", "too old")

    assert lines(caplog) == [
        "webhook refused: forgery 0",
        "webhook refused: too old",
        "webhook refused (10 since the last line like this): forgery 10",
        "webhook refused (10 since the last line like this): forgery 20",
        "webhook refused: too old",
    ]
    assert monitor.stats == WebhookStats(forged=25, stale=2)


KINDS: dict[Kind, int] = {
    "repeated": logging.INFO,
    "unknown": logging.INFO,
    "forged": logging.WARNING,
    "stale": logging.WARNING,
    "unreadable": logging.WARNING,
    "too_large": logging.WARNING,
    "too_slow": logging.WARNING,
    "too_many": logging.WARNING,
    "not_processed": logging.WARNING,
    "failed": logging.ERROR,
}


def test_kinds_and_their_levels(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind has a count and a level: what needs no attention is not a warning."""
    monitor = DeliveryMonitor()
    for kind in KINDS:
        monitor.record(kind, "-")

    assert set(KINDS) | {"accepted"} == {field.name for field in attrs.fields(WebhookStats)}
    assert [record.levelno for record in caplog.records] == list(KINDS.values())
    assert monitor.stats == WebhookStats(**dict.fromkeys(KINDS, 1))


@pytest.mark.parametrize("control", ["\n", "\r", "\x1b[2J", "\x85", "\x9b", "\u202e", "\u2028", "\ud800", "\0"])
def test_log_lines_are_printable(control: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is in a task id or an error, a log line is short and printable."""
    monitor = DeliveryMonitor()
    monitor.record("unreadable", ProtocolError(control + "x" * 10_000))
    monitor.accept(b"", control + "x" * 10_000, known=False)

    assert all(line.isprintable() and len(line) < 300 for line in lines(caplog))
    assert len(lines(caplog)) == 2


def test_repeated_deliveries() -> None:
    """A delivery is repeated if it equals one of the last 1,000 that were accepted."""
    monitor = DeliveryMonitor()
    monitor.accept(b"first", "t1", known=True)
    for number in range(999):
        monitor.accept(b"%d" % number, "t2", known=number % 2 == 0)
    monitor.accept(b"first", "t1", known=False)
    within = monitor.stats
    monitor.accept(b"0", "t2", known=True)
    monitor.accept(b"one more", "t3", known=True)
    monitor.accept(b"1", "t2", known=True)

    assert within == WebhookStats(accepted=1001, repeated=1, unknown=499)
    assert monitor.stats == WebhookStats(accepted=1004, repeated=2, unknown=499)


def test_several_threads() -> None:
    """Nothing is lost if several threads receive deliveries."""
    monitor = DeliveryMonitor()

    def receive() -> None:
        for number in range(500):
            monitor.record("forged", "-")
            monitor.accept(b"%d" % number, "t1", known=True)

    threads = [threading.Thread(target=receive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert monitor.stats == WebhookStats(accepted=2000, repeated=1500, forged=2000)


# ---------------------------------------------------------------------- the inbox


async def test_inbox_counts_each_delivery(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each delivery has one kind, and each kind is logged."""
    inbox = inbox_server.inbox
    scripted.polls = deque([answer(200, running("t1"))])
    old = {"id": "t1", "status": "Ready", "timestamp": "2020-01-01T00:00:00Z", "result": {"sample": "https://x/"}}
    refused: list[tuple[tuple[bytes, Any], type[Exception]]] = [
        ((sign(completed("t1"))[0], {}), WebhookSignatureError),
        (sign(completed("t1"), "another secret"), WebhookSignatureError),
        (sign(old), WebhookSignatureError),
        (sign(b"{"), ProtocolError),
        (sign(b" " * (MAX_BODY + 1), "another secret"), ProtocolError),
    ]
    with pytest.raises(SessionClosedError):
        await deliver(inbox, completed("t1"))
    async with session_on(scripted, inbox) as session:
        task = await session.submit("a cat")
        for (body, headers), error in refused:
            with pytest.raises(error):
                await inbox.deliver(body, headers)
        await deliver(inbox, running("t1"))
        await deliver(inbox, completed("t1"))
        await task
        await deliver(inbox, completed("t1"))
        await deliver(inbox, completed("t2"))

    assert inbox.stats == WebhookStats(
        accepted=4, repeated=1, unknown=1, forged=2, stale=1, unreadable=2, not_processed=1
    )
    assert len(lines(caplog)) == 6


class FailingJournal(VirtualJournal):
    failing = True

    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        if self.failing:
            raise JournalError("the disk is full")
        return await super().find_task(task_id)


async def test_delivery_that_is_sent_again_is_not_a_repeat(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """A delivery that could not be processed, and is therefore sent again, is no repeated one."""
    journal = FailingJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal):
        with pytest.raises(JournalError):
            await deliver(inbox_server.inbox, completed("t9"))
        journal.failing = False
        await deliver(inbox_server.inbox, completed("t9"))

    assert inbox_server.inbox.stats == WebhookStats(accepted=1, unknown=1, not_processed=1)


async def test_not_found_is_known(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery that says that a followed task doesn't exist is about a known task all the same."""
    async with session_on(scripted, inbox_server.inbox) as session:
        await session.submit("a cat")
        receipts = [
            await inbox_server.inbox.dispatcher.dispatch(sign({"id": name, "status": "Task not found"})[0])
            for name in ("t1", "t2")
        ]

    assert receipts == [Receipt("t1", known=True), Receipt("t2", known=False)]


# ---------------------------------------------------------------------- floods


def forged(number: int) -> tuple[bytes, dict[str, str]]:
    """Return one of several kinds of forged deliveries."""
    body, headers = sign(completed(f"t{number}\n\x1b[2J", prompt="x" * 1_000), "another secret")
    match number % 4:
        case 0:
            return body, {}
        case 1:
            return body, {"X-BFL-Signature": "," * 8_000}
        case 2:
            return body, {"x-bfl-signature": ",".join([headers["X-BFL-Signature"]] * 100)}
        case _:
            return body, headers


async def test_flood_of_forged_deliveries(
    scripted: ScriptedGateway, inbox_server: InboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """20,000 forged deliveries cost bounded memory and few log lines; good ones among them end their tasks."""
    caplog.set_level(logging.WARNING, LOGGER)
    scripted.submits = deque(answer(200, running(f"t{number}")) for number in range(5))
    scripted.polls = deque([answer(200, running("t0"))])
    inbox = inbox_server.inbox
    async with session_on(scripted, inbox) as session:
        tasks = [await session.submit(f"picture {number}") for number in range(5)]
        start = time.monotonic()
        tracemalloc.start()
        for number in range(20_000):
            with pytest.raises(WebhookSignatureError):
                await inbox.deliver(*forged(number))
            if number % 4_000 == 2_000:
                await deliver(inbox, completed(f"t{number // 4_000}"))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        elapsed = time.monotonic() - start
        outcomes = [await task.outcome() for task in tasks]

    assert all(outcome.ok for outcome in outcomes)
    assert inbox.stats == WebhookStats(accepted=5, forged=20_000)
    assert len(lines(caplog)) <= 1 + elapsed
    assert peak < 4_000_000


async def test_flood_of_signed_deliveries(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Signed deliveries about unknown tasks cost bounded memory and few lookups, even if their JSON needs much memory."""
    caplog.set_level(logging.INFO, LOGGER)
    filler = [[] for _ in range(1_200)]  # type: list[list[object]]
    inbox = inbox_server.inbox
    async with session_on(scripted, inbox, journal=VirtualJournal(tmp_path / "run.db")):
        tracemalloc.start()
        for number in range(3_000):
            await deliver(inbox, completed(f"x{number}", metadata={"filler": filler}))
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await anyio.sleep(120.0)

    assert inbox.stats == WebhookStats(accepted=3_000, unknown=3_000)
    assert current < 64 * 2**20
