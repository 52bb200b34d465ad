"""What the tests of journals share: the database that they run against."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.journals import use_server

ABOUT_FILES = (
    "test_damaged_rows.py", "test_durability.py", "test_leases.py", "test_prune_file.py", "test_read_ahead.py",
    "test_serialization.py", "test_sqlite.py", "test_transitions.py", "test_wake_up.py",
)  # fmt: skip
"""Tests of SQLite files, and of what needs no database at all."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what another database has nothing to do with."""
    is_left_out = config.getoption("--backend") == "postgres" and collection_path.name in ABOUT_FILES
    return is_left_out or None


@pytest.fixture(scope="package", autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the tests against the server that was asked for."""
    if request.config.getoption("--backend") == "postgres":
        use_server(request.getfixturevalue("postgres"))
        with pytest.MonkeyPatch.context() as patch:
            # Owners that have no lock are dead at once, and not only when the server has been up for some seconds.
            patch.setattr("flux2max_async.journal._postgres_connection._GRACE", 0.0)
            yield
    else:
        yield
