"""Loading state dicts into models, whatever their names begin with."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from deat_rb.models.spec import NormalizedModel
from deat_rb.utils.errors import DeatError

_STATISTICS = {"mean": "mu", "std": "sigma"}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copies a state dict into a model, all of it or nothing.

    For a `NormalizedModel` the state dict may also be the bare network's, with ``mu`` and ``sigma`` (or ``mean`` and
    ``std``) beside it or not; without them the model's own normalisation stays. Names may begin with ``module.`` or
    ``model.``, as those of wrapped networks do.

    Args:
        model: What to fill.
        tensors: By name.
        source: What the tensors come from, for the error message.

    Raises:
        DeatError: A tensor is missing, unexpected, or of another shape.
    """
    model.load_state_dict(check_weights(model, tensors, source=source))


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Finds out whether `load_weights` would succeed; returns the tensors under the model's own names.

    Raises:
        DeatError: As there.
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
    """Names tensors as RobustBench's classes do: without ``module.``, ``model.`` or ``net.``, with mu and sigma."""
    bare: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = re.sub(r"^((module|model|net)\.)+(?=.)", "", name)
        bare.setdefault(_STATISTICS.get(short, short), tensor)
    return bare if len(bare) == len(tensors) else dict(tensors)


def _renamed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Finds whether the names are a `NormalizedModel`'s or a bare network's, and makes them the former's."""
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
