"""Loading of untrusted weights: safetensors or ``torch.load(weights_only=True)``, checked against the network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from deat_rb.leaderboard.untrusted import read_limited
from deat_rb.models.spec import ModelSpec, NormalizedModel
from deat_rb.models.weights import check_weights
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import load_tensors_into
from deat_rb.utils.safe_load import load_state_dict, load_tensors, save_tensors

MAX_WEIGHTS = 2 * 2**30
"""Largest size of weights in bytes, packed or unpacked; RobustBench's largest, a WRN-94-16 in float32, has 1.5e9."""


def copy_untrusted_weights(source: Path, target: Path, *, weights_key: str | None = None) -> str:
    """Read untrusted weights without executing code and write their tensors as safetensors.

    Args:
        source: A safetensors or `torch.save` file.
        target: The safetensors file to write, in a private folder.
        weights_key: Key of the state dict, as for `load_state_dict`.

    Returns:
        The SHA-256 of the submitted file.

    Raises:
        DeatError: The file is a symlink, too large (packed or unpacked) or damaged, contains anything but tensors, or
            has several state dicts and ``weights_key`` is None.
    """
    data = read_limited(source, MAX_WEIGHTS)
    received = target.with_name(f"received{source.suffix}")
    received.write_bytes(data)
    _check_size(sum(member.file_size for member in _members(received)), source)
    try:
        weights = load_state_dict(received, weights_key)
        if weights.others and weights_key is None:
            keys = ", ".join(f"'{key}'" for key in (weights.key, *weights.others))
            raise DeatError(f"{source} has several state dicts ({keys}): choose one with --weights-key")
    except DeatError as error:  # its message names the copy
        raise DeatError(str(error).replace(str(received), str(source))) from None
    finally:
        received.unlink()
    _check_size(sum(tensor.numel() * tensor.element_size() for tensor in weights.tensors.values()), source)
    save_tensors(target, weights.tensors)
    return hashlib.sha256(data).hexdigest()


def _members(file: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, RuntimeError, ValueError):  # RuntimeError: a version that zipfile does not know
        return []  # not an archive that zipfile reads: loading the weights then says why


def _check_size(size: int, source: Path) -> None:
    if size > MAX_WEIGHTS:
        raise DeatError(f"{source} is too large: it unpacks to {size} bytes (at most {MAX_WEIGHTS})")


def load_checked(path: Path, spec: ModelSpec, *, source: Path) -> NormalizedModel:
    """Build a network in eval mode and load its weights strictly.

    Args:
        path: File written by `copy_untrusted_weights`.
        spec: The declared architecture.
        source: The submitted file, for messages.

    Raises:
        DeatError: Names, shapes, dtypes or the normalization do not match the network, or a value is NaN or infinite.
    """
    with seeding.preserved():
        model = spec.build()
    declared = _normalization(model)
    weights = check_weights(model, load_tensors(path), source=str(source))
    _check_values(model, weights, source)
    load_tensors_into(model, weights)
    if not torch.allclose(declared, _normalization(model), atol=1e-5):
        raise DeatError(f"{source} contains the normalization {_format(_normalization(model))}, but {_format(declared)}"
                        " is declared: submit the matching weights")  # fmt: skip
    return model.eval()


def _normalization(model: NormalizedModel) -> Tensor:
    return torch.stack((model.mu, model.sigma)).clone()


def _format(numbers: Tensor) -> str:
    return f"({', '.join(f'{number:.4g}' for number in numbers.flatten().tolist())})"


def _check_values(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    for name, own in model.state_dict().items():
        tensor = weights[name]
        if tensor.dtype != own.dtype:
            raise DeatError(f"{source} has the tensor {name} in {tensor.dtype} instead of {own.dtype}: convert the "
                            "weights before saving them")  # fmt: skip
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DeatError(f"{source} has NaN or infinity in the tensor {name}: a diverged network cannot be ranked")


def as_safetensors(model: nn.Module) -> bytes:
    """Return a network's state dict as the bytes of a safetensors file; equal weights give equal bytes."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    data: bytes = safetensors.torch.save(dict(sorted(state.items())))
    return data
