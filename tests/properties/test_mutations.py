"""The reference loops detect mutations: another step size, start, projection or order of operations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_cases import CASES, assert_trains_as_the_reference_loop, network
from torch import Tensor
from torch.optim import Optimizer

import deat_rb
from deat_rb.attacks import losses, threat_models
from deat_rb.attacks.base import CraftStats
from deat_rb.attacks.pgd import PGD
from deat_rb.methods import trainers
from deat_rb.methods.registry import family, known_methods
from deat_rb.methods.shared_forward import SharedForwardTrainer
from deat_rb.methods.trainers import AttackTrainer, ReplayTrainer
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats
from deat_rb.training.trainer import Trainer
from deat_rb.utils.module_state import preserve_state

METHODS = list(dict.fromkeys(name for name, _ in CASES if name != "standard"))
FREED = [("n-fgsm", "ball"), ("m+n-fgsm", "ball"), ("gradalign", "ball")]
"""Methods without the projection onto the eps-ball, or whose one step never leaves it."""

SHARED = ("fgsm-pgi", "liet")
"""Methods whose trainer chooses the start, and whose attack shares a forward pass with the loss, in train mode."""

OTHER_START = {"uniform": "normal", "normal": "uniform", "none": "uniform"}


def noticed(name: str) -> bool:
    """Whether a case of the method ends with other weights or statistics than its reference loop."""
    for case in CASES:
        if case[0] == name:
            try:
                assert_trains_as_the_reference_loop(*case)
            except AssertionError:
                return True
    return False


def change_trainers(monkeypatch: pytest.MonkeyPatch, change: Callable[[Trainer], None]) -> None:
    create = deat_rb.create

    def changed(*args: Any, **options: Any) -> Trainer:
        trainer = create(*args, **options)
        change(trainer)
        return trainer

    monkeypatch.setattr(deat_rb, "create", changed)


@pytest.mark.slow
def test_mutations_cover_all_methods() -> None:
    families = {family(name) for name in METHODS}
    assert families == {family(name) for name in known_methods() if name != "standard"}
    assert not any(noticed(name) for name in METHODS), "unchanged, all are as their reference loops"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_mutation_of_the_step_size_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(trainer: Trainer) -> None:
        assert trainer.base_alpha is not None
        trainer.base_alpha *= 0.95 if name == "gradalign" else 1.05  # a longer first step is clipped to the ball
        trainer.apply_schedule()

    change_trainers(monkeypatch, larger)
    assert noticed(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in SHARED])
def test_mutation_of_the_start_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(trainer: Trainer) -> None:
        if isinstance(trainer, ReplayTrainer) and trainer.carry:
            trainer.carry = False  # from zero in each batch, where FREE carries it on
        else:
            trainer.crafter.start = OTHER_START[trainer.crafter.start]

    change_trainers(monkeypatch, elsewhere)
    assert noticed(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bound"), [(name, bound) for name in METHODS for bound in ("ball", "image") if (name, bound) not in FREED]
)
def test_mutation_without_projection_is_noticed(name: str, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ascend(
        self: threat_models.Linf,
        adv: Tensor,
        images: Tensor,
        gradient: Tensor,
        alpha: float,
        noise: Tensor | None = None,
    ) -> Tensor:
        moved = adv + alpha * gradient.sign() + (0 if noise is None else noise)
        if bound == "ball":
            return moved.clamp(0, 1)
        return images + (moved - images).clamp(-self.eps, self.eps)

    monkeypatch.setattr(threat_models.Linf, "ascend", ascend)
    assert noticed(name)


@pytest.mark.parametrize("change", [{"project": True}, {"start_scale": 1.9}])
@pytest.mark.parametrize("name", ["n-fgsm", "m+n-fgsm"])
def test_mutation_of_n_fgsm_is_noticed(name: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    change_trainers(monkeypatch, lambda trainer: vars(trainer.crafter).update(change))
    assert noticed(name)


@pytest.mark.parametrize("name", [name for name in METHODS if "deat" in name or "free" in name])
def test_mutation_of_the_replay_gradient_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1, lines 5-10: both gradients are from the same pass, before the update."""
    step, backward_and_step = ReplayTrainer.training_step, Engine.backward_and_step
    under_way: dict[str, Any] = {}

    def remembered(
        self: ReplayTrainer, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        under_way.update(model=self.model, labels=labels)
        return step(self, images, labels, optimizer, engine)

    def late(self: Engine, examples: Tensor, optimizer: Optimizer, images: Tensor) -> tuple[Tensor, float | Tensor]:
        _, overflows = backward_and_step(self, examples, optimizer, images)
        again = images.detach().requires_grad_()
        with preserve_state(under_way["model"]):
            loss = losses.cross_entropy(under_way["model"](again), under_way["labels"]).mean()
            (gradient,) = torch.autograd.grad(loss, again)
        return gradient, overflows

    monkeypatch.setattr(ReplayTrainer, "training_step", remembered)
    monkeypatch.setattr(Engine, "backward_and_step", late)
    assert noticed(name)


@pytest.mark.parametrize("change", [1, -1])
def test_mutation_of_yopos_inner_steps_is_noticed(change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    change_trainers(monkeypatch, lambda trainer: setattr(trainer, "inner", trainer.inner + change))
    assert noticed("yopo-5-3")


def test_mutation_of_the_weight_of_gradient_alignment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    change_trainers(monkeypatch, lambda trainer: setattr(trainer, "align", 0.19))
    assert noticed("gradalign")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fgsm-pgi", {"consistency": 9.9}),
        ("liet", {"consistency": 99.0}),
        ("liet", {"noise_share": (0.1, 0.4)}),
        ("liet", {"refresh": 2}),
    ],
)
def test_mutation_of_fgsm_pgi_and_liet_is_noticed(
    name: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(trainer: Trainer) -> None:
        for key, value in change.items():
            setattr(trainer, key, value)

    change_trainers(monkeypatch, changed)
    assert noticed(name)


@pytest.mark.parametrize("name", SHARED)
def test_mutation_of_the_starts_of_fgsm_pgi_and_liet_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = type(deat_rb.create(name, network()))
    assert issubclass(trainer, SharedForwardTrainer)
    start = trainer.start

    def mirrored(self: SharedForwardTrainer, images: Tensor, labels: Tensor, engine: Engine) -> Tensor:
        return 2 * images - start(self, images, labels, engine)

    monkeypatch.setattr(trainer, "start", mirrored)
    assert noticed(name)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if not re.search("deat|free|gradalign|yopo", name) and name not in SHARED]
)
def test_mutation_with_an_early_update_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 4, lines 6-13: all r steps come before the update."""
    craft = AttackTrainer.craft

    def early(self: AttackTrainer, *args: Any, **options: Any) -> tuple[Tensor, CraftStats]:
        self.crafter.steps -= 1
        try:
            return craft(self, *args, **options)
        finally:
            self.crafter.steps += 1

    monkeypatch.setattr(AttackTrainer, "craft", early)
    assert noticed(name)


@pytest.mark.parametrize("name", [name for name in METHODS if "trades" in name or "mart" in name])
def test_mutation_of_the_order_of_forwards_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their order decides what BatchNorm's running statistics are."""

    def swapped(
        self: AttackTrainer, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        engine = engine or Engine(images.device)
        adv, crafting = self.craft(images, labels)
        adv_logits = self.model(adv)
        loss = self.loss.function(adv_logits, labels, self.model(images))
        engine.backward_and_step(loss, optimizer, images)
        correct = (adv_logits.argmax(dim=1) == labels).sum()
        return BatchStats(
            len(images), loss.detach().sum(), correct, crafting.l_x, crafting.forwards + 2, crafting.backwards + 1, 1,
            images[0].numel(),
        )  # fmt: skip

    monkeypatch.setattr(trainers.AttackTrainer, "training_step", swapped)
    assert noticed(name)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if not re.search("deat|free|yopo", name) and name not in SHARED]
)
def test_mutation_of_the_attack_mode_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(trainer: Trainer) -> None:
        assert isinstance(trainer.crafter, PGD)
        training = trainer.crafter.tau is not None  # friendly methods attack in eval mode, the others in train mode
        trainer.crafter.set_model_training_mode(training, training, training)

    change_trainers(monkeypatch, other)
    assert noticed(name)


@pytest.mark.parametrize("name", [name for name in METHODS if "fat" in name or name.startswith("f+")])
def test_mutation_of_tau_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def less(trainer: Trainer) -> None:
        trainer.crafter.tau = 2

    change_trainers(monkeypatch, less)
    assert noticed(name)


@pytest.mark.parametrize("name", [name for name in METHODS if "fat" in name])
def test_mutation_without_the_noise_after_each_step_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(trainer: Trainer) -> None:
        trainer.crafter.omega = 0.0

    change_trainers(monkeypatch, silent)
    assert noticed(name)


@pytest.mark.parametrize("name", ["trades", "mart", "m+trades", "m+mart", "yopo-5-3"])
def test_mutation_with_a_clamped_start_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def clamped(trainer: Trainer) -> None:
        trainer.crafter.clamp_start = True

    change_trainers(monkeypatch, clamped)
    assert noticed(name)
