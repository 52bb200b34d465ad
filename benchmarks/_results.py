"""Writes benchmark results to RESULTS.md: one section per script, with what is needed to run it again."""

import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# Benchmark results\n"
DISTRIBUTIONS = (
    "flux2max_async", "aiohttp", "anyio", "attrs", "cattrs", "uvloop", "numpy", "scipy",
    "replicate", "fal-client", "lumaai", "runwayml", "seaart-sdk", "openai", "httpx",
    "fastapi", "starlette", "uvicorn", "granian", "gunicorn", "uvicorn-worker",
)  # fmt: skip


def write(section: str, markdown: str, command: str, path: Path = RESULTS) -> None:
    """Replace a section, or append it; the others stay as they are.

    Args:
        section: Its heading, without the `## `.
        markdown: Its text; headings in it begin at `###`.
        command: The command that measured the results.
        path: The file.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else TITLE
    text = f"## {section}\n\n{about(command)}\n\n{markdown.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(section)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    after = pattern.sub(lambda _: text + "\n", before) if pattern.search(before) else f"{before.rstrip()}\n\n{text}"
    path.write_text(after.rstrip() + "\n", encoding="utf-8")


def about(command: str) -> str:
    """Return how, when and with which versions the results were measured."""
    return (
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {_processors()}; {', '.join(_versions())}."
    )


def blocks(*texts: str) -> str:
    """Join paragraphs, headings and tables."""
    return "\n\n".join(texts)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _processors() -> str:
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
