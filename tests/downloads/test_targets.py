"""Targets of save(): only regular, writable files are replaced, and symbolic links stay what they are."""

import os
import socket
import stat
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from support.responses import jpeg
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, session_on

from flux2max_async import DownloadError, GeneratedImage
from flux2max_async._downloads.targets import is_writable

IMAGE = jpeg(b"new")


async def save(scripted: ScriptedGateway, target: Path, behaviour: Behaviour | None = None) -> Path:
    scripted.downloads = deque([behaviour or answer(200, IMAGE)])
    async with session_on(scripted) as session:
        return await session.save(GeneratedImage(url=f"{scripted.url}/0", type="image", task_id="t1"), target)


def read_only(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o444)


def link(create: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a function that creates something, and a link to a link to it."""

    def create_with_links(path: Path) -> None:
        create(path.with_name("target"))
        path.with_name("link").symlink_to("target")
        path.symlink_to("link")

    return create_with_links


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root can create a device")


def unix_socket(path: Path) -> None:
    # In a short folder: the name of a socket has at most 108 bytes.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        Path(folder, "s").rename(path)


REFUSED = [
    pytest.param(read_only, "read-only", id="read-only file"),
    pytest.param(Path.mkdir, "not a regular file", id="folder"),
    pytest.param(os.mkfifo, "not a regular file", id="pipe"),
    pytest.param(device, "not a regular file", id="device"),
    pytest.param(unix_socket, "not a regular file", id="socket"),
    pytest.param(link(read_only), "read-only", id="link to a read-only file"),
    pytest.param(link(Path.mkdir), "not a regular file", id="link to a folder"),
    pytest.param(link(os.mkfifo), "not a regular file", id="link to a pipe"),
    pytest.param(lambda path: path.symlink_to("/dev/null"), "not a regular file", id="link to /dev/null"),
    pytest.param(lambda path: path.symlink_to(path), "symbolic links", id="link to itself"),
    pytest.param(lambda path: path.symlink_to("file/below"), "[Nn]ot a directory", id="link below a file"),
]


def fields(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return what would change in a folder if a file were created, replaced or modified."""
    return {path.name: (*path.lstat()[:4], *path.lstat()[6:7], path.lstat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize(("create", "message"), REFUSED)
async def test_what_is_not_replaced(
    scripted: ScriptedGateway, tmp_path: Path, create: Callable[[Path], object], message: str
) -> None:
    """What is not a regular, writable file is an error that names it before anything is requested, for root too."""
    (tmp_path / "file").write_bytes(b"content")
    target = tmp_path / "cat.jpeg"
    create(target)
    before = fields(tmp_path)
    with pytest.raises(DownloadError, match=rf"can't write '{target}': .*{message}"):
        await save(scripted, target)

    assert scripted.received == []
    assert fields(tmp_path) == before


@pytest.mark.parametrize("target", ["/dev/null", "/dev/full", "/proc/self/status", "/"])
async def test_parts_of_the_system(scripted: ScriptedGateway, target: str) -> None:
    """Devices, files of the kernel and the root folder are refused before anything is requested."""
    before = Path(target).lstat()
    with pytest.raises(DownloadError, match="can't write"):
        await save(scripted, Path(target))

    after = Path(target).lstat()
    assert scripted.received == []
    assert (after.st_mode, after.st_rdev) == (before.st_mode, before.st_rdev)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        pytest.param("target.jpeg", "target.jpeg", id="file"),
        pytest.param("folder/target.jpeg", "folder/target.jpeg", id="file in another folder"),
        pytest.param("new.jpeg", "new.jpeg", id="dangling"),
        pytest.param("new folder/new.jpeg", "new folder/new.jpeg", id="dangling into a missing folder"),
        pytest.param("second", "folder/target.jpeg", id="link to a link"),
    ],
)
@pytest.mark.parametrize("is_absolute", [False, True])
async def test_the_target_of_a_link_is_written(
    scripted: ScriptedGateway, tmp_path: Path, text: str, written: str, is_absolute: bool
) -> None:
    """The file to which a link leads is written, the link stays, and the part file is beside the file."""
    (tmp_path / "folder").mkdir()
    for name in ("target.jpeg", "folder/target.jpeg"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "second").symlink_to("folder/target.jpeg")
    link = tmp_path / "cat.jpeg"
    link.symlink_to(tmp_path / text if is_absolute else text)
    parts: list[Path] = []

    async def list_parts_and_send(connection: Connection) -> None:
        parts.extend(tmp_path.rglob("*.part"))
        await answer(200, IMAGE)(connection)

    assert await save(scripted, link, list_parts_and_send) == link
    assert link.is_symlink()
    assert (tmp_path / written).read_bytes() == link.read_bytes() == IMAGE
    assert [part.parent for part in parts] == [(tmp_path / written).parent]
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o200])
async def test_writable_files_are_replaced(scripted: ScriptedGateway, tmp_path: Path, mode: int) -> None:
    """A regular file that may be written to is replaced, also through a link to its folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder" / "cat.jpeg").write_bytes(b"old")
    (tmp_path / "folder" / "cat.jpeg").chmod(mode)

    assert await save(scripted, tmp_path / "link" / "cat.jpeg") == tmp_path / "link" / "cat.jpeg"
    assert (tmp_path / "folder" / "cat.jpeg").read_bytes() == IMAGE


async def test_a_target_that_becomes_read_only(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A file that must not be written to any more when the download has ended is left alone."""
    target = tmp_path / "cat.jpeg"
    target.write_bytes(b"old")

    async def protect_and_send(connection: Connection) -> None:
        target.chmod(0o444)
        await answer(200, IMAGE)(connection)

    with pytest.raises(DownloadError, match="read-only"):
        await save(scripted, target, protect_and_send)

    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_file_of_another_user(tmp_path: Path) -> None:
    """A file whose mode allows others to write, and not this user, is not writable."""
    assert not is_writable(tmp_path / "missing", stat.S_IFREG | 0o666)
