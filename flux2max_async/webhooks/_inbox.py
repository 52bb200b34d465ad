"""The inbox: the public side of webhooks, for each kind of server."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flux2max_async._config import validate_seconds
from flux2max_async._exceptions import (
    ConfigurationError,
    InvalidRequestError,
    JournalError,
    ProtocolError,
    SessionClosedError,
    WebhookSignatureError,
)
from flux2max_async._models.request import GenerationRequest
from flux2max_async.webhooks._adapters import AsgiApp, Endpoint, aiohttp_response
from flux2max_async.webhooks._bodies import BodyReader
from flux2max_async.webhooks._dispatcher import WebhookDispatcher
from flux2max_async.webhooks._headers import HeadersLike
from flux2max_async.webhooks._monitor import DeliveryMonitor, WebhookStats
from flux2max_async.webhooks._payload import check_size, require_bytes
from flux2max_async.webhooks._signature import (
    MAX_AGE,
    SIGNATURE_HEADER,
    check_age,
    check_signature,
    keys_of,
    read_digests,
)
from flux2max_async.webhooks._tokens import add_token, new_token, token_of

if TYPE_CHECKING:
    from aiohttp import web


class WebhookInbox:
    """Receives the service's webhooks for a session, so that ends are known without polling.

        inbox = WebhookInbox(secret=os.environ["WEBHOOK_SECRET"], public_url="https://app.example/hooks/flux")
        app.router.add_post("/hooks/flux", inbox.aiohttp_handler)   # aiohttp.web
        app.mount("/hooks", inbox.asgi)                             # FastAPI, Starlette: above the path, not at it
        async with FluxSession(webhooks=inbox) as session: ...

    Each submit whose request names no webhook of its own names this inbox. A delivery with a valid signature ends its
    task at once; polls cover what is lost or late, and become the rarer the more webhooks arrive first.

    Each submit has a delivery URL of its own: `public_url` with a token in its query. If the answer to a submit is
    lost, the delivery of its task still reveals the id and the end, so that the image is not lost and nothing is paid
    for twice.

    With several server processes behind one address, a delivery can reach one that doesn't follow the task. If they
    share a journal, that process records the end there, and the task's own process notices within a second. Without a
    journal, the task is polled as if its webhook was lost.

    The endpoints read at most 64 bodies at once, each of at most 1 MB and within 10 s. Without a signature in its
    headers, no body is read. What is refused is counted in `stats`, and each kind is logged at most once a second.

    Args:
        secret: The key of the deliveries' signatures: at least 32 random characters are recommended. Several while an
            old one is being replaced: all are valid, and new submits name the first.
        public_url: Where the service reaches this inbox; http(s). With the token it has at most 2083 characters.
        header: The name of the header that holds the signature.
        max_age: Seconds after which a delivery that says when it was sent is refused as replayed, and by which that
            time may be in the future; None for no limit.

    Raises:
        ConfigurationError: The secret is empty, or the address is not one that a request could name.
    """

    def __init__(
        self,
        *,
        secret: str | Iterable[str],
        public_url: str,
        header: str = SIGNATURE_HEADER,
        max_age: float | None = MAX_AGE,
    ) -> None:
        secrets = _checked_secrets(secret)
        self._keys = keys_of(secrets)
        self._header = header
        self._max_age = None if max_age is None else validate_seconds("max_age", max_age)
        self.public_url: str = _checked_url(public_url)
        self._monitor = DeliveryMonitor()
        self._endpoint = Endpoint(self.deliver, BodyReader(header), self._monitor)
        self.asgi: AsgiApp = AsgiApp(self._endpoint)
        """An ASGI application that answers on any path.

        Mount it above the path of `public_url`: at the very path of a mount, Starlette redirects to one with a slash.
        """
        self.dispatcher: WebhookDispatcher = WebhookDispatcher(public_url, secrets[0], secrets)
        """The session's side of the inbox."""

    def __repr__(self) -> str:
        return f"WebhookInbox(public_url={self.public_url!r})"

    @property
    def stats(self) -> WebhookStats:
        """The counts of the deliveries since the inbox was created: a copy of the moment."""
        return self._monitor.stats

    async def aiohttp_handler(self, request: "web.Request") -> "web.Response":
        """Answer the service, as a handler of aiohttp.web: `app.router.add_post(path, inbox.aiohttp_handler)`."""
        return await aiohttp_response(self._endpoint, request)

    async def deliver(self, body: bytes, headers: HeadersLike, *, url: str | None = None) -> None:
        """Process one delivery, for servers of other kinds; return when it need not be repeated.

        With a journal, the end is recorded before this returns. A repeated delivery, or one about a task that has
        ended, does no harm; one that no task waits for is kept for a while, because it may arrive before the answer to
        its submit. It may be awaited in another event loop than the session's.

        Args:
            body: The bytes as they came.
            headers: The delivery's headers, as text or bytes: a mapping (of any framework, or with lists of values),
                WSGI's environ, or pairs of names and values.
            url: The address that was delivered to, or its path and query. Its token reveals which submit the delivery
                belongs to if that submit's answer was lost.

        Raises:
            InvalidRequestError: The body is not bytes, or the headers or the URL have none of these forms.
            WebhookSignatureError: It isn't the service's; answer 401. If there is no signature, the body is not read.
            ProtocolError: It can't be read, or is larger than 1 MB; answer 400.
            SessionClosedError: No session is open; answer 503, and the service will try again.
            JournalError: The end can't be recorded; answer 503, too.
        """
        if url is not None and not isinstance(url, str):
            raise InvalidRequestError(f"url must be text, not {type(url).__name__}", field="url")
        body, record = require_bytes(body), self._monitor.recording
        with record("forged", WebhookSignatureError):
            digests = read_digests(headers, self._header)
        with record("unreadable", ProtocolError):
            check_size(body)
        with record("forged", WebhookSignatureError):
            check_signature(body, digests, self._keys)
        with record("stale", WebhookSignatureError):
            check_age(body, self._max_age)
        with record("unreadable", ProtocolError), record("not_processed", SessionClosedError, JournalError):
            receipt = await self.dispatcher.dispatch(body, token_of(url))
        self._monitor.accept(body, receipt.task_id, known=receipt.known)


def _checked_url(public_url: str) -> str:
    """Return the URL if a request can name it, also with a token."""
    if public_url is None:
        raise ConfigurationError("public_url must be the address at which the service reaches this inbox")
    name = "public_url"
    try:
        GenerationRequest("-", webhook_url=public_url)
        name = "public_url, with the token of a submit,"
        GenerationRequest("-", webhook_url=add_token(public_url, new_token()))
    except InvalidRequestError as error:
        raise ConfigurationError(error.message.replace("webhook_url", name)) from error
    return public_url


def _checked_secrets(secret: str | Iterable[str]) -> tuple[str, ...]:
    secrets = (secret,) if isinstance(secret, str) else tuple(secret) if isinstance(secret, Iterable) else ()
    if not secrets or not all(isinstance(item, str) and item for item in secrets):
        raise ConfigurationError("secret must be text that is not empty, or several such texts")
    return secrets
