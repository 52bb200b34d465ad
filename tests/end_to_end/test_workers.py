"""Several server processes behind one address, with a journal that they share."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flux2max_async.emulator import Emulator

APP = """
import os
from contextlib import asynccontextmanager

from fastapi import FastAPI

from flux2max_async import FixedSchedule, FluxSession, SqliteJournal, WebhookInbox

inbox = WebhookInbox(secret="a secret of all workers", public_url=os.environ["PUBLIC_URL"] + "/hooks/flux")


@asynccontextmanager
async def lifespan(app):
    journal = SqliteJournal("shared.db")
    async with FluxSession(webhooks=inbox, journal=journal, schedule=FixedSchedule(1000)) as app.state.flux:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/hooks", inbox.asgi)


@app.post("/pictures")
async def create(prompt: str):
    done = await app.state.flux.generate(prompt)
    return {"worker": os.getpid(), "elapsed": done.elapsed, "polls": done.polls}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="uvicorn's workers share a socket")
def test_a_delivery_reaches_the_task_whichever_worker_gets_it(tmp_path: Path) -> None:
    """Deliveries go to any of three workers, and each task's end is known without a single poll."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(tmp_path), "--port", port, "--workers", "3"]
    with Emulator(seconds=1.5, spread=0.1, seed=1, pictures=False, max_in_flight=100) as gateway:
        settings = {"FLUX2MAX_API_KEY": gateway.api_key, "FLUX2MAX_BASE_URL": gateway.url, "PUBLIC_URL": url}
        with subprocess.Popen(
            command, env={**os.environ, **settings}, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as server:
            try:
                _wait_for(url)
                with ThreadPoolExecutor(30) as visitors:
                    told = list(visitors.map(lambda number: _create(url, f"picture {number}"), range(30)))
            finally:
                server.terminate()
                _, log = server.communicate(timeout=30)
        ends = sorted(task.ends - task.begins for task in gateway.tasks.values())

    assert len({answer["worker"] for answer in told}) > 1
    assert len(ends) == len(told) == 30
    assert gateway.calls["poll"] == 0
    assert [delivery.status for delivery in gateway.deliveries] == [200] * 30
    assert max(answer["elapsed"] for answer in told) < ends[-1] + 10.0
    assert "Traceback" not in log


def _create(url: str, prompt: str) -> dict[str, Any]:
    answer = httpx.post(f"{url}/pictures", params={"prompt": prompt}, timeout=30, trust_env=False)
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


def _wait_for(url: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            assert httpx.get(f"{url}/docs", trust_env=False).status_code == 200
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            time.sleep(1.0)  # for the other workers
            return
    raise AssertionError("the server didn't come up")
