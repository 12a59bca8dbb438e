"""Untrusted files and text: size limits, strict JSON, plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deat_rb.leaderboard.untrusted import parse_json, plain, read_limited, symlink_in_path, visible
from deat_rb.utils.errors import DeatError


@pytest.mark.parametrize(
    "text",
    ["It uses 1M images (see Rebuffi et al.).", "Alexandre Ramé, Jérôme B.", "a < b, 5 > 4, R&D, 100 %, C_1 & D^2",
     "Uses \\(\\ell_{\\infty} \\) = 0.031 \u2248 7.9/255 instead of 8/255.", "王, 李", "\u2764\ufe0f",
     "Nguye\u0302\u0303n", "a; b = c", "x; 1"],
)  # fmt: skip
def test_plain_accepts_texts_of_robustbench(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("a\u3164b", r"U\+3164"), ("\u115f", r"U\+115F"), ("\u2800", r"U\+2800"), ("a\u200b", r"U\+200B"),
     (" a", "a space"), ("x;=HYPERLINK(1)", "has = after ;"), ("x; @SUM(1)", "has @ after ;"),
     ("\uff1d1+1", "begins with \uff1d"),
     ("\uff201", "begins with \uff20"), ("<b>", "HTML"), ("&amp;", "HTML"), ("[a](b)", "Markdown"), (r"\def", "TeX")],
)  # fmt: skip
def test_plain_refuses_texts_with_a_second_meaning(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(text)


def test_visible_allows_more_than_plain() -> None:
    assert visible("a | `b` = \\input") == "a | `b` = \\input"
    for text in ("a\u200bb", "<script>"):
        with pytest.raises(ValueError, match="has invisible characters or HTML"):
            visible(text)


def test_parse_json_returns_the_content() -> None:
    text = '{"a": [1, 2.5, "}]{[", "\\"["], "b": {"c": null}}'
    assert parse_json(text.encode(), "x") == json.loads(text)


def test_read_limited_refuses_one_byte_more(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert read_limited(file, 5) == b"12345"
    with pytest.raises(DeatError, match=r"is too large: 5 bytes \(at most 4\)"):
        read_limited(file, 4)
    with pytest.raises(DeatError, match=r"cannot read .*g: No such file"):
        read_limited(tmp_path / "g", 4)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux, where page 0 of one's memory is none")
def test_read_limited_refuses_unreadable_files() -> None:
    with pytest.raises(DeatError, match="cannot read /proc/self/mem: "):
        read_limited(Path("/proc/self/mem"), 5)


def test_symlink_in_path_finds_links_and_steps_back(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to(tmp_path)
    assert symlink_in_path(tmp_path, "a/c/d") is None
    assert symlink_in_path(tmp_path, "a/b/d") == tmp_path / "a/b"
    assert symlink_in_path(tmp_path, "a/../d") == tmp_path / "a/.."
