"""Everything that the emulator can be told to do by name: each name has the response that it promises."""

import base64
import io
import json
import re
from collections import Counter
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import attrs
import pytest
from PIL import Image
from support.scripted import ScriptedGateway
from yarl import URL

from flux2max_async._api import statuses
from flux2max_async._models.results import TaskStatus
from flux2max_async.emulator import EmulatedTask, Emulator, Fault, Webhooks
from flux2max_async.emulator._traits import TRAITS as TRAIT_TABLE

SUBMIT = {"model": "flux_2_max", "input": [{"params": {"prompt": "a cat"}}]}


@attrs.frozen
class Response:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def call(gateway: Emulator, method: str, target: str, *, key: bool = True, **options: Any) -> Response:
    """Send a request whose target is not changed, and return the response; redirects are not followed."""
    url = URL(target if target.startswith("http") else f"{gateway.url}{target}", encoded=True)
    headers = {"Authorization": f"Bearer {gateway.api_key}"} if key else {}
    async with (
        aiohttp.ClientSession(max_line_size=65_536, max_field_size=65_536) as http,
        http.request(method, url, headers=headers, allow_redirects=False, **options) as response,
    ):
        return Response(response.status, response.headers, await response.read())


async def submit(gateway: Emulator, prompt: str = "a cat", **params: Any) -> Response:
    body = {"model": "flux_2_max", "input": [{"params": {"prompt": prompt, **params}}]}
    return await call(gateway, "POST", "/model/v1/generation", json=body)


async def poll(gateway: Emulator, task_id: str) -> Response:
    return await call(gateway, "GET", f"/model/v1/generation/task/{task_id}")


async def download(gateway: Emulator, url: str) -> Response:
    return await call(gateway, "GET", url, key=False)


def url_of(response: Response) -> str:
    url: str = response.json["output"][0]["content"][0]["url"]
    return url


def matches(value: Any, pattern: Any) -> bool:
    """Check whether JSON has the form of a pattern, in which a type or a compiled expression stands for a value."""
    match pattern:
        case type():
            return type(value) is pattern
        case re.Pattern():
            return isinstance(value, str) and pattern.fullmatch(value) is not None
        case dict():
            return (
                isinstance(value, dict)
                and value.keys() == pattern.keys()
                and all(matches(value[name], expected) for name, expected in pattern.items())
            )
        case list():
            return isinstance(value, list) and len(value) == len(pattern) and all(map(matches, value, pattern))
        case _:
            return type(value) is type(pattern) and bool(value == pattern)


# ---------------------------------------------------------------------- errors

HTML, TEXT, EMPTY = "HTML", "text", "empty"


def error(code: object) -> dict[str, Any]:
    return {"error": {"code": code, "message": str}}


def error_status(code: int, **extra: object) -> dict[str, Any]:
    return {"status": {"code": code, "message": str, **extra}}


def recorded(code: int, error_code: int) -> dict[str, Any]:
    return {**error_status(code, error_code=error_code), "data": None}


ERRORS: dict[str, tuple[int, Any]] = {
    "rate_limited": (429, error("rate_limit_exceeded")),
    "rate_limited_date": (429, error("rate_limit_exceeded")),
    "rate_limited_body": (429, {"message": str, "retry_after": 1.0}),
    "server_error": (500, error("internal_error")),
    "bad_gateway": (502, HTML),
    "unavailable": (503, error("unavailable")),
    "retry_later": (503, error("overloaded")),
    "gateway_timeout": (504, error("gateway_timeout")),
    "bad_request": (400, error("invalid_parameter")),
    "unprocessable": (422, error("invalid_parameter")),
    "unauthorized": (401, error("unauthorized")),
    "payment_required": (402, error("40201")),
    "forbidden": (403, error("permission_denied")),
    "not_found": (404, error("task_not_found")),
    "method_not_allowed": (405, {"detail": str}),
    "request_timeout": (408, error("request_timeout")),
    "status_task_not_found": (200, {"id": None, "status": "Task not found", "result": None}),
    "error_code_message": (400, error("invalid_parameter")),
    "error_error_message": (400, {"error": {"code": int, "error_message": str}}),
    "error_text_and_message": (400, {"error": "invalid_parameter", "message": str}),
    "error_message": (403, {"message": "Forbidden"}),
    "error_status": (400, error_status(400)),
    "error_detail": (400, {"detail": str}),
    "error_detail_list": (422, {"detail": [{"loc": ["body", "width"], "msg": str}]}),
    "error_empty": (400, EMPTY),
    "error_200": (200, {"error": {"code": int, "error_message": str}}),
    "error_200_envelope": (200, {**error_status(500), "data": None}),
    "balance_40201": (402, error(40201)),
    "balance_40202": (402, recorded(402, 40202)),
    "balance_40203": (429, recorded(429, 40203)),
    "balance_40204": (403, error("40204")),
    "balance_40205": (400, {"code": 40205, "message": str}),
    "balance_40206": (403, recorded(403, 40206)),
    "balance_40207": (400, {"error": {"code": 40207, "error_message": str}}),
    "balance_40208": (429, {"code": 40208, "message": str}),
    "insufficient_balance": (403, error("insufficient_balance")),
    "insufficient_credits": (400, {"error": "insufficient_credits", "message": str}),
    "exhausted_balance": (403, {"detail": re.compile(".*Exhausted balance.*")}),
    "in_arrears": (400, {"status": {"code": 400, "message": re.compile(".*in arrears")}}),
    "quota_exceeded": (429, {"error": {"code": "quota", "message": re.compile(".*exceeded your current quota.*")}}),
    "moderation_blocked": (400, error("moderation_blocked")),
    "content_policy_violation": (403, error("content_policy_violation")),
    "content_filter": (422, {"error": "content_filter", "message": str}),
    "safety_violation": (400, error("safety_violation")),
    "flagged_as_sensitive": (400, {"error": {"code": str, "message": re.compile(".*flagged as sensitive")}}),
    "moderation_timeout": (503, {"error": {"code": str, "message": "Moderation service timed out, try again"}}),
    "firewall": (403, HTML),
    "firewall_400": (400, HTML),
    "firewall_401": (401, HTML),
    "firewall_402": (402, HTML),
    "firewall_text": (403, TEXT),
    "firewall_empty": (403, EMPTY),
    "firewall_json": (403, {"blocked": True, "ray": str}),
}


@pytest.mark.parametrize("endpoint", ["submit", "poll", "download"])
@pytest.mark.parametrize("name", ERRORS)
async def test_errors(gateway: Emulator, name: str, endpoint: Any) -> None:
    """An error has its status and body, whatever the call is, and leaves the service as it was."""
    task_id = (await submit(gateway)).json["id"]
    await anyio.sleep(9)
    url = url_of(await poll(gateway, task_id))
    status, pattern = ERRORS[name]
    gateway.script(endpoint, name)
    match endpoint:
        case "submit":
            response = await submit(gateway)
        case "poll":
            response = await poll(gateway, task_id)
        case _:
            response = await download(gateway, url)
    text, content_type = response.body.decode(), response.headers.get("Content-Type", "")

    assert response.status == status
    match pattern:
        case "HTML":
            assert (text.startswith("<html>"), content_type) == (True, "text/html; charset=utf-8")
        case "text":
            assert (text.isprintable(), text[:1] not in "<{", content_type) == (True, True, "text/plain; charset=utf-8")
        case "empty":
            assert text == ""
        case _:
            assert matches(response.json, pattern), response.json
            assert (content_type, len(response.headers["X-Request-Id"])) == ("application/json; charset=utf-8", 16)
    assert gateway.accepted == {"a cat": 1}
    assert gateway.tasks[task_id].trait is None
    assert url_of(await poll(gateway, task_id)).startswith(gateway.url)


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("name", "seconds"),
    [("rate_limited", 1.0), ("rate_limited_date", 2.0), ("retry_later", 2.0), ("unavailable", None)],
)
async def test_when_to_try_again(name: str, seconds: float | None, time_scale: float) -> None:
    """Retry-After holds seconds of the service as real seconds, or the date that is so far away."""
    async with Emulator(time_scale=time_scale, pictures=False) as gateway:
        gateway.script("submit", name)
        headers = (await submit(gateway)).headers

    if seconds is None:
        assert "Retry-After" not in headers
    elif name == "rate_limited_date":
        date, now = (parsedate_to_datetime(headers[header]) for header in ("Retry-After", "Date"))
        assert seconds / time_scale <= (date - now).total_seconds() <= seconds / time_scale + 2
    else:
        assert headers["Retry-After"] == f"{seconds / time_scale:g}"


async def test_limits_in_headers_and_body() -> None:
    """`rate_limited_body` has `retry_after` in the body, as a number, and the headers X-RateLimit."""
    async with Emulator(time_scale=4.0, pictures=False) as gateway:
        gateway.script("submit", "rate_limited_body")
        response = await submit(gateway)

    assert response.json["retry_after"] == 0.25
    assert "Retry-After" not in response.headers
    assert [response.headers[f"X-RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset")] == ["24", "0", "0.25"]


def test_the_codes_and_places_of_an_empty_balance() -> None:
    """Each of the codes 40201 to 40208 occurs, in each of the three places, and under each of four statuses."""
    tables = {name: ERRORS[name] for name in ERRORS if name.startswith("balance_")}
    places = {"error": set[int](), "status": set[int](), "code": set[int]()}
    for status, pattern in tables.values():
        places[next(iter(pattern))].add(status)

    assert [*tables] == [f"balance_{code}" for code in range(40201, 40209)]
    assert all(repr(code) in repr(tables[f"balance_{code}"]) for code in range(40201, 40209))
    assert places == {"error": {402, 403, 400}, "status": {402, 429, 403}, "code": {400, 429}}


# ---------------------------------------------------------------------- calls that take effect

CREATED = re.compile("[0-9a-f]{24}")
NEW = {"id": CREATED, "status": "pending", "model": "flux_2_max", "created_at": int, "progress": 0.0}

RESPONSES: dict[str, tuple[int, Any]] = {
    "envelope": (200, {"status": {"code": 200, "message": "ok"}, "data": NEW}),
    "envelope_zero": (200, {"status": {"code": 0, "message": str}, "data": NEW}),
    "sync_timeout": (504, {"id": CREATED, "status": "in_progress", **error("SYNC_TIMEOUT")}),
    "no_id": (200, {"status": {"code": 200, "message": "ok"}, "data": {}}),
    "huge_headers": (200, NEW),
}
CONNECTIONS = {"reset_before": 0, "reset_after": 1, "hang": 1, "cut": 1, "garbage": 1}
"""The faults that leave nothing of a response, and how many tasks a submit creates nevertheless."""


@pytest.mark.parametrize("name", RESPONSES)
async def test_responses_to_calls_that_take_effect(gateway: Emulator, name: str) -> None:
    """Such a response is that of a submit that created its task, or of a poll of that task."""
    status, pattern = RESPONSES[name]
    gateway.script("submit", name)
    created = await submit(gateway)
    (task,) = gateway.tasks.values()
    gateway.script("poll", name)
    polled = await poll(gateway, task.id)

    for response in (created, polled):
        assert response.status == status
        assert matches(response.json, pattern), response.json
        assert task.id in response.body.decode() or name == "no_id"
        assert len(response.headers.get("X-Debug", "")) == (20_000 if name == "huge_headers" else 0)
    assert gateway.accepted == {"a cat": 1}
    assert (task.polls, task.trait) == (1, None)


@pytest.mark.parametrize("name", CONNECTIONS)
async def test_submits_without_a_response(gateway: Emulator, name: str) -> None:
    """Without a readable response, a submit has taken effect, unless the connection was reset before it was read."""
    gateway.script("submit", name)
    try:
        timeout = aiohttp.ClientTimeout(total=5)
        response = await call(gateway, "POST", "/model/v1/generation", json=SUBMIT, timeout=timeout)
        readable = response.body.startswith(b"{")
    except (aiohttp.ClientError, TimeoutError):
        readable = False

    assert not readable
    assert len(gateway.tasks) == CONNECTIONS[name]


async def test_a_pictures_headers_can_be_huge(gateway: Emulator) -> None:
    """A download can have headers as long as those of a poll."""
    task_id = (await submit(gateway)).json["id"]
    await anyio.sleep(9)
    url = url_of(await poll(gateway, task_id))
    gateway.script("download", "huge_headers")
    response = await download(gateway, url)

    assert (response.status, len(response.headers["X-Debug"])) == (200, 20_000)


# ---------------------------------------------------------------------- traits

RUNNING = {"id": CREATED, "status": "in_progress", "model": "flux_2_max", "created_at": int, "progress": 0.5}
FAILED = {"id": CREATED, "status": "failed", "model": "flux_2_max", "created_at": int, **error("generation_failed")}
FAILED_ALONE = {name: value for name, value in FAILED.items() if name != "error"}
LINK = re.compile(r"http://127\.0\.0\.1:\d+/results/[0-9a-f]{24}\.jpeg\?expires=[\d.]+(&picture=\d)?")
SIGNED = re.compile(
    r"http://127\.0\.0\.1:\d+/signed/[0-9a-f]{24}\.jpeg/\S*%2F\S*%40\S*%3A\S*\+\S*\?\S*%2F\S*%40\S*%3A\S*\+\S*"
)
DATA = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")
BASE64 = re.compile("[A-Za-z0-9+/]+=*")
USAGE = {"cost": "0.07", "discount": 1}


def output(**content: Any) -> list[Any]:
    return [{"content": [content]}]


COMPLETED = {
    "id": CREATED,
    "status": "completed",
    "model": "flux_2_max",
    "created_at": int,
    "progress": 1.0,
    "output": output(type="image", url=LINK, jobId=re.compile("job-[0-9a-f]{24}")),
    "usage": USAGE,
    "metadata": {},
}


def running(word: str) -> tuple[Any, Any, str]:
    return {**RUNNING, "status": word}, COMPLETED, "completed"


def completed(**fields: Any) -> tuple[Any, Any, str]:
    return RUNNING, {**COMPLETED, **fields}, "completed"


def failed(word: str, fate: str = "failed") -> tuple[Any, Any, str]:
    return RUNNING, {**FAILED_ALONE, "status": word}, fate


STEP = re.compile(r"Denoising 14/28")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00")
AS_USUAL = (RUNNING, COMPLETED, "completed")

TRAITS: dict[str, tuple[Any, Any, str]] = {
    # name: half-way, at the end, fate
    "status_pending": running("Pending"),
    "status_in_progress": running("IN-PROGRESS"),
    "status_processing": running("Processing"),
    "status_queued": running("QUEUED"),
    "status_submitted": running("submitted"),
    "status_starting": running("Starting"),
    "status_running": running("RUNNING"),
    "status_completed": completed(status="COMPLETED"),
    "status_success": completed(status="Success"),
    "status_succeeded": completed(status="succeeded"),
    "status_ready": completed(status="Ready"),
    "status_done": completed(status="DONE"),
    "status_failed": failed("FAILED"),
    "status_error": failed("Error"),
    "status_cancelled": failed("CANCELLED"),
    "status_canceled": failed("canceled"),
    "status_aborted": failed("Aborted"),
    "status_timeout": failed("time-out"),
    "status_expired": failed("Expired"),
    "status_rejected": failed("REJECTED"),
    "status_moderated": failed("moderated", "moderated"),
    "status_request_moderated": failed("Request Moderated", "moderated"),
    "status_content_moderated": failed("CONTENT_MODERATED", "moderated"),
    "status_unknown": ({**RUNNING, "status": STEP}, {**COMPLETED, "status": "Finalized"}, "completed"),
    "status_unknown_failed": ({**RUNNING, "status": STEP}, {**FAILED, "status": "Unfulfilled"}, "failed"),
    "error_while_running": ({**RUNNING, **error("SYNC_TIMEOUT")}, COMPLETED, "completed"),
    "error_as_text": (RUNNING, {**FAILED, "error": str}, "failed"),
    "error_with_number": (RUNNING, {**FAILED, "error": {"code": 123, "error_message": str}}, "failed"),
    "completed_with_error": (RUNNING, {**FAILED, "status": "completed", "output": []}, "failed"),
    "completed_without_output": (RUNNING, {**FAILED_ALONE, "status": "completed", "output": []}, "failed"),
    "progress_missing": tuple(  # type: ignore[dict-item]
        {name: value for name, value in pattern.items() if name != "progress"} if isinstance(pattern, dict) else pattern
        for pattern in AS_USUAL
    ),
    "progress_stuck": ({**RUNNING, "progress": 0}, COMPLETED, "completed"),
    "created_at_text": ({**RUNNING, "created_at": TIME}, {**COMPLETED, "created_at": TIME}, "completed"),
    "cost_number": completed(usage={"cost": 0.07, "quantity": 1, "unit_price": "0.07", "used": 1}),
    "cost_empty": completed(usage={"cost": "", "discount": 1}),
    "cost_null": completed(usage={"cost": None, "discount": None}),
    "usage_missing": (RUNNING, {name: COMPLETED[name] for name in COMPLETED if name != "usage"}, "completed"),
    "inline_data_uri": completed(output=output(type="image", url=DATA)),
    "inline_b64_json": completed(output=output(type="image", b64_json=BASE64)),
    "inline_base64": completed(output=output(type="image", base64=BASE64)),
    "image_url_type": completed(output=output(type="image_url", url=LINK)),
    "image_url_text": completed(output=output(type="image_url", image_url=LINK)),
    "image_url_object": completed(output=output(type="image_url", image_url={"url": LINK})),
    "maker_result": (
        {"id": CREATED, "status": "Pending"},
        {"id": CREATED, "status": "Ready", "result": {"sample": LINK, "prompt": "a cat", "seed": int}},
        "completed",
    ),
    "several_groups": completed(
        output=[{"content": [{"type": "image", "url": LINK}] * 2}, {"content": [{"type": "image", "url": LINK}]}]
    ),
    "partial": completed(usage={**USAGE, "quantity": 3}, **error("content_policy_violation")),
    "signed_link": completed(output=output(type="image", url=SIGNED, jobId=str)),
    "redirected_link": AS_USUAL,
    "redirected_link_relative": AS_USUAL,
    "late_404": AS_USUAL,
    "late_403": AS_USUAL,
    "late_202": AS_USUAL,
    "late_425": AS_USUAL,
    "late_429": AS_USUAL,
    "late_503": AS_USUAL,
    "html_link": AS_USUAL,
    "cut_link": AS_USUAL,
}


@pytest.mark.parametrize("endpoint", ["submit", "poll"])
@pytest.mark.parametrize("name", TRAITS)
async def test_traits(gateway: Emulator, name: str, endpoint: Any) -> None:
    """A task has a trait from its submit on, or from the poll that gave it, and until its end."""
    half_way, end, fate = TRAITS[name]
    gateway.script(endpoint, name)
    task_id = (await submit(gateway)).json["id"]
    await anyio.sleep(4)
    task = gateway.tasks[task_id]
    before = task.trait
    polls = [(await poll(gateway, task_id)).json]
    await anyio.sleep(5)
    polls += [(await poll(gateway, task_id)).json for _ in range(2)]

    assert before == (name if endpoint == "submit" else None)
    assert (task.trait, task.fate) == (name, fate)
    assert matches(polls[0], half_way), polls[0]
    assert matches(polls[1], end), polls[1]
    assert matches(polls[2], end), polls[2]
    assert gateway.accepted == {"a cat": 1}


@pytest.mark.parametrize("name", ["status_ready", "inline_b64_json", "late_404", "partial", "several_groups"])
async def test_a_failed_task_has_no_trait_of_completed_ones(gateway: Emulator, name: str) -> None:
    """A trait of completed tasks leaves a task that fails as it is."""
    gateway.script("submit", name)
    task_id = (await submit(gateway, "a cat [fail]")).json["id"]
    await anyio.sleep(9)

    assert matches((await poll(gateway, task_id)).json, FAILED)


async def test_a_running_word_is_in_the_response_to_the_submit(gateway: Emulator) -> None:
    """The response to a submit has the task's trait, too."""
    gateway.script("submit", "status_queued", "status_unknown", "maker_result")
    bodies = [(await submit(gateway)).json for _ in range(3)]

    assert [body["status"] for body in bodies] == ["QUEUED", "Denoising 0/28", "Pending"]


def pictures_of(body: dict[str, Any]) -> list[str]:
    """Return the URLs and the base64 texts of a task object's pictures, as data: URIs."""
    contents = [content for group in body["output"] for content in group["content"]]
    values = [value["url"] if isinstance(value := content.get("image_url"), dict) else value for content in contents]
    return [
        url or content.get("url") or f"data:;base64,{content.get('b64_json') or content.get('base64')}"
        for url, content in zip(values, contents, strict=True)
    ]


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize(
    "name",
    ["inline_data_uri", "inline_b64_json", "inline_base64", "image_url_text", "image_url_object", "several_groups"],
)
async def test_pictures(name: str, output_format: str, *, pictures: bool) -> None:
    """Wherever a picture is, it is the one of the task's result, also with `pictures=False`."""
    async with Emulator(seconds=8.0, spread=0.0, seed=1, pictures=pictures) as gateway:
        gateway.script("submit", name)
        task_id = (await submit(gateway, width=64, height=96, output_format=output_format)).json["id"]
        await anyio.sleep(9)
        inline_or_urls = pictures_of((await poll(gateway, task_id)).json)
        gateway.script("poll", "status_done")
        expected = (await download(gateway, url_of(await poll(gateway, task_id)))).body
        received = [
            base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else (await download(gateway, url)).body
            for url in inline_or_urls
        ]
    with Image.open(io.BytesIO(expected)) as image:
        description = image.format, image.size

    assert description == (output_format.upper(), (64, 96) if pictures else (64, 64))
    assert received == [expected] * (3 if name == "several_groups" else 1)
    assert len(set(inline_or_urls)) == len(inline_or_urls)


# ---------------------------------------------------------------------- links


async def end_with(gateway: Emulator, name: str, **params: Any) -> tuple[EmulatedTask, str]:
    """Submit a task with a trait, wait for its end, and return it and the URL of its result."""
    gateway.script("submit", name)
    task_id = (await submit(gateway, **params)).json["id"]
    await anyio.sleep(8.01)
    return gateway.tasks[task_id], url_of(await poll(gateway, task_id))


async def test_signed_links(gateway: Emulator) -> None:
    """A signed link works as it is, and in no other spelling of the same URL."""
    task, url = await end_with(gateway, "signed_link")
    spellings = [
        str(URL(url)),
        url.replace("%40", "@"),
        url.replace("%2b", "%2B"),
        url.replace("+", "%20"),
        url.replace("+", "%2B"),
        url.replace("/flux%2Fmax", "/flux/max"),
        url.replace("%E2%9C%93", "%e2%9c%93"),
        url.partition("&")[0],
        f"{url}&x=1",
    ]
    responses = [await download(gateway, spelling) for spelling in (url, *spellings)]

    assert len({url, *spellings}) == 1 + len(spellings)
    assert [response.status for response in responses] == [200] + [403] * len(spellings)
    assert responses[0].headers["Content-Type"] == "image/jpeg"
    assert "SignatureDoesNotMatch" in responses[1].body.decode()
    assert task.downloads == 1


async def test_signed_links_expire() -> None:
    """A signed link has the lifetime of other links."""
    async with Emulator(seconds=8.0, spread=0.0, url_lifetime=5.0, pictures=False) as gateway:
        _, url = await end_with(gateway, "signed_link")
        await anyio.sleep(5.1)
        response = await download(gateway, url)

    assert (response.status, response.json["error"]["code"]) == (403, "expired")


@pytest.mark.parametrize("name", ["redirected_link", "redirected_link_relative"])
async def test_redirected_links(gateway: Emulator, name: str) -> None:
    """A redirected link leads to a signed one, and its Location has a host or none."""
    _, url = await end_with(gateway, name)
    redirect = await download(gateway, url)
    location = redirect.headers["Location"]
    absolute = location if name == "redirected_link" else f"{gateway.url}{location}"
    picture, changed = await download(gateway, absolute), await download(gateway, str(URL(absolute)))

    assert redirect.status == 302
    assert SIGNED.fullmatch(absolute)
    assert (picture.status, picture.headers["Content-Type"]) == (200, "image/jpeg")
    assert changed.status == 403


@pytest.mark.parametrize("time_scale", [1.0, 4.0])
@pytest.mark.parametrize("status", [404, 403, 202, 425, 429, 503])
async def test_late_links(status: int, time_scale: float) -> None:
    """A late link has its status for two seconds of the service after the end, and then the picture."""
    async with Emulator(seconds=8.0 * time_scale, spread=0.0, time_scale=time_scale, pictures=False) as gateway:
        _, url = await end_with(gateway, f"late_{status}")
        late = await download(gateway, url)
        await anyio.sleep(1.9 / time_scale)
        still_late = await download(gateway, url)
        await anyio.sleep(0.11)
        picture = await download(gateway, url)

    assert (late.status, still_late.status, picture.status) == (status, status, 200)
    assert late.headers.get("Retry-After") == (f"{1 / time_scale:g}" if status in {429, 503} else None)
    assert not late.body.startswith(b"\xff\xd8")
    assert picture.body.startswith(b"\xff\xd8")


async def test_html_links(gateway: Emulator) -> None:
    """The first download is a page of HTML with the status 200, the second is the picture."""
    task, url = await end_with(gateway, "html_link")
    page, picture = await download(gateway, url), await download(gateway, url)

    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert page.body.startswith(b"<html>")
    assert picture.body.startswith(b"\xff\xd8")
    assert task.downloads == 2


async def test_cut_links(gateway: Emulator) -> None:
    """The first download ends half-way like a whole one, for want of a length; the second is the picture."""
    _, url = await end_with(gateway, "cut_link", output_format="png")
    cut, picture = await download(gateway, url), await download(gateway, url)

    assert (cut.status, cut.headers["Content-Type"]) == (200, "image/png")
    assert not {"Content-Length", "Transfer-Encoding"} & cut.headers.keys()
    assert cut.body == picture.body[: len(picture.body) // 2] != b""
    assert picture.headers["Content-Length"] == str(len(picture.body))


@pytest.mark.parametrize(("name", "fault"), [("redirected_link", "cut"), ("cut_link", "cut"), ("late_404", "garbage")])
async def test_a_fault_of_a_download_whose_link_has_a_trait(gateway: Emulator, name: str, fault: str) -> None:
    """A fault changes the response that a task's link has anyway, and the next download is without it."""
    _, url = await end_with(gateway, name)
    gateway.script("download", fault)
    try:
        first = (await download(gateway, url)).status
    except aiohttp.ClientError:
        first = None
    second = await download(gateway, url)

    assert first in {None, 200, 302}
    assert second.status == {"redirected_link": 302, "cut_link": 200, "late_404": 404}[name]


async def test_parts_of_a_picture(gateway: Emulator) -> None:
    """A download can begin anywhere, if the picture is still the same; otherwise the whole one is sent."""
    _, url = await end_with(gateway, "signed_link")
    whole = await download(gateway, url)
    headers = {"Range": "bytes=100-", "If-Range": whole.headers["ETag"]}
    async with aiohttp.ClientSession() as http:
        async with http.get(URL(url, encoded=True), headers=headers) as response:
            part = response.status, response.headers["Content-Range"], await response.read()
        async with http.get(URL(url, encoded=True), headers={**headers, "If-Range": '"another"'}) as response:
            changed = response.status, await response.read()

    assert part == (206, f"bytes 100-{len(whole.body) - 1}/{len(whole.body)}", whole.body[100:])
    assert changed == (200, whole.body)


# ---------------------------------------------------------------------- shares


async def statuses_of_runs(faults: dict[str, float], **options: Any) -> tuple[list[int], list[EmulatedTask]]:
    async with Emulator(faults=faults, seed=2, max_in_flight=1000, pictures=False, **options) as gateway:
        responses = [await submit(gateway, f"cat {number}") for number in range(300)]
        return [response.status for response in responses], [*gateway.tasks.values()]


async def test_shares_of_traits_and_of_errors() -> None:
    """The shares of traits count tasks, those of errors count calls, and neither reduces the other."""
    faults = {"firewall_402": 0.3, "late_404": 0.3, "status_canceled": 0.3, "inline_base64": 0.4}
    codes, tasks = await statuses_of_runs(faults)
    traits = Counter(task.trait for task in tasks)

    assert Counter(codes).keys() == {200, 402}
    assert codes.count(402) / 300 == pytest.approx(0.3, abs=0.07)
    assert len(tasks) == codes.count(200)
    assert traits.keys() == {Fault.LATE_404, Fault.STATUS_CANCELED, Fault.INLINE_BASE64}
    assert traits[Fault.STATUS_CANCELED] / len(tasks) == pytest.approx(0.3, abs=0.1)
    assert {task.fate for task in tasks if task.trait is Fault.STATUS_CANCELED} == {"failed"}
    assert {task.fate for task in tasks if task.trait is not Fault.STATUS_CANCELED} == {"completed"}


async def test_traits_do_not_change_the_tasks() -> None:
    """With a seed, ids, durations and fates are the same with and without traits, and the traits in every run."""
    runs = [await statuses_of_runs(faults, failing=0.3) for faults in ({}, {"partial": 0.5}, {"partial": 0.5})]
    plain, first, second = (
        [(task.id, task.ends - task.begins, task.fate, task.trait) for task in run[1]] for run in runs
    )

    assert [task[::2] for task in plain] == [task[::2] for task in first]
    assert [task[1] for task in plain] == pytest.approx([task[1] for task in first])
    assert [task[::3] for task in first] == [task[::3] for task in second]
    assert Counter(task[3] for task in first).keys() == {None, Fault.PARTIAL}


async def test_a_script_precedes_the_shares() -> None:
    """A trait that is scripted for a submit replaces the one that the shares would give."""
    async with Emulator(faults={"late_404": 1.0}, pictures=False) as gateway:
        gateway.script("submit", "cut_link", None, "envelope")
        for _ in range(3):
            await submit(gateway)
        traits = [task.trait for task in gateway.tasks.values()]

    assert traits == [Fault.CUT_LINK, Fault.LATE_404, Fault.LATE_404]


@pytest.mark.parametrize("faults", [{"cut": 1.0, "late_404": 1.0, "not_found": 1.0}, dict.fromkeys(TRAITS, 0.016), {}])
def test_valid_shares(faults: dict[str, float]) -> None:
    """The shares of calls, those of traits and that of `not_found` may each be 1 together."""
    Emulator(faults=faults)


@pytest.mark.parametrize(
    ("faults", "names"),
    [
        ({"cut": 0.6, "firewall": 0.6, "late_404": 0.2}, "cut, firewall"),
        ({"late_404": 0.6, "cut": 0.5, "partial": 0.6}, "late_404, partial"),
        ({"not_found": 1.1}, "not_found"),
        ({"cut": -0.1}, "cut"),
        ({"cut": float("nan")}, "cut"),
        ({"hang": 5}, "hang"),
    ],
)
def test_invalid_shares(faults: dict[str, float], names: str) -> None:
    """Shares that can't be met raise an error that names them."""
    message = f"the shares of {names} must be at least 0, and at most 1 together"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Emulator(faults=faults)


# ---------------------------------------------------------------------- webhooks


async def deliver(name: str, webhooks: Webhooks, **params: Any) -> Any:
    """Return the body of the webhook of a task with a trait."""
    hook = ScriptedGateway()
    async with hook, Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False, webhooks=webhooks) as gateway:
        gateway.script("submit", name)
        await submit(gateway, webhook_url=f"{hook.url}/hook", **params)
        await anyio.sleep(9)
    return hook.received[-1].json


@pytest.mark.parametrize("name", TRAITS)
async def test_webhooks_have_the_traits_of_polls(name: str) -> None:
    """A webhook in the format of polls has the trait of its task."""
    body = await deliver(name, Webhooks())

    assert matches(body, TRAITS[name][1]), body


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("status_done", {"status": "DONE", "result": {"sample": LINK, "prompt": "a cat", "seed": 7}}),
        ("status_unknown", {"status": "Finalized", "result": {"sample": LINK, "prompt": "a cat", "seed": 7}}),
        ("status_canceled", {"status": "canceled", "error": "generation_failed", "message": str}),
        ("status_request_moderated", {"status": "Request Moderated", "error": str, "message": "Request Moderated"}),
        ("error_as_text", {"status": "Error", "error": "generation_failed", "message": str}),
        ("inline_b64_json", {"status": "Ready", "result": {"sample": DATA, "prompt": "a cat", "seed": 7}}),
        ("inline_data_uri", {"status": "Ready", "result": {"sample": DATA, "prompt": "a cat", "seed": 7}}),
        ("maker_result", {"status": "Ready", "result": {"sample": LINK, "prompt": "a cat", "seed": 7}}),
        ("signed_link", {"status": "Ready", "result": {"sample": SIGNED, "prompt": "a cat", "seed": 7}}),
        ("partial", {"status": "Ready", "result": {"sample": LINK, "prompt": "a cat", "seed": 7}}),
    ],
)
async def test_webhooks_in_the_makers_format(name: str, expected: dict[str, Any]) -> None:
    """A webhook in the maker's format has the trait's status, and the inline picture or the link as its sample."""
    body = await deliver(name, Webhooks(shape="maker"), seed=7)

    assert matches(body, {"id": CREATED, **expected, "timestamp": str}), body


# ---------------------------------------------------------------------- the table


def test_every_name_has_a_test() -> None:
    """The tables of this file hold each name once."""
    names = [*ERRORS, *RESPONSES, *CONNECTIONS, *TRAITS]

    assert sorted(names) == sorted(Fault)


def test_the_readme_names_every_fault() -> None:
    """The table in the documentation has each name."""
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")

    assert [fault for fault in Fault if f"`{fault}`" not in page] == []


def test_every_status_word_has_a_name() -> None:
    """Each word that the client knows is a trait, in another spelling, and with the meaning that the client sees."""
    words = {
        phase: {word for trait in TRAIT_TABLE.values() if isinstance(word := getattr(trait, phase).get("status"), str)}
        for phase in ("running", "completed", "failed")
    }
    known = {re.sub(r"[\s_-]", "", word).lower() for phase in words.values() for word in phase}
    unknown = {"Denoising {step}/28", "Finalized", "Unfulfilled"}

    assert statuses.KNOWN_STATUSES.keys() - {"in_progress"} <= known
    for phase, meanings in {
        "running": {TaskStatus.PENDING, TaskStatus.IN_PROGRESS},
        "completed": {TaskStatus.COMPLETED},
        "failed": {TaskStatus.FAILED, TaskStatus.COMPLETED},  # COMPLETED_WITH_ERROR and the like
    }.items():
        assert {statuses.status_of(word) for word in words[phase] - unknown} == meanings
    assert {statuses.status_of(word) for word in unknown} == {None}
    assert {fault for fault, trait in TRAIT_TABLE.items() if statuses.is_moderated(trait.failed.get("status", ""))} == {
        fault for fault, trait in TRAIT_TABLE.items() if trait.fate == "moderated"
    }
    assert statuses.is_not_found(ERRORS["status_task_not_found"][1]["status"])
