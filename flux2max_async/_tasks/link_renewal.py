"""Replays whose links have expired: their tasks are asked for fresh ones before the outcome is given out."""

from collections import OrderedDict
from datetime import UTC, datetime

import attrs

from flux2max_async._api.client import ApiClient
from flux2max_async._api.codec import build_poll
from flux2max_async._exceptions import FluxError
from flux2max_async._models.generated import MAX_LINK_AGE, GeneratedImage
from flux2max_async._models.results import Completed, Outcome
from flux2max_async._text import get_logger
from flux2max_async._timeouts import Timeout

log = get_logger("tasks")

_MAX_WAIT = 5.0
"""Seconds for the poll; an outcome must not wait long for its links."""
_MAX_RENEWED = 1_000


@attrs.define(eq=False)
class LinkRenewer:
    """Renews the links of replays, each task's at most once in eight minutes."""

    _renewed: OrderedDict[str, tuple[GeneratedImage, ...]] = attrs.field(
        factory=OrderedDict[str, tuple[GeneratedImage, ...]], init=False
    )
    """The fresh images by task id, the newest last."""

    async def renew(self, outcome: Outcome, client: ApiClient) -> Outcome:
        """Return the outcome with links that work; as it is if they are young, or can't be renewed now."""
        if not isinstance(outcome, Completed) or not _are_old(outcome.images):
            return outcome
        images = self._renewed.get(outcome.task_id)
        if images is None or _are_old(images):
            images = await _fetch_images(outcome.task_id, client)
        if len(images) != len(outcome.images) or not all(image.is_link for image in images):
            return outcome
        self._renewed[outcome.task_id] = images
        if len(self._renewed) > _MAX_RENEWED:
            self._renewed.popitem(last=False)
        return attrs.evolve(outcome, images=images)


def _are_old(images: tuple[GeneratedImage, ...]) -> bool:
    now = datetime.now(UTC)
    return any(image.is_older_than(MAX_LINK_AGE, now) for image in images)


async def _fetch_images(task_id: str, client: ApiClient) -> tuple[GeneratedImage, ...]:
    """Return the images that a poll reports; none if it fails."""
    if client.pause(0.0) > 0:  # the service has asked all calls to wait
        return ()
    try:
        with Timeout(_MAX_WAIT):
            return (await client.poll(build_poll(task_id), task_id)).images
    except (TimeoutError, FluxError) as error:
        log.warning("task %s: its links have expired and could not be renewed: %s", task_id, error or "no answer")
        return ()
