"""The response to a download."""

from collections.abc import Mapping
from datetime import UTC, datetime

import aiohttp

from flux2max_async._api.aiohttp_errors import translate_error

_CHUNK_BYTES = 65_536


class DownloadResponse:
    """The response to a download: status and headers, and then its content."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.received = datetime.now(UTC)
        self._content = response.content

    async def read(self) -> bytes:
        """Read the next bytes; empty at the end.

        Raises:
            TransportError: The connection was lost.
        """
        try:
            return await self._content.read(_CHUNK_BYTES)
        except (aiohttp.ClientError, OSError) as error:
            failure = translate_error(error, maybe_sent=True)
            raise failure from failure.__cause__
