"""The clock that goes on while the machine is suspended."""

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import flux2max_async
from flux2max_async._clock import continuous_clock, suspended_seconds

LINUX = SimpleNamespace(CLOCK_MONOTONIC=1, CLOCK_BOOTTIME=7)
MACOS = SimpleNamespace(CLOCK_MONOTONIC=6, CLOCK_UPTIME_RAW=8)


@pytest.mark.parametrize(
    ("available", "platform", "clock"),
    [
        pytest.param(LINUX, "linux", 7, id="Linux"),
        pytest.param(MACOS, "darwin", 6, id="macOS"),
        pytest.param(SimpleNamespace(), "win32", None, id="Windows, whose monotonic clock goes on"),
        pytest.param(SimpleNamespace(CLOCK_MONOTONIC=4), "freebsd13", None, id="nothing known"),
    ],
)
def test_continuous_clock(available: object, platform: str, clock: int | None) -> None:
    """Each platform has another clock that goes on, or none."""
    assert continuous_clock(available, platform) == clock


def test_without_a_continuous_clock_no_suspension_is_seen() -> None:
    """Where there is no such clock, the number never changes."""
    assert suspended_seconds(None) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="CLOCK_BOOTTIME is Linux's")
def test_suspended_seconds_are_those_between_two_clocks() -> None:
    """The number is the lead of CLOCK_BOOTTIME over the monotonic clock, which time that is merely spent doesn't raise."""
    before = suspended_seconds()
    lead = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    time.sleep(0.05)

    # A wide margin: the machine may be busy between the readings of the two clocks.
    assert before == pytest.approx(lead, abs=5.0)
    assert suspended_seconds() == pytest.approx(before, abs=5.0)


def test_the_time_of_day_decides_nothing_about_tasks() -> None:
    """A wall clock that jumps changes no submit and no poll: only the time at which a response came is read from it."""
    package = Path(flux2max_async.__file__).parent
    reads = re.compile(r"datetime\.(?:utc)?now\(|date\.today\(|\btime\.(?:time|localtime|gmtime|strftime)\b")
    uses = {
        path.relative_to(package).as_posix(): count
        for part in ("_api", "_polling", "_tasks")
        for path in (package / part).glob("*.py")
        if (count := len(reads.findall(path.read_text(encoding="utf-8"))))
    }

    # Of a response: for a Retry-After that is a date, if there is no Date header, and for the age of an image's URL,
    # which decides whether a replay's links are renewed. An outage is reported with the time of its end.
    assert uses == {
        "_api/transport.py": 1,
        "_api/download_response.py": 1,
        "_tasks/link_renewal.py": 1,
        "_api/outage.py": 1,
    }
