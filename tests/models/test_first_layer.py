"""The first layer of a network: found behind its normalization, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_problems import Snapshot, made, normalized

from deat_rb.models.first_layer import find_first_layer, output_gradients, output_of
from deat_rb.models.spec import build_model
from deat_rb.utils.errors import DeatError

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("arch", "size", "name"),
    [
        ("wrn-10-1", 32, "net.conv1"),
        ("preactresnet18", 32, "net.conv1"),
        pytest.param("torchvision:mobilenet_v3_small", 32, "net.features.0.0", marks=pytest.mark.slow),
        pytest.param("timm:resnet10t", 32, "net.conv1.0", marks=pytest.mark.slow),
    ],
)
def test_the_first_convolution_of_the_architectures_is_found(arch: str, size: int, name: str) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    model = build_model(arch, num_classes=4, image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
    before = Snapshot(model)
    assert find_first_layer(model, torch.rand(2, 3, size, size)) == name
    assert before.differences() == []


def test_the_output_of_the_first_layer_includes_the_normalization_and_nothing_later() -> None:
    model = normalized().train()
    layer = model.get_submodule(find_first_layer(model, IMAGES))
    before = Snapshot(model)
    found = output_of(layer, model, IMAGES)
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    torch.testing.assert_close(found, F.conv2d((IMAGES - mean) / std, model.get_parameter("net.0.weight"), padding=1))
    assert before.differences() == []  # BatchNorm comes after it
    assert model(IMAGES).shape == (3, 4)  # and the network runs to its end again


def test_a_linear_layer_may_be_the_first() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
    assert find_first_layer(model, IMAGES) == "2"


def test_the_gradient_is_that_of_the_layers_own_output() -> None:
    """Even if the next layer changes it in place."""
    model = nn.Sequential(made()[0], nn.Hardtanh(-0.1, 0.1, inplace=True), nn.Flatten())
    with output_gradients(model[0]) as gradients:
        out = model(IMAGES)
    (3 * out).sum().backward()
    own = model[0](IMAGES)
    torch.testing.assert_close(gradients[0], 3.0 * (own.abs() < 0.1))
    assert 0 < int((gradients[0] == 0).sum()) < gradients[0].numel()
    assert not model[0]._forward_hooks


class Skips(nn.Module):
    """The images reach the logits past the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head((self.conv(images).relu() + images).flatten(1))
        return logits


class Scales(nn.Module):
    """A parameter before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.ones(3, 1, 1)), nn.Conv2d(3, 4, 8)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(self.scale * images).flatten(1)
        return logits


class Twice(nn.Module):
    """The same convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(self.conv(images).relu()).flatten(1))
        return logits


class Token(nn.Module):
    """A linear layer on something else than the images comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.embed, self.head = nn.Parameter(torch.ones(2)), nn.Linear(2, 4), nn.Linear(192, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.embed(self.token) + self.head(images.flatten(1))
        return logits


class Plane(nn.Module):
    """No layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(192, 4))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


class Cuts(Twice):
    """The convolution has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.conv(images)
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Skips(), "the images also reach the logits on another way than through 'conv'"),
        (Scales(), "other parameters are used before 'conv'"),
        (Twice(), "it uses 'conv' more than once"),
        (Token(), "the output of 'embed' does not depend on the images"),
        (Plane(), "it uses no convolution or linear layer"),
        (Cuts(), "the output of 'conv' has no gradient"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 8), nn.Flatten()), "it begins with the BatchNorm2d '0'"),
    ],
)
def test_other_networks_are_refused_with_the_reason(model: nn.Module, reason: str) -> None:
    before = Snapshot(model)
    with pytest.raises(DeatError, match="no first layer that could be separated from the others: ") as error:
        find_first_layer(model, IMAGES)
    assert str(error.value).endswith(f"{reason}; use another network or method")
    assert before.differences() == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_pass_without_the_layer_is_refused() -> None:
    model = Twice()
    with pytest.raises(DeatError, match="the network did not use its first layer, a Conv2d, in this forward pass"):
        output_of(model.conv, nn.Flatten(), IMAGES)
