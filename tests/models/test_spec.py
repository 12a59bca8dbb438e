"""`deat_rb.models.spec`: networks by architecture, with the normalization inside."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from deat_rb.models.spec import ModelSpec, NormalizedModel, build_model, model_spec
from deat_rb.utils.errors import DeatError

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(num_classes: int) -> nn.Module:
    """A factory as a user would write one; takes any image size."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))  # fmt: skip


def wrong_rows(num_classes: int) -> nn.Module:
    """Like RobustBench's WRN at 64x64: the rest of the picture becomes rows."""
    return nn.Sequential(nn.AvgPool2d(32), nn.Conv2d(3, num_classes, 1), nn.Flatten(2), PixelsToRows())


class PixelsToRows(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.transpose(1, 2).flatten(0, 1)


def not_a_module(num_classes: int) -> str:
    return f"{num_classes} classes"


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    factories = SimpleNamespace(
        small=small, wrong_rows=wrong_rows, not_a_module=not_a_module, no_argument=lambda: small(2)
    )
    monkeypatch.setitem(sys.modules, "my_networks", factories)  # type-checked as a module is


def test_build_model_has_the_published_number_of_parameters() -> None:
    """11.17 M (PreActResNet-18 as in Wong et al. 2020) and WRN-10-1, worked out."""
    count = sum(p.numel() for p in build_model("preactresnet18", dataset="cifar10").parameters())
    assert count == 11_171_146
    convs = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (16 + 16 + 16 + 32 + 32 + 64 + 64)
    classifier = 64 * 10 + 10
    wrn = build_model("wrn-10-1", dataset="cifar10")
    assert sum(p.numel() for p in wrn.parameters()) == convs + shortcuts + norms + classifier


def test_normalized_model_normalizes_its_input() -> None:
    model = NormalizedModel(nn.Flatten(), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    image = torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1)
    assert model(image).tolist() == [[1.0, 1.0, 0.25]]
    assert model.mu.shape == model.sigma.shape == (1, 3, 1, 1)
    assert set(model.state_dict()) == {"mu", "sigma"}


def test_model_spec_takes_defaults_from_the_dataset() -> None:
    assert model_spec("wrn-10-1", dataset="cifar100").num_classes == 100
    assert model_spec("wrn-10-1", dataset="cifar10").mean == (0.4914, 0.4822, 0.4465)
    assert model_spec("wrn-10-1", dataset="cifar10", mean=(0.5,) * 3, num_classes=7).std == (0.2471, 0.2435, 0.2616)
    bare = model_spec("wrn-10-1", num_classes=4)
    assert (bare.mean, bare.std, bare.image_size) == ((0, 0, 0), (1, 1, 1), 32)
    assert model_spec("my_networks:small", num_classes=4, channels=1).mean == (0,)


def test_model_spec_of_digits_has_their_mean_and_std() -> None:
    from deat_rb.data.datasets import load_data

    data, spec = load_data("digits"), model_spec("wrn-10-1", dataset="digits")
    assert spec.mean == pytest.approx(data.mean, abs=0.005)
    assert spec.std == pytest.approx(data.std, abs=0.005)


def test_normalized_model_can_be_copied_and_pickled() -> None:
    model = build_model("wrn-10-1", dataset="cifar10").eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES))
        assert type(twin.net) is type(model.net)


def test_model_spec_survives_json() -> None:
    spec = model_spec("wrn-10-1", dataset="cifar10")
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError):
        ModelSpec.model_validate({**spec.model_dump(), "dropout": 0.3})


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("arch", ["wrn-10-1", "preactresnet18"])
def test_build_model_refuses_other_sizes_than_32x32(arch: str, size: int) -> None:
    with pytest.raises(DeatError, match=rf"'{arch}' takes 3x32x32 images, not 3x{size}x{size}: .*timm:NAME"):
        build_model(arch, dataset="cifar10", image_size=size)


def test_build_model_refuses_one_channel() -> None:
    with pytest.raises(DeatError, match="takes 3x32x32 images, not 1x32x32"):
        build_model("wrn-10-1", num_classes=10, channels=1)


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("timm:resnet18x", "timm has no model 'resnet18x': did you mean"),
        ("torchvision:resnet19", "torchvision has no image classifier 'resnet19': did you mean"),
        ("torchvision:googlenet", "cannot be built|returns a GoogLeNetOutputs"),
        ("my_networks:larger", "cannot be imported"),
        ("no_such_package:net", "cannot be imported"),
        (":net", "cannot be imp"),
        ("my_networks:not_a_module", "returned a str, not a torch.nn.Module"),
        ("my_networks:no_argument", "cannot be built"),
        ("os:getcwd", "cannot be built"),
    ],
)
def test_build_model_refuses_unknown_architectures(arch: str, sentence: str) -> None:
    with pytest.raises(DeatError, match=sentence) as refusal:
        build_model(arch, num_classes=10)
    assert "\n" not in str(refusal.value).strip()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dataset": "imagenet"}, "unknown dataset 'imagenet'"),
        ({}, "num_classes is required for wrn-10-1"),
        ({"num_classes": 1}, "num_classes = 1"),
        ({"num_classes": 10, "std": (0.0, 1.0, 1.0)}, r"std\.0 = 0"),
        ({"num_classes": 10, "mean": (0.5,)}, "channels|3x32x32"),
        ({"num_classes": 10, "mean": (0.5,) * 3, "std": (0.5,)}, "one number per channel, 3"),
        ({"num_classes": 10, "mean": (float("nan"),) * 3}, r"mean\.0 = nan"),
        ({"num_classes": 10, "image_size": 0}, "image_size = 0"),
    ],
)
def test_build_model_refuses_bad_values(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DeatError, match=sentence):
        build_model("wrn-10-1", **options)


def test_build_model_takes_other_sizes_with_a_factory() -> None:
    model = build_model("my_networks:small", num_classes=5, image_size=48, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 5)


def test_build_model_refuses_wrong_output_shapes() -> None:
    assert build_model("my_networks:wrong_rows", num_classes=4)(IMAGES).shape == (2, 4)
    with pytest.raises(
        DeatError,
        match=r"'my_networks:wrong_rows' returns logits of shape \(8, 4\) for 2 images of 3x64x64",
    ):
        build_model("my_networks:wrong_rows", num_classes=4, image_size=64)


def test_build_model_keeps_weights_and_random_state() -> None:
    torch.manual_seed(0)
    expected = small(3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(0)
    found = build_model("my_networks:small", num_classes=3).net
    assert torch.equal(torch.rand(1), after)
    assert found.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_build_model_of_timm_and_torchvision() -> None:
    for arch, size in (("timm:resnet10t", 64), ("timm:vit_tiny_patch16_224", 32), ("torchvision:squeezenet1_1", 64)):
        model = build_model(arch, num_classes=7, image_size=size).eval()
        assert model(torch.rand(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("number", [10**30, 10**6 + 1, -1])
@pytest.mark.parametrize("field", ["num_classes", "image_size", "channels"])
def test_model_spec_refuses_impossible_sizes(field: str, number: int) -> None:
    sizes = {"num_classes": 10, "mean": (0.0,) * 3, "std": (1.0,) * 3, field: number}
    with pytest.raises(ValidationError, match=field):
        ModelSpec.model_validate({"arch": "wrn-10-1", **sizes})


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "raft_small", "mvit_v1_b"])
def test_build_refuses_torchvision_models_that_do_not_classify(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection models would download their backbone."""

    def refuse(*_: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(DeatError, match=f"torchvision has no image classifier '{name}'"):
        model_spec(f"torchvision:{name}", num_classes=10, image_size=224).build()
