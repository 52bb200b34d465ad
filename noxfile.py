"""The project's checks: `nox` runs them all, `nox -s tests` the tests alone."""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "no"
nox.options.sessions = ["lint", "types", "tests", "oldest", "compatibility", "browser", "bench_short", "coverage"]

PYTHONS = ["3.11", "3.12", "3.13"]
AT_ONCE = ["--numprocesses", "3", "--dist", "worksteal"]
"""The tests wait a lot: more processes run them at once than there may be processors."""
OF_PROCESSES = ["--ignore=tests/end_to_end", "--ignore=tests/cli/test_signals.py"]
"""Leaves out the tests that start programs, which takes a minute: they needn't be run everywhere."""
OF_THE_COMMAND = ["--ignore=tests/cli/test_commands.py", "--ignore=tests/cli/test_batch.py"]
"""Leaves out those of the command line, which the oldest and the newest Python and libraries run."""

if shutil.which("pyenv"):
    # pyenv's shims answer only for the versions that are listed.
    versions = subprocess.run(
        ["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True
    ).stdout.split()
    os.environ["PYENV_VERSION"] = ":".join(
        v for v in reversed(versions) if v.startswith(tuple(f"{p}." for p in PYTHONS))
    )


def install(session: nox.Session, *groups: str, extras: str = "[cli,emulator]", options: tuple[str, ...] = ()) -> None:
    """Install the built wheel with its extras, and groups of development tools."""
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    session.run("uv", "build", "--wheel", "--quiet", "--out-dir", str(wheels), external=True)
    (wheel,) = wheels.glob("*.whl")
    named = [argument for group in groups for argument in ("--group", group)]
    session.install(f"{wheel}{extras}", *named, *options)


def run_tests(session: nox.Session, *options: str, measured: bool) -> None:
    """Run the tests against what is installed, never against the checkout; measuring where they went costs time."""
    coverage = ("coverage", "run", "-m") if measured else ()
    session.run(
        *coverage, "pytest", *AT_ONCE, *options, *session.posargs,
        env={"PYTHONSAFEPATH": "1", "COVERAGE_FILE": str(Path(f".coverage.{session.name}").resolve())},
    )  # fmt: skip


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, on each Python; all of them, and measured, on the newest."""
    install(session, "test")
    newest = session.python == PYTHONS[-1]
    run_tests(session, *([] if newest else OF_PROCESSES + OF_THE_COMMAND), measured=newest)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The tests with the oldest releases of the dependencies that are promised to do, but for those of processes."""
    install(session, "test", options=("--resolution", "lowest-direct"))
    run_tests(session, *OF_PROCESSES, measured=False)


@nox.session(python=PYTHONS[-1])
def compatibility(session: nox.Session) -> None:
    """The same library under pytest-asyncio, where many users live."""
    install(session)
    session.install("pytest>=9", "pytest-asyncio>=1.3")
    session.run(
        "pytest", "-c", "/dev/null", "--rootdir", ".", "-W", "error", "-p", "no:cacheprovider",
        "-o", "asyncio_default_fixture_loop_scope=function", "tests/compatibility", env={"PYTHONSAFEPATH": "1"},
    )  # fmt: skip


@nox.session(python=PYTHONS[-1])
def browser(session: nox.Session) -> None:
    """The gallery and the examples' page, in the browser that is installed here."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(shutil.which(name) for name in names):
        session.skip(f"no Chromium is installed: none of {', '.join(names)} is on the PATH")
    install(session, "test", "browser")
    session.run("pytest", "-o", "addopts=-p no:asyncio", "tests/browser", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session(python=PYTHONS[-1])
def types(session: nox.Session) -> None:
    """The types, by two checkers, and that all that is public has them."""
    install(session, "test", "browser", "types")
    session.run("mypy", "flux2max_async", "tests", "noxfile.py", "benchmarks", "examples")
    # Named, or the checker would take a .venv in the project's folder for the one to look into.
    python = str(Path(session.bin) / "python")
    session.run("basedpyright", "--pythonpath", python)
    session.run("basedpyright", "--pythonpath", python, "--verifytypes", "flux2max_async", "--ignoreexternal")


@nox.session(python=PYTHONS[-1])
def lint(session: nox.Session) -> None:
    """Style, and that imports run down only."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


@nox.session(python=PYTHONS[-1])
def coverage(session: nox.Session) -> None:
    """That the tests on the newest Python have been everywhere."""
    session.install("coverage[toml]>=7.10")
    session.run("coverage", "combine", "--keep")
    session.run("coverage", "report")


@nox.session(python=PYTHONS[-1])
def bench(session: nox.Session) -> None:
    """What polling and the client cost, beside the best that is possible and the peers; most of an hour."""
    install(session, "bench", extras="")
    session.run("python", "benchmarks/polling.py", "--write")
    session.run("python", "benchmarks/client.py", "--write")
    session.run("python", "benchmarks/journal.py", "--write")
    session.run("python", "benchmarks/webhooks.py", "--write")


@nox.session(python=PYTHONS[-1])
def bench_short(session: nox.Session) -> None:
    """That the benchmarks run, in half a minute, with one small peer."""
    install(session, extras="")
    session.install("numpy>=2", "scipy>=1.15", "seaart-sdk==0.1.4")
    session.run("python", "benchmarks/polling.py", "--short")
    session.run("python", "benchmarks/client.py", "--short")
    session.run("python", "benchmarks/journal.py", "--short")
    session.run("python", "benchmarks/webhooks.py", "--short")
