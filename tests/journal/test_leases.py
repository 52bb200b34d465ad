"""Leases: which owners are presumed dead, with times as arguments."""

from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import JournalEntry
from flux2max_async.journal._leases import LeaseMonitor
from flux2max_async.journal._store_protocol import JournalStore, OtherOwner


@settings(deadline=None)
@given(
    stopped=st.floats(0.0, 0.99),
    at=st.floats(1.0, 3.0),
    phase=st.floats(0.0, 0.25),
    lease=st.floats(0.5, 100.0),
    others=st.floats(0.1, 2.0),
)
def test_a_process_that_is_stopped_for_less_than_its_lease(
    stopped: float, at: float, phase: float, lease: float, others: float
) -> None:
    """It keeps its entries, whenever it is stopped; one that is stopped for much longer loses its tasks to others.

    Times are in leases of the process: for how long and when it is stopped, and the lease of the other process.
    """
    kept, lost = (
        _owners_after_a_stop(stopped=seconds, at=at, phase=phase, lease=lease, others=others)
        for seconds in (stopped, 2.0 + others)
    )

    assert (kept, lost) == (True, False)


def _owners_after_a_stop(*, stopped: float, at: float, phase: float, lease: float, others: float) -> bool:
    """Return whether another owner has never presumed a process dead that was stopped once."""
    store = _FakeStore(lease)
    monitor = LeaseMonitor(others * lease)
    heartbeats = [number / 4 for number in range(int(4 * at) + 1)]
    heartbeats += [max(heartbeats[-1] + 0.25, at + stopped) + number / 4 for number in range(8)]
    looks = [phase + number * others / 4 for number in range(int(4 * heartbeats[-1] / others))]
    for time, is_heartbeat in sorted([*((time, True) for time in heartbeats), *((time, False) for time in looks)]):
        if is_heartbeat:
            store.heartbeats += 1
        else:
            monitor.check(cast("JournalStore", store), time * lease)
    return not store.is_dropped


class _FakeStore:
    """Stands in for the store of an owner that watches another one."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.heartbeats = 0
        self.is_dropped = False

    def other_owners(self) -> dict[str, OtherOwner]:
        return {} if self.is_dropped else {"them": OtherOwner(self.heartbeats, self.lease, is_gone=False)}

    def drop_owner(self, _: str) -> None:
        self.is_dropped = True

    def adopt_from(self, _: str) -> list[JournalEntry]:
        return []
