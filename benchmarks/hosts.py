"""Hosts without shared files that are killed while their database fails: `python benchmarks/hosts.py [--short]`.

Three processes share a batch, a journal and a limit in PostgreSQL. It prints what became of the requests. It needs the
extras `emulator` and `postgres`, and the dependency group `machines`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.hosts import Settings, run
from support.postgres import PostgresServer

FULL = Settings(requests=1000, kills=40, kill_every=2.0, task_seconds=2.0, crashes=2, held=10.0)
SHORT = Settings(requests=100, kills=4, kill_every=1.0, task_seconds=1.0, crashes=1, held=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a hundred requests and four kills")
    settings = SHORT if parser.parse_args().short else FULL
    print(settings)
    with tempfile.TemporaryDirectory() as folder, PostgresServer() as server:
        figures = run(settings, server, "flux2max", Path(folder)).figures()
    for name, value in figures.items():
        print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
