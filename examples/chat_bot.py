"""A chat bot for many users: each message is a prompt, and the answer is its picture.

    python -m flux2max_async.emulator       # to try it; export the two variables that it prints
    python examples/chat_bot.py

The chat is a WebSocket at /chat/ROOM/USER, where text is a message and bytes are a picture; it doesn't check who a user
is. With a chat service, call `Bot.on_message()` in its handler of messages.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from aiohttp import WSCloseCode, WSMsgType, web

from flux2max_async import (
    ContentModeratedError,
    FluxError,
    FluxSession,
    InvalidRequestError,
    QueueFullError,
    SessionClosedError,
)

MEMBERS = frozenset(os.environ.get("MEMBERS", "").split(","))  # they go first


class Bot:
    """Answers messages."""

    def __init__(self, session: FluxSession) -> None:
        self.session = session
        self.waiting: set[str] = set()  # users who wait for a picture

    async def on_message(
        self, room: str, user: str, prompt: str, reply: Callable[[str | bytes], Awaitable[None]]
    ) -> None:
        """Answer a message; cancel it when the user leaves."""
        if user in self.waiting:
            await reply("One picture at a time, please.")
            return
        self.waiting.add(user)
        try:
            await self.generate(room, user, prompt, reply)
        except QueueFullError as error:
            await reply(f"Too many people want pictures. Try again in {error.retry_after or 60:.0f} s.")
        except SessionClosedError:
            await reply("I am shutting down. Try again in a minute.")
        except (InvalidRequestError, ContentModeratedError) as error:
            await reply(f"I can't draw that: {error}")
        except FluxError:  # its message is for the log only
            await reply("That didn't work. Try again later.")
        finally:
            self.waiting.remove(user)

    async def generate(
        self, room: str, user: str, prompt: str, reply: Callable[[str | bytes], Awaitable[None]]
    ) -> None:
        """Reply with the place in the queue, and then with the picture."""
        # Rooms take turns, so that one with many users doesn't hold up the others.
        picture = self.session.enqueue(prompt, group=room, priority=1 if user in MEMBERS else 0)
        try:
            if picture.position is not None:
                await reply(f"You are number {picture.position} in the queue.")
            done = await picture
            await reply(await self.session.read(done.images[0]))
        finally:
            picture.withdraw()  # if the user has left; has no effect once it is submitted


Answers = set["asyncio.Task[None]"]
bot_key = web.AppKey("bot", Bot)
chats_key = web.AppKey("chats", dict[web.WebSocketResponse, Answers])


async def open_session(app: web.Application) -> AsyncIterator[None]:
    """Open one session for all users."""
    stop = (signal.SIGTERM, signal.SIGINT)
    async with FluxSession(max_in_flight=24, max_waiting=200, drain=20, drain_signals=stop) as session:
        app[bot_key] = Bot(session)
        app[chats_key] = {}
        yield


async def close_chats(app: web.Application) -> None:
    """Deliver the pictures that are being generated, and close the connections, which would keep the server running."""
    chats = app[chats_key]
    if answers := set().union(*chats.values()):
        await asyncio.wait(answers, timeout=20)
    await asyncio.gather(*(socket.close(code=WSCloseCode.GOING_AWAY) for socket in tuple(chats)))


async def chat(request: web.Request) -> web.WebSocketResponse:
    """Pass the messages of one user to the bot, until the user leaves."""
    if "Origin" in request.headers:  # a page of another site, which would spend your budget
        raise web.HTTPForbidden
    room, user = request.match_info["room"], request.match_info["user"]
    socket = web.WebSocketResponse(heartbeat=30, max_msg_size=16 * 1024, timeout=2)
    await socket.prepare(request)

    async def reply(message: str | bytes) -> None:
        with suppress(ConnectionResetError):  # the user has just left
            await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))

    answers = request.app[chats_key][socket] = set()
    try:
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                answer = asyncio.create_task(request.app[bot_key].on_message(room, user, message.data, reply))
                answers.add(answer)
                answer.add_done_callback(answers.discard)
    finally:
        del request.app[chats_key][socket]
        for answer in answers:
            answer.cancel()
    return socket


app = web.Application()
app.cleanup_ctx.append(open_session)
app.on_shutdown.append(close_chats)
app.router.add_get("/chat/{room}/{user}", chat)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
