"""Where a run is: what its checkpoints hold, taken from the epoch loop and given back to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deat_rb.checkpoint import Checkpoint
from deat_rb.config import RunConfig, misfit
from deat_rb.errors import DeatError
from deat_rb.stats import EpochSums
from deat_rb.trainers import set_rate

if TYPE_CHECKING:
    from deat_rb.loop import Loop


class Position(BaseModel):
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


def of(loop: Loop, config: RunConfig, spent: float) -> Checkpoint:
    """Where a loop is, which all processes have to ask for together.

    Args:
        loop: It is between two batches.
        config: The run's configuration.
        spent: Seconds spent on the batches of the epoch under way.
    """
    position = Position(
        config=config.model_dump(mode="json"),
        epoch=loop.epoch,
        batch=loop.batch,
        spent=spent,
        lr=loop.optimizer.param_groups[0]["lr"],
        skipped=loop.skipped,
        sums=loop.world.gathered(loop.sums.facts()),
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


def read(state: Checkpoint) -> Position:
    """The facts of a checkpoint.

    Raises:
        DeatError: If they are none.
    """
    with _fitting(state):
        return Position.model_validate(state.facts)


def take(loop: Loop, state: Checkpoint, position: Position, batches: int) -> None:
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
        loop.sums = EpochSums.share_of(position.sums, loop.world)
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
        what = misfit(error) if isinstance(error, ValidationError) else str(error).partition("\n")[0]
        raise DeatError(
            f"{state.path} does not fit the run ({what}): it or the run was altered; start a new run"
        ) from error
