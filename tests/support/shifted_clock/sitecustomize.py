"""Shift the time of day of a Python process by the seconds in a file, which may change while it runs.

With this folder in PYTHONPATH, Python imports this module when it starts, before anything else reads the clock.
"""

import datetime as dt
import os
import time
from pathlib import Path
from typing import Any

_FILE = Path(os.environ["CLOCK_SHIFT_FILE"])
_RealDatetime: Any = dt.datetime
_real_time, _real_time_ns = time.time, time.time_ns


def _shift() -> int:
    try:
        return int(_FILE.read_text(encoding="ascii") or 0)
    except FileNotFoundError:
        return 0


class _Meta(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _RealDatetime)


class _Datetime(_RealDatetime, metaclass=_Meta):  # type: ignore[misc]
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return _RealDatetime.now(tz) + dt.timedelta(seconds=_shift())


time.time = lambda: _real_time() + _shift()
time.time_ns = lambda: _real_time_ns() + _shift() * 10**9
dt.datetime = _Datetime  # type: ignore[misc]
