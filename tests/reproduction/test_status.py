"""Time left, and environments of workers."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from small_studies import small_study

from deat_rb.reproduction.folder import Status
from deat_rb.reproduction.status import RunState, StudyState
from deat_rb.reproduction.workers import at_once, check_gpus, environments
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN

RUNS = small_study({"method": "pgd-1"}, {"method": "free-2"}, seeds=(0, 1)).runs


def state(number: int, status: Status, epochs: int = 0, seconds: float | None = None) -> RunState:
    return RunState(RUNS[number], status, epochs, 2, seconds)


def test_seconds_left_are_those_of_other_seeds() -> None:
    """Half of a run like the one of 60 s, of which 25 s were spent, and all of one like that of 20 s, one at a time."""
    half = replace(state(1, "running", 1), trained=25.0)
    runs = (state(0, "done", 2, 60.0), half, state(2, "done", 2, 20.0), state(3, "waiting"))
    assert StudyState(runs, {}).seconds_left() == pytest.approx(35 + 20)


def test_seconds_left_of_a_trained_run_are_those_of_its_evaluation() -> None:
    trained = replace(state(1, "begun", 2), trained=25.0)
    assert StudyState((state(0, "done", 2, 60.0), trained), {}).seconds_left() == pytest.approx(35)


def test_seconds_left_of_another_network_with_the_same_label_are_not_those_of_its_namesake() -> None:
    """In `reproduce` a label is only the method; the second network takes twice as long as predicted, as the first."""
    small, large = small_study(), small_study({"method": "pgd-1", "batch_size": 16}, seeds=(0, 1))
    (first,), (second, seed) = small.runs, large.runs
    assert first.label == second.label == seed.label
    runs = [RunState(first, "done", 2, 2, 60.0), RunState(second, "waiting", 0, 2)]
    assert StudyState(tuple(runs), {first.name: 30.0, second.name: 100.0}).seconds_left() == pytest.approx(200)
    runs += [RunState(seed, "done", 2, 2, 300.0)]
    assert StudyState(tuple(runs), {first.name: 30.0, second.name: 100.0}).seconds_left() == pytest.approx(300)


def test_seconds_left_correct_predictions_by_finished_runs() -> None:
    """PGD-1 was predicted to take 30 s and took 60 s, so that FREE-2's 10 s become 20 s each, two at a time."""
    runs = (state(0, "done", 2, 60.0), state(2, "running"), state(3, "running"))
    predicted = {RUNS[0].name: 30.0, RUNS[2].name: 10.0, RUNS[3].name: 10.0}
    assert StudyState(runs, predicted).seconds_left() == pytest.approx(20)
    assert StudyState(runs[1:], {}).seconds_left() is None
    assert StudyState(runs[:1], {}).seconds_left() == 0


def test_seconds_left_before_the_first_run_is_done_are_extrapolated_from_epochs() -> None:
    """One of two epochs took 10 s, so that 10 s of this run and 20 s of each of two others are left."""
    begun = replace(state(0, "running", 1), trained=10.0)
    study = StudyState((begun, state(1, "waiting"), state(2, "waiting")), {})
    assert study.seconds_left() == pytest.approx(10 + 20 + 20)
    assert study.is_projected
    assert StudyState((begun, state(1, "waiting")), {RUNS[0].name: 8.0, RUNS[1].name: 9.0}).is_projected is False
    assert StudyState((replace(begun, total=OPEN), state(1, "waiting")), {}).seconds_left() is None


def test_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("deat_rb.reproduction.workers.processors", lambda: 8)
    assert environments(4, (), 1) == [{"OMP_NUM_THREADS": "2"}] * 4
    assert environments(None, ("0", "3"), 2) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "0", "3", "3")]
    assert environments(None, (), 1) == [{}]
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert environments(4, (), 1) == [{}] * 4
    with pytest.raises(DeatError, match="--per-gpu 0 is below 1"):
        environments(None, ("0",), 0)


def test_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are processors for, whatever number of workers was started; one per GPU."""
    monkeypatch.setattr("deat_rb.reproduction.workers.processors", lambda: 8)
    assert [at_once([{}] * jobs, threads) for jobs, threads in ((4, 2), (4, 1), (4, 8), (16, 1), (1, 2))] == [
        4, 4, 1, 8, 1,
    ]  # fmt: skip
    assert at_once([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "0033"], None) == 2
    assert at_once([{}] * 3, None) == 1


@pytest.mark.gpu
def test_check_gpus_finds_the_first_one() -> None:
    check_gpus(["0", "0"])
    with pytest.raises(DeatError, match="--gpus 0,99: torch finds no GPU 99"):
        check_gpus(["0", "99"])
