"""Networks that others have trained: RobustBench's zoo, torchvision's and timm's weights, and functions of a module."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.models.spec import NormalizedModel
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.safe_load import load_tensors


def zoo_file(name: str, *, dataset: str, norm: str, model_dir: str | Path) -> Path:
    """Where `robustbench.load_model` has a model's weights."""
    return Path(model_dir) / dataset / norm / f"{name}.pt"


def load_zoo_model(name: str, *, dataset: str, norm: str = "Linf", model_dir: str | Path = "models") -> nn.Module:
    """Loads a model of RobustBench's zoo from its file, which is neither fetched nor allowed to run code.

    Args:
        name: Such as ``Wong2020Fast``.
        dataset: One of RobustBench's: cifar10, cifar100 or imagenet.
        norm: Of the threat model: ``Linf`` or ``L2``.
        model_dir: As for `robustbench.load_model`: the file is ``<model_dir>/<dataset>/<norm>/<name>.pt``.

    Raises:
        DeatError: RobustBench has no such model, it is made of several files, or its file is missing or damaged.
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
        raise DeatError(f"RobustBench has no {norm} model '{name}' of {dataset}: {_few(did_you_mean(name, entries))}")
    if isinstance(entries[name]["gdrive_id"], list):
        raise DeatError(f"RobustBench's {name} is made of several files: load it by robustbench.load_model and give "
                        "the object to deat_rb.evaluate")  # fmt: skip
    file = zoo_file(name, dataset=dataset, norm=norm, model_dir=model_dir)
    if not file.is_file():
        raise DeatError(f"the weights of RobustBench's {name} are not at {file}: fetch them by robustbench.load_model, "
                        "or say with --model-dir where they are")  # fmt: skip
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_tensors(file).items()}
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = entries[name]["model"]()
    try:
        model = utils._safe_load_state_dict(model, name, tensors, enums.BenchmarkDataset(dataset))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise DeatError(f"{file} does not hold the weights of RobustBench's {name}: {first}") from None
    return model.eval()


def load_pretrained(target: str) -> tuple[nn.Module, tuple[int, int]]:
    """Loads ``torchvision:NAME`` or ``timm:NAME`` with the weights that the package offers, normalisation inside.

    The package fetches them where it has not done so before.

    Returns:
        The model, which takes images in [0, 1], and the (height, width) that it was trained for.

    Raises:
        DeatError: There is no such model, it has no weights, or they cannot be had.
    """
    kind, _, name = target.partition(":")
    try:
        net, mean, std, size = _torchvision(name) if kind == "torchvision" else _timm(name)
    except DeatError:
        raise
    except Exception as error:  # whatever lies between here and the server
        raise DeatError(f"the weights of {target} cannot be had ({type(error).__name__}: {_first_line(error)}): fetch "
                        "them once where there is a network, or give a state dict with --arch") from error  # fmt: skip
    return NormalizedModel(net, mean, std).eval(), size


Pretrained = tuple[nn.Module, tuple[float, ...], tuple[float, ...], tuple[int, int]]


def _torchvision(name: str) -> Pretrained:
    from torchvision import models

    if name not in models.list_models():
        raise DeatError(f"torchvision has no model '{name}': {_few(did_you_mean(name, models.list_models()))}")
    choices = models.get_model_weights(name)
    weights = getattr(choices, "DEFAULT", None)
    preset: Any = None if weights is None else weights.transforms()
    if not hasattr(preset, "mean") or not hasattr(preset, "crop_size"):
        raise DeatError(f"torchvision:{name} is no classifier with weights: give a state dict with --arch")
    side = preset.crop_size[-1]
    return models.get_model(name, weights=weights), tuple(preset.mean), tuple(preset.std), (side, side)


def _timm(name: str) -> Pretrained:
    import timm

    if not timm.is_model(name):
        raise DeatError(f"timm has no model '{name}': {_few(did_you_mean(name, timm.list_models()))}")
    net: nn.Module = timm.create_model(name, pretrained=True)
    known: dict[str, Any] = getattr(net, "pretrained_cfg", {})
    _, height, width = known["input_size"]
    return net, tuple(known["mean"]), tuple(known["std"]), (height, width)


def load_from_factory(target: str) -> nn.Module:
    """Calls ``package.module:function``, which runs code of that module; it is to return a trained network.

    Raises:
        DeatError: It cannot be imported or called, or returns something else.
    """
    module_name, _, function = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # somebody else's code
        raise DeatError(f"'{target}' cannot be imported ({_first_line(error)}): give package.module:function of "
                        "something on the Python path that takes no argument") from error  # fmt: skip
    try:
        model = factory()
    except Exception as error:  # likewise
        raise DeatError(f"'{target}' failed ({type(error).__name__}: {_first_line(error)}): give a function that takes "
                        "no argument and returns a trained network") from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise DeatError(f"'{target}' gave a {type(model).__name__} where a torch.nn.Module is needed")
    return model.eval()


def check_accepts_images(model: nn.Module, shape: tuple[int, int, int], classes: int, source: str) -> int:
    """Lets a model classify two black images of (C, H, W), and gives the number of its logits.

    Raises:
        DeatError: It does not take them, or has fewer logits than there are ``classes``.
    """
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except Exception as error:  # somebody else's code
        raise DeatError(f"{source} does not take images of {'x'.join(map(str, shape))} ({_first_line(error)}): give "
                        "other data or another model") from error  # fmt: skip
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < classes:
        raise DeatError(f"{source} returns {found} for 2 images of {'x'.join(map(str, shape))}, where (2, {classes}) "
                        "is needed: give other data or another model")  # fmt: skip
    return int(logits.shape[1])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _few(sentence: str) -> str:
    return sentence if len(sentence) < 200 else "its documentation lists them"
