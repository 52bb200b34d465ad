"""Requests and their reference pictures: what is taken, what is refused, and in which words."""

import base64
import codecs
import contextlib
import copy
import gc
import io
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self
from urllib.parse import quote_from_bytes

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import picture

from flux2max_async import GenerationRequest, InputImage, InvalidRequestError, OutputFormat
from flux2max_async._api.codec import build_submit
from flux2max_async._models.request import as_request

PNG = picture("PNG")
KINDS = ("PNG", "JPEG", "WEBP", "GIF")
SECRET = "hush-7f3a9c"
LIMIT = 20_000_000

EVERYTHING: dict[str, Any] = {
    "input_images": ["https://pictures.example/a.png", PNG],
    "seed": 7,
    "width": 1024,
    "height": 768,
    "safety_tolerance": 2,
    "output_format": "png",
    "webhook_url": "https://app.example/hook",
    "webhook_secret": SECRET,
    "extra": {"prompt_upsampling": True},
    "key": "row 1",
}
"""Every parameter but the prompt."""


def sent(request: GenerationRequest) -> dict[str, Any]:
    """Give the parameters that go over the wire."""
    body = build_submit(request).body
    assert body is not None
    return json.loads(body)["input"][0]["params"]  # type: ignore[no-any-return]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refusal(source: object) -> InvalidRequestError:
    """Give the error with which a picture is refused, be it when it is built or when it is read."""
    with pytest.raises(InvalidRequestError) as caught:
        InputImage(source).encode()  # type: ignore[arg-type]
    return caught.value


# ---------------------------------------------------------------------- the request as a value


def test_a_prompt_is_enough() -> None:
    """A request of a prompt alone leaves everything else to the service."""
    request = GenerationRequest("a lighthouse")

    assert request.prompt == "a lighthouse"
    assert request.input_images == ()
    assert request.extra == {}
    assert all(
        getattr(request, field.name) is None
        for field in attrs.fields(GenerationRequest)
        if field.name not in {"prompt", "input_images", "extra"}
    )


def test_every_parameter_is_kept_as_it_was_given() -> None:
    """What was asked for can be read back from the request."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)

    assert [image.source for image in request.input_images] == EVERYTHING["input_images"]
    assert {name: getattr(request, name) for name in EVERYTHING if name != "input_images"} == {
        name: value for name, value in EVERYTHING.items() if name != "input_images"
    }


def test_only_the_prompt_is_positional() -> None:
    """Nobody has to remember whether the width comes before the height."""
    with pytest.raises(TypeError, match="positional"):
        GenerationRequest("a lighthouse", 7)  # type: ignore[call-arg,arg-type]


@pytest.mark.parametrize("name", ["prompt", *EVERYTHING])
def test_a_request_cannot_be_changed(name: str) -> None:
    """No field of a request can be set, so that a request in flight says what was sent."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)

    with pytest.raises(AttributeError):
        setattr(request, name, getattr(request, name))


def test_equal_fields_make_equal_requests() -> None:
    """Two requests with equal fields are equal and have one hash, so that they can be keys."""
    one, two = GenerationRequest("a lighthouse", **EVERYTHING), GenerationRequest("a lighthouse", **EVERYTHING)

    assert one == two
    assert hash(one) == hash(two)
    assert {one: "drawn"}[two] == "drawn"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a windmill"},
        {"input_images": []},
        {"seed": 8},
        {"width": 512},
        {"height": None},
        {"safety_tolerance": 0},
        {"output_format": "jpeg"},
        {"webhook_url": None},
        {"webhook_secret": "another"},
        {"extra": {"prompt_upsampling": False}},
        {"key": "row 2"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_different_field_makes_a_different_request(change: dict[str, Any]) -> None:
    """Every field counts when requests are compared."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)
    other = attrs.evolve(request, **change)

    assert other != request


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda request: pickle.loads(pickle.dumps(request))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_request_survives_copying(copied: Callable[[GenerationRequest], GenerationRequest]) -> None:
    """A request that went to another process and back is equal to the one that stayed."""
    images = [Path("local.png"), *EVERYTHING["input_images"]]
    request = GenerationRequest("a lighthouse", **{**EVERYTHING, "input_images": images})
    twin = copied(request)

    assert twin == request
    assert hash(twin) == hash(request)


def test_the_secret_is_not_shown() -> None:
    """A request's repr shows what was asked for, and not the webhook's secret."""
    shown = repr(GenerationRequest("a lighthouse", **EVERYTHING))

    assert "a lighthouse" in shown
    assert "row 1" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("secret", [SECRET.encode(), [SECRET], {SECRET: SECRET}], ids=["bytes", "list", "dict"])
def test_a_wrong_secret_is_refused_without_showing_it(secret: object) -> None:
    """The error about a secret of the wrong type tells the type and keeps the secret."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", webhook_secret=secret)  # type: ignore[arg-type]
    told = f"{caught.value!r} {caught.value} {pickle.dumps(caught.value)!r}"

    assert caught.value.field == "webhook_secret"
    assert SECRET not in told
    assert type(secret).__name__ in str(caught.value)


# ---------------------------------------------------------------------- what sessions accept


def test_a_prompt_and_its_parameters_make_a_request() -> None:
    """A session that is given a prompt and parameters asks for the same as with the request that they make."""
    request = as_request("a lighthouse", **EVERYTHING)

    assert request == GenerationRequest("a lighthouse", **EVERYTHING)


def test_a_request_alone_is_taken_as_it_is() -> None:
    """A request that is given to a session without further parameters is that very request."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)

    assert as_request(request) is request


def test_parameters_beside_a_request_replace_its_own() -> None:
    """Parameters that are given beside a request change a copy of it, checked anew, and leave the request alone."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)
    changed = as_request(request, seed=8, width=None)

    assert (changed.seed, changed.width, request.seed, request.width) == (8, None, 7, 1024)
    assert changed == GenerationRequest("a lighthouse", **{**EVERYTHING, "seed": 8, "width": None})
    with pytest.raises(InvalidRequestError, match="width must be at least 64"):
        as_request(request, width=1)


@pytest.mark.parametrize("given", [None, 7, b"a lighthouse", ["a lighthouse"], {"prompt": "a lighthouse"}], ids=repr)
def test_what_is_no_request_is_refused(given: Any) -> None:
    """What is neither a prompt nor a request is refused by its type."""
    with pytest.raises(InvalidRequestError) as caught:
        as_request(given)

    assert caught.value.field == "request"
    assert type(given).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "request_or_prompt", ["a lighthouse", GenerationRequest("a lighthouse")], ids=["text", "request"]
)
def test_a_misspelt_parameter_is_told(request_or_prompt: str | GenerationRequest) -> None:
    """A parameter that doesn't exist is the TypeError that Python has for it, with its name."""
    with pytest.raises(TypeError, match="widht"):
        as_request(request_or_prompt, widht=1024)


# ---------------------------------------------------------------------- the parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 0),
        ("seed", -1),
        ("seed", 2**63 - 1),
        ("width", 0),
        ("width", 64),
        ("width", 65),
        ("height", 0),
        ("height", 64),
        ("height", 4096),
        ("safety_tolerance", 0),
        ("safety_tolerance", 5),
        ("output_format", "jpeg"),
        ("output_format", "png"),
        ("output_format", OutputFormat.PNG),
        ("webhook_url", "http://app.example/"),
        ("webhook_url", "HTTPS://app.example:8443/hook?x=1#y"),
        ("webhook_url", "https://[2001:db8::1]/hook"),
        ("webhook_url", "https://app.example/" + "x" * (2083 - 20)),
        ("webhook_secret", "s"),
        ("key", "k"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_within_its_range_is_sent(name: str, value: Any) -> None:
    """Every value that the vendor's page allows is taken, and sent as it is; the caller's key is never sent."""
    params = sent(GenerationRequest("a lighthouse", **{name: value}))

    assert params == {"prompt": "a lighthouse"} | ({} if name == "key" else {name: value})


WRONG: list[tuple[str, object, str]] = [
    ("prompt", "", "blank"),
    ("prompt", " \n\t", "blank"),
    ("prompt", None, "NoneType"),
    ("prompt", b"a lighthouse", "bytes"),
    ("seed", 1.5, "1.5"),
    ("seed", "7", "'7'"),
    ("seed", True, "True"),
    ("width", 63, "63"),
    ("width", 1, "64"),
    ("width", -64, "-64"),
    ("width", 1024.0, "1024.0"),
    ("width", False, "False"),
    ("height", 63, "63"),
    ("height", "768", "'768'"),
    ("safety_tolerance", -1, "-1"),
    ("safety_tolerance", 6, "5"),
    ("safety_tolerance", 2.0, "2.0"),
    ("output_format", "webp", "'webp'"),
    ("output_format", "PNG", "'png'"),
    ("output_format", "", "''"),
    ("output_format", ["png"], "['png']"),
    ("webhook_url", "", "''"),
    ("webhook_url", "app.example/hook", "http(s)"),
    ("webhook_url", "ftp://app.example/hook", "ftp"),
    ("webhook_url", "https://", "https://"),
    ("webhook_url", "https:///hook", "https:///hook"),
    ("webhook_url", "https://[::1/hook", "[::1"),
    ("webhook_url", "https://app.example/a b", "a b"),
    ("webhook_url", "https://app.example/hook\n", r"\n"),
    ("webhook_url", "\x00https://app.example/hook", r"\x00"),
    ("webhook_url", "https://app.example/\x07hook", r"\x07"),
    ("webhook_url", b"https://app.example/hook", "b'https"),
    ("webhook_url", "https://app.example/" + "x" * (2084 - 20), "2084"),
    ("webhook_secret", "", "empty"),
    ("webhook_secret", 7, "text"),
    ("key", "", "empty"),
    ("key", 7, "int"),
    ("extra", None, "NoneType"),
    ("extra", [("a", 1)], "list"),
    ("extra", {7: 1}, "7"),
    ("extra", {"a": {1, 2}}, "set"),
    ("extra", {"a": float("nan")}, "JSON"),
    ("extra", {"a": 10**5000}, "JSON"),
    ("input_images", None, "list"),
    ("input_images", 7, "list"),
    ("input_images", [7], "int"),
    ("input_images", [PNG] * 9, "9"),
]
"""A parameter, a value that it can't have, and what the error must say."""


@pytest.mark.parametrize(("name", "value", "fault"), WRONG, ids=[f"{name} {fault}" for name, _, fault in WRONG])
def test_a_wrong_value_is_refused_by_name(name: str, value: object, fault: str) -> None:
    """The error names the parameter in `field` and in its text, and tells what is wrong with the value."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest(**{"prompt": "a lighthouse", name: value})  # type: ignore[arg-type]

    assert caught.value.field == name
    assert fault in str(caught.value)
    assert name in str(caught.value) or name == "input_images"


@pytest.mark.parametrize("name", ["seed", "width", "height"])
@pytest.mark.parametrize("sign", [1, -1], ids=["huge", "hugely negative"])
def test_a_number_that_cannot_be_written_down_is_refused(name: str, sign: int) -> None:
    """An integer with more digits than Python writes is the request's error, not a ValueError of the submit."""
    with pytest.raises(InvalidRequestError) as caught:
        sent(GenerationRequest("a lighthouse", **{name: sign * 10**5000}))  # type: ignore[arg-type]

    assert caught.value.field == name


@pytest.mark.parametrize("name", ["seed", "width", "safety_tolerance", "output_format", "webhook_url"])
def test_an_error_stays_readable_when_the_value_is_long(name: str) -> None:
    """A megabyte given for a small parameter, a picture perhaps, doesn't make an error of a megabyte."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", **{name: "x" * 1_000_000})  # type: ignore[arg-type]

    assert caught.value.field == name
    assert len(str(caught.value)) < 500


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(object),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", *EVERYTHING]), ANYTHING, max_size=3))
def test_anything_is_taken_or_refused_in_our_words(params: dict[str, Any]) -> None:
    """Whatever the values are, the request can be sent, or an InvalidRequestError names one of them."""
    try:
        body = sent(GenerationRequest(**({"prompt": "a lighthouse"} | params)))
    except InvalidRequestError as error:
        refused: str | None = error.field
        body = {}
    else:
        refused = None

    assert refused is None or refused in params
    assert None not in body.values()


# ---------------------------------------------------------------------- further parameters


@pytest.mark.parametrize(
    "name",
    [
        *("prompt", "model", "seed", "width", "height", "safety_tolerance", "output_format"),
        *("webhook_url", "webhook_secret", "input_image", "input_image_2", "input_image_8"),
    ],
)
def test_extra_cannot_shadow_a_parameter(name: str) -> None:
    """A parameter that the library knows, be it set or not, can't come in by the back door."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", extra={name: None})

    assert caught.value.field == "extra"
    assert repr(name) in str(caught.value)


def test_extra_is_sent_by_name() -> None:
    """Parameters that only the service knows are sent as they are; None isn't sent."""
    extra = {"prompt_upsampling": True, "loras": [{"name": "ink", "weight": 0.5}], "nothing": None, "key": "theirs"}
    params = sent(GenerationRequest("a lighthouse", extra=MappingProxyType(extra), key="mine"))

    assert params == {
        "prompt": "a lighthouse",
        "prompt_upsampling": True,
        "loras": [{"name": "ink", "weight": 0.5}],
        "key": "theirs",
    }


def test_later_changes_to_extra_do_not_reach_the_request() -> None:
    """A request that is built keeps its parameters, whatever the caller does to the mapping afterwards."""
    loras = ["ink"]
    extra = {"loras": loras}
    request = GenerationRequest("a lighthouse", extra=extra)
    loras.append("oil")
    extra["styles"] = ["oil"]

    assert sent(request) == {"prompt": "a lighthouse", "loras": ["ink"]}


def test_extra_cannot_be_changed_through_the_request() -> None:
    """What the request gives out of `extra` is no handle to change it with."""
    request = GenerationRequest("a lighthouse", extra={"loras": ["ink"], "style": {"name": "ink"}})
    with contextlib.suppress(AttributeError, TypeError):
        request.extra["loras"].append("oil")
    with contextlib.suppress(AttributeError, TypeError):
        request.extra["style"]["name"] = "oil"
    with contextlib.suppress(AttributeError, TypeError):
        request.extra["steps"] = 4  # type: ignore[index]

    assert sent(request) == {"prompt": "a lighthouse", "loras": ["ink"], "style": {"name": "ink"}}


def test_extra_reads_like_a_dict() -> None:
    """`extra` has the names, the length, the values and the looks of the mapping that was given."""
    request = GenerationRequest("a lighthouse", extra={"steps": 4, "guidance": 2.5})

    assert dict(request.extra) == {"steps": 4, "guidance": 2.5}
    assert len(request.extra) == 2
    assert repr(request.extra) == "{'steps': 4, 'guidance': 2.5}"
    assert request.extra == {"guidance": 2.5, "steps": 4}


def test_extra_too_deep_to_be_sent_is_refused() -> None:
    """A mapping that contains itself is found when the request is built."""
    extra: dict[str, Any] = {}
    extra["self"] = extra

    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", extra=extra)

    assert caught.value.field == "extra"


@pytest.mark.parametrize(("levels", "right"), [(100, True), (101, False), (900, False), (100_000, False)])
def test_extra_is_nested_no_deeper_than_it_can_be_kept(levels: int, right: bool) -> None:
    """A hundred levels of JSON can be sent, copied and written down; more is refused when the request is built."""
    value: Any = 1
    for _ in range(levels - 1):
        value = [value]
    refused = contextlib.nullcontext() if right else pytest.raises(InvalidRequestError, match="extra must ")
    with refused:
        assert GenerationRequest("a lighthouse", extra={"deep": value}).extra["deep"] == value


# ---------------------------------------------------------------------- pictures that are taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "source",
    [
        lambda data, _: data,
        lambda data, _: bytearray(data),
        lambda data, _: memoryview(data),
        lambda data, _: io.BytesIO(data),
        lambda data, path: path,
        lambda data, path: Somewhere(path),
        lambda data, _: "data:image/png;base64," + encoded(data),
        lambda data, _: "DATA:;BASE64," + encoded(data),
        lambda data, _: "data:image/x;charset=u;base64," + encoded(data).replace("+", "%2B").replace("=", "%3D"),
        lambda data, _: "data:image/png;base64,\n" + "\n ".join(encoded(data)[i : i + 8] for i in range(0, 999, 8)),
        lambda data, _: "data:image/png," + quote_from_bytes(data),
        lambda data, _: InputImage(data),
        lambda data, _: InputImage.from_base64(encoded(data)),
        lambda data, _: InputImage.from_base64(base64.encodebytes(data).decode()),
    ],
    ids=[
        *("bytes", "bytearray", "memoryview", "file in memory", "path", "other PathLike", "data", "DATA"),
        *("data with escapes", "data in lines", "data in percents", "InputImage", "base64", "base64 in lines"),
    ],
)
def test_a_picture_is_sent_as_base64(source: Callable[[bytes, Path], Any], kind: str, tmp_path: Path) -> None:
    """From wherever a PNG, JPEG, WebP or GIF comes, its very bytes are sent, as base64 without a prefix."""
    data = picture(kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    request = GenerationRequest("a lighthouse", input_images=[source(data, path)])

    assert sent(request)["input_image"] == encoded(data)


@pytest.mark.parametrize(
    "url",
    [
        "https://pictures.example/a.png",
        "HTTP://pictures.example",
        "http://127.0.0.1:8000/a?token=x%20y#z",
        "https://pictures.example/ä.png",
    ],
)
def test_a_url_is_sent_as_it_is(url: str) -> None:
    """The service fetches what is on the web itself."""
    request = GenerationRequest("a lighthouse", input_images=[url])

    assert sent(request)["input_image"] == url
    assert request.input_images[0].source == url


def test_eight_pictures_are_sent_in_order() -> None:
    """Reference pictures go out under the service's eight names, in the caller's order and without holes."""
    urls = [f"https://pictures.example/{number}.png" for number in range(8)]
    params = sent(GenerationRequest("a lighthouse", input_images=iter(urls)))  # type: ignore[arg-type]

    assert params == {"prompt": "a lighthouse", "input_image": urls[0]} | {
        f"input_image_{number + 1}": urls[number] for number in range(1, 8)
    }


def test_a_path_is_read_when_the_request_is_sent(tmp_path: Path) -> None:
    """A request with a path costs no memory when it is built: the file may even come later, and is read each time."""
    path = tmp_path / "later.png"
    request = GenerationRequest("a lighthouse", input_images=[path])
    path.write_bytes(PNG)
    first = sent(request)["input_image"]
    path.write_bytes(picture("GIF"))
    second = sent(request)["input_image"]

    assert request.input_images[0].source == path
    assert (first, second) == (encoded(PNG), encoded(picture("GIF")))


def test_an_open_file_is_read_when_the_request_is_built(tmp_path: Path) -> None:
    """An open file is read at once, so that it may be closed, and stays open, since it is the caller's."""
    path = tmp_path / "open.png"
    path.write_bytes(PNG)
    with path.open("rb") as file:
        request = GenerationRequest("a lighthouse", input_images=[file])
        closed = file.closed
    path.unlink()

    assert not closed
    assert sent(request)["input_image"] == encoded(PNG)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_file_that_comes_in_pieces_is_read_whole(size: int) -> None:
    """A raw file may give less than was asked for: what is sent, and paid for, is the whole picture all the same."""
    image = InputImage(InPieces(PNG, size))  # type: ignore[arg-type]

    assert image.encode() == encoded(PNG)


class Somewhere:
    """A path that is no pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


class InPieces(io.RawIOBase):
    """A raw file that gives a few bytes at a time, as sockets and pipes do."""

    def __init__(self, data: bytes, size: int) -> None:
        self._rest = data
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._rest[: min(len(buffer), self._size)]
        self._rest = self._rest[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize(
    ("data", "taken"),
    [(PNG.ljust(LIMIT, b"\0"), True), (PNG.ljust(LIMIT + 1, b"\0"), False)],
    ids=["20 MB", "a byte more"],
)
@pytest.mark.parametrize("way", ["bytes", "file", "path", "base64"])
def test_twenty_megabytes_are_the_limit(data: bytes, taken: bool, way: str, tmp_path: Path) -> None:
    """A picture of exactly 20 MB is sent, and one with a byte more is refused, whichever way it comes."""
    path = tmp_path / "large.png"
    if way == "path":
        path.write_bytes(data)
    source: object = {"bytes": data, "file": io.BytesIO(data), "path": path, "base64": None}[way]
    message = ""
    try:
        image = InputImage.from_base64(encoded(data)) if source is None else InputImage(source)  # type: ignore[arg-type]
        image.encode()
    except InvalidRequestError as error:
        message = str(error)

    assert message == "" if taken else "larger than 20 MB" in message


# ---------------------------------------------------------------------- pictures that are refused


NO_PICTURES = {
    "empty": (b"", "empty"),
    "text": (b"a lighthouse", "not a PNG, JPEG, WebP or GIF"),
    "a bitmap": (picture("BMP"), "not a PNG, JPEG, WebP or GIF"),
    "a TIFF": (picture("TIFF"), "not a PNG, JPEG, WebP or GIF"),
    "a sound": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not a PNG, JPEG, WebP or GIF"),
    "half a signature": (PNG[:4], "not a PNG, JPEG, WebP or GIF"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG, WebP or GIF"),
}


@pytest.mark.parametrize(("data", "fault"), NO_PICTURES.values(), ids=NO_PICTURES)
@pytest.mark.parametrize(
    "source",
    [
        lambda data, _: data,
        lambda data, _: io.BytesIO(data),
        lambda _, path: path,
        lambda data, _: "data:image/png;base64," + encoded(data),
        lambda data, _: "data:," + quote_from_bytes(data),
    ],
    ids=["bytes", "file in memory", "path", "data", "data in percents"],
)
def test_what_is_no_picture_is_refused(
    source: Callable[[bytes, Path], Any], data: bytes, fault: str, tmp_path: Path
) -> None:
    """What the service doesn't take is refused before anything is sent, whatever it pretends to be."""
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    error = refusal(source(data, path))

    assert error.field == "input_images"
    assert fault in str(error)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes with names")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A pipe would be waited for, and a folder can't be read."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(InvalidRequestError, match="is no file"):
            InputImage(path).encode()


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    """The error tells which file is missing, and which of the request's pictures it is."""
    request = GenerationRequest("a lighthouse", input_images=[PNG, tmp_path / "nowhere.png"])

    with pytest.raises(InvalidRequestError) as caught:
        build_submit(request)

    assert caught.value.field == "input_images"
    assert str(caught.value).startswith("input_images[1]: ")
    assert "nowhere.png" in str(caught.value)
    assert "No such file" in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A path that can't be read as a file is the request's error."""
    error = refusal(tmp_path)

    assert error.field == "input_images"
    assert tmp_path.name in str(error)


def test_a_path_that_no_system_has_is_refused() -> None:
    """A path with a NUL in it, for which Python has a ValueError instead of an OSError, is the request's error too."""
    error = refusal(Path("picture\0.png"))

    assert error.field == "input_images"
    assert r"picture\x00.png" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "picture.png",
            "./picture.png",
            "file://picture.png",
            "ftp://pictures.example/a.png",
            "//pictures.example/a",
        ),
        *("https://", "https:picture.png", "http:///picture.png", "https://[::1/a", "https://pictures.example/a b.png"),
        *(
            "\x01https://pictures.example/a.png",
            "https://pictures.example/\x00a.png",
            " https://pictures.example/a.png",
        ),
    ],
)
def test_a_string_is_never_a_path(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that came in through a web form can't make the library read the server's disk, even if the file is there."""
    (tmp_path / "picture.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError) as caught:
        InputImage(text)

    assert caught.value.field == "input_images"
    assert "pathlib.Path" in str(caught.value)


def test_the_absolute_path_of_a_picture_as_text_is_refused(tmp_path: Path) -> None:
    """Not even the full path of a real picture is read when it is given as text, plain or as a file: URL."""
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    errors = [refusal(str(path)), refusal(path.as_uri())]

    assert all("pathlib.Path" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("uri", "fault"),
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
def test_a_broken_data_uri_is_refused(uri: str, fault: str) -> None:
    """The error says what is wrong with a data: URI."""
    error = refusal(uri)

    assert error.field == "input_images"
    assert fault in str(error)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        ("not base64!", "base64"),
        ("aGVsbG8", "base64"),
        (encoded(b"hello"), "not a PNG"),
        (None, "NoneType"),
        (7, "int"),
        (base64.b64encode(b"hello"), "bytes"),
    ],
    ids=["empty", "words", "no padding", "no picture", "None", "a number", "bytes"],
)
def test_wrong_base64_is_refused(text: Any, fault: str) -> None:
    """`from_base64` refuses what isn't base64 text of a picture in our words, the bytes that base64 gives included."""
    with pytest.raises(InvalidRequestError) as caught:
        InputImage.from_base64(text)

    assert caught.value.field == "input_images"
    assert fault in str(caught.value)
    assert "attribute" not in str(caught.value)


@pytest.mark.parametrize("data", [PNG, b"GIF89a"], ids=["a real picture", "a picture that happens to be text"])
@pytest.mark.parametrize(
    "opened",
    [
        lambda path: path.open(encoding="utf-8"),
        lambda path: codecs.getreader("utf-8")(path.open("rb")),
        lambda path: Wrapped(path.open(encoding="utf-8")),
    ],
    ids=["open", "codecs", "wrapper"],
)
def test_a_file_opened_as_text_is_refused_with_advice(
    opened: Callable[[Path], Any], data: bytes, tmp_path: Path
) -> None:
    """Who forgot the `b` in the mode is told so, however the file was opened, be its bytes text or not."""
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with opened(path) as file:
        error = refusal(file)

    assert "'rb'" in str(error)
    assert "picture.png" in str(error)


class Wrapped:
    """A file in another object, as tempfile gives it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.name = file.name

    def read(self, size: int = -1) -> str:
        return self._file.read(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def test_an_asynchronous_file_is_refused_as_one() -> None:
    """An upload of a web framework, whose read() must be awaited, is told from a text file, and not left unawaited."""

    class Upload:
        async def read(self, size: int = -1) -> bytes:
            return PNG[:size]

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        message = str(refusal(Upload()))
        gc.collect()

    assert "text" not in message
    assert "await" in message
    assert [str(warning.message) for warning in warned] == []


def test_a_closed_file_is_refused() -> None:
    """A file that can't be read any more is the request's error."""
    file = io.BytesIO(PNG)
    file.close()
    error = refusal(file)

    assert error.field == "input_images"
    assert "closed" in str(error)


def test_a_file_that_breaks_is_refused() -> None:
    """A disk that fails while an open file is read is the request's error, with its cause."""

    class Broken(io.BytesIO):
        name = "broken.png"

        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    error = refusal(Broken())

    assert "broken.png" in str(error)
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize("source", [7, 1.5, object(), None, ["https://pictures.example/a.png"], Path])
def test_what_is_no_source_is_refused(source: object) -> None:
    """What is neither URL, path, bytes nor file is refused by its type, with what would be right."""
    error = refusal(source)

    assert error.field == "input_images"
    assert type(source).__name__ in str(error)
    assert "pathlib.Path" in str(error)


@pytest.mark.parametrize(
    "one",
    [
        "https://pictures.example/a.png",
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        Path("picture.png"),
        InputImage(PNG),
        io.BytesIO(PNG),
        io.BytesIO(picture("JPEG").replace(b"\n", b"\r")),
    ],
    ids=["URL", "bytes", "bytearray", "memoryview", "path", "InputImage", "file", "file of one line"],
)
def test_one_picture_must_stand_in_a_list(one: Any) -> None:
    """A single picture instead of a list is refused as such, not taken apart into letters, bytes or lines."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", input_images=one)

    assert caught.value.field == "input_images"
    assert "list" in str(caught.value)


def test_a_wrong_picture_is_told_by_its_place() -> None:
    """Among several pictures, the error tells which one is wrong."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", input_images=[PNG, PNG, b"no picture"])

    assert str(caught.value).startswith("input_images[2]: ")
    assert caught.value.field == "input_images"


# ---------------------------------------------------------------------- the picture as a value


def test_pictures_with_equal_sources_are_equal() -> None:
    """Pictures can be compared and hashed by where they come from."""
    pictures = {InputImage(PNG), InputImage(PNG), InputImage(Path("a.png")), InputImage("https://a.example/")}

    assert pictures == {InputImage(io.BytesIO(PNG)), InputImage(Path("a.png")), InputImage("https://a.example/")}


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (PNG, f"InputImage(<{len(PNG)} bytes>)"),
        (Path("a.png"), "InputImage('a.png')"),
        ("https://a.example/a.png", "InputImage('https://a.example/a.png')"),
    ],
    ids=["bytes", "path", "URL"],
)
def test_a_picture_shows_where_it_comes_from(source: Any, shown: str) -> None:
    """The repr of a picture tells its source, and never megabytes of it."""
    image = InputImage(source)

    assert repr(image) == shown


def test_a_picture_on_the_web_has_no_bytes_here() -> None:
    """Only local pictures can be read."""
    with pytest.raises(InvalidRequestError, match="is on the web, not here"):
        InputImage("https://pictures.example/a.png").read()
