"""PollTimeout by itself, and polls that hang, against a scripted gateway in virtual time."""

import asyncio
import base64
import json
import random
from collections import Counter, deque

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import Connection, ScriptedGateway, answer, completed, half_hang, hang, running, session_on
from support.virtual_time import hold_up
from support.webhooks import SECRET, sign

from flux2max_async import FixedSchedule, FluxSession, TransportError, WebhookInbox
from flux2max_async._api.give_up import PollLimit
from flux2max_async._api.poll_timeout import PollTimeout, SlowPollError

MAX = 30.0


def learned(*polls: float | None) -> PollTimeout:
    """Return a timeout that has seen polls take so many seconds; None was given up."""
    timeout = PollTimeout(MAX)
    for took in polls:
        if took is None or took > timeout.seconds:
            timeout.record_given_up(timeout.seconds)
        else:
            timeout.record_answer(took)
    return timeout


@pytest.mark.parametrize(
    ("polls", "seconds"),
    [
        pytest.param([], 30.0, id="nothing seen"),
        pytest.param([None], 30.0, id="the first one hangs"),
        pytest.param([0.05], 2.0, id="quick"),
        pytest.param([0.05] * 100, 2.0, id="always quick"),
        pytest.param([1.0] * 100, pytest.approx(4.0, rel=0.3), id="1 s"),
        pytest.param([10.0], 30.0, id="10 s: the HTTP timeout"),
        pytest.param([0.05, None], 2.0, id="one hangs"),
        pytest.param([0.05, None, None], 4.0, id="two in a row"),
        pytest.param([0.05, None, None, None, None], 8.0, id="four in a row"),
        pytest.param([0.05, *[None] * 20], 30.0, id="all hang: the HTTP timeout"),
        pytest.param([0.05, None, None, 0.05], 2.0, id="two in a row, then a quick answer"),
        pytest.param([0.05, None, None, 3.5], 4.0, id="two in a row, then an answer within the raised limit"),
        pytest.param([0.05, *[5.0] * 50], pytest.approx(20.0, rel=0.5), id="slow from now on"),
        pytest.param([5.0, *[0.05] * 500], 2.0, id="quick from now on"),
    ],
)
def test_limit_after_polls(polls: list[float | None], seconds: float) -> None:
    """After each of these sequences, a poll may take exactly this long."""
    assert learned(*polls).seconds == seconds


def test_polls_that_were_sent_at_the_same_time_raise_the_limit_once() -> None:
    """Polls that hang together don't double the limit for each of them."""
    timeout = learned(0.05)
    for _ in range(24):
        timeout.record_given_up(2.0)

    assert timeout.seconds == 4.0


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_polls_that_hang_now_and_then_have_little_effect(share: float) -> None:
    """With one hanging poll in 20, nine of ten are given up after the shortest time, whatever quick ones take."""
    randoms = random.Random(1)
    timeout, limits = learned(0.05), list[float]()
    for _ in range(5000):
        hangs = randoms.random() < share
        if hangs:
            limits.append(timeout.seconds)
            timeout.record_given_up(timeout.seconds)
        else:
            timeout.record_answer(randoms.lognormvariate(-3, 0.5))

    assert limits.count(2.0) > 0.9 * len(limits)


@pytest.mark.parametrize("slow", [3.0, 5.0, 12.0, 25.0])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_gateway_that_has_become_slow_is_not_polled_in_vain(slow: float, share: float) -> None:
    """If many polls take longer than any before, the limit rises until nearly all are answered."""
    randoms = random.Random(1)
    timeout = learned(*[0.05] * 500)
    given_up = 0
    for number in range(1000):
        took = slow if randoms.random() < share else 0.05
        if took > timeout.seconds:
            given_up += number >= 300
            timeout.record_given_up(timeout.seconds)
        else:
            timeout.record_answer(took)

    assert given_up < 10


@given(st.lists(st.none() | st.floats(0, 100), max_size=100))
def test_limit_is_bounded(polls: list[float | None]) -> None:
    """The limit is always between 2 s and the HTTP timeout, and 2 s again after enough quick answers."""
    timeout = learned(*polls)

    assert 2.0 <= timeout.seconds <= MAX
    for _ in range(1000):
        timeout.record_answer(0.01)
    assert timeout.seconds == 2.0


# ---------------------------------------------------------------------- sessions


async def test_a_poll_that_hangs_is_made_again_on_a_new_connection(scripted: ScriptedGateway) -> None:
    """A hanging poll costs its task two seconds: it is given up, counted, and made again at once."""
    scripted.polls = deque([answer(200, running()), hang, answer(200, completed())])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

        assert outcome.polls == session.stats.polls == 3
        assert session.stats.retries == 1
    _, hung, again = scripted.of("GET")
    assert again.at - hung.at == pytest.approx(2.0, abs=0.01)


async def test_polls_on_the_wire_when_the_first_answer_comes(scripted: ScriptedGateway) -> None:
    """Even a poll that was sent before anything was learned is given up once other polls have been answered."""
    scripted.polls = deque([hang, answer(200, completed("t2")), answer(200, completed("t1"))])
    async with session_on(scripted) as session:
        started = anyio.current_time()
        first = session.attach("t1")
        await anyio.sleep(0.1)
        await session.attach("t2")
        await first

        assert anyio.current_time() - started == pytest.approx(2.0, abs=0.1)


async def test_one_poll_in_twenty_hangs(scripted: ScriptedGateway) -> None:
    """If one poll in 20 hangs for a minute, no task of a batch takes more than three seconds longer for each."""
    polls, hung = Counter[str](), Counter[str]()

    async def poll(connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2]
        polls[task_id] += 1
        if sum(polls.values()) % 20 == 0:
            hung[task_id] += 1
            await asyncio.sleep(60.0)
        await answer(200, running(task_id) if polls[task_id] < 4 else completed(task_id))(connection)

    scripted.submits = deque(answer(200, {"id": f"t{number}"}) for number in range(100))
    scripted.polls = deque([poll])
    async with session_on(scripted) as session:
        outcomes = [outcome.unwrap() async for outcome in session.stream(f"cat {n}" for n in range(100))]

    assert sum(hung.values()) > 15
    assert all(outcome.elapsed < 5.0 + 3.0 * hung[outcome.task_id] for outcome in outcomes)


async def test_submits_and_fetch_keep_the_http_timeout(scripted: ScriptedGateway) -> None:
    """A submit may take as long as the HTTP timeout, and so may fetch(), which is made once."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"}, after=20.0)])
    scripted.polls = deque(
        [answer(200, completed()), answer(200, completed("t2")), answer(200, completed(), after=20.0)]
    )
    async with session_on(scripted) as session:
        await session.generate("a cat")
        await session.generate("a dog")
        await session.fetch("t1")

    assert len(scripted.received) == 5


@pytest.mark.parametrize("seconds", [1.0, 5.0, 20.0, 28.0])
async def test_a_held_up_loop_gives_up_no_answer(scripted: ScriptedGateway, seconds: float) -> None:
    """If the event loop was blocked while the answer came, the answer is read."""
    scripted.polls = deque([answer(200, running()), answer(200, completed(), after=1.5)])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.3)  # the second poll is on the wire, for 0 to 0.6 s
        assert len(scripted.of("GET")) == 2
        asyncio.get_running_loop().call_later(0.5, hold_up, seconds)
        outcome = await task

    assert outcome.polls == 2


async def test_a_webhook_ends_a_task_whose_poll_hangs(scripted: ScriptedGateway) -> None:
    """While a poll hangs, a webhook ends its task at once, and the poll doesn't count as given up."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    polled = anyio.Event()

    async def hang_later(connection: Connection) -> None:
        polled.set()
        await hang(connection)

    scripted.polls = deque([answer(200, running()), hang_later])
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(1.0), webhooks=inbox
    ) as session:
        task = await session.submit("a cat")
        await polled.wait()
        await anyio.sleep(1.0)
        await inbox.deliver(*sign(completed("t1")))
        outcome = await task

        assert (outcome.polls, session.stats.retries) == (2, 0)


async def test_a_poll_that_is_given_up_twice() -> None:
    """A webhook that comes in the moment in which a poll is given up changes nothing, and nothing stays cancelled."""
    limit = PollLimit(30.0, learned(0.05), gives_up=True)

    async def hang_and_give_up() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            limit.give_up()

    with pytest.raises(SlowPollError, match=r"no answer within 2\.0 s"), limit:
        await hang_and_give_up()
    task = asyncio.current_task()

    assert task is not None
    assert not task.cancelling()


async def test_a_gateway_whose_polls_all_take_five_seconds(scripted: ScriptedGateway) -> None:
    """A session whose polls were quick follows its tasks although each poll takes five seconds from now on."""
    scripted.submits = deque(answer(200, {"id": f"t{number}"}) for number in range(3))
    scripted.polls = deque([answer(200, completed("t0")), answer(200, completed("t1"), after=5.0)])
    async with session_on(scripted) as session:
        await session.generate("a cat")
        first = await session.generate("a dog")
        second = await session.generate("a cow")

    assert first.elapsed < 30.0
    assert second.polls == 1


async def test_a_poll_that_fails_otherwise_is_not_slow(scripted: ScriptedGateway) -> None:
    """The HTTP timeout still ends a poll before anything was learned, as a lost connection."""
    scripted.polls = deque([hang])
    async with session_on(scripted, http_timeout=3.0) as session:
        with pytest.raises(TransportError, match="timed out"):
            await session.fetch("t1")


IMAGE = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(60_000)).decode()


@pytest.mark.parametrize("seconds", [6.0, 25.0])
@pytest.mark.parametrize("padding", [0, 1_200_000])
async def test_an_answer_that_is_coming_is_not_given_up(
    scripted: ScriptedGateway, seconds: float, padding: int
) -> None:
    """An image in the answer may take as long as the HTTP timeout, however quick other polls are."""
    content = json.dumps(completed(url=f"data:image/jpeg;base64,{IMAGE}{'A' * padding}")).encode()

    async def slowly(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
        for start in range(0, len(content), size := len(content) // 20):
            await asyncio.sleep(seconds / 21)
            await connection.send(content[start : start + size])

    scripted.polls = deque([answer(200, running()), slowly, answer(200, completed("t2"))])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

        assert (outcome.polls, session.stats.retries) == (2, 0)


async def test_a_large_answer_may_stop_for_a_while(scripted: ScriptedGateway) -> None:
    """Only a small answer that stops in the middle is given up: a large one may have to wait for others."""
    content = json.dumps(completed(url=f"data:image/jpeg;base64,{IMAGE}{'A' * 1_200_000}")).encode()
    head, stop = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content), len(content) - 1000

    async def stop_for_a_while(connection: Connection) -> None:
        await connection.send(head + content[:stop])
        await asyncio.sleep(10.0)
        await connection.send(content[stop:])

    scripted.polls = deque([answer(200, running()), half_hang, stop_for_a_while])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

        assert (outcome.polls, session.stats.retries) == (3, 1)
        assert outcome.elapsed == pytest.approx(2.0 + 2.0 + 10.0, abs=1.0)
        assert session._supervisor is not None
        assert session._supervisor.client._poll_timeout.seconds == 2.0, "what counts is when an answer begins"
