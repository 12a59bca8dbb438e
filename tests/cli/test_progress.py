"""Progress over images."""

from __future__ import annotations

import io
from itertools import count

import pytest
from rich.console import Console

from deat_rb.cli import progress
from deat_rb.cli.progress import ImageProgress


def test_image_progress_prints_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "monotonic", count(1000, 10).__next__)
    out = io.StringIO()
    with ImageProgress("decoded", console=Console(file=out, width=200)) as show:  # one second per image
        for done in range(10, 80, 10):
            show(done, 1000)
    assert out.getvalue().splitlines() == [
        "30 of 1,000 images decoded, 1 images/s, about 16 min left",
        "60 of 1,000 images decoded, 1 images/s, about 16 min left",
    ]


def test_image_progress_shows_nothing_before_the_first_image() -> None:
    out = io.StringIO()
    with ImageProgress("decoded", console=Console(file=out, force_terminal=True, force_interactive=True)) as show:
        assert out.getvalue() == ""
        show(1, 2)
        assert "1/2" in out.getvalue()
