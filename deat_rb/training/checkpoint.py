"""Checkpoint files: the whole training state in one safetensors file, written atomically.

The header holds JSON metadata, a SHA-256 of tensors and metadata, and the format version. Equal tensors, such as the
model's and those of the best epoch, are stored once. Loading a checkpoint never executes code. No random number
generator is stored: random numbers are derived from the seed, the epoch and the batch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from deat_rb.training.optimizers import optimizer_tensors
from deat_rb.utils.errors import DeatError, UnwritableError
from deat_rb.utils.files import atomic_write
from deat_rb.utils.safe_load import sha256_tensors

KEEP = 2
"""Number of checkpoints kept per run."""

FORMAT = "3"
"""Format version written by `deat_rb.training.state`; format 1 had no version and no configuration."""

FORMER = "2"
"""Older format version that can still be read; it stores equal tensors repeatedly."""

_NAME = re.compile(r"\d{8}\.safetensors", re.ASCII)


@dataclass
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: Tensors by name, with a prefix such as ``model.`` or ``momentum.``.
        facts: JSON metadata.
        path: File from which it was read, if any.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def put(self, prefix: str, tensors: Mapping[str, Tensor], *, copy: bool = True) -> None:
        """Add tensors under a prefix: contiguous copies in host memory or, without ``copy``, the tensors themselves."""
        added = host_copies(tensors) if copy else tensors
        self.tensors.update({f"{prefix}.{name}": tensor for name, tensor in added.items()})

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, by their names without the prefix."""
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def put_optimizer(self, optimizer: Optimizer) -> None:
        """Add the optimizer's state: SGD's under ``momentum.``, AdamW's under ``exp_avg.`` and so on."""
        for prefix, tensors in _optimizer_state(optimizer).items():
            self.put(prefix, tensors)

    def take_optimizer(self, optimizer: Optimizer) -> None:
        """Load the optimizer's state, in the memory layout of the parameters."""
        state = _optimizer_state(optimizer)
        for prefix in ("momentum", *(state.keys() - {"momentum"})):
            tensors = state.get(prefix, {})
            for name, tensor in self.take_like(prefix, tensors).items():
                tensors[name].copy_(tensor)

    def take_like(self, prefix: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under a prefix.

        Raises:
            ValueError: Their names, types or shapes differ from ``expected``.
        """
        tensors = self.take(prefix)
        for name in sorted(tensors.keys() | expected.keys()):
            stored, needed = _describe(tensors.get(name)), _describe(expected.get(name))
            if stored != needed:
                raise ValueError(f"{prefix}.{name} is {stored}, not {needed}")
        return tensors


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies of tensors in host memory; copies from a GPU are in pinned memory."""
    copies, waits = {}, set()
    for name, tensor in tensors.items():
        on_gpu = tensor.device.type == "cuda"
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        copies[name].copy_(tensor.detach(), non_blocking=on_gpu)
        if on_gpu:
            waits.add(tensor.device)
    for device in waits:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def _optimizer_state(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the optimizer's state, by kind such as ``momentum`` and by index of the parameter."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in optimizer_tensors(optimizer).items():
        prefix, _, index = name.rpartition(".")
        state.setdefault("momentum" if prefix == "momentum_buffer" else prefix, {})[index] = tensor
    return state


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under the next number and delete all but the newest two.

    Raises:
        UnwritableError: The file cannot be written; earlier checkpoints are kept.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UnwritableError(f"{folder} cannot be created ({error.strerror})") from None
    earlier = _numbered(folder)
    number = int(earlier[-1].stem) + 1 if earlier else 1
    facts = json.dumps(checkpoint.facts, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    digests = {name: sha256_tensors({"": tensor}) for name, tensor in tensors.items()}
    first = {digest: name for name, digest in reversed(digests.items())}
    same = {name: first[digest] for name, digest in digests.items() if first[digest] != name}
    header = {"format": FORMAT, "facts": facts, "same": json.dumps(same), "sha256": _digest(facts, digests)}
    path = folder / f"{number:08}.safetensors"
    stored = {name: tensor for name, tensor in tensors.items() if name not in same}
    atomic_write(path, safetensors.torch.save(stored, header))
    for old in earlier[: len(earlier) - KEEP + 1]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Load the newest undamaged checkpoint.

    Args:
        folder: Folder of the checkpoints.
        warn: Called with a message for each damaged checkpoint.

    Returns:
        The checkpoint, or None if there is none yet.

    Raises:
        DeatError: All checkpoints are damaged, or one has an unsupported format version.
    """
    paths = _numbered(folder)
    for path in reversed(paths):
        try:
            return _read(path)
        except DeatError:
            raise
        except _DAMAGED as error:
            warn(f"{path} is damaged ({error}); the previous checkpoint is used instead")
    if paths:
        raise DeatError(f"all checkpoints in {folder} are damaged, so the run cannot be resumed; start a new run")
    return None


_DAMAGED = (SafetensorError, OSError, KeyError, ValueError, RecursionError)
"""Errors that reading a damaged file may raise."""


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.name) and path.is_file())


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        form = header.get("format", "1")
        if "facts" in header and form not in (FORMAT, FORMER):
            raise DeatError(
                f"{path} has checkpoint format {form:.20}, but this version of deat-rb needs format {FORMAT}; "
                "resume with the version that wrote it, or start a new run"
            )
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if form == FORMER:
        digest = hashlib.sha256(header["facts"].encode() + sha256_tensors(tensors).encode()).hexdigest()
    else:
        same = json.loads(header["same"])
        if not isinstance(same, dict):
            raise ValueError("its list of equal tensors is not a JSON object")
        tensors |= {name: tensors[str(stored)] for name, stored in same.items()}
        digest = _digest(header["facts"], {name: sha256_tensors({"": tensor}) for name, tensor in tensors.items()})
    if digest != header["sha256"]:
        raise ValueError("its checksum does not match")
    facts = json.loads(header["facts"])
    if not isinstance(facts, dict):
        raise ValueError("its metadata is not a JSON object")
    return Checkpoint(tensors, facts, path)


def _digest(facts: str, digests: Mapping[str, str]) -> str:
    """Return the checksum of metadata and the digests of the tensors by name."""
    return hashlib.sha256((facts + json.dumps(digests, sort_keys=True)).encode()).hexdigest()
