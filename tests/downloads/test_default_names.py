"""The default names of saved images."""

from pathlib import Path
from typing import Any

import pytest
from support.virtual_time import VirtualJournal

from flux2max_async import Completed, FluxSession, GeneratedImage, GenerationRequest
from flux2max_async._downloads.default_names import default_name
from flux2max_async._models.fingerprint import fingerprint_request
from flux2max_async.emulator import Emulator

IMAGE = GeneratedImage(url="https://example.com/x", type="image", task_id="t1")


def outcome(request: GenerationRequest | None, task_id: str = "t1") -> Completed:
    return Completed(task_id=task_id, request=request, images=(IMAGE,))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (None, "t1"),
        (GenerationRequest("a cat", key="row 1"), "row 1"),
        (GenerationRequest("A cat, asleep (on a sofa)"), "a-cat-asleep-on-a-sofa-"),
        (GenerationRequest("Ein Fuchs im Schnee über München"), "ein-fuchs-im-schnee-über-münchen-"),
        (GenerationRequest("??"), ""),
        (GenerationRequest("word " * 50), "word-" * 12),
        (GenerationRequest("ä" * 200), "ä" * 30 + "-"),
    ],
)
def test_names(request_: GenerationRequest | None, expected: str) -> None:
    """A name is the key, or the first 60 bytes of the prompt's words and eight digits of the fingerprint."""
    name = default_name(outcome(request_), None)
    known = None if request_ is None else fingerprint_request(request_)

    assert name.startswith(expected)
    if known is not None and name != expected:
        assert name.removeprefix(expected) == known.fingerprint[:8]
    assert default_name(outcome(request_), known) == name


def test_requests_that_differ_have_other_names() -> None:
    """The seed makes a difference; the same request has the same name, in whichever task."""
    first, equal = (
        default_name(outcome(GenerationRequest("a cat", seed=1), task_id), None) for task_id in ("t1", "t2")
    )
    other = default_name(outcome(GenerationRequest("a cat", seed=2)), None)

    assert first == equal != other


def test_input_images_are_not_read_for_a_name(tmp_path: Path) -> None:
    """Without a fingerprint that is known already, a request with local images is named after its task as well."""
    request = GenerationRequest("a cat", input_images=[tmp_path / "missing.png"])
    names = {default_name(outcome(request, task_id), None) for task_id in ("t1", "t1", "t2")}

    assert len(names) == 2
    assert all(name.startswith("a-cat-") and len(name) == len("a-cat-") + 8 for name in names)


async def test_what_was_saved_under_an_older_name_is_found(gateway: Emulator, tmp_path: Path) -> None:
    """An image that an earlier version has named after its task is neither fetched nor stored again."""

    def older(done: Completed) -> str:
        return done.task_id

    results: list[Any] = []
    for name in (older, None):
        session = FluxSession(gateway.api_key, base_url=gateway.url, journal=VirtualJournal(tmp_path / "run.db"))
        async with session:
            results += [item async for item in session.stream(["a cat"], save_to=tmp_path / "out", name=name)]
    before, after = results

    assert after.saved == before.saved == (tmp_path / "out" / f"{before.task_id}.jpeg",)
    assert gateway.calls["download"] == 1
    assert len(list((tmp_path / "out").iterdir())) == 1
