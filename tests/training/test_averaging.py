"""Exponential moving averages of the weights."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import EPS, equal, fitted, weights
from resumed_runs import Stops, outcome, train
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training_problems import images_and_labels, loader, made, normalized, run_config

import deat_rb
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.averaging import WeightAverage
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import BatchStats, EpochStats
from deat_rb.training.state import TrainingState
from deat_rb.training.validation import Validation, validate
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.safe_load import load_tensors

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def test_update_is_the_average_worked_out_by_hand() -> None:
    """The decay is min(0.2, (1 + t) / (10 + t)): 1/10, 2/11, then 0.2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.2)
    for value, expected in [(2.0, 0.1 * 1 + 0.9 * 2), (4.0, (2 * 1.9 + 9 * 4) / 11), (3.0, 0.8 * 3 + 0.2 * 39.8 / 11)]:
        nn.init.constant_(model.weight, value)
        average.update()
        assert average.tensors["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 3
    assert average.updates.item() == 3


def test_update_equals_torchs_averaged_model() -> None:
    """torch's averages start with the first weights that they see; 0.999 is far above the warm-up's decays."""

    def warm_up(averages: Tensors, current: Tensors, count: torch.Tensor | int) -> None:
        decay = min(0.999, int(count) / (9 + int(count)))
        for mean, tensor in zip(averages, current, strict=True):
            mean.copy_(decay * mean + (1 - decay) * tensor)

    model = made()
    average = WeightAverage(model, 0.999)
    theirs = AveragedModel(model, multi_avg_fn=warm_up, use_buffers=True)
    theirs.update_parameters(model)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * step)
        model(images_and_labels(seed=step)[0])
        average.update()
        theirs.update_parameters(model)
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(average.tensors[name], tensor)
    assert average.tensors["1.num_batches_tracked"].item() == model.state_dict()["1.num_batches_tracked"].item()
    assert model.state_dict()["1.num_batches_tracked"].item() == 5


def test_swapped_in_gives_the_model_its_own_tensors_back() -> None:
    model = made()
    average = WeightAverage(model, 0.9)
    first = weights(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    own = weights(model)
    with average.swapped_in():
        assert equal(weights(model), first)
    assert equal(weights(model), own)


def test_average_follows_a_buffer_that_is_replaced_and_leaves_out_what_is_not_saved() -> None:
    model = nn.Module()
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    model.register_buffer("mean", torch.zeros(1))
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    average = WeightAverage(model, 0.5)
    model.mean = torch.full((1,), 10.0)
    average.update()
    assert average.tensors.keys() == {"scale", "mean"}
    assert average.tensors["mean"].item() == pytest.approx(9)
    assert average.buffers()[0] is average.tensors["mean"]


class Follows(Callback):
    """Works the average out after each step of a run, whose method updates the weights once per batch."""

    def __init__(self, decay: float) -> None:
        self.decay, self.count = decay, 0

    def on_fit_start(self, state: TrainingState) -> None:
        self.state = state
        self.average = {name: tensor.double() for name, tensor in weights(state.model).items()}

    def on_step_end(self, stats: BatchStats) -> None:
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        for name, tensor in weights(self.state.model).items():
            self.average[name] = decay * self.average[name] + (1 - decay) * tensor.double()


def test_fit_ends_with_the_average_of_the_weights_and_statistics() -> None:
    model, follows = made(), Follows(0.3)
    deat_rb.create("pgd-1", model).fit(loader(4), epochs=2, lr=0.1, ema=0.3, callbacks=[follows])
    assert follows.count == 8
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), follows.average[name], rtol=1e-5, atol=1e-6)
    assert not equal(weights(model), fitted("pgd-1", loader(4), epochs=2, lr=0.1))


def test_fit_averages_after_every_replay() -> None:
    counts: list[float] = []

    class Counts(Callback):
        def on_fit_start(self, state: TrainingState) -> None:
            self.state = state

        def on_epoch_end(self, row: EpochStats) -> None:
            assert self.state.average is not None
            counts.append(self.state.average.updates.item())

    deat_rb.create("free-3", made(), eps=EPS).fit(loader(), epochs=2, ema=0.9, callbacks=[Counts()])
    assert counts == [6, 12]


@pytest.mark.parametrize("method", [pytest.param("pgd-2", marks=pytest.mark.slow), "m-deat", "m+trades"])
def test_average_does_not_change_the_training(method: str, tmp_path: Path) -> None:
    """The raw weights and their accuracies are those of a run without an average, in bfloat16, too."""
    plain, averaged = (RunDirectory.create(tmp_path / name, run_config()) for name in ("plain", "averaged"))
    train(method, plain)
    train(method, averaged, ema=0.99)
    for which in ("last", "best"):
        assert (averaged.path / f"{which}-raw.safetensors").is_file()
        assert not (plain.path / f"{which}-raw.safetensors").exists()
    assert load_tensors(averaged.path / "last-raw.safetensors").keys() == normalized().state_dict().keys()
    assert (averaged.path / "last-raw.safetensors").read_bytes() == (plain.path / "last.safetensors").read_bytes()
    assert (averaged.path / "last.safetensors").read_bytes() != (plain.path / "last.safetensors").read_bytes()
    for row, raw in zip(plain.rows(), averaged.rows(), strict=True):
        assert (raw.raw_val_acc, raw.raw_val_robust_acc) == (row.val_acc, row.val_robust_acc)
        assert (raw.l_x, raw.loss, raw.backwards, raw.forwards) == (row.l_x, row.loss, row.backwards, row.forwards)
        assert raw.val_forwards > row.val_forwards
        assert row.raw_val_acc is row.raw_val_robust_acc is None


def test_resume_restores_the_average_bit_for_bit(tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("free-3", whole, ema=0.9)
    for after in (2, 6):
        run = RunDirectory.create(tmp_path / f"after-{after}", run_config())
        with pytest.raises(Interrupted):
            train("free-3", run, Stops(after), ema=0.9)
        train("free-3", run, resume=True, ema=0.9)
        assert outcome(run) == outcome(whole)
        for which in ("best-raw", "last-raw"):
            assert load_bytes(run, which) == load_bytes(whole, which)


@pytest.mark.parametrize("second", [False, True])
def test_interruption_while_weights_are_swapped_loses_no_bit(
    second: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes with half of the averages copied, or in the attack and again with half of the weights restored."""
    whole, run = (RunDirectory.create(tmp_path / name, run_config()) for name in ("whole", "run"))
    train("u-fgsm", whole, ema=0.9)
    copies: list[str] = []

    def copy_and_interrupt(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
        for number, (name, tensor) in enumerate(source.items()):
            target[name].copy_(tensor)
            if number == len(source) // 2:
                copies.append(name)
                if len(copies) == (2 if second else 1):
                    signal.raise_signal(signal.SIGINT)

    def attack_and_interrupt(*args: Any, **options: Any) -> Validation:
        if second:
            signal.raise_signal(signal.SIGINT)
        return validate(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr("deat_rb.training.averaging._copy", copy_and_interrupt)
        patched.setattr("deat_rb.training.validation.validate", attack_and_interrupt)
        kept = "keeps 0 of 3 epochs;" if second else "keeps 0 of 3 epochs and 4 batches of the next;"
        with pytest.raises(Interrupted, match=kept):
            train("u-fgsm", run, ema=0.9)
    train("u-fgsm", run, resume=True, ema=0.9)
    assert outcome(run) == outcome(whole)
    for which in ("best-raw", "last-raw"):
        assert load_bytes(run, which) == load_bytes(whole, which)


def load_bytes(run: RunDirectory, which: str) -> bytes:
    return (run.path / f"{which}.safetensors").read_bytes()


@pytest.mark.parametrize(("before", "after"), [(0.9, None), (None, 0.9)])
def test_resume_refuses_to_begin_or_end_averaging(before: float | None, after: float | None, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("pgd-1", run, Stops(1), ema=before)
    with pytest.raises(DeatError, match=r"does not match the run \(average\."):
        train("pgd-1", run, resume=True, ema=after)


def test_validation_selection_and_result_are_of_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen through the logits' bias, which tells the raw from the averaged weights."""
    run, model = RunDirectory.create(tmp_path / "run", run_config(select="best")), normalized()
    seen: list[float] = []

    def measured(network: nn.Module, *args: object, **options: object) -> Validation:
        seen.append(float(network.state_dict()["net.9.bias"][0]))
        robust = [0.3, 0.9, 0.5, 0.1][len(seen) - 1]  # the averaged weights of an epoch come first
        return Validation(0.9, robust, 3, 2)

    monkeypatch.setattr("deat_rb.training.validation.validate", measured)
    history = deat_rb.create("pgd-1", model).fit(
        loader(), [images_and_labels()], epochs=2, lr=0.05, ema=0.9, run=run, select="best"
    )
    assert history.selected == 2
    assert [row.val_robust_acc for row in history.rows] == [0.3, 0.5]
    assert [row.raw_val_robust_acc for row in history.rows] == [0.9, 0.1]
    assert load_tensors(run.path / "best.safetensors")["net.9.bias"][0].item() == seen[2]
    assert load_tensors(run.path / "best-raw.safetensors")["net.9.bias"][0].item() == seen[3] != seen[2]
    assert equal(weights(model), load_tensors(run.path / "best.safetensors"))
    assert "raw PGD-20" in str(history)


@pytest.mark.parametrize("decay", [1, -0.5, 1.5, float("nan"), "much"])
def test_fit_refuses_a_decay_out_of_range(decay: object) -> None:
    with pytest.raises(DeatError, match=r"ema = .* cannot be used"):
        fitted(ema=decay)
