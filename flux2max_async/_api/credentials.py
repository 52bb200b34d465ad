"""The API key: a text, or a function that is asked for it, because it changes while the session is open."""

import asyncio
import contextlib
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence

from flux2max_async._config import KEY_FORMAT, ApiKey, NoKeyError, is_well_formed_key
from flux2max_async._timeouts import GRACE_PERIOD, Timeout

_MAX_AGE = 1.0
"""Seconds for which a key is used without asking again."""
_REMEMBERED_KEYS = 20
"""So many keys are redacted: calls are under way with older ones, and the service may echo them late."""


def create_credentials(api_key: ApiKey, secrets: Sequence[str] = (), *, timeout: float) -> "FixedKey | RotatingKey":
    """Return the credentials of a session.

    Args:
        api_key: A valid key, or the function that returns it.
        secrets: Other texts that no error may show.
        timeout: Seconds that the function may take.
    """
    return FixedKey(api_key, secrets) if isinstance(api_key, str) else RotatingKey(api_key, secrets, timeout)


class FixedKey:
    """A key that doesn't change."""

    is_fixed = True

    def __init__(self, api_key: str, secrets: Sequence[str]) -> None:
        self.secrets: Sequence[str] = (api_key, *secrets)
        """The texts that no error and no log line may show; of a key that changes, the newest ones."""
        self.header = f"Bearer {api_key}"
        """The header that authenticates a call; call `refresh()` before, unless the key is fixed."""
        self.version = 0
        """How often the key has changed."""

    async def refresh(self) -> None:
        """Ask for the key, if that is a while ago."""

    async def has_changed(self, version: int) -> bool:
        """Ask for the key again, because the service has rejected one; return whether there is another one."""
        return self.version != version

    def close(self) -> None:
        """Forget what belongs to the event loop."""


class RotatingKey(FixedKey):
    """A key that a function returns, perhaps another one each time. Calls at the same time share one question."""

    is_fixed = False

    def __init__(self, function: Callable[[], str | Awaitable[str]], secrets: Sequence[str], timeout: float) -> None:
        super().__init__("", ())
        self._function = function
        self._timeout = timeout
        self._keys: list[str] = []
        self._others = tuple(secrets)
        self.secrets = self._list = list(secrets)  # others hold it, and it changes
        self._asked_at = -math.inf
        self._question: asyncio.Task[Exception | None] | None = None

    async def refresh(self) -> None:
        """Ask for the key, if that is a while ago.

        Raises:
            NoKeyError: The function has failed, or what it has returned is no key.
        """
        if asyncio.get_running_loop().time() - self._asked_at >= _MAX_AGE:
            await self._ask()

    async def has_changed(self, version: int) -> bool:
        """Ask for the key again, because the service has rejected one; return whether there is another one."""
        with contextlib.suppress(NoKeyError):
            if self.version == version:  # otherwise another call has asked
                await self._ask()
        return self.version != version

    def close(self) -> None:
        """Forget what belongs to the event loop."""
        self._asked_at = -math.inf
        if self._question is not None:
            self._question.cancel()
            self._question = None

    async def _ask(self) -> None:
        question = self._question
        if question is None:
            question = self._question = asyncio.create_task(self._call())
        await asyncio.wait([question])  # cancelling one who waits leaves the question to the others
        failure = RuntimeError("api_key() was cancelled") if question.cancelled() else question.result()
        if failure is None:
            return
        is_ours = failure.__traceback__ is None
        try:
            raise NoKeyError(str(failure) if is_ours else f"api_key() has raised {type(failure).__name__}") from failure
        finally:
            # Its text may hold a secret, and the error's traceback refers to this frame.
            del question, failure

    async def _call(self) -> Exception | None:
        """Call the function and store the key; return the reason if there is none."""
        try:
            return await self._read_key()
        finally:
            self._question = None

    async def _read_key(self) -> Exception | None:
        asked_at = asyncio.get_running_loop().time()
        limit = Timeout(self._timeout, grace=GRACE_PERIOD)
        try:
            with limit:
                key = self._function()
                if inspect.isawaitable(key):
                    key = await key
        except Exception as error:  # noqa: BLE001 - it is the caller's function
            return TimeoutError(f"api_key() has returned no key for {self._timeout:g} s") if limit.is_over else error
        if not is_well_formed_key(key):
            return ValueError(f"api_key() has returned what is no key: it {KEY_FORMAT}")
        self._asked_at = asked_at
        if self._keys[-1:] != [key]:
            self.version += 1
            self.header = f"Bearer {key}"
        self._keys = [*(known for known in self._keys if known != key), key][-_REMEMBERED_KEYS:]
        self._list[:] = (*self._keys, *self._others)
        return None
