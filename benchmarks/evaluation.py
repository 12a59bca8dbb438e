"""Evaluation beside torchattacks' PGD and beside RobustBench's AutoAttack, on a model that half withstands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from benchmarks.timing import Notify, Side, Times, alternate, device_clock, ratio
from deat_rb import build_model, create, evaluate
from deat_rb.data.batches import Batches
from deat_rb.data.datasets import load_data
from deat_rb.loading import open_target
from deat_rb.robustbench import benchmark as robustbench_benchmark
from deat_rb.training.validation import validate
from deat_rb.utils import seeding
from deat_rb.utils.devices import resolve_device

PGD_TARGET = 1.8
PGD_STEPS = 100
BELOW = 0.5
EPOCHS = 3
TRAINED_EPS = 0.1
EPS_STEP = 0.01


@dataclass(frozen=True)
class EvalTarget:
    """What is evaluated.

    Attributes:
        model: In eval mode, on the device; takes images in [0, 1].
        images: (N, C, H, W), on the CPU.
        labels: (N,).
        eps: The radius, in [0, 1] pixel units.
        source: Where the model is from.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    source: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Comparison:
    """One attack, by ours and by theirs.

    Attributes:
        attack: Its name.
        against: Whose implementation is beside ours.
        examples: N.
        eps: The radius, in [0, 1] pixel units.
        ours: Seconds, by round.
        theirs: Seconds, by round.
        ours_accuracy: Robust accuracy in [0, 1].
        theirs_accuracy: Robust accuracy in [0, 1].
        differing: How many examples' verdicts differ.
        equal: Whether they have to be the same: AutoAttack's are seeded alike, the starts of PGD are not.
        target: How many times as fast ours is to be, where that is said.
    """

    attack: str
    against: str
    examples: int
    eps: float
    ours: list[float]
    theirs: list[float]
    ours_accuracy: float
    theirs_accuracy: float
    differing: int
    equal: bool
    target: float | None = None

    @property
    def speedup(self) -> float:
        """How many times as fast ours is."""
        return ratio(self.theirs, self.ours)


def subject_of(
    run: Path | None, count: int, device: str, *, epochs: int = EPOCHS, notify: Notify = lambda text: None
) -> EvalTarget:
    """Opens a run or, without one, trains WRN-10-1 on the embedded digits by FREE-4 for a moment.

    The radius is the run's own, or the smallest at which the trained network withstands PGD-20 on less than half of
    the images.

    Args:
        run: A run directory.
        count: How many test images.
        device: Where.
        epochs: Of that training.
        notify: Is told what is about to run.

    Raises:
        DeatError: The run cannot be used.
    """
    where = resolve_device(device)
    if run is not None:
        opened = open_target(run)
        images, labels = opened.examples(min(count, len(opened.data.test)))
        return EvalTarget(opened.model.to(where), images, labels, opened.eps, opened.provenance["run"])
    notify("training a network to evaluate")
    data = load_data("digits")
    with seeding.preserved():
        torch.manual_seed(0)
        model = build_model("wrn-10-1", dataset="digits")
    batches = Batches(data.train, 64, shuffle=True, device=where)
    create("free-4", model.to(where), eps=TRAINED_EPS).fit(batches, epochs=epochs)
    images, labels = data.test.first(min(count, len(data.test))).tensors()
    model.eval()
    eps = _eps_below_half(model, images.to(where), labels.to(where))
    return EvalTarget(model, images, labels, eps, f"WRN-10-1 after {epochs} epochs of FREE-4 on the digits")


def _eps_below_half(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    withstood, broken = 0, round(1 / EPS_STEP)
    while broken - withstood > 1:
        middle = (withstood + broken) // 2
        if validate(model, images, labels, eps=middle * EPS_STEP)[1] < BELOW:
            broken = middle
        else:
            withstood = middle
    return broken * EPS_STEP


def against_torchattacks(
    subject: EvalTarget, *, batch_size: int, repeats: int, steps: int = PGD_STEPS, notify: Notify = lambda side: None
) -> Comparison:
    """PGD beside torchattacks' PGD, both of steps of eps / 4.

    Args:
        subject: The model and the images.
        batch_size: How many are attacked together.
        repeats: Rounds.
        steps: Of PGD.
        notify: Is told which side is about to run.
    """
    verdicts: dict[str, Tensor] = {}
    attack = torchattacks.PGD(subject.model, eps=subject.eps, alpha=subject.eps / 4, steps=steps, random_start=True)

    def ours() -> None:
        name = f"pgd-{steps}"
        options: dict[str, Any] = {"eps": subject.eps, "batch_size": batch_size}
        verdicts["ours"] = evaluate(subject.model, subject.images, subject.labels, attacks=[name], **options).verdicts[
            name
        ]

    def theirs() -> None:
        seeding.seed_global(0, "benchmark")
        correct = []
        for begin in range(0, len(subject.images), batch_size):
            rows = slice(begin, begin + batch_size)
            images, labels = subject.images[rows].to(subject.device), subject.labels[rows].to(subject.device)
            adv = attack(images, labels)
            with torch.no_grad():
                correct.append((subject.model(adv).argmax(dim=1) == labels).cpu())
        verdicts["theirs"] = torch.cat(correct)

    with seeding.preserved():
        sides = {"torchattacks": Side(theirs), "ours": Side(ours)}
        times = alternate(sides, repeats, clock=device_clock(subject.device), notify=notify)
    return _compared(f"pgd-{steps}", "torchattacks", subject, times, verdicts, equal=False, target=PGD_TARGET)


def against_robustbench(subject: EvalTarget, *, batch_size: int, notify: Notify = lambda side: None) -> Comparison:
    """AutoAttack's standard version beside `robustbench.benchmark`, seeded alike, once each.

    Args:
        subject: The model and the images.
        batch_size: How many are attacked together.
        notify: Is told which side is about to run.
    """
    verdicts: dict[str, Tensor] = {}

    def ours() -> None:
        report = evaluate(
            subject.model,
            subject.images,
            subject.labels,
            attacks=["autoattack"],
            eps=subject.eps,
            batch_size=batch_size,
            seed=0,
        )
        verdicts["ours"] = report.verdicts["autoattack"]

    def theirs() -> None:
        options: dict[str, Any] = {"eps": subject.eps, "batch_size": batch_size}
        verdicts["theirs"] = robustbench_benchmark.benchmark(
            subject.model, subject.images, subject.labels, seed=0, **options
        )[2]

    sides = {"robustbench": Side(theirs), "ours": Side(ours)}
    times = alternate(sides, 1, warm_up=False, clock=device_clock(subject.device), notify=notify)
    return _compared("autoattack", "robustbench", subject, times, verdicts, equal=True)


def _compared(
    attack: str,
    against: str,
    subject: EvalTarget,
    times: Times,
    verdicts: dict[str, Tensor],
    *,
    equal: bool,
    target: float | None = None,
) -> Comparison:
    ours, theirs = verdicts["ours"], verdicts["theirs"]
    theirs_accuracy = float(theirs.float().mean())
    return Comparison(
        attack,
        against,
        examples=len(ours),
        eps=subject.eps,
        ours=times["ours"],
        theirs=times[against],
        ours_accuracy=float(ours.float().mean()),
        theirs_accuracy=theirs_accuracy,
        differing=int((ours != theirs).sum()),
        equal=equal,
        target=target if theirs_accuracy < BELOW else None,
    )
