"""`deat_rb.models.weights`: state dicts under other names, and of other architectures."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deat_rb.models.spec import build_model
from deat_rb.models.weights import load_weights
from deat_rb.utils.errors import DeatError


def small(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))  # fmt: skip


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_networks", SimpleNamespace(small=small))  # type-checked as a module is


def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["whole", "bare", "bare with mu and sigma", "bare with flat mean and std"])
def test_load_weights_takes_every_form(form: str) -> None:
    model = build_model("my_networks:small", num_classes=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    mu, sigma = model.mu.clone(), model.sigma.clone()
    new = shifted(model)
    bare = {name.removeprefix("net."): tensor for name, tensor in new.items() if name.startswith("net.")}
    given = {
        "whole": new,
        "bare": bare,
        "bare with mu and sigma": {**bare, "mu": mu + 1, "sigma": sigma + 1},
        "bare with flat mean and std": {**bare, "mean": (mu + 1).flatten(), "std": (sigma + 1).flatten()},
    }[form]
    load_weights(model, given, source="a.pt")
    expected = {**new, "mu": mu, "sigma": sigma} if form == "bare" else new
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_load_weights_without_num_batches_tracked() -> None:
    model = build_model("my_networks:small", num_classes=3)
    load_weights(model, {n: t for n, t in shifted(model).items() if "num_batches_tracked" not in n}, source="a.pt")
    assert model.net.get_parameter("4.bias").min() > 0.4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(lambda t: t.pop("net.0.weight"), r"missing: net\.0\.weight\)"),
     (lambda t: t.update(extra=torch.ones(1), other=torch.ones(1)), "unexpected: extra and 1 more"),
     (lambda t: t.update({"net.4.weight": torch.ones(100, 4)}),
      r"of another shape: net\.4\.weight \(100, 4\) instead of \(3, 4\)"),
     (lambda t: t.clear(), "missing: net")],
)  # fmt: skip
def test_load_weights_of_another_architecture_changes_nothing(change: Any, sentence: str) -> None:
    model = build_model("my_networks:small", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    tensors = shifted(model)
    change(tensors)
    with pytest.raises(DeatError, match=rf"^a\.pt is a checkpoint of another architecture .*{sentence}"):
        load_weights(model, tensors, source="a.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_load_weights_of_a_wrn_into_a_preactresnet() -> None:
    tensors = build_model("wrn-10-1", dataset="cifar10").state_dict()
    with pytest.raises(DeatError, match=r"missing: net\.layer1.* and \d+ more; unexpected: net\.block1"):
        load_weights(build_model("preactresnet18", dataset="cifar10"), tensors, source="wrn.pt")
