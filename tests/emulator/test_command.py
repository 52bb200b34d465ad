"""The commands that serve the emulator: `python -m flux2max_async.emulator` and `flux2max emulate`."""

import asyncio
import inspect
import re
import signal
import socket
import subprocess
import sys

import pytest
from support.commands import Command

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.cli._app import emulate
from flux2max_async.emulator import Emulator
from flux2max_async.emulator.__main__ import build_parser

COMMANDS = [
    pytest.param(["flux2max_async.emulator"], id="module"),
    pytest.param(["flux2max_async.cli", "emulate"], id="flux2max"),
]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a module as a command until it ends."""
    command = [sys.executable, "-W", "error", "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", COMMANDS)
def test_serve_until_ctrl_c(module: list[str]) -> None:
    """Both commands print URL and API key as environment variables, serve, and end without errors on Ctrl-C."""
    command = [sys.executable, "-W", "error", "-m", *module, "--port", "0", "--seconds", "0.1", "--seed", "1"]
    # A shell that runs the tests in the background may have made its children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(2)]
        settings = dict(line.strip().split("=", 1) for line in lines)

        async def main() -> bool:
            async with FluxSession(
                settings["FLUX2MAX_API_KEY"], base_url=settings["FLUX2MAX_BASE_URL"], schedule=FixedSchedule(0.05)
            ) as session:
                return (await session.generate("a cat")).ok

        ok = asyncio.run(main())
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        code = process.wait(20)

    assert ok
    assert re.fullmatch(r"FLUX2MAX_BASE_URL=http://127\.0\.0\.1:\d+\nFLUX2MAX_API_KEY=emulated\n", "".join(lines))
    assert errors == ""
    assert code == 0


@pytest.mark.parametrize("module", COMMANDS)
def test_a_port_in_use_is_a_one_line_error(module: list[str]) -> None:
    """Both commands report a port that another process listens on in one line, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = run(*module, "--port", str(port))

    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(f": port {port} is already in use: choose another with --port\n")


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
@pytest.mark.parametrize("module", COMMANDS)
def test_an_invalid_port_is_a_usage_error(module: list[str], port: str) -> None:
    """Both commands refuse what is not a port number with exit code 2."""
    result = run(*module, f"--port={port}")

    assert result.returncode == 2
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr


def test_shares_that_are_more_than_one_together(flux2max: Command) -> None:
    """`emulate` reports shares that can't all be met in one line, with their names."""
    result = flux2max("emulate", "--fault", "cut=0.6", "--fault", "firewall=0.6", "--fault", "late_404=0.6")

    assert (result.code, result.out) == (2, "")
    assert result.err == "flux2max: the shares of cut, firewall must be at least 0, and at most 1 together\n"


def test_both_commands_have_the_same_defaults() -> None:
    """Options that both commands have, and the parameters of `Emulator`, have the same defaults."""
    module = vars(build_parser().parse_args([]))
    flux2max = {name: parameter.default for name, parameter in inspect.signature(emulate).parameters.items()}
    emulator = {name: parameter.default for name, parameter in inspect.signature(Emulator).parameters.items()}

    assert {name: flux2max[name] for name in module.keys() & flux2max.keys()} == {
        name: module[name] for name in ("port", "seconds", "spread", "seed")
    }
    assert {name: emulator[name] for name in module} == module | {"port": 0}
