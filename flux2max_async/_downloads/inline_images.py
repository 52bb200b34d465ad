"""Images that are part of a task's result, as `data:` URIs."""

import base64
import binascii
from urllib.parse import unquote_to_bytes

from flux2max_async._downloads.image_format import HEAD_BYTES, detect_format, is_whole
from flux2max_async._downloads.transfer import MAX_IMAGE_BYTES, too_large
from flux2max_async._exceptions import DownloadError

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_inline_image(uri: str) -> tuple[bytes, str]:
    """Return the bytes and the format of the image in a `data:` URI.

    Raises:
        DownloadError: There is no image in it, not all of one, or one that is larger than 100 MB.
    """
    header, comma, text = uri.partition(",")
    if not comma:
        raise DownloadError("the inline image has no comma before its data")
    data = unquote_to_bytes(text)
    if header.rpartition(";")[2].strip().lower() == "base64":
        data = _decode_base64(data)
    if len(data) > MAX_IMAGE_BYTES:
        raise too_large()
    image_format = detect_format(data[:HEAD_BYTES])
    if image_format is None or not is_whole(data):
        raise DownloadError(f"the inline image is {'not an image' if image_format is None else 'not complete'}")
    return data, image_format


def _decode_base64(text: bytes) -> bytes:
    """Decode base64 as browsers do, without regard to whitespace and padding, in either alphabet."""
    text = b"".join(text.split()).translate(_URL_SAFE).rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise DownloadError(f"the inline image is not valid base64: {error}") from error
