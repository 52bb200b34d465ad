"""The default names of images: after the key of their request, or else its first words and a short fingerprint."""

import hashlib
import re
from collections.abc import Callable

from flux2max_async._downloads.filenames import file_name
from flux2max_async._exceptions import DownloadError
from flux2max_async._models.fingerprint import RequestFingerprint, fingerprint_request, is_local
from flux2max_async._models.results import Completed

_MAX_PROMPT_BYTES = 60
FINGERPRINT_LENGTH = 8
"""Characters that distinguish requests with similar prompts."""


def default_name(outcome: Completed, fingerprint: RequestFingerprint | None) -> str:
    """Return the name of an outcome's images.

    Args:
        outcome: The outcome. A task that was attached by its id alone has no request, and is named after its id.
        fingerprint: The request's content, if it is known. Without it, input images are not read once more, and the
            task's id makes the difference.
    """
    request = outcome.request
    if request is None:
        return outcome.task_id
    if request.key:
        return request.key
    if fingerprint is not None:
        return name_after_content(request.prompt, fingerprint.fingerprint)
    if is_local(request):
        return name_after_content(request.prompt, hashlib.sha256(outcome.task_id.encode(errors="replace")).hexdigest())
    return name_after_content(request.prompt, fingerprint_request(request).fingerprint)


def name_after_content(prompt: str, fingerprint: str) -> str:
    """Return the first words of a prompt and the beginning of a fingerprint."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    stem = words.encode(errors="ignore")[:_MAX_PROMPT_BYTES].decode(errors="ignore").strip("-")
    return f"{stem}-{fingerprint[:FINGERPRINT_LENGTH]}" if stem else fingerprint[:FINGERPRINT_LENGTH]


def choose_stem(
    outcome: Completed, name: Callable[[Completed], str] | None, fingerprint: RequestFingerprint | None
) -> str:
    """Return the file name of an outcome's first image, with or without a suffix.

    Args:
        outcome: The outcome.
        name: The caller's function; None: the default name.
        fingerprint: That of the request.

    Raises:
        DownloadError: The function has raised, or returned no text.
    """
    if name is None:
        return file_name(default_name(outcome, fingerprint))
    try:
        return file_name(name(outcome))
    except Exception as error:  # noqa: BLE001 - it is the caller's function
        # Not as the cause: an error with an errno would be taken for the disk's.
        raise DownloadError(f"no name for the image: {error!r}")  # noqa: B904 - see above
