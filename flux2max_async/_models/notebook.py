"""What notebooks and terminals show of requests and outcomes: short, and escaped."""

import base64
import stat
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from flux2max_async._models.generated import GeneratedImage, inline_url, is_inline
from flux2max_async._models.images import is_web_url
from flux2max_async._text import printable

if TYPE_CHECKING:
    from flux2max_async._models.results import Completed

_MAX_EMBEDDED_BYTES = 4_000_000
_MAX_VALUE_LENGTH = 200
"""Characters of the repr of one value."""
_MAX_CAPTION_LENGTH = 300
_PICTURE = '<img src="{}" alt="{}" style="max-width: 100%; max-height: 512px" referrerpolicy="no-referrer">'
_FIGURE = '<figure style="margin: 0">{}<figcaption>{}</figcaption></figure>'


def short_repr_of(value: object, *positional: object, **named: object) -> str:
    """Return the repr of a value with these arguments, each of which is cut; those that are None are left out."""
    arguments = [_cut(repr(argument)) for argument in positional]
    arguments += [f"{name}={_cut(repr(argument))}" for name, argument in named.items() if argument is not None]
    return f"{type(value).__name__}({', '.join(arguments)})"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 1]}…"


def completed_as_html(outcome: "Completed") -> str:
    """Return the pictures of an outcome as HTML, with the prompt, the cost and the seconds.

    A small file that was saved is read and embedded, so it shows when the URL has expired; this blocks.
    """
    prompt = f"task {outcome.task_id}" if outcome.request is None else outcome.request.prompt
    alt = printable(prompt, _MAX_CAPTION_LENGTH)
    facts = [alt]
    if outcome.usage is not None and outcome.usage.cost is not None:
        facts.append(f"${outcome.usage.cost}")
    facts.append(f"{outcome.elapsed:.1f} s")
    pictures = [_PICTURE.format(escape(source), escape(alt)) for source in _sources(outcome)]
    return _FIGURE.format("".join(pictures), escape(" · ".join(facts)))


def _sources(outcome: "Completed") -> Iterator[str]:
    """Yield a source of each picture that can be shown."""
    # If some are missing, nobody knows which ones.
    files: tuple[Path | None, ...] = outcome.saved
    if len(files) != len(outcome.images):
        files = (None,) * len(outcome.images)
    for image, file in zip(outcome.images, files, strict=True):
        source = (file and _embed(file)) or _source_of(image)
        if source:
            yield source


def _embed(file: Path) -> str | None:
    """Return the `data:` URI of a picture; None if it is large, no picture that browsers show, or can't be read."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_EMBEDDED_BYTES:
            return None
        url = inline_url(base64.b64encode(file.read_bytes()).decode())
    except (OSError, ValueError):
        return None
    return url if url.startswith("data:image/") else None


def _source_of(image: GeneratedImage) -> str | None:
    if is_inline(image.url):
        is_shown = image.url[:11].lower() == "data:image/" and len(image.url) * 3 / 4 <= _MAX_EMBEDDED_BYTES
        return image.url if is_shown else None
    return image.url if is_web_url(image.url) else None
