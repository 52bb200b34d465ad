"""What a forked process must not use: what its parent has open. Its threads and connections are the parent's."""

import os

from flux2max_async._exceptions import FluxError


def check_process(process_id: int, subject: str, error_class: type[FluxError]) -> None:
    """Check that this process is the one that has opened something.

    Args:
        process_id: The id of the process that has opened it.
        subject: What it is, for the error: "session", say.
        error_class: That of the error.

    Raises:
        FluxError: This process was forked from it.
    """
    if (current_id := os.getpid()) != process_id:
        raise error_class(
            f"this {subject} was opened in process {process_id} and is used in process {current_id}, forked from it: "
            f"open a {subject} of its own in each process"
        )
