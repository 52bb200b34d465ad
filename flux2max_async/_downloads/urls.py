"""URLs of images, which are sent byte for byte.

A signed URL is refused if a single escape in it is spelled differently. yarl and urllib.parse decode, encode or drop
parts of what they parse and join (`%2F`, an empty query, a second slash), so URLs are text here.
"""

import re
from urllib.parse import quote

import attrs
from yarl import URL

_MAX_SHOWN_LENGTH = 80
_MAX_LENGTH = 65_536
"""Characters. No server takes a longer URL, and yarl keeps the newest URLs in memory."""
# RFC 3986, appendix B. The fragment, which is not sent, is left out.
_PARTS = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(\?[^#]*)?")
# https://url.spec.whatwg.org/#concept-basic-url-parser
_STRIPPED = "".join(map(chr, range(0x21)))
_REMOVED = str.maketrans("", "", "\t\n\r")
_UNSAFE = re.compile(r"[^!-~]+")
_LONE_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Those from \\udc80 to \\udcff stand for bytes of a header that are not UTF-8."""


@attrs.frozen
class _Parts:
    """The parts of a URL or a reference, spelled as they came; None if a part is absent."""

    scheme: str | None
    authority: str | None
    path: str
    query: str
    """With its question mark; empty if it is absent."""


def encode_url(text: str) -> str:
    """Return an http(s) URL as it is sent.

    As browsers do, it encodes spaces, control characters and non-ASCII, removes surrounding whitespace, line breaks,
    tabs and the fragment, and leaves every other character as it is.

    Raises:
        ValueError: The text is not an http(s) URL with a host, or has more than 65,536 characters.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"longer than {_MAX_LENGTH:,} characters")
    parts = _split(text)
    if parts.scheme not in {"http", "https"} or not parts.authority:
        raise _invalid(text)
    try:
        authority = parts.authority
        if not authority.isascii():
            authority = URL(f"//{authority}").raw_authority
        host = URL(f"//{authority}", encoded=True).raw_host
    except ValueError as error:
        raise _invalid(text) from error
    if not host or _UNSAFE.search(authority):
        raise _invalid(text)
    return f"{parts.scheme}://{authority}{_escape(parts.path) or '/'}{_escape(parts.query)}"


def resolve_redirect(location: str, base: str) -> str:
    """Return the URL to which a response redirects.

    Args:
        location: The `Location` header.
        base: The URL that was requested, as it was sent.

    Raises:
        ValueError: The location is not an http(s) URL with a host.
    """
    parts, base_parts = _split(location), _split(base)
    authority, path, query = parts.authority, parts.path, parts.query
    # Browsers read "https:path" as a path.
    if authority is None and parts.scheme in {None, base_parts.scheme}:
        authority = base_parts.authority
        if not path:
            path, query = base_parts.path, query or base_parts.query
        elif not path.startswith("/"):
            path = _remove_dot_segments(base_parts.path.rpartition("/")[0] + "/" + path)
    return encode_url(f"{parts.scheme or base_parts.scheme}://{authority or ''}{path}{query}")


def _split(text: str) -> _Parts:
    match = _PARTS.match(text.strip(_STRIPPED).translate(_REMOVED))
    assert match is not None  # each part may be empty
    scheme, authority, path, query = match.groups()
    return _Parts(scheme and scheme.lower(), authority, path, query or "")


def _escape(text: str) -> str:
    """Percent-encode all but printable ASCII."""
    text = _LONE_SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
    return _UNSAFE.sub(lambda match: quote(match[0], errors="surrogateescape"), text)


def _remove_dot_segments(path: str) -> str:
    """Return an absolute path without its segments `.` and `..`; empty segments stay (RFC 3986, section 5.2.4)."""
    result: list[str] = []
    *folders, name = path.split("/")[1:]
    for segment in folders:
        if segment == "..":
            del result[-1:]
        elif segment != ".":
            result.append(segment)
    if name == "..":
        del result[-1:]
    return "/".join(["", *result, "" if name in {".", ".."} else name])


def _invalid(text: str) -> ValueError:
    return ValueError(f"not an http(s) URL: {text[:_MAX_SHOWN_LENGTH]!r}")
