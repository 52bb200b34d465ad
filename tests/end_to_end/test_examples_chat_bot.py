"""The example of a chat bot, with many users at once."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import attrs
import pytest
from support.apps import EXAMPLES
from support.pictures import end_tasks, read_pictures
from support.ports import free_port

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends the bot with SIGTERM")

SLOTS = 24
PATIENCE = 120.0


@attrs.frozen
class User:
    """A user who is in a room, and writes prompts."""

    socket: aiohttp.ClientWebSocketResponse

    async def write(self, prompt: str) -> None:
        await self.socket.send_str(prompt)

    async def read(self) -> str | bytes:
        message = await self.socket.receive(PATIENCE)
        assert isinstance(message.data, str | bytes), message
        return message.data

    async def read_picture(self) -> bytes:
        """Return the picture, without the messages before it."""
        while isinstance(answer := await self.read(), str):
            assert answer.startswith("You are number")
        return answer


@attrs.frozen
class Chat:
    """A running bot."""

    gateway: Emulator
    url: str
    http: aiohttp.ClientSession
    process: "subprocess.Popen[bytes]"

    @asynccontextmanager
    async def user(self, room: str, name: str) -> AsyncIterator[User]:
        async with self.http.ws_connect(f"{self.url}/chat/{room}/{name}") as socket:
            yield User(socket)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    async def end_tasks_until(self, count: int) -> None:
        """End tasks until so many were accepted, and all of them have ended."""
        while self.gateway.accepted.total() < count:
            end_tasks(self.gateway)
            await asyncio.sleep(0.05)
        end_tasks(self.gateway)


@contextmanager
def running_bot(folder: Path, gateway: Emulator) -> Iterator[tuple[str, "subprocess.Popen[bytes]", Path]]:
    """Run the bot, of which mia is a member."""
    port = str(free_port())
    settings = {
        "FLUX2MAX_API_KEY": gateway.api_key,
        "FLUX2MAX_BASE_URL": gateway.url,
        "PORT": port,
        "MEMBERS": "mia,tom",
    }
    log = folder / "log.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-W", "error", str(EXAMPLES / "chat_bot.py")],
            env={**os.environ, **settings},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield f"http://127.0.0.1:{port}", process, log
        finally:
            process.kill()


@asynccontextmanager
async def running_chat(folder: Path) -> AsyncIterator[Chat]:
    """Run the bot, with a service whose tasks end when the test says so, and check its log in the end."""
    with Emulator(seconds=3600.0, spread=0.0, seed=1) as gateway, running_bot(folder, gateway) as (url, process, log):
        async with aiohttp.ClientSession(trust_env=False) as http:
            chat = Chat(gateway, url, http, process)
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    async with http.get(url):
                        break
                except aiohttp.ClientConnectionError:
                    assert time.monotonic() < deadline, log.read_text()
                    await asyncio.sleep(0.05)
            yield chat
        text = log.read_text()
        assert "Traceback" not in text, text


def test_many_users(tmp_path: Path) -> None:
    """Each user gets their own picture; members go first, rooms take turns, and who leaves in time costs nothing."""
    asyncio.run(check_many_users(tmp_path))


async def check_many_users(folder: Path) -> None:
    async with running_chat(folder) as chat, AsyncExitStack() as stack:

        async def enter(room: str, name: str) -> User:
            user = await stack.enter_async_context(chat.user(room, name))
            await user.write(f"picture of {name}")
            return user

        users = {f"user-{number}": await enter("lobby", f"user-{number}") for number in range(SLOTS)}
        await chat.wait_until(lambda: chat.gateway.accepted.total() == SLOTS)
        for number in range(SLOTS, 2 * SLOTS):
            users[f"user-{number}"] = await enter("lobby", f"user-{number}")
            assert await users[f"user-{number}"].read() == f"You are number {number - SLOTS + 1} in the queue."
        users["ann"] = await enter("attic", "ann")
        users["mia"] = await enter("lobby", "mia")
        places = [await users["ann"].read(), await users["mia"].read()]
        await users["ann"].write("another one")
        refused = await users["ann"].read()
        async with chat.user("lobby", "leaver") as leaver:
            await leaver.write("picture of leaver")
            await leaver.read()
        await chat.end_tasks_until(len(users))
        pictures = {f"picture of {name}": await user.read_picture() for name, user in users.items()}

        assert places == ["You are number 2 in the queue.", "You are number 1 in the queue."]
        assert refused == "One picture at a time, please."
        assert pictures == await read_pictures(chat.gateway)
        assert chat.gateway.accepted == dict.fromkeys(pictures, 1)


def test_refused_prompt_and_shutdown(tmp_path: Path) -> None:
    """A user is told why a prompt is refused; on SIGTERM, running pictures are delivered, and those who wait are told."""
    asyncio.run(check_shutdown(tmp_path))


async def check_shutdown(folder: Path) -> None:
    async with running_chat(folder) as chat, AsyncExitStack() as stack:
        users = [await stack.enter_async_context(chat.user("lobby", f"user-{number}")) for number in range(SLOTS + 1)]
        await users[0].write(" ")
        refused = await users[0].read()
        for number, user in enumerate(users):
            await user.write(f"picture {number}")
        waiting = await users[-1].read()
        await chat.wait_until(lambda: chat.gateway.accepted.total() == SLOTS)
        chat.process.send_signal(signal.SIGTERM)
        told = await users[-1].read()
        end_tasks(chat.gateway)
        pictures = [await user.read_picture() for user in users[:-1]]
        closed = [(await user.socket.receive(PATIENCE)).type for user in users]
        code = await asyncio.to_thread(chat.process.wait, PATIENCE)

    assert refused == "I can't draw that: prompt must not be blank"
    assert waiting == "You are number 1 in the queue."
    assert told == "I am shutting down. Try again in a minute."
    assert len(set(pictures)) == SLOTS
    assert (closed, code) == ([aiohttp.WSMsgType.CLOSE] * len(users), 0)
