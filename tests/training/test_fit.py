"""`fit`: its options, its seed and repeated calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchattacks
from fits import EPS, equal, fitted, weights
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from training_problems import Batch, images_and_labels, loader, made, used

import deat_rb
import deat_rb.methods
from deat_rb.methods.stopping import RobustnessDrop
from deat_rb.training.schedule import Constant
from deat_rb.utils.errors import DeatError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "^epochs = 0 cannot be used: it should be greater than or equal to 1"),
        (
            {"epochs": "open"},
            "^epochs = open needs a learning-rate schedule without an end: give lr_schedule flat",
        ),
        ({"epochs": "closed"}, "^epochs = 'closed' cannot be used"),
        ({"patience": 2}, "patience = 2 needs validation images; give a val_loader, or omit it"),
        ({"patience": 0, "val_loader": []}, "patience = 0 cannot be used"),
        (
            {"lr_schedule": "cylic"},
            "lr_schedule = 'cylic' cannot be used: it should be 'cyclic', 'multistep', 'flat', 'cosine' or 'onecycle'",
        ),
        ({"lr_epochs": 1, "epochs": 3}, "lr_epochs = 1 applies only to the multistep schedule, not to cyclic"),
        (
            {"lr_schedule": "multistep", "lr_epochs": 0},
            "lr_epochs = 0 cannot be used: it should be greater than or equal to 1",
        ),
        ({"select": "first"}, "select = 'first' cannot be used: it should be 'best' or 'last'"),
        ({"select": "best"}, "needs validation images"),
        ({"device": "cuda:63"}, "no device 'cuda:63'"),
        ({"precision": "fp64"}, "precision = 'fp64' cannot be used"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 is not supported on a CPU"),
        ({"val_loader": []}, "the validation loader yields no batch"),
    ],
)
def test_fit_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        fitted(**options)


@pytest.mark.parametrize("name", ["free-2", "m-deat", "m+pgd", "trades", "fat-2", "standard"])
def test_fit_seed_fixes_everything(name: str) -> None:
    """Dropout, random starts and a shuffling DataLoader draw from torch's generators."""
    images, labels = images_and_labels(12)
    data = DataLoader(TensorDataset(images, labels), batch_size=6, shuffle=True)
    torch.manual_seed(1)
    first = fitted(name, data, seed=3)
    torch.manual_seed(2)
    assert equal(fitted(name, data, seed=3), first)
    assert not equal(fitted(name, data, seed=4), first)


def test_fit_seed_fixes_the_order_of_shuffled_validation_images() -> None:
    """Their random starts, and which of them a stopping rule attacks, depend on it."""
    shuffled, orders = (
        DataLoader(TensorDataset(*images_and_labels(24)), batch_size=6, shuffle=True),
        list[list[float]](),
    )

    def noted() -> Iterator[Batch]:
        orders.append([])
        for images, labels in shuffled:
            orders[-1] += images[:, 0, 0, 0].tolist()
            yield images, labels

    for state, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(state)
        fitted("pgd-1", val_loader=noted(), seed=seed)
    assert orders[0] == orders[1] != orders[2]


def test_fit_restores_global_generators() -> None:
    state = torch.get_rng_state()
    fitted("pgd-1", val_loader=[images_and_labels()])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DeatError):
        fitted(data=[(torch.full((6, 3, 8, 8), torch.nan), torch.zeros(6).long())])
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_leaves_frozen_batchnorm_frozen() -> None:
    model = used()
    before = weights(model)
    deat_rb.create("pgd-1", model).fit(loader(), [images_and_labels()], epochs=2, lr=0.05)
    after = weights(model)
    assert torch.equal(after["4.running_mean"], before["4.running_mean"])
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert [model.training, model[1].training, model[4].training, model[8].training] == [True, True, False, False]


def test_fit_again_resets_the_schedule_and_keeps_the_weights() -> None:
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


def test_fit_takes_a_schedule_and_a_stopping_rule_set_before_or_between_two_calls() -> None:
    """Two batches of PGD-3 take 2 * (3 + 1) backward passes."""
    trainer = deat_rb.create("pgd-2", made())
    trainer.schedule = Constant(3)
    assert trainer.fit(loader(), epochs=1).rows[0].backwards == 8
    trainer.schedule, trainer.stopping = deat_rb.GradientMagnitude(max_steps=4), RobustnessDrop(drop=0.5)
    for _ in range(2):
        assert trainer.fit(loader(), [images_and_labels()], epochs=2).steps == [1, 2]
    trainer.steps = 2
    assert trainer.fit(loader(), [images_and_labels()], epochs=2).steps == [2, 3]


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        ("pgd-2", -1, "steps = -1 is not a non-negative whole number"),
        ("m-deat", 2.5, "steps = 2.5 is not a non-negative whole number"),
        ("m-deat", 0, "steps = 0 is below 1; m-deat needs at least 1 step"),
        ("yopo-2-1", 0, "steps = 0 is below 1; yopo-2-1 needs at least 1 step"),
        ("amata-2-10", 0, "steps = 0 is below 1; the method's schedule needs at least 1 step"),
        ("fgsm-pgi", 3, "steps = 3 is above 1; fgsm-pgi takes at most 1 step"),
        ("liet", 0, "steps = 0 is below 1; liet needs at least 1 step"),
    ],
)
def test_steps_set_by_hand_are_checked(method: str, steps: Any, message: str) -> None:
    trainer = deat_rb.create(method, made())
    before = trainer.steps
    with pytest.raises(DeatError, match=message):
        trainer.steps = steps
    assert trainer.steps == before


@pytest.mark.parametrize("fitted", [False, True])
def test_steps_of_a_schedule_set_by_hand_are_checked(fitted: bool) -> None:
    trainer = deat_rb.create("m-deat", made())
    if fitted:
        trainer.fit(loader(), epochs=1)
    trainer.schedule = Constant(0)
    with pytest.raises(DeatError, match="steps = 0 is below 1; m-deat needs at least 1 step"):
        trainer.fit(loader(), epochs=1)
    trainer.schedule = Constant(2)
    assert trainer.fit(loader(), epochs=1).steps == [2]


def test_fit_again_measures_l_x_of_a_foreign_attack_in_the_same_unit() -> None:
    model = made()
    trainer = deat_rb.AttackTrainer(torchattacks.PGD(model, steps=1, random_start=False))
    first, second = (trainer.fit(loader(), epochs=1, lr=1e-9).rows[0].l_x for _ in range(2))
    assert 0.5 < second / first < 2  # not a batch size apart


def test_fit_after_a_resumed_fit_starts_a_fresh_schedule() -> None:
    trainer = deat_rb.create("deat-1", made())
    expected = trainer.fit(loader(), epochs=3).steps
    resumed = deat_rb.create("deat-1", made())
    resumed.keep_first_schedule()  # as `fit` does before it restores a checkpoint
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.fit(loader(), epochs=3).steps == expected == [1, 2, 3]


def test_training_step_drops_the_carried_perturbation_at_another_image_size() -> None:
    carried = deat_rb.create("free-2", made())
    images, labels = images_and_labels(8)
    optimizer = SGD(carried.model.parameters(), lr=0.01)
    carried.training_step(images, labels, optimizer)
    smaller = images[..., :4, :4]
    assert carried(smaller, labels).shape == smaller.shape
    carried.training_step(smaller, labels, optimizer)
    assert carried.tensors()["carried"].shape == smaller.shape


def test_fit_leaves_the_memory_format_of_the_weights_as_it_was() -> None:
    """In channels_last, torchattacks' L2 attack cannot flatten the images' gradient."""
    images, labels = images_and_labels(4, size=32)
    for layout in (torch.channels_last, torch.contiguous_format):
        model = deat_rb.build_model("wrn-10-1", dataset="digits")
        model.to(memory_format=layout)
        strides = [parameter.stride() for parameter in model.parameters()]
        deat_rb.create("pgd-1", model, eps=EPS).fit([(images, labels)], epochs=1)
        assert [parameter.stride() for parameter in model.parameters()] == strides
    assert torchattacks.PGDL2(model.eval(), eps=0.5, alpha=0.1, steps=2)(images, labels).shape == images.shape
