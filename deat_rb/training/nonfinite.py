"""Watches that training stays finite, without waiting for the device, and undoes a batch that is not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import SGD

if TYPE_CHECKING:
    from deat_rb.training.base import TrainerBase
    from deat_rb.training.engine import Engine
    from deat_rb.training.metrics import BatchStats


WATCHED = ("the loss", "l_X", "a gradient")

ON_NONFINITE = ("stop", "skip")


class NonFiniteMonitor:
    """Notes, on the device, at which batch of an epoch something was first not finite."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def note(self, stats: BatchStats, model: nn.Module, batch: int) -> Tensor:
        """Takes a batch's figures and the weights after it, which a gradient that is not finite has spoilt.

        Returns:
            Whether each of `WATCHED` is finite, (3,) bool on the device.
        """
        norm = get_total_norm([parameter.detach() for parameter in model.parameters()])
        finite = torch.stack([stats.loss.isfinite(), stats.l_x.isfinite().to(stats.loss.device), norm.isfinite()])
        if self._first is None:
            self._first = torch.full_like(finite, -1, dtype=torch.long)
        self._first = torch.where(finite | (self._first >= 0), self._first, batch)
        return finite

    def found(self) -> tuple[int, str] | None:
        """The first batch, from 1, at which something was not finite, and what it was; waits for the device."""
        seen = [] if self._first is None else self._first.tolist()
        bad = [(batch + 1, what) for batch, what in zip(seen, WATCHED, strict=False) if batch >= 0]
        return min(bad, key=lambda each: each[0]) if bad else None


class Snapshot:
    """How everything that a batch changes was before it."""

    def __init__(self, trainer: TrainerBase, optimizer: SGD, engine: Engine) -> None:
        self._trainer, self._engine = trainer, engine
        self._model = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
        self._momentum = [(buffer, buffer.clone()) for buffer in buffers]
        self._tensors = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
        self._facts: tuple[dict[str, Any], dict[str, Any]] = copy.deepcopy(
            (trainer.state_dict(), engine.scaler.state_dict())
        )

    def __call__(self) -> None:
        """Puts it back."""
        self._trainer.model.load_state_dict(self._model)
        for buffer, before in self._momentum:
            buffer.copy_(before)
        trainer_facts, scaler_facts = self._facts
        self._trainer.load_state_dict(trainer_facts, self._tensors)
        if scaler_facts:
            self._engine.scaler.load_state_dict(scaler_facts)
