"""The images that the service has generated."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import attrs

NO_URL = "about:blank"
"""The URL of an image whose real URL is unknown and has to be requested from the service."""

MAX_LINK_AGE = timedelta(minutes=8)
"""Of URLs that are given out. They live for about ten minutes, and whoever gets one needs time to use it."""

_MAX_URL_REPR = 200
_MAX_LINK_REPR = 100
# What the base64 of an image begins with.
_MEDIA_TYPES = {
    "/9j/": "image/jpeg",
    "iVBORw0KGgo": "image/png",
    "UklGR": "image/webp",
    "R0lGOD": "image/gif",
}


def is_inline(url: str) -> bool:
    """Return whether an image's URL is a `data:` URI, which contains the image itself."""
    return url[:5].lower() == "data:"


def inline_url(data: str) -> str:
    """Return the `data:` URI of an image in base64, which may be one already."""
    if is_inline(data):
        return data
    known = (media_type for start, media_type in _MEDIA_TYPES.items() if data.startswith(start))
    return f"data:{next(known, 'application/octet-stream')};base64,{data}"


def _shorten_url(url: str) -> str:
    """Return the repr of a URL, in which an inline image, or the rest of a long link, is replaced by its length."""
    if is_inline(url):
        header, _, data = url.partition(",")
        return repr(f"{header[:_MAX_URL_REPR]},... ({len(data)} characters)")
    return repr(shorten_link(url))


def shorten_link(url: str) -> str:
    """Return a URL whose signature, which may have thousands of characters, is cut off."""
    return url if len(url) <= _MAX_LINK_REPR else f"{url[:_MAX_LINK_REPR]}... ({len(url)} characters)"


@attrs.frozen(kw_only=True)
class GeneratedImage:
    """An image of a completed task. `session.save()` downloads it."""

    url: str = attrs.field(repr=_shorten_url)
    """Short-lived: it expires after about 10 minutes. An inline image is a `data:` URI, which never expires."""
    type: str
    task_id: str
    # The hash omits it because a dict has none; equality doesn't.
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False, hash=False)
    """`jobId` and whatever else the service reports."""
    index: int = 0
    """The position among the task's images, from 0."""
    received_at: datetime | None = attrs.field(default=None, eq=False, repr=False)
    """When the URL was received, by this machine's clock; timezone-aware. None if nobody knows."""

    @property
    def is_link(self) -> bool:
        """Whether it has a URL that expires; an inline image has none."""
        return not is_inline(self.url) and self.url != NO_URL

    def is_older_than(self, age: timedelta, now: datetime) -> bool:
        """Return whether its URL was received longer ago than that; False if nobody knows when."""
        return self.is_link and self.received_at is not None and self.received_at < now - age
