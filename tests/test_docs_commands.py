"""Every `deat-rb` command of README, CONTRIBUTING and docs is one that the command line accepts."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import click
import pytest
from docs_commands import commands_of

from deat_rb.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RENAMED_SINCE = {"docs/lab/results.md", "docs/lab/benchmarks.md"}
"""Notes whose commands are those of the commits that they name."""
CURRENT = [page for page in PAGES if str(page.relative_to(ROOT)) not in RENAMED_SINCE]


def parse(arguments: list[str]) -> None:
    """Parse the arguments as the command line does, without running anything."""
    command, rest, parent = main, arguments, click.Context(main, info_name="deat-rb")
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, found, rest = command.resolve_command(parent, rest)
        assert found is not None
        command, parent = found, click.Context(found, info_name=name, parent=parent)
    accepted: list[type[Exception]] = [click.exceptions.Exit]  # --help, --version
    if len(rest) <= 1:  # a command, or one of its flags, named in a sentence: `eval --track`
        accepted.append(click.MissingParameter)
    with contextlib.suppress(*accepted):
        command.make_context(command.name, list(rest), parent=parent.parent)


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_docs_are_accepted(page: Path) -> None:
    for arguments in commands_of(page.read_text(encoding="utf-8")):
        try:
            parse(arguments)
        except Exception as error:
            pytest.fail(f"deat-rb {shlex.join(arguments)}: {type(error).__name__}: {error}")


def test_a_wrong_option_in_a_page_is_noticed() -> None:
    (arguments,) = commands_of("text\n```bash\ndeat-rb train --metod m-deat   # typo\n```\n")
    assert arguments == ["train", "--metod", "m-deat"]
    with pytest.raises(click.NoSuchOption):
        parse(arguments)


def test_every_command_is_in_the_docs() -> None:
    shown = {arguments[0] for page in PAGES for arguments in commands_of(page.read_text(encoding="utf-8"))}
    assert set(COMMANDS) <= shown
