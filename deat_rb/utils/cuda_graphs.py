"""CUDA graphs, and which networks they may repeat.

A graph repeats the kernels of recorded operations on the same memory, without launching each of them from the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

T = TypeVar("T")

KNOWN = frozenset({"deat_rb", "torch", "torchvision", "timm", "robustbench"})
"""Packages whose networks have no side effects on the host in a forward pass; a graph would not repeat those."""


WARM_UPS = 2
"""Number of runs on the recorder's stream before recording, in which libraries choose and initialize kernels."""


class Recorder(Protocol):
    """Interface of the recorders of functions."""

    def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
        """Run a function where it will be recorded; return its result, and whether it did not wait for the device.

        A function that waits cannot be recorded.
        """
        ...

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record a function without running it; return a function that runs it and the result that runs overwrite."""
        ...


def _has_waited(caught: list[warnings.WarningMessage]) -> bool:
    """Return whether a function waited for the device, and pass on the warnings that are not about that."""
    waited = False
    for each in caught:
        text = str(each.message)
        if "synchronizing CUDA operation" in text:
            waited = True
        elif "Synchronization debug mode is a prototype" not in text:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return waited


class CudaRecorder:
    """Records functions as CUDA graphs.

    Args:
        device: The GPU.
        shared: Whether the graphs share a memory pool: a run overwrites what the others left there, except for results
            that are still referenced. By default each graph has its own memory, which is freed with it.
    """

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle() if shared else None

    def warm_up(self, function: Callable[[], T]) -> tuple[T, bool]:
        """Run a function on the stream on which it will be recorded, watching for synchronization."""
        stream, current = self._stream, torch.cuda.current_stream(self._stream.device)
        mode = torch.cuda.get_sync_debug_mode()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = function()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(stream)
        return result, not _has_waited(caught)

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record a function as a graph."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that writes checkpoints, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def unknown_module(model: nn.Module) -> str | None:
    """Return the first part of a model that may run host operations, which a graph does not repeat; None if none may.

    The result is a noun phrase for messages. User-defined networks and hooks may read values or count batches; the
    networks of `KNOWN` packages do not.
    """
    for module in model.modules():
        if package_of(type(module)) not in KNOWN:
            return f"the module {type(module).__qualname__} of the model"
        if any(_hooks(module)):
            return f"a hook of the module {type(module).__qualname__} of the model"
    return None


def package_of(part: Any) -> str:
    """Return the top-level package in which a class or function is defined."""
    return str(getattr(part, "__module__", "")).partition(".")[0]


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, name, {}).values()
