"""BatchNorm's batch counters, updated on the host instead of by a kernel per layer and forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Count:
    """Replacement for ``num_batches_tracked``, to which torch's forward adds 1."""

    def __init__(self) -> None:
        self.passes = 0

    def add_(self, passes: int) -> None:
        self.passes += passes


class BatchCounters:
    """Adds a step's forward passes to ``num_batches_tracked`` of all BatchNorm layers at once.

    Layers with ``momentum=None``, whose forward pass reads the counter, and subclasses of torch's layers are skipped.
    """

    def __init__(self) -> None:
        self._counts: list[tuple[Tensor, _Count]] = []

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count forward passes within the context; the layers' counters are updated by `write` and on exit."""
        layers: list[nn.Module] = []
        for layer in model.modules():
            if type(layer) in _LAYERS and layer.momentum is not None:
                counter = layer.num_batches_tracked
                if isinstance(counter, Tensor):
                    layers.append(layer)
                    self._counts.append((counter, _Count()))
        for layer, (_, count) in zip(layers, self._counts, strict=True):
            vars(layer)["num_batches_tracked"] = count  # attribute lookup finds it before the buffer
        try:
            yield
        finally:
            for layer in layers:
                del vars(layer)["num_batches_tracked"]
            self.write()
            self._counts = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore the forward passes within the context."""
        before = [count.passes for _, count in self._counts]
        try:
            yield
        finally:
            for (_, count), passes in zip(self._counts, before, strict=True):
                count.passes = passes

    def write(self) -> None:
        """Add the counted forward passes to the layers' counters."""
        by_passes: dict[int, list[Tensor]] = {}
        for tensor, count in self._counts:
            if count.passes:
                by_passes.setdefault(count.passes, []).append(tensor)
                count.passes = 0
        for passes, tensors in by_passes.items():
            torch._foreach_add_(tensors, passes)
