"""The emulated service's webhooks: what receivers are tested with must itself be right."""

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
    """A gateway whose tasks take exactly 8 s."""
    return Emulator(**{"seconds": 8.0, "spread": 0.0, "seed": 1, "pictures": False, "webhooks": webhooks} | settings)


def receiver(*behaviours: Behaviour) -> ScriptedGateway:
    """Where webhooks go; it answers them as told, and repeats the last answer."""
    hook = ScriptedGateway()
    hook.submits = deque(behaviours or [answer(200, {})])
    return hook


async def ask(gateway: Emulator, hook: ScriptedGateway | str | None, prompt: str = "a cat", **params: Any) -> str:
    """Submit a task whose webhook goes there, and give its id."""
    url = f"{hook.url}/hook" if isinstance(hook, ScriptedGateway) else hook
    body = {"model": "flux_2_max", "input": [{"params": {"prompt": prompt, "webhook_url": url, **params}}]}
    task = json.loads(await call(gateway, "POST", "/model/v1/generation", json=body))
    return str(task["id"])


async def call(gateway: Emulator, method: str, path: str, **more: Any) -> bytes:
    headers = {"Authorization": f"Bearer {gateway.api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request(method, f"{gateway.url}{path}", **more) as response,
    ):
        return await response.read()


async def status_of(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status


def signature(body: bytes, secret: str = SECRET) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def attempts(gateway: Emulator, *, forged: bool = False) -> list[tuple[int, float, int | None]]:
    """Each attempt's number, the seconds from the task's end to it, and what it was answered."""
    return [
        (delivery.attempt, round(delivery.sent_at - gateway.tasks[delivery.task_id].ends, 6), delivery.status)
        for delivery in gateway.deliveries
        if delivery.forged is forged
    ]


@pytest.mark.parametrize("prompt", ["a cat", "a cat [fail]", "a cat [moderate]"])
async def test_a_webhook_tells_what_a_poll_shows(prompt: str) -> None:
    """By default a finished task is posted as a poll shows it, whatever its end."""
    async with receiver() as hook, emulator() as gateway:
        task_id = await ask(gateway, hook, prompt)
        await anyio.sleep(9)
        shown = await call(gateway, "GET", f"/model/v1/generation/task/{task_id}")
        (received,) = hook.received

        assert re.sub(rb"\?expires=[\d.]+", b"", received.body) == re.sub(rb"\?expires=[\d.]+", b"", shown)
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
async def test_the_maker_tells_failures_in_its_own_words(prompt: str, error: str) -> None:
    """In the maker's shape a failure is a status, a code, a message and the time."""
    async with receiver() as hook, emulator(Webhooks(shape="maker")) as gateway:
        task_id = await ask(gateway, hook, prompt)
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


async def test_the_maker_tells_results_in_its_own_words() -> None:
    """In the maker's shape a result is a url, the prompt and the seed."""
    async with receiver() as hook, emulator(Webhooks(shape="maker")) as gateway:
        task_id = await ask(gateway, hook, seed=7)
        await anyio.sleep(9)
        content = hook.received[0].json
        found = await status_of(content["result"].pop("sample"))

    assert content.keys() == {"id", "status", "result", "timestamp"}
    assert (content["id"], content["status"]) == (task_id, "Ready")
    assert content["result"] == {"prompt": "a cat", "seed": 7}
    assert datetime.fromisoformat(content["timestamp"]).tzinfo is not None
    assert found == 200


async def test_results_expire_as_those_of_polls_do() -> None:
    """A url that came by webhook is valid for as long as one that came by poll."""
    async with receiver() as hook, emulator(Webhooks(shape="maker"), url_lifetime=20.0) as gateway:
        await ask(gateway, hook)
        await anyio.sleep(27)
        url = hook.received[0].json["result"]["sample"]
        statuses = [await status_of(url)]
        await anyio.sleep(2)
        statuses.append(await status_of(url))

    assert statuses == [200, 403]


@pytest.mark.parametrize("shape", ["task", "maker"])
@pytest.mark.parametrize("header", ["X-BFL-Signature", "X-Signature"])
async def test_a_webhook_is_signed_with_the_secret(shape: Any, header: str) -> None:
    """The signature is the HMAC of the very bytes that arrive, under whatever name the gateway gives it."""
    async with receiver() as hook, emulator(Webhooks(shape=shape, header=header)) as gateway:
        await ask(gateway, hook, webhook_secret=SECRET)
        await anyio.sleep(9)
        shown = repr(gateway.tasks) + repr(gateway.deliveries)
    (received,) = hook.received

    assert received.headers[header] == signature(received.body)
    assert gateway.deliveries[0].body == received.body
    assert SECRET not in shown


@pytest.mark.parametrize("params", [{}, {"webhook_secret": None}, {"webhook_secret": ""}])
async def test_without_a_secret_nothing_is_signed(params: dict[str, Any]) -> None:
    """Whoever gives no secret gets no signature, and no forgeries either: nothing would tell them from the truth."""
    async with receiver() as hook, emulator(Webhooks(forged=1.0)) as gateway:
        await ask(gateway, hook, **params)
        await anyio.sleep(9)

    assert len(hook.received) == 1
    assert not [name for name in hook.received[0].headers if "signature" in name.lower()]


async def test_a_secret_may_be_anything_that_json_can_hold() -> None:
    """Even what can't be written as UTF-8 signs something."""
    async with receiver() as hook, emulator() as gateway:
        await ask(gateway, hook, webhook_secret="\ud83d")
        await anyio.sleep(9)

    assert hook.received[0].headers["X-BFL-Signature"].startswith("sha256=")


async def test_nothing_is_posted_where_nobody_asked() -> None:
    """A submit without a webhook, or with null for one, makes none."""
    async with receiver() as hook, emulator() as gateway:
        await ask(gateway, None)
        await anyio.sleep(HOUR)

    assert not hook.received
    assert not gateway.deliveries
    assert not gateway.calls["webhook"]


async def test_a_lost_answer_takes_no_webhook_with_it() -> None:
    """A task whose submit was never answered is told of all the same: that is how it can be found again."""
    async with receiver() as hook, emulator() as gateway:
        gateway.script("submit", Fault.RESET_AFTER)
        with pytest.raises(aiohttp.ClientError):
            await ask(gateway, hook)
        await anyio.sleep(9)

    assert [received.json["id"] for received in hook.received] == [*gateway.tasks]


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
async def test_the_delay_begins_at_the_end(time_scale: float) -> None:
    """The first attempt is made that much later than the task has ended, in the service's seconds."""
    async with receiver() as hook, emulator(Webhooks(delay=6.0), time_scale=time_scale) as gateway:
        await ask(gateway, hook)
        await anyio.sleep(20)

    assert attempts(gateway) == [(1, 6.0 / time_scale, 200)]
    assert hook.received[0].at == pytest.approx(gateway.deliveries[0].sent_at)


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
async def test_what_does_not_arrive_is_tried_again(time_scale: float) -> None:
    """After 1, 5 and 30 s the same bytes are posted again, until they are answered with a 2xx within 30 s."""
    answers = [answer(500, {}), hang, reset, answer(204, b"")]
    async with receiver(*answers) as hook, emulator(time_scale=time_scale) as gateway:
        await ask(gateway, hook, webhook_secret=SECRET)
        await anyio.sleep(HOUR)

    expected = [(1, 0.0, 500), (2, 1.0, None), (3, 1.0 + 30.0 + 5.0, None), (4, 36.0 + 30.0, 204)]
    assert attempts(gateway) == [(number, moment / time_scale, status) for number, moment, status in expected]
    assert len({(received.body, received.headers["X-BFL-Signature"]) for received in hook.received}) == 1
    assert gateway.calls["webhook"] == len(hook.received) == 4


async def test_an_answer_may_take_its_time() -> None:
    """A receiver that answers after 29 s has got it."""
    async with receiver(answer(200, {}, after=29.0)) as hook, emulator() as gateway:
        await ask(gateway, hook)
        await anyio.sleep(HOUR)

    assert attempts(gateway) == [(1, 0.0, 200)]


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        pytest.param(answer(404, {}), 404, id="not found"),
        pytest.param(answer(307, {}, [("Location", "/elsewhere")]), 307, id="redirect"),
        pytest.param(disconnect, None, id="hung up"),
        pytest.param(no_http, None, id="no HTTP"),
    ],
)
@pytest.mark.parametrize("retries", [(1.0, 5.0, 30.0), ()])
async def test_the_service_gives_up(behaviour: Behaviour, status: int | None, retries: tuple[float, ...]) -> None:
    """After the last retry there is no other, redirects aren't followed, and what never arrived isn't doubled."""
    async with receiver(behaviour) as hook, emulator(Webhooks(retries=retries, doubled=1.0)) as gateway:
        await ask(gateway, hook)
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
async def test_an_address_where_nobody_is(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """What can't be reached is an attempt without an answer, and nothing that anybody complains about."""
    async with emulator() as gateway:
        await ask(gateway, url)
        await anyio.sleep(HOUR)
    gc.collect()

    assert attempts(gateway) == [(1, 0.0, None), (2, 1.0, None), (3, 6.0, None), (4, 36.0, None)]
    assert not caplog.records


async def test_a_delivery_can_come_twice() -> None:
    """What is doubled arrives again a second after it has, as it was."""
    async with receiver(answer(503, {}), answer(200, {})) as hook, emulator(Webhooks(doubled=1.0)) as gateway:
        await ask(gateway, hook)
        await anyio.sleep(HOUR)

    assert attempts(gateway) == [(1, 0.0, 503), (2, 1.0, 200), (3, 2.0, 200)]
    assert len({received.body for received in hook.received}) == 1


@pytest.mark.parametrize(
    ("prompt", "lie"),
    [
        pytest.param("a cat", "failed", id="completed"),
        pytest.param("a cat [fail]", "completed", id="failed"),
        pytest.param("a cat [moderate]", "completed", id="moderated"),
    ],
)
async def test_a_forged_delivery_comes_first_and_lies(prompt: str, lie: str) -> None:
    """Before the truth comes a lie whose signature is wrong; it isn't repeated, and the truth comes as ever."""
    async with receiver(answer(401, {}), answer(200, {})) as hook, emulator(Webhooks(forged=1.0)) as gateway:
        await ask(gateway, hook, prompt, webhook_secret=SECRET)
        await anyio.sleep(HOUR)
    forged, true = hook.received

    assert attempts(gateway, forged=True) == [(0, 0.0, 401)]
    assert attempts(gateway) == [(1, 0.0, 200)]
    assert [delivery.body for delivery in gateway.deliveries] == [forged.body, true.body]
    assert forged.headers["X-BFL-Signature"].startswith("sha256=")
    assert forged.headers["X-BFL-Signature"] != signature(forged.body)
    assert true.headers["X-BFL-Signature"] == signature(true.body)
    assert forged.json["id"] == true.json["id"]
    assert forged.json["status"] == lie != true.json["status"]


async def test_shares_are_about_right_and_come_from_the_seed() -> None:
    """Each misfortune meets its share of the tasks, and with a seed the same ones in each run."""
    runs = []
    for _ in range(2):
        webhooks = Webhooks(dropped=0.5, doubled=0.5, forged=0.5)
        async with receiver() as hook, emulator(webhooks, max_in_flight=200) as gateway:
            ids = [await ask(gateway, hook, f"cat {number}", webhook_secret=SECRET) for number in range(200)]
            await anyio.sleep(60)
        came = {delivery.task_id: [0, 0] for delivery in gateway.deliveries}
        for delivery in gateway.deliveries:
            came[delivery.task_id][delivery.forged] += 1
        runs.append({task_id: came.get(task_id) for task_id in ids})
    fates = [*runs[0].values()]

    assert runs[0] == runs[1]
    assert fates.count(None) == pytest.approx(100, abs=25)
    for fate in ([1, 0], [1, 1], [2, 0], [2, 1]):
        assert fates.count(fate) == pytest.approx(25, abs=15)


async def test_webhooks_leave_the_tasks_as_they_are() -> None:
    """Ids, durations and ends that belong to a seed are the same with webhooks and without."""
    runs = []
    async with receiver() as hook:
        for url in (None, hook):
            async with emulator(Webhooks(dropped=0.5, doubled=0.5), spread=0.3, failing=0.3) as gateway:
                for number in range(20):
                    await ask(gateway, url, f"cat {number}")
                tasks = gateway.tasks.values()
                runs.append([(task.id, round(task.ends - task.begins, 6), task.fate) for task in tasks])

    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("behaviour", "after", "came"),
    [
        pytest.param(hang, 4.0, [], id="before the end"),
        pytest.param(hang, 9.0, [], id="during the delay"),
        pytest.param(hang, 20.0, [(1, 2.0, None)], id="on the wire"),
        pytest.param(answer(500, {}), 20.0, [(1, 2.0, 500), (2, 3.0, 500), (3, 8.0, 500)], id="before a retry"),
        pytest.param(answer(200, {}), 10.5, [(1, 2.0, 200)], id="before it is doubled"),
    ],
)
async def test_leaving_ends_what_is_under_way(
    behaviour: Behaviour, after: float, came: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The emulator is left at once and quietly, whatever its webhooks are doing, and none comes later."""
    others = asyncio.all_tasks()
    async with receiver(behaviour) as hook:
        async with emulator(Webhooks(delay=2.0, doubled=1.0)) as gateway:
            await ask(gateway, hook)
            await anyio.sleep(after)
            leaving = anyio.current_time()
        left = anyio.current_time()
        received = len(hook.received)
        await anyio.sleep(HOUR)
    gc.collect()

    assert left - leaving < 1
    assert attempts(gateway) == came
    assert len(hook.received) == received == len(came) == gateway.calls["webhook"]
    assert asyncio.all_tasks() == others
    assert not caplog.records


async def test_an_emulator_that_is_entered_again_posts_again() -> None:
    """What was left can be used once more."""
    gateway = emulator()
    async with receiver() as hook:
        for _ in range(2):
            async with gateway:
                await ask(gateway, hook)
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
def test_settings_are_checked(field: str, value: Any) -> None:
    """What can't be is refused where it is written, by its name."""
    with pytest.raises(ValueError, match=f"'{field}'"):
        Webhooks(**{field: value})


def test_webhooks_from_a_thread() -> None:
    """`with Emulator()` posts too, in real time and to a server that none of us wrote."""
    arrived = threading.Event()
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            genuine = self.headers["X-BFL-Signature"] == signature(body)
            self.send_response(200 if genuine else 401)
            self.end_headers()
            if genuine:
                bodies.append(body)
                arrived.set()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with emulator(Webhooks(forged=1.0), seconds=0.1) as gateway:
                hook = f"http://127.0.0.1:{server.server_port}/"
                task_id = asyncio.run(ask(gateway, hook, webhook_secret=SECRET))
                came = arrived.wait(10)
        finally:
            server.shutdown()

    assert came
    assert (json.loads(bodies[0])["id"], json.loads(bodies[0])["status"]) == (task_id, "completed")
    assert attempts(gateway, forged=True)[0][2] == 401
