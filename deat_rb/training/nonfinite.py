"""Detection of NaN and Inf in training without a device sync, and rollback of non-finite batches."""

from __future__ import annotations

import contextlib
import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from deat_rb.training.callbacks import Action, Callback
from deat_rb.training.checks import BatchFlags, InputFlags
from deat_rb.training.metrics import BatchStats, EpochStats
from deat_rb.training.optimizers import optimizer_tensors
from deat_rb.training.state import TrainingState
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import load_tensors_into

CHECK_EVERY = 10.0
"""Seconds between checks within an epoch; each check synchronizes with the device."""


class NonFiniteFlags(BatchFlags):
    """Record of the first batch with a non-finite loss, l_X or gradient."""

    WATCHED = ("the loss", "l_X", "a gradient")

    def note(self, stats: BatchStats, model: nn.Module, batch: int) -> Tensor:
        """Record a batch, numbered from 0; a non-finite gradient is detected from the resulting weights.

        Returns:
            Whether each of `WATCHED` is finite, (3,) bool on the device.
        """
        norm = get_total_norm([parameter.detach() for parameter in model.parameters()])
        finite = torch.stack([stats.loss.isfinite(), stats.l_x.isfinite().to(stats.loss.device), norm.isfinite()])
        self.record(~finite, batch)
        return finite


class NonFiniteMonitor(Callback):
    """Stop training when the loss, l_X or a gradient is not finite, or skip non-finite batches.

    Checks run at the end of each epoch, before each checkpoint and every `CHECK_EVERY` seconds. With ``skip``, each
    batch is checked, which synchronizes with the device.

    Args:
        skip: Whether to roll back a non-finite batch and continue.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self._flags = NonFiniteFlags()
        self._snapshot: Snapshot | None = None

    def on_fit_start(self, state: TrainingState) -> None:
        """Start the clock of the checks."""
        super().on_fit_start(state)
        self._checked_at = time.monotonic()

    def on_batch_start(self) -> None:
        """Copy the state if non-finite batches are skipped."""
        if self.skip:
            self._snapshot = Snapshot(self.state)

    def on_step_end(self, stats: BatchStats) -> None:
        """Record non-finite values on the device; with ``skip``, roll back a batch that has any."""
        state = self.state
        finite = self._flags.note(stats, state.model, state.batch)
        if self._snapshot is not None and state.world.max_over_ranks(not bool(finite.all())):
            self._snapshot.restore()
            self._flags = NonFiniteFlags()
            state.skip_batch = True
            state.skipped += 1
            state.warn(
                f"batch {state.batch + 1} of epoch {state.epoch} was skipped: its loss, gradient or l_X is NaN or Inf"
            )

    def requested_action(self) -> Action:
        """Request ABORT if a check finds a non-finite value."""
        now = time.monotonic()
        if now - self._checked_at <= CHECK_EVERY:
            return Action.CONTINUE
        self._checked_at = now
        return Action.ABORT if self._found() else Action.CONTINUE

    def on_action(self, action: Action) -> None:
        """Raise before non-finite values would be saved to a checkpoint, and on a callback's ABORT."""
        if self.state.world.max_over_ranks(self._found() is not None):
            self._raise()
        if action == Action.ABORT:
            where = f"batch {self.state.batch} of epoch {self.state.epoch}"
            raise DeatError(f"a callback aborted training after {where}; {self.state.describe_saved()}")

    def on_train_epoch_end(self) -> None:
        """Raise if the epoch had a non-finite value, or if all of its batches were skipped."""
        all_skipped = self.state.sums.batches == 0 and self.state.skipped > 0
        if self.state.world.max_over_ranks(all_skipped or self._found() is not None):
            self._raise()

    def on_epoch_end(self, row: EpochStats) -> None:
        """Forget the epoch's records."""
        self._flags, self.state.inputs = NonFiniteFlags(), InputFlags()

    def _found(self) -> str | None:
        """Return a description of the first invalid batch of the epoch, if any; synchronizes with the device."""
        if bad := self.state.inputs.found():
            return f"batch {bad[0]} of epoch {self.state.epoch} is invalid: {bad[1]}"
        if bad := self._flags.found():
            return self._diverged(*bad)
        return None

    def _diverged(self, batch: int, what: str) -> str:
        return f"training diverged: {what} became NaN or Inf at batch {batch} of epoch {self.state.epoch}"

    def _raise(self) -> None:
        """Load the weights of the last finite epoch into the model and raise."""
        state = self.state
        what = self._found() or self._diverged(state.batch, "the loss, l_X or a gradient")
        advice = "" if state.inputs.found() else "; try a smaller --lr, or --on-nonfinite skip"
        good = "no epoch has finished yet"
        if state.recent:
            good = f"the model has the weights of epoch {state.recent[-1].row.epoch}"
            load_tensors_into(state.model, state.recent[-1].weights)
        with contextlib.suppress(DeatError):
            state.writer.wait()
        if state.saved is not None:
            path, epoch, saved_batch = state.saved
            good += f"; the checkpoint {path} (epoch {epoch}, batch {saved_batch}) is unaffected"
        raise DeatError(f"{what}; {good}{advice}")


class Snapshot:
    """Copy of all state that a training step changes."""

    def __init__(self, state: TrainingState) -> None:
        trainer, optimizer, engine = state.trainer, state.optimizer, state.engine
        self._trainer, self._engine, self._average = trainer, engine, state.average
        self._model = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        self._optimizer = [(tensor, tensor.clone()) for tensor in optimizer_tensors(optimizer).values()]
        if state.average is not None:
            self._averages = {name: tensor.clone() for name, tensor in state.average.tensors.items()}
            self._updates = state.average.updates.clone()
        self._restore_method = trainer.snapshot()
        self._scales: dict[str, Any] = copy.deepcopy(engine.state_dict())

    def restore(self) -> None:
        """Restore the copied state."""
        load_tensors_into(self._trainer.model, self._model)
        for tensor, before in self._optimizer:
            tensor.copy_(before)
        if self._average is not None:
            self._average.load(self._averages, self._updates)
        self._restore_method()
        if self._scales:
            self._engine.load_state_dict(self._scales)
