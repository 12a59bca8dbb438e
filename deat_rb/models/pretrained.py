"""Pretrained networks: RobustBench's model zoo, torchvision and timm weights, and user functions."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deat_rb.data.normalization import Normalization
from deat_rb.models.check import first_line
from deat_rb.models.names import suggest
from deat_rb.models.spec import NormalizedModel
from deat_rb.utils import compat
from deat_rb.utils.downloads import why_failed
from deat_rb.utils.errors import DeatError
from deat_rb.utils.libraries import import_timm
from deat_rb.utils.safe_load import load_tensors

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def zoo_file(name: str, *, dataset: str, norm: str, model_dir: str | Path) -> Path:
    """Return the path where `robustbench.load_model` stores a model's weights."""
    return Path(model_dir) / dataset / norm / f"{name}.pt"


def zoo_classes(dataset: str) -> tuple[str, ...]:
    """Return the class names of one of RobustBench's datasets in the order of the logits; empty if unknown."""
    return CIFAR10_CLASSES if dataset == "cifar10" else ()


def load_zoo_model(name: str, *, dataset: str, norm: str = "Linf", model_dir: str | Path = "models") -> nn.Module:
    """Load a model of RobustBench's zoo from its file, without downloading it or executing code in it.

    Args:
        name: Name of the model, such as ``Wong2020Fast``.
        dataset: RobustBench dataset: cifar10, cifar100 or imagenet.
        norm: Threat model: ``Linf`` or ``L2``.
        model_dir: Folder of the files ``<dataset>/<norm>/<name>.pt``, as for `robustbench.load_model`.

    Returns:
        The model in eval mode; it takes images in [0, 1].

    Raises:
        DeatError: RobustBench has no such model, or no file of it, or several; or the file is missing or damaged, or
            has no tensor for some of the network's weights.
    """
    compat.check_dataset(dataset)
    compat.robustbench()
    enums: Any = importlib.import_module("robustbench.model_zoo.enums")
    utils: Any = importlib.import_module("robustbench.utils")
    entries: Any = (
        importlib.import_module("robustbench.model_zoo.models")
        .model_dicts[enums.BenchmarkDataset(dataset)]
        .get(enums.ThreatModel(norm), {})
    )
    if name not in entries:
        raise DeatError(f"RobustBench has no {norm} model '{name}' of {dataset}: {suggest(name, entries)}")
    if isinstance(entries[name]["gdrive_id"], list):
        raise DeatError(f"RobustBench's {name} consists of several files: load it with robustbench.load_model and pass "
                        "the model to deat_rb.evaluate")  # fmt: skip
    if not entries[name]["gdrive_id"]:
        raise DeatError(f"RobustBench has no file of {name}, whose weights come from another package: load it with "
                        "robustbench.load_model and pass the model to deat_rb.evaluate")  # fmt: skip
    file = zoo_file(name, dataset=dataset, norm=norm, model_dir=model_dir)
    if not file.is_file():
        raise DeatError(f"the weights of RobustBench's {name} are not at {file}: download them with "
                        "robustbench.load_model, or give their folder with --model-dir")  # fmt: skip
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_tensors(file).items()}
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = entries[name]["model"]()
    if dataset == "imagenet":
        tensors = _named_as_in(model, tensors)
    own = model.state_dict()
    # robustbench ignores missing tensors of its ImageNet models and of some others if their normalization is missing.
    if missing := [key for key in own if key not in tensors and key.rpartition(".")[2] not in _NOT_IN_FILES]:
        raise DeatError(f"{file} does not contain the weights of RobustBench's {name}: {len(missing)} of {len(own)} "
                        f"tensors are missing, such as {missing[0]}")  # fmt: skip
    try:
        model = utils._safe_load_state_dict(model, name, tensors, enums.BenchmarkDataset(dataset))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise DeatError(f"{file} does not contain the weights of RobustBench's {name}: {first}") from None
    return model.eval()


_NOT_IN_FILES = ("mu", "sigma", "mean", "std", "num_batches_tracked")
"""Ends of the names of tensors that a file may lack: constants of a normalization, and BatchNorm's counters."""


def _named_as_in(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of an ImageNet model by the names of the network, as `robustbench.load_model` does.

    The files have the names of the bare network, which most models wrap in ``Sequential(normalize, model)``. Files of
    Swin networks may have the names of older versions of timm.
    """
    wrapped = any(key.startswith("model.") for key in model.state_dict())
    net: nn.Module = model.get_submodule("model") if wrapped else model
    if type(net).__name__ == "SwinTransformer" and not net.state_dict().keys() <= tensors.keys():
        swin: Any = importlib.import_module("timm.models.swin_transformer")
        tensors = swin.checkpoint_filter_fn(tensors, net)
    return {f"model.{key}": tensor for key, tensor in tensors.items()} if wrapped else tensors


def load_pretrained(target: str) -> tuple[nn.Module, tuple[int, int], tuple[str, ...]]:
    """Load ``torchvision:NAME`` or ``timm:NAME`` with pretrained weights and the normalization as a layer.

    The package downloads the weights unless they are in its cache.

    Returns:
        The model in eval mode, which takes images in [0, 1]; the (height, width) of its training images; and the class
        names in the order of the logits, empty if the package does not have them.

    Raises:
        DeatError: The model is unknown or has no weights, or they cannot be downloaded.
    """
    net, mean, std, size, classes = _from_library(target, "use a state dict with --arch")
    return NormalizedModel(net, mean, std).eval(), size, classes


def library_weights(arch: str) -> dict[str, Tensor]:
    """Return the pretrained weights of a ``torchvision:NAME`` or ``timm:NAME`` as a state dict.

    The package downloads them unless they are in its cache.

    Raises:
        DeatError: The model is unknown or has no weights, or they cannot be downloaded.
    """
    tensors: dict[str, Tensor] = _from_library(arch, "give their file with --weights")[0].state_dict()
    return tensors


def library_input(arch: str) -> tuple[Normalization, int]:
    """Return the normalization and the image size of pretrained weights, without downloading them.

    Args:
        arch: ``torchvision:NAME`` or ``timm:NAME``.

    Returns:
        Mean and standard deviation, and the height and width of the images that the weights were trained on.

    Raises:
        DeatError: The model is unknown or has no weights.
    """
    kind, _, name = arch.partition(":")
    if kind == "torchvision":
        _, mean, std, (size, _), _ = _torchvision_preset(name)
        return (mean, std), size
    timm = import_timm()
    if not timm.is_model(name):
        raise DeatError(f"timm has no model '{name}': {suggest(name, timm.list_models())}")
    try:
        known: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot is unknown
        raise DeatError(f"timm:{name} is unknown ({first_line(error)}): see timm's list of weights") from error
    if known is None or not known.has_weights:
        raise DeatError(f"timm:{name} has no pretrained weights: omit --pretrained, or choose another --arch")
    return (tuple(known.mean), tuple(known.std)), int(known.input_size[1])


Pretrained = tuple[nn.Module, tuple[float, ...], tuple[float, ...], tuple[int, int], tuple[str, ...]]
"""A network, the mean and standard deviation of its normalization, its image size (H, W) and its class names."""

Preset = tuple[Any, tuple[float, ...], tuple[float, ...], tuple[int, int], tuple[str, ...]]


def _from_library(target: str, alternative: str) -> Pretrained:
    """Load a network with pretrained weights; ``alternative`` says what to do if they cannot be downloaded."""
    kind, _, name = target.partition(":")
    try:
        return _torchvision(name) if kind == "torchvision" else _timm(name)
    except DeatError:
        raise
    except Exception as error:  # any exception: a download fails in many ways
        raise DeatError(f"the weights of {target} cannot be loaded ({why_failed(error)}): download them "
                        f"once with internet access, or {alternative}") from error  # fmt: skip


def _torchvision_preset(name: str) -> Preset:
    """Return the default weights of a classifier with their normalization, image size and classes."""
    from torchvision import models

    if name not in models.list_models():
        raise DeatError(f"torchvision has no model '{name}': {suggest(name, models.list_models())}")
    choices = models.get_model_weights(name)
    weights = getattr(choices, "DEFAULT", None)
    preset: Any = None if weights is None else weights.transforms()
    if not hasattr(preset, "mean") or not hasattr(preset, "crop_size"):
        raise DeatError(f"torchvision:{name} is not a classifier with pretrained weights: use a state dict with --arch")
    side = preset.crop_size[-1]
    classes = tuple(getattr(weights, "meta", {}).get("categories", ()))
    return weights, tuple(preset.mean), tuple(preset.std), (side, side), classes


def _torchvision(name: str) -> Pretrained:
    from torchvision import models

    weights, mean, std, size, classes = _torchvision_preset(name)
    return models.get_model(name, weights=weights), mean, std, size, classes


def _timm(name: str) -> Pretrained:
    timm = import_timm()
    if not timm.is_model(name):
        raise DeatError(f"timm has no model '{name}': {suggest(name, timm.list_models())}")
    net: nn.Module = timm.create_model(name, pretrained=True)
    known: dict[str, Any] = getattr(net, "pretrained_cfg", {})
    _, height, width = known["input_size"]
    return net, tuple(known["mean"]), tuple(known["std"]), (height, width), ()


def load_from_factory(target: str) -> nn.Module:
    """Return the trained network that ``package.module:function`` returns; this runs that module's code.

    Raises:
        DeatError: The function cannot be imported or called without arguments, or does not return a network.
    """
    module_name, _, function = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # any exception: third-party code
        raise DeatError(f"'{target}' cannot be imported ({first_line(error)}): give package.module:function of a "
                        "module on the Python path (PYTHONPATH=. adds the current folder)") from error  # fmt: skip
    try:
        model = factory()
    except Exception as error:  # any exception: third-party code
        raise DeatError(f"'{target}' failed ({type(error).__name__}: {first_line(error)}): give a function that takes "
                        "no argument and returns a trained network") from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise DeatError(f"'{target}' returned a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()
