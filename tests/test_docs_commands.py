"""Every `deat-rb` command of README, CONTRIBUTING and docs is one that the command line accepts."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from deat_rb.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SEPARATORS = {"&&", "||", ";", "|", "&", ">", ">>", "2>&1"}
RENAMED_SINCE = {"docs/lab/results.md", "docs/lab/benchmarks.md"}
"""Notes whose commands are those of the commits that they name."""


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each `deat-rb ...` in the text's code blocks and in its inline code."""
    blocks = re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith("deat-rb ")]
    for line in lines:
        if "deat-rb " not in line and "-m deat_rb " not in line:
            continue
        words = shlex.split(line.replace(";", " ; "), comments=True)
        starts = [i + 1 for i, word in enumerate(words) if word == "deat-rb" or word.endswith("/deat-rb")]
        starts += [i + 2 for i, word in enumerate(words[:-1]) if word == "-m" and words[i + 1] == "deat_rb"]
        for start in starts:
            arguments = []
            for word in words[start:]:
                if word in SEPARATORS:
                    break
                arguments.append(word)
            if arguments and "..." not in arguments and arguments != ["-m"]:
                yield arguments


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_docs_are_accepted(page: Path) -> None:
    if str(page.relative_to(ROOT)) in RENAMED_SINCE:
        pytest.skip("its commands belong to the commits that it names")
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
