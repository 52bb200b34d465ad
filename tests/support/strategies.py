"""Hypothesis strategies: arbitrary JSON, and task objects whose fields may contain it."""

import json
import pickle
from datetime import UTC
from decimal import Decimal
from email.utils import format_datetime
from typing import Any

from hypothesis import strategies as st

from flux2max_async import TaskSnapshot, TaskStatus

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from(["", "completed", "failed", "t1", "1e999", "0.07", "https://a.example/", "2025-11-22T08:26:40Z"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "status", "error", "code", "message", "output", "content", "url", "retry_after", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def mostly(valid: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for valid values, and sometimes arbitrary JSON."""
    return valid | valid | JSON


ERRORS = mostly(
    st.fixed_dictionaries(
        {}, optional={"code": mostly(st.integers()), "message": mostly(st.text()), "error_message": mostly(st.text())}
    )
)
CONTENTS = mostly(
    st.fixed_dictionaries(
        {"url": mostly(st.just("https://a.example/"))}, optional={"type": mostly(st.just("image")), "jobId": JSON}
    )
)
TASKS = st.fixed_dictionaries(
    {},
    optional={
        "id": mostly(st.just("t1")),
        "status": mostly(st.sampled_from(["pending", "in_progress", "completed", "failed", "PROCESSING", "odd"])),
        "created_at": mostly(st.integers(0, 2**32)),
        "progress": mostly(st.floats(0, 1)),
        "output": mostly(
            st.lists(mostly(st.fixed_dictionaries({"content": mostly(st.lists(CONTENTS, max_size=3))})), max_size=2)
        ),
        "usage": mostly(st.fixed_dictionaries({}, optional={"cost": mostly(st.just("0.07")), "discount": JSON})),
        "metadata": mostly(st.dictionaries(st.text(max_size=3), JSON, max_size=2)),
        "error": ERRORS,
        "message": mostly(st.text()),
        "retry_after": JSON,
        "detail": JSON,
    },
)
DATES = st.datetimes(timezones=st.just(UTC)).map(lambda date: format_datetime(date, usegmt=True))
DATE_PARTS = st.lists(
    st.sampled_from(["Sat,", "22", "Nov", "2025", "10:00:05", "GMT", "+0100", "-0000", "99", "9999999999", "-", " "]),
    max_size=7,
)
DATE_LIKE = DATE_PARTS.map(" ".join) | DATE_PARTS.map("".join)
RESPONSE_HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": st.text(max_size=20) | st.floats().map(str) | DATES | DATE_LIKE,
        "Date": DATES | DATE_LIKE | st.text(max_size=20),
        "Location": st.text(max_size=10),
        "X-Request-Id": st.text(max_size=10),
    },
)
STATUSES = st.sampled_from([200, 200, 200, 201, 204]) | st.integers(100, 599)
BODIES = st.binary(max_size=60) | st.one_of(JSON, TASKS, TASKS, TASKS).map(lambda value: json.dumps(value).encode())


def check_snapshot(snapshot: TaskSnapshot) -> None:
    """Check the invariants of a snapshot."""
    assert isinstance(snapshot.status, TaskStatus)
    assert (snapshot.error is not None) == (snapshot.status is TaskStatus.FAILED)
    assert snapshot.images or snapshot.status is not TaskStatus.COMPLETED
    assert all(image.url and isinstance(image.type, str) for image in snapshot.images)
    assert [image.index for image in snapshot.images] == list(range(len(snapshot.images)))
    assert snapshot.progress is None or 0 <= snapshot.progress <= 1
    assert snapshot.created_at is None or snapshot.created_at.tzinfo is not None
    assert snapshot.usage is None or (Decimal(0) + (snapshot.usage.cost or 0)).is_finite()
    if snapshot.error is not None:
        assert snapshot.error.message
        assert isinstance(snapshot.error.code, str | None)
    assert repr(pickle.loads(pickle.dumps(snapshot))) == repr(snapshot)
