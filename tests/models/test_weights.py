"""`deat_rb.models.weights`: state dicts under other names, and of other architectures."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from deat_rb.models.spec import build_model
from deat_rb.models.weights import detect_variant, load_weights, strip_wrappers
from deat_rb.utils import compat
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


@pytest.mark.parametrize("missing", ["mu", "sigma"])
def test_load_weights_refuses_half_a_normalization(missing: str) -> None:
    model = build_model("my_networks:small", num_classes=3)
    with pytest.raises(DeatError, match=rf"a\.pt.*{missing}"):
        load_weights(model, {n: t for n, t in shifted(model).items() if n != missing}, source="a.pt")


def test_load_weights_without_num_batches_tracked() -> None:
    model = build_model("my_networks:small", num_classes=3)
    load_weights(model, {n: t for n, t in shifted(model).items() if "num_batches_tracked" not in n}, source="a.pt")
    assert model.net.get_parameter("4.bias").min() > 0.4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(lambda t: t.pop("net.0.weight"), r"names differ \(missing: net\.0\.weight\)$"),
     (lambda t: t.update(extra=torch.ones(1), other=torch.ones(1)), "unexpected: extra and 1 more"),
     (lambda t: t.update({"net.4.weight": torch.ones(100, 4)}),
      r"shapes differ \(net\.4\.weight \(100, 4\) instead of \(3, 4\)"),
     (lambda t: t.clear(), "missing: net")],
)  # fmt: skip
def test_load_weights_of_another_architecture_changes_nothing(change: Any, sentence: str) -> None:
    model = build_model("my_networks:small", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    tensors = shifted(model)
    change(tensors)
    with pytest.raises(DeatError, match=rf"^a\.pt has a different architecture .*{sentence}"):
        load_weights(model, tensors, source="a.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("net.4.weight", lambda t: (100 * t).to(torch.int8), r"torch\.int8 instead of torch\.float32, as quantized"),
        ("net.1.running_var", lambda t: t.long(), r"torch\.int64 instead of torch\.float32, as quantized networks do"),
        ("net.0.bias", lambda t: t > 0, r"torch\.bool instead of torch\.float32, as quantized networks do: save"),
        ("net.1.num_batches_tracked", lambda t: t + 0.5, r"torch\.float32 instead of torch\.int64: save weights of"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_weights_refuses_integers_for_weights(
    name: str, change: Callable[[Tensor], Tensor], sentence: str, prefix: str
) -> None:
    model = build_model("my_networks:small", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    tensors = shifted(model)
    tensors[name] = change(tensors[name])
    with pytest.raises(DeatError, match=rf"^q\.pt has the tensor {name} in {sentence}"):
        load_weights(model, {f"{prefix}{each}": tensor for each, tensor in tensors.items()}, source="q.pt")
    assert all(torch.equal(tensor, before[each]) for each, tensor in model.state_dict().items())


def test_load_weights_takes_other_floating_point_types() -> None:
    model = build_model("my_networks:small", num_classes=3)
    load_weights(model, {name: tensor.double() for name, tensor in shifted(model).items()}, source="a.pt")
    half = {name: tensor.half() for name, tensor in shifted(model).items()}
    half["mu"], half["sigma"] = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    load_weights(model, half, source="a.pt")
    assert int(model.net.get_buffer("1.num_batches_tracked")) == 2
    assert model.net.get_parameter("4.bias").dtype == torch.float32


def test_load_weights_of_a_wrn_into_a_preactresnet() -> None:
    tensors = build_model("wrn-10-1", dataset="cifar10").state_dict()
    with pytest.raises(DeatError, match=r"missing: net\.layer1.* and \d+ more; unexpected: net\.block1"):
        load_weights(build_model("preactresnet18", dataset="cifar10"), tensors, source="wrn.pt")


# Checkpoints as the field saves them: each is made of RobustBench's own classes, and has to give the same logits.

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
RESNET, WRN = (importlib.import_module(f"robustbench.model_zoo.architectures.{name}") for name in compat.LIGHT[::-1])


class Normalize(nn.Module):
    """A normalization layer as many repositories have it."""

    def __init__(self, mean: str = "mean", std: str = "std", shape: tuple[int, ...] = (1, 3, 1, 1)) -> None:
        super().__init__()
        self.names = mean, std
        self.register_buffer(mean, torch.tensor(MEAN).view(shape))
        self.register_buffer(std, torch.tensor(STD).view(shape))

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (self.get_buffer(name).view(1, 3, 1, 1) for name in self.names)
        return (images - mean) / std


class Wrapped(nn.Module):
    """A network with its normalization under ``normalize``, as in torchattacks' and RobustBench's examples."""

    def __init__(self, net: nn.Module, name: str = "model") -> None:
        super().__init__()
        self.normalize = Normalize()
        self.name = name
        self.add_module(name, net)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.get_submodule(self.name)(self.normalize(images))
        return logits


class AttackerModel(nn.Module):
    """The module structure of MadryLab's robustness package: the network a second time, inside the attacker."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.normalizer = Normalize("new_mean", "new_std", (3, 1, 1))
        self.model = net
        self.attacker = nn.Module()
        self.attacker.normalize = Normalize("new_mean", "new_std", (3, 1, 1))
        self.attacker.model = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self.normalizer(images))
        return logits


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in eval mode whose BatchNorm statistics are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make()
        net(IMAGES)
    return net.eval()


def wrn(**options: Any) -> nn.Module:
    return trained(lambda: WRN.WideResNet(depth=10, widen_factor=1, **options))


def compiled(net: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(net, backend="eager"))


def checkpointed(net: nn.Module) -> nn.Module:
    """Wrap one block as torch's activation checkpointing does."""
    block = net.get_submodule("block1")
    wrapper = checkpoint_wrapper(block)
    net.block1 = wrapper
    return net


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "normalize.mean and model.": Wrapped,
    "normalize.mean and net.": lambda net: Wrapped(net, "net"),
    "normalize.mean and network.": lambda net: Wrapped(net, "network"),
    "0.mean and 1.": lambda net: nn.Sequential(Normalize(), net),
    "0.mu and 1.": lambda net: nn.Sequential(Normalize("mu", "sigma", (3,)), net),
    "0.mean and 1.module.": lambda net: nn.Sequential(Normalize(), nn.DataParallel(net)),
    "module.0.mean and module.1.": lambda net: nn.DataParallel(nn.Sequential(Normalize(), net)),
    "_orig_mod.0.mean": lambda net: compiled(nn.Sequential(Normalize(), net)),
    "1._orig_mod.": lambda net: nn.Sequential(Normalize(), compiled(net)),
    "module._orig_mod.": lambda net: nn.DataParallel(compiled(Wrapped(net))),
    "model._orig_mod.module.": lambda net: Wrapped(compiled(nn.DataParallel(net))),
    "AveragedModel": lambda net: AveragedModel(Wrapped(net)),
    "AveragedModel of DataParallel": lambda net: AveragedModel(nn.DataParallel(nn.Sequential(Normalize(), net))),
    "layers._checkpoint_wrapped_module.": lambda net: Wrapped(checkpointed(net)),
    "module.attacker.": lambda net: nn.DataParallel(AttackerModel(net)),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_load_weights_of_wrapped_networks(wrapping: str) -> None:
    theirs = WRAPPINGS[wrapping](wrn()).eval()
    ours = build_model("wrn-10-1", num_classes=10).eval()
    load_weights(ours, theirs.state_dict(), source="a.pt")
    assert torch.equal(ours(IMAGES), theirs(IMAGES))
    assert torch.equal(ours.mu, torch.tensor(MEAN).view(1, 3, 1, 1))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel, lambda net: nn.DataParallel(compiled(net)),
                                  lambda net: compiled(nn.DataParallel(net)), nn.Sequential])  # fmt: skip
def test_load_weights_of_wrapped_networks_without_normalization(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = wrn()
    ours = build_model("wrn-10-1", num_classes=10, mean=MEAN, std=STD).eval()
    load_weights(ours, wrap(net).state_dict(), source="a.pt")
    assert torch.equal(ours(IMAGES), net((IMAGES - ours.mu) / ours.sigma))


def test_load_weights_drops_the_unused_block_of_trades_wideresnet() -> None:
    theirs = wrn(sub_block1=True)
    ours = build_model("wrn-10-1", num_classes=10).eval()
    assert "sub_block1.layer.0.bn1.weight" in theirs.state_dict()
    load_weights(ours, nn.DataParallel(theirs).state_dict(), source="a.pt")
    assert torch.equal(ours(IMAGES), theirs(IMAGES))


RESNETS: dict[str, Callable[[], nn.Module]] = {
    "preactresnet18": lambda: cast(nn.Module, RESNET.PreActResNet18()),
    "preactresnet18-bn": lambda: cast(nn.Module, RESNET.PreActResNet(RESNET.PreActBlockV2, [2, 2, 2, 2],
                                                                     bn_before_fc=True)),
    "resnet18": lambda: cast(nn.Module, RESNET.ResNet18()),
}  # fmt: skip


@pytest.mark.parametrize("arch", RESNETS)
def test_load_weights_of_resnets_for_cifar(arch: str) -> None:
    theirs = trained(RESNETS[arch])
    ours = build_model(arch, num_classes=10).eval()
    load_weights(ours, nn.DataParallel(AttackerModel(theirs)).state_dict(), source="a.pt")
    assert torch.equal(ours(IMAGES), theirs((IMAGES - ours.mu) / ours.sigma))
    bare = strip_wrappers(nn.Sequential(Normalize(), theirs).state_dict())
    assert {detect_variant(other, bare) for other in RESNETS} == {arch}
    assert detect_variant("wrn-10-1", bare) == "wrn-10-1"


def test_load_weights_says_names_differ_apart_from_shapes() -> None:
    model = build_model("my_networks:small", num_classes=3)
    renamed = {name.replace("net.4.", "net.head."): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(
        DeatError,
        match=r"^a\.pt has tensors with the model's shapes but other names "
        r"\(missing: net\.4\.weight and 1 more; unexpected: net\.head\.weight and",
    ):
        load_weights(model, renamed, source="a.pt")
    with pytest.raises(DeatError, match=r"number of classes: shapes differ \(net\.4\.weight \(3, 4\) instead"):
        load_weights(build_model("my_networks:small", num_classes=5), model.state_dict(), source="a.pt")


class Versioned(nn.Linear):
    """A layer that loads weights of its own version only, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_load_weights_into_a_network_that_asks_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def versioned(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), Versioned(3 * 32 * 32, num_classes))

    monkeypatch.setattr("my_networks.versioned", versioned, raising=False)
    model = build_model("my_networks:versioned", num_classes=3)
    new = shifted(model)
    load_weights(model, new, source="a.pt")
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_weights_of_torchvisions_densenet_files(prefix: str) -> None:
    """Their names are those of the first versions of PyTorch, which torchvision replaces on loading."""
    model = build_model("torchvision:densenet121", num_classes=10)
    new = shifted(model)
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name.removeprefix("net.")): tensor for name, tensor in new.items()
           if name.startswith("net.")}  # fmt: skip
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_weights(model, {f"{prefix}{name}": tensor for name, tensor in old.items()}, source="a.pt")
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.net.state_dict(prefix="net.").items())


def test_load_weights_takes_one_mean_for_all_channels() -> None:
    ours, net = build_model("wrn-10-1", num_classes=10).eval(), wrn()
    tensors = {**{f"1.{name}": tensor for name, tensor in net.state_dict().items()},
               "0.mean": torch.tensor(0.5), "0.std": torch.tensor(0.25)}  # fmt: skip
    load_weights(ours, tensors, source="a.pt")
    assert torch.equal(ours(IMAGES), net((IMAGES - 0.5) / 0.25))
