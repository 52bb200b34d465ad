"""Webhooks: deliveries verified and read, with a session or without one.

    verify(body, request.headers, secret)   # or WebhookSignatureError
    snapshot = parse(body)

`WebhookInbox` does both for a session, and ends its tasks.
"""

from flux2max_async._delivery import MAX_BODY, parse, verify
from flux2max_async._errors import WebhookSignatureError
from flux2max_async._inbox import WebhookInbox

__all__ = ["MAX_BODY", "WebhookInbox", "WebhookSignatureError", "parse", "verify"]
