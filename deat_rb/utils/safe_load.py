"""Loads and saves tensors without executing anything in the file."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import atomic_write, read_bytes

MOST_SHARED = 32
"""How often a pickle may name a tuple again: a hash goes through each anew, up to 3 ** (32 / 3) of them in all."""

_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}

_PUTS, _GETS = ({f"{size}{verb}" for size in ("", "BIN", "LONG_BIN")} for verb in ("PUT", "GET"))


def opcodes(pickle: bytes | BinaryIO, source: Path | str) -> Iterator[tuple[str, Any]]:
    """Reads one pickle's opcodes, each with its argument; a file is left behind the pickle's end.

    Args:
        pickle: It, or a file that is at its beginning.
        source: Where it comes from, for messages.

    Raises:
        DeatError: It has tuples that are there again and again: a kilobyte of them, in one another, takes years to
            hash, in torch's safe loader as well.
        ValueError: It is damaged.
    """
    tuples: set[Any] = set()
    on_top, again = False, 0
    for opcode, argument, _ in pickletools.genops(pickle):
        again += opcode.name in _GETS and argument in tuples
        if again > MOST_SHARED:
            raise DeatError(
                f"{source} has tuples in its pickle that are there again and again: in one another, they take years "
                "to hash; save only the weights, with torch.save(model.state_dict(), path)"
            )
        if opcode.name in _PUTS and on_top:
            tuples.add(argument)
        on_top = opcode.name in _TUPLES or (on_top and opcode.name in {"PROTO", *_PUTS})
        yield opcode.name, argument


WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "last")
"""The keys under which training scripts put a state dict beside their epoch and optimiser."""

_ALLOCATES = re.compile(r"bytearray|(Untyped|Typed)Storage|\w*Tensor")
"""What torch's safe unpickler lets a pickle call with any size: a kilobyte may ask for gigabytes."""

_LEGACY_PICKLES = 5
"""Before zip archives, torch.save wrote so many pickles one after the other, and then the values."""


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a state dict as safetensors, atomically; shared and channels_last tensors keep their values."""
    import safetensors.torch

    apart = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    atomic_write(path, safetensors.torch.save(apart, metadata))


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Reads a state dict, of safetensors or of `torch.save`, to the CPU without executing anything in the file.

    One wrapping such as ``{"state_dict": ..., "epoch": ...}`` is taken off, and DDP's prefix ``module.`` as well.

    Raises:
        DeatError: The file is missing, empty, truncated, a web page, a pickle with code, asks for more memory than it
            has bytes, or is no dict of dense tensors of real numbers.
    """
    data = read_bytes(path)
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        raise DeatError(f"{path} is empty")
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise DeatError(f"{path} is a web page, probably a failed download: fetch the checkpoint again")
    is_safetensors = Path(path).suffix == ".safetensors" or data[8:9] == b"{"
    content = _read_safetensors(path, data) if is_safetensors else _read_torch(path, data)
    tensors = _unwrap(path, content)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise DeatError(f"{path} holds no plain numbers in its tensor {name}, which is sparse, quantised, complex "
                            "or empty (meta): save a dense state dict of real numbers")  # fmt: skip
        if tensor.numel() * tensor.element_size() > len(data):
            raise DeatError(f"{path} has {len(data)} bytes, and its tensor {name} says that it takes "
                            f"{tensor.numel() * tensor.element_size()}")  # fmt: skip
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path | str, data: bytes) -> Any:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DeatError(f"{path} is truncated or not a safetensors file ({error})") from error


def _read_torch(path: Path | str, data: bytes) -> Any:
    try:
        for asked in _named_in(path, data):
            if _ALLOCATES.fullmatch(asked.rpartition(" ")[2]):
                raise DeatError(f"{path} has a pickle that makes a {asked.replace(' ', '.')} of any size and was not "
                                "loaded: save only the weights, with torch.save(model.state_dict(), path)")  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch.save does not write
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DeatError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None and not (data.startswith(b"\x80") and "Unsupported operand" in str(error)):
            raise DeatError(f"{path} is truncated or no checkpoint") from error
        raise DeatError(
            f"{path} is a pickle that would run code ({wanted[1] if wanted else 'not written by torch.save'}) and was "
            "not loaded: save only the weights, with torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # torch.load meets damage with anything from EOFError to UnicodeDecodeError
        raise DeatError(f"{path} is truncated or no checkpoint ({_first_line(error)})") from error


def _named_in(path: Path | str, data: bytes) -> Iterator[str]:
    """What a checkpoint's pickles name, each as "module name", found without unpickling them."""
    if data.startswith(b"PK\3\4"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > len(data):
                raise DeatError(
                    f"{path} would grow from {len(data)} to {unpacked} bytes, and torch.save does not compress"
                )
            pickles = [io.BytesIO(archive.read(member)) for member in members if member.filename.endswith(".pkl")]
    else:
        pickles = [io.BytesIO(data)] * _LEGACY_PICKLES
    for file in pickles:
        if file.tell() < len(file.getbuffer()):
            yield from (str(argument) for opcode, argument in opcodes(file, path) if opcode == "GLOBAL")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _unwrap(path: Path | str, content: Any) -> dict[str, Tensor]:
    if _is_state_dict(content):
        return dict(content)
    if isinstance(content, dict):
        for key in WRAPPERS:
            if _is_state_dict(content.get(key)):
                return dict(content[key])
    raise DeatError(
        f"{path} does not hold a state dict, which is a dict of names to tensors; a wrapped one is looked "
        f"for under {', '.join(WRAPPERS)}"
    )


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and values, whatever file, order, device or memory format they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
