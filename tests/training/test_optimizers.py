"""Optimizers, weight decay by kind of parameter, and gradient clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import equal, fitted, weights
from resumed_runs import Stops, outcome, train
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from training_problems import images_and_labels, loader, made, run_config

import deat_rb
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.averaging import WeightAverage
from deat_rb.training.callbacks import Callback
from deat_rb.training.engine import Engine
from deat_rb.training.optimizers import build_optimizer, optimizer_tensors
from deat_rb.training.options import OptimConfig
from deat_rb.training.state import TrainingState
from deat_rb.utils.errors import Interrupted

CPU = torch.device("cpu")


def descend(model: nn.Module, optimizer: Optimizer, clip: float | None = None) -> dict[str, torch.Tensor]:
    for _ in range(3):
        optimizer.zero_grad()
        torch.manual_seed(0)  # of the dropout
        model(images_and_labels()[0]).square().sum().backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"lr": 0.1}, lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4)),
        ({"lr": 0.1, "momentum": 0.0}, lambda p: SGD(p, lr=0.1, weight_decay=5e-4)),
        ({"lr": 0.1, "nesterov": True}, lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)),
        ({"lr": 0.1, "optimizer": "adamw"}, lambda p: AdamW(p, lr=0.1, weight_decay=5e-4)),
    ],
)
def test_optimizer_is_torchs_with_its_state_from_the_start(options: Any, theirs: Any) -> None:
    model, other = made(), made()
    optimizer = build_optimizer(model, OptimConfig(**options), CPU)
    before = {name: tensor.shape for name, tensor in optimizer_tensors(optimizer).items()}
    assert equal(descend(model, optimizer), descend(other, theirs(other.parameters())))
    assert {name: tensor.shape for name, tensor in optimizer_tensors(optimizer).items()} == before
    assert bool(before) is (options.get("momentum") != 0.0)


def test_grad_clip_is_torchs_clip_grad_norm() -> None:
    model, other = made(), made()
    ours = descend(model, build_optimizer(model, OptimConfig(lr=0.1, grad_clip=0.5), CPU))
    assert equal(ours, descend(other, SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4), clip=0.5))
    free = made()
    assert not equal(ours, descend(free, build_optimizer(free, OptimConfig(lr=0.1), CPU)))


def test_grad_clip_by_hand_with_the_loss_scale_of_a_fused_optimizer() -> None:
    """The gradient (3, 4) of norm 5 becomes (0.6, 0.8); scaled by 1024 it stays scaled."""
    model = nn.Linear(2, 1, bias=False)
    optimizer: Any = build_optimizer(model, OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip=1.0), CPU)
    hook = next(iter(optimizer._optimizer_step_pre_hooks.values()))
    for scale in (None, 1024.0):
        model.weight.grad = torch.tensor([[3.0, 4.0]]) * (scale or 1)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        hook(optimizer, (), {})
        assert (model.weight.grad / (scale or 1)).tolist()[0] == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize(
    ("no_decay", "decayed"),
    [
        ((), ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "9.weight", "9.bias"]),
        ("norm", ["0.weight", "3.weight", "3.bias", "9.weight", "9.bias"]),
        ("bias", ["0.weight", "1.weight", "3.weight", "4.weight", "9.weight"]),
        ("norm, bias", ["0.weight", "3.weight", "9.weight"]),
    ],
)
def test_no_decay_exempts_norms_and_biases(no_decay: Any, decayed: list[str]) -> None:
    """At a gradient of 0 a step of plain SGD only decays: w becomes w - 0.1 * 0.5 w."""
    model = made()
    before = weights(model)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.5, "no_decay": no_decay}
    optimizer = build_optimizer(model, OptimConfig(**options), CPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_no_decay_exempts_the_biases_of_attention_and_recurrent_layers() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.LSTM(3, 2)])
    groups = build_optimizer(model, OptimConfig(no_decay=("bias",)), CPU).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [[names[parameter] for parameter in group["params"]] for group in groups] == [
        ["0.in_proj_weight", "0.out_proj.weight", "1.weight_ih_l0", "1.weight_hh_l0"],
        ["0.in_proj_bias", "0.out_proj.bias", "1.bias_ih_l0", "1.bias_hh_l0"],
    ]


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", False)])
def test_optimizer_is_fused_on_a_gpu(device: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits for the device at each update under fp16's loss scale."""
    asked: list[bool] = []

    def sgd(parameters: list[nn.Parameter], fused: bool, **options: Any) -> SGD:
        asked.append(fused)
        return SGD(parameters, **options)

    monkeypatch.setattr("deat_rb.training.optimizers.SGD", sgd)
    build_optimizer(made(), OptimConfig(momentum=0), torch.device(device))
    assert asked == [fused]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipping_and_averaging_do_not_look_at_a_value(optimizer: Any) -> None:
    """A tensor on the meta device has no values: whatever reads one raises, as it would wait for a GPU."""
    model = made().to("meta")
    engine, average = Engine("meta"), WeightAverage(model, 0.9)
    trainer = deat_rb.create("free-2", model)
    trainer.set_device(engine.device)
    images, labels = (part.to("meta") for part in images_and_labels(8))
    built = build_optimizer(model, OptimConfig(optimizer=optimizer, grad_clip=1.0, no_decay=("norm",)), engine.device)
    built.register_step_post_hook(average.after_step)
    trainer.training_step(images, labels, built, engine)
    with pytest.raises(RuntimeError, match="meta tensors"):
        float(average.updates)


@pytest.mark.parametrize(("given", "expected"), [({}, (1e-3, 1e-2)), ({"lr": 0.2, "weight_decay": 0.0}, (0.2, 0.0))])
def test_fit_with_adamw_uses_torchs_defaults(given: dict[str, float], expected: tuple[float, float]) -> None:
    class Sees(Callback):
        def on_fit_start(self, state: TrainingState) -> None:
            assert isinstance(state.optimizer, AdamW)
            group = state.optimizer.param_groups[0]
            assert (group["lr"], group["weight_decay"], group["betas"]) == (*expected, (0.9, 0.999))

    defaults = AdamW(made().parameters()).param_groups[0]
    assert (defaults["lr"], defaults["weight_decay"], defaults["betas"]) == (1e-3, 1e-2, (0.9, 0.999))
    fitted("standard", loader(1), **{"lr": None, **given}, optimizer="adamw", lr_schedule="flat", callbacks=[Sees()])


OPTIONS: list[dict[str, Any]] = [
    {
        "lr_schedule": "onecycle", "ema": 0.9, "nesterov": True, "no_decay": "norm,bias", "grad_clip": 0.5,
        "validate_every": 2, "on_nonfinite": "skip",
    },
    {"optimizer": "adamw", "lr_schedule": "cosine", "warmup_epochs": 0.5, "ema": 0.9, "no_decay": "bias"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_resume_with_every_option_equals_the_uninterrupted_run(options: dict[str, Any], tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("free-3", whole, **options)
    for after in (2, 5, 10):
        run = RunDirectory.create(tmp_path / f"after-{after}", run_config())
        with pytest.raises(Interrupted):
            train("free-3", run, Stops(after), **options)
        train("free-3", run, resume=True, **options)
        assert outcome(run) == outcome(whole)
    plain = RunDirectory.create(tmp_path / "plain", run_config())
    train("free-3", plain, ema=0.9, lr_schedule=options["lr_schedule"])
    assert outcome(plain)[0] != outcome(whole)[0]
