"""The epoch loop: validation, the schedule's and the rule's decisions, what is kept, where to go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deat_rb.attacks.gradient_probe import lipschitz_lower_bound
from deat_rb.training import checkpoint
from deat_rb.training import state as position
from deat_rb.training.callbacks import Callback, History
from deat_rb.training.dataloading import Loader, check_first, count_batches, materialize, of_epoch, shard
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.nonfinite import NonFiniteMonitor, Snapshot
from deat_rb.training.signals import StopRequests
from deat_rb.training.validation import validate
from deat_rb.utils import seeding
from deat_rb.utils.distributed import World, is_peer_failure
from deat_rb.utils.errors import DeatError, Interrupted, UnwritableError

if TYPE_CHECKING:
    from pathlib import Path

    from deat_rb.training.base import Batch, TrainerBase
    from deat_rb.training.run_store import RunStore


STOP_BATCH = 128

LOOK_EVERY = 10.0
"""Seconds between two looks at what the device has noted within an epoch."""

NOTHING, SAVE, LEAVE, BROKEN = range(4)
"""What a process may want between two batches; the greatest of all processes' wishes is done."""

Weights = dict[str, Tensor]

Epoch = tuple[EpochStats, Weights]


@dataclass
class Loop:
    """A run under way: what it is given, and where it is.

    Attributes:
        lr_epochs: How many epochs the learning rate's schedule is laid out for.
        epoch: The epoch under way, from 1.
        batch: How many of its batches are done.
        sums: Over those batches.
        skipped: How many of them were undone.
        spent: Seconds that earlier processes spent on those batches.
        kept: The newest epochs with their weights, as many as the stopping rule may go back by.
        settled: Of the epochs before those, which no rule can undo any more, the most robust on validation.
        watch: What was not finite in this epoch.
        saved: When the newest checkpoint was written or read, and what it holds.
        recorded: How many epochs, and how many batches of the next, it keeps.
        published: Which epochs the files of the best and the last weights hold.
    """

    trainer: TrainerBase
    engine: Engine
    optimizer: torch.optim.SGD
    rate: Callable[[float], float]
    epochs: int
    lr_epochs: int
    seed: int
    heed_stop: bool
    skips: bool
    run: RunStore | None
    save_every: float
    reporter: Callback
    select: str
    kept: deque[Epoch]
    settled: Epoch | None = None
    epoch: int = 1
    batch: int = 0
    skipped: int = 0
    spent: float = 0.0
    sums: EpochAccumulator = field(default_factory=EpochAccumulator)
    history: History = field(default_factory=History)
    requests: StopRequests = field(default_factory=StopRequests)
    watch: NonFiniteMonitor = field(default_factory=NonFiniteMonitor)
    saved: tuple[float, str] = field(default_factory=lambda: (time.monotonic(), ""))
    recorded: tuple[int, int] = (0, 0)
    published: dict[str, int] = field(default_factory=dict)
    looked: float = field(default_factory=time.monotonic)

    @property
    def world(self) -> World:
        """The processes that train together."""
        return self.engine.world

    def __call__(self, loader: Iterable[Batch], val_loader: Iterable[Batch] | None, resume: bool) -> History:
        """Runs it from where it is to its end; see `deat_rb.training.fit.fit`."""
        trainer = self.trainer
        trainer.set_device(self.engine.device)
        validation = materialize(trainer, val_loader, self.engine) if val_loader is not None else None
        rule = trainer.stopping
        if rule is not None and rule.validation_steps and validation is None:
            raise DeatError(f"{trainer.attack} stops by validation and needs images to validate on; give a val_loader")
        if iter(loader) is loader:
            raise DeatError(
                "the loader can be iterated only once; give one that begins anew in each epoch, such as a list"
            )
        batches = count_batches(loader)
        shares = shard(loader, self.world)
        try:
            if resume:
                self._restore(batches)
            if self.run is None:
                self._train(shares, validation, batches)
            else:
                with self.requests:
                    self._train(shares, validation, batches)
        except RuntimeError as error:
            if not is_peer_failure(error, self.world):
                raise
            raise DeatError(
                f"another of the {self.world.size} processes is gone, so that this one ends too; {self.describe_kept()}"
            ) from error
        except UnwritableError as error:
            raise DeatError(f"{error}; {self.describe_kept()}") from error
        except KeyboardInterrupt:
            raise Interrupted(self.describe_kept()) from None
        self._select()
        return self.history

    def _train(self, loader: Loader, validation: Batch | None, batches: int) -> None:
        while self.epoch <= self.epochs and self.history.stopped is None:
            row = self._epoch(loader, batches)
            try:
                row = self.world.on_main(partial(self._validated, row, validation))
            except KeyboardInterrupt:
                self._save(row.seconds)
                raise
            self._conclude(row)
            if self.world.max_over_ranks(self.requests.requested):
                raise KeyboardInterrupt

    def _epoch(self, loader: Loader, batches: int) -> EpochStats:
        trainer, engine, model = self.trainer, self.engine, self.trainer.model
        if not model.training:
            model.train()
        steps, alpha = trainer.steps, trainer.alpha
        engine.reset_peak_memory()
        self.reporter.on_epoch_start(self.epoch, self.epochs, batches, steps)
        began = time.perf_counter()
        seeding.seed_global(self.seed, "epoch", self.epoch)
        for batch, total in of_epoch(loader, self.epoch, self.batch, self.seed):
            if self.epoch == 1 and self.batch == 0:
                check_first(trainer, batch, engine)
                self._save(0.0)
            images, labels = engine.receive(*batch)
            engine.global_batch = total
            trainer.set_replay_lr(partial(self._rate_within, self.epoch - 1, self.batch, batches))
            set_rate(self.optimizer, self._rate_within(self.epoch - 1, self.batch, batches, 0.0))
            self._learn(images, labels, total)
            self.batch += 1
            self.reporter.on_batch_end(self.sums)
            wish = self.world.max_over_ranks(self._requested_action())
            if wish == BROKEN:
                self._raise_nonfinite()
            if wish in (SAVE, LEAVE):
                self._save(self.spent + time.perf_counter() - began)
            if wish == LEAVE:
                raise KeyboardInterrupt
        if self.batch == 0:
            raise DeatError(f"the loader gave no batch in epoch {self.epoch}; give one that can be iterated anew")
        return self._row(steps, alpha, self.spent + time.perf_counter() - began)

    def _learn(self, images: Tensor, labels: Tensor, total: int) -> None:
        """Learns from a batch, or this process's share of one of ``total`` examples."""
        trainer, engine, world = self.trainer, self.engine, self.world
        key = ("batch", self.epoch, self.batch)
        seeding.seed_global(self.seed, *key, *(("process", world.rank) if world.rank else ()))
        undo = Snapshot(trainer, self.optimizer, engine) if self.skips else None
        noise: AbstractContextManager[None] = nullcontext()
        if world.size > 1:
            stream = seeding.generator(self.seed, *key, device=engine.device)
            noise = seeding.global_batch_noise(world.share(total), total, stream)
        with noise:
            stats = trainer.training_step(images, labels, self.optimizer, engine)
        engine.sync_buffers(trainer.model)
        finite = self.watch.note(stats, trainer.model, self.batch)
        if undo is not None and world.max_over_ranks(not bool(finite.all())):
            undo()
            self.watch = NonFiniteMonitor()
            self.skipped += 1
            self.reporter.warn(f"batch {self.batch + 1} of epoch {self.epoch} is skipped: it was not finite")
        else:
            self.sums.add(stats, len(images) / total)

    def _requested_action(self) -> int:
        """What this process wants between two batches."""
        now = time.monotonic()
        if now - self.looked > LOOK_EVERY:
            self.looked = now
            if self.watch.found():
                return BROKEN
        if self.requests.requested:
            return LEAVE
        return SAVE if self.run is not None and now - self.saved[0] > self.save_every else NOTHING

    def _raise_nonfinite(self) -> None:
        """Ends training that is no longer finite, with the model as it was after the last good epoch."""
        batch, what = self.watch.found() or (self.batch, "the loss, l_X or a gradient")
        good = "there is no good epoch before it"
        if self.kept:
            good = f"epoch {self.kept[-1][0].epoch} is the last good one"
            self.trainer.model.load_state_dict(self.kept[-1][1])
        if self.run is not None and self.saved[1]:
            good += f", and the checkpoint {self.saved[1]} is good"
        raise DeatError(
            f"training is no longer finite: {what} at batch {batch} of epoch {self.epoch}; {good}; "
            "try a smaller --lr, or --on-nonfinite skip"
        )

    def _row(self, steps: int, alpha: float | None, seconds: float) -> EpochStats:
        """The epoch's figures: the one wait for the device."""
        broken = self.watch.found() is not None or (self.sums.batches == 0 and self.skipped > 0)
        if self.world.max_over_ranks(broken):
            self._raise_nonfinite()
        sums = self.sums.over(self.world)
        totals = sums.read()
        return EpochStats(
            epoch=self.epoch,
            steps=steps,
            alpha=alpha,
            l_x=totals["l_x"],
            lipschitz=lipschitz_lower_bound(
                totals["l_x"], examples=sums.examples, eps=self.trainer.eps, size=sums.image_size
            ),
            examples=sums.examples,
            loss=totals["loss"] / sums.examples,
            train_acc=totals["correct"] / sums.examples,
            backwards=totals["backwards"],
            forwards=totals["forwards"],
            updates=sums.updates,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=seconds,
            images_per_second=sums.examples / seconds,
            peak_memory=self.engine.peak_memory(),
            skipped=self.skipped,
            processes=self.world.size,
        )

    def _rate_within(self, epochs_done: int, batch: int, batches: int, share: float) -> float:
        """The learning rate where a share of a batch is done."""
        return self.rate((epochs_done + min((batch + share) / batches, 1)) / self.lr_epochs)

    def _validated(self, row: EpochStats, validation: Batch | None) -> EpochStats:
        if validation is None:
            return row
        self.reporter.on_validation_start()
        began = time.perf_counter()
        images, labels = validation
        options: dict[str, Any] = {"eps": self.trainer.eps, "seed": self.seed}
        with self.requests.at_once(), self.engine.eager(self.trainer.model), self.engine.autocast():
            found = validate(self.trainer.model, images, labels, steps=20, **options)
            row = replace(
                row,
                val_acc=found.natural,
                val_robust_acc=found.robust,
                val_forwards=found.forwards,
                val_backwards=found.backwards,
            )
            rule = self.trainer.stopping
            if rule is not None and rule.validation_steps:
                batch = images[:STOP_BATCH], labels[:STOP_BATCH]
                found = validate(self.trainer.model, *batch, steps=rule.validation_steps, **options)
                row = replace(
                    row,
                    stop_robust_acc=found.robust,
                    val_forwards=row.val_forwards + found.forwards,
                    val_backwards=row.val_backwards + found.backwards,
                )
        return replace(row, val_seconds=time.perf_counter() - began)

    def _conclude(self, row: EpochStats) -> None:
        """Lets rule and schedule decide on a finished epoch, and keeps it."""
        trainer = self.trainer
        stop = trainer.stopping.update(row) if trainer.stopping else None
        if stop is not None:
            row = replace(row, stopped=stop.reason)
        trainer.schedule.update(row)
        trainer.apply_schedule()
        self.history.rows.append(row)
        if len(self.kept) == self.kept.maxlen:
            self.settled = _most_robust([self.settled, self.kept[0]])
        self.kept.append((row, _copy(trainer.model)))
        if stop is not None and self.heed_stop:
            self.history.stopped = stop.reason
            while self.kept[-1][0].epoch > stop.keep and len(self.kept) > 1:
                self.kept.pop()
        self.epoch, self.batch, self.skipped, self.spent = self.epoch + 1, 0, 0, 0.0
        self.sums, self.watch = EpochAccumulator(), NonFiniteMonitor()
        if self.run is not None:
            self.world.on_main(partial(self._write, self.run, row))
            self._save(0.0)
        self.reporter.on_epoch_end(row)

    def _write(self, run: RunStore, row: EpochStats) -> None:
        run.append(row)
        self._publish(run)

    def _publish(self, run: RunStore) -> None:
        """Has the best and the last weights in their files."""
        for which, epoch in (("best", self._best()), ("last", self.kept[-1] if self.kept else None)):
            if epoch is None:
                run.discard_weights(which)
            elif self.published.get(which) != epoch[0].epoch:
                run.save_weights(which, epoch[1], epoch[0])
                self.published[which] = epoch[0].epoch

    def _best(self) -> Epoch | None:
        """The epoch most robust on validation with its weights; of equal ones the first."""
        return _most_robust([self.settled, *self.kept])

    def _select(self) -> None:
        best = self._best() if self.select == "best" else None
        row, weights = best or self.kept[-1]
        self.history.selected = row.epoch
        self.trainer.model.load_state_dict(weights)

    def _save(self, spent: float) -> None:
        """Writes a checkpoint, unless what it would hold is not finite."""
        if self.run is None:
            return
        if self.world.max_over_ranks(self.watch.found() is not None):
            self._raise_nonfinite()
        state = position.of(self, self.run.config_json, spent)
        self._recorded(self.world.on_main(partial(checkpoint.write, self.run.checkpoints, state)))

    def _recorded(self, path: Path | None) -> None:
        self.saved = time.monotonic(), f"{path} of epoch {self.epoch}, batch {self.batch}"
        self.recorded = self.epoch - 1, self.batch

    def _restore(self, batches: int) -> None:
        """Goes on from the newest checkpoint that is whole.

        Raises:
            DeatError: If there is none of a run that had begun, or it does not fit the run.
        """
        run = self.run
        assert run is not None
        self.world.on_main(run.discard_unfinished)
        state = checkpoint.newest(run.checkpoints, self.reporter.warn)
        if state is None:
            if self.world.on_main(lambda: len(run.rows())):
                raise DeatError(f"{run.checkpoints} has no checkpoint to go on from; start a new run")
            return
        there = position.read(state)
        self.history.rows = self.world.on_main(partial(run.truncate, there.epoch - 1))
        position.take(self, state, there, batches)
        self._recorded(state.path)
        self.world.on_main(partial(self._publish, run))

    def describe_kept(self) -> str:
        """What is left of the run if it ends now."""
        if self.run is None:
            return f"{len(self.history.rows)} of {self.epochs} epochs were trained; the model holds the newest weights"
        epochs, batches = self.recorded
        done = f"{epochs} of {self.epochs} epochs" + (f" and {batches} batches of the next" if batches else "")
        return f"{self.run.path} keeps {done}; deat-rb train --resume {self.run.path} goes on from there"


def _most_robust(epochs: Iterable[Epoch | None]) -> Epoch | None:
    validated = [epoch for epoch in epochs if epoch is not None and epoch[0].val_acc is not None]
    return max(validated, key=lambda epoch: _merit(epoch[0]), default=None)


def _merit(row: EpochStats) -> tuple[float, float]:
    """What the best epoch is best by: robust accuracy on validation and, where that is equal, natural accuracy."""
    return row.val_robust_acc or 0.0, row.val_acc or 0.0


def _copy(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
