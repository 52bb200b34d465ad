"""The embedded gateway: what people test their applications with must itself be right."""

import asyncio
import base64
import io
import json
import os
import signal
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
    gateway: Emulator, body: Any, *, key: str | None = None
) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    headers = {"Authorization": f"Bearer {key or gateway.api_key}"}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{gateway.url}/model/v1/generation", data=data, headers=headers) as response,
    ):
        return response.status, await response.json(), response.headers


def submit(**params: Any) -> dict[str, Any]:
    return {"model": "flux_2_max", "input": [{"params": {"prompt": "a cat", **params}}]}


async def test_a_task_lives_as_the_protocol_says(gateway: Emulator) -> None:
    """From submit to end, a task is pending, in progress with a progress that grows, and completed with everything."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
        task = await session.submit("a cat")
        seen = [(snapshot.status.value, snapshot.progress) async for snapshot in task.updates()]
        outcome = await task

    assert seen[0] == ("pending", 0.0)
    assert seen[-1] == ("completed", 1.0)
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen if progress is not None)
    assert len(seen) > 5
    assert outcome.usage is not None
    assert outcome.usage.cost == Decimal("0.07")
    assert outcome.images[0].extra["jobId"] == f"job-{outcome.task_id}"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        pytest.param(b"{", "JSON", id="no JSON"),
        pytest.param([], "model", id="no object"),
        pytest.param({"model": "flux_1"}, "model", id="another model"),
        pytest.param({"model": "flux_2_max", "input": []}, "input", id="no input"),
        pytest.param({"model": "flux_2_max", "input": [{"params": {}}]}, "prompt", id="no prompt"),
        *(
            pytest.param(submit(**{name: value}), name, id=f"{name}={value!r:.20}")
            for name, value in [
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
                ("input_image_8", base64.b64encode(b"no picture").decode()),
                ("input_image_2", 7),
            ]
        ),
    ],
)
async def test_parameters_are_checked_like_the_page_does(gateway: Emulator, body: Any, named: str) -> None:
    """A wrong parameter is a 400 whose error names it, and nothing is accepted."""
    status, answer, headers = await post(gateway, body)

    assert status == 400
    assert named in answer["error"]["message"]
    assert answer["error"]["code"]
    assert headers["X-Request-Id"]
    assert not gateway.accepted


async def test_null_is_as_good_as_nothing(gateway: Emulator) -> None:
    """The page allows null for what is optional, and unknown parameters pass."""
    status, answer, _ = await post(gateway, submit(seed=None, input_image=None, prompt_upsampling=True))

    assert status == 200
    assert answer["status"] == "pending"


async def test_the_key_is_checked(gateway: Emulator) -> None:
    """Another key than the emulator's is let in nowhere, and the key isn't wanted where pictures are."""
    status, answer, _ = await post(gateway, submit(), key="wrong")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {gateway.api_key}"}) as http:
        async with http.get(f"{gateway.url}/results/x.jpeg") as leaked:
            leaked_status = leaked.status
        async with http.get(f"{gateway.url}/model/v1/generation/task/x") as unknown:
            unknown_status = unknown.status
    async with aiohttp.ClientSession() as http, http.get(f"{gateway.url}/results/x.jpeg") as missing:
        missing_status = missing.status

    assert (status, answer["error"]["code"]) == (401, "unauthorized")
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
    """The first megapixel costs 7 cents, each further one 3, of output and input alike, each picture rounded up."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcome = await session.generate(GenerationRequest("a cat", **params))

    assert outcome.usage is not None
    assert outcome.usage.cost == Decimal(cost)


async def test_input_images_are_in_the_picture(tmp_path: Path) -> None:
    """An input image can be seen in the result."""
    async with Emulator(seconds=1.0, seed=1) as gateway, FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcome = await session.generate(
            "a quiet evening", width=512, height=512, output_format="png", input_images=[png(200, 200, "#ff00ff")]
        )
        path = await session.save(outcome.images[0], tmp_path / "a.png")
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(512 * 512) or []

    assert sum(count for count, colour in colours if colour == (255, 0, 255)) > 1000


async def test_runs_with_a_seed_are_alike() -> None:
    """The same seed gives the same ids, durations and fates."""
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
    """The median is what was asked for, and time_scale divides it."""
    async with Emulator(seconds=8.0, spread=0.3, seed=1, time_scale=4.0, max_in_flight=500, pictures=False) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=500) as session:
            async for _ in session.stream(f"cat {number}" for number in range(500)):
                pass
        durations = sorted(task.ends - task.begins for task in gateway.tasks.values())

    assert durations[250] == pytest.approx(2.0, rel=0.1)
    assert durations[250 + 170] / durations[250] == pytest.approx(2.718281828**0.3, rel=0.1)


async def test_the_balance_can_be_topped_up() -> None:
    """An account without money refuses with 402 until it has some."""
    async with Emulator(balance=Decimal("0.07"), pictures=False) as gateway:
        statuses = [(await post(gateway, submit()))[0] for _ in range(2)]
        gateway.balance = Decimal(1)
        statuses.append((await post(gateway, submit()))[0])

        assert gateway.balance == Decimal("0.93")
    assert statuses == [200, 402, 200]


async def test_a_place_is_free_when_a_task_ends() -> None:
    """Submits beyond the limit are a 429 that says how long to wait, until a task has ended."""
    async with Emulator(seconds=8.0, spread=0.0, max_in_flight=2, time_scale=2.0, pictures=False) as gateway:
        answers = [await post(gateway, submit()) for _ in range(3)]
        await anyio.sleep(4.1)
        later, _, _ = await post(gateway, submit())

    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert answers[2][2]["Retry-After"] == "0.5"
    assert later == 200


@pytest.mark.parametrize("share", [0.2])
async def test_faults_by_probability(share: float) -> None:
    """Each fault meets about its share of the calls, and none comes without being asked for."""
    faults = {Fault.UNAVAILABLE: share, Fault.RATE_LIMITED: share, Fault.NOT_FOUND: 1.0}
    async with Emulator(faults=faults, seed=2, max_in_flight=1000, pictures=False) as gateway:
        statuses = [(await post(gateway, submit()))[0] for _ in range(300)]
        hidden = [task.visible > task.begins for task in gateway.tasks.values()]

    assert statuses.count(503) / 300 == pytest.approx(share, abs=0.07)
    assert statuses.count(429) / 300 == pytest.approx(share, abs=0.07)
    assert set(statuses) == {200, 429, 503}
    assert all(hidden)


async def test_hung_calls_do_not_hold_up_leaving(gateway: Emulator) -> None:
    """Leaving the emulator ends the calls that it never answers, at once."""
    async with Emulator(pictures=False) as hanging:
        hanging.script("submit", Fault.HANG)
        call = asyncio.ensure_future(post(hanging, submit()))
        await anyio.sleep(5)
        started = anyio.current_time()
    with pytest.raises(aiohttp.ClientError):
        await call

    assert anyio.current_time() - started < 2


def test_a_client_that_none_of_us_wrote() -> None:
    """The SDK of a sibling gateway's operators creates a task here and waits for it."""
    with Emulator(seconds=0.2, spread=0.0) as gateway:
        config = seaart_sdk.ClientConfig(model_base_url=f"{gateway.url}/model", api_key=gateway.api_key)
        service = seaart_sdk.Client(config).modal
        created = service.create(submit(width=64, height=64))
        task = service.wait(created.id, seaart_sdk.with_poll_interval(0.05))

    assert created.status == "pending"
    assert task.status == "completed"
    assert task.output[0].content[0].url.startswith(f"{gateway.url}/results/{created.id}")
    assert task.usage.cost == "0.07"


def test_served_by_hand() -> None:
    """`python -m flux2max_async.emulator` prints its url and key first, serves, and ends cleanly on Ctrl-C."""
    command = [sys.executable, "-m", "flux2max_async.emulator", "--port", "0", "--seconds", "0.1", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        settings = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))

        async def main() -> bool:
            async with FluxSession(
                settings["FLUX2MAX_API_KEY"], base_url=settings["FLUX2MAX_BASE_URL"], schedule=FixedSchedule(0.05)
            ) as session:
                return (await session.generate("a cat")).ok

        ok = asyncio.run(main())
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        code = process.wait(20)

    assert ok
    assert errors == ""
    assert code == 0


USER_TEST = """
def test_my_code(flux_emulator):
    import asyncio, flux2max_async

    async def main():
        async with flux2max_async.FluxSession(flux_emulator.api_key, base_url=flux_emulator.url) as session:
            return await session.generate("a cat")

    assert asyncio.run(main()).ok
    assert flux_emulator.accepted["a cat"] == 1
"""

NOTHING_LOADED = """
import sys

def test_nothing_was_loaded():
    assert not {"aiohttp", "PIL", "attrs", "flux2max_async.emulator", "flux2max_async._public"} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "content", [pytest.param(USER_TEST, id="used"), pytest.param(NOTHING_LOADED, id="unused, it costs nothing")]
)
def test_pytest_finds_the_fixture(tmp_path: Path, content: str) -> None:
    """`flux_emulator` is there in anybody's tests, and imports neither aiohttp nor Pillow until it is asked for."""
    (tmp_path / "test_mine.py").write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # or the folder's own settings would be somebody else's
    plugin = ["-p", "flux2max_async.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "-W", "error", str(tmp_path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    assert "1 passed" in result.stdout, result.stdout + result.stderr


def test_importing_the_package_imports_no_extra() -> None:
    """The core brings neither Pillow nor typer nor rich into a process."""
    code = (
        "import sys, flux2max_async; flux2max_async.FluxSession; "
        "print(sorted({'PIL', 'typer', 'rich', 'flux2max_async.emulator'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


async def test_without_pictures_every_result_is_the_same_small_one(gateway: Emulator, tmp_path: Path) -> None:
    """For measurements, results can be had without the time it takes to draw them."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        outcome = await session.generate("a cat", output_format="png", width=2048)
        path = await session.save(outcome.images[0], tmp_path / "a.png")

    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
