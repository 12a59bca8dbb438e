"""The epoch loop: what is asked of a loader, the schedule's decisions, costs, selection, stopping, and bad ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from training_problems import Batch, images_and_labels, loader, made, normalized, run_config, used

import deat_rb
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.base import Stop, StoppingRule
from deat_rb.training.callbacks import Callback
from deat_rb.training.engine import Engine
from deat_rb.training.lr import LR_SCHEDULES
from deat_rb.training.metrics import BatchStats, EpochAccumulator, EpochStats
from deat_rb.training.validation import Validation
from deat_rb.utils.errors import DeatError, Interrupted

EPS = 8 / 255


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def fitted(name: str = "pgd-1", data: Any = None, **options: Any) -> dict[str, Tensor]:
    model = made()
    deat_rb.create(name, model).fit(data or loader(), **{"epochs": 2, "lr": 0.05, **options})
    return weights(model)


# Loaders


class Generated:
    """An iterable without a length whose batches are made on the way."""

    def __iter__(self) -> Iterator[Batch]:
        yield from loader()


def test_any_iterable_of_batches_trains_the_same() -> None:
    expected = fitted()
    images, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    assert same(fitted(data=tuple(loader())), expected)
    assert same(fitted(data=Generated()), expected)
    assert same(fitted(data=DataLoader(TensorDataset(images, labels), batch_size=6)), expected)
    assert not same(expected, weights(made()))


def test_a_loader_with_set_epoch_is_told_the_epoch() -> None:
    told: list[int] = []

    class Told(Generated):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    fitted(data=Told(), epochs=3)
    assert told == [1, 2, 3]


@pytest.mark.parametrize("made_of", [lambda: iter(loader()), lambda: (batch for batch in loader())])
def test_an_iterator_that_runs_out_is_refused(made_of: Any) -> None:
    with pytest.raises(DeatError, match="can be iterated only once"):
        fitted(data=made_of())


IMAGES, LABELS = images_and_labels()
BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "over one": ((IMAGES * 255, LABELS), r"must be in \[0, 1\], not in .*normalisation belongs in the model"),
    "under zero": ((IMAGES - 0.5, LABELS), r"must be in \[0, 1\]"),
    "NaN": ((IMAGES / 0 * 0, LABELS), "NaN"),
    "label too high": ((IMAGES, LABELS + 1), "label 4 is out of range: labels are 0 to 3"),
    "label negative": ((IMAGES, LABELS - 1), "label -1 is out of range"),
    "bytes": (((IMAGES * 255).byte(), LABELS), "floating-point"),
    "fewer labels": ((IMAGES, LABELS[1:]), "6 images have 5 labels"),
    "float labels": ((IMAGES, LABELS.float()), "int64"),
    "one image": ((IMAGES[0], LABELS[:1]), r"\(N, C, H, W\)"),
    "numpy": ((IMAGES.numpy(), LABELS.numpy()), "pairs of tensors"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_first_batch_is_refused_and_nothing_written_or_learnt(case: str, tmp_path: Path) -> None:
    batch, message = BAD_BATCHES[case]
    model, run = made(), RunDirectory.create(tmp_path / "run", run_config())
    before = weights(model)
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", model).fit([batch], epochs=1, run=run)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json"]
    assert same(weights(model), before)


@pytest.mark.parametrize("case", ["over one", "NaN", "label too high"])
def test_bad_validation_images_are_refused_before_training(case: str) -> None:
    batch, message = BAD_BATCHES[case]
    model = made()
    before = weights(model)
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", model).fit(loader(), [batch], epochs=1, lr=0.1)
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "^epochs = 0 cannot be used: it should be greater than or equal to 1"),
        (
            {"lr_schedule": "cylic"},
            "lr_schedule = 'cylic' cannot be used: it should be 'cyclic', 'multistep' or 'flat'",
        ),
        ({"lr_epochs": 1, "epochs": 3}, "lr_epochs = 1 lays out the milestones of a multistep .* one is cyclic"),
        (
            {"lr_schedule": "multistep", "lr_epochs": 0},
            "lr_epochs = 0 cannot be used: it should be greater than or equal to 1",
        ),
        ({"select": "first"}, "select = 'first' cannot be used: it should be 'best' or 'last'"),
        ({"select": "best"}, "needs validation images"),
        ({"device": "cuda:63"}, "no device 'cuda:63'"),
        ({"precision": "fp64"}, "precision = 'fp64' cannot be used"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 does not train on a CPU"),
        ({"val_loader": []}, "the validation loader gave no batch"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        fitted(**options)


def test_a_rule_that_validates_needs_images() -> None:
    with pytest.raises(DeatError, match="u-fgsm stops by validation and needs images to validate on"):
        fitted("u-fgsm")


# The learning rate


def test_learning_rates_by_hand() -> None:
    """Over 5 epochs of 2 batches: the rate of an epoch's second batch, at 0.1, 0.3, 0.5, 0.7 and 0.9 of the run."""
    rates = {
        "cyclic": [0.2, 0.6, 1.0, 0.6, 0.2],
        "multistep": [1, 1, 0.1, 0.1, 0.01],
        "flat": [1] * 5,
    }
    assert set(rates) == set(LR_SCHEDULES)
    for name, expected in rates.items():
        history = deat_rb.create("standard", made()).fit(loader(), epochs=5, lr=0.05, lr_schedule=name)
        assert [row.lr / 0.05 for row in history.rows] == pytest.approx(expected), name


# Guidance (laws 4 and 5)


class Scripted(deat_rb.AttackTrainer):
    """Its epochs of one batch have the l_X that the script says."""

    script: list[float]

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        stats = super().training_step(images, labels, optimizer, engine)
        stats.l_x = torch.tensor(self.script.pop(0))
        return stats


def scripted(script: list[float]) -> list[EpochStats]:
    attack = deat_rb.PGD(made(), eps=EPS, alpha=2 / 255, steps=1)
    trainer = Scripted(attack, schedule=deat_rb.GradientMagnitude(gamma=1.1, max_steps=5))
    epochs = len(script)
    trainer.script = script
    return trainer.fit([images_and_labels()], epochs=epochs, lr=0.01).rows


def test_steps_and_alpha_follow_l_x() -> None:
    """Thresholds by hand: 11 after epoch 2, 12.32 after epoch 4, 13.64 after epoch 6, and the bound of 5."""
    rows = scripted([9, 10, 11, 11.2, 12, 12.4, 99, 999, 0.1])
    assert [row.steps for row in rows] == [1, 2, 2, 2, 3, 3, 4, 5, 5]
    alphas = [8, 4, 4, 4, 8 / 3, 8 / 3, 2, 2, 2]
    assert [255 * (row.alpha or 0) for row in rows] == pytest.approx(alphas)
    assert [row.forwards for row in rows] == [2, 3, 3, 3, 4, 4, 5, 6, 6], "it really took them, and one for the update"
    assert [row.backwards for row in rows] == [2, 3, 3, 3, 4, 4, 5, 6, 6]


def test_steps_stay_while_l_x_does() -> None:
    assert [row.steps for row in scripted([9.0] * 8)] == [1] + [2] * 7
    assert [row.steps for row in scripted([9, 10, 10.9, 11.0, 10.99, 3])] == [1, 2, 2, 2, 2, 2]


def test_l_x_that_decides_is_what_crafting_saw() -> None:
    """The schedule's threshold after epoch 2 is gamma times the row's l_X, which is the sum over its batches."""
    trainer = deat_rb.create("m+pgd", made(), gamma=1.5)
    seen: list[float] = []
    step = trainer.training_step

    def watched(*args: Any) -> BatchStats:
        stats = step(*args)
        seen.append(float(stats.l_x))
        return stats

    trainer.__dict__["training_step"] = watched
    history = trainer.fit(loader(3), epochs=2, lr=0.01)
    assert history.rows[1].l_x == pytest.approx(sum(seen[3:]))
    assert trainer.state_dict()["schedule"]["threshold"] == pytest.approx(1.5 * sum(seen[3:]))
    bound = history.rows[1].l_x / (18 * 2 * EPS * 3 * 8 * 8)
    assert history.rows[1].lipschitz == pytest.approx(bound)


# Costs (law 6): two batches make an epoch, so M = 2


@pytest.mark.parametrize(
    ("name", "epochs", "backwards", "forwards", "updates"),
    [
        ("standard", 2, 4, 4, 4),
        ("free-3", 2, 12, 12, 12),  # r M T
        ("pgd-3", 2, 16, 16, 4),  # (i + 1) M T
        ("u-fgsm", 2, 8, 8, 4),  # 2 M T
        ("deat-3", 10, 44, 44, 44),  # 22 M
        ("deat-3", 12, 60, 60, 60),  # 30 M
        ("trades", 1, 22, 26, 2),  # 10 + 1 backwards; 10 and the clean one for crafting, 2 for the update
        ("mart", 1, 22, 24, 2),  # 10 + 1 backwards; 10 for crafting, 2 for the update
    ],
)
def test_costs_in_mini_batches(name: str, epochs: int, backwards: int, forwards: int, updates: int) -> None:
    val = [images_and_labels()] if name == "u-fgsm" else None
    trainer = deat_rb.create(name, made())
    trainer.stopping = None if name != "u-fgsm" else trainer.stopping
    history = trainer.fit([images_and_labels(2)] * 2, val, epochs=epochs, lr=1e-4)
    assert history.backwards == backwards
    assert sum(row.forwards for row in history.rows) == forwards
    assert sum(row.updates for row in history.rows) == updates


def test_friendly_crafting_counts_the_share_that_moves() -> None:
    """With tau = 0 a misclassified example takes the pass that finds this out and no other."""
    model = made().eval()
    images, labels = images_and_labels(8)
    with torch.no_grad():
        predicted = model(images).argmax(dim=1)
    labels = torch.where(torch.arange(8) < 5, (predicted + 1) % 4, predicted)  # 5 of 8 are misclassified
    trainer = deat_rb.create("fat-3", model, tau=0, eps=1e-6)
    stats = trainer.training_step(images, labels, torch.optim.SGD(model.parameters(), lr=0.0))
    assert float(stats.backwards) == pytest.approx((5 * 1 + 3 * 3) / 8 + 1)
    assert float(stats.forwards) == pytest.approx((5 * 1 + 3 * 3) / 8 + 1)


# Selection (law 7) and stopping


class Seen(Callback):
    """Keeps the weights at every epoch's end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: list[dict[str, Tensor]] = []

    def on_epoch_end(self, row: EpochStats) -> None:
        self.weights.append(weights(self.model))


@pytest.mark.parametrize(
    ("robust", "select", "epoch"),
    [
        ([0.2, 0.5, 0.3], "best", 2),
        ([0.2, 0.5, 0.3], None, 2),
        ([0.5, 0.5, 0.3], "best", 1),
        ([0.2, 0.5, 0.3], "last", 3),
        ([0.1, 0.2, 0.3], "best", 3),
    ],
)
def test_the_model_ends_with_the_weights_of_the_epoch_selected(
    robust: list[float], select: Any, epoch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = list(robust)
    monkeypatch.setattr("deat_rb.training.loop.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2))
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select=select or "best"))
    seen = Seen(model)
    history = deat_rb.create("pgd-1", model).fit(
        loader(), [images_and_labels()], epochs=3, lr=0.05, select=select, run=run, callbacks=[seen]
    )
    assert history.selected == epoch
    assert [row.val_robust_acc for row in history.rows] == robust
    assert same(weights(model), seen.weights[epoch - 1])
    assert not same(seen.weights[epoch - 1], seen.weights[epoch - 2])
    assert same(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[epoch - 1])
    assert run.checkpoint("best")["epoch"] == max(range(3), key=lambda i: robust[i]) + 1
    assert run.checkpoint("last")["epoch"] == 3


def test_of_epochs_equally_robust_the_more_accurate_one_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain training has 0 % PGD-20 accuracy in every epoch: its first epoch is not the best."""
    script = [(0.3, 0.0), (0.9, 0.0), (0.8, 0.0)]
    monkeypatch.setattr("deat_rb.training.loop.validate", lambda *args, **options: Validation(*script.pop(0), 3, 2))
    history = deat_rb.create("standard", made()).fit(loader(), [images_and_labels()], epochs=3, select="best")
    assert history.selected == 2


def test_validation_is_pgd_20_on_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Validation:
        calls.append((images, options))
        return Validation(0.5, 0.4, len(images) * (1 + options["steps"]), len(images) * options["steps"])

    monkeypatch.setattr("deat_rb.training.loop.validate", watched)
    held = images_and_labels(150, seed=77)
    [row] = deat_rb.create("u-fgsm", made()).fit(loader(), [held], epochs=1).rows
    assert (row.val_forwards, row.val_backwards) == (150 * 21 + 128 * 6, 150 * 20 + 128 * 5)
    assert [(len(images), options["steps"]) for images, options in calls] == [(150, 20), (128, 5)]
    assert all(torch.equal(images, held[0][: len(images)]) for images, _ in calls)


class AfterEpoch(StoppingRule):
    """Stops after one epoch and keeps another."""

    def __init__(self, last: int, keep: int) -> None:
        self.last, self.keep, self.lookback = last, keep, last - keep + 1

    def update(self, stats: EpochStats) -> Stop | None:
        return Stop("the script says so", keep=self.keep) if stats.epoch == self.last else None


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_rule_stops_and_the_last_healthy_weights_are_kept(
    select: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robust = [0.3, 0.4, 0.9]  # what is sick may look best
    monkeypatch.setattr("deat_rb.training.loop.validate", lambda *args, **options: Validation(0.9, robust.pop(0), 3, 2))
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select=select))
    seen = Seen(model)
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(model, steps=1), stopping=AfterEpoch(3, keep=2))
    history = trainer.fit(loader(), [images_and_labels()], epochs=6, lr=0.05, select=select, run=run, callbacks=[seen])
    assert history.stopped == "the script says so"
    assert history.selected == 2
    assert same(weights(model), seen.weights[1])
    assert [row.stopped for row in run.rows()] == [None, None, "the script says so"]
    assert run.checkpoint("last")["epoch"] == run.checkpoint("best")["epoch"] == 2
    assert same(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[1])


@pytest.mark.parametrize(("robust", "keep", "selected"), [([0.1, 0.4, 0.9], 1, 1), ([0.5, 0.1, 0.3, 0.9], 2, 1)])
def test_of_the_epochs_after_the_last_healthy_one_none_is_selected(
    robust: list[float], keep: int, selected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, script = len(robust), list(robust)
    monkeypatch.setattr("deat_rb.training.loop.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2))
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select="best"))
    seen = Seen(model)
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(model, steps=1), stopping=AfterEpoch(last, keep=keep))
    history = trainer.fit(loader(), [images_and_labels()], epochs=6, lr=0.05, select="best", run=run, callbacks=[seen])
    assert history.selected == selected
    assert same(weights(model), seen.weights[selected - 1])
    assert (run.checkpoint("best")["epoch"], run.checkpoint("last")["epoch"]) == (selected, keep)
    assert same(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[selected - 1])


def test_a_second_fit_begins_the_method_anew_and_goes_on_with_the_weights() -> None:
    trainer = deat_rb.create("m-deat", made())
    first = trainer.fit(loader(), epochs=4)
    assert trainer.fit(loader(), epochs=2).steps == first.steps[:2] == [1, 2]
    trainer.steps = 3
    assert trainer.fit(loader(), epochs=2).steps == [3, 4]
    carried = deat_rb.create("free-2", made())
    carried.fit(loader(), epochs=1)
    assert carried.tensors()
    carried.reset_schedule()
    assert not carried.tensors()


def test_a_carried_perturbation_is_left_behind_by_images_of_another_size() -> None:
    carried = deat_rb.create("free-2", made())
    images, labels = images_and_labels(8)
    optimizer = SGD(carried.model.parameters(), lr=0.01)
    carried.training_step(images, labels, optimizer)
    smaller = images[..., :4, :4]
    assert carried(smaller, labels).shape == smaller.shape
    carried.training_step(smaller, labels, optimizer)
    assert carried.tensors()["carried"].shape == smaller.shape


# One seed (law 9)


@pytest.mark.parametrize("name", ["free-2", "m-deat", "m+pgd", "trades", "fat-2", "standard"])
def test_a_seed_fixes_everything(name: str) -> None:
    """Dropout, random starts and a shuffling DataLoader draw from torch's generators."""
    images, labels = images_and_labels(12)
    data = DataLoader(TensorDataset(images, labels), batch_size=6, shuffle=True)
    torch.manual_seed(1)
    first = fitted(name, data, seed=3)
    torch.manual_seed(2)
    assert same(fitted(name, data, seed=3), first)
    assert not same(fitted(name, data, seed=4), first)


def test_global_generators_are_given_back() -> None:
    state = torch.get_rng_state()
    fitted("pgd-1", val_loader=[images_and_labels()])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DeatError):
        fitted(data=[BAD_BATCHES["NaN"][0]])
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_batchnorms_stay_frozen_through_fit() -> None:
    model = used()
    before = weights(model)
    deat_rb.create("pgd-1", model).fit(loader(), [images_and_labels()], epochs=2, lr=0.05)
    after = weights(model)
    assert torch.equal(after["4.running_mean"], before["4.running_mean"])
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert [model.training, model[1].training, model[4].training, model[8].training] == [True, True, False, False]


# Bad ends


def test_a_loss_that_is_no_longer_finite_ends_training(tmp_path: Path) -> None:
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config())
    data = loader(4)

    class Blows(Generated):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Batch]:
            yield from data[:1]
            images, labels = data[1]
            yield (images if self.epoch < 2 else images * float("nan")), labels

    state = torch.get_rng_state()
    with pytest.raises(
        DeatError,
        match=r"no longer finite: the loss at batch 2 of epoch 2; epoch 1 is the last good one, and the checkpoint .*"
        r"/checkpoints/00000002.safetensors of epoch 2, batch 0 is good; try a smaller --lr",
    ):
        deat_rb.create("pgd-1", model).fit(Blows(), epochs=3, lr=0.05, run=run)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.epoch for row in run.rows()] == [1]
    assert all(
        bool(tensor.isfinite().all()) for tensor in deat_rb.load_model(run.path, trust_code=True).state_dict().values()
    )
    with pytest.raises(DeatError, match=r"no longer finite: .* at batch . of epoch 1; there is no good epoch"):
        deat_rb.create("standard", made()).fit(loader(3), epochs=1, lr=1e30)


class Interrupts(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        self.epoch = epoch

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        if self.epoch == self.at:
            raise KeyboardInterrupt


def test_ctrl_c_says_what_was_kept(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        fitted(epochs=3, callbacks=[Interrupts(2)])
    assert "1 of 3 epochs were trained" in caught.value.kept

    run = RunDirectory.create(tmp_path / "second", run_config())
    with pytest.raises(Interrupted) as caught:
        deat_rb.create("pgd-1", normalized()).fit(loader(), epochs=3, run=run, callbacks=[Interrupts(2)])
    assert caught.value.kept == f"{run.path} keeps 1 of 3 epochs; deat-rb train --resume {run.path} goes on from there"
    assert run.checkpoint("last")["epoch"] == 1
    deat_rb.load_model(run.path, trust_code=True)

    run = RunDirectory.create(tmp_path / "first", run_config())
    with pytest.raises(Interrupted, match="keeps 0 of 3 epochs"):
        deat_rb.create("pgd-1", normalized()).fit(loader(), epochs=3, run=run, callbacks=[Interrupts(1)])
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.json"]
