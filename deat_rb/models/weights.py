"""Loading of state dicts into models, with or without the prefixes of wrappers in their names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from deat_rb.models.spec import NormalizedModel
from deat_rb.utils.errors import DeatError

_STATISTICS = {"mean": "mu", "std": "sigma"}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict into a model, completely or not at all.

    For a `NormalizedModel` the state dict may also be that of the network without normalization, with or without
    ``mu`` and ``sigma`` (or ``mean`` and ``std``); without them the model keeps its own. Names may begin with
    ``module.`` or ``model.``, as those of wrapped networks do.

    Args:
        model: The model.
        tensors: The state dict.
        source: Where the tensors come from, for the error message.

    Raises:
        DeatError: A tensor is missing, unexpected, or of another shape.
    """
    model.load_state_dict(check_weights(model, tensors, source=source))


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return the tensors under the model's own names, checked but not loaded.

    Raises:
        DeatError: A tensor is missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    given = _renamed(tensors, own) if isinstance(model, NormalizedModel) else dict(tensors)
    shapes = [(name, tuple(given[name].shape), tuple(own[name].shape)) for name in own if name in given]
    problems = {
        "missing": [name for name in own if name not in given and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [f"{name} {has} instead of {wants}" for name, has, wants in shapes if has != wants],
    }
    found = [f"{what}: {_and_more(names)}" for what, names in problems.items() if names]
    if found:
        raise DeatError(f"{source} is a checkpoint of another architecture or number of classes ({'; '.join(found)})")
    return {**own, **given}


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under RobustBench's names: without ``module.``, ``model.`` and ``net.``, with mu and sigma."""
    bare: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = re.sub(r"^((module|model|net)\.)+(?=.)", "", name)
        bare.setdefault(_STATISTICS.get(short, short), tensor)
    return bare if len(bare) == len(tensors) else dict(tensors)


def _renamed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under a `NormalizedModel`'s names, whether they have those or the bare network's."""
    plain = {_STATISTICS.get(name, name): tensor for name, tensor in tensors.items()}
    candidates = [
        {name if name in ("mu", "sigma") else f"{prefix}{name}": tensor for name, tensor in given.items()}
        for given in (plain, strip_prefixes(tensors))
        for prefix in ("", "net.")
    ]
    renamed = max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))
    for name in ("mu", "sigma"):
        tensor = renamed.get(name, own[name])
        renamed[name] = tensor.reshape(own[name].shape) if tensor.numel() == own[name].numel() else tensor
    return renamed
