"""API keys: fixed ones, and functions that return the key, which may change."""

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, hang, reset, running, session_on

from flux2max_async import (
    AuthenticationError,
    ConfigurationError,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationRequest,
    SqliteJournal,
)
from flux2max_async._api.credentials import RotatingKey
from flux2max_async._config import NoKeyError

Key = str | Exception
UNAUTHORIZED = answer(401, {"error": {"code": "invalid_key", "message": "wrong key"}})


class Vault:
    """Returns keys, the last of them again and again; raises those that are exceptions."""

    def __init__(self, *keys: Any, delay: float = 0.0) -> None:
        self.keys = deque(keys)
        self.delay = delay
        self.asked: list[float] = []

    def get(self) -> Any:
        self.asked.append(anyio.current_time())
        key = self.keys.popleft() if len(self.keys) > 1 else self.keys[0]
        if isinstance(key, Exception):
            raise key
        return key

    async def get_later(self) -> Any:
        await asyncio.sleep(self.delay)
        return self.get()


def session_with(scripted: ScriptedGateway, api_key: Callable[[], str | Awaitable[str]], **options: Any) -> FluxSession:
    options = {"schedule": FixedSchedule(2.0), **options}
    return FluxSession(api_key, base_url=scripted.url, **options)


def keys_of(scripted: ScriptedGateway, method: str = "") -> list[str]:
    """Return the keys of the requests that the gateway received."""
    received = [request for request in scripted.received if method in request.method]
    return [request.headers["Authorization"].removeprefix("Bearer ") for request in received]


@pytest.mark.parametrize("is_async", [False, True], ids=["function", "coroutine function"])
async def test_a_function_is_asked_before_each_call(scripted: ScriptedGateway, *, is_async: bool) -> None:
    """The key of each call is what the function returns then; a download has none."""
    vault = Vault("key-1", "key-2", "key-3")
    scripted.polls = deque([answer(200, running()), answer(200, completed(url=f"{scripted.url}/0.jpeg"))])
    scripted.downloads = deque([answer(200, jpeg())])
    async with session_with(scripted, vault.get_later if is_async else vault.get) as session:
        assert vault.asked == []
        outcome = await session.generate("a cat")
        await session.read(outcome.images[0])

    headers = [request.headers.get("Authorization") for request in scripted.received]
    assert headers == ["Bearer key-1", "Bearer key-2", "Bearer key-3", None]


async def test_an_answer_counts_for_a_second(scripted: ScriptedGateway) -> None:
    """Calls within a second share one answer, and calls at the same time one question."""
    vault = Vault("key-1", "key-2", delay=0.1)
    async with session_with(scripted, vault.get_later) as session:
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(session.fetch("t1"))
        await session.fetch("t1")
        assert len(vault.asked) == 1
        await asyncio.sleep(1.1)
        await session.fetch("t1")

    assert keys_of(scripted) == ["key-1"] * 51 + ["key-2"]


async def test_a_cancelled_call_leaves_the_question_to_the_others(scripted: ScriptedGateway) -> None:
    """The caller whose call has asked may leave; the others get the answer."""
    vault = Vault("key-1", delay=1.0)
    async with session_with(scripted, vault.get_later) as session:
        first, second = (asyncio.create_task(session.fetch("t1")) for _ in range(2))
        await asyncio.sleep(0.5)
        first.cancel()
        await second

    assert first.cancelled()
    assert keys_of(scripted) == ["key-1"]


async def test_a_question_that_is_open_when_the_session_closes(scripted: ScriptedGateway) -> None:
    """Closing the session gives up the question; a session that is opened again asks anew."""
    vault = Vault("key-1", delay=20.0)
    session = session_with(scripted, vault.get_later)
    async with session:
        task = session.attach("t1")
        await asyncio.sleep(1.0)
    assert not (await task.outcome()).ok
    vault.delay = 0.0
    async with session:
        await session.fetch("t1")

    assert len(vault.asked) == 1


# ---------------------------------------------------------------------- 401


async def test_a_401_is_asked_about_once(scripted: ScriptedGateway) -> None:
    """After a 401, the function is asked again; with a new key the call is repeated, and the 401 doesn't count."""
    vault = Vault("old", "new")
    scripted.submits = deque([UNAUTHORIZED, answer(200, running())])
    async with session_with(scripted, vault.get) as session:
        outcome = await session.generate("a cat")
        stats = session.stats

    assert keys_of(scripted, "POST") == ["old", "new"]
    assert scripted.received[0].body == scripted.received[1].body
    assert (outcome.polls, stats.submitted, stats.retries) == (1, 1, 0)


async def test_a_poll_with_an_old_key(scripted: ScriptedGateway) -> None:
    """A poll whose key is refused is repeated at once with the new one."""
    vault = Vault("old", "old", "new")
    scripted.polls = deque([UNAUTHORIZED, answer(200, completed())])
    async with session_with(scripted, vault.get) as session:
        outcome = await session.generate("a cat")

    assert outcome.polls == 1
    assert keys_of(scripted) == ["old", "old", "new"]


@pytest.mark.parametrize("again", ["old", RuntimeError("sealed"), "not a key"], ids=str)
async def test_a_401_counts_without_another_key(scripted: ScriptedGateway, again: Key) -> None:
    """If the function has no other key, the 401 counts: the submit was sent once."""
    vault = Vault("old", again)
    scripted.submits = deque([UNAUTHORIZED])
    async with session_with(scripted, vault.get) as session:
        with pytest.raises(AuthenticationError, match="wrong key"):
            await session.generate("a cat")

    assert (keys_of(scripted), len(vault.asked)) == (["old"], 2)


async def test_a_second_401_counts(scripted: ScriptedGateway) -> None:
    """A call is repeated once: if the new key is refused, too, the 401 counts."""
    vault = Vault(*(f"key-{number}" for number in range(10)))
    scripted.submits = deque([UNAUTHORIZED])
    async with session_with(scripted, vault.get) as session:
        with pytest.raises(AuthenticationError):
            await session.generate("a cat")

    assert keys_of(scripted) == ["key-0", "key-1"]


async def test_many_401_at_once_share_a_question(scripted: ScriptedGateway) -> None:
    """Calls that are refused at the same time ask once, and those that come later use the answer."""
    vault = Vault("old", "new", delay=0.1)
    scripted.polls = deque([*[UNAUTHORIZED] * 20, answer(200, running())])
    async with session_with(scripted, vault.get_later) as session, asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(session.fetch("t1"))

    assert len(vault.asked) == 2
    assert keys_of(scripted) == ["old"] * 20 + ["new"] * 20


async def test_a_401_that_comes_late() -> None:
    """A call whose key was refused after another call has asked doesn't ask again."""
    vault = Vault("old", "new")
    credentials = RotatingKey(vault.get, (), 30.0)
    await credentials.refresh()
    version = credentials.version

    assert await credentials.has_changed(version)
    assert await credentials.has_changed(version)
    assert not await credentials.has_changed(credentials.version)
    assert len(vault.asked) == 3


async def test_a_fixed_key_is_not_asked_again(scripted: ScriptedGateway) -> None:
    """With a plain key, a 401 counts at once."""
    scripted.submits = deque([UNAUTHORIZED])
    async with session_on(scripted) as session:
        with pytest.raises(AuthenticationError):
            await session.generate("a cat")

    assert len(scripted.received) == 1


async def test_the_answer_to_a_repeated_submit_is_lost(scripted: ScriptedGateway) -> None:
    """The submit that is repeated with a new key is one like any other: if its answer is lost, it is uncertain."""
    scripted.submits = deque([UNAUTHORIZED, reset])
    async with session_with(scripted, Vault("old", "new").get) as session:
        with pytest.raises(FluxError, match="its answer was lost"):
            await session.generate("a cat")

    assert keys_of(scripted) == ["old", "new"]


# ---------------------------------------------------------------------- functions that fail


async def test_a_function_that_raises(scripted: ScriptedGateway) -> None:
    """What it raises is the cause of the submit's ConfigurationError, whose message doesn't repeat it."""
    reason = RuntimeError("token hush-7f3a9c has expired")
    async with session_with(scripted, Vault(reason).get) as session:
        with pytest.raises(ConfigurationError) as caught:
            await session.generate("a cat")

    assert str(caught.value) == "api_key() has raised RuntimeError"
    assert caught.value.__cause__ is reason
    assert scripted.received == []


@pytest.mark.parametrize("key", ["", "hush 7f3a9c", "hush-7f3a9c\n", None, 7, b"hush-7f3a9c"], ids=ascii)
async def test_a_function_that_returns_no_key(scripted: ScriptedGateway, key: Any) -> None:
    """A malformed key is a ConfigurationError that doesn't show it."""
    async with session_with(scripted, Vault(key).get) as session:
        with pytest.raises(ConfigurationError, match=r"api_key\(\) has returned what is no key: it must be") as caught:
            await session.fetch("t1")

    assert "7f3a9c" not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_a_function_that_hangs(scripted: ScriptedGateway) -> None:
    """A function that doesn't return is given up like a call, and asked again by the next one."""
    vault = Vault("key-1", delay=100.0)
    async with session_with(scripted, vault.get_later, task_timeout=100.0) as session:
        started = anyio.current_time()
        with pytest.raises(FluxError):
            await session.fetch("t1")
        assert anyio.current_time() - started == pytest.approx(30.0)
        vault.delay = 0.0
        await session.fetch("t1")


async def test_a_function_that_hangs_for_a_session_without_a_limit(scripted: ScriptedGateway) -> None:
    """Without a time limit, the function may take as long as it likes."""
    vault = Vault("key-1", delay=1000.0)
    async with session_with(scripted, vault.get_later, http_timeout=float("inf")) as session:
        await session.fetch("t1")

    assert keys_of(scripted) == ["key-1"]


async def test_a_function_that_cancels_itself(scripted: ScriptedGateway) -> None:
    """A function that ends with CancelledError cancels nothing but its own question."""

    async def cancelled() -> str:
        raise asyncio.CancelledError

    async with session_with(scripted, cancelled) as session:
        with pytest.raises(ConfigurationError, match="cancelled"):
            await session.fetch("t1")


async def test_polls_ask_again(scripted: ScriptedGateway) -> None:
    """A paid task outlives a function that fails for a while."""
    vault = Vault("key-1", *[OSError("vault is sealed")] * 8, "key-2")
    async with session_with(scripted, vault.get) as session:
        outcome = await session.generate("a cat")

    assert outcome.polls == 9
    assert keys_of(scripted) == ["key-1", "key-2"]


async def test_a_stream_stops(scripted: ScriptedGateway) -> None:
    """Without a key, a stream submits nothing more."""
    outcomes = []
    async with session_with(scripted, Vault(OSError("sealed")).get, max_in_flight=2) as session:
        with pytest.raises(NoKeyError):
            async for outcome in session.stream(f"cat {number}" for number in range(1000)):
                outcomes.append(outcome)

    assert len(outcomes) < 10


# ---------------------------------------------------------------------- secrets


async def test_keys_of_late_are_redacted(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Whatever key of late the service echoes, it is in no error, no log line and no journal."""
    keys = [f"secret-{number:02}-7f3a9c" for number in range(12)]
    vault = Vault(*keys)
    echo = {"error": {"code": "invalid", "message": f"keys: {', '.join(keys)}"}}
    scripted.polls = deque([*[answer(200, running())] * 11, answer(500, echo), answer(400, echo)])
    async with session_with(scripted, vault.get, journal=SqliteJournal(tmp_path / "j.db")) as session:
        with pytest.raises(FluxError) as caught:
            await session.generate("a cat")

    text = f"{caught.value} {caught.value!r} {caplog.text} {(tmp_path / 'j.db').read_bytes()!r}"
    assert "***, ***" in text
    assert [key for key in keys[:12] if key in text] == []


async def test_old_keys_are_forgotten(scripted: ScriptedGateway) -> None:
    """However often a key changes, only so many are kept, the newest ones."""
    async with session_with(scripted, Vault(*(f"key-{number}" for number in range(100))).get) as session:
        for _ in range(60):
            await session.fetch("t1")
            await asyncio.sleep(1.1)
        secrets = list(session._parts.transport.secrets)

    assert secrets == [f"key-{number}" for number in range(40, 60)]


def locals_of(error: BaseException) -> str:
    """Return what a tool would record: the locals of all frames of this library in the tracebacks of an error."""
    found: list[str] = []
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        current = rest.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        rest += [current.__cause__, current.__context__]
        for frame, _ in traceback.walk_tb(current.__traceback__):
            if "flux2max_async" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
                found += [f"{frame.f_code.co_qualname}: {name} = {value!r}" for name, value in frame.f_locals.items()]
    return "\n".join(found)


SECRET = "hush-7f3a9c"


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": f"{SECRET} "},
        {"api_key": f"Bearer {SECRET}"},
        {"api_key": [SECRET]},
        {"api_key": SECRET, "max_in_flight": 0},
        {"api_key": SECRET, "webhooks": "no inbox"},
        *({"base_url": url} for url in (f"https://a.example?{SECRET}", f"https://{SECRET}@a.example", SECRET)),
        *(
            {"base_url": url}
            for url in (f"https://[{SECRET}", f"https://a.example:{SECRET}", f"http://{SECRET}.example")
        ),
        *(
            {"proxy": url}
            for url in (f"socks5://u:{SECRET}@a.example", f"http://u:{SECRET}@", f"http://u:{SECRET}@a:b")
        ),
        {"proxy": f"http://u:{SECRET}@a.example", "base_url": "http://127.0.0.1"},
        {"proxy": f"http://u:{SECRET}@a.example", "task_timeout": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_no_secret_in_the_frames_of_a_refused_setting(
    options: dict[str, Any], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools that record the locals of an error's frames find none of the settings that may be, or hold, a secret."""
    options = {"api_key": SECRET, **options}
    variables = {"api_key": "FLUX2MAX_API_KEY", "base_url": "FLUX2MAX_BASE_URL", "proxy": "HTTPS_PROXY"}
    if source == "environment":
        for name, variable in variables.items():
            value = options.get(name, "")
            if isinstance(value, str) and value.isprintable():
                monkeypatch.setenv(variable, options.pop(name, ""))
    error = refusal(options)

    assert error is None or SECRET not in locals_of(error)
    # The environment's proxy isn't looked at where it isn't needed.
    assert error is not None or source == "environment"


def refusal(options: dict[str, Any]) -> ConfigurationError | None:
    try:
        FluxSession(**options)
    except ConfigurationError as error:
        return error
    return None


@pytest.mark.parametrize("rotating", [False, True], ids=["fixed", "function"])
@pytest.mark.parametrize(
    "response",
    [
        answer(401, {"error": {"code": "c", "message": f"no such key: {SECRET}"}}),
        answer(400, {"error": {"code": "c", "message": f"bad: {SECRET}"}}),
        answer(500, f"<html>{SECRET}</html>".encode()),
        answer(200, f"not JSON: {SECRET}".encode()),
        answer(200, {"no": "id"}),
        reset,
        hang,
        answer(407, b""),
    ],
    ids=["401", "400", "500", "not JSON", "no id", "reset", "hang", "407"],
)
async def test_no_secret_in_the_frames_of_a_failed_call(
    scripted: ScriptedGateway, response: Any, *, rotating: bool
) -> None:
    """Nor do they find the key in the frames of submits and polls that fail, even if the service echoes it."""
    scripted.submits, scripted.polls = deque([response]), deque([response])
    async with FluxSession((lambda: SECRET) if rotating else SECRET, base_url=scripted.url) as session:
        request = GenerationRequest("a cat")
        for call in (session.generate(request), session.submit(request), session.fetch("t1")):
            with pytest.raises(FluxError) as caught:
                await call
            assert SECRET not in locals_of(caught.value)


@pytest.mark.parametrize("key", [f"{SECRET} ", [SECRET], RuntimeError(SECRET)], ids=["text", "list", "exception"])
async def test_no_secret_in_the_frames_of_a_function_that_fails(scripted: ScriptedGateway, key: Any) -> None:
    """Nor in those of a call for which the function returned no key; what it raises is its own."""
    vault = Vault("key", key)
    async with session_with(scripted, vault.get) as session:
        await session.fetch("t1")
        await asyncio.sleep(2.0)
        with pytest.raises(NoKeyError) as caught:
            await session.fetch("t1")
        caught.value.__cause__ = None
        assert SECRET not in locals_of(caught.value)
