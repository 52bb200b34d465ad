"""Errors of aiohttp's client, translated: whether the request was sent, and whether the reason lasts."""

import re
import socket
import ssl
from typing import Any

import aiohttp

from flux2max_async._exceptions import ConnectionFault, FluxError, ProtocolError, TransportError

_UNKNOWN_HOST_CODES = frozenset((socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)))
_UNKNOWN_HOST_CODES_OF_ARES = frozenset((1, 4))
"""ENODATA and ENOTFOUND of c-ares, which aiohttp uses if aiodns is installed."""
_TLS_REASONS = frozenset(
    (
        # A plain server: its answer is no TLS record. The name depends on the version of OpenSSL.
        *("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL"),
        *("PACKET_LENGTH_TOO_LONG", "UNEXPECTED_MESSAGE", "BAD_RECORD_TYPE"),
        # No version or cipher in common.
        *("UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_CIPHERS_AVAILABLE"),
        *("SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV1_ALERT_INSUFFICIENT_SECURITY", "DH_KEY_TOO_SMALL", "EE_KEY_TOO_SMALL"),
        # The far end knows no such host, or wants another certificate of ours.
        *("TLSV1_UNRECOGNIZED_NAME", "TLSV1_ALERT_UNRECOGNIZED_NAME", "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
        *("TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED"),
    )
)
"""Other reasons may be those of a moment: a connection that was cut, or a server that is restarted."""
_TLS_SETTING = re.compile(r" ssl:(<[^>]*>|\w+)")
"""How aiohttp shows the argument `ssl` of a request, which no reader has passed: a context, `default` or a bool."""
_REFUSALS_OF_PROXIES = frozenset((401, 403, 405, 407))


def translate_error(error: Exception, *, maybe_sent: bool) -> FluxError:
    """Return the FluxError for an error of aiohttp's, with a cause that contains no headers."""
    match error:
        case aiohttp.ClientHttpProxyError(status=status):  # its repr contains headers
            return _proxy_error(status)
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            fault = _fault(error)
            hint = " (does the port speak TLS?)" if fault == "tls" else ""
            text = _TLS_SETTING.sub("", str(error))
            result: FluxError = TransportError(f"no connection: {text}{hint}", maybe_sent=maybe_sent, fault=fault)
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


def refused_by_proxy() -> TransportError:
    """Return the error of a response with the status 407, which only a proxy sends."""
    return _proxy_error(407)


def _proxy_error(status: int) -> TransportError:
    """Return the error of a proxy's response; nothing was passed on to the service."""
    if status == 407:
        text = "the proxy requires a user and password, or refuses those in its URL"
    else:
        text = "the proxy doesn't connect to the host"
    fault: ConnectionFault | None = "proxy" if status in _REFUSALS_OF_PROXIES else None
    return TransportError(f"no connection: {text} (HTTP {status})", maybe_sent=False, fault=fault)


def _fault(error: Exception) -> ConnectionFault | None:
    """Return why there was no connection, if the reason lasts."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return "certificate"
        case aiohttp.ClientConnectorSSLError(os_error=ssl.SSLError(reason=reason)):
            return "tls" if (reason or "").replace(" ", "_").upper() in _TLS_REASONS else None
        case aiohttp.ClientConnectorDNSError(os_error=os_error):
            return "unknown_host" if _is_unknown_host(os_error) else None
        case _:
            return None


def _is_unknown_host(error: OSError) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno in _UNKNOWN_HOST_CODES
    # An aiodns.error.DNSError; it may not be installed.
    cause: Any = error.__cause__
    return type(cause).__name__ == "DNSError" and any(code in _UNKNOWN_HOST_CODES_OF_ARES for code in cause.args[:1])
