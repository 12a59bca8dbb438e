"""Natural accuracy, FGSM, PGD-N, CW-N and AutoAttack on the same images, in one report."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn

from deat_rb import autoattack, losses, randomness
from deat_rb.batches import check_batch
from deat_rb.engine import resolve_device
from deat_rb.errors import DeatError, nearest
from deat_rb.guard import untouched
from deat_rb.report import AttackResult, Report, wilson
from deat_rb.threat import check_eps
from deat_rb.whitebox import Counted, Crafted, admissible, fgsm, pgd, uniform_start

__all__ = ["AttackResult", "Report", "evaluate", "parse_attacks", "validate", "wilson"]

Progress = Callable[[str, int, int, int], None]
KNOWN = ("natural", "fgsm", "pgd-100", "cw-20", "autoattack")
LOSSES = {"ce": losses.cross_entropy, "margin": losses.margin}


def parse_attacks(attacks: str | Sequence[str]) -> tuple[str, ...]:
    """Reads names of attacks, in any case: ``natural``, ``fgsm``, ``pgd-N``, ``cw-N``, ``autoattack``.

    Args:
        attacks: The names, or one text with commas between them.

    Returns:
        Each once, in lower case and in the order given, after ``natural``, which is always measured.

    Raises:
        DeatError: If there is no such attack, or it would take no step.
    """
    names = ["natural"]
    for given in attacks.split(",") if isinstance(attacks, str) else attacks:
        name = given.strip().lower()
        if match := re.fullmatch(r"(pgd|cw)-([0-9]{1,6})", name):
            steps = int(match[2])
            if steps == 0:
                raise DeatError(f"attack '{given.strip()}' takes no step; give a number of steps such as {match[1]}-20")
            name = f"{match[1]}-{steps}"
        elif name not in ("natural", "fgsm", "autoattack"):
            raise DeatError(f"there is no attack '{given.strip()}': {nearest(name, KNOWN)}")
        names.append(name)
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class _WhiteBox:
    """One of our own attacks with its settings."""

    name: str
    eps: float
    loss: str
    alpha: float
    steps: int
    start: str

    @classmethod
    def named(cls, name: str, eps: float) -> _WhiteBox:
        """``fgsm``, ``pgd-N`` or ``cw-N``; steps are of eps / 4, which is 2/255 for 8/255."""
        if name == "fgsm":
            return cls(name, eps, "ce", alpha=eps, steps=1, start="none")
        kind, steps = name.split("-")
        return cls(name, eps, "ce" if kind == "pgd" else "margin", alpha=eps / 4, steps=int(steps), start="uniform")

    @property
    def parameters(self) -> dict[str, int | float | str]:
        return {"eps": self.eps, "alpha": self.alpha, "steps": self.steps, "loss": self.loss, "start": self.start}

    def __call__(
        self, model: Counted, images: Tensor, labels: Tensor, chosen: Tensor, numbers: torch.Generator
    ) -> Crafted:
        """Attacks the ``chosen`` (N,) of a batch; ``numbers`` are drawn for all of it, so that none depends on them."""
        loss = LOSSES[self.loss]
        if self.start == "none":
            return fgsm(model, images[chosen], labels[chosen], eps=self.eps, loss=loss)
        start = uniform_start(images, self.eps, numbers)
        return pgd(
            model,
            images[chosen],
            labels[chosen],
            start=start[chosen],
            eps=self.eps,
            alpha=self.alpha,
            steps=self.steps,
            loss=loss,
        )


class _Evaluation:
    """A model held still, and the examples that every attack sees."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.device = device

    def batches(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Goes through the examples in their order: where they are, images and labels on the device."""
        for begin in range(0, len(self.images), self.batch_size):
            rows = slice(begin, min(begin + self.batch_size, len(self.images)))
            yield rows, self.images[rows].to(self.device), self.labels[rows].to(self.device)

    def natural(self, model: Counted, progress: Progress | None = None) -> Tensor:
        """Says which examples are classified correctly as they are, (N,) bool."""
        correct = torch.zeros(len(self.images), dtype=torch.bool)
        for rows, images, labels in self.batches():
            with torch.no_grad():
                logits = model(images)
            if logits.isnan().any():
                raise DeatError(
                    f"the model gives NaN on images {rows.start} to {rows.stop - 1}; "
                    "a model that has diverged cannot be evaluated"
                )
            correct[rows] = (logits.argmax(dim=1) == labels).cpu()
            if progress is not None:
                progress("natural", rows.stop, len(correct), int(correct.sum()))
        return correct

    def white_box(
        self, attack: _WhiteBox, model: Counted, natural: Tensor, progress: Progress | None = None
    ) -> tuple[Tensor, int]:
        """Runs one attack on what is naturally correct.

        Returns:
            Which examples stay correct, (N,) bool, and how many adversarial images left the threat model: those
            break nothing.
        """
        correct = natural.clone()
        outside = 0
        for batch, (rows, images, labels) in enumerate(self.batches()):
            chosen = natural[rows].to(self.device)
            if natural[rows].any():
                numbers = randomness.generator(self.seed, "evaluate", attack.name, batch)
                crafted = attack(model, images, labels, chosen, numbers)
                allowed = admissible(crafted.images, images[chosen], attack.eps)
                outside += int((~allowed).sum())
                correct[rows] = correct[rows].masked_scatter(natural[rows], ~(crafted.broken & allowed).cpu())
            if progress is not None:
                progress(attack.name, rows.stop, len(correct), int(correct[: rows.stop].sum()))
        return correct, outside


@contextmanager
def _held(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int, seed: int, device: torch.device | str | None
) -> Iterator[tuple[_Evaluation, int]]:
    """Checks the input and holds the model still: eval mode, on the device, parameters frozen; then gives it back.

    Frozen parameters keep FAB's ``backward()`` from their gradients, and compiled models from computing them.

    Yields:
        The evaluation and the number of classes.
    """
    if batch_size < 1:
        raise DeatError(f"batch_size = {batch_size} is not positive; give a number of images such as 128")
    check_batch(images, labels)
    tensors = (*model.parameters(), *model.buffers())
    home = tensors[0].device if tensors else images.device
    target = resolve_device(str(device)) if device is not None else home
    with untouched(model):
        model.eval().requires_grad_(False)
        if target != home:
            model.to(target)
        try:
            num_classes = _count_classes(model, images[:2].to(target))
            check_batch(images, labels, num_classes)
            yield _Evaluation(model, images, labels, batch_size, seed, target), num_classes
        finally:
            if target != home:
                model.to(home)


def _count_classes(model: nn.Module, images: Tensor) -> int:
    with torch.no_grad():
        logits = model(images)
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise DeatError(
            f"the model gives logits of shape {tuple(logits.shape)} for {len(images)} images of "
            f"{tuple(images.shape[1:])}, where ({len(images)}, K) with K of 2 or more classes is needed; "
            "RobustBench's architectures are for 32x32"
        )
    return int(logits.shape[1])


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: str | Sequence[str] = ("fgsm", "pgd-100", "cw-20"),
    eps: float = 8 / 255,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures accuracy without an attack and under each of ``attacks``.

    The model is evaluated in eval mode; modes, parameters, gradients, buffers and torch's random state are
    afterwards what they were. Only what is correctly classified is attacked.

    Args:
        model: Takes images in [0, 1], shape (N, C, H, W), and returns logits (N, K).
        images: In [0, 1], (N, C, H, W), wherever they are: batches are moved to the device.
        labels: (N,), int64.
        attacks: See `parse_attacks`. ``fgsm`` is one step of ``eps`` without a random start; ``pgd-N`` takes N steps
            of eps / 4 on the cross-entropy from a uniform start, ``cw-N`` on the margin max_{k != y} z_k - z_y;
            ``autoattack`` is AutoAttack's standard version.
        eps: Linf radius, in [0, 1] pixel units.
        batch_size: How many examples are attacked together.
        seed: Fixes the random starts, batch by batch.
        device: Where to run; by default where the model is.
        progress: Told ``(attack, done, total, robust)`` after every batch, ``robust`` being how many are correct
            so far. AutoAttack names its parts, as in ``autoattack/square``.

    Raises:
        DeatError: If images, labels, eps or a name cannot be used.
    """
    names = parse_attacks(attacks)
    check_eps(eps)
    results: list[AttackResult] = []
    verdicts: dict[str, Tensor] = {}
    with _held(model, images, labels, batch_size=batch_size, seed=seed, device=device) as (held, num_classes):
        for name in names:
            counted = Counted(model)
            parameters: dict[str, int | float | str] = {}
            notes: tuple[str, ...] = ()
            started = time.perf_counter()
            if name == "natural":
                verdicts[name] = held.natural(counted, progress)
            elif name == "autoattack":
                outcome = autoattack.run(
                    counted,
                    images,
                    labels,
                    correct=verdicts["natural"],
                    num_classes=num_classes,
                    eps=eps,
                    batch_size=batch_size,
                    seed=seed,
                    device=held.device,
                    progress=progress,
                )
                verdicts[name], notes = outcome.correct, outcome.notes
                parameters = {
                    "eps": eps,
                    "version": "standard",
                    "parts": ", ".join(outcome.parts),
                    "targets": outcome.targets,
                }
            else:
                attack = _WhiteBox.named(name, eps)
                verdicts[name], outside = held.white_box(attack, counted, verdicts["natural"], progress)
                parameters = attack.parameters
                if outside:
                    notes = (
                        f"{outside} adversarial images were not finite, in [0, 1] and within eps, and do not count",
                    )
            results.append(
                AttackResult.of(
                    name,
                    verdicts[name],
                    seconds=time.perf_counter() - started,
                    forwards=counted.forwards,
                    backwards=counted.backwards,
                    parameters=parameters,
                    notes=notes,
                )
            )
        where = held.device
    return Report.of(
        results,
        verdicts,
        eps=eps,
        num_classes=num_classes,
        seed=seed,
        batch_size=batch_size,
        device=f"{where} ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else str(where),
        versions=_versions(),
    )


def validate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    alpha: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[float, float]:
    """Measures what training selects its model by, on held-out training images and with the same start each time.

    Args:
        model: As in `evaluate`; it is run where it is.
        images: In [0, 1], (N, C, H, W).
        labels: (N,).
        eps: Linf radius, in [0, 1] pixel units.
        steps: Of PGD.
        alpha: Step size; by default eps / 4.
        batch_size: How many examples are attacked together.
        seed: Fixes the random starts.

    Returns:
        Natural accuracy and PGD accuracy, in [0, 1].
    """
    attack = _WhiteBox(f"pgd-{steps}", check_eps(eps), "ce", eps / 4 if alpha is None else alpha, steps, "uniform")
    with _held(model, images, labels, batch_size=batch_size, seed=seed, device=None) as (held, _):
        counted = Counted(model)
        natural = held.natural(counted)
        robust, _ = held.white_box(attack, counted, natural)
    return int(natural.sum()) / len(natural), int(robust.sum()) / len(robust)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for distribution in ("deat-rb", "torch", "torchattacks", "pyautoattack"):
        try:
            versions[distribution.replace("-", "_")] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[distribution.replace("-", "_")] = "not installed"
    return versions
