"""Architectures, normalisation inside the model, and checkpoints of the wrong kind."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from deat_rb.loading import load_model
from deat_rb.models.spec import ModelSpec, NormalizedModel, build_model, model_spec
from deat_rb.models.weights import load_weights
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors

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


@pytest.mark.parametrize(
    ("arch", "spelled"),
    [("wrn-34-10", "wrn-34-10"), ("WRN-34-10", "wrn-34-10"), ("wrn34-10", "wrn-34-10"), ("WideResNet-28-4", "wrn-28-4"),
     ("PreActResNet-18", "preactresnet18"), ("preactresnet18", "preactresnet18"), ("timm:resnet18", "timm:resnet18")],
)  # fmt: skip
def test_spellings(arch: str, spelled: str) -> None:
    assert ModelSpec(arch=arch, num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)).arch == spelled


def test_robustbench_networks_have_the_published_numbers_of_parameters() -> None:
    """11.17 M (PreActResNet-18 as in Wong et al. 2020) and WRN-10-1, worked out."""
    count = sum(p.numel() for p in build_model("preactresnet18", dataset="cifar10").parameters())
    assert count == 11_171_146
    convs = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (16 + 16 + 16 + 32 + 32 + 64 + 64)
    classifier = 64 * 10 + 10
    wrn = build_model("wrn-10-1", dataset="cifar10")
    assert sum(p.numel() for p in wrn.parameters()) == convs + shortcuts + norms + classifier


def test_normalisation_is_inside() -> None:
    model = NormalizedModel(nn.Flatten(), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    image = torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1)
    assert model(image).tolist() == [[1.0, 1.0, 0.25]]
    assert model.mu.shape == model.sigma.shape == (1, 3, 1, 1)
    assert set(model.state_dict()) == {"mu", "sigma"}


def test_data_sets_give_classes_and_normalisation() -> None:
    assert model_spec("wrn-10-1", dataset="cifar100").num_classes == 100
    assert model_spec("wrn-10-1", dataset="cifar10").mean == (0.4914, 0.4822, 0.4465)
    assert model_spec("wrn-10-1", dataset="cifar10", mean=(0.5,) * 3, num_classes=7).std == (0.2471, 0.2435, 0.2616)
    bare = model_spec("wrn-10-1", num_classes=4)
    assert (bare.mean, bare.std, bare.image_size) == ((0, 0, 0), (1, 1, 1), 32)
    assert model_spec("my_networks:small", num_classes=4, channels=1).mean == (0,)


def test_digits_normalisation_is_theirs() -> None:
    from deat_rb.data.datasets import load_data

    data, spec = load_data("digits"), model_spec("wrn-10-1", dataset="digits")
    assert spec.mean == pytest.approx(data.mean, abs=0.005)
    assert spec.std == pytest.approx(data.std, abs=0.005)


def test_copies_and_pickles() -> None:
    model = build_model("wrn-10-1", dataset="cifar10").eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES))
        assert type(twin.net) is type(model.net)


def test_spec_survives_json() -> None:
    spec = model_spec("wrn-10-1", dataset="cifar10")
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError):
        ModelSpec.model_validate({**spec.model_dump(), "dropout": 0.3})


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("arch", ["wrn-10-1", "preactresnet18"])
def test_robustbench_networks_are_for_32x32(arch: str, size: int) -> None:
    with pytest.raises(DeatError, match=rf"'{arch}' takes 3x32x32 images, not 3x{size}x{size}: .*timm:NAME"):
        build_model(arch, dataset="cifar10", image_size=size)


def test_robustbench_network_for_one_channel() -> None:
    with pytest.raises(DeatError, match="takes 3x32x32 images, not 1x32x32"):
        build_model("wrn-10-1", num_classes=10, channels=1)


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("preactresnet19", "did you mean 'preactresnet18'"),
        ("resnet", "timm:NAME"),
        ("wrn-35-10", "depth D"),
        ("wrn-4-1", "depth D"),
        ("wrn-10-0", "width W"),
        ("", "is unknown"),
        ("timm:resnet18x", "timm has no model 'resnet18x': did you mean"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19' that classifies images: did you mean"),
        ("torchvision:googlenet", "cannot be built|returns GoogLeNetOutputs"),
        ("my_networks:larger", "cannot be imported"),
        ("no_such_package:net", "cannot be imported"),
        (":net", "cannot be imp"),
        ("my_networks:not_a_module", "gave a str where a torch.nn.Module is needed"),
        ("my_networks:no_argument", "cannot be built"),
        ("os:getcwd", "cannot be built"),
    ],
)
def test_unknown_architectures(arch: str, sentence: str) -> None:
    with pytest.raises(DeatError, match=sentence) as refusal:
        build_model(arch, num_classes=10)
    assert "\n" not in str(refusal.value).strip()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dataset": "imagenet"}, "data set 'imagenet'"),
        ({}, "how many classes"),
        ({"num_classes": 1}, "num_classes = 1"),
        ({"num_classes": 10, "std": (0.0, 1.0, 1.0)}, r"std\.0 = 0"),
        ({"num_classes": 10, "mean": (0.5,)}, "channels|3x32x32"),
        ({"num_classes": 10, "mean": (0.5,) * 3, "std": (0.5,)}, "one number for each of 3 channels"),
        ({"num_classes": 10, "mean": (float("nan"),) * 3}, r"mean\.0 = nan"),
        ({"num_classes": 10, "image_size": 0}, "image_size = 0"),
    ],
)
def test_values_that_are_not_allowed(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DeatError, match=sentence):
        build_model("wrn-10-1", **options)


def test_own_networks_take_other_sizes() -> None:
    model = build_model("my_networks:small", num_classes=5, image_size=48, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 5)


def test_silently_wrong_rows_are_seen() -> None:
    assert build_model("my_networks:wrong_rows", num_classes=4)(IMAGES).shape == (2, 4)
    with pytest.raises(
        DeatError, match=r"'my_networks:wrong_rows' does not suit 3x64x64 .* returns \(8, 4\), not \(2, 4\)"
    ):
        build_model("my_networks:wrong_rows", num_classes=4, image_size=64)


def test_checking_shapes_leaves_the_network_and_the_randomness_alone() -> None:
    torch.manual_seed(0)
    expected = small(3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(0)
    found = build_model("my_networks:small", num_classes=3).net
    assert torch.equal(torch.rand(1), after)
    assert found.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_timm_and_torchvision() -> None:
    for arch, size in (("timm:resnet10t", 64), ("timm:vit_tiny_patch16_224", 32), ("torchvision:squeezenet1_1", 64)):
        model = build_model(arch, num_classes=7, image_size=size).eval()
        assert model(torch.rand(2, 3, size, size)).shape == (2, 7)


def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["whole", "bare", "bare with mu and sigma", "bare with flat mean and std"])
def test_load_weights_in_every_form(form: str) -> None:
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


def test_checkpoints_from_before_batches_were_counted() -> None:
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
def test_checkpoint_of_another_architecture_changes_nothing(change: Any, sentence: str) -> None:
    model = build_model("my_networks:small", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    tensors = shifted(model)
    change(tensors)
    with pytest.raises(DeatError, match=rf"^a\.pt is a checkpoint of another architecture .*{sentence}"):
        load_weights(model, tensors, source="a.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_wrn_checkpoint_in_a_preactresnet() -> None:
    tensors = build_model("wrn-10-1", dataset="cifar10").state_dict()
    with pytest.raises(DeatError, match=r"missing: net\.layer1.* and \d+ more; unexpected: net\.block1"):
        load_weights(build_model("preactresnet18", dataset="cifar10"), tensors, source="wrn.pt")


def test_load_model_takes_the_selected_weights_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deat_rb.runs.directory import RunDirectory

    trained = build_model("wrn-10-1", dataset="cifar10").eval()
    save_tensors(tmp_path / "best.safetensors", trained.state_dict())
    run = SimpleNamespace(model_spec=model_spec("wrn-10-1", dataset="cifar10"),
                          selected_weights_path=tmp_path / "best.safetensors")  # fmt: skip
    monkeypatch.setattr(RunDirectory, "open", lambda path: run)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), trained(IMAGES))


def test_load_model_of_a_bare_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    torch.save(build_model("wrn-10-1", dataset="cifar10").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(DeatError, match=r"nothing says of which architecture .*weights\.pt is"):
        load_model(tmp_path / "weights.pt")
    with pytest.raises(DeatError, match="does not exist"):
        load_model(tmp_path / "nothing.pt")
