"""What a run is continued from: everything that training carries along, in one file, written atomically.

A file holds tensors and, in its header, facts as JSON and a checksum over both. Nothing of it is ever executed. Random
generators are not in it: every stream is derived from the seed and the position (law 9).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from deat_rb.errors import DeatError
from deat_rb.files import save_tensors, sha256_tensors

KEEP = 2


@dataclass
class Checkpoint:
    """A position in a run.

    Attributes:
        tensors: By names with a prefix for each owner, such as ``model.`` and ``momentum.``.
        facts: JSON values.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def put(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors under a prefix."""
        self.tensors.update({f"{prefix}.{name}": tensor.detach() for name, tensor in tensors.items()})

    def take(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix."""
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def put_optimizer(self, optimizer: Optimizer) -> None:
        """Adds SGD's momentum, by the position of its parameter."""
        buffers = [optimizer.state[p].get("momentum_buffer") for p in _parameters(optimizer)]
        self.put("momentum", {str(index): buffer for index, buffer in enumerate(buffers) if buffer is not None})

    def take_optimizer(self, optimizer: Optimizer) -> None:
        """Gives SGD its momentum back, in the memory layout of the parameters."""
        buffers = self.take("momentum")
        for index, parameter in enumerate(_parameters(optimizer)):
            if str(index) in buffers:
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffers[str(index)])

    def take_model(self, model: nn.Module) -> None:
        """Gives a model its weights back, in the memory layout it has."""
        model.load_state_dict(self.take("model"))


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint under the next number and keeps the newest two.

    Raises:
        DeatError: If it cannot be written; those before are kept then.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DeatError(f"{folder} cannot be made ({error.strerror}); the run is as it was") from None
    there = _numbered(folder)
    number = int(there[-1].stem) + 1 if there else 1
    facts = json.dumps(checkpoint.facts, allow_nan=False)
    tensors = {name: tensor.cpu() for name, tensor in checkpoint.tensors.items()}
    path = folder / f"{number:08}.safetensors"
    save_tensors(path, tensors, {"facts": facts, "sha256": _digest(facts, tensors)})
    for old in there[: len(there) - KEEP + 1]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest checkpoint that is whole.

    Args:
        folder: Where they are.
        warn: Is told of each that is damaged.

    Returns:
        The checkpoint, or None where there is none yet.

    Raises:
        DeatError: If all that are there are damaged.
    """
    there = _numbered(folder)
    for path in reversed(there):
        try:
            return _read(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            warn(f"{path} is damaged ({error}); the one before it is used")
    if there:
        raise DeatError(f"all checkpoints in {folder} are damaged, so that the run cannot be continued; start it anew")
    return None


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.stem.isdecimal() and not path.is_symlink())


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if _digest(header["facts"], tensors) != header["sha256"]:
        raise ValueError("its checksum does not fit")
    return Checkpoint(tensors, json.loads(header["facts"]))


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(facts.encode() + sha256_tensors(tensors).encode()).hexdigest()
