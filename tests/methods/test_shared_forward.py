"""FGSM-PGI and LIET: what they keep, and what they refuse; tests/properties and tests/parity have the methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from training_problems import ARCH, Positioned, begin, images_and_labels, loader, made

import deat_rb
from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet
from deat_rb.methods.losses import surrogate
from deat_rb.methods.prior_guided import PriorGuidedTrainer
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import plan
from deat_rb.runs.resolution import resolve
from deat_rb.training.engine import Engine
from deat_rb.training.place import Place
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN

EPS = 8 / 255


@pytest.mark.parametrize("name", ["fgsm-pgi", "liet"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L2"}, "is defined for Linf only: omit norm = L2"),
        ({"awp": 0.005}, "cannot use awp: attack and loss share a forward pass, in train mode"),
        ({"attack_mode": "eval"}, "cannot use attack_mode: attack and loss share a forward pass, in train mode"),
        ({"steps": 2}, "steps = 2 is above 1; .* takes at most 1 step"),
        ({"consistency": -1.0}, "consistency = -1.0 is not a finite, non-negative number"),
        ({"label_smoothing": 1.0}, r"label_smoothing = 1 is not in \[0, 1\)"),
    ],
)
def test_create_refuses_what_the_method_is_not_defined_for(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        deat_rb.create(name, made(), **options)


def test_a_schedule_that_raises_the_steps_is_refused() -> None:
    attack = deat_rb.create("fgsm-pgi", made()).crafter
    with pytest.raises(DeatError, match=r"PriorGuidedTrainer takes one step per batch in every epoch: use .*Constant"):
        PriorGuidedTrainer(attack, schedule=deat_rb.GradientMagnitude(max_steps=4))


def test_create_refuses_a_reset_of_no_epochs_and_one_of_another_method() -> None:
    with pytest.raises(DeatError, match="prior_reset = 0 is not a positive whole number of epochs; the paper uses 40"):
        deat_rb.create("fgsm-pgi", made(), prior_reset=0)
    with pytest.raises(DeatError, match="the method liet has no parameter prior_reset"):
        deat_rb.create("liet", made(), prior_reset=3)


def test_fit_refuses_a_loader_without_positions() -> None:
    model = made()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(DeatError, match="keeps a perturbation for each training image, but a list does not tell which"):
        deat_rb.create("fgsm-pgi", model).fit(loader(), epochs=1)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fgsm-pgi", {"compile": True}, "fgsm-pgi takes two gradients from one forward pass, .*: omit --compile"),
        ("liet", {"epochs": OPEN, "lr_schedule": "flat"}, "it cannot be open-ended: give --epochs a number"),
    ],
)
def test_fit_refuses_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        deat_rb.create(name, made()).fit(Positioned(loader()), **{"epochs": 1, **options})


def test_training_step_needs_a_place() -> None:
    for name in ("fgsm-pgi", "liet"):
        trainer = deat_rb.create(name, made())
        with pytest.raises(DeatError, match="call begin_batch before each step"):
            trainer.training_step(*images_and_labels(), torch.optim.SGD(trainer.model.parameters(), lr=0.1))


def test_plan_says_the_memory_and_the_passes() -> None:
    """2 float32 values for each value of an image, and 2 passes per batch."""
    planned = plan(make_options({"dataset": "digits", "method": "fgsm-pgi", "arch": ARCH, "epochs": 3}))
    lines = dict(planned.lines())
    size, images = math.prod(planned.train.shape), len(planned.train)
    assert lines["state"].startswith(f"{images * size * 8 / 1e6:.1f} MB more on the device and in each checkpoint")
    assert f"{images:,} training images" in lines["state"]
    batches = math.ceil(images / 64)
    assert lines["cost"] == f"{6 * batches:,} backward passes, {6 * batches:,} forward passes, {3 * batches:,} updates"
    other = dict(plan(make_options({"dataset": "digits", "method": "liet", "arch": ARCH, "epochs": 3})).lines())
    assert "state" not in other
    assert batches == 19  # so LIET refreshes its perturbations once per epoch: 10/64 passes, which are rounded off
    assert other["cost"] == lines["cost"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fgsm-pgi", "extra_data": "extra.npz"}, "fgsm-pgi keeps .*: omit --extra-data"),
        ({"method": "fgsm-pgi", "augment": "cutmix"}, "but --augment cutmix mixes two images: use another --augment"),
        ({"method": "liet", "augment": "mixup"}, "the loss nls needs one class per image"),
        ({"method": "fgsm-pgi", "compile": True}, "omit --compile"),
        ({"method": "liet", "epochs": OPEN}, "liet raises the weight .*, so it cannot be open-ended"),
    ],
)
def test_options_are_refused_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        resolve(make_options({"dataset": "digits", "arch": ARCH, **options}))


def test_positions_are_those_of_the_images() -> None:
    data = ImageSet(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2).clone(), torch.arange(10))
    batches = Batches(data, 4, shuffle=True, seed=3)
    batches.set_epoch(2)
    found = [batches.positions(2, number).tolist() for number in range(3)]
    assert found == [labels.tolist() for _, labels in batches]
    assert sorted(position for batch in found for position in batch) == list(range(10))
    assert found != [batches.positions(3, number).tolist() for number in range(3)]
    assert batches.number_of_images == 10
    extended = Batches(data, 4, shuffle=True, extra=data, extra_fraction=0.5)
    with pytest.raises(DeatError, match="batches with extra images have no positions"):
        extended.positions(1, 0)


def test_only_the_perturbations_of_the_batch_move_and_stay_within_bounds() -> None:
    trainer = deat_rb.create("fgsm-pgi", made())
    images, labels = images_and_labels(8)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    rows = torch.tensor([6, 1, 3])
    trainer.begin_batch(images[rows], Place(1, 1, 0, 3, 4, rows, 8), Engine())
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    assert before["prior"].unique().tolist() == pytest.approx([-EPS, EPS])
    assert not before["momentum"].any()
    trainer.training_step(images[rows], labels[rows], optimizer)
    moved = [
        {row for row in range(8) if not torch.equal(tensor[row], before[name][row])}
        for name, tensor in trainer.tensors().items()
    ]
    assert moved == [{1, 3, 6}, {1, 3, 6}]
    prior = trainer.tensors()["prior"]
    assert float(prior.abs().max()) <= torch.tensor(EPS)
    adv = images + prior
    assert -1e-6 <= float(adv[rows].min()) <= float(adv[rows].max()) <= 1 + 1e-6
    # Of the batch's gradients, the momentum has those divided by their L1 norm.
    assert float(trainer.tensors()["momentum"].abs().sum()) == pytest.approx(1, rel=1e-5)


def test_perturbations_of_other_images_are_refused() -> None:
    trainer = deat_rb.create("fgsm-pgi", made())
    begin(trainer, images_and_labels()[0])
    with pytest.raises(DeatError, match=r"no perturbations for 8 images of shape \(3, 4, 4\) at batch 2 of epoch 1"):
        begin(trainer, torch.rand(6, 3, 4, 4), batch=1)


@pytest.mark.parametrize(("eps", "within", "shares"), [(EPS, 1.0, (0.1, 0.5)), (16 / 255, 2.0, (0.0, 1.0))])
def test_start_of_liet(eps: float, within: float, shares: tuple[float, float]) -> None:
    trainer: Any = deat_rb.create("liet", made(), eps=eps)
    assert trainer.noise_share == shares
    assert trainer.crafter.gradient_radius == pytest.approx(within * eps)
    images, labels = torch.full((6, 3, 8, 8), 0.5), torch.arange(6) % 4
    begin(trainer, images)
    signs = trainer.tensors()["signs"]
    assert signs.shape == (4, 3, 8, 8)
    torch.manual_seed(0)
    delta = trainer.start(images, labels, Engine()) - 0.5
    assert float(delta.abs().max()) <= within * eps + 1e-6
    kept = torch.isclose(delta.abs(), torch.tensor(eps), atol=1e-7)
    assert shares[0] - 0.05 < 1 - float(kept.float().mean()) < shares[1] + 0.05
    sides = (delta / (eps * signs[labels]))[kept]
    assert sides.std() < 1e-5  # all of the batch are added, or all are subtracted


def test_weight_of_liets_penalty_rises_to_the_last_epoch_also_of_an_extended_run() -> None:
    trainer: Any = deat_rb.create("liet", made())
    images = images_and_labels()[0]
    seen = []
    for epoch, epochs in ((1, 4), (2, 4), (4, 4), (5, 8)):
        trainer.begin_batch(images, Place(epoch, epochs, 0, 6, 4), Engine())
        seen.append(trainer._weight)
    assert seen == [25, 50, 100, 100]
    resumed: Any = deat_rb.create("liet", made())
    resumed.load_state_dict(trainer.state_dict(), trainer.tensors())
    resumed.begin_batch(images, Place(2, 8, 1, 6, 4), Engine())
    assert resumed._weight == 50


def test_liet_refuses_its_label_smoothing_on_two_classes_before_training() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    with pytest.raises(DeatError, match=r"--label-smoothing 0\.6 with 2 classes"):
        deat_rb.create("liet", model).check_attack(torch.rand(4, 3, 8, 8))
    deat_rb.create("liet", model, label_smoothing=0.3).check_attack(torch.rand(4, 3, 8, 8))


def test_nonuniform_label_smoothing_by_hand() -> None:
    """With equal logits every target has the loss log K; with one class of two, the other gets all of the rest."""
    loss, of_two = (surrogate("nls", label_smoothing=share).function for share in (0.6, 0.3))
    assert loss(torch.zeros(3, 5), torch.arange(3)).tolist() == pytest.approx([math.log(5)] * 3)
    logits = torch.tensor([[1.0, 3.0]])
    low, high = (-torch.log_softmax(logits, dim=1))[0].tolist()
    assert float(of_two(logits, torch.tensor([1]))) == pytest.approx(0.7 * high + 0.3 * low)
    with pytest.raises(DeatError, match=r"--label-smoothing 0\.6 with 2 classes .*: give less than 0\.5"):
        loss(logits, torch.tensor([1]))
    torch.manual_seed(0)
    many = loss(torch.tensor([[0.0, 1.0, 5.0]]).repeat(200, 1), torch.zeros(200, dtype=torch.long))
    first, second, third = (-torch.log_softmax(torch.tensor([0.0, 1.0, 5.0]), dim=0)).tolist()
    assert 0.4 * first + 0.6 * third < float(many.min()) < float(many.max()) < 0.4 * first + 0.6 * second
    assert float(many.std()) > 0.1
    plain = surrogate("nls").function
    assert float(plain(logits, torch.tensor([0]))) == pytest.approx(low)
