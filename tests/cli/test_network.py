"""How the command reaches the service: proxies, certificates, plain http, and what it says while it can't."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
from anyio.from_thread import start_blocking_portal
from support.certificates import Certificate
from support.commands import KEY, Command, visible_lines
from support.ports import free_port
from support.proxy import ForwardProxy
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, running

pytestmark = pytest.mark.usefixtures("empty_folder")

Server = TypeVar("Server")
Start = Callable[[AbstractAsyncContextManager[Server]], Server]
PROXIES = [f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO")]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start[object]]:
    """Provide a function that starts a server in another thread; set the key, and no proxy."""
    for name in [*PROXIES, *map(str.lower, PROXIES)]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLUX2MAX_API_KEY", KEY)
    with start_blocking_portal() as portal, ExitStack() as stack:
        yield lambda server: stack.enter_context(portal.wrap_async_context_manager(server))


def set_answers(gateway: ScriptedGateway, image_url: str) -> None:
    gateway.submits[0] = answer(200, running())
    gateway.polls[0] = answer(200, completed(url=image_url))
    gateway.downloads[0] = answer(200, jpeg())


def test_proxy_and_plain_http(flux2max: Command, start: Start[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command uses the environment's proxy, and plain http to another host only if it is told to."""
    gateway = start(ScriptedGateway())
    assert isinstance(gateway, ScriptedGateway)
    set_answers(gateway, "http://pictures.example/0.jpeg")
    hosts = dict.fromkeys(("gateway.example", "pictures.example"), gateway.port)
    proxy = start(ForwardProxy(hosts, "tester:hush"))
    assert isinstance(proxy, ForwardProxy)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("FLUX2MAX_BASE_URL", "http://gateway.example")
    refused = flux2max("generate", "a cat", "-o", "cat.jpeg")
    run = flux2max("generate", "a cat", "-o", "cat.jpeg", "--allow-plain-http")
    monkeypatch.setenv("FLUX2MAX_ALLOW_PLAIN_HTTP", "1")
    status = flux2max("status", "t1")
    download = flux2max("download", "t1", "-o", "dog.jpeg")
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    batch = flux2max("batch", "prompts.txt", "--out", "pictures", "--budget", "0.01")

    assert (refused.code, gateway.received[:1]) == (2, gateway.received[:1])
    assert re.fullmatch(
        r"flux2max: base_url must be https for gateway\.example: over http, others could read the API key "
        r"\(--allow-plain-http permits it inside one's own network\)\n",
        refused.err,
    )
    assert [run.code, status.code, download.code] == [0, 0, 0]
    assert Path("cat.jpeg").read_bytes() == Path("dog.jpeg").read_bytes() == jpeg()
    assert len(proxy.forwarded) == len(gateway.received) >= 6
    # The command that goes on has neither the address nor what permits it.
    assert "flux2max batch prompts.txt --out pictures --budget" in batch.err
    assert "plain" not in batch.err


@pytest.mark.parametrize(("value", "key", "is_refused"), [("1", False, True), ("0", False, False), ("1", True, False)])
def test_plain_http_in_dotenv(
    flux2max: Command, monkeypatch: pytest.MonkeyPatch, value: str, *, key: bool, is_refused: bool
) -> None:
    """What permits plain http counts in `.env` only with the API key from the same file."""
    Path(".env").write_text(
        f"FLUX2MAX_ALLOW_PLAIN_HTTP={value}\n" + "FLUX2MAX_API_KEY=dotenv-key\n" * key, encoding="utf-8"
    )
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    monkeypatch.setenv("FLUX2MAX_API_KEY", "" if key else KEY)
    run = flux2max("batch", "prompts.txt", "--dry-run")

    assert run.code == (2 if is_refused else 0)
    assert ("FLUX2MAX_ALLOW_PLAIN_HTTP in .env counts only with the API key" in run.err) is is_refused
    assert ("or pass --allow-plain-http if you trust it" in run.err) is is_refused


def test_lasting_fault(
    flux2max: Command, start: Start[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A certificate that isn't trusted ends `generate` at once, and `batch` after its first requests."""
    gateway = start(ScriptedGateway(Certificate.create(tmp_path, "localhost", "IP:127.0.0.1").of_server))
    assert isinstance(gateway, ScriptedGateway)
    monkeypatch.setenv("FLUX2MAX_BASE_URL", gateway.url)
    run = flux2max("generate", "a cat")
    Path("prompts.txt").write_text("".join(f"cat {number}\n" for number in range(200)), encoding="utf-8")
    batch = flux2max("batch", "prompts.txt", "--yes")

    assert (run.code, run.err.count("\n")) == (1, 1)
    assert run.err.startswith("flux2max: no connection: Cannot connect to host 127.0.0.1:")
    assert "certificate verify failed" in run.err
    assert batch.code == 1
    assert "stopped: no connection: Cannot connect to host 127.0.0.1:" in batch.err
    assert gateway.connections < 200


NOTICE = r"flux2max: no answer from {} for 5 s \(connection refused\): trying again until \d\d:\d\d:\d\d"


@pytest.mark.parametrize(
    ("command", "terminal"),
    [("generate", False), ("batch", False), ("batch", True)],
    ids=["generate", "batch", "batch on a terminal"],
)
def test_what_is_waited_for(
    flux2max: Command,
    on_terminal: Command,
    start: Start[object],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    *,
    terminal: bool,
) -> None:
    """After 5 s without a connection, one line says what is waited for, and until when; no terminal cuts it."""
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("FLUX2MAX_BASE_URL", url)
    Path("prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ["generate", "a cat"] if command == "generate" else ["batch", "prompts.txt", "--yes"]
    run = (on_terminal if terminal else flux2max)(*arguments, "--task-timeout", "9")
    lines = visible_lines(run.out if terminal else run.err)

    assert run.code == 1
    # A terminal of 80 columns wraps it.
    assert len(re.findall(NOTICE.format(re.escape(url)).replace(" ", r"\s+"), "\n".join(lines))) == 1
