"""The leases by which processes share a journal: who is alive, and who takes over from whom.

Each journal that has the file open is an owner: it has a row in `owners`, and a lease of so many seconds.

  alive          its row is there, and it increments the row's heartbeat counter every quarter of its lease
  presumed dead  its row is there, but another owner knows that the process is gone, or has seen the same counter for
                 longer than the lease and the quarter between two heartbeats, by that other owner's own monotonic
                 clock; so a process that is stopped for less than its lease is not
  dropped        its row was deleted: by close(), or by drop_owner() of an owner that presumes it dead

An owner that was dropped although it lives, since its process was stopped or its machine slept, notices that with its
next heartbeat, logs it, and inserts its row again. What others have adopted in the meantime stays theirs.

An entry is, by its column `owner`:

  free      NULL: no owner works on it
  held      the id of an owner that has a row: by begin() or record(), or adopted by adopt() or adopt_from()
  orphaned  the id of an owner that was dropped, or whose process is gone. An owner that notices this calls
            adopt_from(), which takes the tasks, and frees the intents as UNCERTAIN, since it isn't known whether they
            were sent. Completed entries whose images are not all saved stay orphaned until a session calls adopt().

What must hold: adopt() and adopt_from() change the owner in one statement that names the previous one, so two owners
never adopt the same entry. Only the holder takes back what is recorded; others can only add to it. Leases never depend
on the time of day. Other owners are dropped, and adopted from, in the transaction of one's own heartbeat.
"""

import attrs

from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._store_protocol import JournalStore

HEARTBEAT_INTERVAL = 0.25
"""As a fraction of the lease."""


@attrs.frozen
class _Sighting:
    """The newest heartbeat of another owner."""

    heartbeat: int
    time: float
    """When it was first seen, by this process's monotonic clock."""


class LeaseMonitor:
    """Watches the heartbeats of the other owners, drops those that are presumed dead, and adopts their tasks.

    Args:
        lease: This owner's lease in seconds.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._sightings: dict[str, _Sighting] = {}
        self._checked_at = 0.0

    def check(self, store: JournalStore, now: float) -> list[JournalEntry]:
        """Return the tasks that were adopted from owners that are gone; call it in the transaction of a heartbeat.

        Args:
            store: The journal.
            now: The time on this process's monotonic clock.
        """
        return self._adopt_from_others_than(store, self._drop_dead_owners(store, now))

    def _drop_dead_owners(self, store: JournalStore, now: float) -> set[str]:
        """Drop the owners that are presumed dead; return the ids of the others."""
        # If this thread was held up, the others may have been held up by the same lock: their leases start anew.
        late = now - self._checked_at > self._lease / 2
        self._checked_at = now
        living: set[str] = set()
        for owner_id, owner in store.other_owners().items():
            sighting = self._sightings.get(owner_id)
            if sighting is None or sighting.heartbeat != owner.heartbeat or late:
                sighting = self._sightings[owner_id] = _Sighting(owner.heartbeat, now)
            if owner.is_gone or now - sighting.time > owner.lease * (1 + HEARTBEAT_INTERVAL):
                store.drop_owner(owner_id)
            else:
                living.add(owner_id)
        return living

    def _adopt_from_others_than(self, store: JournalStore, living: set[str]) -> list[JournalEntry]:
        adopted: list[JournalEntry] = []
        for owner_id in self._sightings.keys() - living:
            del self._sightings[owner_id]
            adopted += store.adopt_from(owner_id)
        return adopted
