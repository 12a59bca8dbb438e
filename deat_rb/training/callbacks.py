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
        """Training is about to start or to resume; ``state`` is kept up to date from here on."""

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """Epoch ``epoch`` of ``epochs``, of ``batches`` batches and with ``steps`` attack steps, is about to start."""

    def on_batch_start(self) -> None:
        """A batch is on the device."""

    def on_step_end(self, stats: BatchStats) -> None:
        """The training step of a batch is done, before its statistics are added to the epoch's."""

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """A batch is done; ``sums`` are over the epoch so far."""

    def requested_action(self) -> Action:
        """Return what to do before the next batch."""
        return Action.CONTINUE

    def on_action(self, action: Action) -> None:
        """An action other than CONTINUE was agreed on by all ranks."""

    def on_train_epoch_end(self) -> None:
        """The epoch's batches are done; validation comes next."""

    def on_validation_start(self) -> None:
        """The validation of an epoch is about to start; called on rank 0, where alone it runs."""

    def on_validation_end(self, row: EpochStats) -> None:
        """An epoch's metrics are complete, except for what this hook sets."""

    def on_epoch_end(self, row: EpochStats) -> None:
        """An epoch is complete and in the history."""

    def on_warning(self, message: str) -> None:
        """Something is not as it should be, and training goes on."""

    def on_fit_end(self, history: History) -> None:
        """Training has ended without an error; the model holds the selected weights."""
