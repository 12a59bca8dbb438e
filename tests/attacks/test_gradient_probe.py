"""Input-gradient probe: l_X in pixel space, for any attack, without an extra pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchattacks
from small_problems import Plane, plane_images
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torchattacks.attack import Attack
from training_problems import Passes, Snapshot, images_and_labels, made, sigmoid, used

import deat_rb
from deat_rb.attacks.gradient_probe import GradientProbe, lipschitz_lower_bound, uses_mean_reduction
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError

AVERAGED: dict[str, Callable[[nn.Module], Any]] = {
    "PGD": lambda model: torchattacks.PGD(model, steps=3),
    "MIFGSM": lambda model: torchattacks.MIFGSM(model, steps=3),
    "DIFGSM": lambda model: torchattacks.DIFGSM(model, steps=3),
    "FFGSM": lambda model: torchattacks.FFGSM(model),
}
SUMMED: dict[str, Callable[[nn.Module], Any]] = {
    "TPGD": lambda model: torchattacks.TPGD(model, steps=3),
    "APGD": lambda model: torchattacks.APGD(model, steps=3),
}
FORWARDS = {"PGD": 3, "MIFGSM": 3, "DIFGSM": 3, "FFGSM": 1, "TPGD": 4}


def still(model: nn.Module) -> SGD:
    """An optimizer that changes nothing."""
    return SGD(model.parameters(), lr=0.0)


def craft(trainer: Trainer, images: Tensor, labels: Tensor) -> float:
    torch.manual_seed(3)
    return float(trainer.training_step(images, labels, still(trainer.model)).l_x)


@pytest.mark.parametrize("ours", [True, False])
def test_l_x_of_a_linear_model_by_hand(ours: bool) -> None:
    """The margin's weights have the L1 norm 10; an example's gradient is that times the other class's probability."""
    images, labels, _ = plane_images()
    margins = (0.9, 1.2, 0.8, -1.2, -0.9, 1.2, -0.4, 0.8)
    expected = sum(10 * sigmoid(m if y else -m) for m, y in zip(margins, labels.tolist(), strict=True))
    model = Plane()
    if ours:
        attack: Any = deat_rb.PGD(model, eps=0.1, alpha=0.1, steps=1, start="none")
    else:
        attack = torchattacks.PGD(model, eps=0.1, alpha=0.1, steps=1, random_start=False)
    trainer = deat_rb.AttackTrainer(attack)
    assert craft(trainer, images, labels) == pytest.approx(expected, rel=1e-5)
    parts = craft(trainer, images[:3], labels[:3]) + craft(trainer, images[3:], labels[3:])
    assert parts == pytest.approx(expected, rel=1e-5), "whatever the size of the batch"


@pytest.mark.parametrize("name", [*AVERAGED, "TPGD"])
def test_l_x_equals_that_of_single_examples_at_the_last_step(name: str) -> None:
    """Each example's own loss, differentiated alone, at the iterate of the last gradient."""
    model = made().eval()
    images, labels = images_and_labels()
    trainer = deat_rb.AttackTrainer((AVERAGED | SUMMED)[name](model))
    craft(trainer, images, labels)

    asked: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].requires_grad:
            asked.append(inputs[0].detach().clone())

    handle = model.register_forward_pre_hook(keep)
    l_x = craft(trainer, images, labels)
    handle.remove()
    expected = 0.0
    for i, adv in enumerate(asked[-1]):
        adv = adv[None].requires_grad_()
        if name == "TPGD":
            clean = functional.softmax(model(images[i : i + 1]).detach(), dim=1)
            loss = (clean * (clean.log() - functional.log_softmax(model(adv), dim=1))).sum()
        else:
            loss = -functional.log_softmax(model(adv), dim=1)[0, labels[i]]
        expected += float(torch.autograd.grad(loss, adv)[0].abs().sum())
    assert l_x == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"start": "uniform"}, lambda model: torchattacks.PGD(model, steps=3)),
        ({"loss": "kl", "start": "normal"}, lambda model: torchattacks.TPGD(model, steps=3)),
    ],
)
def test_l_x_of_torchattacks_pgd_equals_ours(ours: dict[str, Any], theirs: Callable[[nn.Module], Any]) -> None:
    images, labels = images_and_labels()
    seen = []
    for attack in (theirs(made().double()), deat_rb.PGD(made().double(), steps=3, attack_mode="eval", **ours)):
        seen.append(craft(deat_rb.AttackTrainer(attack), images.double(), labels))
    assert seen[0] == pytest.approx(seen[1], rel=1e-9)
    assert seen[0] > 0


RANDOM: dict[str, Callable[[nn.Module], Any]] = {
    "PGDRS": lambda model: torchattacks.PGDRS(model, steps=2),
    "PGDRSL2": lambda model: torchattacks.PGDRSL2(model, steps=2),
    "Jitter": lambda model: torchattacks.Jitter(model, steps=2),
}


@pytest.mark.parametrize("name", RANDOM)
def test_uses_mean_reduction_despite_noise(name: str) -> None:
    """Confident networks, whose gradients differ by orders of magnitude between two draws of noise."""
    wrong = []
    for seed in range(25):
        model = made(seed)
        with torch.no_grad():
            next(model[9].parameters()).mul_(50)
        images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        if not uses_mean_reduction(RANDOM[name](model), images):
            wrong.append(seed)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [*((name, 1) for name in (*AVERAGED, *SUMMED)), ("PGD", 3), ("TPGD", 3)])
def test_uses_mean_reduction_tells_mean_from_sum(name: str, steps: int) -> None:
    """TPGD's first gradient is that of its random start: 0.001 N(0,1) decides whether it is large or small."""
    wrong = []
    for seed in range(25):
        attack = (AVERAGED | SUMMED)[name](made(seed))
        attack.steps = steps
        if uses_mean_reduction(attack, torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))) != (
            name in AVERAGED
        ):
            wrong.append(seed)
    assert wrong == []


def test_uses_mean_reduction_preserves_model_and_generators() -> None:
    model = used()
    before, state = Snapshot(model), torch.get_rng_state()
    assert uses_mean_reduction(torchattacks.PGD(model, steps=2), images_and_labels()[0])
    assert before.differences() == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FORWARDS)
def test_gradient_probe_adds_no_pass(name: str) -> None:
    model = made()
    trainer = deat_rb.AttackTrainer((AVERAGED | SUMMED)[name](model))
    images, labels = images_and_labels()
    craft(trainer, images, labels)  # determines once whether the loss is averaged
    with Passes().of(model) as passes:
        stats = trainer.training_step(images, labels, still(model))
    backwards = min(3, FORWARDS[name])
    assert (passes.forwards, passes.backwards) == (FORWARDS[name] + 1, backwards + 1)
    assert (stats.forwards, stats.backwards) == (FORWARDS[name] + 1, backwards + 1)


@pytest.mark.parametrize("samples", [2, 4])
def test_gradient_probe_counts_a_backward_per_gradient(samples: int) -> None:
    model = made()
    trainer = deat_rb.AttackTrainer(torchattacks.EOTPGD(model, steps=2, eot_iter=samples))
    images, labels = images_and_labels()
    craft(trainer, images, labels)
    with Passes().of(model) as passes:
        stats = trainer.training_step(images, labels, still(model))
    assert (
        (stats.forwards, stats.backwards) == (passes.forwards, passes.backwards) == (2 * samples + 1, 2 * samples + 1)
    )


@pytest.mark.parametrize("name", ["PGD", "TPGD", "MIFGSM", "DIFGSM", "UPGD", "PGDL2"])
def test_attack_trainer_guides_attacks_of_torchattacks(name: str) -> None:
    """Also those that flatten gradients by `view`, with a network in channels_last."""
    model = made()
    attack = getattr(torchattacks, name)(model, steps=1)
    trainer = deat_rb.AttackTrainer(attack, schedule=deat_rb.GradientMagnitude(max_steps=3))
    history = trainer.fit([images_and_labels()], epochs=3)
    assert history.steps[:2] == [1, 2]
    assert attack.steps == trainer.steps >= 2
    assert all(row.l_x > 0 for row in history.rows)


@pytest.mark.parametrize(
    "attack",
    [
        lambda model: torchattacks.PGD(model, steps=1, random_start=False),
        lambda model: deat_rb.PGD(model, steps=1, start="none", attack_mode="eval"),
    ],
    ids=["torchattacks", "ours"],
)
def test_l_x_is_in_pixel_space_for_normalized_inputs(attack: Callable[[nn.Module], Any]) -> None:
    model = made().eval()
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.25, 0.5]
    offset, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    images, labels = images_and_labels()
    expected = 0.0
    for i in range(len(images)):
        clean = images[i : i + 1].clone().requires_grad_()
        loss = functional.cross_entropy(model((clean - offset) / scale), labels[i : i + 1])
        expected += float(torch.autograd.grad(loss, clean)[0].abs().sum())

    made_attack = attack(model)
    made_attack.set_normalization_used(mean, std)
    with GradientProbe(model, pixel_scale=1 / scale) as probe:
        made_attack((images - offset) / scale, labels)
    # Both attacks average their cross-entropy.
    l_x = probe.stats(len(images), unit=len(images)).l_x
    assert float(l_x) == pytest.approx(expected, rel=1e-4)

    trainer = deat_rb.AttackTrainer(made_attack)
    with pytest.raises(DeatError, match=r"training needs images in \[0, 1\]"):
        trainer.training_step(images, labels, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("name", ["GN", "Square"])
def test_attack_trainer_refuses_an_attack_without_gradients(name: str) -> None:
    attack = torchattacks.GN(made()) if name == "GN" else torchattacks.Square(made(), n_queries=2)
    attack.steps, attack.eps = 2, 8 / 255
    trainer = deat_rb.AttackTrainer(attack, schedule=deat_rb.GradientMagnitude(max_steps=3))
    with pytest.raises(DeatError, match=f"{name} computes no gradient at its inputs, so l_X is undefined"):
        trainer.fit([images_and_labels()], epochs=1)


def test_attack_trainer_refuses_a_schedule_for_an_attack_without_steps() -> None:
    with pytest.raises(DeatError, match="FFGSM has no steps that a schedule could set"):
        deat_rb.AttackTrainer(torchattacks.FFGSM(made()), schedule=deat_rb.GradientMagnitude())


class Signed(Attack):
    """Signed steps of 0.01 with the model's gradients; ``keep`` decides which images stay clean."""

    def __init__(self, model: nn.Module, keep: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__("Signed", model)
        self.eps, self.steps, self.keep = 0.02, 2, keep

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        adv = images.clone()
        for _ in range(self.steps):
            adv = adv.detach().requires_grad_()
            loss = functional.cross_entropy(self.get_logits(adv), labels)
            adv = (adv + 0.01 * torch.autograd.grad(loss, adv)[0].sign()).clamp(0, 1)
        if self.keep is None:
            return adv
        return torch.where(self.keep(self.get_logits(adv).argmax(1), labels)[:, None, None, None], images, adv)


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "APGD": lambda model: torchattacks.APGD(model, steps=2),
    "APGDT": lambda model: torchattacks.APGDT(model, steps=2, n_classes=4),
    "FAB": lambda model: torchattacks.FAB(model, steps=2),
    "AutoAttack": lambda model: torchattacks.AutoAttack(model, n_classes=4),
    "of one's own": lambda model: Signed(model, lambda predicted, labels: predicted == labels),
    "MultiAttack": lambda model: torchattacks.MultiAttack([torchattacks.PGD(model), torchattacks.FGSM(model)]),
    "derived": lambda model: type("Mine", (torchattacks.APGD,), {})(model, steps=2),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("fitted", [True, False])
def test_training_refuses_attacks_that_return_clean_images(name: str, fitted: bool) -> None:
    model = made()
    attack = REFUSED[name](model)
    attack.eps = 8 / 255
    trainer = deat_rb.AttackTrainer(attack)
    before = Snapshot(model)
    train = trainer.fit if fitted else lambda batches, epochs: craft(trainer, *batches[0])
    with pytest.raises(DeatError, match="returns the clean image when it fails to change the prediction"):
        train([images_and_labels()], epochs=1)
    assert before.differences() == []


@pytest.mark.parametrize(
    "attack",
    [
        Signed,
        lambda model: Signed(model, lambda predicted, labels: predicted != labels),
        *(
            partial(kind, steps=2)
            for kind in (torchattacks.BIM, torchattacks.PGD, torchattacks.TPGD, torchattacks.UPGD)
        ),
        torchattacks.FGSM,
        lambda model: torchattacks.FGSM(model, eps=0),
    ],
)
def test_training_accepts_attacks_that_perturb_every_image(attack: Callable[[nn.Module], Any]) -> None:
    """Those too that stop early, as FAT does, or that a dead network gives no gradient."""
    images = images_and_labels()[0]
    for model in (made(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Hardtanh(-1e-3, 1e-3))):
        deat_rb.AttackTrainer(attack(model)).check_attack(images * torch.tensor([0.0, 1.0, 1.0])[:, None, None])


def test_training_refuses_minimal_norm_attacks() -> None:
    """Known by name, since DeepFool moves every image, though not to the boundary of the eps-ball."""
    attack = torchattacks.DeepFool(made(), steps=2)
    attack.eps = 8 / 255
    with pytest.raises(DeatError, match="DeepFool returns the clean image"):
        deat_rb.AttackTrainer(attack).fit([images_and_labels()], epochs=1)


def test_attack_trainer_schedules_an_attack_without_a_step_size() -> None:
    trainer = deat_rb.AttackTrainer(Signed(made()), schedule=deat_rb.GradientMagnitude(start=2))
    assert trainer.alpha is None
    assert trainer.crafter.steps == 2
    images, labels = images_and_labels()
    history = trainer.fit([(images, labels)], epochs=2, lr=0.01)
    assert [row.alpha for row in history.rows] == [None, None]
    assert history.steps == [2, 3]


def test_gradient_probe_records_gradient_and_passes() -> None:
    images = plane_images()[0]
    model = Plane()
    with GradientProbe(model) as probe:
        adv = images[:1].clone().requires_grad_()
        torch.autograd.grad(model(adv)[0, 0], adv)
        model(images[1:4])
    assert probe.gradient is not None
    assert probe.gradient.flatten().tolist() == [1, -2, 3, -4]
    assert (probe.forwards, probe.backwards) == (4, 1)
    assert not model._forward_pre_hooks
    stats = probe.stats(examples=2, unit=3.0)
    assert (float(stats.l_x), stats.forwards, stats.backwards) == (30.0, 2.0, 0.5)


def test_lipschitz_lower_bound_by_hand() -> None:
    """Equation 5: 48 / (4 examples * 2 * 0.1 * 3072 values)."""
    assert lipschitz_lower_bound(48.0, examples=4, eps=0.1, size=3072) == pytest.approx(12 / 614.4)
    # Gradients at images that are up to 0.2 away: 48 / (4 * (0.2 + 0.1) * 3072).
    assert lipschitz_lower_bound(48.0, examples=4, eps=0.1, size=3072, radius=0.2) == pytest.approx(12 / 921.6)
