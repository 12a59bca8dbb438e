"""`deat_rb.runs.estimate`: time and memory of a run from timed batches."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from small_runs import planned
from tape import TapeGraphs

from deat_rb.cli import main
from deat_rb.methods.registry import create
from deat_rb.runs import estimate as module
from deat_rb.runs.estimate import BatchTimes, Stopwatch, estimate, time_batches, time_pass
from deat_rb.runs.plan import TrainingPlan
from deat_rb.training.base import TrainerBase
from deat_rb.training.engine import Engine


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes 1 s per backward pass, of which there are as many as steps (for replays) or one more."""

    def timed(planned: TrainingPlan, steps: int, method: str | None, watch: Stopwatch) -> Stopwatch:
        replays = planned.config.attack.method == "m-deat"
        watch.passes = steps + (0 if replays else 1)
        watch.seconds = [100.0, *[float(watch.passes)] * 10]  # the first is left out
        return watch

    monkeypatch.setattr(module, "_timed", timed)
    monkeypatch.setattr(Engine, "peak_memory", lambda self: 10**9)


def test_estimate_of_an_open_ended_run_is_that_of_an_epoch(fixed_times: None) -> None:
    """Averaged and raw weights are validated."""
    found = estimate(planned(method="pgd-1", epochs="open"))
    assert (found.low, found.high) == (4 + 14, 4 + 14)


def test_estimate_of_constant_steps(fixed_times: None) -> None:
    """2 epochs of 2 batches of 2 s; validation: 2 epochs, 16 images, 14 passes of 1/32 s each."""
    found = estimate(planned(method="pgd-1"))
    assert found.timed == {1: 2.0}
    assert (found.low, found.high) == (8 + 14, 8 + 14)
    assert (found.batches, found.memory, found.may_end_earlier) == (10, 10**9, False)


def test_estimate_of_guided_steps_is_a_range(fixed_times: None) -> None:
    """4 epochs of 2 batches: at least 1 + 2 + 2 + 2 replays, at most 1 + 2 + 3 + 4; validation takes 28 s."""
    found = estimate(planned(method="m-deat", epochs=4))
    assert found.timed == {1: 1.0, 4: 4.0}
    assert (found.low, found.high) == (2 * 7 + 28, 2 * 10 + 28)


def test_estimate_of_every_d_epochs_is_known(fixed_times: None) -> None:
    """DEAT-3 in 6 epochs: 3 x 1 + 3 x 2 replays of 2 batches; both are timed, with one pass more than replays here."""
    found = estimate(planned(method="deat-3", epochs=6))
    assert found.timed == {1: 2.0, 2: 3.0}
    assert found.low == found.high == pytest.approx(2 * (6 + 9) + 42)


def test_estimate_counts_the_test_images_of_a_curve(fixed_times: None) -> None:
    """In each of 4 epochs 32 images, 14 s; the 16 validation images, 7 s, after epochs 2 and 4, twice with ``ema``."""
    curve: dict[str, Any] = {"method": "pgd-1", "epochs": 4, "validate_every": 2, "curve_test": 32}
    assert estimate(planned(**curve)).low == 16 + 4 * 14 + 2 * 7
    assert estimate(planned(**curve, ema=0.9)).low == 16 + 4 * 14 + 2 * 2 * 7


def test_estimate_says_that_a_run_may_end_earlier(fixed_times: None) -> None:
    assert estimate(planned(method="u-fgsm")).may_end_earlier
    assert not estimate(planned(method="u-fgsm", early_stopping=False)).may_end_earlier
    assert estimate(planned(method="pgd-1", patience=1)).may_end_earlier


def test_estimate_counts_the_epochs_that_are_validated(fixed_times: None) -> None:
    """5 epochs of 2 batches of 2 s; epochs 2, 4 and 5 are validated, 7 s each; of an open-ended run, every other."""
    assert estimate(planned(method="pgd-1", epochs=5, validate_every=2)).low == 20 + 21
    assert estimate(planned(method="pgd-1", epochs="open", validate_every=2)).low == 4 + 7


def test_estimate_times_awp_although_it_begins_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCHES", 1)
    times = time_batches(planned(method="pgd-1", awp=0.01, awp_warmup=1), [1])
    assert times.passes == 3  # attack, AWP, update


def test_estimate_times_batches_and_leaves_the_plan_as_it_was() -> None:
    plan = planned(method="m+trades", max_steps=2)
    before = {name: tensor.clone() for name, tensor in plan.trainer.model.state_dict().items()}
    random = torch.get_rng_state()
    found = estimate(plan)
    assert found.timed.keys() == {1, 2}
    assert 0 < found.low <= found.high < 300
    assert found.batches == 10
    assert found.memory > 10**7
    after = plan.trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (plan.trainer.schedule.steps, plan.trainer.model.training) == (1, True)
    assert torch.equal(random, torch.get_rng_state())


def test_time_batches_with_other_numbers_of_steps_and_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCHES", 1)
    plan = planned(method="trades")
    times = time_batches(plan, [1, 3])
    assert times.seconds.keys() == {1, 3}
    assert times.passes == 4  # three steps and the update
    assert time_batches(plan, [2], "free-2").passes == 2
    assert 0 < time_pass(plan) < 10
    assert all(parameter.requires_grad for parameter in plan.trainer.model.parameters())


def test_batch_times_are_those_of_a_step_and_of_the_rest() -> None:
    times = BatchTimes({1: 5.0, 3: 9.0}, passes=4, batches=10, memory=0)
    assert (times.step, times.update) == (2, 3)
    assert (replace(times, seconds={2: 8.0}).step, replace(times, seconds={2: 8.0}).update) == (0, 8)


def test_steps_are_timed_after_they_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches are warm-ups, the third is recorded and repeated, and ten more repetitions count."""
    tape = TapeGraphs()
    monkeypatch.setattr("deat_rb.training.fit.choose_graphs", lambda *args: tape)
    monkeypatch.setattr(module, "wait_for", lambda device: None)
    watch = module._timed(planned(), 1, None, Stopwatch(torch.device("cuda")))
    assert (tape.recorded, tape.repeated, len(watch.seconds), watch.count) == (1, 11, 13, 10)


def test_a_timed_network_is_freed_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[weakref.ref[TrainerBase]] = []
    alive: list[int] = []

    def noting(*args: Any, **options: Any) -> TrainerBase:
        alive.append(sum(trainer() is not None for trainer in trainers))
        trainer = create(*args, **options)
        trainers.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(module, "BATCHES", 1)
    monkeypatch.setattr(module, "create", noting)
    time_batches(planned(), [1, 2, 3])
    assert alive == [0, 0, 0]


def test_timing_ends_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 0.0)
    assert estimate(planned()).batches == 1


def test_dry_run_prints_time_and_memory(tmp_path: Path, fixed_times: None) -> None:
    arguments = ["train", "--method", "m-deat", "--arch", "wrn-10-1", "--train-size", "64", "--val-size", "16",
                 "--batch-size", "32", "--epochs", "4", "--dry-run", "--output", str(tmp_path), "--device",
                 "cpu"]  # fmt: skip
    lines = CliRunner().invoke(main, arguments).stdout.splitlines()
    assert lines[-2:] == [
        "time       about 42 s to 48 s on cpu, estimated from 10 batches (1 s with 1 step, 4 s with 4 steps)",
        "memory     about 1.0 GB of memory, estimated: the peak while these were timed",
    ]
    assert (
        CliRunner()
        .invoke(main, [*arguments, "--seeds", "0,1"])
        .stdout.splitlines()[-2]
        .startswith("time       about 84 s to 2 min on cpu")
    )
    assert not list(tmp_path.iterdir())
