from __future__ import annotations

import click
import pytest

from cli.options import size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1000),
        ("500M", 500 * 10**6),
        ("8G", 8 * 10**9),
        ("8 GB", 8 * 10**9),
        (" 1.5GiB ", 3 * 2**30 // 2),
        ("2T", 2 * 10**12),
    ],
)
def test_size_returns_bytes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "8X", "1e9", "8G of RAM", "1,5G", "inf", "nan", "0x10", "٣G", "1.G"])
def test_size_refuses_other_texts(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size; give a number of bytes, or a number with a unit"):
        size(text)
