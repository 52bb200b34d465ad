"""Object storage: whole or not there, never over another's picture, never stored twice, and clear refusals."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.responses import jpeg
from support.s3 import RefusingServer, S3Server

from flux2max_async import (
    Completed,
    ConfigurationError,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    SqliteJournal,
    StorageError,
)
from flux2max_async.emulator import Emulator
from flux2max_async.storage import ObjectStorage, Storage, StoredImage

SMALL, LARGE = jpeg(b"small"), jpeg(bytes(range(256)) * 80_000)  # the second has 20 MB


@pytest.fixture
def anyio_backend() -> str:
    """Run the tests in real time: obstore works in threads of its own, which virtual time doesn't know."""
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """Provide an S3 server."""
    with S3Server() as running:
        yield running


_numbers = itertools.count()


@pytest.fixture
def bucket(server: S3Server) -> str:
    """Provide an empty bucket."""
    name = f"pictures-{next(_numbers)}"
    server.create_bucket(name)
    return name


@pytest.fixture
def storage(server: S3Server, bucket: str) -> ObjectStorage:
    """Provide a storage in that bucket."""
    return server.storage(f"s3://{bucket}/some/prefix")


@pytest.fixture
async def gateway() -> AsyncIterator[Emulator]:
    """Provide an emulated gateway whose tasks are quick."""
    async with Emulator(seconds=0.1, spread=0.0, seed=1) as emulator:
        yield emulator


def session_on(gateway: Emulator, **options: Any) -> FluxSession:
    return FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05), **options)


async def chunks(data: bytes, *, then: BaseException | float | None = None) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 60_000):
        yield data[start : start + 60_000]
    if isinstance(then, BaseException):
        raise then
    if then is not None:
        await anyio.sleep(then)


async def create(storage: Storage, name: str, data: bytes, mark: str = "t1/0") -> StoredImage:
    return await storage.create(name, chunks(data), content_type="image/jpeg", mark=mark)


# ---------------------------------------------------------------------- one picture


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_create_and_stat(server: S3Server, bucket: str, storage: ObjectStorage, data: bytes) -> None:
    """A picture is stored with its type and mark, and `stat()` tells its size and whose it is."""
    await storage.open()
    stored = await create(storage, "fox.jpeg", data)

    assert stored == StoredImage(location=f"s3://{bucket}/some/prefix/fox.jpeg", size=len(data), mark="t1/0")
    assert await storage.stat("fox.jpeg") == stored
    assert await storage.stat("cat.jpeg") is None
    assert server.objects(bucket) == {"some/prefix/fox.jpeg": data}
    head = server.client.head_object(Bucket=bucket, Key="some/prefix/fox.jpeg")
    assert (head["ContentType"], head["Metadata"]) == ("image/jpeg", {"flux2max-mark": "t1/0"})
    await storage.close()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_taken_name(server: S3Server, bucket: str, storage: ObjectStorage, data: bytes) -> None:
    """A name that is taken, by whatever, is a FileExistsError; what is there stays."""
    server.client.put_object(Bucket=bucket, Key="some/prefix/fox.jpeg", Body=b"another's")
    with pytest.raises(FileExistsError, match=r"fox\.jpeg exists already"):
        await create(storage, "fox.jpeg", data)

    found = await storage.stat("fox.jpeg")
    assert found is not None
    assert found.mark is None
    assert server.objects(bucket) == {"some/prefix/fox.jpeg": b"another's"}
    assert server.uploads(bucket) == []


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_data_that_fails(server: S3Server, bucket: str, storage: ObjectStorage, data: bytes) -> None:
    """If the data raises, that error is raised, and nothing is left, not even an invisible upload."""
    for error in (RuntimeError("boom"), ValueError("boom"), OSError("boom")):
        with pytest.raises(type(error), match="boom") as caught:
            await storage.create("fox.jpeg", chunks(data, then=error), content_type="image/jpeg", mark="t1/0")
        assert caught.value is error

    assert server.objects(bucket) == {}
    assert server.uploads(bucket) == []


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_cancelled_call(server: S3Server, bucket: str, storage: ObjectStorage, data: bytes) -> None:
    """If the call is cancelled, nothing is left."""
    task = asyncio.ensure_future(
        storage.create("fox.jpeg", chunks(data, then=1000.0), content_type="image/jpeg", mark="t1/0")
    )
    for _ in range(500):
        await anyio.sleep(0.02)
        if data is SMALL or server.uploads(bucket):
            break
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert server.objects(bucket) == {}
    assert server.uploads(bucket) == []


async def test_twenty_racers_for_one_name(server: S3Server, bucket: str) -> None:
    """Of 20 storages that create one name at once, one wins, and its picture is the one that is there."""
    storages = [server.storage(f"s3://{bucket}") for _ in range(20)]
    pictures = [jpeg(b"%d" % number) for number in range(20)]
    results = await asyncio.gather(
        *(
            create(storage, "fox.jpeg", data, f"t{n}/0")
            for n, (storage, data) in enumerate(zip(storages, pictures, strict=True))
        ),
        return_exceptions=True,
    )

    winners = [number for number, result in enumerate(results) if isinstance(result, StoredImage)]
    assert len(winners) == 1
    assert sum(isinstance(result, FileExistsError) for result in results) == 19
    assert server.objects(bucket) == {"fox.jpeg": pictures[winners[0]]}


KILLED = """
import asyncio, sys
from flux2max_async.storage import ObjectStorage

async def data(size):
    for _ in range(size // 100_000):
        yield b"x" * 100_000
        await asyncio.sleep(0.001)
    print("read", flush=True)

async def main():
    url, endpoint, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    storage = ObjectStorage.from_url(
        url, endpoint=endpoint, access_key_id="key", secret_access_key="secret", region="us-east-1"
    )
    print("ready", flush=True)
    await storage.create("fox.jpeg", data(size), content_type="image/jpeg", mark="t1/0")

asyncio.run(main())
"""


@pytest.mark.parametrize("size", [5_000_000, 20_000_000])
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 1.0])
def test_kill_in_the_middle(server: S3Server, bucket: str, size: int, delay: float) -> None:
    """After kill -9 at any moment the picture is whole, or not there."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, f"s3://{bucket}", server.url, str(size)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    if delay:
        process.stdout.readline()
        signal.sigtimedwait(set(), delay / 10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    assert server.objects(bucket) in ({}, {"fox.jpeg": b"x" * size})


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket"), (400, "Odd")]
)
async def test_refusals(status: int, code: str) -> None:
    """Each refusal of a store is a StorageError in one line with the store's reason, and without the secret."""
    with RefusingServer(status, code, "No, you may not.") as server:
        storage = server.storage("s3://pictures/prefix")
        for call in (storage.open(), create(storage, "fox.jpeg", SMALL), create(storage, "fox.jpeg", LARGE)):
            with pytest.raises(
                StorageError, match=f"s3://pictures/prefix.*: {status}.*{code}, No, you may not"
            ) as caught:
                await call
            assert "secret" not in str(caught.value)
            assert "\n" not in str(caught.value)
        if status != 404:
            with pytest.raises(StorageError, match=str(status)):
                await storage.stat("fox.jpeg")


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/x", "s3:/bucket", "s3://", ""])
def test_bad_urls(url: str) -> None:
    """A URL that names no object storage is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="no object storage can be made of"):
        ObjectStorage.from_url(url)


def test_bad_option() -> None:
    """An option that obstore doesn't know is a ConfigurationError without the values of others."""
    with pytest.raises(ConfigurationError, match="nonsense") as caught:
        ObjectStorage.from_url("s3://bucket", nonsense=1, secret_access_key="very secret")

    assert "very secret" not in str(caught.value)


async def test_a_store_of_ones_own(server: S3Server, bucket: str) -> None:
    """A store that was made with obstore is used as it is, with a prefix."""
    from obstore.store import MemoryStore, S3Store  # noqa: PLC0415 - the extra is there in this folder only

    store = S3Store(
        bucket,
        prefix="outer",
        endpoint=server.url,
        access_key_id="key",
        secret_access_key="secret",
        region="us-east-1",
        client_options={"allow_http": True},
    )
    stored = await create(ObjectStorage(store, "/inner/"), "fox.jpeg", SMALL)
    in_memory = ObjectStorage(MemoryStore())
    await in_memory.open()
    await create(in_memory, "fox.jpeg", LARGE)

    assert stored.location == f"s3://{bucket}/outer/inner/fox.jpeg"
    assert list(server.objects(bucket)) == ["outer/inner/fox.jpeg"]
    assert await in_memory.stat("fox.jpeg") == StoredImage(location="memory://fox.jpeg", size=len(LARGE), mark="t1/0")


# ---------------------------------------------------------------------- streams


async def run(session: FluxSession, requests: list[GenerationRequest], storage: Storage) -> list[Completed]:
    async with session:
        return [outcome.unwrap() async for outcome in session.stream(requests, save_to=storage)]


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"cat {n}", key=f"cat {n}", width=64, height=64) for n in range(count)]


async def test_stream_into_a_bucket(
    gateway: Emulator, server: S3Server, bucket: str, storage: ObjectStorage, tmp_path: Path
) -> None:
    """Each picture is in the bucket under its key, the journal knows where, and another run fetches nothing again."""

    async def stream() -> list[Completed]:
        return await run(session_on(gateway, journal=SqliteJournal(tmp_path / "journal.db")), requests(8), storage)

    first, downloads = await stream(), gateway.calls["download"]
    again = await stream()

    expected = {f"s3://{bucket}/some/prefix/cat {n}.jpeg" for n in range(8)}
    assert {location for outcome in first for location in outcome.locations} == expected
    assert all(outcome.saved == () and outcome.save_error is None for outcome in first)
    assert {outcome.locations for outcome in again} == {outcome.locations for outcome in first}
    assert all(outcome.replayed for outcome in again)
    assert (downloads, gateway.calls["download"]) == (8, 8)
    assert len(server.objects(bucket)) == 8
    journal = SqliteJournal(tmp_path / "journal.db")
    entries = {entry.key: entry async for entry in journal.entries()}
    assert entries["cat 1"].locations == (f"s3://{bucket}/some/prefix/cat 1.jpeg",)
    assert entries["cat 1"].paths == ()


async def test_names_of_others_are_left_alone(
    gateway: Emulator, server: S3Server, bucket: str, storage: ObjectStorage, tmp_path: Path
) -> None:
    """A picture whose name is taken gets the next one, and a missing one is stored again."""
    server.client.put_object(Bucket=bucket, Key="some/prefix/cat 0.jpeg", Body=b"another's")
    journal = tmp_path / "journal.db"
    (first,) = await run(session_on(gateway, journal=SqliteJournal(journal)), requests(1), storage)
    server.client.delete_object(Bucket=bucket, Key="some/prefix/cat 0-2.jpeg")
    (second,) = await run(session_on(gateway, journal=SqliteJournal(journal)), requests(1), storage)

    assert first.locations == second.locations == (f"s3://{bucket}/some/prefix/cat 0-2.jpeg",)
    assert server.objects(bucket)["some/prefix/cat 0.jpeg"] == b"another's"
    assert set(server.objects(bucket)) == {"some/prefix/cat 0.jpeg", "some/prefix/cat 0-2.jpeg"}


@pytest.mark.parametrize(("status", "code"), [(403, "QuotaExceeded"), (507, "XMinioStorageFull")])
async def test_a_full_quota(
    gateway: Emulator, server: S3Server, bucket: str, tmp_path: Path, status: int, code: str
) -> None:
    """A full bucket stops the submits with a clear error; what was paid for is saved by the next run."""
    journal, outcomes = tmp_path / "journal.db", list[Completed]()
    options = {"retry_config": {"max_retries": 0}}
    with RefusingServer(status, code, "The bucket is full.", allow_uploads=1) as full:
        async with session_on(gateway, journal=SqliteJournal(journal), max_in_flight=2) as session:
            with pytest.raises(StorageError, match=f"{code}, The bucket is full"):
                async for outcome in session.stream(requests(50), save_to=full.storage(f"s3://{bucket}", **options)):
                    outcomes.append(outcome.unwrap())
    submitted = gateway.calls["submit"]
    saved = await run(
        session_on(gateway, journal=SqliteJournal(journal)), requests(50)[:submitted], server.storage(f"s3://{bucket}")
    )

    assert 1 <= submitted <= 6
    assert len(outcomes) == submitted
    assert all(isinstance(outcome.save_error, StorageError) for outcome in outcomes)
    assert gateway.calls["submit"] == submitted
    assert len(server.objects(bucket)) == len(saved) == submitted


@pytest.mark.parametrize("fault", ["credentials", "bucket", "unreachable"])
async def test_nothing_is_submitted_where_nothing_can_be_stored(
    gateway: Emulator, server: S3Server, bucket: str, fault: str
) -> None:
    """Wrong credentials, a missing bucket and a store that is away end the stream before its first submit."""
    retries = {"retry_config": {"max_retries": 0}}
    with RefusingServer(403, "InvalidAccessKeyId", "The key doesn't exist.") as refusing:
        storage = {
            "credentials": refusing.storage(f"s3://{bucket}"),
            "bucket": server.storage("s3://no-such-bucket/prefix"),
            "unreachable": server.storage(f"s3://{bucket}", endpoint="http://127.0.0.1:9", **retries),
        }[fault]
        with pytest.raises(StorageError, match="can't store images in s3://"):
            await run(session_on(gateway), requests(3), storage)

    assert gateway.calls["submit"] == 0


async def test_two_hosts_download_each_picture_once(
    gateway: Emulator, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """Two sessions with one journal and one bucket share the downloads, and both get all locations."""
    journal = tmp_path / "journal.db"
    both = await asyncio.gather(
        *(
            run(session_on(gateway, journal=SqliteJournal(journal)), requests(10), server.storage(f"s3://{bucket}"))
            for _ in range(2)
        )
    )

    expected = {(f"s3://{bucket}/cat {n}.jpeg",) for n in range(10)}
    assert [{outcome.locations for outcome in outcomes} for outcomes in both] == [expected, expected]
    assert (gateway.calls["submit"], gateway.calls["download"]) == (10, 10)
    assert len(server.objects(bucket)) == 10
