"""Per-batch and per-epoch training metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from deat_rb.utils.distributed import World

SUMMED = ("loss", "correct", "l_x", "forwards", "backwards", "overflows")


@dataclass
class BatchStats:
    """Statistics of one training step. Sums over the batch are 0-d tensors on the device, which avoids a device sync.

    Attributes:
        examples: Number of examples, N.
        loss: Surrogate loss, summed over the examples (for replays: in the last replay).
        correct: Number of adversarial examples classified correctly in the training step.
        l_x: See `CraftStats`.
        forwards: Forward passes of attack and update, in units of mini-batches.
        backwards: Backward passes of attack and update, in units of mini-batches.
        updates: Optimizer steps.
        image_size: Number of values per image, |x| = C * H * W.
        overflows: See `CraftStats`.
    """

    examples: int
    loss: Tensor
    correct: Tensor
    l_x: Tensor
    forwards: float | Tensor
    backwards: float | Tensor
    updates: int
    image_size: int
    overflows: float | Tensor = 0.0


class EpochAccumulator:
    """Sums of `BatchStats` over an epoch, kept on the device until `read`.

    Attributes:
        examples: Number of examples.
        updates: Optimizer steps.
        batches: Number of mini-batches.
        image_size: Number of values per image, |x|.
    """

    def __init__(self) -> None:
        self.examples = self.updates = self.batches = self.image_size = 0
        self._sums: dict[str, float | Tensor] = dict.fromkeys(SUMMED, 0.0)

    def add(self, stats: BatchStats, share: float = 1.0) -> None:
        """Add the statistics of a batch; its passes are weighted with the rank's ``share`` of the batch."""
        self.examples += stats.examples
        self.updates += stats.updates
        self.batches += 1
        self.image_size = stats.image_size
        for name, value in self._sums.items():
            term = getattr(stats, name)
            if name in ("forwards", "backwards") and share != 1:
                term = term * share
            self._sums[name] = value + (term.double() if name == "l_x" and term.device.type != "mps" else term)

    def read(self) -> dict[str, float]:
        """Return the sums as floats; synchronizes with the device."""
        return {name: float(value) for name, value in self._sums.items()}

    def all_reduce(self, world: World) -> EpochAccumulator:
        """Return the sums over all ranks."""
        return self if world.size == 1 else EpochAccumulator.merge(world.all_gather(self.state_dict()))

    def state_dict(self) -> dict[str, float]:
        """Return the sums as JSON values, from which `merge` restores them exactly."""
        counts = {name: getattr(self, name) for name in ("examples", "updates", "batches", "image_size")}
        return counts | self.read()

    @classmethod
    def merge(cls, parts: Sequence[Mapping[str, float]]) -> EpochAccumulator:
        """Return the sum of the `state_dict`s of several ranks, which share the same batches."""
        sums = cls()
        sums.updates, sums.batches, sums.image_size = (
            int(parts[0][name]) for name in ("updates", "batches", "image_size")
        )
        sums.examples = sum(int(part["examples"]) for part in parts)
        parts = [{"overflows": 0.0, **part} for part in parts]  # a checkpoint of an earlier version has none
        sums._sums.update({name: sum(float(part[name]) for part in parts) for name in sums._sums})
        return sums

    @classmethod
    def resume_share(cls, parts: Sequence[Mapping[str, float]], world: World) -> EpochAccumulator:
        """Return the sums that a rank resumes with, given the `state_dict`s of the ranks that wrote a checkpoint.

        If the number of ranks is unchanged, each rank gets its own sums; otherwise they are redistributed.
        """
        own = parts[world.rank :: world.size]
        return cls.merge(own or [{**parts[0], "examples": 0, **cls().read()}])


@dataclass
class EpochStats:
    """Metrics of an epoch: a row of ``metrics.jsonl``, and the input of schedules and stopping rules.

    Attributes:
        epoch: Number of the epoch, from 1.
        steps: Attack steps r in this epoch (for replays: number of replays).
        alpha: Step size, in [0, 1] pixel units.
        eps: With ``eps_warmup``, the radius in the epoch's last batch; alpha was smaller in proportion.
        l_x: L1 norm of the last input gradient, summed over the examples of the epoch (Algorithms 2-5); with ``norm``
            L2, its L2 norm.
        lipschitz: Theorem 1's lower bound on the Lipschitz constant of the input gradient, averaged over examples.
        examples: Number of examples trained on.
        loss: Mean surrogate loss.
        train_acc: Accuracy on the adversarial examples trained on, in [0, 1]; of images that CutMix or MixUp mixed, the
            fraction predicted as the class with the larger share.
        val_acc: Natural accuracy on the validation images, in [0, 1].
        val_robust_acc: PGD-20 accuracy on the validation images, in [0, 1].
        val_top_predicted: Fraction of the validation images that are predicted as the most common class.
        val_class_acc: Natural accuracy per class on the validation images, in the order of the labels; None for a class
            without any.
        val_class_robust_acc: PGD-20 accuracy per class on the validation images.
        raw_val_acc: With ``ema``, the natural accuracy of the weights that are not averaged.
        raw_val_robust_acc: With ``ema``, their PGD-20 accuracy.
        stop_robust_acc: PGD-5 accuracy on the first 128 validation images, for the stopping rule, in [0, 1].
        backwards: Backward passes in units of mini-batches.
        forwards: Forward passes in units of mini-batches.
        updates: Optimizer steps.
        lr: Learning rate of the last update in the epoch.
        seconds: Training time in seconds, without validation.
        val_seconds: Validation time in seconds.
        val_forwards: Single-image forward passes for validation and the stopping rule.
        val_backwards: Single-image backward passes for validation and the stopping rule.
        images_per_second: Training images per second.
        peak_memory: Peak memory in bytes: on the GPU in this epoch, or of the process so far.
        stopped: Reason why a stopping rule ended training here, or would have if early stopping were enabled.
        skipped: Number of batches rolled back because of NaN or Inf.
        overflows: Number of examples' gradients, over all attack steps, that overflowed in fp16 and counted as zero.
        processes: Number of ranks.
    """

    epoch: int = 0
    steps: int = 0
    alpha: float | None = None
    l_x: float = 0.0
    lipschitz: float | None = None
    eps: float | None = None
    examples: int = 0
    loss: float = 0.0
    train_acc: float = 0.0
    val_acc: float | None = None
    val_robust_acc: float | None = None
    val_top_predicted: float | None = None
    val_class_acc: list[float | None] | None = None
    val_class_robust_acc: list[float | None] | None = None
    raw_val_acc: float | None = None
    raw_val_robust_acc: float | None = None
    stop_robust_acc: float | None = None
    backwards: float = 0.0
    forwards: float = 0.0
    updates: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    val_seconds: float = 0.0
    val_forwards: int = 0
    val_backwards: int = 0
    images_per_second: float = 0.0
    peak_memory: int = 0
    stopped: str | None = None
    skipped: int = 0
    overflows: int = 0
    processes: int = 1

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> EpochStats:
        """Build the metrics from a row of ``metrics.jsonl``; unknown fields are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known})

    @classmethod
    def of(cls, row: EpochStats | Mapping[str, Any], number: int) -> EpochStats:
        """Return a row as `EpochStats`; ``number`` is the epoch if the row does not have one."""
        return row if isinstance(row, EpochStats) else cls.from_row({"epoch": number, **row})
