"""The command with `--journal postgresql://`: several hosts share one list, one limit and one budget."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.commands import ENVIRONMENT, Command, finish
from support.postgres import PASSWORD, PostgresServer
from support.workers import Account, running_account

from flux2max_async.emulator import Emulator

LIMIT = 3
PICTURES = 15
HOSTS = ("one", "two", "three")
SMALL = ("--width", "64", "--height", "64")


@pytest.fixture
def conninfo(postgres: PostgresServer, schema: str) -> str:
    """Provide the address of a database that is empty."""
    with psycopg.connect(postgres.conninfo(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {schema}".encode())
    return postgres.conninfo().removesuffix("/flux") + f"/{schema}"


@pytest.fixture
def account() -> Iterator[Account]:
    with running_account(seconds=0.4, seed=1, max_in_flight=LIMIT) as account:
        yield account


def write(count: int, name: str = "list.txt") -> str:
    Path(name).write_text("".join(f"picture {number}\n" for number in range(count)))
    return name


def results(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()]


class Host:
    """The command in a process of its own, with a folder of its own, and with the password in the environment."""

    def __init__(self, account: Account, conninfo: str, name: str, *options: str) -> None:
        self.folder = f"host-{name}"
        environment = {**os.environ, **ENVIRONMENT, "PGPASSWORD": PASSWORD, "FLUX2MAX_BASE_URL": account.url}
        address = conninfo.replace(f":{PASSWORD}", "")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flux2max_async.cli", "batch", "list.txt", *SMALL, "--journal", address,
             "--out", self.folder, "--max-in-flight", str(LIMIT), *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "FLUX2MAX_API_KEY": account.key},
        )  # fmt: skip


@pytest.mark.usefixtures("empty_folder")
def test_three_hosts(account: Account, conninfo: str) -> None:
    """Each ends with all pictures and results, though one is killed and started again; nothing is paid for twice."""
    write(PICTURES)
    with ExitStack() as stack:

        def start(name: str) -> Host:
            host = Host(account, conninfo, name)
            stack.callback(host.process.kill)
            return host

        hosts = [start(name) for name in HOSTS]
        account.wait_until(lambda report: len(report.tasks) >= PICTURES // 3)
        hosts[0].process.kill()
        finish(hosts[0].process)
        hosts[0] = start("one")
        runs = [finish(host.process) for host in hosts]
        report = account.report()

    rows = {host.folder: results(host.folder) for host in hosts}
    # What was on its way when the host was killed is uncertain, and then for all.
    uncertain = {row["key"] for row in rows["host-two"] if row["state"] == "uncertain"}
    assert len(uncertain) <= LIMIT
    assert max(report.accepted.values()) == 1
    assert len(report.accepted) >= PICTURES - len(uncertain)
    # Submits whose answers died with their host don't count.
    assert report.submits == len(report.tasks) or uncertain, "some were refused: more than the limit were in flight"
    for folder, own in rows.items():
        assert len(own) == PICTURES
        for row in own:
            assert (row["state"] == "uncertain") == (row["key"] in uncertain), (folder, row)
            assert len(row["files"]) == (row["key"] not in uncertain), (folder, row)
            assert all(Path(folder, name).is_file() for name in row["files"])
    assert [run.code for run in runs] == [1 if uncertain else 0] * 3, runs
    assert all(PASSWORD not in run.out + run.err for run in runs)


@pytest.mark.usefixtures("empty_folder")
def test_one_budget(account: Account, conninfo: str) -> None:
    """All hosts together spend no more than the budget of one."""
    write(PICTURES)
    with ExitStack() as stack:
        hosts = [Host(account, conninfo, name, "--budget", "0.40", "--price-guess", "0.07") for name in HOSTS]
        for host in hosts:
            stack.callback(host.process.kill)
        runs = [finish(host.process) for host in hosts]

    costs = {row["key"]: float(row["cost"]) for host in hosts for row in results(host.folder) if row["cost"]}
    assert [run.code for run in runs] == [1, 1, 1]
    assert 0.0 < sum(costs.values()) <= 0.40
    assert len(account.report().tasks) == len(costs)


@pytest.mark.usefixtures("empty_folder")
def test_a_single_command(
    flux2max: Command, service: Callable[..., Emulator], conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run creates nothing; a run can be shown, repeated and pruned; no message has the password."""
    monkeypatch.setenv("FLUX2MAX_JOURNAL", conninfo)
    gateway = service()
    write(3)
    Path("list.txt").write_text("a cat\na dog\na fox [fail]\n")
    arguments = ("batch", "list.txt", *SMALL, "--yes")
    dry = flux2max(*arguments, "--dry-run")
    nothing = flux2max("journal", "show", conninfo)
    runs = [flux2max(*arguments), flux2max(*arguments, "--journal", conninfo)]
    shown = flux2max("journal", "show", conninfo, "--json")
    pruned = flux2max("journal", "prune", conninfo, "--older-than", "0s")
    empty = flux2max("journal", "show", conninfo)

    assert [dry.code, *(run.code for run in runs), shown.code, pruned.code, empty.code] == [0, 1, 1, 0, 0, 0]
    assert nothing.code == 1
    assert "there is no journal in the schema flux2max of postgresql://flux@127.0.0.1" in nothing.err
    assert sorted(gateway.accepted.values()) == [1, 1, 1]
    assert [json.loads(line)["state"] for line in shown.out.splitlines()].count("completed") == 2
    assert "3 entries forgotten: postgresql://flux@127.0.0.1" in pruned.err
    assert "--retry-failed" in runs[1].err
    assert "--journal postgresql://flux@127.0.0.1" in runs[1].err, "the command to go on"
    everything = (dry, nothing, *runs, shown, pruned, empty)
    assert all(PASSWORD not in run.out + run.err for run in everything)


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("address", "message", "code"),
    [
        ("postgresql://me:sec/ret@db.example/flux", "--journal: the address of a database must be like", 2),
        ("mysql://me:secret@db.example/flux", "--journal: the address of a database must be like", 2),
        ("postgresql://me:secret@127.0.0.1:1/flux", "the journal postgresql://me@127.0.0.1:1/flux can't be used", 1),
    ],
)
def test_wrong_addresses(
    flux2max: Command, service: Callable[..., Emulator], address: str, message: str, code: int
) -> None:
    """A wrong address names the option, and a database that isn't there its address, without the password."""
    gateway = service()
    write(1)
    run = flux2max("batch", "list.txt", *SMALL, "--yes", "--journal", address)

    assert run.code == code
    assert message in run.err.replace("\n", " ")
    assert "sec" not in run.err
    assert not gateway.accepted
