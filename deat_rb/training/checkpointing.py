"""Checkpointing: the callbacks that write a run's metrics and checkpoints and resume it."""

from __future__ import annotations

import time
from functools import partial

from deat_rb.training import checkpoint
from deat_rb.training import state as training_state
from deat_rb.training.best_weights import BestWeights
from deat_rb.training.callbacks import Action, Callback
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.training.metrics import EpochStats
from deat_rb.training.run_store import RunStore
from deat_rb.training.state import SavedPosition, TrainingState
from deat_rb.utils.errors import DeatError


class MetricsWriter(Callback):
    """Append the metrics of each epoch to a run."""

    def __init__(self, run: RunStore) -> None:
        self.run = run

    def on_epoch_end(self, row: EpochStats) -> None:
        """Append the epoch's metrics."""
        self.state.world.on_main(partial(self.run.append, row))


class Checkpointing(Callback):
    """Write a checkpoint after each epoch and every few minutes, and resume from the newest one.

    A checkpoint is copied to host memory and written in the background, after the weights files of its epoch. Training
    waits for it before the next checkpoint, before an epoch's metrics are written (so that they are at most one epoch
    ahead) and at the end.

    Args:
        run: Storage of the checkpoints.
        weights: The callback that writes the weights files, which are updated on resuming.
        save_every: Seconds between checkpoints within an epoch.
        resume: Whether to resume from the run's newest checkpoint.
    """

    def __init__(self, run: RunStore, weights: BestWeights, save_every: float, resume: bool = False) -> None:
        self.run = run
        self.weights = weights
        self.save_every = save_every
        self.resume = resume

    def on_fit_start(self, state: TrainingState) -> None:
        """Restore the newest checkpoint if training resumes."""
        super().on_fit_start(state)
        self._saved_at = time.monotonic()
        if self.resume:
            self._restore()

    def requested_action(self) -> Action:
        """Request SAVE if the newest checkpoint is older than ``save_every``, or if it could not be written."""
        due = time.monotonic() - self._saved_at > self.save_every
        return Action.SAVE if due or self.state.writer.has_failed else Action.CONTINUE

    def on_action(self, action: Action) -> None:
        """Write a checkpoint on SAVE and STOP."""
        if action in (Action.SAVE, Action.STOP):
            self._wait()
            self._save()
        if action == Action.STOP:
            self._wait()

    def on_validation_end(self, row: EpochStats) -> None:
        """Wait until the previous files are complete, before the epoch's metrics and weights are written."""
        self._wait()

    def on_epoch_end(self, row: EpochStats) -> None:
        """Write a checkpoint, and wait for it if training has ended."""
        self._save()
        if self.state.epoch > self.state.epochs or self.state.history.stopped is not None:
            self._wait()

    def _save(self) -> None:
        """Start writing a checkpoint."""
        state = self.state
        copied = training_state.save(state, self.run.config_json)
        self._saved_at = time.monotonic()
        if state.world.is_main:
            state.writer.start(partial(self._write, copied, state.epoch, state.batch))

    def _write(self, copied: Checkpoint, epoch: int, batch: int) -> None:
        self.state.saved = SavedPosition(checkpoint.write(self.run.checkpoints, copied), epoch, batch)

    def _wait(self) -> None:
        """Wait until all files are written, and raise the error if one could not be written."""

        def wait() -> SavedPosition | None:
            self.state.writer.wait()
            return self.state.saved

        self.state.saved = self.state.world.on_main(wait)

    def _restore(self) -> None:
        """Restore the newest undamaged checkpoint; if there is none yet, start from the beginning.

        Raises:
            DeatError: There is no checkpoint although the run has finished epochs, or it does not match the run.
        """
        run, world = self.run, self.state.world
        world.on_main(run.discard_unfinished)
        newest = checkpoint.newest(run.checkpoints, self.state.warn)
        if newest is None:
            if world.on_main(lambda: len(run.rows())):
                raise DeatError(f"{run.checkpoints} has no checkpoint to resume from; start a new run")
            return
        saved = training_state.read(newest)
        self.state.history.rows = world.on_main(partial(run.truncate, saved.epoch - 1))
        training_state.restore(self.state, newest, saved)
        self.state.saved = SavedPosition(newest.path, saved.epoch, saved.batch)
        self.weights.write()
        self._wait()
