"""The wheel's contents, and what `import deat_rb` and `deat-rb --help` import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deat_rb

ROOT = Path(__file__).parents[1]


def in_fresh_python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the working tree stays clean."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("deat_rb", "cli"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, check=True)
    return zipfile.ZipFile(next(copy.glob("*.whl")))


def read(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"deat_rb-{deat_rb.__version__}.dist-info/{name}").decode()


def test_wheel_contains_only_deat_rb(wheel: zipfile.ZipFile) -> None:
    installed = {line.split("/")[0] for line in read(wheel, "RECORD").splitlines()}
    assert installed == {"deat_rb", f"deat_rb-{deat_rb.__version__}.dist-info"}


def test_wheel_contains_every_source_file(wheel: zipfile.ZipFile) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deat_rb").rglob("*.py")}
    commands = {f"deat_rb/cli/{path.name}" for path in (ROOT / "cli").glob("*.py")}
    data = {
        path.relative_to(ROOT).as_posix()
        for kind in ("j2", "json", "toml")
        for path in (ROOT / "deat_rb").rglob(f"*.{kind}")
    }
    assert {*modules, *commands, *data, "deat_rb/py.typed"} == {
        name for name in wheel.namelist() if name.startswith("deat_rb/")
    }


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = read(wheel, "METADATA").splitlines()
    assert {"Name: deat-rb", "License-Expression: MIT", "Provides-Extra: test"} <= set(metadata)
    assert read(wheel, "entry_points.txt").split() == ["[console_scripts]", "deat-rb", "=", "deat_rb.cli:main"]


def test_import_of_deat_rb_imports_no_other_package() -> None:
    program = """
import sys
before = set(sys.modules)
import deat_rb
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    assert in_fresh_python(program).strip() == "['deat_rb']"


HEAVY = {"torch", "torchvision", "torchattacks", "robustbench", "matplotlib", "sklearn", "pydantic", "numpy", "rich"}


@pytest.mark.parametrize(
    ("flags", "status", "allowed"),
    [
        (["--help"], 0, set()),
        (["--version"], 0, set()),
        (["trian"], 2, set()),
        (["eval", "--help"], 0, {"pydantic"}),  # options are made from the configuration's fields
        (["train", "--help"], 0, {"pydantic"}),
        (["methods"], 0, {"pydantic", "rich"}),
    ],
)
def test_help_imports_no_heavy_package(flags: list[str], status: int, allowed: set[str]) -> None:
    program = f"""
import sys
from click.testing import CliRunner
from deat_rb.cli import main
print("status:", CliRunner().invoke(main, {flags}).exit_code)
print("heavy:", sorted({HEAVY - allowed!r} & set(sys.modules)))
"""
    assert in_fresh_python(program).splitlines() == [f"status: {status}", "heavy: []"]


def test_all_names_can_be_imported() -> None:
    values = {name: getattr(deat_rb, name) for name in deat_rb.__all__}
    assert set(values) <= set(dir(deat_rb))
    objects = [name for name, value in values.items() if callable(value)]
    assert sorted([*objects, "__version__"]) == sorted(deat_rb.__all__)


def test_getattr_of_an_unknown_name() -> None:
    unknown = "nothing"
    with pytest.raises(AttributeError, match="module 'deat_rb' has no attribute 'nothing'"):
        getattr(deat_rb, unknown)
