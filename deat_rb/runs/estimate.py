"""Estimate of a run's time and memory from a few timed batches."""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deat_rb.methods.registry import create
from deat_rb.methods.schedules import AccuracyThreshold, GradientMagnitude
from deat_rb.runs.plan import TrainingPlan
from deat_rb.training.callbacks import Callback
from deat_rb.training.engine import Engine
from deat_rb.training.fit import fit
from deat_rb.training.metrics import EpochAccumulator
from deat_rb.training.schedule import Schedule
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.options import OPEN

BATCHES = 10
"""Number of timed batches, after one warm-up batch."""

LIMIT = 20.0
"""Time limit in seconds, after which no further batch is timed."""

VALIDATION_PASSES = 22
"""Passes per validation image: the clean one, PGD-20, and the final prediction."""


@dataclass(frozen=True)
class Estimate:
    """Estimated time and memory of a run.

    Attributes:
        low: Shortest training time with validation in seconds, without loading the data.
        high: Longest time; differs from ``low`` if a schedule determines the number of steps.
        timed: Seconds per training batch, by number of attack steps.
        batches: Number of timed batches per number of attack steps.
        memory: Peak memory in bytes: of the GPU, or of the process.
        device: The device.
        may_end_earlier: Whether a stopping rule, patience, or an attack that stops early, may make the run shorter.
    """

    low: float
    high: float
    timed: dict[int, float]
    batches: int
    memory: int
    device: str
    may_end_earlier: bool


def estimate(planned: TrainingPlan) -> Estimate:
    """Time a few training batches of a plan on its device; the plan's model is not changed.

    For an open-ended run it is the time of one epoch.

    Batches are timed with the first epoch's number of attack steps and, if a schedule raises it, with the highest; the
    time of other numbers of steps is interpolated. AWP is timed as if it began with the first epoch. Validation is
    computed from the time of a pass. With several ranks or torch.compile, the time is that of one rank without
    compilation.

    Args:
        planned: The plan.

    Raises:
        DeatError: Training cannot be started with these options.
    """
    config, trainer = planned.config, planned.trainer
    optim = config.optim
    epochs = 1 if optim.epochs == OPEN else optim.epochs
    device = resolve_device(config.runtime.device)
    low, high = _total_steps(trainer.schedule, epochs)
    timed: dict[int, float] = {}
    passes = 1.0
    first, last = trainer.schedule.steps, _last_steps(trainer.schedule, epochs)
    batches, memory = BATCHES, 0
    for steps in sorted({first, last}):
        watch, peak = _timed(planned, steps if first != last else None, device)
        timed[steps] = watch.batch_seconds
        passes, batches, memory = watch.passes, min(batches, watch.count), max(memory, peak)
    slope = (timed[last] - timed[first]) / (last - first) if last != first else 0.0
    base = timed[first] - slope * first
    validated = len(planned.val) * (2 if optim.ema else 1)
    validations = 1 / optim.validate_every if optim.epochs == OPEN else -(-epochs // optim.validate_every)
    validation = validations * validated * VALIDATION_PASSES * timed[last] / passes / config.data.batch_size
    shortest, longest = (planned.batches * (base * epochs + slope * total) + validation for total in (low, high))
    early = optim.patience is not None or (trainer.stopping is not None and optim.early_stopping)
    return Estimate(
        shortest, longest, timed, batches, memory, str(device),
        may_end_earlier=early or getattr(trainer.crafter, "tau", None) is not None,
    )  # fmt: skip


def _total_steps(schedule: Schedule, epochs: int) -> tuple[int, int]:
    """Return the minimum and maximum of the attack's total steps over all epochs."""
    known = schedule.total_steps(epochs)
    if known is not None:
        return known, known
    most = schedule.steps + epochs if schedule.max_steps is None else schedule.max_steps
    after = min(schedule.steps + (1 if type(schedule) is GradientMagnitude else 0), most)
    low = schedule.steps + after * (epochs - 1)
    rises = type(schedule) in (GradientMagnitude, AccuracyThreshold)
    return low, sum(min(schedule.steps + epoch, most) for epoch in range(epochs)) if rises else low


def _last_steps(schedule: Schedule, epochs: int) -> int:
    """Return the maximum number of steps that a schedule can reach."""
    totals = [_total_steps(schedule, count)[1] for count in (epochs - 1, epochs)] if epochs > 1 else [0, schedule.steps]
    return totals[1] - totals[0]


def _timed(planned: TrainingPlan, steps: int | None, device: torch.device) -> tuple[_Stopwatch, int]:
    """Train a copy of the model on one batch, several times, and return the times and the peak memory in bytes."""
    config = planned.config
    options = config.method_options() | {"awp_warmup": None}
    if steps is not None:
        options |= {"steps": steps, "max_steps": max(steps, planned.trainer.schedule.max_steps or steps)}
    trainer = create(config.attack.method, copy.deepcopy(planned.trainer.model), eps=config.attack.eps, **options)
    images, labels = planned.train.first(min(config.data.batch_size, len(planned.train))).tensors()
    images = images.contiguous(memory_format=torch.channels_last)  # as in training
    watch = _Stopwatch(device)
    optim = {**dict(config.optim), "epochs": 1, "lr_epochs": None, "warmup_epochs": 0, "select": "last"}
    runtime = {**dict(config.runtime), "compile": False, "sync_bn": False}
    few = [(images[:8], labels[:8])]  # for stopping rules that need some
    with contextlib.suppress(_EnoughError):
        fit(trainer, _SameBatch(images, labels, len(planned.train)), few, callbacks=[watch], **optim, **runtime)
    return watch, Engine(device, "fp32").peak_memory()


class _SameBatch(list[tuple[Tensor, Tensor]]):
    """Loader that repeats a batch of some of the training images."""

    def __init__(self, images: Tensor, labels: Tensor, number_of_images: int) -> None:
        super().__init__([(images, labels)] * (BATCHES + 1))
        self.number_of_images = number_of_images

    def positions(self, epoch: int, batch: int) -> Tensor:
        """Return the positions of the images of a batch among the training images."""
        return torch.arange(len(self[batch][0]))


class _EnoughError(Exception):
    """Raised to end the timing."""


@dataclass
class _Stopwatch(Callback):
    """Times batches, without the first one unless it is the only one."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    passes: float = 1.0
    _began: float = 0.0

    @property
    def count(self) -> int:
        return max(len(self.seconds) - 1, 1)

    @property
    def batch_seconds(self) -> float:
        timed = self.seconds[1:] or self.seconds
        return sum(timed) / len(timed)

    def on_batch_start(self) -> None:
        """Start the clock."""
        self._synchronize()
        self._began = time.perf_counter()

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Stop the clock; end the timing after the time limit."""
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.passes = max(sums.read()["backwards"] / sums.batches, 1.0)
        if sum(self.seconds) > LIMIT or len(self.seconds) > BATCHES:
            raise _EnoughError

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
