"""Writes what a benchmark found into RESULTS.md: each script its own section, with what is needed to run it again."""

import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# What the benchmarks found\n"
DISTRIBUTIONS = (
    "flux2max_async", "aiohttp", "anyio", "attrs", "cattrs", "uvloop", "numpy", "scipy",
    "replicate", "fal-client", "lumaai", "runwayml", "seaart-sdk", "httpx",
)  # fmt: skip


def write(section: str, markdown: str, command: str, path: Path = RESULTS) -> None:
    """Replace a section, or put it at the end; the others stay as they are.

    Args:
        section: Its heading, without the `## `.
        markdown: Its text; headings in it begin at `###`.
        command: How it was measured.
        path: The file.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else TITLE
    text = f"## {section}\n\n{about(command)}\n\n{markdown.strip()}\n"
    old = re.compile(rf"^## {re.escape(section)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    after = old.sub(lambda _: text + "\n", before) if old.search(before) else f"{before.rstrip()}\n\n{text}"
    path.write_text(after.rstrip() + "\n", encoding="utf-8")


def about(command: str) -> str:
    """Say how, when and with what something was measured."""
    return (
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {_processors()}; {', '.join(_versions())}."
    )


def blocks(*texts: str) -> str:
    """Put paragraphs, headings and tables under each other."""
    return "\n\n".join(texts)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _processors() -> str:
    """Name the processors, where the system says what they are."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _versions() -> list[str]:
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
