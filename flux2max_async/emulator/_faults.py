"""The names of everything that can go wrong, or be different, with calls and tasks.

What each name does is in tables: the responses in `_answers`, the traits of tasks in `_traits`.
"""

from enum import StrEnum, auto


class Fault(StrEnum):
    """What can go wrong, or be different, with a call or a task.

    A call that meets an error leaves the service unchanged. A trait belongs to a task: a submit creates the task with
    it, or a poll gives it to the polled task.
    """

    # ------------------------------------------------------------------ errors in place of a call, by HTTP status
    RATE_LIMITED = auto()  # 429 with Retry-After in seconds
    RATE_LIMITED_DATE = auto()  # 429 with Retry-After as a date
    RATE_LIMITED_BODY = auto()  # 429 with `retry_after` in the body, and X-RateLimit headers
    SERVER_ERROR = auto()  # 500
    BAD_GATEWAY = auto()  # 502 with a proxy's HTML page
    UNAVAILABLE = auto()  # 503
    RETRY_LATER = auto()  # 503 with Retry-After
    GATEWAY_TIMEOUT = auto()  # 504
    BAD_REQUEST = auto()  # 400
    UNPROCESSABLE = auto()  # 422
    UNAUTHORIZED = auto()  # 401
    PAYMENT_REQUIRED = auto()  # 402
    FORBIDDEN = auto()  # 403
    NOT_FOUND = auto()  # 404. As a share: polls do not find that share of the new tasks in their first two seconds.
    METHOD_NOT_ALLOWED = auto()  # 405
    REQUEST_TIMEOUT = auto()  # 408
    STATUS_TASK_NOT_FOUND = auto()  # 200 with the status "Task not found"

    # ------------------------------------------------------------------ errors in place of a call, by the body's shape
    ERROR_CODE_MESSAGE = auto()  # {"error": {"code", "message"}}
    ERROR_ERROR_MESSAGE = auto()  # {"error": {"code", "error_message"}}
    ERROR_TEXT_AND_MESSAGE = auto()  # {"error": "…", "message"}
    ERROR_MESSAGE = auto()  # {"message": "Forbidden"}, with 403
    ERROR_STATUS = auto()  # {"status": {"code", "message"}}
    ERROR_DETAIL = auto()  # {"detail": "…"}
    ERROR_DETAIL_LIST = auto()  # {"detail": [{"loc", "msg"}]}, with 422
    ERROR_EMPTY = auto()  # no body
    ERROR_200 = auto()  # {"error": {"code", "error_message"}}, with 200
    ERROR_200_ENVELOPE = auto()  # {"status": {"code": 500, "message"}, "data": null}, with 200

    # ------------------------------------------------------------------ an empty balance, by code and by words
    BALANCE_40201 = auto()  # 402, in `error.code`
    BALANCE_40202 = auto()  # 402, in `status.error_code`
    BALANCE_40203 = auto()  # 429, in `status.error_code`
    BALANCE_40204 = auto()  # 403, in `error.code`, as text
    BALANCE_40205 = auto()  # 400, in `code`
    BALANCE_40206 = auto()  # 403, in `status.error_code`
    BALANCE_40207 = auto()  # 400, in `error.code`
    BALANCE_40208 = auto()  # 429, in `code`
    INSUFFICIENT_BALANCE = auto()  # 403
    INSUFFICIENT_CREDITS = auto()  # 400
    EXHAUSTED_BALANCE = auto()  # 403
    IN_ARREARS = auto()  # 400
    QUOTA_EXCEEDED = auto()  # 429

    # ------------------------------------------------------------------ moderation
    MODERATION_BLOCKED = auto()  # 400
    CONTENT_POLICY_VIOLATION = auto()  # 403
    CONTENT_FILTER = auto()  # 422
    SAFETY_VIOLATION = auto()  # 400
    FLAGGED_AS_SENSITIVE = auto()  # 400, by its words alone
    MODERATION_TIMEOUT = auto()  # 503: moderation did not answer, so it refused nothing

    # ------------------------------------------------------------------ firewalls: none of the API's shapes
    FIREWALL = auto()  # 403 with an HTML page
    FIREWALL_400 = auto()
    FIREWALL_401 = auto()
    FIREWALL_402 = auto()
    FIREWALL_TEXT = auto()  # 403 with text
    FIREWALL_EMPTY = auto()  # 403 without a body
    FIREWALL_JSON = auto()  # 403 with JSON of the firewall's own

    # ------------------------------------------------------------------ connections
    RESET_BEFORE = auto()  # reset before the body of the call is read; the service is unchanged
    RESET_AFTER = auto()  # the call takes effect, then the connection is reset
    HANG = auto()  # the call takes effect and is never answered
    CUT = auto()  # the call takes effect, and the connection is closed after half of the response
    GARBAGE = auto()  # the call takes effect, and the response is an HTML page with 200
    HUGE_HEADERS = auto()  # the call takes effect, and the response has a header of 20 KB

    # ------------------------------------------------------------------ other responses to calls that take effect
    ENVELOPE = auto()  # {"status": {"code": 200, "message": "ok"}, "data": {…}}
    ENVELOPE_ZERO = auto()  # the same with the code 0
    SYNC_TIMEOUT = auto()  # 504 with the task's id, `in_progress` and the error SYNC_TIMEOUT
    NO_ID = auto()  # an envelope whose data is empty

    # ------------------------------------------------------------------ traits: the status while the task runs
    STATUS_PENDING = auto()
    STATUS_IN_PROGRESS = auto()
    STATUS_PROCESSING = auto()
    STATUS_QUEUED = auto()
    STATUS_SUBMITTED = auto()
    STATUS_STARTING = auto()
    STATUS_RUNNING = auto()

    # ------------------------------------------------------------------ traits: the status of a completed task
    STATUS_COMPLETED = auto()
    STATUS_SUCCESS = auto()
    STATUS_SUCCEEDED = auto()
    STATUS_READY = auto()
    STATUS_DONE = auto()

    # ------------------------------------------------------------------ traits: the task fails with a status alone
    STATUS_FAILED = auto()
    STATUS_ERROR = auto()
    STATUS_CANCELLED = auto()
    STATUS_CANCELED = auto()
    STATUS_ABORTED = auto()
    STATUS_TIMEOUT = auto()
    STATUS_EXPIRED = auto()
    STATUS_REJECTED = auto()
    STATUS_MODERATED = auto()
    STATUS_REQUEST_MODERATED = auto()
    STATUS_CONTENT_MODERATED = auto()

    # ------------------------------------------------------------------ traits: other task objects
    STATUS_UNKNOWN = auto()  # unknown words: one with a counter while the task runs, another when it has ended
    STATUS_UNKNOWN_FAILED = auto()  # the same, and the task fails, which only its error shows
    ERROR_WHILE_RUNNING = auto()  # an error beside `in_progress`, which ends nothing
    ERROR_AS_TEXT = auto()  # the task fails, and its error is text
    ERROR_WITH_NUMBER = auto()  # the task fails, and its error is {"code": 123, "error_message"}
    COMPLETED_WITH_ERROR = auto()  # the task fails with the status `completed`, an error and no output
    COMPLETED_WITHOUT_OUTPUT = auto()  # the task fails with the status `completed`, and neither an error nor an output
    PROGRESS_MISSING = auto()
    PROGRESS_STUCK = auto()  # 0 until the end
    CREATED_AT_TEXT = auto()  # an ISO 8601 time
    COST_NUMBER = auto()  # a number, with `quantity`, `unit_price` and `used` beside it
    COST_EMPTY = auto()  # empty text
    COST_NULL = auto()
    USAGE_MISSING = auto()

    # ------------------------------------------------------------------ traits: pictures
    INLINE_DATA_URI = auto()  # `url` is a data: URI
    INLINE_B64_JSON = auto()  # `b64_json` in place of `url`
    INLINE_BASE64 = auto()  # `base64` in place of `url`
    IMAGE_URL_TYPE = auto()  # the type is `image_url`
    IMAGE_URL_TEXT = auto()  # `image_url` in place of `url`
    IMAGE_URL_OBJECT = auto()  # `image_url` is an object with `url`
    MAKER_RESULT = auto()  # the format of the model's maker, with `result.sample`
    SEVERAL_GROUPS = auto()  # three pictures in two groups
    PARTIAL = auto()  # one of three pictures, and the error of moderation beside it

    # ------------------------------------------------------------------ traits: links
    SIGNED_LINK = auto()  # percent-encoded and signed: any other spelling is answered with 403
    REDIRECTED_LINK = auto()  # 302 to a signed link
    REDIRECTED_LINK_RELATIVE = auto()  # 302 to a signed link without a host
    LATE_404 = auto()  # in the first two seconds after the end
    LATE_403 = auto()
    LATE_202 = auto()
    LATE_425 = auto()
    LATE_429 = auto()  # with Retry-After
    LATE_503 = auto()  # with Retry-After
    HTML_LINK = auto()  # the first download is answered with an HTML page
    CUT_LINK = auto()  # the first download is cut, and has no length
