"""The webhooks of the emulator: bodies, signatures, retries, and the faults that can be configured."""

import asyncio
import gc
import hashlib
import hmac
import http.server
import json
import re
import threading
from collections import deque
from datetime import datetime
from typing import Any

import aiohttp
import anyio
import pytest
from support.scripted import Behaviour, ScriptedGateway, answer, disconnect, hang, no_http, reset

from flux2max_async.emulator import Emulator, Fault, Webhooks

SECRET = "hush-7f3a9c"
HOUR = 3600.0


def emulator(webhooks: Webhooks | None = None, **settings: Any) -> Emulator:
    """Return a gateway whose tasks take exactly 8 s."""
    return Emulator(**{"seconds": 8.0, "spread": 0.0, "seed": 1, "pictures": False, "webhooks": webhooks} | settings)


def receiver(*behaviours: Behaviour) -> ScriptedGateway:
    """Return a server for webhooks that responds as scripted, and repeats the last response."""
    hook = ScriptedGateway()
    hook.submits = deque(behaviours or [answer(200, {})])
    return hook


async def submit(gateway: Emulator, hook: ScriptedGateway | str | None, prompt: str = "a cat", **params: Any) -> str:
    """Submit a task with a webhook URL, and return its id."""
    url = f"{hook.url}/hook" if isinstance(hook, ScriptedGateway) else hook
    body = {"model": "flux_2_max", "input": [{"params": {"prompt": prompt, "webhook_url": url, **params}}]}
    task = json.loads(await call(gateway, "POST", "/model/v1/generation", json=body))
    return str(task["id"])


async def call(gateway: Emulator, method: str, path: str, **options: Any) -> bytes:
    """Call the API, and return the body of the response."""
    headers = {"Authorization": f"Bearer {gateway.api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request(method, f"{gateway.url}{path}", **options) as response,
    ):
        return await response.read()


async def status_of(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status


def signature(body: bytes, secret: str = SECRET) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def attempts(gateway: Emulator, *, forged: bool = False) -> list[tuple[int, float, int | None]]:
    """Return the number, the seconds since the end of the task, and the status of each attempt."""
    return [
        (delivery.attempt, round(delivery.sent_at - gateway.tasks[delivery.task_id].ends, 6), delivery.status)
        for delivery in gateway.deliveries
        if delivery.forged is forged
    ]


@pytest.mark.parametrize("prompt", ["a cat", "a cat [fail]", "a cat [moderate]"])
async def test_a_webhook_has_the_body_of_a_poll(prompt: str) -> None:
    """By default a finished task is posted as polls return it, whether it completed or failed."""
    async with receiver() as hook, emulator() as gateway:
        task_id = await submit(gateway, hook, prompt)
        await anyio.sleep(9)
        polled = await call(gateway, "GET", f"/model/v1/generation/task/{task_id}")
        (received,) = hook.received

        assert re.sub(rb"\?expires=[\d.]+", b"", received.body) == re.sub(rb"\?expires=[\d.]+", b"", polled)
        assert received.json["status"] == ("completed" if prompt == "a cat" else "failed")
        assert received.path == "/hook"
        assert received.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        pytest.param("a cat [fail]", "generation_failed", id="failed"),
        pytest.param("a cat [moderate]", "content_policy_violation", id="moderated"),
    ],
)
async def test_failures_in_the_makers_shape(prompt: str, error: str) -> None:
    """In the maker's shape, a failure has a status, an error code, a message and a timestamp."""
    async with receiver() as hook, emulator(Webhooks(shape="maker")) as gateway:
        task_id = await submit(gateway, hook, prompt)
        await anyio.sleep(9)
    content = hook.received[0].json

    assert {**content, "message": "", "timestamp": ""} == {
        "id": task_id,
        "status": "Error",
        "error": error,
        "message": "",
        "timestamp": "",
    }
    assert content["message"]
    assert datetime.fromisoformat(content["timestamp"]).tzinfo is not None


async def test_results_in_the_makers_shape() -> None:
    """In the maker's shape, a result has a URL, the prompt and the seed."""
    async with receiver() as hook, emulator(Webhooks(shape="maker")) as gateway:
        task_id = await submit(gateway, hook, seed=7)
        await anyio.sleep(9)
        content = hook.received[0].json
        download_status = await status_of(content["result"].pop("sample"))

    assert content.keys() == {"id", "status", "result", "timestamp"}
    assert (content["id"], content["status"]) == (task_id, "Ready")
    assert content["result"] == {"prompt": "a cat", "seed": 7}
    assert datetime.fromisoformat(content["timestamp"]).tzinfo is not None
    assert download_status == 200


async def test_result_urls_expire() -> None:
    """The result URL in a webhook is valid for as long as the URL in a poll."""
    async with receiver() as hook, emulator(Webhooks(shape="maker"), url_lifetime=20.0) as gateway:
        await submit(gateway, hook)
        await anyio.sleep(27)
        url = hook.received[0].json["result"]["sample"]
        statuses = [await status_of(url)]
        await anyio.sleep(2)
        statuses.append(await status_of(url))

    assert statuses == [200, 403]


@pytest.mark.parametrize("shape", ["task", "maker"])
@pytest.mark.parametrize("header", ["X-BFL-Signature", "X-Signature"])
async def test_a_webhook_is_signed_with_the_secret(shape: Any, header: str) -> None:
    """The signature is the HMAC of the body as it is received, in the configured header."""
    async with receiver() as hook, emulator(Webhooks(shape=shape, header=header)) as gateway:
        await submit(gateway, hook, webhook_secret=SECRET)
        await anyio.sleep(9)
        reprs = repr(gateway.tasks) + repr(gateway.deliveries)
    (received,) = hook.received

    assert received.headers[header] == signature(received.body)
    assert gateway.deliveries[0].body == received.body
    assert SECRET not in reprs


@pytest.mark.parametrize("params", [{}, {"webhook_secret": None}, {"webhook_secret": ""}])
async def test_without_a_secret_nothing_is_signed(params: dict[str, Any]) -> None:
    """Without a secret there is no signature, and no forged delivery, because receivers could not recognise it."""
    async with receiver() as hook, emulator(Webhooks(forged=1.0)) as gateway:
        await submit(gateway, hook, **params)
        await anyio.sleep(9)

    assert len(hook.received) == 1
    assert not [name for name in hook.received[0].headers if "signature" in name.lower()]


async def test_a_secret_may_contain_surrogates() -> None:
    """A secret that cannot be encoded as UTF-8 still produces a signature."""
    async with receiver() as hook, emulator() as gateway:
        await submit(gateway, hook, webhook_secret="\ud83d")
        await anyio.sleep(9)

    assert hook.received[0].headers["X-BFL-Signature"].startswith("sha256=")


async def test_nothing_is_posted_without_a_webhook_url() -> None:
    """A task whose webhook URL is null is not posted."""
    async with receiver() as hook, emulator() as gateway:
        await submit(gateway, None)
        await anyio.sleep(HOUR)

    assert not hook.received
    assert not gateway.deliveries
    assert not gateway.calls["webhook"]


async def test_a_lost_response_does_not_prevent_the_webhook() -> None:
    """A task is posted even if the response to its submit was lost, so that the client can find it."""
    async with receiver() as hook, emulator() as gateway:
        gateway.script("submit", Fault.RESET_AFTER)
        with pytest.raises(aiohttp.ClientError):
            await submit(gateway, hook)
        await anyio.sleep(9)

    assert [received.json["id"] for received in hook.received] == [*gateway.tasks]


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
async def test_the_delay_starts_at_the_end_of_the_task(time_scale: float) -> None:
    """The first attempt is made `delay` seconds of the service after the end of the task."""
    async with receiver() as hook, emulator(Webhooks(delay=6.0), time_scale=time_scale) as gateway:
        await submit(gateway, hook)
        await anyio.sleep(20)

    assert attempts(gateway) == [(1, 6.0 / time_scale, 200)]
    assert hook.received[0].at == pytest.approx(gateway.deliveries[0].sent_at)


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
async def test_failed_attempts_are_repeated(time_scale: float) -> None:
    """After 1, 5 and 30 s the same body is posted again, until it is answered with a 2xx within 30 s."""
    behaviours = [answer(500, {}), hang, reset, answer(204, b"")]
    async with receiver(*behaviours) as hook, emulator(time_scale=time_scale) as gateway:
        await submit(gateway, hook, webhook_secret=SECRET)
        await anyio.sleep(HOUR)

    expected = [(1, 0.0, 500), (2, 1.0, None), (3, 1.0 + 30.0 + 5.0, None), (4, 36.0 + 30.0, 204)]
    assert attempts(gateway) == [(number, moment / time_scale, status) for number, moment, status in expected]
    assert len({(received.body, received.headers["X-BFL-Signature"]) for received in hook.received}) == 1
    assert gateway.calls["webhook"] == len(hook.received) == 4


async def test_a_slow_response_is_a_success() -> None:
    """A 2xx after 29 s is a successful delivery."""
    async with receiver(answer(200, {}, after=29.0)) as hook, emulator() as gateway:
        await submit(gateway, hook)
        await anyio.sleep(HOUR)

    assert attempts(gateway) == [(1, 0.0, 200)]


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        pytest.param(answer(404, {}), 404, id="not found"),
        pytest.param(answer(307, {}, [("Location", "/elsewhere")]), 307, id="redirect"),
        pytest.param(disconnect, None, id="disconnect"),
        pytest.param(no_http, None, id="not HTTP"),
    ],
)
@pytest.mark.parametrize("retries", [(1.0, 5.0, 30.0), ()])
async def test_the_sender_gives_up_after_the_last_retry(
    behaviour: Behaviour, status: int | None, retries: tuple[float, ...]
) -> None:
    """There is no attempt after the last retry, redirects are not followed, and failed deliveries are not doubled."""
    async with receiver(behaviour) as hook, emulator(Webhooks(retries=retries, doubled=1.0)) as gateway:
        await submit(gateway, hook)
        await anyio.sleep(HOUR)

    expected = [(1, 0.0, status), (2, 1.0, status), (3, 6.0, status), (4, 36.0, status)]
    assert attempts(gateway) == expected[: 1 + len(retries)]
    assert {received.path for received in hook.received} == {"/hook"}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/hook",
        "nonsense",
        "ftp://127.0.0.1/hook",
        "http://[",
        "http://",
        "http://\ud83d",
    ],
)
async def test_an_unreachable_url(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An invalid or unreachable URL is recorded as an attempt without a response, and nothing is logged."""
    async with emulator() as gateway:
        await submit(gateway, url)
        await anyio.sleep(HOUR)
    gc.collect()

    assert attempts(gateway) == [(1, 0.0, None), (2, 1.0, None), (3, 6.0, None), (4, 36.0, None)]
    assert not caplog.records


async def test_a_delivery_can_be_doubled() -> None:
    """A doubled delivery is posted again unchanged, one second after it succeeded."""
    async with receiver(answer(503, {}), answer(200, {})) as hook, emulator(Webhooks(doubled=1.0)) as gateway:
        await submit(gateway, hook)
        await anyio.sleep(HOUR)

    assert attempts(gateway) == [(1, 0.0, 503), (2, 1.0, 200), (3, 2.0, 200)]
    assert len({received.body for received in hook.received}) == 1


@pytest.mark.parametrize(
    ("prompt", "forged_status"),
    [
        pytest.param("a cat", "failed", id="completed"),
        pytest.param("a cat [fail]", "completed", id="failed"),
        pytest.param("a cat [moderate]", "completed", id="moderated"),
    ],
)
async def test_a_forged_delivery_precedes_the_genuine_one(prompt: str, forged_status: str) -> None:
    """A forged delivery has a wrong signature and status. It is not repeated, and the genuine delivery follows."""
    async with receiver(answer(401, {}), answer(200, {})) as hook, emulator(Webhooks(forged=1.0)) as gateway:
        await submit(gateway, hook, prompt, webhook_secret=SECRET)
        await anyio.sleep(HOUR)
    forged, genuine = hook.received

    assert attempts(gateway, forged=True) == [(0, 0.0, 401)]
    assert attempts(gateway) == [(1, 0.0, 200)]
    assert [delivery.body for delivery in gateway.deliveries] == [forged.body, genuine.body]
    assert forged.headers["X-BFL-Signature"].startswith("sha256=")
    assert forged.headers["X-BFL-Signature"] != signature(forged.body)
    assert genuine.headers["X-BFL-Signature"] == signature(genuine.body)
    assert forged.json["id"] == genuine.json["id"]
    assert forged.json["status"] == forged_status != genuine.json["status"]


async def test_shares_are_met_and_reproducible() -> None:
    """Each fault hits about its share of the tasks, and with a seed the same tasks in every run."""
    runs = []
    for _ in range(2):
        webhooks = Webhooks(dropped=0.5, doubled=0.5, forged=0.5)
        async with receiver() as hook, emulator(webhooks, max_in_flight=200) as gateway:
            ids = [await submit(gateway, hook, f"cat {number}", webhook_secret=SECRET) for number in range(200)]
            await anyio.sleep(60)
        counts = {delivery.task_id: [0, 0] for delivery in gateway.deliveries}
        for delivery in gateway.deliveries:
            counts[delivery.task_id][delivery.forged] += 1
        runs.append({task_id: counts.get(task_id) for task_id in ids})
    deliveries = [*runs[0].values()]

    assert runs[0] == runs[1]
    assert deliveries.count(None) == pytest.approx(100, abs=25)
    for genuine_and_forged in ([1, 0], [1, 1], [2, 0], [2, 1]):
        assert deliveries.count(genuine_and_forged) == pytest.approx(25, abs=15)


async def test_webhooks_do_not_change_the_tasks() -> None:
    """A seed produces the same ids, durations and outcomes with and without webhooks."""
    runs = []
    async with receiver() as hook:
        for url in (None, hook):
            async with emulator(Webhooks(dropped=0.5, doubled=0.5), spread=0.3, failing=0.3) as gateway:
                for number in range(20):
                    await submit(gateway, url, f"cat {number}")
                tasks = gateway.tasks.values()
                runs.append([(task.id, round(task.ends - task.begins, 6), task.fate) for task in tasks])

    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("behaviour", "after", "expected"),
    [
        pytest.param(hang, 4.0, [], id="before the end"),
        pytest.param(hang, 9.0, [], id="during the delay"),
        pytest.param(hang, 20.0, [(1, 2.0, None)], id="during an attempt"),
        pytest.param(answer(500, {}), 20.0, [(1, 2.0, 500), (2, 3.0, 500), (3, 8.0, 500)], id="before a retry"),
        pytest.param(answer(200, {}), 10.5, [(1, 2.0, 200)], id="before the duplicate"),
    ],
)
async def test_closing_cancels_deliveries(
    behaviour: Behaviour, after: float, expected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The emulator closes immediately and without log messages at any stage of a delivery, and posts nothing later."""
    tasks_before = asyncio.all_tasks()
    async with receiver(behaviour) as hook:
        async with emulator(Webhooks(delay=2.0, doubled=1.0)) as gateway:
            await submit(gateway, hook)
            await anyio.sleep(after)
            closing = anyio.current_time()
        closed = anyio.current_time()
        received = len(hook.received)
        await anyio.sleep(HOUR)
    gc.collect()

    assert closed - closing < 1
    assert attempts(gateway) == expected
    assert len(hook.received) == received == len(expected) == gateway.calls["webhook"]
    assert asyncio.all_tasks() == tasks_before
    assert not caplog.records


async def test_a_reopened_emulator_posts_again() -> None:
    """An emulator that was closed can be opened again."""
    gateway = emulator()
    async with receiver() as hook:
        for _ in range(2):
            async with gateway:
                await submit(gateway, hook)
                await anyio.sleep(9)

    assert [delivery.status for delivery in gateway.deliveries] == [200, 200]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", "json"),
        ("delay", -1.0),
        ("dropped", 1.1),
        ("doubled", -0.1),
        ("forged", float("nan")),
        ("retries", (1.0, -5.0)),
    ],
)
def test_settings_are_validated(field: str, value: Any) -> None:
    """An invalid value raises ValueError with the name of the parameter."""
    with pytest.raises(ValueError, match=f"'{field}'"):
        Webhooks(**{field: value})


def test_webhooks_of_an_emulator_in_a_thread() -> None:
    """`with Emulator()` posts webhooks in real time to the HTTP server of the standard library."""
    received = threading.Event()
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            genuine = self.headers["X-BFL-Signature"] == signature(body)
            self.send_response(200 if genuine else 401)
            self.end_headers()
            if genuine:
                bodies.append(body)
                received.set()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with emulator(Webhooks(forged=1.0), seconds=0.1) as gateway:
                hook = f"http://127.0.0.1:{server.server_port}/"
                task_id = asyncio.run(submit(gateway, hook, webhook_secret=SECRET))
                is_received = received.wait(10)
        finally:
            server.shutdown()

    assert is_received
    assert (json.loads(bodies[0])["id"], json.loads(bodies[0])["status"]) == (task_id, "completed")
    assert attempts(gateway, forged=True)[0][2] == 401
