"""Errors of aiohttp, translated."""

import aiohttp

from flux2max_async._exceptions import FluxError, ProtocolError, TransportError


def translate_error(error: Exception, *, maybe_sent: bool) -> FluxError:
    """Return the FluxError for an error of aiohttp's, with a cause that contains no headers."""
    match error:
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            result: FluxError = TransportError(f"no connection: {error}", maybe_sent=maybe_sent)
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            result = TransportError("the connection was closed before the response was complete", maybe_sent=maybe_sent)
        case TimeoutError():
            result = TransportError("the request timed out", maybe_sent=maybe_sent)
        case aiohttp.ClientResponseError() | aiohttp.NonHttpUrlClientError() | ValueError():
            # The repr of such an error shows the request's headers: only its class is kept.
            if not maybe_sent:
                return TransportError(f"no connection: {error.__class__.__name__}", maybe_sent=False)
            return ProtocolError(f"not valid HTTP: {error.__class__.__name__}")
        case _:
            result = TransportError(f"the connection failed: {error}", maybe_sent=maybe_sent)
    # Without its traceback, whose frames contain the headers too.
    result.__cause__ = error.with_traceback(None)
    return result
