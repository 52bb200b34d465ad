"""Write the Python examples of documents as files, for type checkers: `documented_code.py FOLDER DOCUMENT...`.

The folder also gets a configuration for basedpyright that checks them, `examples/` and `typed_calls.py` as Pylance does.
"""

import json
import re
import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
CONFIGURATION = {
    "typeCheckingMode": "standard",
    "pythonVersion": "3.11",
    "reportMissingImports": False,
    "reportFunctionMemberAccess": False,  # Celery has no types, and makes objects of functions
    "enableTypeIgnoreComments": False,
    "reportUnnecessaryTypeIgnoreComment": True,
    "include": [".", str(PROJECT / "examples"), str(PROJECT / "tests" / "support" / "typed_calls.py")],
}


def write(folder: Path, documents: list[str]) -> None:
    """Write each block of Python of the documents into a file of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for document in map(Path, documents):
        blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
        for number, block in enumerate(blocks):
            (folder / f"{document.stem.lower()}_{number}.py").write_text(block, encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps(CONFIGURATION), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
