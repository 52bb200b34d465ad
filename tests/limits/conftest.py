"""Where the limits of these tests count: in a file, or with `--backend postgres` in a database."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.limits import Backend, Limit, PostgresBackend, SqliteBackend


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which the threads run."""
    return "asyncio"


@pytest.fixture
def new_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Backend]:
    """Provide a function that returns a place that nobody uses yet, by a name for it."""
    if request.config.getoption("backend") == "sqlite":
        return lambda name: SqliteBackend(tmp_path / f"{name}.db")
    server, schema = request.getfixturevalue("postgres"), request.getfixturevalue("schema")
    return lambda name: PostgresBackend(server.conninfo(), f"{schema}_{name}")


@pytest.fixture
def backend(new_backend: Callable[[str], Backend]) -> Backend:
    """Provide a place where nobody counts yet."""
    return new_backend("limit")


@pytest.fixture
async def open_limit(backend: Backend) -> AsyncIterator[Callable[..., Awaitable[Limit]]]:
    """Provide a function that opens a limit, which is closed at the end."""
    async with AsyncExitStack() as stack:

        async def open_one(slots: int = 1) -> Limit:
            opened = backend.limit(slots)
            await opened.open()
            stack.push_async_callback(opened.close)
            return opened

        yield open_one
