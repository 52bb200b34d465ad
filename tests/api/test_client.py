"""ApiClient: what is sent, what is retried, and that no request is paid for twice."""

import asyncio
import base64
import contextlib
import io
import json
import random
from collections import Counter, deque
from pathlib import Path

import aiohttp
import anyio
import pytest
from PIL import Image
from support.ports import free_port
from support.responses import jpeg
from support.scripted import (
    Behaviour,
    Connection,
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
    running,
    session_on,
)

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    Completed,
    ConfigurationError,
    ContentModeratedError,
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
    TaskFailedError,
    TaskStatus,
    TransportError,
)
from flux2max_async._api.submit_payload import SubmitPayload
from flux2max_async._tasks.cancellation import SubmitCancellation
from flux2max_async.emulator import Emulator, Fault


async def test_submit_request(scripted: ScriptedGateway) -> None:
    """A submit has the documented path, headers and envelope, and exactly the parameters that the caller set."""
    generation = GenerationRequest(
        "a cat", seed=7, width=0, output_format="png", extra={"raw": True, "no": None}, key="k"
    )
    async with session_on(scripted) as session:
        await session.generate(generation)

    request = scripted.of("POST")[0]
    assert request.path == "/model/v1/generation"
    assert request.json == {
        "model": "flux_2_max",
        "input": [{"params": {"prompt": "a cat", "seed": 7, "width": 0, "output_format": "png", "raw": True}}],
    }
    assert request.headers["Authorization"] == f"Bearer {scripted.api_key}"
    assert request.headers["Content-Type"] == request.headers["Accept"] == "application/json"
    assert request.headers["User-Agent"].startswith("flux2max_async/")


async def test_base_url_with_a_path_prefix(scripted: ScriptedGateway) -> None:
    """The path prefix of the base URL, as behind a reverse proxy, is used for submits and polls."""
    async with FluxSession(scripted.api_key, base_url=f"{scripted.url}/proxy/flux/") as session:
        await session.generate("a cat")

    assert [request.path for request in scripted.received] == [
        "/proxy/flux/model/v1/generation",
        "/proxy/flux/model/v1/generation/task/t1",
    ]


async def test_input_images_are_sent_in_order(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """URLs are sent as they are and everything else as base64, under the service's numbered names."""
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


async def test_large_body_is_sent_completely(scripted: ScriptedGateway) -> None:
    """Several megabytes of input images are sent in chunks and without a warning."""
    data = b"\x89PNG\r\n\x1a\n" + bytes(9_000_000)
    async with session_on(scripted) as session:
        await session.generate("a cat", input_images=[data, data])

    assert base64.b64decode(scripted.of("POST")[0].params["input_image_2"]) == data


async def test_missing_input_file_sends_nothing(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A path is read at the submit; if that fails, the error names the field, and nothing is sent."""
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
            answer(403, {"error": {"code": 40203, "message": "no"}}), InsufficientBalanceError, id="403, no balance"
        ),
        pytest.param(answer(403, {"message": "no"}), PermissionDeniedError, id="403"),
        pytest.param(
            answer(429, {"status": {"code": 429, "message": "no", "error_code": 40203}, "data": None}),
            InsufficientBalanceError,
            id="429, no balance",
        ),
        pytest.param(answer(400, {"message": "insufficient credits"}), InsufficientBalanceError, id="400, no balance"),
        pytest.param(
            answer(403, {"error": {"code": "content_policy_violation", "message": "no"}}),
            ContentModeratedError,
            id="403, moderated",
        ),
        pytest.param(answer(403, b"<html>blocked</html>"), PermissionDeniedError, id="403 of a firewall"),
        pytest.param(answer(404, b""), ConfigurationError, id="404"),
        pytest.param(answer(405, {"detail": "Method Not Allowed"}), ConfigurationError, id="405"),
        pytest.param(answer(418, b"teapot"), BadRequestError, id="418"),
        pytest.param(answer(307, b"", [("Location", "https://x.example/")]), ConfigurationError, id="307"),
        pytest.param(answer(200, {"error": {"code": 7, "message": "no"}}), ResponseError, id="200, error"),
    ],
)
async def test_refusal_is_raised_without_retry(
    scripted: ScriptedGateway, behaviour: Behaviour, error: type[FluxError]
) -> None:
    """A refusal is raised as an error of its own class and is not retried."""
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
        pytest.param(half, id="truncated"),
        pytest.param(half_hang, id="truncated, then hung"),
        pytest.param(hang, id="hung"),
        pytest.param(no_http, id="not HTTP"),
        pytest.param(html, id="HTML"),
        pytest.param(answer(200, {}), id="neither id nor error"),
        pytest.param(answer(408, b""), id="408"),
        pytest.param(answer(500, b""), id="500"),
        pytest.param(answer(502, b"<html>"), id="502"),
        pytest.param(answer(504, b""), id="504"),
    ],
)
async def test_lost_response_is_uncertain_and_never_retried(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """Whatever happens to the response to a submit that was sent, the service receives exactly one POST."""
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
        pytest.param(answer(429, b"", [("Retry-After", "2")]), id="429, Retry-After"),
    ],
)
async def test_submit_that_created_nothing_is_retried(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """A submit that certainly created nothing is retried until it is accepted."""
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
async def test_retries_end_at_the_deadline(
    scripted: ScriptedGateway, behaviour: Behaviour, error: type[FluxError]
) -> None:
    """At the deadline, the last refusal is raised."""
    scripted.submits = deque([behaviour])
    async with session_on(scripted, task_timeout=60.0) as session:
        started = anyio.current_time()
        with pytest.raises(error):
            await session.generate("a cat")

        assert 40 < anyio.current_time() - started <= 60
    assert len(scripted.of("POST")) > 3


async def test_submit_without_a_connection_is_retried(unused_port: int) -> None:
    """A submit that can't connect costs nothing, so it is retried; the last error is raised at the deadline."""
    async with FluxSession("key", base_url=f"http://127.0.0.1:{unused_port}", task_timeout=20.0) as session:
        with pytest.raises(TransportError, match="no connection") as caught:
            await session.generate("a cat")

        assert session.stats.retries > 3
    assert caught.value.maybe_sent is False


async def test_deadline_interrupts_a_hung_submit(scripted: ScriptedGateway) -> None:
    """A deadline before the HTTP timeout interrupts a hung submit; it was sent, so it is uncertain."""
    scripted.submits = deque([hang])
    async with session_on(scripted, task_timeout=3.0) as session:
        started = anyio.current_time()
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat")

        assert anyio.current_time() - started == pytest.approx(3.0)


async def test_no_submit_is_lost_if_connections_are_closed_after_responses(scripted: ScriptedGateway) -> None:
    """If the server closes connections right after its responses, unannounced, no submit becomes uncertain."""

    def respond_once(task_id: str) -> Behaviour:
        content = b'{"id": "%s"}' % task_id.encode()
        return raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))

    scripted.submits = deque(respond_once(f"t{n}") for n in range(1, 11))
    async with session_on(scripted) as session:
        tasks = [await session.submit("a cat") for _ in range(10)]

    assert [task.id for task in tasks] == [f"t{n}" for n in range(1, 11)]


async def test_submits_reuse_no_connection_of_a_borrowed_session(scripted: ScriptedGateway) -> None:
    """With a borrowed aiohttp session, each submit has its own connection, and polls reuse theirs."""
    async with aiohttp.ClientSession() as http:
        async with session_on(scripted, http_session=http) as session:
            for _ in range(3):
                await session.generate("a cat", input_images=[jpeg()])

        assert not http.closed
    assert len(scripted.received) == 6
    assert scripted.connections == 4


async def test_at_most_a_hundred_concurrent_submits(scripted: ScriptedGateway) -> None:
    """Of many submits at the same time, a hundred are sent; the others wait for one of those to end."""
    scripted.submits = deque(answer(200, completed(f"t{n}"), after=0.0 if n < 80 else 2.0) for n in range(230))
    async with session_on(scripted, max_in_flight=1000) as session, anyio.create_task_group() as group:
        for _ in range(80):
            await session.generate("a cat")
        for _ in range(150):
            group.start_soon(session.generate, "a cat")
        await anyio.sleep(1.0)
        stats = session.stats
    times = [request.at for request in scripted.of("POST")][80:]

    assert [time - times[0] for time in times] == pytest.approx([0.0] * 100 + [2.0] * 50, abs=0.1)
    assert (stats.submitting, stats.in_flight, session.stats.submitting) == (100, 0, 0)


async def test_submit_response_with_a_completed_task_needs_no_poll(scripted: ScriptedGateway) -> None:
    """If the response to a submit is a completed task, it is not polled."""
    scripted.submits = deque([answer(200, completed("t9"))])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

    assert (outcome.task_id, outcome.polls) == ("t9", 0)


LOST_ANSWERS = frozenset(
    (
        *(Fault.SERVER_ERROR, Fault.BAD_GATEWAY, Fault.GATEWAY_TIMEOUT, Fault.REQUEST_TIMEOUT, Fault.RESET_BEFORE),
        *(Fault.RESET_AFTER, Fault.HANG, Fault.CUT, Fault.GARBAGE, Fault.NO_ID, Fault.STATUS_TASK_NOT_FOUND),
    )
)


@pytest.mark.parametrize("fault", [None, *Fault])
async def test_no_fault_causes_a_second_task(gateway: Emulator, fault: Fault | None) -> None:
    """Whatever a single fault does to a submit, at most one POST creates a task, whose end, id or doubt is reported."""
    gateway.script("submit", fault)
    error: FluxError | None = None
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        try:
            await session.generate("a cat")
        except FluxError as failure:
            error = failure

    assert gateway.accepted["a cat"] <= 1
    for task in gateway.tasks.values():
        assert (error is None) == (task.fate == "completed") or isinstance(error, SubmissionUncertainError), error
        assert error is None or error.task_id == task.id or isinstance(error, SubmissionUncertainError)
    assert gateway.tasks or error is not None
    assert isinstance(error, SubmissionUncertainError) is (fault in LOST_ANSWERS)


@pytest.mark.parametrize("extra_images", range(3))
async def test_connection_lost_while_sending_counts_as_sent(scripted: ScriptedGateway, extra_images: int) -> None:
    """If the connection is lost while the body is being written, the submit is uncertain, because part of it was sent."""
    server = await asyncio.start_server(_abort_while_receiving, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    data = b"\x89PNG\r\n\x1a\n" + bytes(15_000_000)
    async with server, FluxSession("key", base_url=url) as session:
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat", input_images=[data] * (extra_images + 1))


async def _abort_while_receiving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):  # a connection that was kept ready, and never used
        await reader.readexactly(1000)
    writer.transport.abort()


@pytest.fixture
def unused_port() -> int:
    """Return a port on which no server listens."""
    return free_port()


async def test_uncertain_error_shows_an_unexpected_body(scripted: ScriptedGateway) -> None:
    """The error shows the beginning of a response that isn't the API's."""
    scripted.submits = deque([html])
    async with session_on(scripted) as session:
        with pytest.raises(SubmissionUncertainError, match="Welcome to nginx!") as caught:
            await session.generate("a cat")

    assert isinstance(caught.value.__cause__, ProtocolError)


async def test_refused_polls_say_nothing_about_submits(scripted: ScriptedGateway) -> None:
    """However many polls are refused with 429, submits are sent at once."""
    scripted.submits = deque(answer(200, {"id": f"t{n}"}, after=2.0) for n in range(20))
    scripted.polls = deque([*[answer(429, b"", [("Retry-After", "10")])] * 8, answer(200, completed())])
    async with session_on(scripted) as session:
        for number in range(8):
            session.attach(f"a{number}")
        await anyio.sleep(1.5)
        started = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(session.submit, "a dog")

    assert len(scripted.of("GET")) == 8
    assert [request.at for request in scripted.of("POST")] == [started] * 6


async def test_a_refused_submit_holds_back_only_itself(scripted: ScriptedGateway) -> None:
    """Three refused submits are sent again when they may be; others, and all polls, are sent meanwhile."""
    refused = answer(429, b"", [("Retry-After", "10")])
    scripted.submits = deque([refused] * 3 + [answer(200, {"id": f"t{n}"}) for n in range(20)])
    async with session_on(scripted) as session:
        started = anyio.current_time()
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(session.submit, f"cat {number}")
        polls = [request.at for request in scripted.of("GET")]
    times: dict[str, list[float]] = {}
    for request in scripted.of("POST"):
        times.setdefault(str(request.params["prompt"]), []).append(request.at - started)

    assert sorted(map(len, times.values())) == [1, 1, 1, 2, 2, 2]
    assert max(at for at, *_ in times.values()) < 0.01
    assert all(again[0] == pytest.approx(10.05, abs=0.06) for _, *again in times.values() if again)
    assert min(polls) - started < 2


async def test_frequently_refused_submits_hold_back_all(scripted: ScriptedGateway) -> None:
    """After four refused submits, all wait, and are then sent one at a time until there is no ceiling; polls go on."""
    refused = answer(429, b"", [("Retry-After", "10")])
    scripted.submits = deque([refused] * 4 + [answer(200, {"id": f"t{n}"}, after=2.0) for n in range(20)])
    async with session_on(scripted) as session:
        session.attach("t99")
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(session.submit, f"cat {number}")
            await anyio.sleep(3.0)
            group.start_soon(session.submit, "a dog")
    times = [request.at for request in scripted.of("POST")]
    start = times[0]

    assert times[:6] == pytest.approx([start] * 6, abs=0.01)
    assert times[6:9] == pytest.approx([start + 10.0, start + 12.0, start + 14.0], abs=0.1)
    assert min(request.at for request in scripted.of("GET")) < start + 1


@pytest.mark.parametrize("slots", [1, 24])
@pytest.mark.parametrize("asked", [0.0, 0.3, 2.0, None])
async def test_no_refused_call_is_repeated_before_its_time(
    scripted: ScriptedGateway, slots: int, asked: float | None
) -> None:
    """Whatever share of submits and polls is refused, none is sent again before the time it was asked to wait."""
    randoms = random.Random(slots)
    headers = [] if asked is None else [("Retry-After", str(asked))]
    allowed: dict[str, float] = {}
    early: list[str] = []
    polls: Counter[str] = Counter()

    async def behave(connection: Connection) -> None:
        call = connection.call
        name = str(call.params["prompt"]) if call.method == "POST" else call.path.rpartition("/")[2]
        if call.at < allowed.get(name, 0.0) - 0.001:
            early.append(name)
        if randoms.random() < 0.4:
            allowed[name] = call.at + (1.0 if asked is None else asked)
            await answer(429, b"", headers)(connection)
        elif call.method == "POST":
            await answer(200, {"id": f"task-{name}"})(connection)
        else:
            polls[name] += 1
            await answer(200, running(name) if polls[name] < 3 else completed(name))(connection)

    scripted.submits = scripted.polls = deque([behave])
    async with session_on(scripted, max_in_flight=slots) as session:
        outcomes = [outcome.ok async for outcome in session.stream(f"cat-{number}" for number in range(30))]

    assert outcomes == [True] * 30
    assert early == []
    assert session.stats.rate_limited > 20


async def test_middleware_cannot_send_a_submit_twice(scripted: ScriptedGateway) -> None:
    """A borrowed session whose middleware retries 5xx responses still sends each submit once."""

    async def retry_on_server_error(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await handler(request)
        return await handler(request) if response.status >= 500 else response

    scripted.submits = deque([answer(502, b""), answer(200, {"id": "t1"})])
    async with (
        aiohttp.ClientSession(middlewares=[retry_on_server_error]) as http,
        session_on(scripted, http_session=http) as session,
    ):
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat")

    assert len(scripted.of("POST")) == 1


async def test_error_of_a_middleware_is_a_flux_error(scripted: ScriptedGateway) -> None:
    """An error that a middleware of a borrowed session raises is translated to a FluxError."""
    async with (
        aiohttp.ClientSession(middlewares=[_refuse]) as http,
        session_on(scripted, http_session=http) as session,
    ):
        with pytest.raises(FluxError):
            await session.fetch("t1")

    assert scripted.received == []


async def _refuse(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    raise ValueError("refused by the middleware")


async def test_thousands_of_refusals_in_a_row() -> None:
    """Thousands of refusals in a row have the same effect as a few."""
    async with (
        Emulator(max_in_flight=0, pictures=False) as gateway,
        FluxSession(gateway.api_key, base_url=gateway.url) as session,
    ):
        session._supervisor.client.submit_limiter._consecutive_refusals = 5000  # type: ignore[union-attr]
        with pytest.raises(RateLimitedError):
            await session.generate("a cat")


async def test_base_url_with_an_invalid_host_is_a_configuration_error() -> None:
    """A base URL whose host name is invalid is refused when the session is created."""
    with pytest.raises(ConfigurationError, match="base_url"):
        FluxSession("key", base_url="https://a..b")


async def test_503_with_retry_after(scripted: ScriptedGateway) -> None:
    """After a 503 with Retry-After, the submit is retried after that time."""
    scripted.submits = deque([answer(503, b"", [("Retry-After", "9")]), answer(200, {"id": "t1"})])
    async with session_on(scripted) as session:
        await session.submit("a cat")

    first, second = scripted.of("POST")
    assert second.at - first.at == pytest.approx(9.0, abs=0.01)


async def test_submit_that_fails_before_it_is_sent_created_nothing(scripted: ScriptedGateway) -> None:
    """A submit that fails before any byte of it is written has certainly created nothing."""
    async with (
        aiohttp.ClientSession(middlewares=[_refuse]) as http,
        session_on(scripted, http_session=http, task_timeout=5.0) as session,
    ):
        with pytest.raises(TransportError) as caught:
            await session.generate("a cat")

    assert caught.value.maybe_sent is False
    assert scripted.received == []


@pytest.mark.parametrize("body", [b"x" * 140_000_001, b" " * 6_000_000, b"[]" * 3_000_000])
async def test_too_large_response_is_a_protocol_error(scripted: ScriptedGateway, body: bytes) -> None:
    """A response of more than 140 MB, or of more than 4 MB that can't be an image, is not read to its end."""
    scripted.polls = deque([answer(200, body)])
    async with session_on(scripted) as session:
        with pytest.raises(ProtocolError, match="larger than 4 MB, or with an image 140 MB"):
            await session.fetch("t1")


@pytest.mark.parametrize(
    ("size", "pauses", "ends"),
    [
        (900_000, [5, 0, 0, 0, 0], [5, 1, 2, 3, 4]),
        (2_000_000, [5, 5, 5, 0, 0], [5, 6, 7, 3, 4]),
        (2_000_000, [5, 5, 5, 5, 0], [5, 6, 7, 8, 5]),
        (9_000_000, [5, 0, 0, 0, 0], [5, 5, 5, 5, 5]),
    ],
)
async def test_large_responses_wait_for_each_other(
    scripted: ScriptedGateway, size: int, pauses: list[int], ends: list[int]
) -> None:
    """Four responses of more than 1 MB are read at once, and one of more than 8 MB; smaller ones wait for none."""
    large = json.dumps(completed("t1", metadata={"text": "x" * size})).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(large)

    def in_two_parts(pause: float) -> Behaviour:
        async def behave(connection: Connection) -> None:
            await connection.send(head + large[:-1])
            await asyncio.sleep(pause)
            await connection.send(large[-1:])

        return behave

    scripted.polls = deque([*map(in_two_parts, pauses), answer(200, completed("t1"))])
    now = asyncio.get_running_loop().time
    ended = [0] * 6
    async with session_on(scripted) as session:
        started = now()

        async def fetch(number: int) -> None:
            await asyncio.sleep(number)
            snapshot = await session.fetch("t1")
            assert snapshot.status is TaskStatus.COMPLETED
            ended[number] = round(now() - started)

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(fetch, number)

    assert ended == [*ends, 5]


async def test_large_responses_hold_up_no_submit(scripted: ScriptedGateway) -> None:
    """While large responses to polls are being read, the response to a submit is, too, even if it is large."""
    large = json.dumps(completed("t1", metadata={"text": "x" * 9_000_000})).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(large)
    scripted.polls = deque([raw(head + large[:-1], then="hang")])
    scripted.submits = deque([answer(200, large)])
    async with session_on(scripted, http_timeout=5.0) as session, anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(session.fetch, "t1")
        await asyncio.sleep(1.0)
        started = asyncio.get_running_loop().time()
        outcome = await session.generate("a cat")
        assert asyncio.get_running_loop().time() - started < 1.0
        group.cancel_scope.cancel()

    assert outcome.task_id == "t1"


async def test_too_large_response_to_a_submit_is_uncertain(scripted: ScriptedGateway) -> None:
    """A response to a submit has at most 16 MB."""
    scripted.submits = deque([answer(200, {"id": "t1", "text": "x" * 16_000_001})])
    async with session_on(scripted) as session:
        with pytest.raises(SubmissionUncertainError, match="the response is larger than"):
            await session.generate("a cat")


async def test_inline_image_of_many_megabytes_is_saved(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A response may contain an image of 20 MB in base64."""
    image = jpeg(random.Random(1).randbytes(20_000_000))
    inline = [{"content": [{"b64_json": base64.b64encode(image).decode()}]}]
    scripted.polls = deque([answer(200, completed("t1", output=inline))])
    async with session_on(scripted) as session:
        outcomes = [outcome async for outcome in session.stream(["a cat"], save_to=tmp_path)]

    (outcome,) = outcomes
    assert isinstance(outcome, Completed)
    assert [path.read_bytes() == image for path in outcome.saved] == [True]


SERVICE_TEXT = "first line\nsecond line \x1b[31mred\x1b[0m \u202e " + "very long " * 500


async def test_texts_of_the_service_in_logs(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """Task ids, statuses and messages of the service are short and on one line in each log message."""
    task_id = f"t1\n{'x' * 1000}"
    error = {"error": {"code": "c\n" * 500, "message": SERVICE_TEXT}}
    header = [("X-Request-Id", "r" * 5000)]
    scripted.submits = deque([answer(503, error, header), answer(200, {"id": task_id, "status": SERVICE_TEXT}), reset])
    failed = {"id": task_id, "status": "failed", **error}
    scripted.polls = deque(
        [answer(500, error, header), answer(200, {"id": task_id, "status": SERVICE_TEXT}), answer(200, failed)]
    )
    async with session_on(scripted) as session:
        with pytest.raises(TaskFailedError):
            await session.generate("a cat")
        with pytest.raises(SubmissionUncertainError):
            await session.generate("another cat")

    ours = [record.getMessage() for record in caplog.records if record.name.startswith("flux2max_async")]
    assert len(ours) > 5
    assert all(message.isprintable() and len(message) < 900 for message in ours), max(ours, key=len)


class FakeWriter:
    """Stands in for aiohttp's StreamWriter and its protocol."""

    def __init__(self) -> None:
        self.written = b""
        self.protocol = self
        self.is_kept_alive = True

    async def write(self, chunk: bytes) -> None:
        self.written += chunk

    def force_close(self) -> None:
        self.is_kept_alive = False


async def test_submit_payload_is_written_only_once() -> None:
    """The payload of a submit can be decoded at any time, is written once, and closes its connection."""
    payload, writer = SubmitPayload(b"{}"), FakeWriter()
    before = (payload.is_written, payload.decode())
    await payload.write(writer)  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="twice"):
        await payload.write(writer)  # type: ignore[arg-type]

    assert before == (False, "{}")
    assert (writer.written, writer.is_kept_alive, payload.is_written) == (b"{}", False, True)


@pytest.mark.parametrize("steps", range(4))
async def test_submit_can_be_cancelled_twice(steps: int) -> None:
    """A stream and its session may both cancel the same submit."""
    cancellation = SubmitCancellation()

    async def wait() -> None:
        async with cancellation.guard():
            await asyncio.sleep(60)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    cancellation.cancel(SessionClosedError("first"))
    for _ in range(steps):
        await asyncio.sleep(0)
    cancellation.cancel(SessionClosedError("second"))

    with pytest.raises(SessionClosedError):
        await waiting
