"""Overhead of shuffling, augmentation and metrics per training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problem import LR, Problem, Step
from benchmarks.speed import alike
from benchmarks.timing import Notify, Side, alternate, device_clock, ratio
from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import BatchStats, EpochAccumulator
from deat_rb.utils import seeding

OVERHEAD_TARGET = 0.03
BATCHES = 8


@dataclass(frozen=True)
class Overhead:
    """Overhead of a method in one precision.

    Attributes:
        method: Name of the method, and of those with the same training step.
        precision: fp32, bf16 or fp16.
        beside: Seconds per batch for loading and metrics, by round.
        step: Seconds per training step, by round.
    """

    method: str
    precision: str
    beside: list[float]
    step: list[float]

    @property
    def share(self) -> float:
        """Fraction of the time of a step with loading and metrics that is overhead: median over the rounds."""
        return ratio(self.beside, [beside + step for beside, step in zip(self.beside, self.step, strict=True)])


def measure(
    problem: Problem,
    methods: Sequence[str],
    precisions: Sequence[str],
    repeats: int,
    *,
    compiled: bool = False,
    notify: Notify = lambda side: None,
) -> Iterator[list[Overhead]]:
    """Measure each group of `alike` methods once, alternating overhead and training step.

    Args:
        problem: The network and the batch.
        methods: Names of the methods.
        precisions: Precisions among fp32, bf16 and fp16.
        repeats: Number of rounds.
        compiled: Whether to use `torch.compile` for our passes.
        notify: Called with the name of the next measurement.
    """
    beside = Beside(problem)
    for names in alike(problem, methods):
        notify(f"{names[0]}: overhead")
        with ExitStack() as prepared:
            steps = {
                name: prepared.enter_context(Step(problem, names[0], name, compiled=compiled)) for name in precisions
            }
            sides = {"beside": Side(beside.run)} | {name: step.side() for name, step in steps.items()}
            times = alternate(sides, repeats, clock=device_clock(problem.device))
        yield [
            Overhead(", ".join(names), name, [seconds / BATCHES for seconds in times["beside"]], times[name])
            for name in precisions
        ]


class Beside:
    """Loads shuffled, augmented batches and computes the metrics of each.

    Args:
        problem: The network, and the shape and device of the images.
    """

    def __init__(self, problem: Problem) -> None:
        images, labels = problem.images, problem.labels
        count = BATCHES * len(images)
        pixels = torch.randint(0, 256, (count, *images.shape[1:]), dtype=torch.uint8)
        true_labels = labels.cpu().repeat(BATCHES)
        self.batches = Batches(
            ImageSet(pixels, true_labels),
            len(images),
            shuffle=True,
            augmentation="crop-flip",
            device=problem.device,
            memory_format=torch.channels_last,
        )
        self.logits = problem.model(images).detach()
        self.losses = torch.rand(len(images), device=problem.device)
        self.gradient = torch.rand_like(images)
        self.optimizer = torch.optim.SGD(problem.model.parameters(), lr=LR)

    def run(self) -> None:
        """Run one epoch."""
        sums = EpochAccumulator()
        for number, (images, labels) in enumerate(self.batches):
            set_rate(self.optimizer, LR)
            seeding.seed_global(0, "batch", 1, number)
            sums.add(self._metrics(images, labels))
        sums.read()

    def _metrics(self, images: Tensor, labels: Tensor) -> BatchStats:
        return BatchStats(
            examples=len(images),
            loss=self.losses.sum(),
            correct=(self.logits.argmax(dim=1) == labels).sum(),
            l_x=self.gradient.abs().sum(),
            forwards=1,
            backwards=1,
            updates=1,
            image_size=images[0].numel(),
        )
