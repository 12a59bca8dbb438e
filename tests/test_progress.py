"""What a user sees of an evaluation's progress."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from deat_rb.progress import EvaluationProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass whenever somebody looks."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr("deat_rb.progress.monotonic", lambda: float(next(ticks)))


def lines(*calls: tuple[str, int, int, int], n_examples: int = 400) -> list[str]:
    out = io.StringIO()
    with EvaluationProgress(n_examples, Console(file=out, width=40)) as show:
        for call in calls:
            show(*call)
    return out.getvalue().splitlines()


@pytest.mark.usefixtures("clock")
def test_an_attack_ends_with_a_line() -> None:
    assert lines(("natural", 400, 400, 300)) == ["natural: 400 images, 75.00 % correct, 10.0 s"]


@pytest.mark.usefixtures("clock")
def test_a_long_attack_says_every_half_minute_how_far_it_is() -> None:
    calls = [("pgd-100", done, 400, done // 2) for done in (80, 160, 240, 320, 400)]
    # 240 images took 30 s, so 160 more take 20 s.
    assert lines(*calls) == [
        "pgd-100: 240 of 400 images, 50.00 % correct so far, 20 s left",
        "pgd-100: 400 images, 50.00 % correct, 50.0 s",
    ]


@pytest.mark.usefixtures("clock")
def test_each_attack_has_its_own_time() -> None:
    assert lines(("natural", 400, 400, 300), ("fgsm", 400, 400, 100)) == [
        "natural: 400 images, 75.00 % correct, 10.0 s",
        "fgsm: 400 images, 25.00 % correct, 10.0 s",
    ]


def test_autoattack_counts_the_correct_among_all_examples() -> None:
    # The part attacks the 50 of 400 that are left, and 40 stay.
    assert "autoattack/square: 50 images, 10.00 % correct" in lines(("autoattack/square", 50, 50, 40))[0]


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, force_interactive=True)
    with EvaluationProgress(8, console) as show:
        show("fgsm", 4, 8, 1)
        show._bar.refresh()
    assert "fgsm" in out.getvalue()
    assert "4/8" in out.getvalue()
    assert "25.00 % correct" in out.getvalue()


def test_the_bar_goes_away_when_interrupted() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    show = EvaluationProgress(8, console)
    with pytest.raises(KeyboardInterrupt), show:
        raise KeyboardInterrupt
    assert not show._bar.live.is_started
