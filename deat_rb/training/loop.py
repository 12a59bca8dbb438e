"""The training loop over epochs and batches, with validation and schedules; all else is done by callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from deat_rb.attacks.gradient_probe import lipschitz_lower_bound
from deat_rb.training.base import Batch
from deat_rb.training.callbacks import Action, Callback, requested_by
from deat_rb.training.checks import BatchChecker, BatchError, check_positions
from deat_rb.training.dataloading import HeldOut, Loader, check_loader, count_batches, epoch_batches, materialize, shard
from deat_rb.training.engine import explain_nondeterminism
from deat_rb.training.history import History
from deat_rb.training.lr import LearningRate, rate_of, set_momentum, set_rate
from deat_rb.training.metrics import EpochStats
from deat_rb.training.place import Place
from deat_rb.training.signals import StopRequested, StopRequests
from deat_rb.training.state import TrainingState
from deat_rb.training.step_runner import StepRunner
from deat_rb.training.validation import validate_epoch
from deat_rb.utils import seeding
from deat_rb.utils.devices import wait_for
from deat_rb.utils.distributed import is_peer_failure
from deat_rb.utils.errors import DeatError, Interrupted, UnwritableError
from deat_rb.utils.options import OPEN

AGREE_EVERY = 10
"""Number of batches after which ranks on GPUs agree on an action such as a checkpoint."""


class Loop:
    """The training loop.

    Args:
        state: The training state; a callback may restore it from a checkpoint.
        lr: The learning rate.
        callbacks: Callbacks, called in this order; those that communicate must be in the same order on all ranks.
        validate_every: Number of epochs from one validation to the next; the last epoch is always validated.
    """

    def __init__(
        self, state: TrainingState, lr: LearningRate, callbacks: Sequence[Callback], *, validate_every: int = 1
    ) -> None:
        self.state = state
        self.lr = lr
        self.callbacks = callbacks
        self.validate_every = validate_every
        self.checker = BatchChecker(state.trainer, state.engine)
        self.run_step = StepRunner(state.trainer, state.engine, state.optimizer, warn=self._warn)
        self.requests = StopRequests(enabled=state.run is not None)
        state.warn = self._warn
        self._loader: Any = None

    def __call__(self, loader: Iterable[Batch], val_loader: Iterable[Batch] | None) -> History:
        """Train to the end; see `deat_rb.training.fit.fit`."""
        state, trainer = self.state, self.state.trainer
        trainer.set_device(state.engine.device)
        validation = None
        if val_loader is not None:
            seeding.seed_global(state.seed, "validation")  # for loaders that shuffle or augment
            validation = materialize(BatchChecker(trainer, state.engine, validation=True), val_loader)
        rule = trainer.stopping
        if rule is not None and rule.validation_steps and validation is None:
            raise DeatError(f"{trainer.attack} needs validation images for its stopping rule; give a val_loader")
        if isinstance(loader, Iterator):
            raise DeatError(
                "the training loader is an iterator, which is exhausted after one epoch; use an iterable such as a "
                "DataLoader"
            )
        check_loader(loader, self.checker.name)
        check_positions(trainer, loader)
        self._loader = loader
        state.batches = count_batches(loader)
        shards = shard(loader, state.world)
        size = getattr(loader, "batch_size", None)
        state.engine.full_batch = size if isinstance(size, int) else None
        try:
            for each in self.callbacks:
                each.on_fit_start(state)
            with self.requests, self._failing_alone():
                self._train(shards, validation)
        except RuntimeError as error:
            if (reason := explain_nondeterminism(error)) is not None:
                raise DeatError(f"{reason}; {state.describe_saved()}") from error
            if not is_peer_failure(error, state.world):
                raise
            raise DeatError(
                f"lost contact with another of the {state.world.size} ranks, so this one stops too; "
                f"{state.describe_saved()}"
            ) from error
        except BatchError as error:
            if state.epoch == 1 and state.batch == 0:
                raise
            if state.world.size == 1:
                self._act(Action.SAVE)
            raise DeatError(f"{error}; {state.describe_saved()}") from None
        except UnwritableError as error:
            raise DeatError(f"{error}; {state.describe_saved()}") from error
        except KeyboardInterrupt:
            if state.epochs == OPEN and state.run is None and state.recent:
                self._end()  # no other end comes, and there are no files with the result
            raise Interrupted(state.describe_saved()) from None
        return self._end()

    def _end(self) -> History:
        for each in self.callbacks:
            each.on_fit_end(self.state.history)
        return self.state.history

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        """Let a rank that raises end; all other ranks would wait for it, and it for them."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            self.state.world.abandon()
            raise

    def _train(self, loader: Loader, validation: HeldOut | None) -> None:
        state, trainer = self.state, self.state.trainer
        while state.epoch <= state.epochs and state.history.stopped is None:
            row = self._train_epoch(loader)
            try:
                row = state.world.on_main(partial(self._validate, row, validation))
            except StopRequested:  # a second signal may come while the weights are swapped, which must not be saved
                self._act(Action.SAVE)
                raise
            for each in self.callbacks:
                each.on_validation_end(row)
            trainer.update_schedule(row)
            state.finish_epoch(row)
            for each in self.callbacks:
                each.on_epoch_end(row)
            if state.world.max_over_ranks(self.requests.requested):
                raise KeyboardInterrupt

    def _train_epoch(self, loader: Loader) -> EpochStats:
        state, trainer, engine = self.state, self.state.trainer, self.state.engine
        if not state.model.training:
            state.model.train()
        steps, alpha = trainer.steps, trainer.alpha
        engine.reset_peak_memory()
        for each in self.callbacks:
            each.on_epoch_start(state.epoch, state.epochs, state.batches, steps)
        # Once per epoch, because a CUDA graph of the training step holds the momentum.
        if (momentum := self.lr.momentum_at(state.epoch - 1)) is not None:
            set_momentum(state.optimizer, momentum)
        state.start_clock()
        seeding.seed_global(state.seed, "epoch", state.epoch)
        for batch, total in epoch_batches(loader, state.epoch, state.batch, state.seed, self._check):
            images, labels = engine.to_device(*batch)
            self.checker.check_model(images, labels, self._where(state.batch))
            if state.epoch == 1 and state.batch == 0:
                self._act(Action.SAVE)
            if engine.device.type != "cpu":
                labels = state.inputs.note(images, labels, self.checker.num_classes, state.batch)
            engine.global_batch = total
            trainer.set_replay_lr(partial(self._rate, state.batch))
            set_rate(state.optimizer, self._rate(state.batch, 0.0))
            self._step(images, labels, total)
            state.batch += 1
            for each in self.callbacks:
                each.on_batch_end(state.sums)
            self._act(self._agreed_action())
        engine.sync_buffers(state.model, state.average)
        wait_for(engine.device)  # the clock includes the batches that are queued; reading the metrics would wait next
        state.stop_clock()
        if state.batch == 0:
            if state.batches == 0:
                raise DeatError("the training loader yields no batches; check its dataset, batch_size and drop_last")
            raise DeatError(
                f"the training loader yields no batches in epoch {state.epoch}; use one that can be iterated repeatedly"
            )
        for each in self.callbacks:
            each.on_train_epoch_end()
        return self._metrics(steps, alpha)

    def _where(self, batch: int) -> str:
        return f"batch {batch + 1} of epoch {self.state.epoch}"

    def _check(self, batch: Any, number: int) -> Batch:
        later = self.state.epoch > 1 or number > 0
        return self.checker.check_values(batch, self._where(number), allow_nan=later)

    def _step(self, images: Tensor, labels: Tensor, total: int) -> None:
        """Train on a batch, or on this rank's share of a batch of ``total`` examples."""
        state, world = self.state, self.state.world
        state.skip_batch = False
        for each in self.callbacks:
            each.on_batch_start()
        key = ("batch", state.epoch, state.batch)
        seeding.seed_global(state.seed, *key, *(("process", world.rank) if world.rank else ()))
        noise: AbstractContextManager[None] = nullcontext()
        if world.size > 1:
            stream = seeding.generator(state.seed, *key, device=state.engine.device)
            noise = seeding.global_batch_noise(world.share(total), total, stream)
        with noise, state.trainer.warmed_up(self._progress(state.batch, 0.0)):
            passes = state.trainer.begin_batch(images, self._place(total), state.engine)
            stats = self.run_step(images, labels, total)
            if passes:
                stats = replace(stats, forwards=stats.forwards + passes, backwards=stats.backwards + passes)
        state.engine.sync_buffers(state.model, statistics=state.trainer.reads_statistics())
        for each in self.callbacks:
            each.on_step_end(stats)
        if not state.skip_batch:
            state.sums.add(stats, len(images) / total)

    def _place(self, total: int) -> Place:
        """Return the place of the current batch, of ``total`` examples."""
        state = self.state
        place = Place(state.epoch, state.epochs, state.batch, total, self.checker.num_classes or 0)
        if not state.trainer.needs_positions:
            return place
        positions = self._loader.positions(state.epoch, state.batch)
        return replace(place, positions=positions, number_of_images=self._loader.number_of_images)

    def _rate(self, batch: int, share: float) -> float:
        """Return the learning rate when a fraction ``share`` in [0, 1] of a batch is done."""
        return self.lr.at(self._progress(batch, share))

    def _progress(self, batch: int, share: float) -> float:
        """Return the number of epochs done, which may be fractional."""
        return self.state.epoch - 1 + min((batch + share) / self.state.batches, 1)

    def _last_eps(self) -> float:
        """Return the radius of the epoch's last batch."""
        with self.state.trainer.warmed_up(self._progress(self.state.batches - 1, 0.0)) as eps:
            return eps

    def _agreed_action(self) -> Action:
        """Return the highest action that a callback or signal on any rank requests; waits for the other ranks.

        On GPUs, where that takes time in comparison with a batch, the ranks only do so after every tenth batch of the
        run.
        """
        state = self.state
        done = (state.epoch - 1) * state.batches + state.batch
        if state.world.size > 1 and state.engine.device.type == "cuda" and done % AGREE_EVERY:
            return Action.CONTINUE
        requested = [requested_by(each) for each in self.callbacks]
        requested.append(Action.STOP if self.requests.requested else Action.CONTINUE)
        return Action(self.state.world.max_over_ranks(max(requested)))

    def _act(self, action: Action) -> None:
        if action == Action.CONTINUE or (action == Action.SAVE and self.state.run is None):
            return
        self.state.engine.sync_buffers(self.state.model, self.state.average)
        for each in self.callbacks:
            each.on_action(action)
        if action == Action.STOP:
            raise KeyboardInterrupt

    def _metrics(self, steps: int, alpha: float | None) -> EpochStats:
        """Return the training metrics of the epoch; synchronizes with the device."""
        state = self.state
        sums = state.sums.all_reduce(state.world)
        totals = sums.read()
        return EpochStats(
            epoch=state.epoch,
            steps=steps,
            alpha=alpha,
            eps=self._last_eps() if state.trainer.eps_warmup else None,
            l_x=totals["l_x"],
            lipschitz=lipschitz_lower_bound(
                totals["l_x"],
                examples=sums.examples,
                eps=state.trainer.eps,
                size=sums.image_size,
                radius=getattr(state.trainer.crafter, "gradient_radius", None),
                norm=state.trainer.norm,
            ),
            examples=sums.examples,
            loss=totals["loss"] / sums.examples,
            train_acc=totals["correct"] / sums.examples,
            backwards=totals["backwards"],
            forwards=totals["forwards"],
            updates=sums.updates,
            lr=rate_of(state.optimizer),
            seconds=state.seconds,
            images_per_second=sums.examples / state.seconds,
            peak_memory=state.engine.peak_memory(),
            skipped=state.skipped,
            overflows=int(totals["overflows"]),
            processes=state.world.size,
        )

    def _validate(self, row: EpochStats, batch: HeldOut | None) -> EpochStats:
        state, rule = self.state, self.state.trainer.stopping
        due = row.epoch % self.validate_every == 0 or row.epoch == state.epochs
        if batch is None or not (due or (rule is not None and rule.validation_steps)):
            return row
        for each in self.callbacks:
            each.on_validation_start()
        return validate_epoch(state, row, batch, self.requests, only_rule=not due)

    def _warn(self, message: str) -> None:
        for each in self.callbacks:
            each.on_warning(message)
