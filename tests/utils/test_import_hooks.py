"""What ``import deat_rb`` adds to Python's import system."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from fresh_interpreters import Fresh

from deat_rb.utils import import_hooks

ROOT = Path(__file__).parents[2]
without_upstream = pytest.mark.skipif(
    "autoattack" in metadata.packages_distributions(), reason="upstream's autoattack is installed"
)


@pytest.fixture
def python(fresh: Fresh, tmp_path: Path) -> Callable[[str], str]:
    """Run code in a fresh interpreter in the temporary folder, which is on its path; return what it prints."""

    def run(code: str) -> str:
        done = fresh(code, tmp_path, "")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.slow
@without_upstream
def test_robustbench_imports_after_deat_rb(python: Callable[[str], str]) -> None:
    code = (
        "import deat_rb, robustbench; print(robustbench.eval.AutoAttack.__module__, callable(robustbench.load_model))"
    )
    assert python(code) == "deat_rb.utils.compat True"


@pytest.mark.slow
@without_upstream
def test_a_folder_named_autoattack_is_not_taken_for_the_package(python: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "autoattack").mkdir()
    code = "import deat_rb, robustbench; print(robustbench.eval.AutoAttack.__module__)"
    assert python(code) == "deat_rb.utils.compat"
    code = "import deat_rb, autoattack, autoattack.state; print(autoattack.state.__name__)"
    assert python(code) == "pyautoattack.state"


def test_an_installed_autoattack_is_preferred(python: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "autoattack").mkdir()
    (tmp_path / "autoattack" / "__init__.py").write_text("mine = 1")
    assert python("import deat_rb, autoattack; print(autoattack.mine)") == "1"


def test_the_command_runs_in_a_checkout_whose_package_is_not_installed_editable(
    python: Callable[[str], str], tmp_path: Path
) -> None:
    """As after ``pip install .``: ``python -m deat_rb`` imports the folder deat_rb/ of the current directory."""
    for name in ("deat_rb", "cli"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    code = """
import sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in str(each)]
import deat_rb
from deat_rb.cli import main
from deat_rb.cli.methods import methods
print(deat_rb.__file__, main.name)
"""
    assert python(code).endswith("deat_rb/__init__.py main")


def test_command_finder_answers_for_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finder = import_hooks.CommandFinder()
    assert finder.find_spec("deat_rb.cli", None) is not None
    assert finder.find_spec("cli", None) is None
    monkeypatch.setattr(import_hooks, "CHECKOUT", tmp_path)
    assert finder.find_spec("deat_rb.cli", None) is None


def test_install_adds_each_finder_once() -> None:
    import_hooks.install()
    names = [type(finder).__name__ for finder in sys.meta_path]
    assert (names.count("AutoAttackFinder"), names.count("CommandFinder")) == (1, 1)
