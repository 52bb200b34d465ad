"""The command `batch --store`: pictures in object storage, their addresses in results.jsonl and on the page."""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command
from support.s3 import S3Server

from flux2max_async.cli._stored_pictures import StoredPictures
from flux2max_async.emulator import Emulator
from flux2max_async.storage._objects import open_store, url_of

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


def entries_of(folder: str) -> list[dict[str, str]]:
    """Return what a page knows about each of its cards."""
    page = Path(folder, "index.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    entries: list[dict[str, str]] = json.loads(data)
    return entries


def thumbnails_of(folder: str) -> dict[str, int]:
    """Return when each thumbnail was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(folder, "thumbs").iterdir()}


def test_page_with_a_store(flux2max: Command, service: Callable[..., Emulator], server: S3Server, bucket: str) -> None:
    """The page shows thumbnails and links; a second run keeps them, and that of another host reads the pictures."""
    gateway = service()
    Path("prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ("batch", "prompts.txt", "--journal", "shared.db", "--store", f"s3://{bucket}/some", "--yes", "--out")
    first = flux2max(*arguments, "out")
    entries, thumbnails = entries_of("out"), thumbnails_of("out")
    again, other, rebuilt = flux2max(*arguments, "out"), flux2max(*arguments, "other"), flux2max("gallery", "out")

    assert (first.code, again.code, other.code) == (0, 0, 0), (first.err, again.err, other.err)
    assert (gateway.calls["download"], gateway.calls["submit"]) == (2, 2)
    assert {entry["link"] for entry in entries} == {f"{server.url}/{bucket}/{key}" for key in server.objects(bucket)}
    assert {entry["thumbnail"].removeprefix("thumbs/") for entry in entries} == thumbnails.keys()
    assert all(entry["url"] == entry["thumbnail"] and "reason" not in entry for entry in entries)
    assert thumbnails_of("out") == thumbnails
    assert (entries_of("other"), thumbnails_of("other").keys()) == (entries, thumbnails.keys())
    assert rebuilt.code == 2  # the journal is elsewhere
    for path in (Path("out"), Path("other")):
        assert {file.name for file in path.iterdir()} == {"index.html", "results.jsonl", "thumbs"}


@pytest.mark.parametrize(
    ("url", "options", "address"),
    [
        ("s3://bucket/some", {"region": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/bucket/some/"),
        ("s3://bucket", {"endpoint": "https://store.example/s3/"}, "https://store.example/s3/bucket/"),
        ("s3://bucket", {"endpoint": "https://me:secret@store.example:8443"}, "https://store.example:8443/bucket/"),
        ("s3://bucket", {"virtual_hosted_style_request": True}, "https://bucket.s3.us-east-1.amazonaws.com/"),
        (
            "az://container/some",
            {"account_name": "me", "account_key": "a2V5"},
            "https://me.blob.core.windows.net/container/some/",
        ),
        ("memory:///", {}, None),
    ],
)
def test_links(monkeypatch: pytest.MonkeyPatch, url: str, options: dict[str, Any], address: str | None) -> None:
    """A link is the address that the store itself uses, without a signature."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    s3 = {"access_key_id": "key", "secret_access_key": "secret"} if url.startswith("s3:") else {}
    store = open_store(url, **s3, **options)
    pictures = StoredPictures(store, url_of(store))

    link = pictures.link(f"{pictures.root}a fox (1), 50%.jpeg")
    assert link == (address and f"{address}a%20fox%20%281%29%2C%2050%25.jpeg")


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
