"""Images of replayed outcomes are found in few calls of a thread, and every outcome gets its answer."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from support.responses import jpeg

from flux2max_async import Completed, GeneratedImage
from flux2max_async._downloads.replays import SavedImageFinder
from flux2max_async._downloads.saver import ImageSaver
from flux2max_async._exceptions import SessionClosedError
from flux2max_async.journal import SavedFile

COUNT = 300
Found = dict[int, tuple[Path, ...] | None]


def completed(number: int, images: int = 1) -> Completed:
    return Completed(
        task_id=f"t{number}",
        request=None,
        images=tuple(
            GeneratedImage(url="https://localhost/", type="image", task_id=f"t{number}", extra={}, index=index)
            for index in range(images)
        ),
        usage=None,
        metadata={},
        partial_error=None,
        elapsed=1.0,
        polls=1,
    )


def save(folder: Path, name: str) -> SavedFile:
    (folder / name).write_bytes(jpeg())
    return SavedFile(folder / name, len(jpeg()))


class CountingSaver(ImageSaver):
    """Counts for how many outcomes it was asked."""

    asked: int = 0

    def find_all_saved(self, *arguments: Any) -> tuple[Path, ...] | None:
        self.asked += 1
        return super().find_all_saved(*arguments)


class BrokenSaver(ImageSaver):
    def find_all_saved(self, *_: Any) -> tuple[Path, ...] | None:
        raise RuntimeError("boom")


async def never(*_: object) -> str:
    raise AssertionError


async def test_many_are_found_together(tmp_path: Path) -> None:
    """300 outcomes that come at once need one background task; each gets the paths of its own images."""
    spawned: list[asyncio.Task[None]] = []

    def spawn(work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        spawned.append(asyncio.create_task(work))
        return spawned[-1]

    saver, found = CountingSaver(tmp_path, None, never), Found()
    finder = SavedImageFinder(saver, spawn)
    for number in range(COUNT):
        files = [save(tmp_path, f"{number}-{index}.jpeg") for index in range(2)]
        finder.find(completed(number, 2), files, lambda paths, number=number: found.update({number: paths}))  # type: ignore[misc]
    await spawned[0]
    finder.find(completed(COUNT), [save(tmp_path, "last.jpeg")], lambda paths: found.update({COUNT: paths}))
    await asyncio.gather(*spawned)

    assert list(found) == list(range(COUNT + 1))
    assert all(
        found[number] == (tmp_path / f"{number}-0.jpeg", tmp_path / f"{number}-1.jpeg") for number in range(COUNT)
    )
    assert found[COUNT] == (tmp_path / "last.jpeg",)
    assert saver.asked == COUNT + 1
    assert len(spawned) == 2


@pytest.mark.parametrize("damage", ["missing", "cut off", "another size", "unknown", "a folder", "unreadable name"])
async def test_an_image_that_is_not_there_is_not_found(tmp_path: Path, damage: str) -> None:
    """An outcome of which an image is missing, incomplete or unknown gets None."""
    files = [save(tmp_path, f"{index}.jpeg") for index in range(2)]
    path = files[1].path
    assert path is not None
    match damage:
        case "missing":
            path.unlink()
        case "cut off":
            path.write_bytes(jpeg()[:-2] + b"..")
        case "another size":
            path.write_bytes(jpeg() + b".")
        case "unknown":
            files.pop()
        case "a folder":
            path.unlink()
            path.mkdir()
        case _:
            files[1] = SavedFile(tmp_path / ("x" * 300), 1)
    found = ImageSaver(tmp_path, None, never).find_all_saved(completed(1, 2), files)

    assert found is None


async def test_a_file_that_cannot_be_read_is_not_found(tmp_path: Path) -> None:
    """An error of the operating system is left to save(), which reports it."""
    file = save(tmp_path, "1.jpeg")

    class Unreadable(ImageSaver):
        def _find_saved(self, known: Any) -> tuple[Path | None, bool]:
            raise OSError(5, "Input/output error")

    assert Unreadable(tmp_path, None, never).find_all_saved(completed(1), [file]) is None


@pytest.mark.parametrize("end", ["closed", "cancelled", "broken"])
async def test_every_outcome_gets_an_answer(tmp_path: Path, end: str) -> None:
    """If the session is closed, before or meanwhile, or the search fails, each outcome gets None."""
    spawned: list[asyncio.Task[None]] = []

    def spawn(work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        if end == "closed":
            work.close()
            raise SessionClosedError("closed")
        spawned.append(asyncio.create_task(work))
        return spawned[-1]

    found: list[object] = []
    finder = SavedImageFinder((BrokenSaver if end == "broken" else ImageSaver)(tmp_path, None, never), spawn)
    for number in range(3):
        finder.find(completed(number), [save(tmp_path, f"{number}.jpeg")], found.append)
    if end == "cancelled":
        spawned[0].cancel()
    await asyncio.wait(spawned) if spawned else None
    await asyncio.sleep(0)

    assert found == [None] * 3
