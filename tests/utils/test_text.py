from __future__ import annotations

import pytest

from deat_rb.utils.text import is_invisible, printable, replace_invisible

INVISIBLE = [
    "\x00",
    "\x1b",
    "\n",
    "\x7f",
    "\x9f",
    "\xad",
    "\u061c",
    "\u200b",
    "\u202e",
    "\u2028",
    "\u2066",
    "\ud800",
    "\ue000",
]


@pytest.mark.parametrize("char", INVISIBLE)
def test_is_invisible_of_controls_formats_surrogates_and_private_characters(char: str) -> None:
    assert is_invisible(char)
    assert printable(char).startswith("\\")


@pytest.mark.parametrize("char", ["a", " ", "\xa0", "é", "数", "≤", "\u0301"])
def test_is_invisible_not_of_letters_spaces_and_marks(char: str) -> None:
    assert not is_invisible(char)
    assert printable(char) == replace_invisible(char) == char


def test_replace_invisible_keeps_tabs_and_line_feeds() -> None:
    assert replace_invisible("a\tb\nc\x1b[31m\u202e") == "a\tb\nc\ufffd[31m\ufffd"
