"""Runner of attacks on a prepared model, batch by batch, which stores the result of each batch."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deat_rb.attacks.captured import Captures
from deat_rb.attacks.functional import AttackOutput, CountingModel
from deat_rb.attacks.types import Attack, AttackContext, AttackStage, Batch
from deat_rb.evaluation.frozen_model import PreparedModel
from deat_rb.evaluation.report import AttackResult
from deat_rb.evaluation.resume import ResumeStore
from deat_rb.utils import seeding
from deat_rb.utils.devices import full_float32
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError
from deat_rb.utils.metering import JOULES_PER_KWH, Meter
from deat_rb.utils.units import format_fraction

Progress = Callable[[str, int, int, int], None]

WITHIN_EVERY = 0.5
"""Seconds between progress updates within a batch."""


class EvaluationCallback:
    """Hooks of an evaluation, which do nothing by default.

    Args:
        on_batch: A function to call after each batch.
    """

    def __init__(self, on_batch: Progress | None = None) -> None:
        self._on_batch = on_batch

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        """Run after a batch of an attack, of whose ``total`` examples ``done`` are attacked and ``robust`` correct.

        For a named stage of an attack, such as ``autoattack/square``, ``robust`` is counted among all examples.
        """
        if self._on_batch is not None:
            self._on_batch(attack, done, total, robust)

    def within(self, attack: str, batch: int, batches: int, share: float) -> None:
        """Run during batch ``batch`` of ``batches`` (1-based), when ``share`` of its forward passes is done."""

    def checking(self, check: str, done: int, total: int) -> None:
        """Run before a sanity check, when ``done`` of ``total`` are done."""

    def say(self, sentence: str) -> None:
        """Run before the attacks, for each sentence about what is resumed and what the evaluation costs."""


@dataclass
class AttackOutcome:
    """Verdicts and cost of an attack, summed over its batches.

    Attributes:
        correct: Mask of the examples still classified correctly, (N,) bool on the CPU.
        adversarial: Adversarial images (N, C, H, W), on the CPU; None if they are not kept.
        forwards: Single-image forward passes.
        backwards: Single-image backward passes.
        inadmissible: Number of adversarial images outside the threat model.
        seconds: Wall time in seconds, summed over ranks.
        joules: Energy; None if it is not known.
        memory: Peak GPU memory in bytes; None on a CPU.
        remaining: Number of correctly classified examples after each stage.
    """

    correct: Tensor
    adversarial: Tensor | None
    forwards: int = 0
    backwards: int = 0
    inadmissible: int = 0
    seconds: float = 0.0
    joules: float | None = None
    memory: int | None = None
    remaining: tuple[int, ...] = ()

    def result(self, attack: Attack) -> AttackResult:
        """Return the result of the attack for the report."""
        total = len(self.correct)
        parts = {part.name: left for part, left in zip(attack.parts, self.remaining, strict=True) if part.name}
        counts = [f"{left} of {total} correct after {name}" for name, left in parts.items()]
        outside = f"{self.inadmissible} adversarial images do not count: not finite, not in [0, 1] or not within eps"
        return AttackResult.of(
            attack.name,
            self.correct,
            seconds=self.seconds,
            energy_kwh=None if self.joules is None else self.joules / JOULES_PER_KWH,
            peak_memory=self.memory,
            forwards=self.forwards,
            backwards=self.backwards,
            inadmissible=self.inadmissible,
            parameters=attack.parameters,
            parts=parts,
            notes=(*attack.notes, *counts, *([outside] if self.inadmissible else []), *attack.warnings),
        )


def _natural(model: CountingModel, batch: Batch) -> AttackOutput:
    """Classify the clean images, in full precision."""
    with torch.no_grad():
        logits = model.exact(batch.images)
    if logits.isnan().any():
        raise DeatError(
            f"the model returns NaN for images {int(batch.rows[0])} to {int(batch.rows[-1])}, so its training probably "
            "diverged: evaluate an earlier checkpoint, or retrain with a smaller learning rate"
        )
    return AttackOutput(batch.images, logits.argmax(dim=1) != batch.labels)


NATURAL = Attack("natural", (AttackStage("", _natural, calls=1),), {})


@dataclass(frozen=True)
class AttackRunner:
    """Runner of attacks on a model, one after the other.

    Attributes:
        prepared: The model and the examples.
        context: Norm, eps and seed of the attacks.
        store: Store of the results of batches.
        keep: Whether adversarial images are kept.
        dtype: Precision of the attacks; their images are classified in the model's own precision.
        progress: The hooks for showing progress.
        sweeping: Whether to show eps in progress, because there are several.
        confirm: Whether to classify the adversarial images again, in float32, because the attacks run in lower
            precision.
        ranks: The ranks that share the batches of each stage.
        captures: Recorder of forward passes as CUDA graphs; None if they are not recorded.
    """

    prepared: PreparedModel
    context: AttackContext
    store: ResumeStore
    keep: bool = False
    dtype: torch.dtype | None = None
    progress: EvaluationCallback = field(default_factory=EvaluationCallback)
    sweeping: bool = False
    confirm: bool = False
    ranks: World = field(default_factory=World)
    captures: Captures | None = None

    def run(self, attack: Attack, correct: Tensor) -> AttackOutcome:
        """Attack the examples in the mask ``correct``, (N,) bool on the CPU, stage by stage."""
        keep = self.keep and attack is not NATURAL
        outcome = AttackOutcome(correct.clone(), self.prepared.all_images().float() if keep else None)
        model = CountingModel(self.prepared.model, None if attack is NATURAL else self.dtype)
        for stage in attack.parts:
            pool = outcome.correct.nonzero().flatten() if stage.packed else torch.arange(len(self.prepared))
            batches = self.prepared.batches(pool)
            name = f"{attack.name}/{stage.name}" if stage.name else attack.name
            if self.sweeping and attack is not NATURAL:
                name += f" (eps {format_fraction(self.context.eps)})"
            display = _Display(name, stage, len(batches), len(pool), self.progress)
            shares: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(self.ranks.size)]
            own, to_do = shares[self.ranks.rank], []
            for number in range(self.ranks.rank, len(batches), self.ranks.size):
                rows = batches[number]
                stored = None
                if chosen := bool(outcome.correct[rows].any()):
                    stored = self.store.load(self._key(attack, stage, number))
                if stored is not None:
                    self.store.has_attacks |= attack is not NATURAL
                    own[number] = stored
                    _add(stored, rows, outcome, attack)
                elif chosen:
                    to_do.append(number)
                    continue
                display.done(rows, outcome.correct, quietly=stored is not None)
            with self._captured(attack, stage, model) if to_do else nullcontext():
                for number, result in self._results(attack, stage, model, outcome, batches, to_do, display):
                    self.store.save(self._key(attack, stage, number), result)
                    self.store.has_attacks |= attack is not NATURAL
                    own[number] = result
                    _add(result, batches[number], outcome, attack)
                    display.done(batches[number], outcome.correct, quietly=False)
            if self.ranks.size > 1:
                shares = self.ranks.all_gather(own)
                for number, rows in enumerate(batches):
                    by = number % self.ranks.size
                    if by != self.ranks.rank:
                        if number in shares[by]:
                            _add(shares[by][number], rows, outcome, attack)
                        display.done(rows, outcome.correct, quietly=True)
            outcome.remaining = (*outcome.remaining, int(outcome.correct.sum()))
        return outcome

    def _key(self, attack: Attack, stage: AttackStage, number: int) -> str:
        return f"eps {self.context.eps!r}, {attack.name}, {stage.name or 'all'}, batch {number}"

    def _captured(self, attack: Attack, stage: AttackStage, model: CountingModel) -> AbstractContextManager[None]:
        """Return a context that repeats the stage's forward passes as CUDA graphs, if that is possible."""
        if self.captures is None or not stage.recordable or not self.prepared.is_independent:
            return nullcontext()
        return self.captures.during(model, attack.warnings)

    def _results(
        self,
        attack: Attack,
        stage: AttackStage,
        model: CountingModel,
        outcome: AttackOutcome,
        batches: Sequence[Tensor],
        numbers: Sequence[int],
        display: _Display,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Attack the batches with the given numbers; yield each number, in order, with the tensors to store."""

        def to_attack() -> Iterator[Batch]:
            for number in numbers:
                rows = batches[number]
                images, labels = self.prepared.take(rows)
                yield Batch(images, labels, outcome.correct[rows].to(images.device), number, rows)

        outputs = self._outputs(attack, stage, model, to_attack()) if numbers else iter(())
        meter = Meter(self.prepared.device)
        for number in numbers:
            start, forwards, backwards = time.perf_counter(), model.forwards, model.backwards
            meter.start()
            with display.within(number, model):
                output, clean = next(outputs)
            passes = output.passes or (model.forwards - forwards, model.backwards - backwards)
            admissible = self.context.ball.contains(output.images, clean)
            result = {
                "misclassified": (output.misclassified & admissible).cpu(),
                "counts": torch.tensor((*passes, int((~admissible).sum()))),
                "warnings": torch.tensor(list(json.dumps(attack.warnings).encode()), dtype=torch.uint8),
            }
            if outcome.adversarial is not None:
                result["adversarial"] = torch.where(admissible[:, None, None, None], output.images, clean).float().cpu()
            usage = meter.read()
            if usage.joules is not None:
                result["joules"] = torch.tensor(usage.joules, dtype=torch.float64)
            if usage.memory is not None:
                result["memory"] = torch.tensor(usage.memory)
            result["seconds"] = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            yield number, result

    def _outputs(
        self, attack: Attack, stage: AttackStage, model: CountingModel, batches: Iterable[Batch]
    ) -> Iterator[tuple[AttackOutput, Tensor]]:
        """Attack batches, together where that is possible; yield the results and their clean images in order."""
        begun: deque[tuple[Tensor, Tensor]] = deque()

        def supply() -> Iterator[Batch]:
            for batch in batches:
                begun.append((batch.images[batch.chosen], batch.labels[batch.chosen]))
                yield batch

        if stage.craft_all is not None and self.prepared.is_independent:
            for output in stage.craft_all(model, supply(), self.prepared.batch_size):
                clean, labels = begun.popleft()
                yield self._confirmed(attack, model, output, labels), clean
            return
        device = self.prepared.device
        for batch in supply():
            clean, labels = begun.popleft()
            with seeding.preserved(), full_float32(device) if attack is NATURAL else nullcontext():
                # Seeded so that the model's own random numbers are the same in every evaluation.
                seeding.seed_global(self.context.seed, "evaluate", attack.name, stage.name, batch.number)
                output = self._confirmed(attack, model, stage.craft(model, batch), labels)
            yield output, clean

    def _confirmed(self, attack: Attack, model: CountingModel, output: AttackOutput, labels: Tensor) -> AttackOutput:
        """Classify the adversarial images again, in float32, if the attacks ran in lower precision."""
        if not self.confirm or attack is NATURAL:
            return output
        with torch.no_grad(), full_float32(self.prepared.device):
            misclassified = model.exact(output.images).argmax(dim=1) != labels
        passes = output.passes and (output.passes[0] + len(labels), output.passes[1])
        return AttackOutput(output.images, misclassified, passes)


def _add(batch: dict[str, Tensor], rows: Tensor, outcome: AttackOutcome, attack: Attack) -> None:
    """Add the result of a batch with the indices ``rows``, of which the correct ones were attacked, to the outcome."""
    attacked = rows[outcome.correct[rows]]
    forwards, backwards, inadmissible = batch["counts"].tolist()
    outcome.forwards += forwards
    outcome.backwards += backwards
    outcome.inadmissible += inadmissible
    outcome.seconds += float(batch["seconds"])
    if "joules" in batch:
        outcome.joules = (outcome.joules or 0.0) + float(batch["joules"])
    if "memory" in batch:
        outcome.memory = max(outcome.memory or 0, int(batch["memory"]))
    outcome.correct[attacked] = ~batch["misclassified"]
    if outcome.adversarial is not None:
        outcome.adversarial[attacked] = batch["adversarial"]
    for sentence in json.loads(bytes(batch["warnings"].tolist())):
        if sentence not in attack.warnings:
            attack.warnings.append(sentence)


class _Display:
    """Reporter of finished batches, and of progress within a batch, to the caller's progress object."""

    def __init__(self, name: str, stage: AttackStage, batches: int, total: int, progress: EvaluationCallback) -> None:
        self.name = name
        self.counts_all = bool(stage.name)
        self.calls = stage.calls
        self.batches = batches
        self.total = total
        self.progress = progress
        self.finished = torch.empty(0, dtype=torch.int64)

    def done(self, rows: Tensor, correct: Tensor, *, quietly: bool) -> None:
        """Report a batch and the number of correct examples: among all for a named stage, else among those done.

        With ``quietly``, as for batches loaded from the store, only the last batch is reported.
        """
        self.finished = torch.cat([self.finished, rows])
        if len(self.finished) == self.total or not quietly:
            among = correct if self.counts_all else correct[self.finished]
            self.progress(self.name, len(self.finished), self.total, int(among.sum()))

    @contextmanager
    def within(self, number: int, model: CountingModel) -> Iterator[None]:
        """Count the forward passes within a batch and report the fraction done every `WITHIN_EVERY` seconds."""
        update = self.progress.within
        first_call, last_update = model.calls, time.monotonic()

        def on_call() -> None:
            nonlocal last_update
            if time.monotonic() - last_update >= WITHIN_EVERY:
                last_update = time.monotonic()
                fraction = min(0.99, (model.calls - first_call) / self.calls) if self.calls else 0.0
                update(self.name, number + 1, self.batches, fraction)

        update(self.name, number + 1, self.batches, 0.0)
        model.on_call = on_call
        try:
            yield
        finally:
            model.on_call = None
