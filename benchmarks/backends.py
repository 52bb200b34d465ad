"""A web service under load: `python benchmarks/backends.py` measures it with and without this library.

Each server runs in its own processes, its visitors in another one, and the service that generates the pictures (the
emulator of this library, where the account may have 24 tasks in flight) in this one. All traffic stays on 127.0.0.1.

Three parts: visitors who wait for their pictures, and of whom some leave; requests that are taken in for later; and
SIGTERM while visitors wait.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
from _results import RESULTS, about, blocks, table, write
from backend_measurements import (
    LOAD_HEADER,
    QUEUE_HEADER,
    STOP_HEADER,
    Size,
    Variant,
    load_notes,
    measure_load,
    measure_queue,
    measure_stop,
    queue_notes,
    stop_notes,
    variants,
)
from backend_servers import AIOHTTP, BACKENDS, Backend, StartError

FULL = Size(
    visitors=1_000, seconds=1.0, loops=("asyncio", "uvloop"), backends=BACKENDS, orders=120, max_waiting=48,
    stopped_visitors=60, stopped_seconds=2.4, grace=5, warm_up=48, idle=2.5,
)  # fmt: skip
SHORT = Size(
    visitors=40, seconds=0.3, loops=("asyncio",), backends=(AIOHTTP,), orders=40, max_waiting=8, stopped_visitors=30,
    stopped_seconds=0.5, grace=2, warm_up=0, idle=0.7, all_variants=False,
)  # fmt: skip


@attrs.frozen
class Part:
    title: str
    notes: Callable[[Size], str]
    header: list[str]
    measure: Callable[[Backend, str, Variant, Size], list[str]]
    one_loop: bool = False


PARTS = {
    "load": Part("Visitors who leave", load_notes, LOAD_HEADER, measure_load),
    "queue": Part("A queue with an end", queue_notes, QUEUE_HEADER, measure_queue, one_loop=True),
    "stop": Part("SIGTERM", stop_notes, STOP_HEADER, measure_stop),
}


def measure(part: Part, size: Size, problems: list[str]) -> Iterator[list[str]]:
    """Yield the rows of a part; append to `problems` what can't be started although it is installed."""
    width = len(part.header)
    for backend in size.backends:
        for loop in size.loops[: 1 if part.one_loop else None]:
            for variant in variants(backend, size):
                name = [backend.name, loop, variant.name]
                try:
                    row = part.measure(backend, loop, variant, size)
                except StartError as error:
                    row = [str(error)]
                    if "not installed" not in row[0]:
                        problems.append(": ".join([", ".join(name), row[0]]))
                yield name + row + [""] * (width - len(row))


def _allow_many_connections() -> None:
    """Raise the limit on open files, which servers and visitors inherit."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 0 else min(hard, 65_536), hard))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only servers whose names contain one of these")
    parser.add_argument("--short", action="store_true", help="check that each part runs; the figures are meaningless")
    parser.add_argument("--visitors", type=int, help=f"visitors who wait for pictures (default: {FULL.visitors:,})")
    parser.add_argument("--loops", help=f"comma-separated event loops (default: {','.join(FULL.loops)})")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: %(default)s)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    arguments = _parse_arguments()
    if sys.platform == "win32":
        sys.exit("not measured on Windows, which has no SIGTERM")
    # Ended like by Ctrl-C, so that all servers and visitors are ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _allow_many_connections()
    size = SHORT if arguments.short else FULL
    if arguments.visitors:
        size = attrs.evolve(size, visitors=arguments.visitors)
    if arguments.loops:
        size = attrs.evolve(size, loops=tuple(arguments.loops.split(",")))
    if arguments.words:
        chosen = (b for b in size.backends if any(word in b.name for word in arguments.words))
        size = attrs.evolve(size, backends=tuple(chosen))
    command = shlex.join(["python", "benchmarks/backends.py", *sys.argv[1:]])
    print(about(command), flush=True)
    texts, problems = [], list[str]()
    for name in arguments.only.split(","):
        part = PARTS[name]
        header = ["server", "loop", "service", *part.header]
        print("", f"### {part.title}", "", part.notes(size), "", *table(header, []).splitlines(), sep="\n", flush=True)
        rows = []
        for row in measure(part, size, problems):
            rows.append(row)
            print("| " + " | ".join(row) + " |", flush=True)
        texts.append(blocks(f"### {part.title}", part.notes(size), table(header, rows)))
    if arguments.write:
        write("In a web service", blocks(*texts), command, arguments.write)
    if problems:
        sys.exit("\n".join(["", *problems]))


if __name__ == "__main__":
    main()
