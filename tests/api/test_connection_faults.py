"""Connections that fail: for a lasting reason at once, otherwise until the deadline, with one line about what is waited for."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp.client_reqrep import ConnectionKey
from support.certificates import Certificate
from support.ports import free_port
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, hang, reset, running, session_on

from flux2max_async import (
    DeadlineExceededError,
    DownloadError,
    FixedSchedule,
    FluxSession,
    GeneratedImage,
    TransportError,
)
from flux2max_async._api.aiohttp_errors import translate_error

IMAGE = jpeg()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.create(tmp_path_factory.mktemp("certificates"), "localhost", "IP:127.0.0.1")


@pytest.fixture(scope="module")
def of_another_host(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.create(tmp_path_factory.mktemp("certificates"), "other.example")


@pytest.fixture
def unknown_hosts(monkeypatch: pytest.MonkeyPatch) -> "deque[int]":
    """Make names unknown, with an error number for each lookup, of which the last is repeated; provide the numbers."""
    numbers = deque([socket.EAI_NONAME])
    lookups: list[int] = []

    def getaddrinfo(host: str, *arguments: object, **options: object) -> list[Any]:
        lookups.append(numbers.popleft() if len(numbers) > 1 else numbers[0])
        raise socket.gaierror(lookups[-1], "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return numbers


@pytest.fixture
async def plain_server() -> AsyncIterator[Callable[[bytes], Any]]:
    """Provide a function that starts a server which answers with bytes to whatever it gets, and returns its port."""
    servers: list[asyncio.Server] = []

    async def start(answer: bytes) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(answer)
            writer.close()

        servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        return int(servers[-1].sockets[0].getsockname()[1])

    yield start
    for server in servers:
        server.close()


async def failures(url: str, *, http: aiohttp.ClientSession | None = None, **options: Any) -> list[TransportError]:
    """Return the errors of a submit and of a fetch, and the cause of a download's."""
    image = GeneratedImage(url=f"{url}/0.jpeg", type="image", task_id="t1")
    errors: list[Any] = []
    session = FluxSession("key", base_url=url, http_session=http, allow_private_downloads=True, **options)
    async with session:
        for call in (session.generate("a cat"), session.fetch("t1"), session.read(image)):
            with pytest.raises((TransportError, DownloadError)) as caught:
                await call
            error = caught.value
            if isinstance(error, DownloadError):
                assert str(error).startswith("can't download: no connection: ")
                error = error.__cause__  # type: ignore[assignment]
            errors.append(error)
    return errors


SESSIONS = pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])


@SESSIONS
@pytest.mark.parametrize("kind", ["not trusted", "of another host"])
async def test_certificates(
    certificate: Certificate, of_another_host: Certificate, kind: str, *, borrowed: bool
) -> None:
    """A certificate that isn't trusted, or is another host's, is an error at once, and nothing is sent."""
    server, context = certificate, None
    if kind == "of another host":
        server, context = of_another_host, of_another_host.of_client
    started = anyio.current_time()
    async with ScriptedGateway(server.of_server) as gateway, aiohttp.ClientSession() as http:
        errors = await failures(gateway.url, http=http if borrowed else None, ssl_context=context)

    assert anyio.current_time() - started < 1.0
    assert [(error.fault, error.maybe_sent) for error in errors[:1]] == [("certificate", False)]
    assert {error.fault for error in errors} == {"certificate"}
    assert all("certificate verify failed" in str(error) for error in errors)
    assert gateway.received == []


@SESSIONS
@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"220 mail.example ESMTP\r\n",
    ],
    ids=["HTTP", "SSH", "SMTP"],
)
async def test_tls_to_a_plain_port(plain_server: Callable[[bytes], Any], response: bytes, *, borrowed: bool) -> None:
    """A port that doesn't speak TLS is an error at once, which says so."""
    port = await plain_server(response)
    started = anyio.current_time()
    async with aiohttp.ClientSession() as http:
        errors = await failures(f"https://127.0.0.1:{port}", http=http if borrowed else None)

    assert anyio.current_time() - started < 1.0
    assert {error.fault for error in errors} == {"tls"}
    assert all("does the port speak TLS?" in str(error) for error in errors)


@SESSIONS
async def test_unknown_host(unknown_hosts: "deque[int]", *, borrowed: bool) -> None:
    """A host name that doesn't exist is looked up once more after 2 s, and then is an error."""
    async with aiohttp.ClientSession() as http:
        started = anyio.current_time()
        errors = await failures("https://gateway.example", http=http if borrowed else None)
        elapsed = anyio.current_time() - started

    assert {error.fault for error in errors} == {"unknown_host"}
    # The submit and the download twice, the fetch once.
    assert 4.0 <= elapsed < 5.0


async def test_a_lookup_that_fails_for_a_moment(unknown_hosts: "deque[int]") -> None:
    """A name server that doesn't answer is asked again until the deadline, and one unknown name between is no proof."""
    unknown_hosts.extendleft([socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_NONAME])
    async with (
        aiohttp.ClientSession() as http,  # which opens no further connections
        FluxSession("key", base_url="https://gateway.example", http_session=http) as session,
    ):
        with pytest.raises(TransportError) as caught:
            await session.generate("a cat")

    assert caught.value.fault == "unknown_host"
    assert len(unknown_hosts) == 1


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((4, "Domain name not found"), "unknown_host"),
        ((1, "No data"), "unknown_host"),
        ((11, "Refused"), None),
        ((), None),
    ],
)
def test_lookups_of_aiodns(arguments: tuple[object, ...], fault: str | None) -> None:
    """With aiodns installed, aiohttp reports unknown hosts in another way."""

    class DNSError(Exception):
        pass

    os_error = OSError(None, "lookup failed")
    os_error.__cause__ = DNSError(*arguments)
    error = translate_error(aiohttp.ClientConnectorDNSError(_key(), os_error), maybe_sent=False)

    assert isinstance(error, TransportError)
    assert error.fault == fault


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        ("WRONG_VERSION_NUMBER", "tls"),
        ("record layer failure", "tls"),
        ("TLSV1_ALERT_INTERNAL_ERROR", None),
        ("UNEXPECTED_EOF_WHILE_READING", None),
        (None, None),
    ],
)
def test_reasons_of_tls(reason: str | None, fault: str | None) -> None:
    """Which failures of the handshake last; a far end that hangs up may be restarting."""
    os_error = ssl.SSLError(1, "failure")
    os_error.reason = reason  # type: ignore[assignment]
    error = translate_error(aiohttp.ClientConnectorSSLError(_key(), os_error), maybe_sent=False)

    assert isinstance(error, TransportError)
    assert error.fault == fault


def _key() -> Any:
    return aiohttp.client_reqrep.ConnectionKey("gateway.example", 443, True, True, None, None, None, None)


async def test_a_handshake_that_is_cut_is_repeated() -> None:
    """A far end that hangs up during the handshake may be restarting: the submit is repeated until its deadline."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(await reader.read(100))
        writer.close()

    connections: list[bytes] = []
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with FluxSession("key", base_url=f"https://127.0.0.1:{port}", task_timeout=20.0) as session:
            with pytest.raises(TransportError) as caught:
                await session.generate("a cat")

    assert caught.value.fault is None
    assert len(connections) > 3


# ---------------------------------------------------------------------- streams and tasks


async def test_a_stream_stops_at_a_lasting_fault(certificate: Certificate) -> None:
    """A stream against an untrusted certificate ends with the error, instead of failing each of its requests."""
    pulled: list[str] = []

    def prompts() -> Any:
        for number in range(10_000):
            pulled.append(f"cat {number}")
            yield pulled[-1]

    async with (
        ScriptedGateway(certificate.of_server) as gateway,
        FluxSession("key", base_url=gateway.url, max_in_flight=4) as session,
    ):
        outcomes = []
        with pytest.raises(TransportError, match="certificate") as caught:
            async for outcome in session.stream(prompts()):
                outcomes.append(outcome)

    assert caught.value.fault == "certificate"
    assert len(outcomes) == len(pulled) < 20
    assert all(not outcome.ok for outcome in outcomes)


async def test_a_task_is_polled_on(certificate: Certificate, caplog: pytest.LogCaptureFixture) -> None:
    """A task that is paid for is polled until its deadline, whatever the certificate is, with one warning."""
    async with (
        ScriptedGateway(certificate.of_server) as gateway,
        FluxSession("key", base_url=gateway.url, schedule=FixedSchedule(1.0), task_timeout=60.0) as session,
    ):
        with pytest.raises(DeadlineExceededError):
            await session.attach("t1")

    polls = [record for record in caplog.records if record.name == "flux2max_async.polling"]
    assert len(polls) > 5
    assert [record.levelname for record in polls] == ["WARNING"] + ["DEBUG"] * (len(polls) - 1)
    assert polls[0].getMessage().endswith("; it is polled until its deadline")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == polls[:1]


# ---------------------------------------------------------------------- what is waited for


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "is_notice", False)]


async def test_what_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """After 5 s without a connection, one line says what is waited for, and until when, for all requests together."""
    url = f"http://127.0.0.1:{free_port()}"
    async with FluxSession("key", base_url=url, task_timeout=60.0) as session, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(_expect_error(session))
        await asyncio.sleep(4.9)
        assert notices(caplog) == []
        await asyncio.sleep(0.2)
        assert len(notices(caplog)) == 1

    (notice,) = notices(caplog)
    assert notice.startswith(f"no answer from {url} for 5 s (connection refused): trying again until ")
    assert notice[-8:].count(":") == 2


async def test_a_deadline_that_no_date_can_hold(caplog: pytest.LogCaptureFixture) -> None:
    """The line comes for a task_timeout of millions of years, too."""
    async with FluxSession("key", base_url=f"http://127.0.0.1:{free_port()}", task_timeout=1e15) as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(6.0):
                await session.generate("a cat")

    assert len(notices(caplog)) == 1


async def _expect_error(session: FluxSession) -> None:
    with pytest.raises(TransportError, match="no connection"):
        await session.generate("a cat")


async def test_polls_that_are_not_answered(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """The line is about polls, too; it comes once for each row of failures, and not for a failure or two."""
    ok = answer(200, running())
    scripted.polls = deque([reset, ok, *[reset] * 20, ok, *[reset] * 20, answer(200, completed())])
    async with session_on(scripted) as session:
        await session.generate("a cat")

    assert len(notices(caplog)) == 2
    assert "(" in notices(caplog)[0]


async def test_calls_that_are_not_repeated(
    scripted: ScriptedGateway, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is said about calls that nobody repeats: a fetch, a submit with an unknown end, a single failure."""
    scripted.polls, scripted.submits = deque([reset]), deque([reset])
    async with session_on(scripted) as session:
        for _ in range(3):
            with pytest.raises(TransportError):
                await session.fetch("t1")
            with pytest.raises(Exception, match="its answer was lost"):
                await session.generate("a cat")
        await asyncio.sleep(20.0)
    scripted.polls = deque([reset, reset, hang])
    async with session_on(scripted) as session:
        task = session.attach("t1")
        await asyncio.sleep(10.0)
        assert not task._runner.ended.done()

    assert notices(caplog) == []


# ---------------------------------------------------------------------- contexts


@SESSIONS
async def test_ssl_context(certificate: Certificate, *, borrowed: bool) -> None:
    """With `ssl_context`, the API and the hosts of images are trusted by it, over a borrowed session, too."""
    async with ScriptedGateway(certificate.of_server) as gateway, aiohttp.ClientSession() as http:
        gateway.polls = deque([answer(200, completed(url=f"{gateway.url}/0.jpeg"))])
        gateway.downloads = deque([answer(200, IMAGE)])
        options: dict[str, Any] = {"http_session": http if borrowed else None, "ssl_context": certificate.of_client}
        async with FluxSession("key", base_url=gateway.url, schedule=FixedSchedule(1.0), **options) as session:
            outcome = await session.generate("a cat")
            assert await session.read(outcome.images[0]) == IMAGE


async def test_ssl_cert_file(certificate: Certificate, tmp_path: Path) -> None:
    """A process whose SSL_CERT_FILE names a certificate trusts it, for the API and for downloads."""
    async with ScriptedGateway(certificate.of_server) as gateway:
        gateway.polls = deque([answer(200, completed(url=f"{gateway.url}/0.jpeg"))])
        gateway.downloads = deque([answer(200, IMAGE)])
        script = f"""
import asyncio
from flux2max_async import FixedSchedule, FluxSession

async def main():
    async with FluxSession("key", base_url={gateway.url!r}, schedule=FixedSchedule(0.1)) as session:
        outcome = await session.generate("a cat")
        await session.save(outcome.images[0], {str(tmp_path / "0.jpeg")!r})

asyncio.run(main())
"""
        environment = {**os.environ, "SSL_CERT_FILE": str(certificate.path)}
        command = partial(subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True)
        run = await anyio.to_thread.run_sync(command)  # the gateway answers meanwhile

    assert run.returncode == 0, run.stderr
    assert (tmp_path / "0.jpeg").read_bytes() == IMAGE


@pytest.mark.parametrize("setting", [True, False, ssl.create_default_context()])
@pytest.mark.parametrize(
    ("error_type", "cause", "text"),
    [
        (aiohttp.ClientConnectorError, OSError(111, "refused"), "host gateway.example:443 [refused]"),
        (aiohttp.ClientConnectorDNSError, OSError(-2, "unknown"), "host gateway.example:443 [unknown]"),
        (aiohttp.ClientConnectorSSLError, OSError(1, "TLS"), "host gateway.example:443 [TLS]"),
        (aiohttp.ClientProxyConnectionError, OSError(111, "refused"), "host gateway.example:443 [refused]"),
        (
            aiohttp.ClientConnectorCertificateError,
            ssl.CertificateError("expired"),
            "host gateway.example:443 [SSLCertVerificationError: ('expired',)]",
        ),
    ],
)
def test_tls_settings_are_not_shown(
    error_type: type[aiohttp.ClientConnectorError], cause: OSError, text: str, setting: bool | ssl.SSLContext
) -> None:
    """The text of an error has the host and the reason, and not what aiohttp was told about certificates."""
    key = ConnectionKey("gateway.example", 443, setting is not False, setting, None, None, None)
    error = translate_error(error_type(key, cause), maybe_sent=False)

    assert str(error) == f"no connection: Cannot connect to {text}"
