"""The small programs in `examples/`, run as a user would."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest
from PIL import Image

from flux2max_async.emulator import Emulator

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def gateway() -> Iterator[Emulator]:
    """Provide a service in a thread, whose tasks take 0.2 s."""
    with Emulator(seconds=0.2, spread=0.1, seed=1) as emulator:
        yield emulator


@pytest.fixture
def environment(gateway: Emulator) -> dict[str, str]:
    """Provide the environment of a program on that service."""
    return {**os.environ, "FLUX2MAX_API_KEY": gateway.api_key, "FLUX2MAX_BASE_URL": gateway.url}


def run(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_progress_bar(gateway: Emulator, environment: dict[str, str], tmp_path: Path) -> None:
    """A hundred prompts end with a full bar, what they cost and a hundred pictures; a second run pays nothing."""
    first = run(tmp_path, environment, str(EXAMPLES / "progress_bar.py"))
    second = run(tmp_path, environment, str(EXAMPLES / "progress_bar.py"))

    assert "100/100" in first.stderr
    assert "100/100" in second.stderr
    assert len(list((tmp_path / "herbarium").glob("*.jpeg"))) == 100
    assert gateway.accepted.total() == 100


def test_edit_pictures(gateway: Emulator, environment: dict[str, str], tmp_path: Path) -> None:
    """Two pictures in memory become a third, which is edited without a file in between."""
    for name, mode in (("person.png", "RGBA"), ("place.jpeg", "RGB")):
        Image.new(mode, (600, 600), "teal").save(tmp_path / name)
    run(tmp_path, environment, str(EXAMPLES / "edit_pictures.py"), "person.png", "place.jpeg", "night.png")
    with Image.open(tmp_path / "night.png") as picture:
        picture.load()

    assert picture.size == (1024, 1024)
    first, _ = gateway.tasks.values()
    assert len(first.input_images) == 2


def test_notebook(gateway: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each cell of the notebook runs in a real kernel, and outcomes are shown as pictures."""
    monkeypatch.setenv("FLUX2MAX_API_KEY", gateway.api_key)
    monkeypatch.setenv("FLUX2MAX_BASE_URL", gateway.url)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    notebook = nbformat.from_dict(cells)  # type: ignore[no-untyped-call]  # nbformat has few annotations
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]

    assert len(shown) == 4
    assert all("<img" in html for html in shown)
    assert len(list((tmp_path / "pictures").glob("*.jpeg"))) == 3
    assert gateway.accepted.total() == 4


def test_test_of_the_picture_service(tmp_path: Path) -> None:
    """The test of the web service passes, with a service that answers with the picture itself."""
    for name in ("picture_service.py", "test_picture_service.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n", encoding="utf-8")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", str(tmp_path))
    result = run(tmp_path, dict(os.environ), *command)

    assert "1 passed" in result.stdout
