"""The command `python -m flux2max_async.emulator`, which serves an emulated gateway."""

import argparse
import asyncio
import contextlib
import errno

from flux2max_async.emulator import Emulator

API_KEY = "emulated"
"""The same in every run, so that the settings of a client stay valid."""


class PortUnavailableError(OSError):
    """The emulator cannot listen on its port."""


def main() -> None:
    """Run the command."""
    parser = build_parser()
    options = parser.parse_args()
    try:
        serve(Emulator(api_key=API_KEY, **vars(options)))
    except PortUnavailableError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its options are parameters of `Emulator`."""
    parser = argparse.ArgumentParser(
        prog="python -m flux2max_async.emulator", description="Serve an emulated FLUX.2 [max] gateway on 127.0.0.1."
    )
    parser.add_argument("--port", type=_port, default=8765, help="port to listen on; 0: any free port (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="median duration of a task (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.3, help="spread of the durations; 0: all equal (%(default)s)")
    parser.add_argument("--time-scale", type=float, default=1.0, help="emulated seconds per real second (%(default)s)")
    parser.add_argument("--seed", type=int, help="makes durations and faults the same in every run")
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number from 0 to 65535")
    return int(text)


def serve(gateway: Emulator) -> None:
    """Print the settings for a client, as environment variables, and serve until Ctrl-C.

    Raises:
        PortUnavailableError: The port is in use, or not permitted.
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(gateway))


async def _serve(gateway: Emulator) -> None:
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(gateway)
        except OSError as error:
            port = gateway.url.rpartition(":")[2]
            reason = "is already in use" if error.errno == errno.EADDRINUSE else f"is not available ({error.strerror})"
            raise PortUnavailableError(f"port {port} {reason}: choose another with --port") from error
        print(f"FLUX2MAX_BASE_URL={gateway.url}")
        print(f"FLUX2MAX_API_KEY={gateway.api_key}", flush=True)
        with contextlib.suppress(asyncio.CancelledError):  # by Ctrl-C
            await asyncio.Event().wait()


if __name__ == "__main__":
    main()
