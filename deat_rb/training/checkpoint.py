"""What a run is continued from: everything that training carries along, in one file, written atomically.

A file holds tensors and, in its header, facts as JSON, a checksum over both, and the number of this form. Nothing of it
is ever executed. Random generators are not in it: every stream is derived from the seed and the position (law 9).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from deat_rb.utils.errors import DeatError, UnwritableError
from deat_rb.utils.safe_load import save_tensors, sha256_tensors

KEEP = 2

FORMAT = "2"
"""Of what `deat_rb.position` puts into a checkpoint. 1 had no such number, and no configuration."""

_NAME = re.compile(r"\d{8}\.safetensors", re.ASCII)


@dataclass
class Checkpoint:
    """A position in a run.

    Attributes:
        tensors: By names with a prefix for each owner, such as ``model.`` and ``momentum.``.
        facts: JSON values.
        path: The file it was read from.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

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
        before = [optimizer.state[p].get("momentum_buffer") for p in _parameters(optimizer)]
        kept = self.take_like("momentum", {str(i): buffer for i, buffer in enumerate(before) if buffer is not None})
        for index, parameter in enumerate(_parameters(optimizer)):
            if str(index) in kept:
                optimizer.state[parameter]["momentum_buffer"].copy_(kept[str(index)])

    def take_like(self, prefix: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under a prefix, which have to be those expected: the same names, types and shapes.

        Raises:
            ValueError: They are not.
        """
        found = self.take(prefix)
        for name in sorted(found.keys() | expected.keys()):
            said, meant = (_described(tensors.get(name)) for tensors in (found, expected))
            if said != meant:
                raise ValueError(f"{prefix}.{name} is {said}, not {meant}")
        return found


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint under the next number and keeps the newest two.

    Raises:
        UnwritableError: If it cannot be written; those before are kept then.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UnwritableError(f"{folder} cannot be made ({error.strerror})") from None
    there = _numbered(folder)
    number = int(there[-1].stem) + 1 if there else 1
    facts = json.dumps(checkpoint.facts, allow_nan=False)
    tensors = {name: tensor.cpu() for name, tensor in checkpoint.tensors.items()}
    path = folder / f"{number:08}.safetensors"
    save_tensors(path, tensors, {"format": FORMAT, "facts": facts, "sha256": _digest(facts, tensors)})
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
        DeatError: If all that are there are damaged, or one has another form than this version's.
    """
    there = _numbered(folder)
    for path in reversed(there):
        try:
            return _read(path)
        except DeatError:
            raise
        except _DAMAGES as error:
            warn(f"{path} is damaged ({error}); the one before it is used")
    if there:
        raise DeatError(f"all checkpoints in {folder} are damaged, so that the run cannot be continued; start it anew")
    return None


_DAMAGES = (SafetensorError, OSError, KeyError, ValueError, RecursionError)
"""What reading a damaged file may raise."""


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.name) and path.is_file())


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        form = header.get("format", "1")
        if "facts" in header and form != FORMAT:
            raise DeatError(
                f"{path} is a checkpoint of form {form:.20} and this version of deat-rb goes on from form {FORMAT}; "
                "go on with the version that wrote it, or start a new run"
            )
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if _digest(header["facts"], tensors) != header["sha256"]:
        raise ValueError("its checksum does not fit")
    facts = json.loads(header["facts"])
    if not isinstance(facts, dict):
        raise ValueError("its facts are no JSON object")
    return Checkpoint(tensors, facts, path)


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(facts.encode() + sha256_tensors(tensors).encode()).hexdigest()
