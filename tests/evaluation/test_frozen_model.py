"""The memory format of a model that is prepared for evaluation, and the pixels of its images."""

from __future__ import annotations

import pytest
import torch
from small_problems import Plane, batch_for, plane_images, small_network
from torch import Tensor, nn

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.utils.errors import DeatError


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def batch(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    return batch_for(network)


class Flat(nn.Module):
    """Flattens by view, which images in channels_last cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(144, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images)
        logits: Tensor = self.linear(features.view(len(images), -1))
        return logits


class LaidOut(nn.Module):
    """Remembers how its weights were laid out when it was called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        weight = self.network.get_parameter("4.weight")
        self.seen.add(weight.is_contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.network(images)
        return logits


@pytest.mark.parametrize(
    ("make", "wanted", "layout"),
    [(small_network, True, "channels_last"), (small_network, False, "own"), (Flat, True, "own"), (Plane, True, "own")],
)
def test_evaluate_memory_format(make: type[nn.Module], wanted: bool, layout: str) -> None:
    model = make().eval()
    images = torch.rand(6, 1, 2, 2) if make is Plane else torch.rand(6, 3, 8, 8)
    before = [(p.data_ptr(), p.stride(), p.clone()) for p in model.parameters()]
    labels = model(images).argmax(1)
    report = evaluate(model, images, labels, attacks="pgd-2", channels_last=wanted)
    assert report.layout == layout
    after = [(p.data_ptr(), p.stride(), p) for p in model.parameters()]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def test_evaluate_runs_in_channels_last(batch: tuple[Tensor, Tensor]) -> None:
    model = LaidOut(small_network())
    evaluate(model, *batch, attacks=())
    assert model.seen == {False, True}, "the first look is at the model as it is"
    model.seen.clear()
    evaluate(model, *batch, attacks="fgsm", channels_last=False)
    assert model.seen == {False}


def test_evaluate_clamps_pixels_that_are_outside_by_rounding() -> None:
    images, labels, robust = plane_images()
    images[5, 0, 1, 0] = 1.0  # margin 1.5, labeled 1: still wrong without any attack
    outside = torch.where(images == 0, -1e-7, torch.where(images == 1, 1 + 2**-23, images))
    assert (outside != images).flatten(1).any(1).tolist() == [False] * 5 + [True] * 3
    given = outside.clone()
    report = evaluate(Plane(), outside, labels, attacks="pgd-12", eps=0.1, keep_adversarial=True)
    assert report.verdicts["natural"].tolist() == [True] * 5 + [False] + [True] * 2
    assert report.verdicts["pgd-12"].tolist() == robust.tolist()
    assert report.results["natural"].inadmissible == 0
    adversarial = report.adversarial["pgd-12"]
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(outside, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_evaluate_refuses_images_of_half_precision(
    dtype: torch.dtype, network: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    """Half a unit of the last place below 1 is 2e-4 in float16 and 2e-3 in bfloat16, more than the ball's tolerance."""
    images, labels = batch
    with pytest.raises(DeatError, match=rf"the images are {dtype}, in which a perturbation .* give float32 images"):
        evaluate(network, images.to(dtype), labels, attacks=("fgsm",))
