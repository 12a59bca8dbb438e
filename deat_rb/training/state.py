"""The state of training, and its conversion to and from a checkpoint."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from deat_rb.training.averaging import WeightAverage
from deat_rb.training.background import BackgroundWriter
from deat_rb.training.base import TrainerBase
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.training.checks import InputFlags
from deat_rb.training.engine import Engine
from deat_rb.training.history import History
from deat_rb.training.lr import rate_of, set_rate
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.run_store import RunStore
from deat_rb.training.stopping_rule import Stop
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import load_tensors_into
from deat_rb.utils.options import OPEN
from deat_rb.utils.records import describe_validation_error
from deat_rb.utils.text import counted


class EpochWeights(NamedTuple):
    """The metrics of an epoch and the model's weights after it, on the CPU.

    Attributes:
        row: The metrics.
        weights: The weights; with ``ema`` the averaged ones.
        raw: With ``ema``, the weights that are not averaged.
    """

    row: EpochStats
    weights: dict[str, Tensor]
    raw: dict[str, Tensor] | None = None


@dataclass
class TrainingState:
    """State shared by the training loop and its callbacks.

    Attributes:
        trainer: The method and its model.
        engine: Device, precision and ranks.
        optimizer: Optimizer of the model's parameters.
        epochs: Number of epochs, T; `deat_rb.utils.options.OPEN` for an open-ended run.
        seed: Seed of the run.
        recent: The newest epochs and their weights, as many as the stopping rule may go back.
        run: Storage of metrics, weights and checkpoints; None to store nothing.
        average: The moving average of the weights; None without ``ema``.
        settled: Of the epochs before ``recent``, the one with the best robust validation accuracy (``--select best``).
        batches: Batches per epoch.
        epoch: The current epoch, numbered from 1.
        batch: Number of finished batches in the current epoch.
        skipped: Number of these that were rolled back.
        skip_batch: Whether to omit the current batch from the epoch's sums; reset before each batch.
        inputs: Record of batches with invalid values on an accelerator.
        sums: Statistics summed over the epoch's batches on this rank.
        history: Metrics of the finished epochs.
        stop: Decision of the stopping rule to end training; None if it has not.
        saved: Position of the newest completely written checkpoint.
        writer: Writer of weights and checkpoints.
        warn: Function that passes a warning to the callbacks.
    """

    trainer: TrainerBase
    engine: Engine
    optimizer: Optimizer
    epochs: int
    seed: int
    recent: deque[EpochWeights]
    run: RunStore | None = None
    average: WeightAverage | None = None
    settled: EpochWeights | None = None
    batches: int = 0
    epoch: int = 1
    batch: int = 0
    skipped: int = 0
    skip_batch: bool = False
    inputs: InputFlags = field(default_factory=InputFlags)
    sums: EpochAccumulator = field(default_factory=EpochAccumulator)
    history: History = field(default_factory=History)
    stop: Stop | None = None
    saved: SavedPosition | None = None
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    warn: Callable[[str], None] = warnings.warn
    _seconds: float = 0.0
    _started: float | None = None

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        model: nn.Module = self.trainer.model
        return model

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights, if they are averaged."""
        return nullcontext() if self.average is None else self.average.swapped_in()

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self.engine.world

    @property
    def seconds(self) -> float:
        """Seconds spent on the batches of the current epoch, including time before a resume."""
        return self._seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def start_clock(self) -> None:
        """Start measuring `seconds`."""
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        """Stop measuring `seconds`."""
        self._seconds, self._started = self.seconds, None

    def finish_epoch(self, row: EpochStats) -> None:
        """Append the current epoch to the history and move to the beginning of the next one."""
        self.history.rows.append(row)
        self.epoch, self.batch, self.skipped = self.epoch + 1, 0, 0
        self.sums, self._seconds, self._started = EpochAccumulator(), 0.0, None

    def describe_saved(self) -> str:
        """Describe how much of the run is saved, once the files that are being written are complete."""
        if self.run is None:
            weights = f"weights of epoch {self.history.selected}" if self.history.selected else "newest weights"
            return f"{self._out_of(len(self.history.rows))} were trained; the model has the {weights}"
        failed = ""
        try:
            self.writer.wait()
        except DeatError as error:
            failed = f"; {error}"
        epochs, batches = (self.saved.epoch - 1, self.saved.batch) if self.saved else (0, 0)
        done = self._out_of(epochs) + (f" and {counted(batches, 'batch')} of the next" if batches else "")
        result = f"{self.run.command('eval')} evaluates it, " if self.epochs == OPEN and epochs else ""
        return f"{self.run.path} keeps {done}; {result}{self.run.command('train --resume')} resumes it{failed}"

    def _out_of(self, epochs: int) -> str:
        if self.epochs == OPEN:
            return counted(epochs, "epoch")
        return f"{epochs} of {counted(self.epochs, 'epoch')}"


class SavedPosition(NamedTuple):
    """File of a checkpoint and its position: the current epoch and its number of finished batches."""

    path: Path | None
    epoch: int
    batch: int


class SavedState(BaseModel):
    """The JSON part of a checkpoint.

    Attributes:
        config: Configuration of the run, as JSON values.
        epoch: The current epoch, numbered from 1.
        batch: Number of finished batches in the current epoch.
        spent: Seconds spent on these batches.
        lr: Learning rate of the last batch.
        skipped: Number of batches rolled back in the current epoch.
        sums: Statistics summed over the epoch's batches, one entry per rank.
        trainer: `state_dict` of the trainer.
        scaler: State of fp16's loss scales.
        settled: Epoch of `TrainingState.settled`, whose weights are the tensors ``settled.NAME``; may be None.
        kept: Epochs of `TrainingState.recent`, whose weights are the tensors ``kept.EPOCH.NAME``.
        stopped: Reason why the stopping rule ended training, or None.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    config: dict[str, Any]
    epoch: int = Field(ge=1)
    batch: int = Field(ge=0)
    spent: float = Field(ge=0)
    lr: float = Field(ge=0)
    skipped: int = Field(ge=0)
    sums: list[dict[str, float]] = Field(min_length=1)
    trainer: dict[str, Any]
    scaler: dict[str, Any]
    settled: int | None
    kept: list[int]
    stopped: str | None


def save(state: TrainingState, config: dict[str, Any]) -> Checkpoint:
    """Return a checkpoint of a training state between two batches; all ranks must call this together.

    Args:
        state: The training state.
        config: Configuration of the run, as JSON values.
    """
    saved = SavedState(
        config=config,
        epoch=state.epoch,
        batch=state.batch,
        spent=state.seconds,
        lr=rate_of(state.optimizer),
        skipped=state.skipped,
        sums=state.world.all_gather(state.sums.state_dict()),
        trainer=state.trainer.state_dict(),
        scaler=state.engine.state_dict(),
        settled=state.settled.row.epoch if state.settled else None,
        kept=[each.row.epoch for each in state.recent],
        stopped=state.history.stopped,
    )
    checkpoint = Checkpoint(facts=saved.model_dump())
    checkpoint.put("model", state.model.state_dict())
    checkpoint.put_optimizer(state.optimizer)
    checkpoint.put("trainer", state.trainer.tensors())
    if state.average is not None:
        checkpoint.put("average", state.average.tensors)
        checkpoint.put("averaging", {"updates": state.average.updates})
    for epoch in state.recent:
        _put_epoch(checkpoint, f"kept.{epoch.row.epoch}", epoch)
    if state.settled is not None:
        _put_epoch(checkpoint, "settled", state.settled)
    return checkpoint


def _put_epoch(checkpoint: Checkpoint, prefix: str, epoch: EpochWeights) -> None:
    checkpoint.put(prefix, epoch.weights, copy=False)
    if epoch.raw is not None:
        checkpoint.put(f"raw_{prefix}", epoch.raw, copy=False)


def read(checkpoint: Checkpoint) -> SavedState:
    """Return the JSON part of a checkpoint.

    Raises:
        DeatError: The JSON part is invalid.
    """
    with _refuse_misfits(checkpoint):
        return SavedState.model_validate(checkpoint.facts)


def restore(state: TrainingState, checkpoint: Checkpoint, saved: SavedState) -> None:
    """Restore a training state from a checkpoint; its history must already hold the finished epochs.

    Raises:
        DeatError: The checkpoint does not match the run.
    """
    with _refuse_misfits(checkpoint):
        if saved.batch > state.batches:
            raise ValueError(f"it has {saved.batch} finished batches in an epoch of {state.batches}")
        if saved.epoch > 1 and not saved.kept:
            raise ValueError("it lacks the weights of the finished epochs")
        expected = state.model.state_dict()
        state.epoch, state.batch, state._seconds = saved.epoch, saved.batch, saved.spent
        state.skipped, state.history.stopped = saved.skipped, saved.stopped
        load_tensors_into(state.model, checkpoint.take_like("model", expected))
        checkpoint.take_optimizer(state.optimizer)
        set_rate(state.optimizer, saved.lr)
        state.trainer.load_state_dict(saved.trainer, checkpoint.take("trainer"))
        state.engine.load_state_dict(saved.scaler)
        state.sums = EpochAccumulator.resume_share(saved.sums, state.world)
        averages = checkpoint.take_like("average", {} if state.average is None else state.average.tensors)
        if state.average is not None:
            counts = checkpoint.take_like("averaging", {"updates": state.average.updates})
            state.average.load(averages, counts["updates"])

        def take(prefix: str, epoch: int) -> EpochWeights:
            raw = checkpoint.take_like(f"raw_{prefix}", expected) if state.average is not None else None
            return EpochWeights(rows[epoch], checkpoint.take_like(prefix, expected), raw)

        rows = {row.epoch: row for row in state.history.rows}
        if saved.settled is not None:
            state.settled = take("settled", saved.settled)
        state.recent.extend(take(f"kept.{epoch}", epoch) for epoch in saved.kept)


@contextmanager
def _refuse_misfits(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the errors that an altered checkpoint with a valid checksum may raise into DeatError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        what = describe_validation_error(error) if isinstance(error, ValidationError) else str(error).partition("\n")[0]
        raise DeatError(
            f"{checkpoint.path} does not match the run ({what}): one of them was altered; start a new run"
        ) from error
