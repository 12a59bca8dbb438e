"""Callbacks: the hooks of the training loop."""

from __future__ import annotations

from enum import IntEnum

from deat_rb.training.history import History
from deat_rb.training.metrics import BatchStats, EpochAccumulator, EpochStats
from deat_rb.training.state import TrainingState


class Action(IntEnum):
    """What happens between two batches; of all ranks' and callbacks' requests the highest one is carried out."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2
    ABORT = 3


class Callback:
    """Hooks that the training loop calls, in the order of the list of callbacks; each does nothing by default.

    Callbacks given to `fit` run on rank 0 alone, so they must not communicate with other ranks. Reading a tensor's
    value in a hook waits for the device.
    """

    def on_fit_start(self, state: TrainingState) -> None:
        """Run before training starts or resumes; ``state`` stays up to date from here on."""

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """Run before epoch ``epoch`` of ``epochs``, which has ``batches`` batches and ``steps`` attack steps."""

    def on_batch_start(self) -> None:
        """Run when a batch is on the device, before its training step."""

    def on_step_end(self, stats: BatchStats) -> None:
        """Run after the training step of a batch, before its statistics are added to the epoch's."""

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Run after each batch; ``sums`` are over the epoch so far."""

    def requested_action(self) -> Action:
        """Return what to do before the next batch."""
        return Action.CONTINUE

    def on_action(self, action: Action) -> None:
        """Carry out an action other than CONTINUE, on which all ranks have agreed."""

    def on_train_epoch_end(self) -> None:
        """Run after the last batch of an epoch, before validation."""

    def on_validation_start(self) -> None:
        """Run before validation, which rank 0 alone does."""

    def on_validation_end(self, row: EpochStats) -> None:
        """Run after validation; this hook may still set fields of the epoch's metrics."""

    def on_epoch_end(self, row: EpochStats) -> None:
        """Run at the end of an epoch, which is in the history by then."""

    def on_warning(self, message: str) -> None:
        """Handle a warning; training goes on."""

    def on_fit_end(self, history: History) -> None:
        """Run when training has ended without an error; the model holds the selected weights."""
