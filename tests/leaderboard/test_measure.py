"""The board's own measurements, and the comparison of claims with them."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from board_problems import SHARES, FakeEvaluation, claim, digits, make_checkpoint, make_run, network, submit
from short_autoattack import shorten

from deat_rb.evaluation.report import Check
from deat_rb.evaluation.runner import EvaluationCallback
from deat_rb.leaderboard import measure
from deat_rb.leaderboard.board import Board
from deat_rb.utils.errors import DeatError, Interrupted


def test_evaluate_sample_draws_new_examples_from_the_claimed_ones(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    run = make_run(tmp_path / "run", n=400, evaluated=False)
    claim(run, n=400, shares={name: share * 500 / 400 for name, share in SHARES.items()})
    submit(board, run, sample=50)
    submit(board, run, sample=50, replace=True)
    one, other = fake.calls
    assert len(one["images"]) == len(other["images"]) == 50
    assert not one["images"].equal(other["images"]), "a submitter must not know the examples"
    assert one["seed"] != other["seed"]
    assert (one["attacks"], one["eps"], one["checks"]) == (("fgsm", "pgd-100", "cw-20", "autoattack"), 0.1, "quick")
    known = {image.numpy().tobytes() for image in digits().test.first(400).tensors()[0]}
    assert {image.numpy().tobytes() for image in one["images"]} <= known


def test_evaluate_fully_measures_runs_without_an_evaluation(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run", evaluated=False), n_examples=100)
    assert (fake.calls[0]["n"], entry.is_subset, entry.remeasured) == (100, True, {})
    claimed = make_run(tmp_path / "claimed")
    submit(board, claimed, "Wang2021Gradient_2", n_examples=50, evaluate_anew=True)
    assert [call["n"] for call in fake.calls] == [100, 100, 50, 50]
    with pytest.raises(DeatError, match=r"--n-examples 50 differs from the eval.json of .* \(500 examples\)"):
        submit(board, claimed, "Wang2021Gradient_3", n_examples=50)


def test_evaluate_fully_refuses_before_the_attacks(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    weights = make_checkpoint(tmp_path, clean_acc="95.00")  # measured: 80 %
    with pytest.raises(DeatError, match=r"claims 95\.00 % under natural"):
        submit(board, weights, "Wong2020Fast", dataset="digits")
    fake.checks = (Check(name="normalization inside", status="fail", figure=0.0, sentence="Outside."),)
    with pytest.raises(DeatError, match=r"fails the check 'normalization inside': Outside\."):
        submit(board, make_run(tmp_path / "run", evaluated=False))
    assert [call["attacks"] for call in fake.calls] == [("natural",)] * 2


@pytest.mark.slow
def test_evaluate_fully_runs_the_real_attacks(tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = submit(board, make_run(tmp_path / "run", evaluated=False), n_examples=4)
    images, labels = digits().test.first(4).tensors()
    assert entry.figures["natural"].n_correct == int((network()(images).argmax(1) == labels).sum())
    assert {check.name for check in entry.checks} >= {"deterministic", "gradients present", "model unchanged"}


@pytest.mark.slow
def test_submit_continues_an_interrupted_evaluation(
    tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=2, queries=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = digits().test.first(4).tensors()[0]
    labels = network()(images).argmax(dim=1)  # all are correct, and remain so under attacks of this radius
    monkeypatch.setattr(measure, "first_test_examples", lambda *_, **__: (images, labels))
    run = make_run(tmp_path / "run", evaluated=False, eps=1e-6)
    said: list[str] = []

    class Listener(EvaluationCallback):
        def __init__(self, stop_at: str) -> None:
            super().__init__()
            self.stop_at = stop_at

        def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
            if attack == self.stop_at:
                raise KeyboardInterrupt

        def say(self, sentence: str) -> None:
            said.append(sentence)

    with pytest.raises(Interrupted, match=r"stored in .*deat-rb.submissions"):
        submit(board, run, n_examples=4, progress=Listener("cw-20"))
    assert not board.path.exists()
    full = mock.patch.object(Board, "commit", side_effect=DeatError("no space left"))
    with full, pytest.raises(DeatError, match=r"no space left; \d+ batches are stored in "):
        submit(board, run, n_examples=4, progress=Listener(""))
    submit(board, run, n_examples=2, progress=Listener(""))
    entry = submit(board, run, "Wang2021Gradient_2", n_examples=4, progress=Listener(""))
    assert entry.autoattack_acc == "100.00"
    first, second = (int(sentence.split()[2]) for sentence in said)  # that of 2 images is another evaluation
    assert first == 4  # natural, FGSM, PGD-100 and CW-20, whose batch is stored before progress tells of it
    assert second > first
    assert list((tmp_path / "cache/deat-rb/submissions").iterdir()) == []


@pytest.mark.parametrize("measured", [0.4, 0.41])
def test_compare_claim_accepts_a_claim_within_the_interval(
    tmp_path: Path, board: Board, fake: FakeEvaluation, measured: float
) -> None:
    fake.shares["autoattack"] = measured
    assert submit(board, make_run(tmp_path / "run"), sample=100).autoattack_acc == "40.00"


def test_compare_claim_refuses_with_both_accuracies(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    """Wilson's 99.999 % interval of 100 of 500: z = 4.41717, centre (.2 + .0195114) / 1.0390228 = .21127, half
    4.41717 * sqrt(.00032 + .0000195114) / 1.0390228 = .07833."""
    fake.shares["autoattack"] = 0.2
    with pytest.raises(DeatError, match=r"claims 40.00 % under autoattack, but .* 20.00 % \(13.29 to 28.96\) on 500"):
        submit(board, make_run(tmp_path / "run"), sample=500)
    assert not board.path.exists()


def test_compare_verdicts_refuses_differences_on_many_examples(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    """30 of 500, whose 99.9 % interval begins at .0335 (allowed: .03): centre (.06 + .0108274) / 1.0216548 = .06933,
    half 3.2905 * sqrt(.0001128 + .0000108274) / 1.0216548 = .03581."""
    run = make_run(tmp_path / "run", evaluated=False)
    claim(run, shares={**SHARES, "autoattack": 0.46})
    with pytest.raises(DeatError, match="differs from the board's measurement on 30 of 500 examples under autoattack"):
        submit(board, run, sample=500)
    claim(run, shares={**SHARES, "autoattack": 0.41})
    assert submit(board, run, sample=500).autoattack_acc == "41.00"
