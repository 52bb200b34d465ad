"""Reads the bodies of deliveries, within limits for whoever can reach the endpoint."""

import contextlib
import threading
from collections.abc import AsyncGenerator

import attrs

from flux2max_async._timeouts import Timeout
from flux2max_async.webhooks._headers import HeadersLike, header_values
from flux2max_async.webhooks._payload import MAX_BODY
from flux2max_async.webhooks._signature import SIGNATURE_HEADER, read_digests

BODY_TIMEOUT = 10.0
"""Seconds that a body has to arrive."""
MAX_BODIES = 64
"""How many bodies an inbox reads at once; together they have at most 64 MB."""


class BodyRefusedError(Exception):
    """A body is too large or too slow, or too many are being read."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        """The HTTP status of the response."""


@attrs.define(eq=False)
class BodyReader:
    """Reads the bodies of deliveries to one inbox, which may arrive in the event loops of several threads."""

    header: str = SIGNATURE_HEADER
    """The name of the header that holds the signature."""
    slots: threading.Semaphore = attrs.field(factory=lambda: threading.Semaphore(MAX_BODIES))
    """Counts the bodies that may still be read at the same time."""

    async def read(self, headers: HeadersLike, chunks: AsyncGenerator[bytes]) -> bytes:
        """Return a body; what the headers reveal is checked before it is read.

        Raises:
            WebhookSignatureError: The headers hold no signature.
            BodyRefusedError: The body is too large or too slow, or too many are being read.
            ConnectionError: The body is incomplete.
        """
        read_digests(headers, self.header)
        if _content_length(headers) > MAX_BODY:
            raise _too_large()
        if not self.slots.acquire(blocking=False):
            raise BodyRefusedError(503, f"{MAX_BODIES} others are being received")
        try:
            with Timeout(BODY_TIMEOUT):
                async with contextlib.aclosing(chunks):
                    return await _join(chunks)
        except TimeoutError:
            raise BodyRefusedError(408, f"its body did not arrive within {BODY_TIMEOUT:g} s") from None
        finally:
            self.slots.release()


async def _join(chunks: AsyncGenerator[bytes]) -> bytes:
    content = bytearray()
    async for chunk in chunks:
        content += chunk
        if len(content) > MAX_BODY:
            raise _too_large()
    return bytes(content)


def _too_large() -> BodyRefusedError:
    return BodyRefusedError(413, f"its body has more than {MAX_BODY} bytes")


def _content_length(headers: HeadersLike) -> int:
    """Return the declared length, or 0 if it is missing or not a number."""
    declared = next(iter(header_values(headers, "Content-Length")), "")
    # int() refuses texts of thousands of digits; the first 20 digits already exceed the limit.
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else 0
