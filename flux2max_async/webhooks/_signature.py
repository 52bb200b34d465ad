"""The signature of a delivery: proves that it comes from the service and was sent recently."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from datetime import UTC, datetime

from flux2max_async._api.task_object import unwrap_task
from flux2max_async._api.values import parse_datetime
from flux2max_async._exceptions import InvalidRequestError, ProtocolError, WebhookSignatureError
from flux2max_async.webhooks._headers import HeadersLike, header_values
from flux2max_async.webhooks._payload import parse_json_object, require_bytes

SIGNATURE_HEADER = "X-BFL-Signature"  # [B]
MAX_AGE = 300.0
"""Seconds."""


def verify(
    body: bytes,
    headers: HeadersLike,
    secret: str | Iterable[str],
    *,
    header: str = SIGNATURE_HEADER,
    max_age: float | None = MAX_AGE,
    now: datetime | None = None,
) -> None:
    """Check that a delivery was signed with the secret, and not too long ago.

    Args:
        body: The bytes as they were received; JSON that was parsed and serialized again has a different signature.
        headers: The delivery's headers, as text or bytes: a mapping (of any framework, or with lists of values), WSGI's
            environ, or pairs of names and values; names are case-insensitive.
        secret: The value sent as `webhook_secret`; several while an old one is being replaced. An empty secret never
            verifies.
        header: The name of the header that holds the signature, `sha256=<hex>` or the hexadecimal digits alone. [B]
        max_age: Seconds after which a delivery whose body has a timestamp is refused as replayed, and by which its
            timestamp may be in the future; None for no limit.
        now: The current time, timezone-aware; this machine's clock by default.

    Raises:
        WebhookSignatureError: The signature is missing, malformed or wrong, or the delivery is too old, or its
            timestamp too far in the future.
        InvalidRequestError: The body is not bytes, the headers have none of these forms, a secret is not text, or `now`
            has no time zone.
    """
    body = require_bytes(body)
    if now is not None and now.tzinfo is None:
        raise InvalidRequestError("now must be timezone-aware", field="now")
    keys = keys_of(secret)
    check_signature(body, read_digests(headers, header), keys)
    check_age(body, max_age, now)


def read_digests(headers: HeadersLike, header: str) -> list[str]:
    """Return the digests in the header that holds the signature: several if it is repeated.

    Raises:
        WebhookSignatureError: There is none.
    """
    values = header_values(headers, header)
    if not values:
        raise WebhookSignatureError(f"the delivery has no {header} header")
    digests = [digest for value in values if (digest := _digest_in(value)) is not None]
    if not digests:
        raise WebhookSignatureError(
            f"the {header} header holds no signature, or several that differ: it must be sha256=<64 hex digits>"
        )
    return digests


def keys_of(secret: str | Iterable[str]) -> list[bytes]:
    """Return the keys for one or several secrets; none for an empty one."""
    secrets = [secret] if isinstance(secret, str) or not isinstance(secret, Iterable) else list(secret)
    if not all(isinstance(text, str) for text in secrets):
        raise InvalidRequestError("secret must be text, or several texts", field="secret")
    return [text.encode(errors="surrogatepass") for text in secrets if text]


def check_signature(body: bytes, digests: Iterable[str], keys: Iterable[bytes]) -> None:
    """Raise WebhookSignatureError unless one of the digests is that of the body with one of the keys."""
    valid_digests = [hmac.new(key, body, hashlib.sha256).hexdigest() for key in keys]
    # Compare all pairs, so that the time taken does not depend on which one matches.
    matches = [hmac.compare_digest(digest, valid) for digest in digests for valid in valid_digests]
    if not any(matches):
        raise WebhookSignatureError("the signature is wrong: the secret differs, or the body was changed")


def check_age(body: bytes, max_age: float | None, now: datetime | None = None) -> None:
    """Raise WebhookSignatureError if a body says that it was sent too long ago, or in the future."""
    if max_age is None or (sent := _sent_at(body)) is None:
        return
    age = ((now or datetime.now(UTC)) - sent).total_seconds()
    if age > max_age:
        raise WebhookSignatureError(
            f"the delivery was sent more than {max_age:g} s ago: it was replayed, or this machine's clock is wrong"
        )
    if age < -max_age:
        raise WebhookSignatureError(
            f"the delivery's timestamp is more than {max_age:g} s in the future: the sender's or this machine's clock "
            "is wrong"
        )


_SIGNATURE = re.compile(r"(?:sha256=)?([0-9a-f]{64})", re.ASCII | re.IGNORECASE)
_MAX_HEADER_LENGTH = 1_024
"""A longer value is not split; a signature that proxies have joined to a few copies of itself is shorter."""


def _digest_in(value: str) -> str | None:
    """Return the digest in a header's value; None if there is none, or if not all parts of a joined value agree."""
    if len(value) > _MAX_HEADER_LENGTH:
        return None
    matches = [_SIGNATURE.fullmatch(part.strip()) for part in value.split(",")]
    digests = {match and match[1].lower() for match in matches}
    return digests.pop() if len(digests) == 1 else None


def _sent_at(body: bytes) -> datetime | None:
    """Return the timestamp in the body [B], which the signature covers."""
    try:
        payload = parse_json_object(body) if b'"timestamp"' in body else {}
    except ProtocolError:
        return None
    times = (parse_datetime(part.get("timestamp")) for part in (payload, unwrap_task(payload)))
    return next(filter(None, times), None)
