"""Timing of batches and passes of a run's network, and the estimate of a run's time and memory from them."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from deat_rb.attacks.functional import logits_and_gradient
from deat_rb.attacks.losses import cross_entropy
from deat_rb.methods.registry import create
from deat_rb.runs.plan import TrainingPlan
from deat_rb.training.callbacks import Callback
from deat_rb.training.engine import Engine
from deat_rb.training.fit import fit
from deat_rb.training.metrics import EpochAccumulator
from deat_rb.utils.cuda_graphs import WARM_UPS
from deat_rb.utils.devices import resolve_device, wait_for
from deat_rb.utils.options import OPEN

BATCHES = 10
"""Number of timed batches, after those of the warm-up."""

LIMIT = 20.0
"""Time limit in seconds, after which no further batch is timed."""

VALIDATION_PASSES = 14
"""Mean passes of PGD-20 per validation image; misclassified images are not attacked further."""


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
    time of other numbers of steps is interpolated. AWP is timed as if it began with the first epoch. The time of
    validation is derived from that of a pass. With several ranks or torch.compile, the time is that of one rank without
    compilation.

    Args:
        planned: The plan.

    Raises:
        DeatError: Training cannot be started with these options.
    """
    config, trainer, epochs = planned.config, planned.trainer, estimated_epochs(planned)
    bounds = trainer.step_bounds(epochs) or [(trainer.steps, trainer.steps)] * epochs
    low, high = (sum(each) for each in zip(*bounds, strict=True))
    first, most = trainer.steps, max(most for _, most in bounds)
    times = time_batches(planned, sorted({first, most}))
    validation_pass = times.seconds[most] / times.passes
    shortest, longest = (
        training_seconds(planned, times.update, times.step, total, validation_pass) for total in (low, high)
    )
    return Estimate(
        shortest, longest, times.seconds, times.batches, times.memory, str(resolve_device(config.runtime.device)),
        may_end_earlier=planned.may_end_early,
    )  # fmt: skip


def estimated_epochs(planned: TrainingPlan) -> int:
    """Return the number of epochs whose time is estimated: all, or one of an open-ended run."""
    return 1 if planned.config.optim.epochs == OPEN else planned.config.optim.epochs


def training_seconds(
    planned: TrainingPlan, update: float, step: float, total_steps: float, validation_pass: float
) -> float:
    """Return the seconds that training and validation, also on test images for a curve, take.

    Of an open-ended run, they are those of one epoch.

    Args:
        planned: The plan of the run.
        update: Seconds per batch without its attack steps.
        step: Seconds per batch and attack step.
        total_steps: Attack steps per batch, summed over the epochs.
        validation_pass: Seconds per forward and backward pass over a batch in validation.
    """
    optim, epochs = planned.config.optim, estimated_epochs(planned)
    validations = 1 / optim.validate_every if optim.epochs == OPEN else -(-epochs // optim.validate_every)
    images = validations * len(planned.val) * (2 if optim.ema else 1)  # averaged and raw weights
    images += epochs * (planned.config.output.curve_test or 0)
    validation = images * VALIDATION_PASSES * validation_pass / planned.config.data.batch_size
    return planned.batches * (update * epochs + step * total_steps) + validation


@dataclass(frozen=True)
class BatchTimes:
    """Timed training batches.

    Attributes:
        seconds: Seconds per batch, by number of attack steps.
        passes: Backward passes per batch with the largest number of steps.
        batches: Number of timed batches per number of steps.
        memory: Peak memory in bytes: of the GPU, or of the process.
    """

    seconds: dict[int, float]
    passes: float
    batches: int
    memory: int

    @property
    def step(self) -> float:
        """Seconds per attack step; 0 if only one number of steps was timed."""
        first, last = min(self.seconds), max(self.seconds)
        return (self.seconds[last] - self.seconds[first]) / (last - first) if last != first else 0.0

    @property
    def update(self) -> float:
        """Seconds per batch other than those of `step`."""
        first = min(self.seconds)
        return self.seconds[first] - self.step * first


def time_batches(planned: TrainingPlan, counts: Sequence[int], method: str | None = None) -> BatchTimes:
    """Train a copy of the plan's model on one batch, several times, with each of these numbers of attack steps.

    Args:
        planned: The plan, which is not changed.
        counts: The numbers of attack steps, in ascending order.
        method: Another method to time, with its defaults.
    """
    device = resolve_device(planned.config.runtime.device)
    watches = {}
    for steps in counts:
        watches[steps] = _timed(planned, steps, method, Stopwatch(device))
        vars(watches[steps]).pop("state", None)
        gc.collect()  # frees the network and the recorded step on the device, which refer to each other
    return BatchTimes(
        {steps: watch.mean for steps, watch in watches.items()},
        passes=watches[counts[-1]].passes,
        batches=min(watch.count for watch in watches.values()),
        memory=Engine(device, "fp32").peak_memory(),
    )


def _timed(planned: TrainingPlan, steps: int, method: str | None, watch: Stopwatch) -> Stopwatch:
    config = planned.config
    options = {"norm": config.attack.norm} if method else config.method_options() | {"awp_warmup": None}
    model = copy.deepcopy(planned.trainer.model)
    trainer = create(method or config.attack.method, model, eps=config.attack.eps, **options)
    if steps != trainer.steps:
        trainer.schedule.max_steps = max(steps, trainer.schedule.max_steps or steps)
        trainer.steps = steps
    images, labels = planned.train.first(min(config.data.batch_size, len(planned.train))).tensors()
    images = images.contiguous(memory_format=torch.channels_last)  # as in training
    optim = {**dict(config.optim), "epochs": 1, "lr_epochs": None, "warmup_epochs": 0, "select": "last"}
    runtime = {**dict(config.runtime), "compile": False, "sync_bn": False}
    few = [(images[:8], labels[:8])]  # for stopping rules that need some
    with contextlib.suppress(_EnoughError):
        fit(trainer, _SameBatch(images, labels, len(planned.train)), few, callbacks=[watch], **optim, **runtime)
    return watch


def time_pass(planned: TrainingPlan) -> float:
    """Return the seconds of an attack's forward and backward pass over a batch in an evaluation, in fp32."""
    device = resolve_device(planned.config.runtime.device)
    model = copy.deepcopy(planned.trainer.model).to(device, memory_format=torch.channels_last).eval()
    model.requires_grad_(False)
    images, labels = planned.train.first(min(planned.config.data.batch_size, len(planned.train))).tensors()
    images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
    watch = Stopwatch(device)
    while not watch.has_enough:
        watch.start()
        logits_and_gradient(model, images, labels, cross_entropy)
        watch.stop()
    return watch.mean


class _SameBatch(list[tuple[Tensor, Tensor]]):
    """Loader that repeats a batch of some of the training images."""

    def __init__(self, images: Tensor, labels: Tensor, number_of_images: int) -> None:
        super().__init__([(images, labels)] * (WARM_UPS + 1 + BATCHES))
        self.number_of_images = number_of_images

    def positions(self, epoch: int, batch: int) -> Tensor:
        """Return the positions of the images of a batch among the training images."""
        return torch.arange(len(self[batch][0]))


class _EnoughError(Exception):
    """Raised to end the timing."""


@dataclass
class Stopwatch(Callback):
    """Times batches or passes after a warm-up, and ends training when there are enough.

    Attributes:
        device: The device, with which the clock synchronizes.
        seconds: Seconds of each batch.
        passes: Mean number of backward passes per training batch.
    """

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    passes: float = 1.0
    _began: float = 0.0

    @property
    def warm_ups(self) -> int:
        """Number of batches that do not count: the first, and on a GPU all before and with the recorded one."""
        return WARM_UPS + 1 if self.device.type == "cuda" else 1

    @property
    def count(self) -> int:
        """Number of batches that count: without the warm-up, but at least the last one."""
        return max(len(self.seconds) - self.warm_ups, 1)

    @property
    def mean(self) -> float:
        """Mean seconds of the batches that count."""
        return fmean(self.seconds[-self.count :])

    @property
    def has_enough(self) -> bool:
        """Whether `BATCHES` are timed or the time limit is over."""
        return sum(self.seconds) > LIMIT or len(self.seconds) >= self.warm_ups + BATCHES

    def start(self) -> None:
        """Start the clock."""
        wait_for(self.device)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        wait_for(self.device)
        self.seconds.append(time.perf_counter() - self._began)

    def on_batch_start(self) -> None:
        """Start the clock."""
        self.start()

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Stop the clock; end the training if that is enough."""
        self.stop()
        self.passes = max(sums.read()["backwards"] / sums.batches, 1.0)
        if self.has_enough:
            raise _EnoughError
