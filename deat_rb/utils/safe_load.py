"""State dict loading and saving without unpickling code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import atomic_write, read_bytes

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "net", "last", "rmodel", "model_state", "weights", "best",
)  # fmt: skip
"""Keys under which training scripts save the state dict of the model, in order of preference."""

MAX_DEPTH = 3
"""Maximum depth of nested dicts in which state dicts are found."""

SAVE_WEIGHTS = "save only the weights, with torch.save(model.state_dict(), path)"


@dataclass(frozen=True)
class Weights:
    """A state dict read from a file.

    Attributes:
        tensors: Tensors by name, without DDP's prefix ``module.``.
        key: Key of the state dict, such as ``state_dict`` or ``ema.model``; None if the whole file is the dict.
        others: Keys of other state dicts of the same network in the file, such as ``state_dict_ema``.
    """

    tensors: dict[str, Tensor]
    key: str | None = None
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """Note for the user on which of several state dicts was loaded; empty if there is only one."""
        if not self.others:
            return ""
        return (
            f"loaded the weights under '{self.key}'; the file also has {_quoted(self.others)}: "
            "choose with --weights-key"
        )


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Return only the tensors that `load_state_dict` reads."""
    return load_state_dict(path).tensors


def load_state_dict(path: Path | str, weights_key: str | None = None) -> Weights:
    """Read a state dict from a safetensors or `torch.save` file to the CPU.

    In a nested dict such as ``{"state_dict": ..., "epoch": ...}``, it is found under one of the keys `WRAPPERS`, or
    under any other key if there is only one state dict.

    Args:
        path: The file.
        weights_key: The key to load, such as ``state_dict_ema``; dots separate nested keys (``ema.model``).

    Raises:
        DeatError: The file is missing, empty, truncated, a web page or a pickle of objects other than tensors; it has
            no state dict, or several, none of them under a key of `WRAPPERS`; or a tensor is not dense and real.
    """
    data = read_bytes(path)
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        raise DeatError(f"{path} is empty: copy or download it again")
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise DeatError(f"{path} is a web page, probably a failed download: fetch the checkpoint again")
    is_safetensors = Path(path).suffix == ".safetensors" or data[8:9] == b"{"
    content = _read_safetensors(path, data) if is_safetensors else _read_torch(path, data)
    weights = _select(path, content, weights_key)
    for name, tensor in weights.tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise DeatError(
                f"tensor {name} in {path} is sparse, quantized, complex or on the meta device: "
                "save dense tensors of real numbers"
            )
        if tensor.numel() * tensor.element_size() > len(data):
            raise DeatError(
                f"tensor {name} in {path} claims {tensor.numel() * tensor.element_size()} bytes, more than the file's "
                f"{len(data)}: the file is damaged; copy or download it again"
            )
    return weights


def _read_safetensors(path: Path | str, data: bytes) -> Any:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DeatError(
            f"{path} is truncated or not a safetensors file ({error}): copy or download it again"
        ) from error


def _read_torch(path: Path | str, data: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickle protocols that torch.save does not use
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged files torch.load raises many types, from EOFError to UnicodeDecodeError
        if objects := _pickled_objects(data, str(error)):
            raise DeatError(
                f"{path} holds pickled objects ({objects}) and was not loaded, because unpickling can run code: "
                f"{SAVE_WEIGHTS}"
            ) from error
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise DeatError(f"{path} is truncated or not a checkpoint ({cause}): copy or download it again") from error


def _pickled_objects(data: bytes, error: str) -> str:
    """Return the names of classes and functions in a pickle that torch refuses to load, "" for none."""
    with contextlib.suppress(Exception):  # raised for files older than torch 1.6, TorchScript and damaged files
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if named := re.search(r"GLOBAL ([\w.]+)", error):
        return named[1]
    return "not written by torch.save" if data.startswith(b"\x80") and "Unsupported operand" in error else ""


def _select(path: Path | str, content: Any, weights_key: str | None) -> Weights:
    """Return the state dict to load from a file's content."""
    found = dict(_state_dicts(content))
    if weights_key is not None:
        tensors = found.get(weights_key) or _with_prefix(found.get(""), f"{weights_key}.")
        if not tensors:
            raise DeatError(f"{path} has no state dict under '{weights_key}': {_available(found)}")
        key: str | None = weights_key
    elif "" in found:
        tensors, key = found[""], None
    else:
        usual = [key for key in WRAPPERS if key in found]
        candidates = usual or [key for key, each in found.items() if any(tensor.ndim for tensor in each.values())]
        if len(candidates) > 1 and not usual:
            raise DeatError(f"{path} has several state dicts: {_available(found)}")
        if not candidates:
            raise DeatError(f"{path} does not contain a state dict (names mapped to tensors): {SAVE_WEIGHTS}")
        key = candidates[0]
        tensors = found[key]
    ends = _last_parts(tensors)
    others = tuple(other for other, each in found.items() if other not in ("", key) and ends & _last_parts(each))
    return Weights({name.removeprefix("module."): tensor for name, tensor in tensors.items()}, key, others)


def _state_dicts(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts in nested dicts with their dotted keys; the key of the whole content is ""."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield key, dict(content)
    elif depth < MAX_DEPTH:
        for name, value in content.items():
            yield from _state_dicts(value, f"{key}.{name}" if key else name, depth + 1)


def _last_parts(names: Iterable[str]) -> set[str]:
    """Return the last two components of each parameter name, which do not depend on wrapper prefixes."""
    return {".".join(name.split(".")[-2:]) for name in names}


def _with_prefix(tensors: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in (tensors or {}).items() if name.startswith(prefix)}


def _available(found: Mapping[str, object]) -> str:
    keys = [key for key in found if key]
    return f"give --weights-key one of {_quoted(keys)}" if keys else "it is a single state dict; omit --weights-key"


def _quoted(keys: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically; tensors are made contiguous, and shared ones are copied."""
    import safetensors.torch

    contiguous = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    atomic_write(path, safetensors.torch.save(contiguous, metadata))


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, dtypes, shapes and values.

    It does not depend on their order, device or memory format.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
