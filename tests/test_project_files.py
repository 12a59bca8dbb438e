"""The files for those who work on the project name commands, sessions and versions that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
SESSIONS = set(re.findall(r"^def (\w+)\(session", NOXFILE, re.MULTILINE))
TESTED = re.findall(r'"(3\.\d+)"', NOXFILE.partition("PYTHONS = [")[2].partition("]")[0])


def test_noxfile_tests_the_supported_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    classifiers = [text.rpartition(" ")[2] for text in project["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert classifiers == TESTED
    assert project["requires-python"] == f">={TESTED[0]},<3.{int(TESTED[-1].partition('.')[2]) + 1}"


@pytest.mark.parametrize(
    "path", [f".github/workflows/{name}.yml" for name in ("tests", "docs", "publish")] + ["CONTRIBUTING.md"]
)
def test_every_named_nox_session_exists(path: str) -> None:
    named = re.findall(r"nox -s ([a-z]+)", (ROOT / path).read_text(encoding="utf-8"))
    assert named
    assert set(named) <= SESSIONS


def test_workflow_tests_the_supported_pythons() -> None:
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert matrix is not None
    assert re.findall(r"3\.\d+", matrix[1]) == TESTED


def test_ci_runs_the_commands_of_the_noxfile() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for session in ("tests", "lint", "docs"):
        body = NOXFILE.partition(f"def {session}(")[2].partition("@nox.session")[0]
        commands = [", ".join(re.findall(r'"([^"]*)"', call)) for call in re.findall(r"session\.run\((.*)\)", body)]
        assert commands
        for command in commands:
            assert re.search(rf"/bin/{command.replace(', ', '.* ')}", script), command


def test_the_version_is_written_once() -> None:
    package = (ROOT / "deat_rb" / "__init__.py").read_text(encoding="utf-8")
    assert len(re.findall(r'^__version__ = "[^"]+"$', package, re.MULTILINE)) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "deat_rb.__version__"}
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
