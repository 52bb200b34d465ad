"""The options that several commands have, each with the variable that stands for it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def option(*names: str, metavar: str, text: str, variable: str | None = None, **more: Any) -> Any:
    """Describe an option, and the variable that stands for it."""
    envvar = variable and f"FLUX2MAX_{variable}"
    return typer.Option(*names, metavar=metavar, help=text, envvar=envvar, show_envvar=False, **more)


Width = Annotated[int | None, option("--width", metavar="PIXELS", text="At least 64.", variable="WIDTH")]
Height = Annotated[int | None, option("--height", metavar="PIXELS", text="At least 64.", variable="HEIGHT")]
Seed = Annotated[
    int | None, option("--seed", metavar="NUMBER", text="The same seed gives the same picture.", variable="SEED")
]
Tolerance = Annotated[
    int | None,
    option(
        "--safety-tolerance", metavar="0-5", text="0 is strictest; the service's default is 2.",
        variable="SAFETY_TOLERANCE",
    ),
]  # fmt: skip
Format = Annotated[
    Literal["jpeg", "png"] | None,
    option("--format", metavar="jpeg|png", text="The service's default is jpeg.", variable="FORMAT"),
]
Images = Annotated[
    list[str] | None,
    option("--image", "-i", metavar="IMAGE", text="A reference picture, as a URL or a file; up to 8."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", dir_okay=False, help="File that holds the API key."),
]
BaseUrl = Annotated[str | None, option("--base-url", metavar="URL", text="The gateway's address.", variable="BASE_URL")]
TaskTimeout = Annotated[
    float, option("--task-timeout", metavar="SECONDS", text="How long to wait for a task.", variable="TASK_TIMEOUT")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Default: flux2max-<task id>.<format>."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
TaskId = Annotated[str, typer.Argument(metavar="TASK_ID", help="The task's id.")]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="The output folder of a batch.")
]
