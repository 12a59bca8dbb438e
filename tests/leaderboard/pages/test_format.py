"""Formatting of numbers, links and names."""

from __future__ import annotations

import pytest

from deat_rb.leaderboard.pages.format import duration, memory, name_parts, web_link

DASH = "\N{EN DASH}"

LINKS = ("javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\nscript:alert(1)", "https:",
         "vbscript:x", "data:text/html,x", "file:///etc/passwd", "//example.org/x", "https://", "http:///x", "https://[",
         "x", "", "https://example.org/a b", "https://example.org\\@evil.example",
         "\x01https://example.org")  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_web_link_refuses_other_addresses(link: str) -> None:
    assert web_link(link) is None


@pytest.mark.parametrize("link", ["https://arxiv.org/abs/2103.03076", "http://example.org/?a=1&b=2#c"])
def test_web_link_accepts_web_addresses(link: str) -> None:
    assert web_link(link) == link


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, DASH), (0.0, "0.0 s"), (9.96, "10.0 s"), (119.4, "119 s"), (120, "2.0 min"), (7199, "120.0 min"),
     (7200, "2.0 h"), (172_800, "2.0 d")],
)  # fmt: skip
def test_duration_uses_the_largest_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_memory_and_name_parts() -> None:
    assert [memory(size) for size in (None, 3 * 2**20, 5 * 2**29)] == [DASH, "3 MiB", "2.5 GiB"]
    assert name_parts("Wang2021Gradient_R18") == ["Wang", "2021", "Gradient_", "R18"]
