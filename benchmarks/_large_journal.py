"""The client that reads a large journal: an export, and streams of requests that have all ended."""

import resource
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs

from flux2max_async import FluxSession, GenerationRequest, JournalEntry
from flux2max_async._models.fingerprint import fingerprint_request
from flux2max_async.journal import EntryState, SavedFile, SqliteJournal
from flux2max_async.journal._store import SqliteStore


async def large(path: str, entries: int, saved_images: int, url: str) -> dict[str, Any]:
    """Export a journal of completed entries, and stream their requests again; also of some whose images are saved.

    Returns:
        `memory`: by how many bytes the export has raised the process's largest resident memory; `export`: its seconds;
        `replay` and `saved`: `wall` and `cpu` seconds per request.
    """
    folder = Path(f"{path}.images")
    _create_journal(path, entries, None)
    _create_journal(f"{path}.saved", saved_images, folder)
    started, before = time.perf_counter(), _peak_memory()
    await SqliteJournal(path).export(f"{path}.jsonl")
    export, memory = time.perf_counter() - started, _peak_memory() - before
    replayed = await _replay_known(path, entries, url, None)
    saved = await _replay_known(f"{path}.saved", saved_images, url, folder)
    return {"memory": memory, "export": export, "replay": replayed, "saved": saved}


async def _replay_known(path: str, count: int, url: str, folder: Path | None) -> dict[str, float]:
    async with FluxSession("key", base_url=url, journal=SqliteJournal(path)) as session:
        started, cpu_started = time.perf_counter(), time.process_time()
        async for outcome in session.stream(_known_requests(count), save_to=folder):
            assert outcome.unwrap().replayed
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {"wall": wall / count, "cpu": cpu / count}


def _known_requests(count: int) -> Iterable[GenerationRequest]:
    return (GenerationRequest(f"a cat, no. {number}", width=1024, key=f"cat-{number}") for number in range(count))


def _create_journal(path: str, count: int, folder: Path | None) -> None:
    """Create a journal of completed requests, and their images if there is a folder."""
    if folder is not None:
        folder.mkdir()
    store, now = SqliteStore(Path(path), 12.0, 10.0), datetime.now(UTC)
    image = b"\xff\xd8\xff" + bytes(1000) + b"\xff\xd9"
    result = {
        "elapsed": 12.3,
        "polls": 5,
        "images": [{"url": f"https://example.com/{'0' * 32}.jpeg", "type": "image", "extra": {}}],
        "metadata": {"seed": 1},
        "usage": {"cost": "0.07", "discount": None, "extra": {}},
    }
    with store.transaction(durable=False):
        for number, request in enumerate(_known_requests(count)):
            files: tuple[SavedFile, ...] = ()
            if folder is not None:
                target = folder.absolute() / f"{request.key}.jpeg"
                target.write_bytes(image)
                files = (SavedFile(target, len(image)),)
            content = fingerprint_request(request)
            entry = JournalEntry(
                key=str(request.key), fingerprint=content.fingerprint, request=content.description, created_at=now
            )
            store.begin(entry, None)
            store.record(attrs.evolve(
                entry, state=EntryState.COMPLETED, task_id=f"task-{number}", submitted_at=now, ended_at=now,
                cost=Decimal("0.07"), result=result, files=files,
            ))  # fmt: skip
    store.close()


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
