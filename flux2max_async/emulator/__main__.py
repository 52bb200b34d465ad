"""`python -m flux2max_async.emulator`: the emulated gateway, served by hand."""

import argparse
import asyncio
import contextlib

from flux2max_async.emulator import Emulator


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m flux2max_async.emulator", description="Serve an emulated FLUX.2 [max] gateway on 127.0.0.1."
    )
    parser.add_argument("--port", type=int, default=8765, help="where to listen; 0 takes any free port (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="median duration of a task (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.3, help="how much durations differ (%(default)s)")
    parser.add_argument("--time-scale", type=float, default=1.0, help="seconds that pass in one second (%(default)s)")
    parser.add_argument("--seed", type=int, help="makes durations and faults the same in each run")
    serve(Emulator(**vars(parser.parse_args())))


def serve(gateway: Emulator) -> None:
    """Serve until Ctrl-C, having said where."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(gateway))


async def _serve(gateway: Emulator) -> None:
    async with gateway:
        print(f"FLUX2MAX_BASE_URL={gateway.url}")
        print(f"FLUX2MAX_API_KEY={gateway.api_key}", flush=True)
        with contextlib.suppress(asyncio.CancelledError):  # by Ctrl-C
            await asyncio.Event().wait()


if __name__ == "__main__":
    main()
