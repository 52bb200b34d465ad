"""Generated images as input images: before a submit, URLs that have expired are replaced by fresh ones."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial

import attrs

from flux2max_async._api.retry import backoff, may_poll_again, min_delay
from flux2max_async._exceptions import FluxError, ResultExpiredError
from flux2max_async._models.generated import MAX_LINK_AGE, NO_URL, GeneratedImage
from flux2max_async._models.images import InputImage
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import TaskSnapshot

Poll = Callable[[str], Awaitable[TaskSnapshot]]
"""Polls a task once."""

_MAX_ATTEMPTS = 5
"""Polls in a row that fail for a reason that isn't the task's."""


@attrs.define(eq=False)
class InputLinks:
    """Renews the URLs of generated images that are input images."""

    _poll: Poll
    now: Callable[[], datetime] = attrs.field(default=partial(datetime.now, UTC), init=False)

    def are_old(self, request: GenerationRequest) -> bool:
        """Return whether an input image is a generated one whose URL has to be renewed before it is sent."""
        return any(
            isinstance(image.source, GeneratedImage) and self._is_old(image.source) for image in request.input_images
        )

    async def renew(self, request: GenerationRequest) -> GenerationRequest:
        """Return a request whose generated images have URLs that work.

        Raises:
            ResultExpiredError: A URL has expired, and the image's task has no fresh one.
        """
        images: list[InputImage] = []
        for index, image in enumerate(request.input_images):
            if isinstance(image.source, GeneratedImage) and self._is_old(image.source):
                images.append(InputImage(await self._renew(image.source, index)))
            else:
                images.append(image)
        return attrs.evolve(request, input_images=images)

    def _is_old(self, image: GeneratedImage) -> bool:
        if image.url == NO_URL or (image.is_link and image.received_at is None):
            return True
        return image.is_older_than(MAX_LINK_AGE, self.now())

    async def _renew(self, image: GeneratedImage, index: int) -> GeneratedImage:
        try:
            fresh = (await _poll_until_answer(image.task_id, self._poll)).images
            return attrs.evolve(fresh[image.index], received_at=self.now())
        except (FluxError, IndexError) as error:
            if image.is_link and image.received_at is None:  # it may be young
                return attrs.evolve(image, received_at=self.now())
            problem = "it has no such image" if isinstance(error, IndexError) else error
            message = f"input_images[{index}]: its URL has expired, and task {image.task_id} has no fresh one"
            raise ResultExpiredError(f"{message}: {problem}") from error


async def _poll_until_answer(task_id: str, poll: Poll) -> TaskSnapshot:
    failures = 0
    while True:
        try:
            return await poll(task_id)
        except FluxError as error:
            failures += 1
            if failures == _MAX_ATTEMPTS or not may_poll_again(error, elapsed=None):
                raise
            delay = max(backoff(failures, random.random()), min_delay(error))
        await asyncio.sleep(delay)
