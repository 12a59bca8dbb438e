"""YOPO's trainer: what is not in the comparisons with the reference loop and the public code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.optim import SGD
from training_problems import images_and_labels, made, normalized

import deat_rb
from deat_rb.cli import main
from deat_rb.methods.losses import weighted
from deat_rb.methods.registry import family, known_methods, recipe
from deat_rb.methods.yopo import YopoTrainer
from deat_rb.runs.defaults import setting_defaults
from deat_rb.training.engine import Engine
from deat_rb.utils.devices import Precision
from deat_rb.utils.errors import DeatError


def yopo(model: nn.Module, **options: Any) -> YopoTrainer:
    trainer = deat_rb.create("yopo-2-2", model, **options)
    assert isinstance(trainer, YopoTrainer)
    return trainer


def test_l_x_is_the_gradient_of_the_images_of_the_last_full_pass() -> None:
    """Through the normalization inside the model; the class weights do not count."""
    images, labels = images_and_labels()
    model, same = normalized().train(), normalized().train()
    trainer = yopo(model, steps=1)
    trainer.crafter.start = "none"
    trainer.loss = weighted(trainer.loss, torch.tensor([0.5, 3.0, 1.0, 2.0]))
    torch.manual_seed(3)  # for the dropout
    stats = trainer.training_step(images, labels, SGD(model.parameters(), lr=0.1))
    torch.manual_seed(3)
    inputs = images.clone().requires_grad_()
    weights = torch.tensor([0.5, 3.0, 1.0, 2.0])[labels]
    losses = nn.functional.cross_entropy(same(inputs), labels, reduction="none")
    (gradient,) = torch.autograd.grad((weights * losses).sum(), inputs)
    expected = (gradient / weights.view(-1, 1, 1, 1)).abs().sum()
    assert float(stats.l_x) == pytest.approx(float(expected), rel=1e-4)
    assert (stats.forwards, stats.backwards, stats.updates) == (1, 1, 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_call_attacks_more_strongly_than_noise_within_the_ball(norm: str) -> None:
    images, labels = images_and_labels(12)
    model = normalized().eval()
    trainer = yopo(model, norm=norm, eps=0.05 if norm == "Linf" else 0.5)
    adv = trainer(images, labels)
    assert bool(trainer.crafter.threat.contains(adv, images).all())

    @torch.no_grad()
    def loss(inputs: torch.Tensor) -> float:
        return float(nn.functional.cross_entropy(model(inputs), labels))

    noise = trainer.crafter.threat.training_noise(images, trainer.eps)
    assert loss(adv) > loss((images + noise).clamp(0, 1)) + 1e-3
    assert loss(adv) > loss(images) + 1e-3
    with pytest.raises(DeatError, match="this attack needs labels"):
        trainer(images)


def test_a_frozen_first_layer_stays_as_it_is() -> None:
    model = made()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yopo(model).fit([images_and_labels()], epochs=1, lr=0.1, lr_schedule="flat")
    after = model.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])


def test_an_overflow_in_fp16_skips_the_update_and_spoils_nothing() -> None:
    model: nn.Module = made()
    engine = Engine("cpu", "fp16")
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer, before = yopo(model), {name: tensor.clone() for name, tensor in model.named_parameters()}
    stats = trainer.training_step(*images_and_labels(), SGD(model.parameters(), lr=0.1), engine)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert all(bool(tensor.isfinite().all()) for tensor in model.buffers())
    assert float(stats.l_x) == 0.0
    assert engine.scaler.get_scale() == 2.0**39


def test_fp16_trains_as_fp32_does() -> None:
    found = {}
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    for precision in precisions:
        model: nn.Module = made()
        engine, before = Engine("cpu", precision), model.get_parameter("0.weight").detach().clone()
        torch.manual_seed(3)
        stats = yopo(model).training_step(*images_and_labels(), SGD(model.parameters(), lr=0.1), engine)
        found[precision] = float(stats.l_x), model.get_parameter("0.weight").detach() - before
    assert found["fp16"][0] == pytest.approx(found["fp32"][0], rel=0.1)
    moved = found["fp32"][1]
    assert float((found["fp16"][1] - moved).norm() / moved.norm()) < 0.1


def test_the_learning_rate_counts_the_sum_of_the_full_passes() -> None:
    """YOPO's config.py has 0.1 * 2 / K, DEAT's 0.05."""
    row = recipe("yopo-5-3")[1]
    rates = {setting: setting_defaults(setting, row, "preactresnet18")["lr"] for setting in ("fast", "standard")}
    assert rates == pytest.approx({"fast": 0.1 * 2 / 5, "standard": 0.05})
    assert setting_defaults("fastat", recipe("pgd-7")[1], "resnet18")["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": 0}, "inner = 0 is not a positive whole number of steps; YOPO-5-3 has 3"),
        ({"loss": "trades"}, "cannot use the loss trades, which needs the clean images' logits"),
        ({"attack": {"loss": "kl"}}, "YopoTrainer needs a deat_rb.PGD on cross-entropy without tau and omega"),
        ({"attack": {"tau": 3}}, "YopoTrainer needs a deat_rb.PGD on cross-entropy without tau and omega"),
        ({"attack": {"steps": 0}}, "steps = 0 is below 1; YopoTrainer needs at least 1 step"),
    ],
)
def test_unusable_parts_are_refused(options: dict[str, Any], message: str) -> None:
    attack = deat_rb.PGD(made(), **options.pop("attack", {}))
    with pytest.raises(DeatError, match=message):
        YopoTrainer(attack, **options)


def test_the_mode_of_the_attack_is_refused_with_the_reason() -> None:
    with pytest.raises(DeatError, match="yopo-5-3 cannot use attack_mode: each of its passes serves both attack and"):
        deat_rb.create("yopo-5-3", made(), attack_mode="eval")


@pytest.mark.parametrize("option", [{"lr_per_replay": True}, {"carry": True}, {"tau": 3}])
def test_options_of_other_methods_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(DeatError, match=f"the method yopo-5-3 has no parameter {next(iter(option))}"):
        deat_rb.create("yopo-5-3", made(), **option)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("yopo-5-3", "needs the gradient of the first layer's output, which torch.compile hides"),
        ("gradalign", "needs second derivatives, which torch.compile lacks"),
    ],
)
def test_torch_compile_is_refused_before_training(method: str, reason: str) -> None:
    message = f"{method} {reason}: omit --compile"
    with pytest.raises(DeatError, match=message):
        deat_rb.create(method, made()).fit([images_and_labels()], epochs=1, compile=True)
    result = CliRunner().invoke(main, ["train", "--method", method, "--compile", "--dry-run"])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_network_without_a_first_layer_is_refused_before_training() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(DeatError, match="it begins with the BatchNorm2d '0'; use another network or method"):
        yopo(model).fit([images_and_labels()], epochs=1)


def test_shares_passes_of_replays_and_yopo_only() -> None:
    shared = [name for name in known_methods() if deat_rb.create(name, made()).shares_passes]
    assert {family(name) for name in shared} == {"free-R", "deat-D", "deat-P%", "m-deat", "yopo-m-n"}
