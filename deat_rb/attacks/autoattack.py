"""AutoAttack (Croce and Hein 2020; versions standard, plus and rand) and Square alone, run stage by stage.

The attacks come from pyautoattack. Batches and seeds match its ``run_standard_evaluation``, because the results of the
random stages depend on them. Only the surrounding loop is ours: it reports progress, can be resumed, and supports fewer
than ten classes. On a GPU, passes may run as CUDA graphs on padded batches, which changes logits by rounding errors:
see `deat_rb.attacks.captured`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.attacks.functional import SMALLEST_BATCH, AttackOutput, CountingModel
from deat_rb.attacks.names import AUTOATTACK
from deat_rb.attacks.types import Attack, AttackContext, AttackStage, Batch, Parameters
from deat_rb.utils import seeding

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}

FEWEST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""The DLR loss needs a third-largest logit, the targeted DLR loss a fourth-largest."""

ONE_BACKWARD = frozenset({"apgd-ce", "apgd-dlr", "apgd-t", "square"})
"""Stages with at most one backward pass per forward pass; FAB runs one for each class."""

ITERATIONS, QUERIES, AVERAGED = 100, 5000, 20


def parts_for(num_classes: int, version: str = "standard") -> tuple[tuple[str, ...], int]:
    """Return the stages of a version that are defined for ``num_classes``, and the number of target classes.

    The targeted DLR loss needs 4 classes, the DLR loss 3; FAB-T needs only one other class.
    """
    parts = tuple(part for part in VERSIONS[version] if num_classes >= FEWEST_CLASSES.get(part, 2))
    return parts, min(9, num_classes - 1)


def build(name: str, context: AttackContext) -> Attack:
    """Build ``autoattack``, ``autoattack-plus``, ``autoattack-rand`` or ``square``; there are no stages if eps = 0."""
    version = AUTOATTACK.get(name, "standard")
    names, targets = (("square",), 0) if name == "square" else parts_for(context.num_classes, version)
    parameters, notes = _account(name, version, names, targets, context)
    if context.eps == 0:
        return Attack(name, (), parameters, (*notes, "eps is 0: nothing to attack"))
    warnings: list[str] = []
    suite = _Suite(version, context, targets, warnings)
    parts = tuple(
        AttackStage(
            part, suite.part(part), calls=suite.calls(part), packed=True,
            recordable=version != "rand" and part in ONE_BACKWARD,
        )
        for part in names
    )  # fmt: skip
    return Attack(name, parts, parameters, notes, warnings)


def _account(
    name: str, version: str, names: tuple[str, ...], targets: int, context: AttackContext
) -> tuple[Parameters, tuple[str, ...]]:
    """Return the parameters and notes for the report, such as stages skipped for lack of classes."""
    if name == "square":
        return {"eps": context.eps, "queries": QUERIES}, ()
    parameters: Parameters = {"eps": context.eps, "version": version, "parts": ", ".join(names)}
    notes, few = [], f"{context.num_classes} classes"
    if missing := [part for part in VERSIONS[version] if part not in names]:
        notes.append(f"{few}: AutoAttack skipped {' and '.join(missing)}, whose DLR loss is undefined")
    if version != "rand":
        parameters["targets"] = targets
        if targets < 9:
            notes.append(f"{few}: the targeted stages used {targets} targets instead of the standard 9")
    return parameters, tuple(notes)


class _Suite:
    """The attacks of pyautoattack on one model."""

    def __init__(self, version: str, context: AttackContext, targets: int, warnings: list[str]) -> None:
        self.version = version
        self.context = context
        self.targets = targets
        self.warnings = warnings
        self._model: CountingModel | None = None
        self._suite: Any = None

    def part(self, name: str) -> Callable[[CountingModel, Batch], AttackOutput]:
        """Return a function that runs a stage; it seeds torch's global generators per batch, as in pyautoattack."""

        def craft(model: CountingModel, batch: Batch) -> AttackOutput:
            images, labels = batch.images[batch.chosen], batch.labels[batch.chosen]
            with seeding.preserved(), torch.no_grad(), _warnings(self.warnings):
                seeding.seed_global(self.context.seed, "evaluate", name, batch.number)
                adv = self._perturb(name, model)(images.clone(), labels.clone())
                return AttackOutput(adv, model.exact(adv).argmax(dim=1) != labels)

        return craft

    def calls(self, name: str) -> int:
        """Return an upper bound on the number of forward passes that the stage ``name`` makes per batch."""
        restarts = 5 if self.version == "plus" else 1
        averaged = AVERAGED if self.version == "rand" else 1
        return {
            "apgd-ce": 2 + restarts * (ITERATIONS + 1) * averaged,
            "apgd-dlr": 2 + restarts * (ITERATIONS + 1) * averaged,
            "apgd-t": 2 + self.targets * (ITERATIONS + 2),
            "fab": 2 + restarts * (2 * ITERATIONS + 2),
            "fab-t": 2 + self.targets * (2 * ITERATIONS + 3),
            "square": 3 + QUERIES + 1,
        }[name]

    def _perturb(self, name: str, model: CountingModel) -> Callable[[Tensor, Tensor], Tensor]:
        suite = self._suite_of(model)
        attack = {
            "apgd-ce": suite.apgd,
            "apgd-dlr": suite.apgd,
            "apgd-t": suite.apgd_targeted,
            "fab": suite.fab,
            "fab-t": suite.fab,
            "square": suite.square,
        }[name]
        if attack is suite.apgd:
            attack.loss = name.removeprefix("apgd-")
        if attack is suite.fab:
            attack.targeted = name == "fab-t"
            attack.n_restarts = 1 if attack.targeted or self.version != "plus" else 5
        if attack is suite.square and self.context.norm == "L2":
            return fit_to_tiles(attack)
        perturb: Callable[[Tensor, Tensor], Tensor] = attack.perturb
        return perturb

    def _suite_of(self, model: CountingModel) -> Any:
        if model is self._model:
            return self._suite
        import pyautoattack

        context = self.context
        suite: Any = pyautoattack.AutoAttack(
            model, norm=context.norm, eps=context.eps, seed=context.seed, device=context.device, version=self.version
        )
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = self.targets
        if context.device.type == "cpu" and self.version != "rand":
            # On other devices, reading the mask forces a synchronization and small batches round differently.
            for attack in (suite.apgd, suite.apgd_targeted):
                attack.attack_single_run = _leaving_early(attack)
        self._model, self._suite = model, suite
        return suite


def fit_to_tiles(square: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap Square's L2 search, whose initial perturbation is a grid of tiles that does not fit every image size.

    Sizes that fail in pyautoattack, such as 12x12, 24x24 and wide images, are attacked transposed and with a margin
    that is cut off before each forward pass and from the result, which does not increase the perturbation's norm.
    """

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        predict = square.predict
        height, width = images.shape[2:]
        rows, columns, wide = _tiled_size(height, width)

        def search_space(tensor: Tensor) -> Tensor:
            tensor = tensor.transpose(2, 3) if wide else tensor
            return nn.functional.pad(tensor, (0, columns - tensor.shape[3], 0, rows - tensor.shape[2])).contiguous()

        def image_space(tensor: Tensor) -> Tensor:
            tensor = tensor.transpose(2, 3) if wide else tensor
            return tensor[:, :, :height, :width].contiguous()

        if (rows, columns, wide) == (height, width, False):
            result: Tensor = square.perturb(images, labels)
            return result
        square.predict = lambda tiled: predict(image_space(tiled))
        try:
            return image_space(square.perturb(search_space(images), labels))
        finally:
            square.predict = predict

    return perturb


def _tiled_size(height: int, width: int) -> tuple[int, int, bool]:
    """Return the smallest height and width that Square's L2 search accepts, and whether to transpose the images."""

    def fits(rows: int, columns: int) -> bool:
        side = rows // 5
        first = (rows - 5 * side) // 2
        return side == 1 or all(first + side * (length // side) <= length for length in (rows, columns))

    high, low = max(height, width), min(height, width)
    sizes = [
        (rows, columns) for rows in range(high, high + 6) for columns in range(low, rows + 1) if fits(rows, columns)
    ]
    rows, columns = min(sizes, key=lambda size: size[0] * size[1])
    return rows, columns, width > height


def _leaving_early(attack: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Wrap APGD so that examples are no longer forwarded once they are misclassified."""
    run: Callable[..., tuple[Tensor, ...]] = attack.attack_single_run

    def attack_single_run(images: Tensor, labels: Tensor, x_init: Tensor | None = None) -> tuple[Tensor, ...]:
        model = attack.model
        attack.model = leaving = _Leaving(model, labels)
        try:
            best, correct, loss, adversarial = run(images, labels, x_init)
        finally:
            attack.model = model
        return best, correct, loss, leaving.restore(adversarial)

    return attack_single_run


class _Leaving:
    """Model wrapper for one batch that forwards only the examples that are still classified correctly.

    For the others it returns their last logits, with zero gradient. If the model draws random numbers, all examples are
    forwarded, because the draws depend on the batch size.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], labels: Tensor) -> None:
        self.model = model
        self.labels = labels
        self.misclassified = torch.zeros_like(labels, dtype=torch.bool)
        self.draws = False
        self._logits: Tensor | None = None
        self._first_misclassified: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        logits = self._forward(images)
        misclassified = ~self.misclassified & (logits.detach().argmax(dim=1) != self.labels)
        if self._first_misclassified is None:
            self._first_misclassified = images.detach().clone()
        self._first_misclassified[misclassified] = images.detach()[misclassified]
        self.misclassified |= misclassified
        self._logits = logits.detach()
        return logits

    def restore(self, adversarial: Tensor) -> Tensor:
        """Return ``adversarial`` with each misclassified image set to its first misclassified iterate."""
        if self._first_misclassified is None or self.draws:
            return adversarial
        return torch.where(self.misclassified[:, None, None, None], self._first_misclassified, adversarial)

    def _forward(self, images: Tensor) -> Tensor:
        if self._logits is None:
            before = torch.get_rng_state()
            logits = self.model(images)
            self.draws = not torch.equal(before, torch.get_rng_state())
            return logits
        if self.draws:
            return self.model(images)
        remaining = ~self.misclassified
        if not remaining.any():
            return self._logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
        if int(remaining.sum()) < SMALLEST_BATCH:
            remaining[(~remaining).nonzero().flatten()[: SMALLEST_BATCH - int(remaining.sum())]] = True
        if remaining.all():
            return self.model(images)
        rows = remaining.nonzero().flatten()
        return self._logits.index_copy(0, rows, self.model(images[rows]))


@contextmanager
def _warnings(collected: list[str]) -> Iterator[None]:
    """Collect AutoAttack's warnings, without duplicates, instead of printing them."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()) not in collected:
                collected.append(message)

    logger = logging.getLogger("auto-attack")
    handler, propagate = Collect(level=logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
