"""Submits: what goes out, what may be repeated, and that nobody pays twice."""

import asyncio
import base64
import io
import socket
from collections import deque
from pathlib import Path

import aiohttp
import anyio
import pytest
from PIL import Image
from support.scripted import (
    Behaviour,
    ScriptedGateway,
    answer,
    completed,
    disconnect,
    half,
    half_hang,
    hang,
    html,
    no_http,
    raw,
    reset,
    session_on,
)

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    FluxError,
    FluxSession,
    GenerationRequest,
    InsufficientBalanceError,
    InvalidRequestError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    SessionClosedError,
    SubmissionUncertainError,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async._api.client import SubmitCancellation
from flux2max_async._api.transport import _NotingPayload
from flux2max_async.emulator import Emulator, Fault


async def test_a_submit_is_what_the_protocol_says(scripted: ScriptedGateway) -> None:
    """A submit has the documented path, headers and envelope, and holds what the caller set and nothing else."""
    request = GenerationRequest("a cat", seed=7, width=0, output_format="png", extra={"raw": True, "no": None}, key="k")
    async with session_on(scripted) as session:
        await session.generate(request)

    call = scripted.of("POST")[0]
    assert call.path == "/model/v1/generation"
    assert call.json == {
        "model": "flux_2_max",
        "input": [{"params": {"prompt": "a cat", "seed": 7, "width": 0, "output_format": "png", "raw": True}}],
    }
    assert call.headers["Authorization"] == f"Bearer {scripted.api_key}"
    assert call.headers["Content-Type"] == call.headers["Accept"] == "application/json"
    assert call.headers["User-Agent"].startswith("flux2max_async/")


async def test_a_path_prefix_is_kept(scripted: ScriptedGateway) -> None:
    """A base url with a path prefix, as behind a proxy, is respected for submits and polls."""
    async with FluxSession(scripted.api_key, base_url=f"{scripted.url}/proxy/flux/") as session:
        await session.generate("a cat")

    assert [call.path for call in scripted.received] == [
        "/proxy/flux/model/v1/generation",
        "/proxy/flux/model/v1/generation/task/t1",
    ]


async def test_input_images_are_sent_in_order(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Urls go as they are, everything else as base64, under the service's numbered names."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    data = file.getvalue()
    path = tmp_path / "in.png"
    path.write_bytes(data)
    async with session_on(scripted) as session:
        await session.generate("a cat", input_images=["https://x.example/a.png", path, data, io.BytesIO(data)])

    params = scripted.of("POST")[0].params
    encoded = base64.b64encode(data).decode()
    assert [params[name] for name in ("input_image", "input_image_2", "input_image_3", "input_image_4")] == [
        "https://x.example/a.png",
        encoded,
        encoded,
        encoded,
    ]


async def test_a_large_body_arrives_whole(scripted: ScriptedGateway) -> None:
    """Several megabytes of input images pass, in pieces and without a warning."""
    data = b"\x89PNG\r\n\x1a\n" + bytes(9_000_000)
    async with session_on(scripted) as session:
        await session.generate("a cat", input_images=[data, data])

    assert base64.b64decode(scripted.of("POST")[0].params["input_image_2"]) == data


async def test_a_file_that_is_gone_costs_nothing(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A path is read at the submit; when it can't be, the error names the field and nothing is sent."""
    request = GenerationRequest("a cat", input_images=["https://x.example/a.png", tmp_path / "gone.png"])
    async with session_on(scripted) as session:
        with pytest.raises(InvalidRequestError, match=r"input_images\[1\]: can't read .*gone.png") as caught:
            await session.generate(request)

    assert caught.value.field == "input_images"
    assert scripted.received == []


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        pytest.param(answer(400, {"error": {"code": "x", "message": "bad width"}}), BadRequestError, id="400"),
        pytest.param(answer(422, {"detail": [{"msg": "bad"}]}), BadRequestError, id="422"),
        pytest.param(answer(401, {"message": "no"}), AuthenticationError, id="401"),
        pytest.param(answer(402, {"message": "no"}), InsufficientBalanceError, id="402"),
        pytest.param(
            answer(403, {"error": {"code": 40203, "message": "no"}}), InsufficientBalanceError, id="403 money"
        ),
        pytest.param(answer(403, {"message": "no"}), PermissionDeniedError, id="403"),
        pytest.param(answer(404, b""), TaskNotFoundError, id="404"),
        pytest.param(answer(418, b"teapot"), ResponseError, id="418"),
        pytest.param(answer(307, b"", [("Location", "https://x.example/")]), ResponseError, id="307"),
        pytest.param(answer(200, {"error": {"code": 7, "message": "no"}}), ResponseError, id="200 with an error"),
    ],
)
async def test_a_refusal_is_raised_at_once(
    scripted: ScriptedGateway, behaviour: Behaviour, error: type[ResponseError]
) -> None:
    """A refusal is its own error, with the service's words, and is not repeated."""
    scripted.submits = deque([behaviour])
    async with session_on(scripted) as session:
        with pytest.raises(error) as caught:
            await session.generate("a cat")

        assert session.stats.retries == 0
    assert type(caught.value) is error
    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(reset, id="reset"),
        pytest.param(disconnect, id="disconnected"),
        pytest.param(half, id="half an answer"),
        pytest.param(half_hang, id="half an answer, then nothing"),
        pytest.param(hang, id="no answer"),
        pytest.param(no_http, id="no HTTP"),
        pytest.param(html, id="a page"),
        pytest.param(answer(200, {}), id="neither id nor error"),
        pytest.param(answer(408, b""), id="408"),
        pytest.param(answer(500, b""), id="500"),
        pytest.param(answer(502, b"<html>"), id="502"),
        pytest.param(answer(504, b""), id="504"),
    ],
)
async def test_a_lost_answer_is_uncertain_and_never_repeated(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """Whatever happens to the answer of a submit that went out, the gateway sees exactly one POST."""
    scripted.submits = deque([behaviour])
    async with session_on(scripted) as session:
        with pytest.raises(SubmissionUncertainError) as caught:
            await session.generate("a cat")

    assert isinstance(caught.value.__cause__, FluxError)
    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(answer(503, b""), id="503"),
        pytest.param(answer(429, {"message": "slow down"}), id="429"),
        pytest.param(answer(429, b"", [("Retry-After", "2")]), id="429 with seconds"),
    ],
)
async def test_what_created_nothing_is_sent_again(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """A submit that certainly created nothing is repeated until it is taken."""
    scripted.submits = deque([behaviour, behaviour, answer(200, {"id": "t1"})])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

        assert session.stats.retries == 2
    assert outcome.task_id == "t1"
    assert len(scripted.of("POST")) == 3


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        pytest.param(answer(503, b""), ServerError, id="503"),
        pytest.param(answer(429, b"", [("Retry-After", "4")]), RateLimitedError, id="429"),
    ],
)
async def test_repeating_ends_with_the_deadline(
    scripted: ScriptedGateway, behaviour: Behaviour, error: type[FluxError]
) -> None:
    """When the deadline passes, the last refusal is raised."""
    scripted.submits = deque([behaviour])
    async with session_on(scripted, task_timeout=60.0) as session:
        started = anyio.current_time()
        with pytest.raises(error):
            await session.generate("a cat")

        assert 40 < anyio.current_time() - started <= 60
    assert len(scripted.of("POST")) > 3


async def test_no_connection_is_tried_until_there_is_one(unused_port: int) -> None:
    """A gateway that can't be reached costs nothing, so it is tried again; the last error is raised at the deadline."""
    async with FluxSession("key", base_url=f"http://127.0.0.1:{unused_port}", task_timeout=20.0) as session:
        with pytest.raises(TransportError, match="no connection") as caught:
            await session.generate("a cat")

        assert session.stats.retries > 3
    assert caught.value.maybe_sent is False


async def test_the_deadline_interrupts_a_hung_submit(scripted: ScriptedGateway) -> None:
    """A deadline shorter than the request timeout cuts a hung submit; it went out, so it is uncertain."""
    scripted.submits = deque([hang])
    async with session_on(scripted, task_timeout=3.0) as session:
        started = anyio.current_time()
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat")

        assert anyio.current_time() - started == pytest.approx(3.0)


async def test_submits_never_share_a_connection(scripted: ScriptedGateway) -> None:
    """A connection that the server closes right after an answer, unannounced, makes no honest submit uncertain."""

    def once(task_id: str) -> Behaviour:
        content = b'{"id": "%s"}' % task_id.encode()
        return raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))

    scripted.submits = deque(once(f"t{n}") for n in range(1, 11))
    async with session_on(scripted) as session:
        tasks = [await session.submit("a cat") for _ in range(10)]

    assert [task.id for task in tasks] == [f"t{n}" for n in range(1, 11)]


async def test_submits_share_no_connection_of_a_borrowed_session(scripted: ScriptedGateway) -> None:
    """With a borrowed aiohttp session, too, each submit has a connection of its own, and polls share theirs."""
    async with aiohttp.ClientSession() as http:
        async with session_on(scripted, http_session=http) as session:
            for _ in range(3):
                await session.generate("a cat")

        assert not http.closed
    assert len(scripted.received) == 6
    assert scripted.connections == 4


async def test_a_hundred_submits_are_on_the_wire_at_once(scripted: ScriptedGateway) -> None:
    """Of many submits at once, a hundred go out; the others wait for an answer to one of those."""
    scripted.submits = deque(answer(200, completed(f"t{n}"), after=2.0) for n in range(150))
    async with session_on(scripted, max_in_flight=1000) as session, anyio.create_task_group() as group:
        for _ in range(150):
            group.start_soon(session.generate, "a cat")
        await anyio.sleep(1.0)
        stats = session.stats
    moments = [call.at for call in scripted.of("POST")]

    assert [moment - moments[0] for moment in moments] == pytest.approx([0.0] * 100 + [2.0] * 50, abs=0.1)
    assert (stats.submitting, stats.in_flight, session.stats.submitting) == (100, 0, 0)


async def test_an_answer_that_has_already_ended_needs_no_poll(scripted: ScriptedGateway) -> None:
    """A submit that is answered with the finished task costs no poll."""
    scripted.submits = deque([answer(200, completed("t9"))])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

    assert (outcome.task_id, outcome.polls) == ("t9", 0)


@pytest.mark.parametrize("fault", [None, *Fault])
async def test_nobody_pays_twice(gateway: Emulator, fault: Fault | None) -> None:
    """Whatever one fault does to a submit, the gateway has accepted at most one POST for the prompt."""
    gateway.script("submit", fault)
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcomes = [outcome async for outcome in session.stream(["a cat"])]

    assert len(outcomes) == 1
    assert gateway.accepted["a cat"] <= 1
    assert outcomes[0].ok or isinstance(outcomes[0].error, (SubmissionUncertainError, TaskNotFoundError))


@pytest.mark.parametrize("repeats", range(3))
async def test_a_cut_body_was_sent(scripted: ScriptedGateway, repeats: int) -> None:
    """A connection that breaks while the body is being written counts as sent, since some of it was."""
    server = await asyncio.start_server(_break_after_some_bytes, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    data = b"\x89PNG\r\n\x1a\n" + bytes(15_000_000)
    async with server, FluxSession("key", base_url=url) as session:
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat", input_images=[data] * (repeats + 1))


async def _break_after_some_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(1000)
    writer.transport.abort()


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def test_garbage_is_named_in_the_cause(scripted: ScriptedGateway) -> None:
    """What the gateway said instead of an answer can be read from the error."""
    scripted.submits = deque([html])
    async with session_on(scripted) as session:
        with pytest.raises(SubmissionUncertainError, match="Welcome to nginx!") as caught:
            await session.generate("a cat")

    assert isinstance(caught.value.__cause__, ProtocolError)


async def test_after_a_refused_poll_submits_probe_one_at_a_time(scripted: ScriptedGateway) -> None:
    """When a poll is refused with 429, the next submits wait for the pause and then go out one after the other."""
    scripted.submits = deque(answer(200, {"id": f"t{n}"}, after=2.0) for n in range(20))
    scripted.polls = deque([answer(429, b"", [("Retry-After", "10")]), answer(200, completed())])
    async with session_on(scripted) as session:
        first = await session.submit("a cat")
        await anyio.sleep(1.5)
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(session.submit, "a dog")
        await first
    refused = scripted.of("GET")[0].at
    moments = [call.at - refused for call in scripted.of("POST")[1:]]

    assert moments[:3] == pytest.approx([10.0, 12.0, 14.0], abs=0.05)
    assert moments[3:] == pytest.approx([16.0] * 3, abs=0.05)


async def test_a_retrying_middleware_cannot_send_a_submit_twice(scripted: ScriptedGateway) -> None:
    """A borrowed session whose middleware repeats 5xx answers still writes each submit once."""

    async def persistent(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        response = await handler(request)
        return await handler(request) if response.status >= 500 else response

    scripted.submits = deque([answer(502, b""), answer(200, {"id": "t1"})])
    async with (
        aiohttp.ClientSession(middlewares=[persistent]) as http,
        session_on(scripted, http_session=http) as session,
    ):
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat")

    assert len(scripted.of("POST")) == 1


async def test_what_a_borrowed_session_forbids_is_our_error(scripted: ScriptedGateway) -> None:
    """A borrowed session with credentials of its own can't carry the key; the error is one of ours."""
    async with (
        aiohttp.ClientSession(middlewares=[_refuse]) as http,
        session_on(scripted, http_session=http) as session,
    ):
        with pytest.raises(FluxError):
            await session.fetch("t1")

    assert scripted.received == []


async def _refuse(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    raise ValueError("not like this")


async def test_a_gateway_that_refuses_for_days_is_borne() -> None:
    """Two thousand refusals in a row are as good as one."""
    async with (
        Emulator(max_in_flight=0, pictures=False) as full,
        FluxSession(full.api_key, base_url=full.url) as session,
    ):
        session._supervisor.gateway._pace._refusals = 5000  # type: ignore[union-attr]
        with pytest.raises(RateLimitedError):
            await session.generate("a cat")


async def test_a_host_that_no_name_server_knows_is_a_configuration_error() -> None:
    """An address whose host can't be one is refused when the session is made."""
    with pytest.raises(ConfigurationError, match="base_url"):
        FluxSession("key", base_url="https://a..b")


async def test_a_503_may_say_how_long(scripted: ScriptedGateway) -> None:
    """A service that is unavailable for a stated time isn't asked again before."""
    scripted.submits = deque([answer(503, b"", [("Retry-After", "9")]), answer(200, {"id": "t1"})])
    async with session_on(scripted) as session:
        await session.submit("a cat")

    first, second = scripted.of("POST")
    assert second.at - first.at == pytest.approx(9.0, abs=0.01)


async def test_a_submit_that_a_borrowed_session_never_sends_costs_nothing(scripted: ScriptedGateway) -> None:
    """A submit that fails before a byte of it was written is certain to have created nothing."""
    async with (
        aiohttp.ClientSession(middlewares=[_refuse]) as http,
        session_on(scripted, http_session=http, task_timeout=5.0) as session,
    ):
        with pytest.raises(TransportError) as caught:
            await session.generate("a cat")

    assert caught.value.maybe_sent is False
    assert scripted.received == []


async def test_an_endless_answer_is_no_answer(scripted: ScriptedGateway) -> None:
    """An answer of more than 16 MB isn't read to its end."""
    scripted.polls = deque([answer(200, b" " * 16_000_001)])
    async with session_on(scripted) as session:
        with pytest.raises(ProtocolError, match="16 MB"):
            await session.fetch("t1")


class Wire:
    """Stands where aiohttp's writer would."""

    def __init__(self) -> None:
        self.written = b""
        self.protocol = self
        self.kept_alive = True

    async def write(self, chunk: bytes) -> None:
        self.written += chunk

    def force_close(self) -> None:
        self.kept_alive = False


async def test_a_body_notes_that_it_was_asked_for() -> None:
    """The body of a submit can be read at any time, and written once."""
    body, wire = _NotingPayload(b"{}"), Wire()
    before = (body.written, body.decode())
    await body.write(wire)  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="twice"):
        await body.write(wire)  # type: ignore[arg-type]

    assert before == (False, "{}")
    assert (wire.written, wire.kept_alive, body.written) == (b"{}", False, True)


@pytest.mark.parametrize("between", range(4))
async def test_a_submit_may_be_withdrawn_twice(between: int) -> None:
    """A stream that is left while its session closes withdraws what the session withdraws, too; neither goes wrong."""
    patience = SubmitCancellation()

    async def wait() -> None:
        async with patience.waiting():
            await asyncio.sleep(60)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    patience.end(SessionClosedError("first"))
    for _ in range(between):
        await asyncio.sleep(0)
    patience.end(SessionClosedError("second"))

    with pytest.raises(SessionClosedError):
        await waiting
