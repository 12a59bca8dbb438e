"""What a user sees of an evaluation's progress."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from deat_rb.cli.evaluation_progress import EvaluationProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances ten seconds per call."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr("deat_rb.cli.evaluation_progress.monotonic", lambda: float(next(ticks)))


def lines(*calls: tuple[str, int, int, int]) -> list[str]:
    out = io.StringIO()
    with EvaluationProgress(Console(file=out, width=40)) as show:
        for call in calls:
            show(*call)
    return out.getvalue().splitlines()


@pytest.mark.usefixtures("clock")
def test_evaluation_progress_prints_a_line_per_attack() -> None:
    assert lines(("natural", 400, 400, 300)) == ["natural: 400 images, 75.00 % correct, 10.0 s"]


@pytest.mark.usefixtures("clock")
def test_evaluation_progress_prints_every_half_minute() -> None:
    calls = [("pgd-100", done, 400, done // 2) for done in (80, 160, 240, 320, 400)]
    # 240 images took 30 s, so 160 more take 20 s.
    assert lines(*calls) == [
        "pgd-100: 240 of 400 images, 50.00 % correct so far, about 20 s left",
        "pgd-100: 400 images, 50.00 % correct, 50.0 s",
    ]


@pytest.mark.usefixtures("clock")
def test_evaluation_progress_times_each_attack() -> None:
    assert lines(("natural", 400, 400, 300), ("fgsm", 400, 400, 100)) == [
        "natural: 400 images, 75.00 % correct, 10.0 s",
        "fgsm: 400 images, 25.00 % correct, 10.0 s",
    ]


def test_evaluation_progress_of_stages_is_of_all_examples() -> None:
    # The part attacks the 50 of 400 that are left, and 40 stay; then another network is evaluated on 100 images.
    shown = lines(("natural", 400, 400, 80), ("autoattack/square", 50, 50, 40),
                  ("natural", 100, 100, 80), ("autoattack/square", 50, 50, 40))  # fmt: skip
    assert "autoattack/square: 50 images, 10.00 % correct" in shown[1]
    assert "autoattack/square: 50 images, 40.00 % correct" in shown[3]


@pytest.mark.usefixtures("clock")
def test_evaluation_progress_within_a_batch() -> None:
    out = io.StringIO()
    with EvaluationProgress(Console(file=out, width=40)) as show:
        show("natural", 400, 400, 400)
        for share in (0.0, 0.2, 0.4, 0.6):
            show.within("autoattack/square", 1, 4, share)
        show("autoattack/square", 100, 400, 40)
        for share in (0.0, 0.5):
            show.within("autoattack/square", 2, 4, share)
        show.say("a sentence")
    # The clock began 10 s before the first look. 0.4 of a batch took 30 s, so 3.6 take 270 s; then 1 took 50 s and
    # half of the next 20 s more, so the other 2.5 take 70 / 1.5 each.
    assert out.getvalue().splitlines() == [
        "natural: 400 images, 100.00 % correct, 10.0 s",
        "autoattack/square: batch 1 of 4 at 40%, about 4 min left",
        "autoattack/square: batch 2 of 4 at 0%, 10.00 % correct so far, about 3 min left",
        "a sentence",
    ]


@pytest.mark.usefixtures("clock")
def test_evaluation_progress_time_left_after_resuming() -> None:
    out = io.StringIO()
    with EvaluationProgress(Console(file=out, width=40)) as show:
        for share in (0.0, 0.25, 0.5):
            show.within("pgd-100", 3, 4, share)
    assert out.getvalue().splitlines() == ["pgd-100: batch 3 of 4 at 50%, about 2 min left"]


def test_evaluation_progress_shows_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, force_interactive=True)
    with EvaluationProgress(console) as show:
        show("fgsm", 4, 8, 1)
        show._bar.refresh()
    assert "fgsm" in out.getvalue()
    assert "4/8" in out.getvalue()
    assert "25.00 % correct" in out.getvalue()


@pytest.mark.parametrize("interactive", [False, True])
def test_evaluation_progress_escapes_markup(interactive: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=interactive, force_interactive=interactive)
    with EvaluationProgress(console) as show:
        show("torchattacks.A(b='[/]')", 8, 8, 2)
        show.say("continued from 3 batches in runs/[red]x")
        show._bar.refresh()
    assert "b='[/]'" in out.getvalue()
    assert "runs/[red]x" in out.getvalue()


def test_evaluation_progress_removes_the_bar_when_interrupted() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    show = EvaluationProgress(console)
    with pytest.raises(KeyboardInterrupt), show:
        raise KeyboardInterrupt
    assert not show._bar.live.is_started
