"""A gateway in another process that gives hostile answers among honest ones. A request's prompt names its answer."""

import asyncio
import functools
import gzip
import io
import json
import math
from collections.abc import Callable, Mapping

import attrs
from PIL import Image

from support.scripted import Behaviour, Connection, answer, completed, raw, running

TIME_SCALE = 10.0
"""Seconds of the client's event loop for each real second."""
GATEWAY_HOST, PICTURES_HOST = "gateway.example", "pictures.example"
MEGABYTE = 1_000_000
SURROGATE = "\ud800"
CONTROLS = f"line\r\nline \x1b[31mred\x1b[0m \x9b2J \u202eltr {SURROGATE} \x00"
"""What must not reach a log or a terminal: line ends, ESC, C1, bidi controls, a lone surrogate, NUL."""

PRIVATE_URLS = (
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:a9fe:a9fe]:{port}/",
    "http://[fe80::1]:{port}/",
    "http://[fd00::1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://10.0.0.1:{port}/",
    "http://172.16.0.1:{port}/",
    "http://192.168.0.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "http://loopback.example:{port}/",
    "http://metadata.example:{port}/",
    "http://mixed.example:{port}/",
    "http://\uff11\uff12\uff17.0.0.1:{port}/",
)
"""Addresses that only the client's own machine and network have, in every spelling."""
SAVED, UNSAVED, TIMED_OUT = frozenset({"saved"}), frozenset({"unsaved"}), frozenset({"DeadlineExceededError"})
UNREADABLE, UNCERTAIN = frozenset({"ProtocolError"}), frozenset({"SubmissionUncertainError"})
BROKEN = frozenset({"ProtocolError", "DeadlineExceededError"})
ANY = SAVED | UNREADABLE


# ------------------------------------------------------------------ hostile behaviours


@functools.cache
def picture() -> bytes:
    """Return a small JPEG."""
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def drip(head: bytes) -> Behaviour:
    """Send three bytes a second, and never end."""

    async def behave(connection: Connection) -> None:
        await connection.send(head)
        while not connection.writer.is_closing():
            await asyncio.sleep(1 / TIME_SCALE)
            await connection.send(b"   ")

    return behave


def endless(head: bytes, chunk: bytes) -> Behaviour:
    """Send the same bytes as fast as they are read, and never end."""

    async def behave(connection: Connection) -> None:
        await connection.send(head)
        while not connection.writer.is_closing():
            await connection.send(chunk)
            await asyncio.sleep(0)  # so that the loss of the connection is noticed

    return behave


@functools.cache
def bomb() -> bytes:
    """Return 200 MB of spaces, compressed to 200 kB."""
    return gzip.compress(b" " * 200 * MEGABYTE, compresslevel=1)


@functools.cache
def brackets() -> bytes:
    """Return JSON of 15 MB that consists of 5 million empty lists."""
    return b'{"status": "completed", "output": [' + b"[]," * (5 * MEGABYTE) + b"[]]}"


def nested(depth: int) -> Callable[[str, str], Behaviour]:
    """Return the answer of a task whose metadata are so many objects inside each other."""

    def poll(task_id: str, url: str) -> Behaviour:
        body = json.dumps(completed(task_id, url, metadata={"deep": 0}))
        return answer(200, body.replace("0}", '{"a":' * depth + "1" + "}" * depth + "}").encode())

    return poll


def with_fields(**fields: object) -> Callable[[str, str], Behaviour]:
    """Return the answer of a task that has completed, with these fields."""
    return lambda task_id, url: answer(200, completed(task_id, url, **fields))


def with_cost(cost: object) -> Callable[[str, str], Behaviour]:
    return with_fields(usage={"cost": cost, "discount": 1})


def with_pictures(*urls: str) -> Callable[[str, str], Behaviour]:
    """Return the answer of a task with pictures from these URLs; `{url}` stands for its usual one."""

    def poll(task_id: str, url: str) -> Behaviour:
        contents = [{"type": "image", "url": text.replace("{url}", url)} for text in urls]
        return answer(200, {**completed(task_id), "output": [{"content": contents}]})

    return poll


def always(behaviour: Behaviour) -> Callable[[str, str], Behaviour]:
    return lambda _, __: behaviour


def failed(**fields: object) -> Callable[[str, str], Behaviour]:
    return lambda task_id, _: answer(200, {"id": task_id, "status": "failed", **fields})


def redirect(location: str) -> Behaviour:
    return answer(302, b"", [("Location", location)])


def head(*headers: str) -> bytes:
    return "\r\n".join(("HTTP/1.1 200 OK", *headers, "", "")).encode()


_CHUNK = b"10000\r\n" + b" " * 65_536 + b"\r\n"
_ENDLESS_BODY = endless(head("Transfer-Encoding: chunked"), _CHUNK)
_ENDLESS_HEADERS = endless(b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"x" * 1000 + b"\r\n")
_FAT_HEADERS = endless(b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"x" * 60_000 + b"\r\n")
_BOMB = functools.partial(answer, 200, headers=[("Content-Encoding", "gzip")])


def _bomb(*_: str) -> Behaviour:
    return _BOMB(bomb())


# ------------------------------------------------------------------ the table


@attrs.frozen(kw_only=True)
class Kind:
    """How the gateway answers a request: honestly, except for what is given."""

    expected: frozenset[str]
    """The outcomes that are right; `hostile_client.describe()` names them."""
    submit: Callable[[str], Behaviour] | None = None
    poll: Callable[[str, str], Behaviour] | None = None
    download: Callable[[], Behaviour] | None = None
    new_id: Callable[[str], str] = "task {}".format
    """Returns the id of the task for a prompt."""
    count: int = 2
    """The number of requests."""


KINDS: Mapping[str, Kind] = {
    "honest": Kind(expected=SAVED, count=150),
    # Costs
    "negative_cost": Kind(expected=SAVED, poll=with_cost("-0.50"), count=6),
    "huge_cost": Kind(expected=SAVED, poll=with_cost("1e30"), count=4),
    "nan_cost": Kind(expected=SAVED, poll=with_cost(math.nan), count=4),
    "infinite_cost": Kind(expected=SAVED, poll=with_cost("-Infinity")),
    "long_cost": Kind(expected=SAVED, poll=with_cost("9" * MEGABYTE)),
    "cost_of_lists": Kind(expected=SAVED, poll=with_cost([["0.07"]])),
    # Ids
    "huge_id": Kind(expected=UNCERTAIN, new_id=lambda prompt: prompt + "x" * 5 * MEGABYTE),
    "controls_id": Kind(expected=SAVED, new_id=lambda prompt: f"{prompt}/../{CONTROLS.replace(SURROGATE, '')}"),
    "surrogate_id": Kind(expected=UNCERTAIN, new_id=lambda prompt: prompt + SURROGATE),
    "dots_id": Kind(expected=SAVED, new_id=lambda prompt: "." * (60 + int(prompt.rpartition(".")[2]))),
    # Pictures
    "eps": Kind(expected=UNSAVED, download=lambda: answer(200, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "html": Kind(expected=UNSAVED, download=lambda: answer(200, b"<script>alert(1)</script>", [("Content-Type", "image/jpeg")])),
    "many_pictures": Kind(expected=SAVED, poll=with_pictures(*["{url}"] * 10_000)),
    "file_url": Kind(expected=UNSAVED, poll=with_pictures("file:///etc/passwd")),
    "data_url": Kind(expected=UNSAVED, poll=with_pictures("data:text/html;base64,PGI+")),
    "ftp_url": Kind(expected=UNSAVED, poll=with_pictures("ftp://127.0.0.1/x")),
    "controls_url": Kind(expected=UNSAVED, poll=with_pictures(f"gopher://{CONTROLS}")),
    "long_url": Kind(expected=UNSAVED, poll=with_pictures("{url}?" + "x" * MEGABYTE)),
    "drip": Kind(expected=UNSAVED, download=lambda: drip(head("Content-Length: 100000"))),
    "endless_picture": Kind(expected=UNSAVED, download=lambda: endless(head(), picture()), count=1),
    "huge_length": Kind(expected=UNSAVED, download=lambda: raw(head("Content-Length: 99999999999999999999"), then="hang")),
    "header_flood": Kind(expected=UNSAVED, download=lambda: _ENDLESS_HEADERS),
    "picture_bomb": Kind(expected=UNSAVED, download=_bomb),
    "redirect_loop": Kind(expected=UNSAVED, download=lambda: redirect("picture.jpeg")),
    "redirect_file": Kind(expected=UNSAVED, download=lambda: redirect("file:///etc/passwd")),
    "redirect_long": Kind(expected=UNSAVED, download=lambda: redirect("?" + "x" * 60_000)),
    "rebinding": Kind(expected=SAVED | UNSAVED),
    "late": Kind(expected=UNSAVED, download=lambda: answer(503, b"", [("Retry-After", "9" * 30)])),
    # Bodies of polls
    "brackets": Kind(expected=BROKEN, poll=lambda _, __: answer(200, brackets())),
    # A text of base64 would be taken for an inline picture, which may have 100 MB.
    "flat_text": Kind(expected=BROKEN, poll=with_fields(metadata={"text": "a b " * 4 * MEGABYTE})),
    "flat_texts": Kind(expected=BROKEN, poll=with_fields(metadata=["a b " * 22] * 150_000)),
    "deep_100": Kind(expected=SAVED, poll=nested(100)),
    "deep_900": Kind(expected=ANY, poll=nested(900)),
    "deep_9000": Kind(expected=ANY, poll=nested(9000)),
    "deep_90000": Kind(expected=UNREADABLE, poll=nested(90_000)),
    "endless_body": Kind(expected=BROKEN, poll=always(_ENDLESS_BODY)),
    "endless_headers": Kind(expected=BROKEN, poll=always(_ENDLESS_HEADERS)),
    "fat_headers": Kind(expected=BROKEN, poll=always(_FAT_HEADERS)),
    "poll_bomb": Kind(expected=BROKEN, poll=_bomb),
    "poll_drip": Kind(expected=BROKEN, poll=always(drip(head("Content-Length: 100000")))),
    # Fields of tasks
    "long_message": Kind(expected=frozenset({"TaskFailedError"}), poll=failed(error={"code": "c" * MEGABYTE, "message": CONTROLS + "x" * MEGABYTE})),
    "controls_code": Kind(expected=frozenset({"TaskFailedError"}), poll=failed(error={"code": CONTROLS, "message": CONTROLS})),
    "long_status": Kind(expected=TIMED_OUT, poll=lambda task_id, _: answer(200, running(task_id, status="x" * MEGABYTE))),
    "controls_status": Kind(expected=TIMED_OUT, poll=lambda task_id, _: answer(200, running(task_id, status=CONTROLS))),
    "negative_progress": Kind(expected=SAVED, poll=with_fields(progress=-7)),
    "nan_progress": Kind(expected=SAVED, poll=with_fields(progress=math.nan)),
    "created_far": Kind(expected=SAVED, poll=with_fields(created_at=1e300)),
    "created_long": Kind(expected=SAVED, poll=with_fields(created_at=10**4000)),
    "created_text": Kind(expected=SAVED, poll=with_fields(created_at="9" * MEGABYTE)),
    "controls_metadata": Kind(expected=SAVED, poll=with_fields(metadata={CONTROLS: [CONTROLS]})),
    # Answers to submits
    "submit_brackets": Kind(expected=UNCERTAIN, submit=lambda _: answer(200, brackets())),
    "submit_headers": Kind(expected=UNCERTAIN, submit=lambda _: _ENDLESS_HEADERS),
    "submit_body": Kind(expected=UNCERTAIN, submit=lambda _: _ENDLESS_BODY),
    "submit_bomb": Kind(expected=UNCERTAIN, submit=_bomb),
    "submit_drip": Kind(expected=UNCERTAIN, submit=lambda _: drip(head("Content-Length: 100000"))),
    "refused": Kind(expected=frozenset({"BadRequestError"}), submit=lambda _: answer(400, {"error": {"code": CONTROLS, "message": CONTROLS + "x" * MEGABYTE}})),
    # Pictures at private addresses
    **{f"private_{number}": Kind(expected=UNSAVED, count=1) for number in range(len(PRIVATE_URLS))},
    **{f"redirect_{number}": Kind(expected=UNSAVED, count=1) for number in range(len(PRIVATE_URLS))},
}  # fmt: skip
PAID_KINDS = frozenset(name for name, kind in KINDS.items() if kind.expected <= SAVED | UNSAVED)
"""The kinds whose tasks have certainly completed, and cost 7 cents, whatever they say."""


def kind_of(prompt: str) -> str:
    return prompt.rpartition(".")[0]
