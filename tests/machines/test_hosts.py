"""Three hosts share a journal and a limit in PostgreSQL while they are killed and the database fails."""

from pathlib import Path

from support.hosts import LIMIT, Settings, run
from support.postgres import PostgresServer

SETTINGS = Settings(requests=200, kills=8, kill_every=2.0, task_seconds=1.5, crashes=2, held=4.0)
"""The full form is `python benchmarks/hosts.py`."""


def test_killed_hosts(postgres: PostgresServer, schema: str, tmp_path: Path) -> None:
    """Every request has one outcome at every host, nothing is paid twice or lost, and the limit holds."""
    result = run(SETTINGS, postgres, schema, tmp_path)
    print(result.figures())

    assert set(result.accepted.values()) == {1}
    assert result.lost == 0
    assert result.failures == []
    assert result.most_in_flight(known=True) <= LIMIT
    drawn = {task_id for task_id, _, _, _ in result.tasks}
    assert {entry.task_id for entry in result.entries if entry.task_id} <= drawn
    completed = sum(entry.state == "completed" for entry in result.entries)
    uncertain = SETTINGS.requests - completed
    assert {str(entry.state) for entry in result.entries} <= {"completed", "uncertain"}
    assert uncertain <= SETTINGS.kills * LIMIT
    for number, ends, _ in result.reports:
        assert number == len(ends) == SETTINGS.requests
        assert sum(end == "completed" for end in ends.values()) == completed
    assert result.whole_images() == completed
