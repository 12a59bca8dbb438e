"""Predicted times."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from small_runs import planned as small_planned
from small_studies import small_study

from deat_rb.reproduction.estimate import ROBUST, Times, _measure, estimate, read_estimate
from deat_rb.reproduction.folder import Evaluated, Record, StudyFolder
from deat_rb.reproduction.planning import Planner
from deat_rb.reproduction.study import Evaluation
from deat_rb.runs.directory import METRICS, RunDirectory
from deat_rb.runs.estimate import VALIDATION_PASSES, BatchTimes
from deat_rb.runs.plan import TrainingPlan
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError


def test_estimate_adds_steps_updates_validation_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by hand, for 2 epochs of 2 batches of 32 images, and 16 validation images."""
    times = {"pgd-1": Times(update=2.0, step=1.0, evaluation=32.0), "free-2": Times(0.0, 3.0, 32.0)}
    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", lambda planned, kind: times[kind])
    study = small_study({"method": "pgd-3"}, {"method": "free-2"}, {"method": "deat-40%"}, {"method": "m+pgd"})
    folder = StudyFolder(tmp_path)
    pgd, free, deat, guided = estimate(folder, study.runs, notify=lambda text: None)
    validation = 2 * 16 * VALIDATION_PASSES * 1.0  # epochs, images, passes per image, seconds per image
    assert (pgd.passes, pgd.exact, pgd.training) == (16, True, 12 * 1.0 + 4 * 2.0 + validation)
    assert (free.passes, free.exact, free.training) == (8, True, 8 * 3.0 + validation)
    # One replay in the first epoch and one or two in the second: 4 or 6 passes.
    assert (deat.passes, deat.exact) == (5, False)
    assert (guided.passes, guided.exact) == (10, True)  # a step, then two, and 4 updates
    assert pgd.evaluation == pytest.approx(ROBUST * 16 * (1 + 2))  # FGSM and PGD-2 on 16 images
    assert read_estimate(folder)[study.runs[0].name] == pytest.approx(pgd.training + pgd.evaluation)
    assert not list(tmp_path.glob("*.json")), "a study of that name would write its table there"


def test_estimate_of_an_open_ended_run_is_an_epoch_with_its_share_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", lambda planned, kind: Times(2.0, 1.0, 32.0))
    row = {"method": "pgd-3", "epochs": "open", "patience": 2, "lr_schedule": "flat", "validate_every": 2}
    (found,) = estimate(StudyFolder(tmp_path), small_study(row).runs, notify=lambda text: None)
    assert (found.is_open, found.passes) == (True, 8)
    validation = 2 * 16 / 2 * VALIDATION_PASSES * 1.0  # averaged and raw weights, in every other epoch
    assert found.training == 6 * 1.0 + 2 * 2.0 + validation
    assert read_estimate(StudyFolder(tmp_path)) == {}


def test_estimate_takes_unknown_passes_from_other_seeds_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two seeds with 8 and 10 passes, not of a run with the same label but other batches."""
    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", lambda planned, kind: Times(2.0, 1.0, 32.0))
    study = small_study({"method": "deat-40%"}, seeds=(0, 1, 2), evaluation=Evaluation(()))
    (namesake,) = small_study({"method": "deat-40%", "batch_size": 16}, evaluation=Evaluation(())).runs
    folder = StudyFolder(tmp_path)
    folder.create()
    for run, backwards in zip((*study.runs[:2], namesake), (8, 10, 1000), strict=True):
        path = RunDirectory.create(folder.run_path(run), Planner().plan(run.options).config).path
        (path / METRICS).write_text(json.dumps(asdict(EpochStats(epoch=1, backwards=backwards))) + "\n")
        folder.write_record(run, Record(status="done"))
    (left,) = estimate(folder, [*study.runs, namesake], notify=lambda text: None)
    assert (left.run, left.passes, left.exact) == (study.runs[2], 9, False)


def test_estimate_of_a_trained_run_is_its_missing_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", lambda planned, kind: Times(2.0, 1.0, 32.0))
    evaluated, begun = small_study({"method": "pgd-3"}, seeds=(0, 1)).runs  # each with FGSM and PGD-2 on 16 images
    folder = StudyFolder(tmp_path)
    folder.create()
    made = Evaluated(asked=16, attacks=("natural", "fgsm"), n_examples=16, model_sha256="0" * 64)
    folder.write_record(evaluated, Record(status="done", trained=True, evaluations=(made,)))
    folder.write_record(begun, Record(status="trained"))
    found = estimate(folder, (evaluated, begun), notify=lambda text: None)
    assert [(each.training, each.passes) for each in found] == [(0, 0), (0, 0)]
    assert [each.evaluation for each in found] == pytest.approx([ROBUST * 16 * 2, ROBUST * 16 * 3])
    assert read_estimate(folder) == {}, "status would take them for the seconds of whole runs"


def test_estimate_of_a_begun_run_is_that_of_the_epochs_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 12 steps, 4 updates and 448 s of validation; status divides the stored seconds of whole runs itself."""
    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", lambda planned, kind: Times(2.0, 1.0, 32.0))
    study, folder = small_study({"method": "pgd-3"}, evaluation=Evaluation(())), StudyFolder(tmp_path)
    (run,) = study.runs
    path = RunDirectory.create(folder.run_path(run), Planner().plan(run.options).config).path
    (path / METRICS).write_text(json.dumps(asdict(EpochStats(epoch=1))) + "\n")
    (found,) = estimate(folder, study.runs, notify=lambda text: None)
    assert (found.passes, found.training) == (8, (12 + 8 + 448) / 2)
    assert read_estimate(folder) == {run.name: 12 + 8 + 448}


def test_estimate_counts_squares_queries_and_names_attacks_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 forward passes, each a third of a pass with the gradient, on 16 images."""
    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", lambda planned, kind: Times(2.0, 1.0, 32.0))
    study = small_study(evaluation=Evaluation(("square", "torchattacks.PGD(steps=5)"), 16))
    (found,) = estimate(StudyFolder(tmp_path), study.runs, notify=lambda text: None)
    assert found.unknown == ("torchattacks.PGD(steps=5)",)
    assert found.evaluation == pytest.approx(ROBUST * 16 * 5000 / 3, rel=0.03)


def test_estimate_refuses_more_images_than_the_digits_500(tmp_path: Path) -> None:
    study = small_study(evaluation=Evaluation(("fgsm",), 16, autoattack=501))
    with pytest.raises(DeatError, match="autoattack = 501 is more than the 500 test images of digits"):
        estimate(StudyFolder(tmp_path), study.runs, notify=lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"norm": "L2", "eps": 1.5}, {"method": "fgsm-pgi"}], ids=["Linf", "L2", "one step"]
)
def test_estimate_measures(tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.runs.estimate.BATCHES", 1)
    told: list[str] = []
    predicted = estimate(StudyFolder(tmp_path), small_study(options).runs, notify=told.append)
    assert len(told) == 1
    assert 0 < predicted[0].training < 60


@pytest.mark.parametrize("kind", ["pgd-1", "free-2"])
def test_batches_are_timed_before_a_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of torch ask only once, in the first matrix product on a GPU, whether cuBLAS is deterministic."""
    timed: list[str] = []

    def batches(planned: TrainingPlan, counts: list[int], method: str) -> BatchTimes:
        timed.append("batches")
        return BatchTimes({steps: 3.0 + steps for steps in counts}, passes=1, batches=10, memory=0)

    def evaluation(planned: TrainingPlan) -> float:
        timed.append("pass")
        return 7.0

    monkeypatch.setattr("deat_rb.reproduction.estimate.time_batches", batches)
    monkeypatch.setattr("deat_rb.reproduction.estimate.time_pass", evaluation)
    times = _measure(small_planned(method=kind), kind)
    assert timed == ["batches", "pass"]
    assert times == (Times(0.0, 2.5, 7.0) if kind == "free-2" else Times(3.0, 1.0, 7.0))
