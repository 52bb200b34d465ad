"""Webhooks: verify and parse deliveries, with or without a session.

    verify(body, request.headers, secret)   # or WebhookSignatureError
    snapshot = parse(body)

`WebhookInbox` does both for a session and ends its tasks.
"""

from flux2max_async._exceptions import WebhookSignatureError
from flux2max_async.webhooks._headers import HeadersLike
from flux2max_async.webhooks._inbox import WebhookInbox
from flux2max_async.webhooks._monitor import WebhookStats
from flux2max_async.webhooks._payload import MAX_BODY, parse
from flux2max_async.webhooks._signature import verify

__all__ = ["MAX_BODY", "HeadersLike", "WebhookInbox", "WebhookSignatureError", "WebhookStats", "parse", "verify"]
