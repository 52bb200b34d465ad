"""Requests that are rebuilt from their journal entries."""

from pathlib import Path
from typing import Any

import pytest
from support.responses import picture

from flux2max_async import GeneratedImage, GenerationRequest, JournalEntry
from flux2max_async._models.fingerprint import fingerprint_request
from flux2max_async.cli._plan import find_orphans
from flux2max_async.journal import EntryState


def entry_of(request: GenerationRequest) -> JournalEntry:
    """Return the entry of a request whose task is running."""
    content = fingerprint_request(request)
    return JournalEntry(
        key="k",
        fingerprint=content.fingerprint,
        request=content.description,
        state=EntryState.SUBMITTED,
        task_id="t9",
    )


@pytest.mark.parametrize(
    "images",
    [
        [],
        ["https://a.example/a.png"],
        [Path("cat.png")],
        [GeneratedImage(url="https://a.example/?signed", type="image", task_id="t/1", index=2)],
    ],
    ids=["no image", "URL", "path", "generated"],
)
@pytest.mark.usefixtures("empty_folder")
def test_a_request_is_rebuilt_from_its_entry(images: list[Any]) -> None:
    """What an entry says of its input images is enough to make the same request again."""
    Path("cat.png").write_bytes(picture())
    entry = entry_of(GenerationRequest("a cat", seed=7, input_images=images))
    rebuilt, others = find_orphans([], [entry])

    assert others == []
    assert [line.content.fingerprint for line in rebuilt] == [entry.fingerprint]
    assert rebuilt[0].request.key == "k"


def test_bytes_cannot_be_rebuilt() -> None:
    """A request whose image was passed as bytes is left to whoever has them."""
    entry = entry_of(GenerationRequest("a cat", input_images=[picture()]))

    assert find_orphans([], [entry]) == ([], [entry])
