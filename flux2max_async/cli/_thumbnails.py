"""Thumbnails of the images in a folder, created by worker processes: see `_thumbnail_worker.py`."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import attrs

from flux2max_async._exceptions import StorageError
from flux2max_async.cli._output_dir import write_atomically

_WORKER = Path(__file__).with_name("_thumbnail_worker.py")
_MAX_WORKERS = 4
_IMAGES_PER_WORKER = 16
"""The number of images that are worth another process: it takes as long to start as they do."""
_MAX_STARTS = 5
"""The number of processes after which a worker gives up: hostile images could end one after the other."""
_READERS = 8
"""The number of threads that read images from object storage."""
_STORED_AT_ONCE = 64
"""The number of images from object storage that are in the folder at the same time."""
_TICK = 0.1
"""Seconds between two checks whether to stop."""
_COMMENT = re.compile(rb"flux2max (\d{1,9})x(\d{1,9}) (\d{1,18}) (-?\d{1,20})")
_HEADER_LENGTH = 256
"""The bytes of a thumbnail that contain its comment."""


@attrs.frozen
class Source:
    """The image that a thumbnail was created from."""

    width: int
    height: int
    file_size: int
    modified: int
    """In nanoseconds since 1970."""

    @classmethod
    def parse(cls, thumbnail: bytes) -> "Source | None":
        """Return what the comment of a thumbnail says, or None if it has none."""
        found = _COMMENT.search(thumbnail, 0, _HEADER_LENGTH)
        return cls(*map(int, found.groups())) if found else None

    @property
    def version(self) -> tuple[int, int]:
        """What `file_version` has returned for the image."""
        return self.file_size, self.modified


@attrs.define
class Thumbnails:
    """The thumbnails of a folder's images, in its folder `thumbs`."""

    folder: Path
    worker: Path = _WORKER
    """The program that creates them."""
    sources: dict[str, Source] = attrs.field(factory=dict[str, Source], init=False)
    """The sources of the thumbnails that exist, by the file name of the image, or its `stored_name()`."""
    problem: StorageError | None = attrs.field(default=None, init=False)
    """Why no more images are read from object storage."""
    _failed: dict[str, tuple[int, int] | None] = attrs.field(factory=dict[str, tuple[int, int] | None], init=False)
    """The versions of the files that no thumbnail can be created of, by file name."""
    _read: set[str] = attrs.field(factory=set[str], init=False)
    """The names of the images in object storage that were read, or can't be: none is read twice."""

    @property
    def path(self) -> Path:
        """The folder with the thumbnails."""
        return self.folder / "thumbs"

    def update(self, names: Iterable[str], is_cancelled: Callable[[], bool]) -> None:
        """Create the thumbnails of images that have none, or one of another version of the file.

        Args:
            names: File names in the folder.
            is_cancelled: Returns whether to create no more of them.
        """
        if self._leads_elsewhere():
            return
        outdated = [name for name in names if self._is_outdated(name)]
        if outdated and not is_cancelled() and self._create_folder():
            _run_workers(self.worker, [self.folder / name for name in outdated], self._save, is_cancelled)

    def update_stored(
        self, locations: Iterable[str], read: Callable[[str], bytes | None], is_cancelled: Callable[[], bool]
    ) -> None:
        """Create the thumbnails of images in object storage that have none.

        Such an image never changes. It is read into a temporary file, whether this process has stored it or another.

        Args:
            locations: The addresses of the images.
            read: Returns an image, or None if there is none; it is called in several threads.
            is_cancelled: Returns whether to create no more of them.
        """
        if self._leads_elsewhere():
            return
        missing = [location for location in locations if self._is_missing(stored_name(location))]
        for start in range(0, len(missing), _STORED_AT_ONCE):
            if self.problem is not None or is_cancelled() or not self._create_folder():
                return
            self._create_stored(missing[start : start + _STORED_AT_ONCE], read, is_cancelled)

    def _create_stored(
        self, locations: Sequence[str], read: Callable[[str], bytes | None], is_cancelled: Callable[[], bool]
    ) -> None:
        files = {self.path / f".flux2max-{secrets.token_hex(8)}.part": location for location in locations}
        names = {path.name: stored_name(location) for path, location in files.items()}

        def fetch(path: Path) -> Path | None:
            if self.problem is not None or is_cancelled():
                return None
            self._read.add(names[path.name])
            try:
                if (data := read(files[path])) is None:
                    return None
                path.write_bytes(data)
            except StorageError as error:
                self.problem = error
                return None
            except OSError:
                return None
            return path

        try:
            with concurrent.futures.ThreadPoolExecutor(_READERS) as executor:
                paths = [path for path in executor.map(fetch, files) if path is not None]
            if paths and not is_cancelled():
                _run_workers(
                    self.worker, paths, lambda file, thumbnail: self._save(names[file], thumbnail), is_cancelled
                )
        finally:
            for path in files:
                path.unlink(missing_ok=True)

    def _leads_elsewhere(self) -> bool:
        """Check whether the folder of the thumbnails is a link, which could lead out of the folder."""
        if is_link := self.path.is_symlink():
            self.sources.clear()
        return is_link

    def _create_folder(self) -> bool:
        """Create the folder of the thumbnails; return False if that is impossible."""
        with contextlib.suppress(OSError):
            self.path.mkdir(exist_ok=True)
            return True
        return False

    def _is_missing(self, name: str) -> bool:
        """Check whether to create the thumbnail of an image in object storage; remember its source if it exists."""
        if (source := self._find_source(name)) is None:
            return name not in self._read
        self.sources[name] = source
        return False

    def _is_outdated(self, name: str) -> bool:
        """Check whether to create a thumbnail; remember its source if it exists."""
        version, source = file_version(self.folder / name), self._find_source(name)
        # The thumbnail of an image that has just been deleted is kept.
        if source is None or version not in {None, source.version}:
            return version is not None and self._failed.get(name) != version
        self.sources[name] = source
        return False

    def _find_source(self, name: str) -> Source | None:
        """Return the source of a thumbnail, which is forgotten; None if there is no thumbnail."""
        source, thumbnail = self.sources.pop(name, None), self._thumbnail_path(name)
        if file_version(thumbnail) is None:
            return None
        return source or read_source(thumbnail)

    def _thumbnail_path(self, name: str) -> Path:
        return self.path / f"{name}.jpeg"

    def _save(self, name: str, thumbnail: bytes) -> None:
        """Write a thumbnail, or remember that there is none."""
        if (source := Source.parse(thumbnail)) is None:
            self._failed[name] = file_version(self.folder / name)
            return
        # An image without a thumbnail is still shown.
        with contextlib.suppress(OSError):
            write_atomically(self._thumbnail_path(name), thumbnail)
            self.sources[name] = source


@attrs.define
class _Worker:
    """A process that creates one thumbnail after the other, and is replaced if an image ends it.

    Running -> stopped: `stop` has ended the process, and no other is started.
    """

    program: Path
    paths: Sequence[Path]
    save: Callable[[str, bytes], object]
    """Called with the name of each image and its thumbnail, which is empty if there is none."""
    _process: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def run(self) -> None:
        """Create the thumbnails of all images."""
        paths = iter(self.paths)
        for _, process in zip(range(_MAX_STARTS), iter(self._start, None), strict=False):
            # It may end at any time; closing the pipe to it fails then, too.
            with contextlib.suppress(OSError), process:
                assert process.stdin is not None
                assert process.stdout is not None
                if _read_reply(process.stdout) is None:
                    return  # it can't even start
                if all(self._create(process.stdin, process.stdout, path) for path in paths):
                    return

    def stop(self) -> None:
        """End the process."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def _start(self) -> "subprocess.Popen[bytes] | None":
        with self._lock:
            if self._stopped:
                return None
            try:
                self._process = subprocess.Popen(  # noqa: S603 - this Python, and a file of this package
                    # -P: modules in the working folder, which may be somebody else's, are not imported.
                    [sys.executable, "-P", self.program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={name: value for name, value in os.environ.items() if not name.startswith("FLUX2MAX_")},
                    process_group=0,  # signals of the terminal are for this process only
                )
            except OSError:
                return None
            return self._process

    def _create(self, stdin: IO[bytes], stdout: IO[bytes], path: Path) -> bool:
        """Create a thumbnail; return False if the process has ended."""
        stdin.write(f"{json.dumps(str(path))}\n".encode())
        stdin.flush()
        thumbnail = _read_reply(stdout)
        if not self._stopped:
            self.save(path.name, thumbnail or b"")
        return thumbnail is not None


def stored_name(location: str) -> str:
    """Return the name under which the thumbnail of an image in object storage is kept."""
    return f"stored-{hashlib.sha256(location.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _run_workers(
    program: Path, paths: Sequence[Path], save: Callable[[str, bytes], object], is_cancelled: Callable[[], bool]
) -> None:
    """Create thumbnails in several processes, until all are created or it is cancelled."""
    count = min(_MAX_WORKERS, os.cpu_count() or 1, 1 + len(paths) // _IMAGES_PER_WORKER)
    workers = [_Worker(program, paths[start::count], save) for start in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as executor:
        try:
            runs = [executor.submit(worker.run) for worker in workers]
            while concurrent.futures.wait(runs, _TICK).not_done and not is_cancelled():
                pass
        finally:
            for worker in workers:
                worker.stop()
    for run in runs:
        run.result()


def _read_reply(stream: IO[bytes]) -> bytes | None:
    """Return the next thumbnail of a worker, or None if it has ended."""
    header = stream.read(4)
    length = int.from_bytes(header)
    data = stream.read(length)
    return data if len(header) == 4 and len(data) == length else None


def read_source(thumbnail: Path) -> Source | None:
    header = b""
    with contextlib.suppress(OSError), thumbnail.open("rb") as file:
        header = file.read(_HEADER_LENGTH)
    return Source.parse(header)


def file_version(path: Path) -> tuple[int, int] | None:
    """Return the size and modification time of a regular file, or None if it is something else, or doesn't exist."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
