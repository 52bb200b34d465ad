"""Submits whose answers are lost: a delivery with the token of a submit reveals its task, now or in a later run."""

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, reset, running
from support.virtual_time import VirtualJournal
from support.webhooks import SECRET, deliver, session_on, sign

from flux2max_async import (
    Completed,
    Failed,
    FixedSchedule,
    FluxSession,
    GeneratedImage,
    JournalError,
    ProtocolError,
    SessionClosedError,
    SqliteJournal,
    SubmissionUncertainError,
    TaskFailedError,
    TaskSnapshot,
    TaskStatus,
    WebhookInbox,
    WebhookSignatureError,
)
from flux2max_async.journal import EntryState, Holder, Journal, JournalEntry
from flux2max_async.webhooks._registry import WebhookRegistry
from flux2max_async.webhooks._tokens import token_of

URL = "https://app.example/hooks"
TOKEN = "a-token"
TOKEN_URL = f"{URL}?flux2max_submit={TOKEN}"
FAILED = {"id": "t1", "status": "failed", "error": {"code": "x", "message": "no"}}
NO_TASK = {"id": "t1", "status": "Task not found"}

in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.fixture
def inbox() -> WebhookInbox:
    return WebhookInbox(secret=SECRET, public_url=URL)


def intent(key: str = "k", **changes: Any) -> JournalEntry:
    """Return the intent of a submit with the token."""
    return JournalEntry(
        key=key,
        fingerprint="c1",
        request={"prompt": "a cat"},
        holder=Holder.US,
        committed=Decimal("0.10"),
        **{"webhook_token": TOKEN, **changes},
    )


async def only_entry(path: Path) -> JournalEntry:
    (entry,) = [entry async for entry in SqliteJournal(path).entries()]
    return entry


def delivery_url(gateway: ScriptedGateway, submit: int = 0) -> str:
    """Return the webhook URL that a submit named."""
    return str(gateway.of("POST")[submit].params["webhook_url"])


# ---------------------------------------------------------------------- the registry


async def test_expected_submits() -> None:
    """A submit is expected until it is forgotten or its future is cancelled; its future holds the first delivery."""
    registry = WebhookRegistry()
    first, second = (TaskSnapshot(task_id="t1", status=status) for status in list(TaskStatus)[1:3])
    future, cancelled = registry.expect("a"), registry.expect("b")
    cancelled.cancel()
    before = future.done()
    results = [registry.resolve(token, first) for token in ("a", "b", "unknown", None)]
    again = registry.resolve("a", second)
    registry.forget("a")
    registry.forget("a")

    assert not before
    assert results == [True, False, False, False]
    assert again
    assert future.result() is first
    assert not registry.resolve("a", second)


# ---------------------------------------------------------------------- deliveries, without a journal


@asynccontextmanager
async def expecting(
    scripted: ScriptedGateway, inbox: WebhookInbox, **settings: Any
) -> AsyncIterator["asyncio.Future[TaskSnapshot]"]:
    """Open a session that expects a submit with the token."""
    async with session_on(scripted, inbox, **settings):
        yield inbox.dispatcher.registry.expect(TOKEN)


@pytest.mark.parametrize("url", [TOKEN_URL, f"/hooks?a=1&flux2max_submit={TOKEN}", f"?flux2max_submit={TOKEN}#"])
@pytest.mark.parametrize("payload", [completed("t1"), FAILED, running("t1", progress=0.5)])
async def test_delivery_with_a_token(
    scripted: ScriptedGateway, inbox: WebhookInbox, url: str, payload: dict[str, Any]
) -> None:
    """A delivery with the token of an expected submit resolves it, whether the task has ended or not."""
    async with expecting(scripted, inbox) as future:
        await deliver(inbox, payload, url=url)
        snapshot = future.result()

    assert (snapshot.task_id, snapshot.status) == ("t1", payload["status"])


@pytest.mark.parametrize(
    "url", [None, "", URL, f"{URL}?flux2max_submit=another", f"{TOKEN_URL}&flux2max_submit=another", f"{URL}#{TOKEN}"]
)
async def test_delivery_without_the_token(scripted: ScriptedGateway, inbox: WebhookInbox, url: str | None) -> None:
    """Without the token, or with another one, a delivery resolves nothing."""
    async with expecting(scripted, inbox) as future:
        for payload in (running("t1"), completed("t1")):
            await deliver(inbox, payload, url=url)

        assert not future.done()


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        sign(completed("t1"), "another secret"),
        (sign(completed("t1"))[0], {}),
        (sign(completed("t2"))[0], sign(completed("t1"))[1]),
        sign({**completed("t1"), "timestamp": 1}),
    ],
)
async def test_token_of_an_invalid_delivery(
    scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path, body: bytes, headers: dict[str, str]
) -> None:
    """A token counts only if the signature is valid and recent: a forged or replayed delivery changes nothing."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with expecting(scripted, inbox, journal=journal) as future:
        await journal.begin(intent())
        with pytest.raises(WebhookSignatureError):
            await inbox.deliver(body, headers, url=TOKEN_URL)
        entry = await journal.find("k")

        assert not future.done()
        assert entry is not None
        assert (entry.state, entry.task_id) == (EntryState.INTENT, None)


@pytest.mark.parametrize("payload", [{"id": "t1"}, {"status": "completed"}, b"{", NO_TASK])
async def test_delivery_that_reveals_no_task(
    scripted: ScriptedGateway, inbox: WebhookInbox, payload: dict[str, Any] | bytes
) -> None:
    """A delivery that says that there is no such task doesn't resolve its submit; of others, an id is enough."""
    async with expecting(scripted, inbox) as future:
        if payload == NO_TASK:
            await deliver(inbox, payload, url=TOKEN_URL)
        else:
            with pytest.raises(ProtocolError):
                await deliver(inbox, payload, url=TOKEN_URL)

        assert future.done() is (payload == {"id": "t1"})


async def test_delivery_before_the_answer_that_is_not_lost(scripted: ScriptedGateway, inbox: WebhookInbox) -> None:
    """If the answer comes after all, its listener finds the delivery by the task's id, like any early one."""
    async with session_on(scripted, inbox) as session:
        inbox.dispatcher.registry.expect(TOKEN)
        await deliver(inbox, running("t1"), url=TOKEN_URL)
        await deliver(inbox, completed("t1"), url=TOKEN_URL)
        done = await session.submit("a cat")
        outcome = await done

    assert outcome.polls == 0
    assert scripted.of("GET") == []


async def test_expected_delivery_while_the_session_drains(scripted: ScriptedGateway, inbox: WebhookInbox) -> None:
    """While a session drains, only deliveries about tasks that it knows, or submits that it expects, are accepted."""
    scripted.polls = deque([answer(200, running("t1"))])
    session = session_on(scripted, inbox)
    async with session:
        future = inbox.dispatcher.registry.expect(TOKEN)
        await session.submit("a cat")
        closing = asyncio.ensure_future(session.aclose(drain=20.0))
        await asyncio.sleep(5.0)
        await deliver(inbox, completed("t2"), url=TOKEN_URL)
        with pytest.raises(SessionClosedError):
            await deliver(inbox, completed("t3"), url=f"{URL}?flux2max_submit=another")
        await closing

    assert future.result().task_id == "t2"


@pytest.mark.parametrize("url", [b"/hooks", 1, object()])
async def test_url_that_is_not_text(inbox: WebhookInbox, url: Any) -> None:
    """A URL of another type is an InvalidRequestError that names `url`."""
    with pytest.raises(ValueError, match="url must be text") as caught:
        await inbox.deliver(*sign(completed("t1")), url=url)

    assert getattr(caught.value, "field", None) == "url"


# ---------------------------------------------------------------------- deliveries, with a journal


@pytest.mark.parametrize(
    ("payload", "state", "committed"),
    [
        (completed("t1"), EntryState.COMPLETED, "0.07"),
        ({"id": "t1", "status": "Ready", "result": {"sample": "https://p.example/1.jpeg"}}, "completed", "0.1"),
        (FAILED, EntryState.FAILED, "0"),
        (running("t1"), EntryState.SUBMITTED, "0.1"),
    ],
)
@pytest.mark.parametrize("expected", [True, False])
async def test_id_is_recorded_before_the_response(
    scripted: ScriptedGateway,
    inbox: WebhookInbox,
    tmp_path: Path,
    payload: dict[str, Any],
    state: str,
    committed: str,
    expected: bool,
) -> None:
    """When `deliver()` returns, the id and the end are in the intent's entry, whether or not a runner waits for them."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox, journal=journal):
        await journal.begin(intent())
        if expected:
            inbox.dispatcher.registry.expect(TOKEN)
        for _ in range(2):  # a repeated delivery
            await deliver(inbox, payload, url=TOKEN_URL)
        entry = await journal.find("k")
        early = inbox.dispatcher.registry._early

    assert entry is not None
    assert (entry.state, entry.task_id, str(entry.committed.normalize())) == (state, "t1", committed)
    # A session that goes on with the submit keeps its entry.
    assert entry.holder is (Holder.US if expected else None)
    assert set(early) == ({"t1"} if expected and state != "submitted" else set())


async def test_running_task_that_then_ends(scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path) -> None:
    """A submit whose task was first reported as running keeps its entry when the end arrives."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox, journal=journal):
        future = inbox.dispatcher.registry.expect(TOKEN)
        await journal.begin(intent())
        entries: list[JournalEntry | None] = []
        for payload in (running("t1"), completed("t1"), running("t1")):
            await deliver(inbox, payload, url=TOKEN_URL)
            entries.append(await journal.find("k"))

    assert [entry and (entry.state, entry.holder) for entry in entries] == [
        ("submitted", Holder.US), ("completed", Holder.US), ("completed", Holder.US),
    ]  # fmt: skip
    assert future.result().status is TaskStatus.IN_PROGRESS


async def test_token_of_another_task(scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path) -> None:
    """A token whose submit is another task already doesn't change that task's entry."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox, journal=journal):
        await journal.begin(intent())
        await deliver(inbox, running("t1"), url=TOKEN_URL)
        before = await journal.find("k")
        await deliver(inbox, completed("t2"), url=TOKEN_URL)
        after = await journal.find("k")

    assert before == after


class FailingJournal(VirtualJournal):
    """A journal whose writes fail while `fails` is set."""

    fails = False

    async def record(self, entry: JournalEntry, /) -> None:
        if self.fails:
            raise JournalError("the disk is full")
        await super().record(entry)


async def test_delivery_that_cannot_be_recorded(scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path) -> None:
    """If the id can't be recorded, `deliver()` raises, so that the service tries again; the submit is resolved."""
    journal = FailingJournal(tmp_path / "run.db")
    async with expecting(scripted, inbox, journal=journal) as future:
        await journal.begin(intent())
        journal.fails = True
        with pytest.raises(JournalError, match="disk is full"):
            await deliver(inbox, completed("t1"), url=TOKEN_URL)
        resolved = future.done()
        journal.fails = False
        await deliver(inbox, completed("t1"), url=TOKEN_URL)
        entry = await journal.find("k")

    assert resolved
    assert entry is not None
    assert entry.state is EntryState.COMPLETED


class OlderJournal(Journal):
    """A journal of a user's own, written before tokens were known."""

    def __init__(self, path: Path) -> None:
        self._journal = VirtualJournal(path)
        for name in ("open", "close", "find", "find_task", "begin", "adopt", "record", "changed", "entries"):
            setattr(self, name, getattr(self._journal, name))


async def test_journal_without_tokens(scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path) -> None:
    """With a journal that stores no tokens, a delivery resolves its submit, and is recorded when the id is known."""
    async with expecting(scripted, inbox, journal=OlderJournal(tmp_path / "run.db")) as future:  # type: ignore[abstract]
        await deliver(inbox, completed("t1"), url=TOKEN_URL)
        await deliver(inbox, running("t2"), url=TOKEN_URL)

        assert future.result().task_id == "t1"
        assert set(inbox.dispatcher.registry._early) == {"t1"}


async def test_partial_error_and_inline_image_are_recorded(
    scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path
) -> None:
    """What a delivery says about missing images is recorded, and inline images only as their length."""
    image = {"type": "image", "url": f"data:image/png;base64,{'A' * 20_000}"}
    payload = completed("t1", output=[{"content": [image]}], error={"code": "c", "message": "one was refused"})
    journal = VirtualJournal(tmp_path / "run.db")
    async with expecting(scripted, inbox, journal=journal) as future:
        await journal.begin(intent())
        await deliver(inbox, payload, url=TOKEN_URL)
        entry = await journal.find("k")
        snapshot = future.result()

    assert entry is not None
    assert entry.result["partial_error"]["message"] == "one was refused"
    assert entry.result["images"][0]["inline_characters"] == len(image["url"])
    assert "AAAA" not in str(entry.result)
    assert snapshot.images[0].url == image["url"]
    assert snapshot.images[0].received_at is not None


async def test_end_of_a_task_whose_id_could_not_be_recorded(
    scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path
) -> None:
    """If neither the id nor the end of a task could be recorded, a repeated delivery finds its intent by the token."""
    journal = FailingJournal(tmp_path / "run.db")
    scripted.submits = deque([answer(200, running("t1"), after=5.0)])
    async with session_on(scripted, inbox, journal=journal) as session:
        wait = asyncio.ensure_future(session.submit("a cat"))
        await asyncio.sleep(1.0)
        journal.fails = True
        task = await wait
        with pytest.raises(JournalError, match="disk is full"):
            await deliver(inbox, completed("t1"), url=delivery_url(scripted))
        outcome = await task.outcome()
        journal.fails = False
        await deliver(inbox, completed("t1"), url=delivery_url(scripted))
        entry = await only_entry(journal.path)

    assert isinstance(outcome.journal_error, JournalError)
    assert (entry.state, entry.task_id, entry.holder) == (EntryState.COMPLETED, "t1", None)


@in_real_time
async def test_delivery_between_the_answer_and_its_record(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A delivery is recorded even if another process records the id between the search by id and that by token."""
    inbox = WebhookInbox(secret=SECRET, public_url=URL)
    path = tmp_path / "run.db"

    class RacedJournal(SqliteJournal):
        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            found = await super().find_task(task_id)
            if found is None:
                await owner.record(attrs.evolve(intent(), state=EntryState.SUBMITTED, task_id="t1"))
            return found

    async with SqliteJournal(path) as owner, session_on(scripted, inbox, journal=RacedJournal(path)):
        await owner.begin(intent())
        await deliver(inbox, completed("t1"), url=TOKEN_URL)
        entry = await owner.find("k")

    assert entry is not None
    assert (entry.state, entry.holder) == (EntryState.COMPLETED, Holder.US)


# ---------------------------------------------------------------------- sessions


async def test_lost_answer_and_its_delivery(scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path) -> None:
    """A request whose answer is lost completes with its delivery, and is paid for once."""
    scripted.submits = deque([reset])
    async with session_on(scripted, inbox, journal=VirtualJournal(tmp_path / "run.db")) as session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await asyncio.sleep(5.0)
        await deliver(inbox, completed("t1"), url=delivery_url(scripted))
        done = await wait
        again = await session.generate("a cat")

    assert (done.task_id, done.replayed, again.replayed) == ("t1", False, True)
    assert len(scripted.of("POST")) == 1
    assert scripted.of("GET") == []
    entry = await only_entry(tmp_path / "run.db")
    assert (entry.state, entry.task_id, entry.holder) == (EntryState.COMPLETED, "t1", None)
    assert entry.webhook_token == token_of(delivery_url(scripted))


@pytest.mark.parametrize("payload", [completed("t1"), FAILED, running("t1")])
async def test_delivery_in_a_later_run(scripted: ScriptedGateway, tmp_path: Path, payload: dict[str, Any]) -> None:
    """A delivery that comes after the end of its run, to the inbox of the next one, resolves the uncertain entry."""
    scripted.submits = deque([reset])

    def session(inbox: WebhookInbox, **settings: Any) -> FluxSession:
        return session_on(scripted, inbox, journal=VirtualJournal(tmp_path / "run.db"), **settings)

    inboxes = [WebhookInbox(secret=SECRET, public_url=URL) for _ in range(3)]
    async with session(inboxes[0]) as first:
        with pytest.raises(SubmissionUncertainError):
            await first.generate("a cat")
    uncertain = await only_entry(tmp_path / "run.db")
    async with session(inboxes[1]) as second:
        with pytest.raises(SubmissionUncertainError):
            await second.generate("a cat")
        await deliver(inboxes[1], payload, url=delivery_url(scripted))
        outcomes = [await anext(second.stream(["a cat"]))]
    async with session(inboxes[2], schedule=FixedSchedule(1.0)) as third:
        outcomes.append(await anext(third.stream(["a cat"])))

    assert uncertain.state is EntryState.UNCERTAIN
    assert [outcome.task_id for outcome in outcomes] == ["t1", "t1"]
    for outcome in outcomes:
        if payload is FAILED:
            assert isinstance(outcome, Failed)
            assert isinstance(outcome.error, TaskFailedError)
        else:
            assert isinstance(outcome, Completed)
            assert outcome.images == (
                GeneratedImage(
                    url="https://pictures.example/0.jpeg", type="image", task_id="t1", extra={"jobId": "j1"}
                ),
            )
    assert [outcome.replayed for outcome in outcomes] == [payload["status"] != "in_progress", True]
    assert len(scripted.of("POST")) == 1
    assert len(scripted.of("GET")) == (payload["status"] == "in_progress")


async def test_delivery_for_a_killed_process(scripted: ScriptedGateway, inbox: WebhookInbox, tmp_path: Path) -> None:
    """The intent of a process that was killed during its submit is resolved, too."""
    scripted.submits = deque([hang])
    path = tmp_path / "run.db"
    async with session_on(scripted, inbox, journal=VirtualJournal(path)) as session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await asyncio.sleep(1.0)
        state = (await only_entry(path)).state
    await asyncio.gather(wait, return_exceptions=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE entries SET state = 'intent', owner = 'killed'")
    async with session_on(scripted, inbox, journal=VirtualJournal(path)) as session:
        await deliver(inbox, completed("t1"), url=delivery_url(scripted))
        done = await session.generate("a cat")

    assert state is EntryState.INTENT
    assert done.replayed
    assert len(scripted.of("POST")) == 1


@in_real_time
@pytest.mark.parametrize("payload", [completed("t1"), FAILED])
async def test_delivery_to_another_live_process(
    scripted: ScriptedGateway, tmp_path: Path, payload: dict[str, Any]
) -> None:
    """If another process with the same journal gets the delivery, the one that lost the answer has its outcome."""
    scripted.submits = deque([reset])
    owner_inbox, other_inbox = (WebhookInbox(secret=SECRET, public_url=URL) for _ in range(2))
    path = tmp_path / "run.db"
    async with (
        session_on(scripted, owner_inbox, journal=SqliteJournal(path)) as owner,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)),
    ):
        stream = owner.stream(["a cat"])
        wait = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.3)
        await deliver(other_inbox, payload, url=delivery_url(scripted))
        async with asyncio.timeout(10):
            outcome = await wait
        entry = await only_entry(path)

    assert (outcome.task_id, outcome.ok, outcome.replayed) == ("t1", payload is not FAILED, False)
    assert (entry.task_id, entry.holder) == ("t1", None)
    assert len(scripted.of("POST")) == 1


@in_real_time
async def test_end_recorded_elsewhere_just_before_the_submit_is_given_up(
    scripted: ScriptedGateway, tmp_path: Path
) -> None:
    """An uncertain submit whose end another process has just recorded has that end, not the uncertainty."""

    class UnwatchedJournal(SqliteJournal):
        async def open(self, on_external_change: Any = lambda _: None, /, *, watch_changes: bool = False) -> None:
            await super().open(lambda _: None)

    scripted.submits = deque([reset])
    owner_inbox, other_inbox = (WebhookInbox(secret=SECRET, public_url=URL) for _ in range(2))
    path = tmp_path / "run.db"
    async with (
        session_on(scripted, owner_inbox, journal=UnwatchedJournal(path), task_timeout=1.0) as owner,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)),
    ):
        wait = asyncio.ensure_future(owner.generate("a cat"))
        await asyncio.sleep(0.3)
        await deliver(other_inbox, completed("t1"), url=delivery_url(scripted))
        async with asyncio.timeout(10):
            done = await wait

    assert (done.task_id, done.replayed) == ("t1", False)
