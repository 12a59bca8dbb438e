"""Exponential moving average of a model's weights and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers, updated after every optimizer step.

    With t the number of updates so far, the average is multiplied by min(``decay``, (1 + t) / (10 + t)), the warm-up of
    TensorFlow's ExponentialMovingAverage, so that the initial weights do not linger in the average of a short run.
    Integer tensors, such as BatchNorm's counters, are copied.

    torch.optim.swa_utils.AveragedModel is not used: it copies the whole module, with its hooks and compiled forward;
    averages the integer counters as well; and takes the decay from a count on the CPU, which a CUDA graph would freeze.

    Args:
        model: The model, on its device; its current tensors are the initial average.
        decay: The decay, in (0, 1).

    Attributes:
        tensors: The averages by name, on the model's device.
        updates: Number of updates so far, as a float32 scalar on the device, to avoid a device sync.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._slots = dict(_slots(model))
        self.tensors = {name: tensor.clone() for name, tensor in self._current().items()}
        self.updates = torch.zeros((), device=next(model.parameters()).device)

    def _current(self) -> dict[str, Tensor]:
        """Return the model's tensors; they are looked up each time because a module may replace a buffer."""
        return {name: tensors[key].detach() for name, (tensors, key) in self._slots.items()}

    def update(self) -> None:
        """Add the model's current tensors to the average."""
        weight = (9 / (10 + self.updates)).clamp(min=1 - self.decay)  # 1 - (1 + t) / (10 + t) without cancellation
        current = self._current()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        averages = [self.tensors[name] for name in floats]
        changes = torch._foreach_sub([current[name] for name in floats], averages)
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(current[name])
        self.updates += 1

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call `update`; a hook for `torch.optim.Optimizer.register_step_post_hook`."""
        self.update()

    def buffers(self) -> list[Tensor]:
        """Return the averages of the model's buffers."""
        return [self.tensors[name] for name, (tensors, key) in self._slots.items() if not _is_parameter(tensors[key])]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Set the model's tensors to the averages within the context, and restore its own on exit."""
        current = self._current()
        own = {name: tensor.clone() for name, tensor in current.items()}
        try:
            _copy(self.tensors, current)
            yield
        finally:
            _copy(own, self._current())

    def load(self, tensors: Mapping[str, Tensor], updates: Tensor) -> None:
        """Restore ``tensors`` and ``updates``."""
        _copy(tensors, self.tensors)
        self.updates.copy_(updates)


def _slots(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Tensor], str]]]:
    """Yield each parameter and persistent buffer as its name, dict and key; those of shared modules only once."""
    for prefix, module in model.named_modules():
        persistent = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        places = chain(((module._parameters, key) for key in module._parameters),
                       ((module._buffers, key) for key in persistent))  # fmt: skip
        for tensors, key in places:
            if tensors[key] is not None:
                yield f"{prefix}.{key}".removeprefix("."), (tensors, key)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
