"""Several server processes with one address and one journal."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.ports import free_port

from flux2max_async.emulator import Emulator

APP = """
import os
from contextlib import asynccontextmanager

from fastapi import FastAPI

from flux2max_async import FixedSchedule, FluxSession, SqliteJournal, WebhookInbox

inbox = WebhookInbox(secret="shared by all workers", public_url=os.environ["PUBLIC_URL"] + "/hooks/flux")


@asynccontextmanager
async def lifespan(app):
    journal = SqliteJournal("shared.db")
    async with FluxSession(webhooks=inbox, journal=journal, schedule=FixedSchedule(1000)) as app.state.flux:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/hooks", inbox.asgi)


@app.post("/images")
async def create(prompt: str):
    done = await app.state.flux.generate(prompt)
    return {"worker": os.getpid(), "elapsed": done.elapsed, "polls": done.polls}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="uvicorn's workers share a socket")
def test_a_webhook_ends_the_task_of_another_worker(tmp_path: Path) -> None:
    """Whichever of three workers receives a webhook, the task ends without a single poll."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(tmp_path), "--port", port, "--workers", "3"]
    with Emulator(seconds=1.5, spread=0.1, seed=1, pictures=False, max_in_flight=100) as gateway:
        settings = {"FLUX2MAX_API_KEY": gateway.api_key, "FLUX2MAX_BASE_URL": gateway.url, "PUBLIC_URL": url}
        with subprocess.Popen(
            command, env={**os.environ, **settings}, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as server:
            try:
                _wait_for(url)
                with ThreadPoolExecutor(30) as clients:
                    responses = list(clients.map(lambda number: _create(url, f"image {number}"), range(30)))
            finally:
                server.terminate()
                _, log = server.communicate(timeout=30)
        ends = sorted(task.ends - task.begins for task in gateway.tasks.values())

    assert len({response["worker"] for response in responses}) > 1
    assert len(ends) == len(responses) == 30
    assert gateway.calls["poll"] == 0
    assert [delivery.status for delivery in gateway.deliveries] == [200] * 30
    assert max(response["elapsed"] for response in responses) < ends[-1] + 10.0
    assert "Traceback" not in log


def _create(url: str, prompt: str) -> dict[str, Any]:
    response = httpx.post(f"{url}/images", params={"prompt": prompt}, timeout=30, trust_env=False)
    result: dict[str, Any] = response.raise_for_status().json()
    return result


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"{url}/docs", trust_env=False).status_code == 200
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            time.sleep(1.0)  # until the other workers have started, too
            return
    raise AssertionError("the server has not started")
