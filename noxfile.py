"""Sessions of nox: `nox -l` lists them, `nox -s lint` runs one; `.ci/run` runs `tests` and `lint`."""

import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["tests", "lint"]

PYTHONS = ["3.11", "3.12", "3.13"]
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The tools' sessions run on the Python that runs nox."""


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the whole test suite on every supported Python; arguments after -- go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pip", "check")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
def fast(session: nox.Session) -> None:
    """Run the fast tier, the tests that are not marked slow: under two minutes on two cores."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session(python=THIS_PYTHON)
def lint(session: nox.Session) -> None:
    """Check style, formatting and types."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(python=THIS_PYTHON)
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; every warning is an error."""
    session.install("-r", "docs/requirements.txt")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session(python=THIS_PYTHON)
def bench(session: nox.Session) -> None:
    """Print the benchmark's ratios; arguments after -- go to `python -m benchmarks`."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(python=THIS_PYTHON)
def build(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, check them, and install each into an empty environment."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    built = sorted(str(path) for path in Path("dist").iterdir())
    session.run("twine", "check", "--strict", *built)
    for number, path in enumerate(built):
        venv = Path(session.create_tmp()) / f"venv{number}"
        shutil.rmtree(venv, ignore_errors=True)
        session.run("python", "-m", "venv", str(venv))
        scripts = venv / ("Scripts" if sys.platform == "win32" else "bin")
        session.run(str(scripts / "pip"), "install", "-c", "constraints.txt", path, external=True)
        # In another folder, so that the checkout's own packages are not what is imported.
        with session.chdir(session.create_tmp()):
            session.run(str(scripts / "deat-rb"), "methods", "m+trades", external=True)
            session.run(str(scripts / "deat-rb"), "train", "--epochs", "1", "--dry-run", external=True)
