"""Runs attacks on a model that is held still, batch by batch, each of which is kept and can be found again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deat_rb.attacks.functional import AttackOutput, CountingModel
from deat_rb.attacks.types import Attack, AttackContext, AttackStage, Batch
from deat_rb.evaluation.frozen_model import PreparedModel
from deat_rb.evaluation.report import AttackResult
from deat_rb.evaluation.resume import ResumeStore
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import format_fraction

Progress = Callable[[str, int, int, int], None]

WITHIN_EVERY = 0.5
"""Seconds between two looks into a batch that is being attacked."""


@dataclass
class AttackOutcome:
    """What an attack left and what it cost, summed over its batches.

    Attributes:
        correct: (N,) bool, on the CPU: still classified correctly.
        adversarial: (N, C, H, W), on the CPU: what it made of the images; None where that is not kept.
        forwards: Images forwarded.
        backwards: Images for which a gradient was computed.
        inadmissible: Adversarial images outside of the threat model.
        seconds: Wall time.
        left: How many were correct after each part.
    """

    correct: Tensor
    adversarial: Tensor | None
    forwards: int = 0
    backwards: int = 0
    inadmissible: int = 0
    seconds: float = 0.0
    left: tuple[int, ...] = ()

    def result(self, attack: Attack) -> AttackResult:
        """Makes the report's record of it."""
        total = len(self.correct)
        parts = {part.name: left for part, left in zip(attack.parts, self.left, strict=True) if part.name}
        counts = [f"{left} of {total} correct after {name}" for name, left in parts.items()]
        outside = f"{self.inadmissible} adversarial images were not finite, in [0, 1] and within eps, and do not count"
        return AttackResult.of(
            attack.name,
            self.correct,
            seconds=self.seconds,
            forwards=self.forwards,
            backwards=self.backwards,
            inadmissible=self.inadmissible,
            parameters=attack.parameters,
            parts=parts,
            notes=(*attack.notes, *counts, *([outside] if self.inadmissible else []), *attack.warnings),
        )


def _natural(model: CountingModel, batch: Batch) -> AttackOutput:
    """Classifies the images as they are, in full precision."""
    with torch.no_grad():
        logits = model.exact(batch.images)
    if logits.isnan().any():
        raise DeatError(
            f"the model gives NaN on images {int(batch.rows[0])} to {int(batch.rows[-1])}; "
            "a model that has diverged cannot be evaluated"
        )
    return AttackOutput(batch.images, logits.argmax(dim=1) != batch.labels)


NATURAL = Attack("natural", (AttackStage("", _natural, calls=1),), {})


@dataclass(frozen=True)
class AttackRunner:
    """Runs attacks, one after the other.

    Attributes:
        held: The model and the examples.
        terms: Within which eps.
        journal: Where batches are found and kept.
        keep: Whether adversarial images are.
        dtype: In which precision attacks craft; the verdict is the model's in its own, on what they crafted.
        progress: See `deat_rb.evaluation.evaluate.evaluate`.
        sweeping: Whether progress is told the radius, too: there are several.
    """

    held: PreparedModel
    context: AttackContext
    journal: ResumeStore
    keep: bool = False
    dtype: torch.dtype | None = None
    progress: Progress | None = None
    sweeping: bool = False

    def run(self, attack: Attack, correct: Tensor) -> AttackOutcome:
        """Attacks what is ``correct``, (N,) bool on the CPU, part after part."""
        keep = self.keep and attack is not NATURAL
        found = AttackOutcome(correct.clone(), self.held.images.detach().cpu().float().clone() if keep else None)
        model = CountingModel(self.held.model, None if attack is NATURAL else self.dtype)
        for part in attack.parts:
            pool = found.correct.nonzero().flatten() if part.packed else torch.arange(len(self.held))
            batches = self.held.batches(pool)
            name = f"{attack.name}/{part.name}" if part.name else attack.name
            if self.sweeping and attack is not NATURAL:
                name += f" (eps {format_fraction(self.context.eps)})"
            display = _Display(name, part, len(batches), len(pool), self.progress)
            for number, rows in enumerate(batches):
                chosen, kept = rows[found.correct[rows]], None
                if len(chosen):
                    key = (
                        f"eps {format_fraction(self.context.eps)}, {attack.name}, {part.name or 'all'}, batch {number}"
                    )
                    kept = self.journal.find(key)
                    if kept is None:
                        with display.within(number, model):
                            batch = self._attack(attack, part, model, found, rows, number)
                        self.journal.keep(key, batch)
                    self.journal.attacked |= attack is not NATURAL
                    _add(kept or batch, chosen, found, attack)
                display.done(rows, found.correct, quietly=kept is not None)
            found.left = (*found.left, int(found.correct.sum()))
        return found

    def _attack(
        self, attack: Attack, part: AttackStage, model: CountingModel, found: AttackOutcome, rows: Tensor, number: int
    ) -> dict[str, Tensor]:
        """Attacks one batch; returns what there is to keep of it."""
        began, forwards, backwards = time.perf_counter(), model.forwards, model.backwards
        images, labels = self.held.take(rows)
        chosen = found.correct[rows].to(self.held.device)
        with seeding.preserved():
            # What the model itself draws shall be the same in every evaluation.
            seeding.seed_global(self.context.seed, "evaluate", attack.name, part.name, number)
            crafted = part.craft(model, Batch(images, labels, chosen, number, rows))
            broken = crafted.broken
            if model.dtype is not None:
                with torch.no_grad():
                    broken = model.exact(crafted.images).argmax(dim=1) != labels[chosen]
        clean = images[chosen]
        allowed = self.context.ball.contains(crafted.images, clean)
        kept = {
            "broken": (broken & allowed).cpu(),
            "counts": torch.tensor((model.forwards - forwards, model.backwards - backwards, int((~allowed).sum()))),
            "warnings": torch.tensor(list(json.dumps(attack.warnings).encode()), dtype=torch.uint8),
        }
        if found.adversarial is not None:
            kept["adversarial"] = torch.where(allowed[:, None, None, None], crafted.images, clean).float().cpu()
        kept["seconds"] = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        return kept


def _add(kept: dict[str, Tensor], chosen: Tensor, found: AttackOutcome, attack: Attack) -> None:
    """Adds a batch, of which the examples ``chosen`` were attacked, to what was found."""
    if len(kept["broken"]) != len(chosen):
        raise DeatError("a kept batch is of other examples than it should be: start anew by --no-resume")
    forwards, backwards, inadmissible = kept["counts"].tolist()
    found.forwards += forwards
    found.backwards += backwards
    found.inadmissible += inadmissible
    found.seconds += float(kept["seconds"])
    found.correct[chosen] = ~kept["broken"]
    if found.adversarial is not None:
        found.adversarial[chosen] = kept["adversarial"]
    for sentence in json.loads(bytes(kept["warnings"].tolist())):
        if sentence not in attack.warnings:
            attack.warnings.append(sentence)


class _Display:
    """Tells a caller's progress of batches that are done, and of one that is being attacked where it wants to know."""

    def __init__(self, name: str, part: AttackStage, batches: int, total: int, progress: Progress | None) -> None:
        self.name = name
        self.whole = bool(part.name)
        self.calls = part.calls
        self.batches = batches
        self.total = total
        self.progress = progress
        self.finished = 0

    def done(self, rows: Tensor, correct: Tensor, *, quietly: bool) -> None:
        """Tells of a batch: of a part, how many of all examples are correct, else how many of those done.

        Of one that was found as it had been kept it tells, ``quietly``, only if it is the last.
        """
        self.finished += len(rows)
        if self.progress is not None and (self.finished == self.total or not quietly):
            among = correct if self.whole else correct[: self.finished]
            self.progress(self.name, self.finished, self.total, int(among.sum()))

    @contextmanager
    def within(self, number: int, model: CountingModel) -> Iterator[None]:
        """Counts the forward passes of a batch, and tells the share of them that is done now and then."""
        tell = getattr(self.progress, "within", None)
        if tell is None:
            yield
            return
        first, told = model.calls, time.monotonic()

        def look() -> None:
            nonlocal told
            if time.monotonic() - told >= WITHIN_EVERY:
                told = time.monotonic()
                share = min(0.99, (model.calls - first) / self.calls) if self.calls else 0.0
                tell(self.name, number + 1, self.batches, share)

        tell(self.name, number + 1, self.batches, 0.0)
        model.on_call = look
        try:
            yield
        finally:
            model.on_call = None
