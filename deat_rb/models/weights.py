"""Loading of state dicts into models, including state dicts with tensor names of wrappers and other code bases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from deat_rb.models.names import PREACTRESNET18, PREACTRESNET18_BN, RESNET18
from deat_rb.models.spec import NormalizedModel
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import load_tensors_into

_STATISTICS = {"mu": "mu", "mean": "mu", "_mean": "mu", "new_mean": "mu", "means": "mu",
               "sigma": "sigma", "std": "sigma", "_std": "sigma", "new_std": "sigma", "stds": "sigma", "sds": "sigma",
               }  # fmt: skip
"""Names of normalization buffers in RobustBench, MadryLab's models and common Normalize layers."""

_MARKS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Name components that torch.compile, FSDP and activation checkpointing insert at any position."""

_WRAPPED = re.compile(r"^(?:(?:module|model|net|_orig_mod)\.)+(?=.)")
"""Prefixes of DataParallel, DDP, AveragedModel, Lightning and torch.compile."""

_DENSE_LAYER = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""Start of a tensor's name in a DenseNet that was trained with the first versions of PyTorch."""


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict into a model, completely or not at all.

    For a `NormalizedModel`, the state dict may also be that of the bare network or of a wrapped one (see
    `strip_wrappers`). If it contains no mean and standard deviation, the model keeps its own.

    Args:
        model: The model.
        tensors: The state dict.
        source: Origin of the tensors, for the error message.

    Raises:
        DeatError: See `check_weights`.
    """
    load_tensors_into(model, check_weights(model, tensors, source=source))


def with_new_head(
    model: nn.Module, tensors: Mapping[str, Tensor], num_classes: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Replace the last layer in a state dict by the model's own if it is for another number of classes.

    Its tensors are those that differ only in the first dimension, which is ``num_classes`` in the model and the same
    other number in the state dict; the state dict may lack some of them.

    Args:
        model: A `NormalizedModel`.
        tensors: The state dict, as for `load_weights`.
        num_classes: Number of logits of the model.

    Returns:
        The state dict under the model's names, and the names of the replaced tensors; none if the shapes are equal or
        differ in another way, which `load_weights` reports.
    """
    own: dict[str, Tensor] = model.state_dict()
    renamed = _renamed(tensors, own)
    given = {name: renamed[name].shape for name in own if name in renamed and renamed[name].shape != own[name].shape}
    absent = [name for name in own if name not in renamed and not name.endswith("num_batches_tracked")]
    names = tuple(name for name in own if name in given or name in absent)
    is_head = (
        all(own[name].ndim and len(own[name]) == num_classes for name in names)
        and all(shape[1:] == own[name].shape[1:] for name, shape in given.items())
        and len({shape[:1] for shape in given.values()}) <= 1
    )
    if not names or not is_head:
        return dict(tensors), ()
    return {**renamed, **{name: own[name] for name in names}}, names


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return the tensors under the model's own names, checked but not loaded.

    Raises:
        DeatError: A tensor is missing, unexpected or of the wrong shape, or has integers in place of floating-point
            values or vice versa.
    """
    own: dict[str, Tensor] = model.state_dict()
    renamed = _renamed(tensors, own) if isinstance(model, NormalizedModel) else dict(tensors)
    missing = [name for name in own if name not in renamed and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in renamed if name not in own]
    names = [f"{what}: {_and_more(some)}" for what, some in (("missing", missing), ("unexpected", unexpected)) if some]
    shapes = [f"{name} {tuple(renamed[name].shape)} instead of {tuple(own[name].shape)}"
              for name in own if name in renamed and renamed[name].shape != own[name].shape]  # fmt: skip
    if names and not shapes and [own[name].shape for name in missing] == [renamed[name].shape for name in unexpected]:
        raise DeatError(f"{source} has tensors with the model's shapes but other names ({'; '.join(names)}): "
                        "rename them as in the model's state dict")  # fmt: skip
    problems = [f"names differ ({'; '.join(names)})"] if names else []
    problems += [f"shapes differ ({_and_more(shapes)})"] if shapes else []
    if problems:
        raise DeatError(f"{source} has a different architecture or number of classes: {', '.join(problems)}")
    for name, tensor in renamed.items():
        kind, needed = tensor.dtype, own[name].dtype
        quantized = needed.is_floating_point and not kind.is_floating_point and name not in ("mu", "sigma")
        if quantized or (
            kind.is_floating_point and not needed.is_floating_point and bool((tensor != tensor.round()).any())
        ):
            raise DeatError(
                f"{source} has the tensor {name} in {kind} instead of {needed}"
                f"{', as quantized networks do' if quantized else ''}: save weights of the model's own types"
            )
    return {**own, **renamed}


def _and_more(items: list[str]) -> str:
    return items[0] + (f" and {len(items) - 1} more" if len(items) > 1 else "")


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under RobustBench's names: unprefixed for the network, plus ``mu`` and ``sigma``.

    Removes the prefixes of DataParallel, DDP, AveragedModel, Lightning, torch.compile, ``Sequential(normalize,
    network)``, normalization layers of any name, and MadryLab's ``AttackerModel``, in any nesting.
    """
    *_, bare = _unwrapped(tensors)
    return bare


def detect_variant(arch: str, tensors: Mapping[str, Tensor]) -> str:
    """Return which CIFAR ResNet-18 variant a state dict belongs to; other architectures are returned unchanged.

    RobustBench's tables call all three variants ResNet-18 or PreActResNet-18.

    Args:
        arch: Canonical name.
        tensors: State dict, as returned by `strip_wrappers`.
    """
    if arch not in (PREACTRESNET18, PREACTRESNET18_BN, RESNET18) or "layer1.0.conv1.weight" not in tensors:
        return arch
    if "bn.weight" in tensors:
        return PREACTRESNET18_BN
    return RESNET18 if "bn1.weight" in tensors else PREACTRESNET18


def _unwrapped(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a state dict, and then the results of removing one wrapper after another."""
    current = dict(tensors)
    statistics: dict[str, Tensor] = {}
    while True:
        yield {**statistics, **current}
        statistics = {**_statistics(current), **statistics}
        step = {name: tensor for name, tensor in current.items() if not _is_statistic(name, current)}
        for change in (_without_bookkeeping, _as_torchvision_loads, _without_prefixes, _without_common_component):
            changed = change(step)
            if changed.keys() != step.keys():
                step = changed
                break
        if step.keys() == current.keys():
            return
        current = step


def _is_statistic(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor is the mean or standard deviation of a module that contains only these two."""
    parent, dot, last = name.rpartition(".")
    if last not in _STATISTICS:
        return False
    siblings = [other for other in tensors if other.startswith(f"{parent}.") or (not dot and other in _STATISTICS)]
    return sorted(_STATISTICS.get(other.rpartition(".")[2], "") for other in siblings) == ["mu", "sigma"]


def _statistics(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_STATISTICS[name.rpartition(".")[2]]: tensor for name, tensor in tensors.items()
            if _is_statistic(name, tensors)}  # fmt: skip


def _without_bookkeeping(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop AveragedModel's counter and MadryLab's second copy of the network; strip the name components in `_MARKS`."""
    names = [name.removeprefix("module.") for name in tensors]
    attacker = any(name.startswith("attacker.") for name in names) and any(name.startswith("model.") for name in names)
    return {
        _MARKS.sub("", name): tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] != "n_averaged"
        and not (attacker and name.removeprefix("module.").startswith("attacker."))
    }


def _as_torchvision_loads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of torchvision's files of DenseNets as its networks do on loading."""
    return {_DENSE_LAYER.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare = {_WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    return bare if len(bare) == len(tensors) else dict(tensors)


def _without_common_component(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the first component of all names if they share it, such as ``1.`` in a Sequential."""
    first = {name.partition(".")[0] for name in tensors}
    if len(first) != 1 or any("." not in name for name in tensors):
        return dict(tensors)
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}


def _renamed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under a `NormalizedModel`'s names, choosing the unwrapping that matches them best."""
    candidates = [
        {name if name in ("mu", "sigma") else f"{prefix}{name}": tensor for name, tensor in unwrapped.items()}
        for unwrapped in _unwrapped(tensors)
        for prefix in ("", "net.")
    ]
    renamed = max(candidates, key=lambda candidate: 2 * len(candidate.keys() & own.keys()) - len(candidate))
    if "net.block1.layer.0.conv1.weight" in own:  # TRADES' WideResNet has an unused block
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("net.sub_block1.")}
    if not {"mu", "sigma"} & renamed.keys():  # one of them alone is reported as a missing name
        renamed |= {name: own[name] for name in ("mu", "sigma")}
    for name in {"mu", "sigma"} & renamed.keys():
        tensor = renamed[name]
        same = tensor.numel() == own[name].numel()
        renamed[name] = tensor.reshape(own[name].shape) if same else tensor
        if tensor.numel() == 1:  # one number for all channels
            renamed[name] = tensor.reshape(1, 1, 1, 1).expand(own[name].shape).clone()
    return renamed
