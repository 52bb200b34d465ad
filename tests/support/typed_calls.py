"""Calls that type checkers must accept, and calls that they must refuse: an ignore that is not needed is an error.

Nothing here is run: `nox -s types` checks it with mypy and, as Pylance does, with basedpyright.
"""

import io
from pathlib import Path
from typing import assert_type

import numpy as np
from PIL import Image

from flux2max_async import (
    Completed,
    Failed,
    FluxError,
    FluxSession,
    GenerationParams,
    GenerationRequest,
    Outcome,
    OutputFormat,
    QueuedGeneration,
)


async def accepted(session: FluxSession, done: Completed, picture: Image.Image) -> None:
    """Everything that a request takes."""
    params: GenerationParams = {"seed": 7, "output_format": "png"}
    await session.generate("x", **params)
    await session.generate("x", seed=np.int64(7), width=np.uint16(512), height=512, safety_tolerance=None)
    await session.generate("x", timeout=5.0, priority=1, output_format=OutputFormat.JPEG, extra={"steps": 4}, key="k")
    await session.generate(
        "x", input_images=["https://a.example/", Path("a.png"), b"", io.BytesIO(), picture, done.images[0]]
    )
    await session.submit(GenerationRequest("x", seed=np.int64(7), input_images=[picture, *done.images]), seed=8)
    assert_type(session.enqueue("x", webhook_url=None, webhook_secret=None), QueuedGeneration)


async def refused(session: FluxSession) -> None:
    """Names that are misspelt, and values of wrong types."""
    await session.generate("x", widht=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await session.submit("x", widht=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    session.enqueue("x", widht=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await session.generate("x", width="big")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.generate("x", seed=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.generate("x", output_format="bmp")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.generate("x", input_images=[7])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def told_apart(outcome: Outcome) -> None:
    """Outcomes are told apart by their class, by `match`, and by `ok is True`."""
    assert_type(outcome.saved if isinstance(outcome, Completed) else outcome.error, tuple[Path, ...] | FluxError)
    assert_type(outcome.saved if outcome.ok is True else outcome.error, tuple[Path, ...] | FluxError)
    match outcome:
        case Completed(request=GenerationRequest(key=key)):
            assert_type(key, str | None)
        case Completed():
            assert_type(outcome, Completed)
        case Failed(error=error):
            assert_type(error, FluxError)
    outcome.error  # type: ignore[union-attr]  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
