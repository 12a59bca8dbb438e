"""Execution of training steps, as recorded CUDA graphs or one operation at a time.

Before a graph is run, the batch is copied to fixed tensors. The learning rate is a tensor, and everything that a step
updates (weights, momentum, BatchNorm's statistics, FREE's perturbation) is updated in place. Random numbers are drawn
within the graph from torch's generator, which is seeded before each batch, so that they equal those of an unrecorded
step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deat_rb.training.base import TrainerBase
from deat_rb.training.cuda_graphs import Graphs
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import BatchStats
from deat_rb.training.surrogate_loss import WeightedLoss
from deat_rb.utils.cuda_graphs import KNOWN, WARM_UPS, package_of, unknown_module
from deat_rb.utils.errors import DeatError

MODULE_SETTINGS = ("training", "p", "drop_prob", "momentum", "eps")
"""Settings of modules that a recorded step fixes and a callback may change, such as the probability of dropout."""

Step = Callable[[], BatchStats]


class StepRunner:
    """Runs the training steps of `fit`: as graphs if the engine has `Graphs`, otherwise one operation at a time.

    Only batches of the usual size are recorded. The graph is recorded again when a value that is fixed in it changes:
    the number or size of the attack's steps, a module's mode, a setting of the attack or the optimizer.

    Args:
        trainer: The method and its model.
        engine: Device, precision and ranks.
        optimizer: Optimizer of the model's parameters.
        warn: Called with a sentence if steps that should be recorded cannot be.
    """

    def __init__(
        self,
        trainer: TrainerBase,
        engine: Engine,
        optimizer: Optimizer,
        *,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.trainer = trainer
        self.engine = engine
        self.optimizer = optimizer
        self.warm_ups = WARM_UPS
        self.warn = warn
        self.recordings = 0
        self._key: tuple[Any, ...] | None = None
        self._warmed_up = 0
        self._can_record = True
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._run: Step | None = None
        self._rates = torch.empty(0)
        self._shares: list[float] = []

    def __call__(self, images: Tensor, labels: Tensor, total: int) -> BatchStats:
        """Train on a batch; see `TrainerBase.training_step`.

        Args:
            images: In [0, 1], (N, C, H, W), on the device.
            labels: (N,), on the device.
            total: Number of examples in the global batch.

        Raises:
            DeatError: The step cannot be recorded as a CUDA graph.
        """
        graphs = self.engine.graphs
        if graphs is None or not self._can_record or total < (self.engine.full_batch or 0):
            return self._step(images, labels, total)
        key = (total, images.dtype, images.shape, images.stride(), labels.dtype, *self._settings())
        if key != self._key:
            self._key, self._warmed_up = key, 0
            self._run = self._inputs = None  # frees the memory of the previous graph
            if not graphs.any_code and unknown_parts(self.trainer, self.optimizer) is not None:
                self._can_record = False
                return self._step(images, labels, total)
        if self._warmed_up < self.warm_ups:
            stats, recordable = graphs.warm_up(partial(self._step, images, labels, total))
            self._warmed_up += 1
            # Compiling, in the first step, may wait for the device.
            self._can_record = recordable or (self.engine.compiled and self._warmed_up < self.warm_ups)
            if graphs.any_code and not self._can_record:
                self.warn("--cuda-graphs on has no effect: the training step waits for the device, so that it cannot "
                          "be recorded")  # fmt: skip
            # A step may have set something up that the key refers to, such as FREE's perturbation.
            self._key = (*key[:5], *self._settings())
            return stats
        return self._replay(graphs, images, labels, total)

    @property
    def settled(self) -> bool:
        """Whether further steps like the last one are run as it was: recorded, or never to be recorded."""
        return self.engine.graphs is None or not self._can_record or self._run is not None

    def _step(self, images: Tensor, labels: Tensor, total: int) -> BatchStats:
        with self.engine.training_batch(self.trainer.model, total):
            return self.trainer.training_step(images, labels, self.optimizer, self.engine)

    def _replay(self, graphs: Graphs, images: Tensor, labels: Tensor, total: int) -> BatchStats:
        rate = self.trainer.replay_lr
        if self._run is None or self._inputs is None:
            self._inputs = images.clone(), labels.clone()
            self._run = self._recorded(graphs, total, rate)
        for fixed, given in zip(self._inputs, (images, labels), strict=True):
            fixed.copy_(given)
        if rate is not None:
            for number, share in enumerate(self._shares):
                self._rates[number].fill_(float(rate(share)))  # copying them from the host would wait for the device
        stats = self._run()
        if rate is not None and self._shares:
            set_rate(self.optimizer, rate(self._shares[-1]))
        tensors = {field.name: getattr(stats, field.name) for field in fields(stats)}
        copies: dict[str, Any] = {name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(stats, **copies)

    def _recorded(self, graphs: Graphs, total: int, rate: Callable[[float], float | Tensor] | None) -> Step:
        assert self._inputs is not None
        self._shares = []
        self._rates = torch.zeros(max(self.trainer.steps, 1), device=self.engine.device)
        try:
            if rate is not None:
                self.trainer.set_replay_lr(self._recorded_rate)
            replay, stats = graphs.record(partial(self._step, *self._inputs, total))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise DeatError(
                f"the training step cannot be recorded as a CUDA graph ({reason}); use --cuda-graphs off"
            ) from error
        finally:
            self.trainer.set_replay_lr(rate)
        self._rates = self._rates[: len(self._shares)]
        self.recordings += 1

        def run() -> BatchStats:
            replay()
            return stats

        return run

    def _recorded_rate(self, share: float) -> Tensor:
        """Return the tensor from which the graph reads the learning rate at a fraction ``share`` of the batch."""
        self._shares.append(share)
        return self._rates[len(self._shares) - 1]

    def _settings(self) -> tuple[Any, ...]:
        """Return all settings that a recorded step fixes: all but the batch and the learning rate."""
        model = self.trainer.model
        return (
            self.trainer.step_settings(),
            *(tuple(map(vars(module).get, MODULE_SETTINGS)) for module in model.modules()),
            *(parameter.requires_grad for parameter in model.parameters()),
            *(
                tuple((name, value) for name, value in group.items() if isinstance(value, int | float | tuple | None))
                for group in ({**group, "lr": None, "rate": None} for group in self.optimizer.param_groups)
            ),
        )


def unknown_parts(trainer: TrainerBase, optimizer: Optimizer) -> str | None:
    """Return the first part of a step that may run host operations, which a graph does not repeat; None if none may.

    The result is a noun phrase for messages. User-defined methods, attacks, losses and networks may read values or
    count batches; the networks of known packages do not, see `deat_rb.utils.cuda_graphs.unknown_module`.
    """
    loss = trainer.loss.function
    while isinstance(loss, partial | WeightedLoss):
        loss = loss.func if isinstance(loss, partial) else loss.function
    parts: list[tuple[str, Any]] = [
        ("the method", type(trainer)), ("the attack", type(trainer.crafter)), ("the loss", loss),
    ]  # fmt: skip
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    parts += [("a hook of the optimizer", hook) for hook in hooks]
    for name, part in parts:
        if package_of(part) != "deat_rb":
            return f"{name} {getattr(part, '__qualname__', part)}"
    if package_of(type(optimizer)) not in KNOWN:
        return f"the optimizer {type(optimizer).__qualname__}"
    return unknown_module(trainer.model)
