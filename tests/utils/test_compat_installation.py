"""`compat.check_installation`: whether the files of robustbench are those of its release."""

from __future__ import annotations

import base64
import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError


def record(folder: Path, name: str, files: dict[str, str], installer: str = "pip") -> None:
    """Write the metadata of a distribution that was installed with these files."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = []
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{file},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (info / "INSTALLER").write_text(installer + "\n")


NEW = {"robustbench/__init__.py": "", "robustbench/eval.py": "new = 1", "robustbench/only_new.py": "new = 2"}
OLD = {"robustbench/__init__.py": "", "robustbench/eval.py": "old = 1", "torchattacks/__init__.py": ""}


def unpack(folder: Path, files: dict[str, str]) -> None:
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is first on the path, as if robustbench had not been imported yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def check_installation() -> str:
    """Return the error message of `compat.check_installation`, "fine" without an error."""
    importlib.invalidate_caches()
    try:
        compat.check_installation()
    except DeatError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(
    ("installer", "command"),
    [
        ("pip", "{python} -m pip install --force-reinstall --no-deps --upgrade --target {folder} robustbench==1.0"),
        ("uv", "uv pip install --python {python} --reinstall --no-deps --target {folder} robustbench==1.0"),
    ],
)
def test_check_installation_names_the_command_that_mends_an_overwritten_robustbench(
    installer: str, command: str, site: Path
) -> None:
    record(site, "robustbench", NEW, installer)
    record(site, "torchattacks", OLD, installer)
    unpack(site, OLD)
    unpack(site, NEW)
    assert check_installation() == "fine"
    unpack(site, OLD)
    message = check_installation()
    assert message.startswith("robustbench 1.0 is damaged: 1 of its files, such as robustbench/eval.py, were ")
    assert message.endswith("repair it with " + command.format(python=sys.executable, folder=site))


def test_check_installation_finds_files_that_torchattacks_took_with_it(site: Path) -> None:
    """Removing or upgrading torchattacks removes every file that its RECORD lists."""
    record(site, "robustbench", NEW)
    unpack(site, NEW)
    for file in OLD:
        (site / file).unlink(missing_ok=True)
    (site / "robustbench" / "__init__.py").write_text("")
    assert "1 of its files, such as robustbench/eval.py, were removed" in check_installation()


def test_check_installation_without_robustbench_itself(site: Path) -> None:
    record(site, "torchattacks", OLD)
    unpack(site, OLD)
    assert "is a copy from 2022 that torchattacks contains; RobustBench itself is not" in check_installation()


def test_check_installation_leaves_edited_files_and_checkouts_alone(site: Path) -> None:
    record(site, "torchattacks", OLD)
    unpack(site, {**NEW, "robustbench/eval.py": "mine = 1"})
    assert check_installation() == "fine"
    record(site, "robustbench", NEW)
    assert check_installation() == "fine"


def test_check_installation_names_a_file_that_hides_robustbench(site: Path) -> None:
    (site / "robustbench.py").write_text("")
    assert check_installation() == f"{site}/robustbench.py shadows the package robustbench: rename it"


def test_robustbench_checks_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> None:
        raise DeatError("damaged")

    monkeypatch.setattr(compat, "check_installation", damaged)
    with pytest.raises(DeatError, match="damaged"):
        compat.robustbench()
