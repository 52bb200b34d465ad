"""Storage: local folders, storages of one's own in streams, and what is refused before anything is sent."""

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from support.scripted import ScriptedGateway
from support.virtual_time import VirtualJournal

from flux2max_async import (
    Completed,
    ConfigurationError,
    DownloadError,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    StorageError,
)
from flux2max_async._api.retry import is_disk_failure
from flux2max_async.emulator import Emulator
from flux2max_async.journal import SavedFile
from flux2max_async.storage import LocalStorage, ObjectStorage, Storage, StoredImage
from flux2max_async.storage._objects import _Upload


async def chunks(*parts: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if error is not None:
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def create(storage: Storage, name: str, *parts: bytes) -> StoredImage:
    return await storage.create(name, chunks(*parts), content_type="image/jpeg", mark="t1/0")


# ---------------------------------------------------------------------- LocalStorage


async def test_local_storage(tmp_path: Path) -> None:
    """A picture is a file, whose name and size `stat()` tells; files have no marks."""
    storage = LocalStorage(tmp_path / "new" / "folder")
    await storage.open()
    stored = await create(storage, "fox.jpeg", b"abc", b"def")

    assert stored == StoredImage(location=str(tmp_path / "new" / "folder" / "fox.jpeg"), size=6)
    assert await storage.stat("fox.jpeg") == stored
    assert await storage.stat("cat.jpeg") is None
    assert names(storage.folder) == ["fox.jpeg"]
    assert Path(stored.location).read_bytes() == b"abcdef"
    await storage.close()


async def test_local_name_that_is_taken(tmp_path: Path) -> None:
    """A name that is taken, even by a link that leads nowhere, is a FileExistsError, and nothing else changes."""
    (tmp_path / "fox.jpeg").symlink_to("nowhere")
    (tmp_path / "cat.jpeg").write_bytes(b"abc")
    for name in ("fox.jpeg", "cat.jpeg"):
        with pytest.raises(FileExistsError, match=name):
            await create(LocalStorage(tmp_path), name, b"abc")

    assert names(tmp_path) == ["cat.jpeg", "fox.jpeg"]
    assert not (tmp_path / "nowhere").exists()


async def test_twenty_racers_for_one_local_name(tmp_path: Path) -> None:
    """Of 20 that create one name at once, one wins."""
    results = await asyncio.gather(
        *(create(LocalStorage(tmp_path), "fox.jpeg", b"%d" % n) for n in range(20)), return_exceptions=True
    )

    (winner,) = (n for n, result in enumerate(results) if isinstance(result, StoredImage))
    assert (tmp_path / "fox.jpeg").read_bytes() == b"%d" % winner
    assert names(tmp_path) == ["fox.jpeg"]


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), StorageError("boom"), ValueError("boom"), TimeoutError("boom")]
)
async def test_local_data_that_fails(tmp_path: Path, error: Exception) -> None:
    """If the data raises, nothing is left."""
    with pytest.raises(type(error), match=r"^boom$"):
        await LocalStorage(tmp_path).create("a.jpeg", chunks(b"abc", error=error), content_type="", mark="")

    assert names(tmp_path) == []


async def test_local_call_that_is_cancelled(tmp_path: Path) -> None:
    """If the call is cancelled, nothing is left."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"abc"
            await anyio.sleep(1)

    with anyio.move_on_after(5):
        await LocalStorage(tmp_path).create("a.jpeg", endless(), content_type="", mark="")

    assert names(tmp_path) == []


@pytest.mark.usefixtures("small_disk")
async def test_local_disk_that_is_full(tmp_path: Path) -> None:
    """A full disk is a StorageError that stops a stream, and nothing is left; a name that is too long stops none."""
    with pytest.raises(StorageError, match="too large") as full:
        await create(LocalStorage(tmp_path), "a.jpeg", bytes(3_000_000))
    with pytest.raises(StorageError) as too_long:
        await create(LocalStorage(tmp_path), "x" * 300, b"abc")
    with pytest.raises(StorageError, match="null") as invalid:
        await create(LocalStorage(tmp_path), "a\0b", b"abc")

    assert isinstance(full.value.__cause__, OSError)
    assert full.value.__cause__.errno == errno.EFBIG
    assert (is_disk_failure(full.value), is_disk_failure(too_long.value)) == (True, False)
    assert not is_disk_failure(invalid.value)
    assert (is_disk_failure(StorageError("full")), is_disk_failure(DownloadError("lost"))) == (True, False)
    assert names(tmp_path) == []


async def test_local_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hard links, files are moved to their names, which they take from nobody."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(tmp_path)
    await create(storage, "a.jpeg", b"abc")
    with pytest.raises(FileExistsError):
        await create(storage, "a.jpeg", b"def")

    assert (tmp_path / "a.jpeg").read_bytes() == b"abc"
    assert names(tmp_path) == ["a.jpeg"]


# ---------------------------------------------------------------------- streams


@attrs.define(eq=False)
class MemoryStorage(Storage):
    """A storage in memory, which counts what is asked of it."""

    objects: dict[str, tuple[bytes, str | None]] = attrs.field(factory=dict[str, tuple[bytes, "str | None"]])
    calls: list[str] = attrs.field(factory=list[str])
    refuses: bool = False
    racer: tuple[bytes, str] | None = None
    """Another process's object that is there when the first one is created."""

    async def open(self) -> None:
        self.calls.append("open")
        if self.refuses:
            raise StorageError("no")

    async def stat(self, name: str, /) -> StoredImage | None:
        self.calls.append(f"stat {name}")
        if name not in self.objects:
            return None
        data, mark = self.objects[name]
        return StoredImage(location=f"memory://{name}", size=len(data), mark=mark)

    async def create(self, name: str, data: AsyncIterable[bytes], /, *, content_type: str, mark: str) -> StoredImage:
        content = b"".join([chunk async for chunk in data])
        self.calls.append(f"create {name} {content_type}")
        if self.racer is not None:
            self.objects[name], self.racer = self.racer, None
            raise FileExistsError
        self.objects[name] = (content, mark)
        return StoredImage(location=f"memory://{name}", size=len(content), mark=mark)

    async def close(self) -> None:
        self.calls.append("close")


CAT = GenerationRequest("a cat", key="cat", width=64, height=64)


@pytest.fixture
async def gateway() -> AsyncIterator[Emulator]:
    """Provide an emulated gateway that draws."""
    async with Emulator(seconds=1.0, spread=0.0, seed=1) as emulator:
        yield emulator


def session_on(gateway: Emulator, folder: Path) -> FluxSession:
    journal = VirtualJournal(folder / "journal.db")
    return FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.5), journal=journal)


async def run(session: FluxSession, save_to: Any, *requests: GenerationRequest, **options: Any) -> list[Completed]:
    async with session:
        outcomes = [outcome.unwrap() async for outcome in session.stream(requests or [CAT], save_to=save_to, **options)]
        await anyio.sleep(1)
        return outcomes


async def test_stream_into_a_storage(gateway: Emulator, tmp_path: Path) -> None:
    """The storage is opened, gets each picture under its name with its type and mark, and is closed."""
    storage = MemoryStorage()
    png = attrs.evolve(CAT, key=None, output_format="png")
    first, second = await run(session_on(gateway, tmp_path), storage, CAT, png, name=lambda outcome: "my cat")

    marks = {f"{outcome.task_id}/0" for outcome in (first, second)}
    assert {mark for _, mark in storage.objects.values()} == marks
    assert set(storage.objects) == {"my cat.jpeg", "my cat.png"}
    assert {*first.locations, *second.locations} == {"memory://my cat.jpeg", "memory://my cat.png"}
    assert (first.saved, first.save_error) == ((), None)
    assert (storage.calls[0], storage.calls[-1]) == ("open", "close")
    assert {"create my cat.jpeg image/jpeg", "create my cat.png image/png"} < set(storage.calls)


async def test_nothing_is_fetched_again(gateway: Emulator, tmp_path: Path) -> None:
    """What the journal knows costs one look at the storage; what is gone or another's is stored once more."""
    storage = MemoryStorage()
    for change, expected in (
        (None, "memory://cat.jpeg"),
        ("nothing", "memory://cat.jpeg"),
        ("moved", "memory://cat.jpeg"),
        ("another's", "memory://cat-2.jpeg"),
        ("deleted", "memory://cat.jpeg"),
    ):
        match change:
            case "moved":
                storage = MemoryStorage(dict(storage.objects))
            case "another's":
                storage.objects["cat.jpeg"] = (b"another's", "t9/0")
            case "deleted":
                storage.objects.clear()
        (outcome,) = await run(session_on(gateway, tmp_path), storage)
        assert outcome.locations == (expected,), change

    assert gateway.calls["submit"] == 1
    assert gateway.calls["download"] == 3


async def test_a_picture_of_a_killed_process(gateway: Emulator, tmp_path: Path) -> None:
    """A picture that was stored, and not recorded, is found by its mark, without a download."""
    (first,) = await run(session_on(gateway, tmp_path), tmp_path / "folder")
    storage = MemoryStorage({"cat.jpeg": (b"another's", None), "cat-2.jpeg": (b"ours", f"{first.task_id}/0")})
    (second,) = await run(session_on(gateway, tmp_path), storage)

    assert second.locations == ("memory://cat-2.jpeg",)
    assert gateway.calls["download"] == 1


@pytest.mark.parametrize("whose", ["ours", "another's"])
async def test_a_race_for_a_name(gateway: Emulator, tmp_path: Path, whose: str) -> None:
    """If another process was faster, its object is this picture or not, as its mark says."""
    (first,) = await run(session_on(gateway, tmp_path), tmp_path / "folder")
    storage = MemoryStorage(racer=(b"raced", f"{first.task_id}/0" if whose == "ours" else "t9/0"))
    (second,) = await run(session_on(gateway, tmp_path), storage)

    assert second.locations == ("memory://cat.jpeg" if whose == "ours" else "memory://cat-2.jpeg",)
    assert storage.objects["cat.jpeg"][0] == b"raced"
    assert storage.calls[-1] == "close"


async def test_a_storage_that_refuses_at_once(gateway: Emulator, tmp_path: Path) -> None:
    """If the storage can't be opened, the stream raises its error, and nothing was submitted."""
    storage = MemoryStorage(refuses=True)
    with pytest.raises(StorageError, match=r"^no$"):
        await run(session_on(gateway, tmp_path), storage)

    assert storage.calls == ["open"]
    assert gateway.calls["submit"] == 0


async def test_a_storage_that_refuses_later(gateway: Emulator, tmp_path: Path) -> None:
    """A refusal is the outcome's save_error, stops the stream, and the storage is closed."""

    class Full(MemoryStorage):
        async def create(self, *_: Any, **__: Any) -> StoredImage:
            raise StorageError("full")

    storage, outcomes = Full(), list[Completed]()
    async with session_on(gateway, tmp_path) as session:
        with pytest.raises(StorageError, match=r"^full$"):
            async for outcome in session.stream([CAT, *(f"cat {n}" for n in range(200))], save_to=storage):
                outcomes.append(outcome.unwrap())
        await anyio.sleep(1)

    assert {str(outcome.save_error) for outcome in outcomes} == {"full"}
    assert all(outcome.locations == () for outcome in outcomes)
    assert gateway.calls["submit"] == len(outcomes) < 60
    assert storage.calls[-1] == "close"


async def test_a_stream_that_is_left(gateway: Emulator, tmp_path: Path) -> None:
    """The storage is closed once the last picture is stored, or the session is closed, and not before."""
    storage = MemoryStorage()
    async with session_on(gateway, tmp_path) as session:
        async with session.stream([f"cat {n}" for n in range(30)], save_to=storage) as stream:
            await anext(stream)
        await anyio.sleep(20)
        stored = storage.calls.copy()
        late = MemoryStorage()
        other = session.stream([f"dog {n}" for n in range(30)], save_to=late)
        await anext(other)

    assert stored[-1] == "close"
    assert len(storage.objects) == sum(call.startswith("create") for call in stored) >= 24
    assert late.calls.count("close") == 1


async def test_local_storage_is_a_folder(gateway: Emulator, tmp_path: Path) -> None:
    """A LocalStorage is as good as its folder; one that is derived from it is asked itself."""

    class Derived(LocalStorage):
        async def stat(self, name: str, /) -> StoredImage | None:
            asked.append(name)
            return await super().stat(name)

    asked: list[str] = []
    (first,) = await run(session_on(gateway, tmp_path), LocalStorage(tmp_path / "a"))
    (second,) = await run(session_on(gateway, tmp_path), Derived(tmp_path / "b"))
    (third,) = await run(session_on(gateway, tmp_path), str(tmp_path / "b"))

    assert first.saved == (tmp_path / "a" / "cat.jpeg",)
    assert second.saved == third.saved == (tmp_path / "b" / "cat.jpeg",)
    assert first.locations == (str(tmp_path / "a" / "cat.jpeg"),)
    assert asked == ["cat.jpeg", "cat.jpeg", "cat.jpeg"]
    assert (tmp_path / "a" / "cat.jpeg").read_bytes() == (tmp_path / "b" / "cat.jpeg").read_bytes()
    assert gateway.calls["download"] == 2


async def test_what_object_storage_has_is_not_in_a_folder(gateway: Emulator, tmp_path: Path) -> None:
    """A picture that the journal knows in object storage is downloaded for a folder."""
    await run(session_on(gateway, tmp_path), MemoryStorage())
    (outcome,) = await run(session_on(gateway, tmp_path), tmp_path / "a")

    assert outcome.saved == (tmp_path / "a" / "cat.jpeg",)
    assert gateway.calls["download"] == 2


def test_saved_files() -> None:
    """A saved file has a path, if it is local, and a location in any case."""
    assert SavedFile(Path("a/b.png"), 3) == SavedFile.at(str(Path("a/b.png")), 3)
    assert SavedFile(Path("b.png"), 3).location == "b.png"
    assert SavedFile.at("s3://bucket/b.png", 3) == SavedFile(None, 3, "s3://bucket/b.png")


async def test_upload_that_is_cancelled_while_it_waits_for_bytes() -> None:
    """The bytes of a cancelled upload end with an error, so that the store aborts it, and what yields them is cancelled."""
    ended: list[str] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield b"abc"
            await anyio.sleep_forever()
        finally:
            ended.append("ended")

    upload = _Upload(endless())
    parts = upload.rest()
    received = await anext(parts)
    waiting = asyncio.ensure_future(anext(parts))
    await anyio.sleep(1)
    upload.cancel()
    await asyncio.wait([waiting])

    assert received == b"abc"
    assert "Cancelled" in repr(waiting.exception())
    assert ended == ["ended"]


# ---------------------------------------------------------------------- what is refused


async def test_a_url_is_no_folder(scripted: ScriptedGateway) -> None:
    """A URL as save_to is a ConfigurationError that names the way."""
    async with FluxSession(scripted.api_key, base_url=scripted.url) as session:
        with pytest.raises(ConfigurationError, match=r"ObjectStorage\.from_url\('s3://bucket/cats'\)"):
            session.stream(["a cat"], save_to="s3://bucket/cats")


@pytest.mark.parametrize("save_to", [5, b"pictures", object(), LocalStorage])
async def test_what_is_neither_a_folder_nor_a_storage(save_to: Any, scripted: ScriptedGateway) -> None:
    """What can't store images is refused before anything is submitted."""
    async with FluxSession(scripted.api_key, base_url=scripted.url) as session:
        with pytest.raises(ConfigurationError, match="save_to must be a folder or a storage"):
            session.stream(["a cat"], save_to=save_to)


@pytest.mark.parametrize("make", [lambda: ObjectStorage(object()), lambda: ObjectStorage.from_url("s3://bucket")])
def test_object_storage_without_its_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without obstore, a ConfigurationError says what to install."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'flux2max_async\[object-storage\]'"):
        make()
