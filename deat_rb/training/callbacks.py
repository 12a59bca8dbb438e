"""Callbacks: the hooks of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from deat_rb.training.history import History
from deat_rb.training.metrics import BatchStats, EpochAccumulator, EpochStats
from deat_rb.training.state import TrainingState
from deat_rb.utils.errors import DeatError


class Action(IntEnum):
    """Action between two batches; the highest one that any callback on any rank requests is carried out.

    Attributes:
        CONTINUE: Go on with the next batch.
        SAVE: Save a checkpoint, if there is a run, and go on.
        STOP: Save a checkpoint, if there is a run, and raise `deat_rb.utils.errors.Interrupted`.
        ABORT: Raise `deat_rb.utils.errors.DeatError` without saving anything.
    """

    CONTINUE = 0
    SAVE = 1
    STOP = 2
    ABORT = 3


class Callback:
    """Hooks of the training loop, which calls the callbacks in the order given; the other hooks do nothing by default.

    Callbacks given to `fit` run on rank 0 only, so they must not communicate with other ranks. Reading a tensor's value
    in a hook synchronizes with the device.

    Attributes:
        state: The state of training, which the loop keeps up to date; set by `on_fit_start`.
    """

    state: TrainingState

    def on_fit_start(self, state: TrainingState) -> None:
        """Store the state; runs before training starts or resumes."""
        self.state = state

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """Run before epoch ``epoch`` of ``epochs``, which has ``batches`` batches and ``steps`` attack steps."""

    def on_batch_start(self) -> None:
        """Run before the training step of a batch, when the batch is on the device."""

    def on_step_end(self, stats: BatchStats) -> None:
        """Run after the training step of a batch, before its statistics are added to those of the epoch."""

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Run after each batch; ``sums`` covers the epoch so far."""

    def requested_action(self) -> Action:
        """Return the action to take before the next batch."""
        return Action.CONTINUE

    def on_action(self, action: Action) -> None:
        """Carry out an action other than CONTINUE; all ranks have agreed on it."""

    def on_train_epoch_end(self) -> None:
        """Run after the last batch of an epoch, before validation."""

    def on_validation_start(self) -> None:
        """Run before validation, on rank 0 only."""

    def on_validation_end(self, row: EpochStats) -> None:
        """Run after validation; the hook may still change the epoch's metrics ``row``."""

    def on_epoch_end(self, row: EpochStats) -> None:
        """Run at the end of an epoch, after its metrics were added to the history."""

    def on_warning(self, message: str) -> None:
        """Handle a warning; training continues."""

    def on_fit_end(self, history: History) -> None:
        """Run when training has ended without an error; the model holds the selected weights."""


def check_callbacks(callbacks: object) -> None:
    """Check that these are callbacks.

    Raises:
        DeatError: They are not.
    """
    if not isinstance(callbacks, Sequence) or not all(isinstance(each, Callback) for each in callbacks):
        raise DeatError(f"callbacks = {callbacks!r} is not a list of callbacks: give one such as [MyCallback()]")


def requested_by(callback: Callback) -> Action:
    """Return the action that a callback requests.

    Raises:
        DeatError: It returns something else.
    """
    action = callback.requested_action()
    if not isinstance(action, Action):
        raise DeatError(
            f"{type(callback).__name__}.requested_action returned {action!r}: return an Action, such as Action.CONTINUE"
        )
    return action
