"""Evaluation times against torchattacks' PGD and RobustBench's AutoAttack; the model's robust accuracy is below 1/2."""

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
from deat_rb.eval_target import open_target
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
    """A model and its test images.

    Attributes:
        model: The model in eval mode, on the device, for images in [0, 1].
        images: Test images (N, C, H, W), on the CPU.
        labels: Labels (N,).
        eps: Perturbation radius, in [0, 1] units.
        source: Description of the model.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    source: str

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Comparison:
    """Times and accuracies of an attack in our implementation and in another.

    Attributes:
        attack: Name of the attack.
        against: Name of the other implementation.
        examples: Number of examples.
        eps: Perturbation radius, in [0, 1] units.
        ours: Our seconds per round.
        theirs: The other implementation's seconds per round.
        ours_accuracy: Our robust accuracy, in [0, 1].
        theirs_accuracy: The other implementation's robust accuracy, in [0, 1].
        differing: Number of examples with different verdicts.
        equal: Whether verdicts must be equal: AutoAttack uses the same seed, but PGD's random starts differ, and on a
            GPU our passes round differently.
        target: Target for the speedup, if there is one.
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
        """Their time divided by ours."""
        return ratio(self.theirs, self.ours)


def make_target(
    run: Path | None, count: int, device: str, *, epochs: int = EPOCHS, notify: Notify = lambda text: None
) -> EvalTarget:
    """Open a run or, without one, train WRN-10-1 on the digits with FREE-4 for three epochs.

    The radius in Linf is the run's own, 8/255 for a run in L2, or for the trained network the smallest with PGD-20
    accuracy below 1/2.

    Args:
        run: A run directory, or None.
        count: Number of test images.
        device: The device.
        epochs: Number of training epochs.
        notify: Called with the name of the next measurement.

    Raises:
        DeatError: The run cannot be used.
    """
    where = resolve_device(device)
    if run is not None:
        opened = open_target(run)
        images, labels = opened.test_images(min(count, len(opened.data.test)))
        images = images if isinstance(images, Tensor) else images.tensors()[0]
        return EvalTarget(opened.model.to(where), images, labels, opened.radius("Linf"), opened.provenance["run"])
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
    above, below = 0, round(1 / EPS_STEP)  # multiples of EPS_STEP with accuracy above and below 1/2
    while below - above > 1:
        middle = (above + below) // 2
        if validate(model, images, labels, eps=middle * EPS_STEP)[1] < BELOW:
            below = middle
        else:
            above = middle
    return below * EPS_STEP


def against_torchattacks(
    target: EvalTarget, *, batch_size: int, repeats: int, notify: Notify = lambda side: None
) -> Comparison:
    """Time our PGD and torchattacks' PGD, both with step size eps / 4.

    Args:
        target: The model and the images.
        batch_size: Images per batch.
        repeats: Number of rounds.
        notify: Called with the name of the next side.
    """
    name, verdicts = f"pgd-{PGD_STEPS}", dict[str, Tensor]()
    attack = torchattacks.PGD(target.model, eps=target.eps, alpha=target.eps / 4, steps=PGD_STEPS, random_start=True)

    def ours() -> None:
        report = evaluate(
            target.model, target.images, target.labels, attacks=[name], eps=target.eps, batch_size=batch_size
        )
        verdicts["ours"] = report.verdicts[name]

    def theirs() -> None:
        seeding.seed_global(0, "benchmark")
        correct = []
        for begin in range(0, len(target.images), batch_size):
            rows = slice(begin, begin + batch_size)
            images, labels = target.images[rows].to(target.device), target.labels[rows].to(target.device)
            adv = attack(images, labels)
            with torch.no_grad():
                correct.append((target.model(adv).argmax(dim=1) == labels).cpu())
        verdicts["theirs"] = torch.cat(correct)

    with seeding.preserved():
        sides = {"torchattacks": Side(theirs), "ours": Side(ours)}
        times = alternate(sides, repeats, clock=device_clock(target.device), notify=notify)
    return _compared(name, "torchattacks", target, times, verdicts, equal=False, speedup=PGD_TARGET)


def against_robustbench(target: EvalTarget, *, batch_size: int, notify: Notify = lambda side: None) -> Comparison:
    """Time our AutoAttack (standard version) and `robustbench.benchmark` once each, with the same seed.

    Args:
        target: The model and the images.
        batch_size: Images per batch.
        notify: Called with the name of the next side.
    """
    verdicts: dict[str, Tensor] = {}

    def ours() -> None:
        report = evaluate(
            target.model,
            target.images,
            target.labels,
            attacks=["autoattack"],
            eps=target.eps,
            batch_size=batch_size,
            seed=0,
        )
        verdicts["ours"] = report.verdicts["autoattack"]

    def theirs() -> None:
        options: dict[str, Any] = {"eps": target.eps, "batch_size": batch_size}
        verdicts["theirs"] = robustbench_benchmark.benchmark(
            target.model, target.images, target.labels, seed=0, **options
        )[2]

    sides = {"robustbench": Side(theirs), "ours": Side(ours)}
    times = alternate(sides, 1, warm_up=False, clock=device_clock(target.device), notify=notify)
    return _compared("autoattack", "robustbench", target, times, verdicts, equal=target.device.type == "cpu")


def _compared(
    attack: str,
    against: str,
    target: EvalTarget,
    times: Times,
    verdicts: dict[str, Tensor],
    *,
    equal: bool,
    speedup: float | None = None,
) -> Comparison:
    ours, theirs = verdicts["ours"], verdicts["theirs"]
    theirs_accuracy = float(theirs.float().mean())
    return Comparison(
        attack,
        against,
        examples=len(ours),
        eps=target.eps,
        ours=times["ours"],
        theirs=times[against],
        ours_accuracy=float(ours.float().mean()),
        theirs_accuracy=theirs_accuracy,
        differing=int((ours != theirs).sum()),
        equal=equal,
        target=speedup if theirs_accuracy < BELOW else None,
    )
