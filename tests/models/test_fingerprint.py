"""Fingerprints: which requests count as the same, and how many megapixels a request is estimated at."""

import io
from pathlib import Path
from typing import Any

import attrs
import pytest
from PIL import Image
from support.responses import picture

from flux2max_async import GeneratedImage, GenerationRequest, InvalidRequestError
from flux2max_async._models.fingerprint import RequestFingerprint, fingerprint_request, generated_image, is_local
from flux2max_async._models.generated import NO_URL

URL = "https://pictures.example/a.png"


def fingerprint_of(**params: Any) -> RequestFingerprint:
    return fingerprint_request(GenerationRequest(**{"prompt": "a cat", **params}))


def large_gif() -> bytes:
    file = io.BytesIO()
    Image.new("P", (2048, 2048)).save(file, "GIF")
    return file.getvalue()


# ---------------------------------------------------------------------- the same content


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, "6a1b0141a31d24c813d22b22f8c57550"),
        ({"seed": 7, "width": 512, "extra": {"raw": True}}, "400c7a5695941f432057b25ca4785e08"),
        ({"input_images": [URL, b"GIF89a"]}, "000c96fa09480984d29f2788f924162d"),
    ],
    ids=["prompt", "params", "images"],
)
def test_a_fingerprint_is_the_same_in_every_version(params: dict[str, Any], expected: str) -> None:
    """Journals of earlier versions hold these fingerprints: if they changed, every request would be paid for again."""
    assert fingerprint_of(**params).fingerprint == expected


def test_an_image_has_one_fingerprint_whatever_its_source(tmp_path: Path) -> None:
    """Bytes, a path and an open file of one image are equal content; only the description names the path."""
    path = tmp_path / "cat.png"
    path.write_bytes(picture())
    with path.open("rb") as file:
        from_bytes, from_path, from_file = (fingerprint_of(input_images=[source]) for source in (picture(), path, file))

    assert from_bytes == from_file
    assert from_path.fingerprint == from_bytes.fingerprint
    assert from_bytes.description["input_images"][0].startswith("sha256:")
    assert from_path.description["input_images"] == [str(path)]


CHANGES: dict[str, Any] = {
    "prompt": "a dog",
    "seed": 7,
    "width": 512,
    "height": 512,
    "safety_tolerance": 0,
    "output_format": "png",
    "extra": {"raw": True},
    "input_images": [picture("PNG")],
}
OTHER_IMAGES = [
    [picture("JPEG")],
    [picture("PNG"), picture("JPEG")],
    [picture("JPEG"), picture("PNG")],
    [URL],
    ["https://pictures.example/b.png"],
]


def test_every_parameter_of_the_image_changes_the_fingerprint() -> None:
    """Whatever determines the image is part of the fingerprint, the order of the input images included."""
    found = [
        fingerprint_of(),
        fingerprint_of(seed=8, width=512),
        fingerprint_of(seed=512, width=64),
        fingerprint_of(extra={"raw": False}),
        *(fingerprint_of(**{name: value}) for name, value in CHANGES.items()),
        *(fingerprint_of(input_images=images) for images in OTHER_IMAGES),
    ]

    assert len({content.fingerprint for content in found}) == len(found)
    assert CHANGES.keys() | {"webhook_url", "webhook_secret", "key"} == {
        field.name for field in attrs.fields(GenerationRequest)
    }


@pytest.mark.parametrize("params", [{}, {"input_images": [picture()]}], ids=["text", "images"])
def test_key_and_webhook_do_not_change_the_fingerprint(params: dict[str, Any]) -> None:
    """A request has the same fingerprint whatever its key and webhook are, and its description holds no secret."""
    plain = fingerprint_of(**params)
    named = fingerprint_of(key="k", webhook_url="https://app.example/hook", webhook_secret="hush", **params)

    assert named == plain
    assert "hush" not in repr(named)


def test_a_generated_image_counts_by_its_task_and_index() -> None:
    """The same edit is the same content, however the URL of its image is signed today; its description restores it."""
    first, again, other = (
        GeneratedImage(url=url, type="image", task_id="a/b", index=index, extra={"jobId": url})
        for url, index in (("https://a.example/?x=1", 0), ("https://a.example/?x=2", 0), ("https://a.example/?x=1", 1))
    )
    contents = [fingerprint_of(input_images=[image]) for image in (first, again, other)]
    restored = generated_image(contents[2].description["input_images"][0])

    assert contents[0] == contents[1] != contents[2]
    assert contents[2].megapixels == 2
    assert restored == GeneratedImage(url=NO_URL, type="image", task_id="a/b", index=1)
    assert fingerprint_of(input_images=[restored]) == contents[2]


@pytest.mark.parametrize("description", ["https://a.example/", "a.png", "task:a", "task:/1", "task:a/x", None, 7])
def test_other_descriptions_are_no_generated_images(description: object) -> None:
    """Only what describes a generated image is restored as one."""
    assert generated_image(description) is None


# ---------------------------------------------------------------------- megapixels


@pytest.mark.parametrize(
    ("params", "megapixels"),
    [
        ({}, 1),
        ({"width": 0, "height": 0}, 1),
        ({"width": 64, "height": 64}, 1),
        ({"width": 1024, "height": 1024}, 1),
        ({"width": 1025, "height": 1024}, 2),
        ({"width": 2048}, 2),
        ({"width": 2048, "height": 2048}, 4),
        ({"input_images": [URL] * 3}, 4),
        ({"input_images": [large_gif(), picture("WEBP")], "height": 2000}, 4),
        ({"input_images": [b"\xff\xd8\xff\xe0 whatever"]}, 2),
    ],
)
def test_output_megapixels_are_rounded_up_and_each_input_image_counts_as_one(
    params: dict[str, Any], megapixels: int
) -> None:
    """The size of an input image doesn't count; an output size that the model chooses counts as 1024 pixels."""
    assert fingerprint_of(**params).megapixels == megapixels


# ---------------------------------------------------------------------- local images


def test_an_unreadable_image_is_an_error_with_its_index(tmp_path: Path) -> None:
    """A missing local image is an InvalidRequestError that names the image's index and path."""
    request = GenerationRequest("a cat", input_images=[picture(), tmp_path / "missing.png"])

    with pytest.raises(InvalidRequestError, match=r"input_images\[1\]: can't read .*missing\.png") as caught:
        fingerprint_request(request)

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.field == "input_images"


@pytest.mark.parametrize(
    ("images", "local"),
    [([], False), ([URL], False), ([picture()], True), ([Path("missing.png")], True), ([URL, picture()], True)],
    ids=["none", "URL", "bytes", "path", "URL and bytes"],
)
def test_only_images_that_are_not_urls_are_local(images: list[Any], local: bool) -> None:
    """A request has to be fingerprinted in a thread if one of its images has to be read."""
    assert is_local(GenerationRequest("a cat", input_images=images)) is local
