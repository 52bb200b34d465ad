"""Web applications whose visitors wait for pictures and may leave.

Run one in a process of its own:

    python -m support.visited uvicorn PORT h11 asyncio [middleware]
    python -m support.visited aiohttp PORT asyncio

Each answers with the size and hash of the request's body. The query says what to generate and when to read the body.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from types import SimpleNamespace
from typing import Annotated, Any

import uvicorn
from aiohttp import web
from fastapi import Body, FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import JSONResponse, Response

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.web import cancel_on_disconnect

SLOTS = 4

counts = Counter[str]()
"""Visitors by what has become of them: "waiting", "left" or "served"."""


@asynccontextmanager
async def opened_session() -> AsyncIterator[FluxSession]:
    async with FluxSession(max_in_flight=SLOTS, schedule=FixedSchedule(0.05)) as session:
        yield session


async def serve(
    session: FluxSession, request: Any, query: Mapping[str, str], read: Callable[[], Awaitable[bytes]]
) -> dict[str, Any] | None:
    """Generate a picture and return what is known about the body; None if the visitor has left."""
    body = await read() if query["read"] == "before" else b""
    async with cancel_on_disconnect(request) as visit:
        counts["waiting"] += 1
        if query["read"] == "inside":
            body = await read()
        await session.generate(query["prompt"])
    counts["waiting"] -= 1
    if visit.disconnected:
        counts["left"] += 1
        return None
    if query["read"] == "after":
        body = await read()
    counts["served"] += 1
    return {"size": len(body), "sha256": sha256(body).hexdigest()}


def get_state(query: str) -> dict[str, int]:
    if query == "clear":
        counts.clear()
    return dict(counts)


# ------------------------------------------------------------------ FastAPI, Starlette and raw ASGI


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with opened_session() as app.state.session:
        yield


async def add_header(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Do little, as a middleware that wraps `receive`."""
    response = await call_next(request)
    response.headers["X-Middleware"] = "yes"
    return response


app = FastAPI(lifespan=lifespan)


@app.get("/state")
async def state(request: Request) -> dict[str, int]:
    return get_state(request.url.query)


@app.post("/request")
async def with_request(request: Request) -> Response:
    result = await serve(request.app.state.session, request, request.query_params, request.body)
    return Response(status_code=499) if result is None else JSONResponse(result)


@app.post("/json")
async def with_json(request: Request, text: Annotated[str, Body()]) -> Response:
    """Have FastAPI read the body, which is a string in JSON."""

    async def read() -> bytes:
        return b'"%s"' % text.encode()

    result = await serve(request.app.state.session, request, request.query_params, read)
    return Response(status_code=499) if result is None else JSONResponse(result)


async def raw_app(scope: Any, receive: Any, send: Any) -> None:
    request = SimpleNamespace(scope=scope, receive=receive)

    async def read() -> bytes:
        body = b""
        more = True
        while more:
            message = await request.receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return body

    url = Request(scope)
    result = await serve(app.state.session, request, url.query_params, read)
    response = Response(status_code=499) if result is None else JSONResponse(result)
    await response(scope, request.receive, send)


app.mount("/raw", raw_app)


# ------------------------------------------------------------------ aiohttp.web

session_key = web.AppKey("session", FluxSession)


async def open_session(aiohttp_app: web.Application) -> AsyncIterator[None]:
    async with opened_session() as aiohttp_app[session_key]:
        yield


async def handle_state(request: web.Request) -> web.Response:
    return web.json_response(get_state(request.query_string))


async def handle(request: web.Request) -> web.Response:
    result = await serve(request.app[session_key], request, request.query, request.read)
    return web.Response(status=499) if result is None else web.json_response(result)


def make_aiohttp_app() -> web.Application:
    aiohttp_app = web.Application(client_max_size=10_000_000)
    aiohttp_app.cleanup_ctx.append(open_session)
    aiohttp_app.router.add_get("/state", handle_state)
    aiohttp_app.router.add_post("/request", handle)
    return aiohttp_app


def main(server: str, port: str, *options: str) -> None:
    if server == "uvicorn":
        http, loop, *rest = options
        if rest == ["middleware"]:
            app.add_middleware(BaseHTTPMiddleware, dispatch=add_header)
        uvicorn.run(app, port=int(port), http=http, loop=loop, access_log=False)
    else:
        event_loop: asyncio.AbstractEventLoop | None = None
        if options == ("uvloop",):
            import uvloop  # noqa: PLC0415 - not everywhere

            event_loop = uvloop.new_event_loop()
        web.run_app(make_aiohttp_app(), host="127.0.0.1", port=int(port), loop=event_loop, access_log=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
