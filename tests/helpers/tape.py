"""A stand-in for CUDA graphs on a CPU: it records a step's operations and repeats them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal")
"""Operations that a graph cannot record, since the host reads a value or a size in them."""


class Recorder(TorchDispatchMode):
    """Runs and records operations; afterwards, `undo` gives the tensors of the outside their values again."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, Any] = {}
        self._outside: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(look in str(func).partition(".")[2].split(".")[0] for look in LOOKS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        for tensor in tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._outside:
                self._outside[storage.data_ptr()] = storage, storage.clone()
        output = func(*args, **kwargs)
        for tensor in tensors(output):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._outside:
                self._made[storage.data_ptr()] = storage  # kept, so that no other storage gets its address
        self.operations.append((func, args, kwargs, output))
        return output

    def undo(self) -> None:
        for storage, before in self._outside.values():
            storage.copy_(before)

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, output in self.operations:
            if func.is_view or str(func).startswith("aten.empty"):
                continue
            again = func(*args, **kwargs)
            for before, now in zip(tensors(output), tensors(again), strict=True):
                if before.data_ptr() != now.data_ptr():
                    before.copy_(now)


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class TapeRecorder:
    """Implements `deat_rb.utils.cuda_graphs.Recorder` on a CPU; results hold no values until their first repetition."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
        return function(), True

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        recorder = Recorder()
        with torch.random.fork_rng(devices=[]), recorder:
            result = function()
        recorder.undo()
        for tensor in tensors(result):
            tensor.data.fill_(torch.nan)
        self.recorded += 1

        def run() -> None:
            self.repeated += 1
            recorder.repeat()

        return run, result


class TapeGraphs(TapeRecorder):
    """Implements `deat_rb.training.cuda_graphs.Graphs` on a CPU."""

    def __init__(self, any_code: bool = False) -> None:
        super().__init__()
        self.any_code = any_code
