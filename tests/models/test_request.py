"""GenerationRequest: which values are accepted and sent, and the errors about those that are refused."""

import contextlib
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import picture

from flux2max_async import Completed, GeneratedImage, GenerationRequest, InvalidRequestError, OutputFormat
from flux2max_async._api.codec import build_submit
from flux2max_async._models.request import GenerationParams, as_request

PNG = picture("PNG")
SECRET = "hush-7f3a9c"
IMAGE = GeneratedImage(url="https://pictures.example/0.jpeg", type="image", task_id="t1")

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
"""Every parameter other than the prompt."""


def sent_params(request: GenerationRequest) -> dict[str, Any]:
    """Return the parameters in the body of the submit."""
    body = build_submit(request).body
    assert body is not None
    return json.loads(body)["input"][0]["params"]  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- the request as a value


def test_only_the_prompt_is_required() -> None:
    """All other parameters are optional, and their defaults are the service's."""
    request = GenerationRequest("a lighthouse")

    assert request.prompt == "a lighthouse"
    assert request.input_images == ()
    assert request.extra == {}
    assert all(
        getattr(request, field.name) is None
        for field in attrs.fields(GenerationRequest)
        if field.name not in {"prompt", "input_images", "extra"}
    )


def test_every_parameter_is_a_field() -> None:
    """Every parameter can be read from the request."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)

    assert [image.source for image in request.input_images] == EVERYTHING["input_images"]
    assert {name: getattr(request, name) for name in EVERYTHING if name != "input_images"} == {
        name: value for name, value in EVERYTHING.items() if name != "input_images"
    }


def test_only_the_prompt_is_positional() -> None:
    """All parameters other than the prompt are keyword-only."""
    with pytest.raises(TypeError, match="positional"):
        GenerationRequest("a lighthouse", 7)  # type: ignore[call-arg,arg-type]


@pytest.mark.parametrize("name", ["prompt", *EVERYTHING])
def test_a_request_cannot_be_changed(name: str) -> None:
    """No field of a request can be set: a request in flight is what was sent."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)

    with pytest.raises(AttributeError):
        setattr(request, name, getattr(request, name))


def test_equal_fields_make_equal_requests() -> None:
    """Two requests with equal fields are equal and have the same hash, so they can be keys of a dict."""
    first, second = GenerationRequest("a lighthouse", **EVERYTHING), GenerationRequest("a lighthouse", **EVERYTHING)

    assert first == second
    assert hash(first) == hash(second)
    assert {first: "found"}[second] == "found"


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
    """Every field is part of the comparison."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)
    other = attrs.evolve(request, **change)

    assert other != request


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda request: pickle.loads(pickle.dumps(request))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_request_survives_copying(copied: Callable[[GenerationRequest], GenerationRequest]) -> None:
    """A copied or unpickled request is equal to the original, if it has no secret."""
    images = [Path("local.png"), *EVERYTHING["input_images"]]
    request = GenerationRequest("a lighthouse", **{**EVERYTHING, "input_images": images, "webhook_secret": None})
    copy_ = copied(request)

    assert copy_ == request
    assert hash(copy_) == hash(request)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, attrs.evolve])
def test_a_copy_in_memory_has_the_secret(copied: Callable[[GenerationRequest], GenerationRequest]) -> None:
    """A copy within the process is the same request, and its secret is sent."""
    copy_ = copied(GenerationRequest("a lighthouse", **EVERYTHING))

    assert copy_ == GenerationRequest("a lighthouse", **EVERYTHING)
    assert sent_params(copy_)["webhook_secret"] == SECRET
    assert copy.copy(copy_.webhook_secret) is copy.deepcopy(copy_.webhook_secret) is copy_.webhook_secret


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value", [lambda request: request, lambda request: Completed(task_id="t1", request=request, images=(IMAGE,))]
)
def test_neither_a_pickle_nor_asdict_shows_the_secret(value: Callable[[GenerationRequest], Any], protocol: int) -> None:
    """An unpickled request has no secret, and the dict that attrs makes of one doesn't show it, be it in an outcome."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)
    pickled = pickle.dumps(value(request), protocol)

    assert SECRET.encode() not in pickled
    assert pickle.loads(pickled) == value(attrs.evolve(request, webhook_secret=None))
    assert SECRET not in f"{attrs.asdict(value(request))} {attrs.asdict(value(request), recurse=False)}"
    assert request.webhook_secret == SECRET


def test_the_repr_does_not_show_the_secret() -> None:
    """The repr of a request shows its parameters, except for the webhook's secret."""
    shown = repr(GenerationRequest("a lighthouse", **EVERYTHING))

    assert "a lighthouse" in shown
    assert "row 1" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("secret", [SECRET.encode(), [SECRET], {SECRET: SECRET}], ids=["bytes", "list", "dict"])
def test_an_invalid_secret_is_refused_without_being_shown(secret: object) -> None:
    """The error about a secret of the wrong type names the type, and neither its text nor its pickle has the secret."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", webhook_secret=secret)  # type: ignore[arg-type]
    shown = f"{caught.value!r} {caught.value} {pickle.dumps(caught.value)!r}"

    assert caught.value.field == "webhook_secret"
    assert SECRET not in shown
    assert type(secret).__name__ in str(caught.value)


# ---------------------------------------------------------------------- as_request


def test_a_prompt_and_its_parameters_make_a_request() -> None:
    """A prompt and parameters make the same request as GenerationRequest itself."""
    request = as_request("a lighthouse", **EVERYTHING)

    assert request == GenerationRequest("a lighthouse", **EVERYTHING)


def test_a_request_without_parameters_is_returned_as_it_is() -> None:
    """A request without further parameters is not copied."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)

    assert as_request(request) is request


def test_parameters_replace_those_of_a_copied_request() -> None:
    """Further parameters are set in a copy of the request, which is validated again; the request doesn't change."""
    request = GenerationRequest("a lighthouse", **EVERYTHING)
    changed = as_request(request, seed=8, width=None)

    assert (changed.seed, changed.width, request.seed, request.width) == (8, None, 7, 1024)
    assert changed == GenerationRequest("a lighthouse", **{**EVERYTHING, "seed": 8, "width": None})
    with pytest.raises(InvalidRequestError, match="width must be at least 64"):
        as_request(request, width=1)


@pytest.mark.parametrize("value", [None, 7, b"a lighthouse", ["a lighthouse"], {"prompt": "a lighthouse"}], ids=repr)
def test_a_value_of_another_type_is_refused(value: Any) -> None:
    """The error about a value that is neither a prompt nor a request names its type."""
    with pytest.raises(InvalidRequestError) as caught:
        as_request(value)

    assert caught.value.field == "request"
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "request_or_prompt", ["a lighthouse", GenerationRequest("a lighthouse")], ids=["text", "request"]
)
def test_a_misspelt_parameter_is_a_type_error(request_or_prompt: str | GenerationRequest) -> None:
    """An unknown parameter is the usual TypeError of Python, which names it."""
    with pytest.raises(TypeError, match="widht"):
        as_request(request_or_prompt, widht=1024)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("widht", "did you mean width?"),
        ("promt", "did you mean prompt?"),
        ("input_image", "did you mean input_images?"),
        ("timout", "did you mean timeout?"),
        ("guidance", "what this library doesn't know yet goes into extra"),
    ],
)
def test_an_unknown_parameter_is_named_with_what_was_meant(name: str, hint: str) -> None:
    """The error about an unknown parameter suggests the name that is most like it."""
    params: Any = {name: 1}
    with pytest.raises(InvalidRequestError) as caught:
        as_request("a lighthouse", **params)

    assert str(caught.value) == f"no parameter {name}: {hint}"
    assert caught.value.field == name
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


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
def test_a_valid_value_is_sent_unchanged(name: str, value: Any) -> None:
    """Every value that the vendor's documentation allows is sent unchanged; the caller's key is never sent."""
    params = sent_params(GenerationRequest("a lighthouse", **{name: value}))

    assert params == {"prompt": "a lighthouse"} | ({} if name == "key" else {name: value})


class Integer:
    """An integer of another library, like numpy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 7), ("width", 512), ("height", 64), ("safety_tolerance", 5), ("seed", 2**64 - 1)]
)
def test_integers_of_other_libraries(name: str, value: int) -> None:
    """Whatever is an integer for Python becomes one, and is validated as one."""
    params: Any = {name: Integer(value)}
    request = GenerationRequest("a lighthouse", **params)

    assert type(getattr(request, name)) is int
    assert request == GenerationRequest("a lighthouse", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=name):
        GenerationRequest("a lighthouse", **{name: Integer(-(2**64))})  # type: ignore[arg-type]


INVALID: list[tuple[str, object, str]] = [
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
"""A parameter, an invalid value of it, and a text that the error must contain."""


@pytest.mark.parametrize(("name", "value", "text"), INVALID, ids=[f"{name} {text}" for name, _, text in INVALID])
def test_an_invalid_value_is_refused_by_name(name: str, value: object, text: str) -> None:
    """The error names the parameter in `field` and in its message, and explains what is wrong with the value."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest(**{"prompt": "a lighthouse", name: value})  # type: ignore[arg-type]

    assert caught.value.field == name
    assert text in str(caught.value)
    assert name in str(caught.value) or name == "input_images"


@pytest.mark.parametrize("name", ["seed", "width", "height"])
@pytest.mark.parametrize("sign", [1, -1], ids=["huge", "hugely negative"])
def test_an_integer_of_more_than_64_bits_is_refused(name: str, sign: int) -> None:
    """An integer with more digits than Python prints is an InvalidRequestError, not a ValueError of the submit."""
    with pytest.raises(InvalidRequestError) as caught:
        sent_params(GenerationRequest("a lighthouse", **{name: sign * 10**5000}))  # type: ignore[arg-type]

    assert caught.value.field == name


@pytest.mark.parametrize("name", ["seed", "width", "safety_tolerance", "output_format", "webhook_url"])
def test_an_error_about_a_long_value_is_short(name: str) -> None:
    """The error about a value of a megabyte, such as the bytes of an image, doesn't contain all of it."""
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
def test_any_value_is_valid_or_an_invalid_request_error(params: dict[str, Any]) -> None:
    """With any values, the request can be sent, or an InvalidRequestError names one of them."""
    try:
        body = sent_params(GenerationRequest(**({"prompt": "a lighthouse"} | params)))
    except InvalidRequestError as error:
        refused: str | None = error.field
        body = {}
    else:
        refused = None

    assert refused is None or refused in params
    assert None not in body.values()


# ---------------------------------------------------------------------- extra


@pytest.mark.parametrize(
    "name",
    [
        *("prompt", "model", "seed", "width", "height", "safety_tolerance", "output_format"),
        *("webhook_url", "webhook_secret", "input_image", "input_image_2", "input_image_8"),
    ],
)
def test_extra_cannot_hold_a_known_parameter(name: str) -> None:
    """A parameter of the library can't be set by `extra`, even if it has no value of its own."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", extra={name: None})

    assert caught.value.field == "extra"
    assert repr(name) in str(caught.value)


def test_extra_is_sent_by_name() -> None:
    """The parameters in `extra` are sent unchanged; None isn't sent."""
    extra = {"prompt_upsampling": True, "loras": [{"name": "ink", "weight": 0.5}], "nothing": None, "key": "theirs"}
    params = sent_params(GenerationRequest("a lighthouse", extra=MappingProxyType(extra), key="mine"))

    assert params == {
        "prompt": "a lighthouse",
        "prompt_upsampling": True,
        "loras": [{"name": "ink", "weight": 0.5}],
        "key": "theirs",
    }


def test_later_changes_to_extra_do_not_reach_the_request() -> None:
    """A request copies `extra`, so later changes of the mapping and its values have no effect."""
    loras = ["ink"]
    extra = {"loras": loras}
    request = GenerationRequest("a lighthouse", extra=extra)
    loras.append("oil")
    extra["styles"] = ["oil"]

    assert sent_params(request) == {"prompt": "a lighthouse", "loras": ["ink"]}


def test_extra_cannot_be_changed_through_the_request() -> None:
    """Neither `extra` nor the values in it can be used to change the request."""
    request = GenerationRequest("a lighthouse", extra={"loras": ["ink"], "style": {"name": "ink"}})
    with contextlib.suppress(AttributeError, TypeError):
        request.extra["loras"].append("oil")
    with contextlib.suppress(AttributeError, TypeError):
        request.extra["style"]["name"] = "oil"
    with contextlib.suppress(AttributeError, TypeError):
        request.extra["steps"] = 4  # type: ignore[index]

    assert sent_params(request) == {"prompt": "a lighthouse", "loras": ["ink"], "style": {"name": "ink"}}


def test_extra_reads_like_a_dict() -> None:
    """`extra` has the keys, the length, the values and the repr of the original mapping."""
    request = GenerationRequest("a lighthouse", extra={"steps": 4, "guidance": 2.5})

    assert dict(request.extra) == {"steps": 4, "guidance": 2.5}
    assert len(request.extra) == 2
    assert repr(request.extra) == "{'steps': 4, 'guidance': 2.5}"
    assert request.extra == {"guidance": 2.5, "steps": 4}


def test_recursive_extra_is_refused() -> None:
    """A mapping that contains itself is refused when the request is created."""
    extra: dict[str, Any] = {}
    extra["self"] = extra

    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest("a lighthouse", extra=extra)

    assert caught.value.field == "extra"


@pytest.mark.parametrize(("levels", "valid"), [(100, True), (101, False), (900, False), (100_000, False)])
def test_extra_is_nested_at_most_100_levels_deep(levels: int, valid: bool) -> None:
    """A hundred levels of JSON can be sent, copied and serialized; more are refused when the request is created."""
    value: Any = 1
    for _ in range(levels - 1):
        value = [value]
    expectation = contextlib.nullcontext() if valid else pytest.raises(InvalidRequestError, match="extra must ")
    with expectation:
        assert GenerationRequest("a lighthouse", extra={"deep": value}).extra["deep"] == value


# ---------------------------------------------------------------------- GenerationParams


def test_generation_params_has_every_field_but_the_prompt() -> None:
    """The type of keyword arguments has exactly the optional fields of a request."""
    fields = [field.name for field in attrs.fields(GenerationRequest)]

    assert ["prompt", *GenerationParams.__annotations__] == fields
    assert GenerationParams.__required_keys__ == frozenset()
