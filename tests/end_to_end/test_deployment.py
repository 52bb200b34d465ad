"""Servers that are stopped while visitors wait: the recipes of docs/deployment.md, as a reader would run them."""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import attrs
import pytest
from support.ports import free_port

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends servers with SIGTERM")

TEXT = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = {
    section: shlex.split(command)
    for section, command in re.findall(
        r"^## (\w+)\n(?:(?!^## ).)*?^```console\n\$ (.*?)\n```", TEXT, re.DOTALL | re.MULTILINE
    )
}
(KUBERNETES,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
COMMANDS["Kubernetes"] = json.loads(re.findall(r"command: (\[.*\])", KUBERNETES)[0])
PROGRAMS = ("uvicorn", "gunicorn", "granian", "hypercorn")
VISITORS, SLOTS = 60, 24
TIME_LIMIT = 120.0
"""Seconds, on a slow machine, for anything that a test waits for."""


@attrs.define(eq=False)
class Recipe:
    """A server that a recipe runs, the service whose pictures it generates, and what became of its visitors."""

    name: str
    gateway: Emulator
    process: asyncio.subprocess.Process
    url: str
    log: Path
    responses: dict[str, tuple[int, Any]] = attrs.field(factory=dict)
    """By prompt: the status and the JSON."""
    answered_after: list[float] = attrs.field(factory=list)
    """Seconds from the signal to each response."""
    refused: Counter[int] = attrs.field(factory=Counter)
    """The statuses of those who were answered while the others' tasks were still running."""
    accepted: dict[str, int] = attrs.field(factory=dict)
    exit_code: int | None = None


async def wait_until(condition: Callable[[], bool], describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert time.monotonic() < deadline, describe()
        await asyncio.sleep(0.02)


async def stop_while_visitors_wait(recipe: Recipe) -> None:
    """Let visitors come, send SIGTERM, and end the tasks when all that wait for a slot have been answered."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIME_LIMIT)
    async with aiohttp.ClientSession(recipe.url, connector=connector, timeout=timeout) as http:
        stopped_at = 0.0

        async def visit(prompt: str) -> None:
            async with http.post("/pictures", json={"prompt": prompt}) as response:
                recipe.responses[prompt] = (response.status, await response.text())
            recipe.answered_after.append(time.monotonic() - stopped_at)

        async def count_waiting() -> int:
            async with http.get("/ready") as response:
                return int((await response.json())["waiting"])

        await _wait_until_ready(recipe, count_waiting)
        visits = [asyncio.create_task(visit(f"picture {number}")) for number in range(VISITORS)]
        while await count_waiting() < VISITORS - SLOTS or recipe.gateway.accepted.total() < SLOTS:  # noqa: ASYNC110 - elsewhere
            await asyncio.sleep(0.02)
        stopped_at = time.monotonic()
        recipe.process.terminate()
        await wait_until(lambda: len(recipe.responses) >= VISITORS - SLOTS, lambda: _describe(recipe))
        recipe.refused = Counter(status for status, _ in recipe.responses.values())
        for task in recipe.gateway.tasks.values():
            task.ends = 0.0
        await asyncio.wait_for(asyncio.gather(*visits), TIME_LIMIT)
    recipe.exit_code = await asyncio.wait_for(recipe.process.wait(), TIME_LIMIT)
    recipe.accepted = dict(recipe.gateway.accepted)


async def _wait_until_ready(recipe: Recipe, count_waiting: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while True:
        try:
            await count_waiting()
        except aiohttp.ClientConnectionError:
            assert recipe.process.returncode is None, _describe(recipe)
            assert time.monotonic() < deadline, _describe(recipe)
            await asyncio.sleep(0.05)
        else:
            return


def _describe(recipe: Recipe) -> str:
    return f"{recipe.name}: {len(recipe.responses)} responses\n{recipe.log.read_text(encoding='utf-8')}"


async def start(name: str, stack: AsyncExitStack, folder: Path) -> Recipe:
    """Start the server of a recipe in a folder with the recipes' files."""
    gateway = await stack.enter_async_context(
        Emulator(seconds=3600.0, spread=0.0, seed=1, pictures=False)  # the test ends the tasks
    )
    port = str(free_port())
    folder /= name
    folder.mkdir()
    for file, content in FILES.items():
        (folder / file).write_text(adapt(content, port), encoding="utf-8")
    for program in PROGRAMS:
        _write_script(folder / program, f"{shlex.quote(sys.executable)} -m {program}")
    _write_script(folder / "python", shlex.quote(sys.executable))
    program, *arguments = (adapt(word, port) for word in COMMANDS[name])
    log = folder / "log.txt"
    environment = {
        **os.environ,
        "FLUX2MAX_API_KEY": gateway.api_key,
        "FLUX2MAX_BASE_URL": gateway.url,
        "HOME": str(folder),  # gunicorn has a socket there
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(folder / program),
            *arguments,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    stack.push_async_callback(_kill, process)
    return Recipe(name, gateway, process, f"http://127.0.0.1:{port}", log)


def adapt(text: str, port: str) -> str:
    """Return a part of a recipe for a free port, and with time limits that suit a slow machine."""
    return re.sub(r"\b(30|55)\b", r"\g<1>0", text.replace("8000", port))


def _write_script(path: Path, command: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o755)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        await process.wait()


def test_all_recipes_are_run() -> None:
    """Every file and command on the page is used by a test."""
    assert list(COMMANDS) == ["uvicorn", "gunicorn", "granian", "hypercorn", "aiohttp", "Kubernetes"]
    assert set(FILES) == {"app.py", "aiohttp_app.py", "gunicorn.conf.py"}
    assert TEXT.count("```console") == len(COMMANDS) - 1
    assert TEXT.count("```python") == len(FILES)


# One test, because all servers run at the same time.
def test_stopped_servers(tmp_path: Path) -> None:
    """Pictures in the making reach their visitors, the others are refused before, and nothing else is paid for."""

    async def run() -> list[Recipe]:
        async with AsyncExitStack() as stack:
            started = [await start(name, stack, tmp_path) for name in COMMANDS]
            await asyncio.gather(*map(stop_while_visitors_wait, started))
        return started

    for recipe in asyncio.run(run()):
        check(recipe)


def check(recipe: Recipe) -> None:
    """Check what became of the visitors of a server, and of the server."""
    seconds = sorted(recipe.answered_after)[VISITORS - SLOTS - 1]
    print(f"{recipe.name}: {VISITORS - SLOTS} visitors were answered within {seconds:.2f} s of the signal")
    statuses = Counter(status for status, _ in recipe.responses.values())
    delivered = {prompt: 1 for prompt, (status, _) in recipe.responses.items() if status == 200}
    log = recipe.log.read_text(encoding="utf-8")

    assert recipe.refused == {503: VISITORS - SLOTS}, recipe.name
    assert statuses == {200: SLOTS, 503: VISITORS - SLOTS}, recipe.name
    assert recipe.accepted == delivered, recipe.name
    assert all("shutting down" in text for status, text in recipe.responses.values() if status == 503), recipe.name
    assert recipe.exit_code in {0, -signal.SIGTERM}, recipe.name
    assert "Traceback" not in log, log
    assert "unfinished" not in log, log


def test_grace_period_of_kubernetes() -> None:
    """The grace period is longer than what comes before the end: preStop, open requests, and the session's drain."""
    (grace,) = re.findall(r"terminationGracePeriodSeconds: (\d+)\n", KUBERNETES)
    (pause,) = re.findall(r"preStop:\n +sleep:\n +seconds: (\d+)\n", KUBERNETES)
    (drain,) = re.findall(r"drain=(\d+)", FILES["app.py"])
    requests = COMMANDS["Kubernetes"][COMMANDS["Kubernetes"].index("--timeout-graceful-shutdown") + 1]

    assert int(grace) > int(pause) + int(requests) + int(drain)
