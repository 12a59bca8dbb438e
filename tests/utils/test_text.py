from __future__ import annotations

import pytest

from deat_rb.utils.text import counted, is_invisible, printable, replace_invisible

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


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "epoch", "0 epochs"), (1, "epoch", "1 epoch"), (2, "epoch", "2 epochs"), (1, "pass", "1 pass"),
        (3, "pass", "3 passes"), (2, "batch", "2 batches"), (2, "entry", "2 entries"), (1, "entry", "1 entry"),
        (2, "day", "2 days"), (2, "class", "2 classes"), (12345, "image", "12,345 images"),
    ],
)  # fmt: skip
def test_counted(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text


def test_counted_with_a_format() -> None:
    assert counted(1.5, "epoch", "g") == "1.5 epochs"
    assert counted(1.0, "epoch", "g") == "1 epoch"
    assert counted(12345, "image", "") == "12345 images"
