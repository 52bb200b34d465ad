"""Input images: which sources are accepted and how they are sent, and the errors about those that are refused."""

import base64
import codecs
import gc
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote_from_bytes

import pytest
from support.responses import picture

from flux2max_async import GeneratedImage, GenerationRequest, InputImage, InvalidRequestError
from flux2max_async._api.codec import build_submit

PNG = picture("PNG")
KINDS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20_000_000


def sent_params(request: GenerationRequest) -> dict[str, Any]:
    """Return the parameters in the body of the submit."""
    body = build_submit(request).body
    assert body is not None
    return json.loads(body)["input"][0]["params"]  # type: ignore[no-any-return]


def generated(url: str, index: int = 0) -> GeneratedImage:
    return GeneratedImage(url=url, type="image", task_id="t1", index=index)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image_error(source: object) -> InvalidRequestError:
    """Return the error about an image, which is raised when it is created or when it is read."""
    with pytest.raises(InvalidRequestError) as caught:
        InputImage(source).encode()  # type: ignore[arg-type]
    return caught.value


# ---------------------------------------------------------------------- valid images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "source",
    [
        lambda data, _: data,
        lambda data, _: bytearray(data),
        lambda data, _: memoryview(data),
        lambda data, _: io.BytesIO(data),
        lambda data, path: path,
        lambda data, path: CustomPath(path),
        lambda data, _: "data:image/png;base64," + base64_of(data),
        lambda data, _: "DATA:;BASE64," + base64_of(data),
        lambda data, _: "data:image/x;charset=u;base64," + base64_of(data).replace("+", "%2B").replace("=", "%3D"),
        lambda data, _: "data:image/png;base64,\n" + "\n ".join(base64_of(data)[i : i + 8] for i in range(0, 999, 8)),
        lambda data, _: "data:image/png," + quote_from_bytes(data),
        lambda data, _: InputImage(data),
        lambda data, _: InputImage.from_base64(base64_of(data)),
        lambda data, _: InputImage.from_base64(base64.encodebytes(data).decode()),
    ],
    ids=[
        *("bytes", "bytearray", "memoryview", "file in memory", "path", "other PathLike", "data", "DATA"),
        *("data with escapes", "data in lines", "data in percents", "InputImage", "base64", "base64 in lines"),
    ],
)
def test_a_local_image_is_sent_as_base64(source: Callable[[bytes, Path], Any], kind: str, tmp_path: Path) -> None:
    """Whatever the source of a PNG, JPEG, WebP or GIF, exactly its bytes are sent, as base64 without a prefix."""
    data = picture(kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    request = GenerationRequest("a lighthouse", input_images=[source(data, path)])

    assert sent_params(request)["input_image"] == base64_of(data)


@pytest.mark.parametrize(
    "url",
    [
        "https://pictures.example/a.png",
        "HTTP://pictures.example",
        "http://127.0.0.1:8000/a?token=x%20y#z",
        "https://pictures.example/ä.png",
    ],
)
def test_a_url_is_sent_unchanged(url: str) -> None:
    """The service downloads images on the web itself."""
    request = GenerationRequest("a lighthouse", input_images=[url])

    assert sent_params(request)["input_image"] == url
    assert request.input_images[0].source == url


def test_eight_images_are_sent_in_order() -> None:
    """Input images are sent under the service's eight names, in the caller's order and without gaps."""
    urls = [f"https://pictures.example/{number}.png" for number in range(8)]
    params = sent_params(GenerationRequest("a lighthouse", input_images=iter(urls)))  # type: ignore[arg-type]

    assert params == {"prompt": "a lighthouse", "input_image": urls[0]} | {
        f"input_image_{number + 1}": urls[number] for number in range(1, 8)
    }


def test_a_path_is_read_when_the_request_is_sent(tmp_path: Path) -> None:
    """A request with a path holds no bytes: the file may be created later, and is read each time."""
    path = tmp_path / "later.png"
    request = GenerationRequest("a lighthouse", input_images=[path])
    path.write_bytes(PNG)
    first = sent_params(request)["input_image"]
    path.write_bytes(picture("GIF"))
    second = sent_params(request)["input_image"]

    assert request.input_images[0].source == path
    assert (first, second) == (base64_of(PNG), base64_of(picture("GIF")))


def test_an_open_file_is_read_when_the_request_is_created(tmp_path: Path) -> None:
    """An open file is read immediately, so the caller can close it; it is not closed by the request."""
    path = tmp_path / "open.png"
    path.write_bytes(PNG)
    with path.open("rb") as file:
        request = GenerationRequest("a lighthouse", input_images=[file])
        closed = file.closed
    path.unlink()

    assert not closed
    assert sent_params(request)["input_image"] == base64_of(PNG)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_raw_file_is_read_to_its_end(size: int) -> None:
    """A raw file may return fewer bytes than requested; the whole image is sent all the same."""
    image = InputImage(ShortReads(PNG, size))  # type: ignore[arg-type]

    assert image.encode() == base64_of(PNG)


class CustomPath:
    """A PathLike that is not a pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


class ShortReads(io.RawIOBase):
    """A raw file that returns a few bytes at a time, as sockets and pipes do."""

    def __init__(self, data: bytes, size: int) -> None:
        self._remaining = data
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._remaining[: min(len(buffer), self._size)]
        self._remaining = self._remaining[len(chunk) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


@pytest.mark.parametrize(
    ("data", "valid"),
    [(PNG.ljust(MAX_BYTES, b"\0"), True), (PNG.ljust(MAX_BYTES + 1, b"\0"), False)],
    ids=["20 MB", "a byte more"],
)
@pytest.mark.parametrize("kind", ["bytes", "file", "path", "base64"])
def test_an_image_has_at_most_20_megabytes(data: bytes, valid: bool, kind: str, tmp_path: Path) -> None:
    """An image of exactly 20 MB is sent, and one with a byte more is refused, whatever its source."""
    path = tmp_path / "large.png"
    if kind == "path":
        path.write_bytes(data)
    source: object = {"bytes": data, "file": io.BytesIO(data), "path": path, "base64": None}[kind]
    message = ""
    try:
        image = InputImage.from_base64(base64_of(data)) if source is None else InputImage(source)  # type: ignore[arg-type]
        image.encode()
    except InvalidRequestError as error:
        message = str(error)

    assert message == "" if valid else "larger than 20 MB" in message


# ---------------------------------------------------------------------- invalid images


NOT_IMAGES = {
    "empty": (b"", "empty"),
    "text": (b"a lighthouse", "not a PNG, JPEG, WebP or GIF"),
    "a bitmap": (picture("BMP"), "not a PNG, JPEG, WebP or GIF"),
    "a TIFF": (picture("TIFF"), "not a PNG, JPEG, WebP or GIF"),
    "a sound": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not a PNG, JPEG, WebP or GIF"),
    "half a signature": (PNG[:4], "not a PNG, JPEG, WebP or GIF"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG, WebP or GIF"),
}


@pytest.mark.parametrize(("data", "text"), NOT_IMAGES.values(), ids=NOT_IMAGES)
@pytest.mark.parametrize(
    "source",
    [
        lambda data, _: data,
        lambda data, _: io.BytesIO(data),
        lambda _, path: path,
        lambda data, _: "data:image/png;base64," + base64_of(data),
        lambda data, _: "data:," + quote_from_bytes(data),
    ],
    ids=["bytes", "file in memory", "path", "data", "data in percents"],
)
def test_data_of_another_type_is_refused(
    source: Callable[[bytes, Path], Any], data: bytes, text: str, tmp_path: Path
) -> None:
    """Data of a type that the service doesn't accept is refused before anything is sent, whatever its file name."""
    path = tmp_path / "image.png"
    path.write_bytes(data)
    error = image_error(source(data, path))

    assert error.field == "input_images"
    assert text in str(error)


@pytest.mark.parametrize(
    ("brand", "name"),
    [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"hevc", "HEIC"), (b"avif", "AVIF"), (b"avis", "AVIF")],
)
def test_formats_of_phones_are_named(brand: bytes, name: str) -> None:
    """The error about a photo in a format that the service doesn't accept names the format and what to do."""
    error = image_error(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0")

    assert str(error) == f"the image passed as bytes: {name} is not accepted: convert to PNG or JPEG"
    assert "is not a PNG, JPEG, WebP or GIF" in str(image_error(b"\0\0\0\x18ftypmp42\0\0\0\0"))


def test_a_file_that_stands_at_its_end() -> None:
    """The error about a file that was just written, or read before, names the remedy."""
    file = io.BytesIO()
    file.write(PNG)

    assert str(image_error(file)) == "the open file is at its end: call seek(0) first"
    file.seek(0)
    assert InputImage(file).source == PNG
    assert "is empty" in str(image_error(io.BytesIO()))
    assert "is empty" in str(image_error(Endless()))


class Endless:
    """A file without tell()."""

    def read(self, size: int = -1) -> bytes:
        return b""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    """Opening a pipe would block, and a folder can't be read."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(InvalidRequestError, match="is not a regular file"):
            InputImage(path).encode()


def test_a_missing_file_is_an_error_with_index_and_path(tmp_path: Path) -> None:
    """The error names the missing file and the image's index."""
    request = GenerationRequest("a lighthouse", input_images=[PNG, tmp_path / "missing.png"])

    with pytest.raises(InvalidRequestError) as caught:
        build_submit(request)

    assert caught.value.field == "input_images"
    assert str(caught.value).startswith("input_images[1]: ")
    assert "missing.png" in str(caught.value)
    assert "No such file" in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A path that can't be read as a file is an InvalidRequestError."""
    error = image_error(tmp_path)

    assert error.field == "input_images"
    assert tmp_path.name in str(error)


def test_a_path_with_a_null_character_is_refused() -> None:
    """An impossible path, for which Python raises a ValueError instead of an OSError, is an InvalidRequestError too."""
    error = image_error(Path("image\0.png"))

    assert error.field == "input_images"
    assert r"image\x00.png" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "image.png",
            "./image.png",
            "file://image.png",
            "ftp://pictures.example/a.png",
            "//pictures.example/a",
        ),
        *("https://", "https:image.png", "http:///image.png", "https://[::1/a", "https://pictures.example/a b.png"),
        *(
            "\x01https://pictures.example/a.png",
            "https://pictures.example/\x00a.png",
            " https://pictures.example/a.png",
        ),
    ],
)
def test_a_string_is_never_a_path(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text from a web form can't make the library read a file of the server, even if the file exists."""
    (tmp_path / "image.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError) as caught:
        InputImage(text)

    assert caught.value.field == "input_images"
    assert "pathlib.Path" in str(caught.value)


def test_an_absolute_path_as_text_is_refused(tmp_path: Path) -> None:
    """The absolute path of an existing image is not read if it is text, plain or as a file: URL."""
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    errors = [image_error(str(path)), image_error(path.as_uri())]

    assert all("pathlib.Path" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("data:", "comma"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,iVBOR", "base64"),
        ("data:image/png;base64,iVBO*w0K", "base64"),
        ("data:image/png;base64,ïVBORw0K", "base64"),
        ("data:image/png;base64,%FF%FE%FD%FC", "base64"),
    ],
)
def test_an_invalid_data_uri_is_refused(uri: str, text: str) -> None:
    """The error explains what is wrong with the data: URI."""
    error = image_error(uri)

    assert error.field == "input_images"
    assert text in str(error)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", "empty"),
        ("not base64!", "base64"),
        ("aGVsbG8", "base64"),
        (base64_of(b"hello"), "not a PNG"),
        (None, "NoneType"),
        (7, "int"),
        (base64.b64encode(b"hello"), "bytes"),
    ],
    ids=["empty", "words", "no padding", "not an image", "None", "a number", "bytes"],
)
def test_invalid_base64_is_refused(value: Any, text: str) -> None:
    """The error explains why a value is not the base64 text of an image; the bytes that b64encode returns are not text."""
    with pytest.raises(InvalidRequestError) as caught:
        InputImage.from_base64(value)

    assert caught.value.field == "input_images"
    assert text in str(caught.value)
    assert "attribute" not in str(caught.value)


@pytest.mark.parametrize("data", [PNG, b"GIF89a"], ids=["a real image", "an image that is valid text"])
@pytest.mark.parametrize(
    "opened",
    [
        lambda path: path.open(encoding="utf-8"),
        lambda path: codecs.getreader("utf-8")(path.open("rb")),
        lambda path: FileWrapper(path.open(encoding="utf-8")),
    ],
    ids=["open", "codecs", "wrapper"],
)
def test_a_file_opened_as_text_is_refused_with_advice(
    opened: Callable[[Path], Any], data: bytes, tmp_path: Path
) -> None:
    """The error about a file in text mode names the right mode, however it was opened, and whatever its bytes are."""
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with opened(path) as file:
        error = image_error(file)

    assert "'rb'" in str(error)
    assert "image.png" in str(error)


class FileWrapper:
    """A file in another object, as tempfile returns it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.name = file.name

    def read(self, size: int = -1) -> str:
        return self._file.read(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def test_an_asynchronous_file_is_refused() -> None:
    """The error about a file whose read() is a coroutine function says so, and no coroutine is left unawaited."""

    class Upload:
        async def read(self, size: int = -1) -> bytes:
            return PNG[:size]

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        message = str(image_error(Upload()))
        gc.collect()

    assert "text" not in message
    assert "await" in message
    assert [str(warning.message) for warning in warned] == []


def test_a_closed_file_is_refused() -> None:
    """A file that is already closed is an InvalidRequestError."""
    file = io.BytesIO(PNG)
    file.close()
    error = image_error(file)

    assert error.field == "input_images"
    assert "closed" in str(error)


def test_a_file_that_cannot_be_read_is_refused() -> None:
    """A disk failure while an open file is read is an InvalidRequestError, and the OSError is its cause."""

    class Broken(io.BytesIO):
        name = "broken.png"

        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    error = image_error(Broken())

    assert "broken.png" in str(error)
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize("source", [7, 1.5, object(), None, ["https://pictures.example/a.png"], Path])
def test_a_source_of_another_type_is_refused(source: object) -> None:
    """The error about a source that is neither URL, path, bytes nor file names its type and the valid ones."""
    error = image_error(source)

    assert error.field == "input_images"
    assert type(source).__name__ in str(error)
    assert "pathlib.Path" in str(error)


@pytest.mark.parametrize(
    "source",
    [
        "https://pictures.example/a.png",
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        Path("image.png"),
        InputImage(PNG),
        io.BytesIO(PNG),
        io.BytesIO(picture("JPEG").replace(b"\n", b"\r")),
    ],
    ids=["URL", "bytes", "bytearray", "memoryview", "path", "InputImage", "file", "file of one line"],
)
def test_a_single_image_must_be_in_a_list(source: Any) -> None:
    """A single image instead of a list is refused, and not iterated as characters, bytes or lines."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", input_images=source)

    assert caught.value.field == "input_images"
    assert "list" in str(caught.value)


def test_an_invalid_image_is_an_error_with_its_index() -> None:
    """The error about one of several images names its index."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", input_images=[PNG, PNG, b"not an image"])

    assert str(caught.value).startswith("input_images[2]: ")
    assert caught.value.field == "input_images"


# ---------------------------------------------------------------------- the image as a value


def test_images_with_equal_sources_are_equal() -> None:
    """Images are compared and hashed by their source."""
    images = {InputImage(PNG), InputImage(PNG), InputImage(Path("a.png")), InputImage("https://a.example/")}

    assert images == {InputImage(io.BytesIO(PNG)), InputImage(Path("a.png")), InputImage("https://a.example/")}


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (PNG, f"InputImage(<{len(PNG)} bytes>)"),
        (Path("a.png"), "InputImage('a.png')"),
        ("https://a.example/a.png", "InputImage('https://a.example/a.png')"),
        (f"https://a.example/{'a' * 2000}", f"InputImage('https://a.example/{'a' * 82}... (2018 characters)')"),
        (generated("https://a.example/a.png", index=2), "InputImage(<image 2 of task 't1'>)"),
    ],
    ids=["bytes", "path", "URL", "signed URL", "generated"],
)
def test_the_repr_of_an_image_shows_its_source(source: Any, shown: str) -> None:
    """The repr of an image names its URL or path, or the number of its bytes."""
    image = InputImage(source)

    assert repr(image) == shown


def test_an_image_on_the_web_cannot_be_read() -> None:
    """Only local images can be read."""
    for source in ("https://pictures.example/a.png", generated("https://pictures.example/a.png")):
        with pytest.raises(InvalidRequestError, match="is a URL, not a local image"):
            InputImage(source).read()


# ---------------------------------------------------------------------- generated images


def test_a_generated_image_is_sent_as_its_url() -> None:
    """The image of a task is an input image: sent as its URL, or as its bytes if the service sent it inline."""
    sources = [generated("https://a.example/0"), generated(f"data:image/png;base64,{base64_of(PNG)}")]
    request = GenerationRequest("a lighthouse", input_images=sources)

    assert [image.is_local for image in request.input_images] == [False, True]
    assert [InputImage(source).is_local for source in ("https://a.example/", PNG, Path("a.png"))] == [False, True, True]
    assert [image.source for image in request.input_images] == sources
    assert sent_params(request)["input_image"] == "https://a.example/0"
    assert sent_params(request)["input_image_2"] == base64_of(PNG)


@pytest.mark.parametrize("url", ["javascript:alert(1)", "file:///etc/passwd", ""])
def test_a_generated_image_with_a_strange_url_is_refused(url: str) -> None:
    """A generated image has an http(s) URL, or none yet."""
    assert "is no http(s) URL" in str(image_error(generated(url)))


def test_a_single_generated_image_is_refused() -> None:
    """Even a single image has to be in a list."""
    with pytest.raises(InvalidRequestError, match="must be a list"):
        GenerationRequest("a lighthouse", input_images=generated("https://a.example/0"))  # type: ignore[arg-type]
