"""The journal: a record of every request, its cost and its result, so that a batch survives the end of its process.

    async with FluxSession(journal=SqliteJournal("run.db")) as session:
        async for outcome in session.stream(prompts, save_to="images"):
            ...

Run twice, this pays once.
"""

from flux2max_async.journal._entry import EntryState, Holder, JournalEntry, SavedFile
from flux2max_async.journal._postgres import PostgresJournal
from flux2max_async.journal._protocol import Journal
from flux2max_async.journal._sqlite import SqliteJournal

__all__ = ["EntryState", "Holder", "Journal", "JournalEntry", "PostgresJournal", "SavedFile", "SqliteJournal"]
