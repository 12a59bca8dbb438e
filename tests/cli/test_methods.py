"""``deat-rb methods``: the table at different widths, as Markdown, and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner
from paper_table import TABLE

from deat_rb.cli import main
from deat_rb.methods.describe import markdown_table


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_methods_fits_the_terminal_width(columns: int) -> None:
    result = CliRunner().invoke(main, ["methods"], env={"COLUMNS": str(columns)})
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["method", *TABLE]
    assert result.stdout.isascii()  # plain: no colors, no frames


def test_methods_markdown_is_the_table_of_the_docs() -> None:
    assert CliRunner().invoke(main, ["methods", "--markdown"]).stdout == markdown_table()


def test_methods_does_not_import_torch() -> None:
    program = (
        "import sys; from deat_rb.cli import main; main(['methods'], standalone_mode=False); "
        "main(['methods', 'm+trades'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
