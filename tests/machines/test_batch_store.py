"""The command `batch --store`: pictures in object storage, their addresses in results.jsonl and on the page."""

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import Command
from support.s3 import S3Server

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Provide an S3 server, which the environment names."""
    with S3Server() as running:
        for name, value in {
            "AWS_ENDPOINT_URL": running.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def bucket(server: S3Server) -> str:
    """Provide an empty bucket; the servers of one process share their buckets."""
    name = f"batch-{secrets.token_hex(8)}"
    server.create_bucket(name)
    return name


def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]


def test_batch_with_a_store(flux2max: Command, service: Callable[..., Emulator], server: S3Server, bucket: str) -> None:
    """The pictures are in the bucket, the rows and the page have their addresses, and a second run fetches nothing."""
    gateway = service()
    Path("prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ("batch", "prompts.txt", "--out", "out", "--store", f"s3://{bucket}/some", "--yes")
    first, downloads = flux2max(*arguments), gateway.calls["download"]
    again = flux2max(*arguments)

    assert (first.code, again.code) == (0, 0), first.err
    assert (downloads, gateway.calls["download"], gateway.calls["submit"]) == (2, 2, 2)
    keys = set(server.objects(bucket))
    assert len(keys) == 2
    assert {location for row in rows() for location in row["locations"]} == {  # type: ignore[attr-defined]
        f"s3://{bucket}/{key}" for key in keys
    }
    assert all(row["files"] == [] and row["state"] == "completed" for row in rows())
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert all(f"s3://{bucket}/{key}" in page for key in keys)
    assert not list(Path("out").glob("*.jpeg"))


def test_journal_that_is_lost(
    flux2max: Command, service: Callable[..., Emulator], server: S3Server, bucket: str
) -> None:
    """If the journal is lost, what is in the bucket counts as there: nothing is paid for again."""
    gateway = service()
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    arguments = ("batch", "prompts.txt", "--out", "out", "--store", f"s3://{bucket}", "--yes")
    flux2max(*arguments)
    for file in Path("out").glob("journal.db*"):
        file.unlink()
    flux2max(*arguments)

    assert gateway.calls["submit"] == 1
    assert rows()[0]["state"] == "completed"
    assert len(server.objects(bucket)) == 1


@pytest.mark.parametrize(
    ("url", "code", "reason"),
    [
        ("nonsense", 2, "no object storage can be made of"),
        ("s3://no-such-bucket/prefix", 1, "NoSuchBucket"),
    ],
)
def test_store_that_cannot_be_used(
    flux2max: Command, service: Callable[..., Emulator], server: S3Server, bucket: str, url: str, code: int, reason: str
) -> None:
    """A bad URL and a missing bucket are clear errors, and nothing is submitted."""
    gateway = service()
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    run = flux2max("batch", "prompts.txt", "--out", "out", "--store", url, "--yes")

    assert run.code == code
    assert reason in run.err
    assert gateway.calls["submit"] == 0
    assert server.objects(bucket) == {}
