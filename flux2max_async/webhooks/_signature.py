"""The signature of a delivery: whether it comes from the service, and not long ago."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from flux2max_async._api.codec import moment
from flux2max_async._exceptions import InvalidRequestError, ProtocolError, WebhookSignatureError
from flux2max_async.webhooks._payload import parse_json_object, require_bytes

SIGNATURE_HEADER = "X-BFL-Signature"  # [B]
MAX_AGE = 300.0


def verify(
    body: bytes,
    headers: Mapping[str, str],
    secret: str | Iterable[str],
    *,
    header: str = SIGNATURE_HEADER,
    max_age: float | None = MAX_AGE,
    now: datetime | None = None,
) -> None:
    """Make sure that a delivery was signed by somebody who knows the secret, and not long ago.

    Args:
        body: As it came, byte by byte: JSON that was read and written again has another signature.
        headers: Of the delivery; their names are compared without regard to case.
        secret: What was sent as `webhook_secret`; several while an old one is being replaced. Empty ones never verify.
        header: Which of the headers holds the signature, `sha256=<hex>` or the hexadecimal digits alone. [B]
        max_age: Seconds after which a delivery whose body tells when it was sent counts as replayed; None for any.
        now: The present, timezone-aware; by default, this machine's clock says.

    Raises:
        WebhookSignatureError: The signature is missing, malformed or wrong, or the delivery is too old.
        InvalidRequestError: The body isn't given as bytes, a secret isn't text, or `now` has no time zone.
    """
    body = require_bytes(body)
    if now is not None and now.tzinfo is None:
        raise InvalidRequestError("now must be timezone-aware", "now")
    expected = [hmac.new(key, body, hashlib.sha256).hexdigest() for key in _keys(secret)]
    given = [value for name, value in headers.items() if name.lower() == header.lower()]
    if not given:
        raise WebhookSignatureError(f"the delivery has no {header} header")
    signatures = [found[1].lower() for value in given if (found := _SIGNATURE.fullmatch(value.strip()))]
    if not signatures:
        raise WebhookSignatureError(f"the {header} header holds no signature: it must look like sha256=<64 hex digits>")
    matches = [hmac.compare_digest(one, other) for one in signatures for other in expected]
    if not any(matches):
        raise WebhookSignatureError("the signature is wrong: another secret, or not the bytes that were signed")
    sent = None if max_age is None else _sent_at(body)
    if max_age is not None and sent is not None and ((now or datetime.now(UTC)) - sent).total_seconds() > max_age:
        raise WebhookSignatureError(
            f"the delivery was sent more than {max_age:g} s ago: it is a replayed one, or this machine's clock is wrong"
        )


_SIGNATURE = re.compile(r"(?:sha256=)?([0-9a-f]{64})", re.ASCII | re.IGNORECASE)


def _keys(secret: str | Iterable[str]) -> list[bytes]:
    secrets = [secret] if isinstance(secret, str) or not isinstance(secret, Iterable) else list(secret)
    if not all(isinstance(one, str) for one in secrets):
        raise InvalidRequestError("secret must be text, or several texts", "secret")
    return [one.encode(errors="surrogatepass") for one in secrets if one]


def _sent_at(body: bytes) -> datetime | None:
    """Read when a delivery was sent. [B] It stands in the body, where the signature covers it."""
    try:
        return moment(parse_json_object(body).get("timestamp")) if b'"timestamp"' in body else None
    except ProtocolError:
        return None
