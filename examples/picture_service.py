"""A web service that answers with the picture itself: `uvicorn --factory picture_service:create_app`.

Needs `pip install flux2max_async fastapi uvicorn`, and FLUX2MAX_API_KEY.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from flux2max_async import FluxError, FluxSession


def create_app(open_session: Callable[[], FluxSession] = FluxSession) -> FastAPI:
    """Return the application; tests pass the session of an emulated service."""
    session = open_session()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with session:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/pictures")
    async def create(prompt: Annotated[str, Body(embed=True)]) -> StreamingResponse:
        try:
            done = await session.generate(prompt, width=512, height=512)
            picture = await session.download(done.images[0])
        except FluxError as error:
            raise HTTPException(503, type(error).__name__) from error
        return StreamingResponse(picture, media_type=picture.content_type)

    return app
