"""`evaluate` with TorchScript models, reassigned buffers, in-place operations, no_grad and inference_mode."""

from __future__ import annotations

import io

import pytest
import torch
from short_autoattack import shorten
from small_problems import batch_for, small_network
from torch import Tensor, nn
from without_float64 import WithoutFloat64

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.utils.errors import DeatError

ATTACKS = "fgsm,pgd-3,square,torchattacks.PGD(steps=2)"


def reloaded(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    loaded: nn.Module = torch.jit.load(file)
    return loaded


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "level"), [("script", "none"), ("script", "quick"), ("trace", "quick"), ("load", "quick")]
)
def test_evaluate_accepts_torchscript(kind: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=3, queries=20)
    network = small_network()
    images, labels = (part[:24] for part in batch_for(network))
    expected = evaluate(network, images, labels, attacks=ATTACKS, eps=0.04)
    scripted: nn.Module
    if kind == "trace":
        scripted = torch.jit.trace(network, images[:2])
    else:
        scripted = torch.jit.script(network) if kind == "script" else reloaded(network)
    scripted.train()
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    report = evaluate(scripted, images, labels, attacks=ATTACKS, eps=0.04, checks=level)
    assert {name: correct.tolist() for name, correct in report.verdicts.items()} == {
        name: correct.tolist() for name, correct in expected.verdicts.items()
    }
    assert scripted.training
    assert all(parameter.requires_grad for parameter in scripted.parameters())
    assert all(torch.equal(value, before[name]) for name, value in scripted.state_dict().items())


class Assigning(nn.Module):
    """Reassigns a buffer in every forward pass."""

    mean: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + images.detach().mean((0, 2, 3))
        logits: Tensor = self.network(images)
        return logits


def test_evaluate_restores_buffers_that_forward_assigns() -> None:
    network = small_network()
    images, labels = (part[:12] for part in batch_for(network))
    model = Assigning(network)
    mean = model.mean
    report = evaluate(model, images, labels, attacks="fgsm", eps=0.04, checks="quick")
    assert model.mean is mean
    assert not mean.any()
    assert {check.name: check.status for check in report.checks}["model unchanged"] == "fail"


class InPlace(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        images.mul_(0.9)
        logits: Tensor = self.network(images)
        return logits


@pytest.mark.parametrize("attacks", ["natural", "natural,square", "fgsm"])
def test_evaluate_refuses_in_place_models_and_leaves_the_images(attacks: str) -> None:
    network = small_network()
    images, labels = batch_for(network)
    before = images.clone()
    with pytest.raises(DeatError, match="the model changes its input in place"):
        evaluate(InPlace(network), images, labels, attacks=attacks, eps=0.04)
    assert torch.equal(images, before)


def test_evaluate_refuses_models_without_weights_and_those_created_in_inference_mode() -> None:
    images, labels = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode():
        inference = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    meta = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).to("meta")
    for model, message in [
        (lazy, "lazy layers without weights"),
        (meta, "has no weights, only their shapes"),
        (inference, "created inside torch.inference_mode"),
    ]:
        with pytest.raises(DeatError, match=message):
            evaluate(model, images, labels, attacks="natural", eps=0.1)


@pytest.mark.slow
def test_evaluate_in_no_grad_and_with_inference_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=3, queries=20)
    network = small_network()
    images, labels = (part[:12] for part in batch_for(network))
    expected = evaluate(network, images, labels, attacks=ATTACKS, eps=0.04, checks="full")
    with torch.no_grad():
        assert evaluate(network, images, labels, attacks=ATTACKS, eps=0.04, checks="full").checks == expected.checks
    with torch.inference_mode():
        with pytest.raises(DeatError, match=r"evaluation needs gradients, which torch.inference_mode\(\) disables"):
            evaluate(network, images, labels, attacks=ATTACKS, eps=0.04)
        copies = images.clone(), labels.clone()
    assert evaluate(network, *copies, attacks=ATTACKS, eps=0.04, checks="full").checks == expected.checks


@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 16, 8)])
def test_evaluate_autoattack_in_l2_on_images_that_are_not_square(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=3, queries=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(384, 5)).eval()
        images = torch.rand(8, *shape)
    labels = network(images).argmax(dim=1)
    report = evaluate(network, images, labels, attacks="autoattack,square", eps=0.3, norm="L2")
    assert report.results["autoattack"].accuracy < 1
    assert report.results["autoattack"].inadmissible == 0
    assert report.adversarial["square"].shape == images.shape


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_evaluate_on_a_device_without_float64(norm: str) -> None:
    network = small_network()
    images, labels = (part[:8] for part in batch_for(network))
    expected = evaluate(network, images, labels, attacks="fgsm,pgd-2", eps=0.04, norm=norm, checks="quick")
    report = evaluate(network, images.as_subclass(WithoutFloat64), labels, attacks="fgsm,pgd-2", eps=0.04, norm=norm,
                      checks="quick")  # fmt: skip
    assert all(correct.equal(expected.verdicts[name]) for name, correct in report.verdicts.items())
    assert [check.name for check in report.checks] == [check.name for check in expected.checks]
