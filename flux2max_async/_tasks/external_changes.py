"""What the journal reports of other processes."""

from collections.abc import Callable

import attrs

from flux2max_async._polling.context import PollingContext
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._tasks.single_flight import SingleFlight
from flux2max_async.journal._entry import EntryState, JournalEntry
from flux2max_async.journal._record_factory import RecordFactory
from flux2max_async.journal._serialization import snapshot_from_entry


@attrs.frozen
class ExternalChanges:
    """Processes tasks that a dead process left behind, and ends that others have recorded."""

    _polling: PollingContext
    _records: RecordFactory
    _single_flight: SingleFlight
    _start_runner: Callable[..., TaskRunner]

    def __call__(self, entries: list[JournalEntry]) -> None:
        """Process changed entries."""
        shutdown, registry = self._polling.shutdown, self._polling.registry
        if shutdown.closed:
            return
        for entry in entries:
            if entry.state is EntryState.SUBMITTED:
                if not shutdown.draining:
                    self._adopt(entry)
            elif (listener := registry.listener(entry.task_id or "")) is not None:
                listener.on_webhook(snapshot_from_entry(entry))
            elif (snapshot := snapshot_from_entry(entry)) is not None:
                registry.resolve(entry.webhook_token, snapshot)

    def _adopt(self, entry: JournalEntry) -> None:
        """Follow a task that a dead process left behind, so that its end is in the journal whoever asks for it."""
        if (runner := self._single_flight.by_task_id.get(entry.task_id or "")) is not None:
            runner.on_adopted(entry)
        elif entry.key not in self._single_flight.by_key:
            record = self._records.adopt(entry)
            self._single_flight.get_or_create(entry.key, lambda: self._start_runner(None, record, entry.task_id))
