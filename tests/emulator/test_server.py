"""The emulated gateway: it implements the protocol, and its faults and limits are reproducible."""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
import seaart_sdk
from PIL import Image

from flux2max_async import FixedSchedule, FluxSession, GenerationRequest
from flux2max_async.emulator import Emulator, Fault


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


async def post(
    gateway: Emulator, body: Any, *, key: str | None = None, model: str | None = None
) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Submit, and return the status, body and headers of the response."""
    headers = {"Authorization": f"Bearer {key or gateway.api_key}"}
    if model is not None:
        headers["X-Model"] = model
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{gateway.url}/model/v1/generation", data=data, headers=headers) as response,
    ):
        return response.status, await response.json(), response.headers


def submit(**params: Any) -> dict[str, Any]:
    """Return the body of a submit."""
    return {"model": "flux_2_max", "input": [{"params": {"prompt": "a cat", **params}}]}


async def test_a_task_follows_the_protocol(gateway: Emulator) -> None:
    """A task is pending, then in progress with increasing progress, then completed with its image and cost."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
        task = await session.submit("a cat")
        snapshots = [(snapshot.status.value, snapshot.progress) async for snapshot in task.updates()]
        outcome = await task

    assert snapshots[0] == ("pending", 0.0)
    assert snapshots[-1] == ("completed", 1.0)
    assert [progress for _, progress in snapshots] == sorted(
        progress for _, progress in snapshots if progress is not None
    )
    assert len(snapshots) > 5
    assert outcome.usage is not None
    assert outcome.usage.cost == Decimal("0.07")
    assert outcome.images[0].extra["jobId"] == f"job-{outcome.task_id}"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        pytest.param(b"{", "JSON", id="invalid JSON"),
        pytest.param([], "model", id="not an object"),
        pytest.param({"model": "flux_1"}, "model", id="another model"),
        pytest.param({"model": "flux_2_max", "input": []}, "input", id="no input"),
        pytest.param({"model": "flux_2_max", "input": [{"params": {}}]}, "prompt", id="no prompt"),
        *(
            pytest.param(submit(**{param: value}), param, id=f"{param}={value!r:.20}")
            for param, value in [
                ("prompt", " "),
                ("prompt", None),
                ("seed", "7"),
                ("seed", True),
                ("width", 63),
                ("height", -1),
                ("safety_tolerance", 6),
                ("output_format", "gif"),
                ("webhook_url", ""),
                ("webhook_url", "https://x.example/" + "x" * 2083),
                ("webhook_secret", 7),
                ("input_image", "not base64"),
                ("input_image_8", base64.b64encode(b"not an image").decode()),
                ("input_image_2", 7),
            ]
        ),
    ],
)
async def test_parameters_are_validated(gateway: Emulator, body: Any, name: str) -> None:
    """An invalid parameter is refused with a 400 that names it, and no task is created."""
    status, content, headers = await post(gateway, body)

    assert status == 400
    assert name in content["error"]["message"]
    assert content["error"]["code"]
    assert headers["X-Request-Id"]
    assert not gateway.accepted


async def test_null_means_unset(gateway: Emulator) -> None:
    """Optional parameters may be null, and unknown parameters are accepted."""
    status, content, _ = await post(gateway, submit(seed=None, input_image=None, prompt_upsampling=True))

    assert status == 200
    assert content["status"] == "pending"


async def test_large_submits_are_validated_too(gateway: Emulator) -> None:
    """A body that is validated in a thread is accepted or refused like a small one."""
    valid, _, _ = await post(gateway, submit(prompt="a cat " * 4000))
    invalid, content, _ = await post(gateway, submit(prompt="a cat " * 4000, width=63))

    assert (valid, invalid) == (200, 400)
    assert content["error"]["message"] == "width must be an integer of at least 64"


NO_MODEL = {"input": submit()["input"]}


@pytest.mark.parametrize(
    ("body", "model"),
    [
        pytest.param(submit(), None, id="body"),
        pytest.param(NO_MODEL, "flux_2_max", id="header"),
        pytest.param({**NO_MODEL, "model": None}, "flux_2_max", id="null in the body"),
        pytest.param(submit(), "flux_2_max", id="both"),
    ],
)
async def test_the_model_is_in_the_body_or_in_a_header(gateway: Emulator, body: Any, model: str | None) -> None:
    """The header X-Model may replace the body's `model`, or repeat it."""
    status, _, _ = await post(gateway, body, model=model)

    assert status == 200


@pytest.mark.parametrize(
    ("body", "model", "message"),
    [
        pytest.param(NO_MODEL, None, "model must be flux_2_max", id="none"),
        pytest.param(NO_MODEL, "flux_1", "model must be flux_2_max", id="another model in the header"),
        pytest.param(
            submit(),
            "flux_1",
            "model is 'flux_2_max' in the body, but 'flux_1' in the header X-Model",
            id="both differ",
        ),
        pytest.param(
            {**NO_MODEL, "model": "flux_1"},
            "flux_2_max",
            "model is 'flux_1' in the body, but 'flux_2_max' in the header X-Model",
            id="the body differs",
        ),
    ],
)
async def test_a_wrong_model_is_refused(gateway: Emulator, body: Any, model: str | None, message: str) -> None:
    """A missing, unknown or contradictory model is refused with a 400, and no task is created."""
    status, content, _ = await post(gateway, body, model=model)

    assert (status, content["error"]) == (400, {"code": "invalid_parameter", "message": message})
    assert not gateway.accepted


async def test_the_key_is_checked(gateway: Emulator) -> None:
    """Submits and polls need the right API key, and downloads refuse any key."""
    status, content, _ = await post(gateway, submit(), key="wrong")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {gateway.api_key}"}) as http:
        async with http.get(f"{gateway.url}/results/x.jpeg") as leaked:
            leaked_status = leaked.status
        async with http.get(f"{gateway.url}/model/v1/generation/task/x") as unknown:
            unknown_status = unknown.status
    async with aiohttp.ClientSession() as http, http.get(f"{gateway.url}/results/x.jpeg") as missing:
        missing_status = missing.status

    assert (status, content["error"]["code"]) == (401, "unauthorized")
    assert (leaked_status, unknown_status, missing_status) == (400, 404, 404)


@pytest.mark.parametrize(
    ("params", "cost"),
    [
        pytest.param({}, "0.07", id="default"),
        pytest.param({"width": 64, "height": 64}, "0.07", id="small"),
        pytest.param({"width": 1024, "height": 1025}, "0.10", id="just over a megapixel"),
        pytest.param({"width": 2048, "height": 2048}, "0.16", id="four megapixels"),
        pytest.param({"input_images": [png(8, 8)]}, "0.10", id="an input image"),
        pytest.param({"input_images": [png(2000, 1000), "https://x.example/a.png"]}, "0.16", id="two input images"),
    ],
)
async def test_prices(gateway: Emulator, params: dict[str, Any], cost: str) -> None:
    """The first megapixel costs $0.07 and each further one $0.03, for output and input images, each rounded up."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcome = await session.generate(GenerationRequest("a cat", **params))

    assert outcome.usage is not None
    assert outcome.usage.cost == Decimal(cost)


async def test_input_images_are_visible_in_the_result(tmp_path: Path) -> None:
    """The generated image contains a thumbnail of the input image."""
    async with Emulator(seconds=1.0, seed=1) as gateway, FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcome = await session.generate(
            "a quiet evening", width=512, height=512, output_format="png", input_images=[png(200, 200, "#ff00ff")]
        )
        path = await session.save(outcome.images[0], tmp_path / "a.png")
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(512 * 512) or []

    assert sum(count for count, colour in colours if colour == (255, 0, 255)) > 1000


async def test_runs_with_the_same_seed_are_equal() -> None:
    """The same seed produces the same ids, durations and outcomes."""
    runs = []
    for _ in range(2):
        async with Emulator(seed=5, failing=0.3, moderated=0.3, pictures=False) as gateway:
            async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
                for number in range(20):
                    await session.submit(f"cat {number}")
            tasks = gateway.tasks.values()
            runs.append([(task.id, round(task.ends - task.begins, 6), task.fate) for task in tasks])

    assert runs[0] == runs[1]
    assert {fate for _, _, fate in runs[0]} == {"completed", "failed", "moderated"}


async def test_durations_are_lognormal() -> None:
    """The median is `seconds` divided by `time_scale`, and the logarithms have the standard deviation `spread`."""
    async with Emulator(seconds=8.0, spread=0.3, seed=1, time_scale=4.0, max_in_flight=500, pictures=False) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=500) as session:
            async for _ in session.stream(f"cat {number}" for number in range(500)):
                pass
        durations = sorted(task.ends - task.begins for task in gateway.tasks.values())

    assert durations[250] == pytest.approx(2.0, rel=0.1)
    assert durations[250 + 170] / durations[250] == pytest.approx(2.718281828**0.3, rel=0.1)


async def test_the_balance_can_be_topped_up() -> None:
    """Submits are refused with 402 while the balance is too low."""
    async with Emulator(balance=Decimal("0.07"), pictures=False) as gateway:
        statuses = [(await post(gateway, submit()))[0] for _ in range(2)]
        gateway.balance = Decimal(1)
        statuses.append((await post(gateway, submit()))[0])

        assert gateway.balance == Decimal("0.93")
    assert statuses == [200, 402, 200]


async def test_a_slot_is_free_when_a_task_ends() -> None:
    """Submits above the limit are refused with a 429 that has Retry-After, until a task has ended."""
    async with Emulator(seconds=8.0, spread=0.0, max_in_flight=2, time_scale=2.0, pictures=False) as gateway:
        responses = [await post(gateway, submit()) for _ in range(3)]
        await anyio.sleep(4.1)
        later, _, _ = await post(gateway, submit())

    assert [status for status, _, _ in responses] == [200, 200, 429]
    assert responses[2][2]["Retry-After"] == "0.5"
    assert later == 200


@pytest.mark.parametrize("share", [0.2])
async def test_faults_by_probability(share: float) -> None:
    """Each fault hits about its share of the calls, and no other fault occurs."""
    faults = {Fault.UNAVAILABLE: share, Fault.RATE_LIMITED: share, Fault.NOT_FOUND: 1.0}
    async with Emulator(faults=faults, seed=2, max_in_flight=1000, pictures=False) as gateway:
        statuses = [(await post(gateway, submit()))[0] for _ in range(300)]
        hidden = [task.visible > task.begins for task in gateway.tasks.values()]

    assert statuses.count(503) / 300 == pytest.approx(share, abs=0.07)
    assert statuses.count(429) / 300 == pytest.approx(share, abs=0.07)
    assert set(statuses) == {200, 429, 503}
    assert all(hidden)


@pytest.mark.parametrize(
    "fault",
    [
        Fault.RATE_LIMITED,
        Fault.SERVER_ERROR,
        Fault.UNAVAILABLE,
        Fault.RESET_BEFORE,
        Fault.RESET_AFTER,
        Fault.HANG,
        Fault.CUT,
        Fault.GARBAGE,
        Fault.NOT_FOUND,
    ],
)
@pytest.mark.parametrize("endpoint", ["submit", "poll", "download"])
async def test_every_fault_applies_to_every_endpoint(gateway: Emulator, endpoint: Any, fault: Fault) -> None:
    """A scripted fault hits the next call to its endpoint, whichever fault and endpoint it is."""
    _, task, _ = await post(gateway, submit())
    await anyio.sleep(9)
    headers = {"Authorization": f"Bearer {gateway.api_key}"}
    api_url = f"{gateway.url}/model/v1/generation"
    poll_url = f"{api_url}/task/{task['id']}"
    async with aiohttp.ClientSession() as http, http.get(poll_url, headers=headers) as response:
        result_url = (await response.json())["output"][0]["content"][0]["url"]
    requests: dict[str, tuple[str, str, dict[str, Any]]] = {
        "submit": ("POST", api_url, {"headers": headers, "json": submit()}),
        "poll": ("GET", poll_url, {"headers": headers}),
        "download": ("GET", result_url, {}),
    }
    method, url, options = requests[endpoint]

    async def succeeds() -> bool:
        try:
            async with aiohttp.request(method, url, timeout=aiohttp.ClientTimeout(total=5), **options) as response:
                return response.ok and b"<html>" not in await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return False

    assert await succeeds()
    gateway.script(endpoint, fault, fault)  # twice, because aiohttp repeats a GET whose connection was reset
    assert not await succeeds()


DOWNLOAD_FAULTS = [*Fault][: [*Fault].index(Fault.HUGE_HEADERS) + 1]


@pytest.mark.parametrize(
    ("endpoint", "fault", "message"),
    [
        pytest.param("sumbit", "cut", "an endpoint must be one of submit, poll, download, not 'sumbit'", id="typo"),
        pytest.param(
            "webhook", "cut", "an endpoint must be one of submit, poll, download, not 'webhook'", id="webhook"
        ),
        pytest.param(
            "submit",
            "lost_answer",
            f"a fault must be one of {', '.join(Fault)}, not 'lost_answer'",
            id="fault",
        ),
        *(
            pytest.param(
                "download",
                fault,
                f"a fault of downloads must be one of {', '.join(DOWNLOAD_FAULTS)}, not {fault!r}",
                id=f"{fault} of a download",
            )
            for fault in ("lost_answer", "late_404", "status_done", "envelope")
        ),
    ],
)
async def test_unknown_endpoints_and_faults_are_refused(
    gateway: Emulator, endpoint: Any, fault: str, message: str
) -> None:
    """A script with an unknown name raises an error that lists the valid names, and changes nothing."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gateway.script(endpoint, "unavailable", fault)
    status, _, _ = await post(gateway, submit())

    assert status == 200


def test_unknown_faults_are_refused_at_construction() -> None:
    """The shares of the constructor accept the faults' values, and no other name."""
    Emulator(faults={"reset_after": 0.5})
    with pytest.raises(ValueError, match=r"^a fault must be one of rate_limited, .*, cut_link, not 'lost_answer'$"):
        Emulator(faults={"reset_after": 0.5, "lost_answer": 0.5})


async def test_hanging_calls_do_not_delay_closing(gateway: Emulator) -> None:
    """Closing the emulator immediately ends the calls that it never responses."""
    async with Emulator(pictures=False) as hanging:
        hanging.script("submit", Fault.HANG)
        call = asyncio.ensure_future(post(hanging, submit()))
        await anyio.sleep(5)
        started = anyio.current_time()
    with pytest.raises(aiohttp.ClientError):
        await call

    assert anyio.current_time() - started < 2


def test_an_independent_client() -> None:
    """The SDK of another gateway that speaks this protocol creates a task and waits for it."""
    with Emulator(seconds=0.2, spread=0.0) as gateway:
        config = seaart_sdk.ClientConfig(model_base_url=f"{gateway.url}/model", api_key=gateway.api_key)
        service = seaart_sdk.Client(config).modal
        created = service.create(submit(width=64, height=64))
        task = service.wait(created.id, seaart_sdk.with_poll_interval(0.05))

    assert created.status == "pending"
    assert task.status == "completed"
    assert task.output[0].content[0].url.startswith(f"{gateway.url}/results/{created.id}")
    assert task.usage.cost == "0.07"


def test_an_independent_client_reads_the_errors() -> None:
    """That SDK reads the message of an error, the id in an error, and why a task failed, where it expects them [C]."""
    with Emulator(seconds=0.2, spread=0.0) as gateway:
        config = seaart_sdk.ClientConfig(model_base_url=f"{gateway.url}/model", api_key=gateway.api_key)
        service = seaart_sdk.Client(config).modal
        gateway.script("submit", "error_error_message", "sync_timeout", "error_with_number", "status_completed")
        with pytest.raises(seaart_sdk.SeaArtError) as refused:
            service.create(submit(width=63))
        with pytest.raises(seaart_sdk.SeaArtError) as timed_out:
            service.create(submit())
        failing, completing = service.create(submit()), service.create(submit())
        with pytest.raises(seaart_sdk.SeaArtError) as failed:
            service.wait(failing.id, seaart_sdk.with_poll_interval(0.05))
        completed = service.wait(completing.id, seaart_sdk.with_poll_interval(0.05))

    assert (refused.value.status, refused.value.message) == (400, "width must be an integer of at least 64")
    assert (timed_out.value.status, timed_out.value.kind) == (504, "timeout")
    assert failed.value.message == "task failed: the model gave up"
    assert completed.status == "COMPLETED"


FIXTURE_TEST = """
def test_my_code(flux_emulator):
    import asyncio, flux2max_async

    async def main():
        async with flux2max_async.FluxSession(flux_emulator.api_key, base_url=flux_emulator.url) as session:
            return await session.generate("a cat")

    assert asyncio.run(main()).ok
    assert flux_emulator.accepted["a cat"] == 1
"""

UNUSED_FIXTURE_TEST = """
import sys

def test_nothing_was_imported():
    assert not {"aiohttp", "PIL", "attrs", "flux2max_async.emulator", "flux2max_async._public"} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "content", [pytest.param(FIXTURE_TEST, id="used"), pytest.param(UNUSED_FIXTURE_TEST, id="unused")]
)
def test_pytest_finds_the_fixture(tmp_path: Path, content: str) -> None:
    """The plugin provides `flux_emulator`, and imports neither aiohttp nor Pillow until a test uses the fixture."""
    (tmp_path / "test_mine.py").write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # so that pytest does not use the settings of a parent folder
    plugin = ["-p", "flux2max_async.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "-W", "error", str(tmp_path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    assert "1 passed" in result.stdout, result.stdout + result.stderr


def test_importing_the_package_imports_no_extra() -> None:
    """Importing the library imports neither Pillow nor typer nor rich."""
    code = (
        "import sys, flux2max_async; flux2max_async.FluxSession; "
        "print(sorted({'PIL', 'typer', 'rich', 'flux2max_async.emulator'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


async def test_results_without_pictures(gateway: Emulator, tmp_path: Path) -> None:
    """With `pictures=False`, every result is the same small image."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcome = await session.generate("a cat", output_format="png", width=2048)
        path = await session.save(outcome.images[0], tmp_path / "a.png")

    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
