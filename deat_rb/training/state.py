"""Where a run is: what its checkpoints hold, taken from the epoch loop and given back to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import SGD

from deat_rb.training.base import TrainerBase
from deat_rb.training.callbacks import History
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError
from deat_rb.utils.records import describe_validation_error


class Running(Protocol):
    """The part of an epoch loop that a checkpoint holds."""

    trainer: TrainerBase
    engine: Engine
    optimizer: SGD
    history: History
    kept: deque[tuple[EpochStats, dict[str, Tensor]]]
    settled: tuple[EpochStats, dict[str, Tensor]] | None
    sums: EpochAccumulator
    epoch: int
    batch: int
    skipped: int
    spent: float

    @property
    def world(self) -> World:
        """The processes that train together."""
        ...


class LoopState(BaseModel):
    """The facts of a run's checkpoint.

    Attributes:
        config: The run's configuration, as JSON values.
        epoch: The epoch under way, from 1.
        batch: How many of its batches are done.
        spent: Seconds spent on them.
        lr: The learning rate of the last of them.
        skipped: How many of them were undone.
        sums: Over them, of each process.
        trainer: What the method carries along.
        scaler: Of fp16's loss scale.
        settled: The epoch whose weights are under ``settled``.
        kept: The epochs whose weights are under ``kept.``.
        stopped: Why a rule has ended training.
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


def of(loop: Running, config: dict[str, Any], spent: float) -> Checkpoint:
    """Where a loop is, which all processes have to ask for together.

    Args:
        loop: It is between two batches.
        config: The run's configuration.
        spent: Seconds spent on the batches of the epoch under way.
    """
    position = LoopState(
        config=config,
        epoch=loop.epoch,
        batch=loop.batch,
        spent=spent,
        lr=loop.optimizer.param_groups[0]["lr"],
        skipped=loop.skipped,
        sums=loop.world.all_gather(loop.sums.facts()),
        trainer=loop.trainer.state_dict(),
        scaler=loop.engine.scaler.state_dict(),
        settled=loop.settled[0].epoch if loop.settled else None,
        kept=[row.epoch for row, _ in loop.kept],
        stopped=loop.history.stopped,
    )
    state = Checkpoint(facts=position.model_dump())
    state.put("model", loop.trainer.model.state_dict())
    state.put_optimizer(loop.optimizer)
    state.put("trainer", loop.trainer.tensors())
    for row, weights in loop.kept:
        state.put(f"kept.{row.epoch}", weights)
    if loop.settled is not None:
        state.put("settled", loop.settled[1])
    return state


def read(state: Checkpoint) -> LoopState:
    """The facts of a checkpoint.

    Raises:
        DeatError: If they are none.
    """
    with _fitting(state):
        return LoopState.model_validate(state.facts)


def take(loop: Running, state: Checkpoint, position: LoopState, batches: int) -> None:
    """Puts a loop where a checkpoint is, whose epochs before have their rows in ``loop.history`` already.

    Raises:
        DeatError: If the checkpoint does not fit.
    """
    with _fitting(state):
        if position.batch > batches:
            raise ValueError(f"it is {position.batch} batches into an epoch of {batches}")
        if position.epoch > 1 and not position.kept:
            raise ValueError("it has no epoch's weights")
        model = loop.trainer.model.state_dict()
        loop.epoch, loop.batch, loop.spent = position.epoch, position.batch, position.spent
        loop.skipped, loop.history.stopped = position.skipped, position.stopped
        loop.trainer.model.load_state_dict(state.take_like("model", model))
        state.take_optimizer(loop.optimizer)
        set_rate(loop.optimizer, position.lr)
        loop.trainer.load_state_dict(position.trainer, state.take("trainer"))
        loop.engine.scaler.load_state_dict(position.scaler)
        loop.sums = EpochAccumulator.share_of(position.sums, loop.world)
        by_epoch = {row.epoch: row for row in loop.history.rows}
        if position.settled is not None:
            loop.settled = by_epoch[position.settled], state.take_like("settled", model)
        loop.kept.extend((by_epoch[epoch], state.take_like(f"kept.{epoch}", model)) for epoch in position.kept)


@contextmanager
def _fitting(state: Checkpoint) -> Iterator[None]:
    """Turns what a checkpoint that somebody has altered, checksum and all, may meet into a sentence."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        what = describe_validation_error(error) if isinstance(error, ValidationError) else str(error).partition("\n")[0]
        raise DeatError(
            f"{state.path} does not fit the run ({what}): it or the run was altered; start a new run"
        ) from error
