"""Serialization: requests to HTTP requests, and the responses to them to snapshots or errors.

Sources of facts: [S] the vendor's page for the model, [C] the vendor's open-source clients, [D] the vendor's other
pages, [B] the documentation of BFL, the maker of the model, whose service processes the requests. If these sources
differ, all variants are accepted. A response that can't be parsed is a ProtocolError with the JSON path.
"""

import contextlib
import json
from typing import Any
from urllib.parse import quote

import attrs
import cattrs
from cattrs.gen import make_dict_unstructure_fn, override

from flux2max_async._api.classification import is_moderation
from flux2max_async._api.response import (
    HttpResponse,
    error_from_response,
    extract_error,
    has_clear_error,
    is_gateway_timeout,
    unreadable_body_error,
)
from flux2max_async._api.statuses import KNOWN_STATUSES, is_not_found, status_of
from flux2max_async._api.task_object import MAX_ID_LENGTH, find_task, snapshot_from_json, unwrap_task
from flux2max_async._api.values import MAX_PREFIX_BYTES, check_structure, load_object, parse_json
from flux2max_async._exceptions import (
    BadRequestError,
    ConfigurationError,
    ContentModeratedError,
    FluxError,
    InsufficientBalanceError,
    InvalidRequestError,
    PermissionDeniedError,
    ProtocolError,
    ResponseError,
    TaskNotFoundError,
)
from flux2max_async._models.images import error_at_index
from flux2max_async._models.request import IMAGE_PARAMETERS, GenerationRequest
from flux2max_async._models.results import TaskSnapshot, TaskStatus
from flux2max_async._models.secret_text import SecretText

MODEL = "flux_2_max"

# As in [C] and [D].
_GENERATION_PATH = "/model/v1/generation"
_TASK_PATH = "/model/v1/generation/task/"


@attrs.frozen
class HttpRequest:
    """An HTTP request to the API."""

    method: str
    path: str
    """Percent-encoded, relative to the base URL."""
    body: bytes | None = attrs.field(default=None, repr=False)


# ------------------------------------------------------------------ requests


def build_submit(request: GenerationRequest) -> HttpRequest:
    """Return the submit of a request.

    Reads and encodes local images: if there are any, call this in a worker thread.

    Raises:
        InvalidRequestError: A local image is missing, empty, too large or of a type that the service doesn't accept.
    """
    params: dict[str, Any] = _converter.unstructure(request)
    for index, (name, image) in enumerate(zip(IMAGE_PARAMETERS, request.input_images, strict=False)):
        try:
            params[name] = image.encode()
        except InvalidRequestError as error:
            raise error_at_index(error, index) from error.__cause__
    params.update((name, value) for name, value in request.extra.items() if value is not None)
    return HttpRequest("POST", _GENERATION_PATH, json.dumps({"model": MODEL, "input": [{"params": params}]}).encode())


def validate_task_id(task_id: str) -> str:
    """Return the task id.

    Raises:
        InvalidRequestError: It can't be one.
    """
    if not isinstance(task_id, str) or not task_id:
        raise InvalidRequestError(f"task_id must be text that is not empty, not {task_id!r}", field="task_id")
    if len(task_id) > MAX_ID_LENGTH:
        message = f"task_id must have at most {MAX_ID_LENGTH:,} characters, not {len(task_id):,}"
        raise InvalidRequestError(message, field="task_id")
    return task_id


def build_poll(task_id: str) -> HttpRequest:
    """Return the poll of a task.

    Task ids are opaque: slashes are percent-encoded, and so are ids that would be relative path segments.
    """
    encoded = quote(task_id, safe="", errors="surrogatepass")
    return HttpRequest("GET", _TASK_PATH + (encoded.replace(".", "%2E") if task_id in {".", ".."} else encoded))


# ------------------------------------------------------------------ responses


def parse_submit(response: HttpResponse, *, base_url: str = "") -> TaskSnapshot:
    """Parse the response to a submit.

    If it has a task id, whatever its HTTP status, the task exists and costs money. Then no other part of it can cause
    an error, unless the service refuses the request; the error then has the id. It is enough if the response begins
    with an object that has one.

    Args:
        response: The response.
        base_url: Where the API should be; named in the error if it isn't there.

    Raises:
        ResponseError: The service refused the submit.
        ContentModeratedError: Moderation refused its content.
        ConfigurationError: There is no such API at the base URL.
        ProtocolError: The response has neither an id nor a clear error, so it is unknown whether a task exists.
    """
    is_success = 200 <= response.status < 300
    check_structure(response.body)  # also of an error, which could have an id
    body = load_object(response.body)
    task_id, task = find_task(body)
    if task_id is None:
        if len(response.body) > MAX_PREFIX_BYTES or (not is_success and not body and _may_have_id(response.body)):
            raise ProtocolError("the response to the submit may have a task id, but can't be read")
        body = _parse_body(response) if is_success else body
        if is_success and (not has_clear_error(body) or is_gateway_timeout(body)):
            raise ProtocolError("the response to the submit has neither a task id nor an error")
        raise _submit_error(response, base_url)
    if not is_success:
        word = task.get("status")
        status = status_of(word) if isinstance(word, str) else None
        if status in {None, TaskStatus.FAILED} and _is_final_error(response.status):
            error = _submit_error(response, base_url)
            error.task_id = task_id
            raise error
        if status is not TaskStatus.FAILED:
            task = {**task, "error": None}  # it is why the service has not waited for the task's end
    try:
        return snapshot_from_json(task_id, task, raw=body, secrets=response.secrets, received_at=response.received)
    except ProtocolError:
        return TaskSnapshot(task_id=task_id, status=TaskStatus.IN_PROGRESS, raw=body)


def _may_have_id(body: bytes) -> bool:
    """Return whether JSON that can't be parsed, be it cut off or nested too deeply, has something like an id."""
    return body.lstrip()[:1] in {b"{", b"["} and b'"id"' in body


def _parse_body(response: HttpResponse) -> dict[str, Any]:
    """Return the JSON object that a response is, from the first byte to the last.

    Raises:
        ProtocolError: It is none.
    """
    body: object = None
    with contextlib.suppress(ValueError):
        body = parse_json(response.body)
    if not isinstance(body, dict):
        raise unreadable_body_error(response)
    return body


def _is_final_error(status: int) -> bool:
    """Return whether an HTTP error with a task id is final: the gateway has not merely given up waiting [C]."""
    return 300 <= status < 500 and status not in {408, 429}


def _submit_error(response: HttpResponse, base_url: str) -> FluxError:
    """Return the error of a submit that has certainly not been accepted, or has an HTTP error status."""
    error = error_from_response(response)
    if type(error) is InsufficientBalanceError:
        return error
    if response.status in {404, 405} or 300 <= response.status < 400:
        return ConfigurationError(f"base_url {base_url!r} is wrong: no such API is there: {error}")
    # Not by the page of a firewall, nor if another meaning of the status is certain.
    is_refusal = response.status < 500 and type(error) in {BadRequestError, PermissionDeniedError, ResponseError}
    if is_refusal and error.from_api and response.status != 408 and is_moderation(error.code, error.message):
        return ContentModeratedError(error.message, code=error.code)
    return error


def parse_poll(response: HttpResponse, task_id: str) -> TaskSnapshot:
    """Parse the response to a poll.

    Raises:
        ResponseError: The service responded with an error.
        ProtocolError: The response can't be parsed as a task.
    """
    if not 200 <= response.status < 300:
        raise error_from_response(response)
    body = load_object(response.body) or _parse_body(response)
    task = unwrap_task(body)
    word = task.get("status")
    if isinstance(word, str) and word not in KNOWN_STATUSES and is_not_found(word):
        raise TaskNotFoundError("the service reports that there is no such task", status=404)
    try:
        return snapshot_from_json(task_id, task, raw=body, secrets=response.secrets, received_at=response.received)
    except ProtocolError:
        if not isinstance(word, str) and extract_error(body) is not None:
            raise error_from_response(response) from None
        raise


# ------------------------------------------------------------------ the converter


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_unstructure_hook(SecretText, str)
    converter.register_unstructure_hook(
        GenerationRequest,
        make_dict_unstructure_fn(
            GenerationRequest,
            converter,
            # Only what the caller set is sent, and never null.
            _cattrs_omit_if_default=True,
            input_images=override(omit=True),
            extra=override(omit=True),
            key=override(omit=True),
        ),
    )
    return converter


_converter = _make_converter()
