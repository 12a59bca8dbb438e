"""The epoch loop: learning rate, validation, the schedule's and the rule's decisions, what is kept."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deat_rb import randomness
from deat_rb.batches import check_batch
from deat_rb.engine import Engine, Precision, resolve_device
from deat_rb.errors import DeatError, Interrupted, nearest
from deat_rb.evaluate import validate
from deat_rb.guard import modes_restored
from deat_rb.probe import lipschitz_lower_bound
from deat_rb.stats import BatchStats, EpochStats
from deat_rb.trainers import set_rate

if TYPE_CHECKING:
    from deat_rb.runs import RunDirectory
    from deat_rb.trainers import Batch, Trainer

STOP_BATCH = 128


def _cyclic(done: float) -> float:
    return 1 - abs(2 * done - 1)


def _multistep(done: float) -> float:
    return 1.0 if done < 0.5 else 0.1 if done < 0.8 else 0.01


def _flat(done: float) -> float:
    return 1.0


LR_SCHEDULES: dict[str, Callable[[float], float]] = {"cyclic": _cyclic, "multistep": _multistep, "flat": _flat}
"""Share of the peak learning rate by share of the run: 0 -> 1 -> 0; divided by 10 at 1/2 and 4/5 of it (epochs 25 and
40 of the paper's 50); flat. It moves once per batch, not per replay."""


class Reporter:
    """Is told how training goes; the default says nothing."""

    def epoch_begins(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """An epoch of so many batches is about to run."""

    def batch_ended(self, sums: EpochSums) -> None:
        """A batch has been learnt from; reading the sums waits for the device."""

    def validation_begins(self) -> None:
        """The epoch's batches are done."""

    def epoch_ended(self, row: EpochStats) -> None:
        """An epoch is complete, with its validation."""


@dataclass
class History:
    """What `fit` gives back.

    Attributes:
        rows: One per epoch.
        selected: The epoch whose weights the model holds now.
        stopped: Why a rule ended training, or None.
    """

    rows: list[EpochStats] = field(default_factory=list)
    selected: int = 0
    stopped: str | None = None

    @property
    def steps(self) -> list[int]:
        """The attack's steps, per epoch."""
        return [row.steps for row in self.rows]

    @property
    def backwards(self) -> float:
        """Backward passes in units of mini-batches, over the run."""
        return sum(row.backwards for row in self.rows)


class EpochSums:
    """Sums of `BatchStats` over an epoch; they stay on the device until `read`."""

    def __init__(self) -> None:
        self.examples = self.updates = self.batches = 0
        self._sums: dict[str, float | Tensor] = dict.fromkeys(("loss", "correct", "l_x", "forwards", "backwards"), 0.0)

    def add(self, stats: BatchStats) -> None:
        """Adds a batch."""
        self.examples += stats.examples
        self.updates += stats.updates
        self.batches += 1
        for name, value in self._sums.items():
            term = getattr(stats, name)
            self._sums[name] = value + (term.double() if name == "l_x" and term.device.type != "mps" else term)

    def read(self) -> dict[str, float]:
        """The sums as numbers: the epoch's one wait for the device."""
        return {name: float(value) for name, value in self._sums.items()}


def fit(
    trainer: Trainer,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    *,
    epochs: int = 10,
    lr: float = 0.1,
    lr_schedule: str = "cyclic",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    select: str | None = None,
    seed: int = 0,
    run: RunDirectory | None = None,
    reporter: Reporter | None = None,
) -> History:
    """Trains a trainer's model.

    Args:
        trainer: The method and the model.
        train_loader: Batches of images (N, C, H, W) in [0, 1] and labels (N,), to be iterated once per epoch. Where it
            has ``set_epoch`` that is called before each.
        val_loader: Held-out training images; after each epoch they are attacked by PGD-20. Never the test set.
        epochs: T.
        lr: The peak learning rate.
        lr_schedule: ``cyclic``, ``multistep`` or ``flat``, see `LR_SCHEDULES`.
        momentum: Of SGD.
        weight_decay: Of SGD.
        device: Where to train; by default where the model is.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        select: Which weights the model ends with: those most robust on validation (``best``) or the ``last``. By
            default best where there is a ``val_loader``.
        seed: Fixes every random number drawn; torch's global generators are given back as they were.
        run: Where to write metrics and weights, if anywhere.
        reporter: Is told how it goes.

    Returns:
        The history; the model holds the selected weights. Where a stopping rule ended training, ``last`` are the last
        healthy weights.

    Raises:
        DeatError: If an option or the first batch is not admissible, or the loss is no longer finite.
        Interrupted: On Ctrl-C, saying what was kept.
    """
    if lr_schedule not in LR_SCHEDULES:
        raise DeatError(f"there is no learning-rate schedule '{lr_schedule}': {nearest(lr_schedule, LR_SCHEDULES)}")
    if epochs < 1:
        raise DeatError(f"epochs = {epochs} is below 1; training needs an epoch")
    if select not in (None, "best", "last"):
        raise DeatError(f"select = '{select}' is neither 'best' nor 'last'")
    if select == "best" and val_loader is None:
        raise DeatError("select = 'best' needs validation images to choose by; give a val_loader or select = 'last'")
    loop = _Loop(
        trainer=trainer,
        engine=Engine(resolve_device(str(device)) if device is not None else trainer.device or "cpu", precision),
        optimizer=torch.optim.SGD(trainer.model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay),
        rate=lambda done: lr * LR_SCHEDULES[lr_schedule](done),
        epochs=epochs,
        seed=seed,
        run=run,
        reporter=reporter or Reporter(),
        select=select or ("best" if val_loader is not None else "last"),
    )
    with randomness.preserved():
        return loop(train_loader, val_loader)


@dataclass
class _Loop:
    trainer: Trainer
    engine: Engine
    optimizer: torch.optim.SGD
    rate: Callable[[float], float]
    epochs: int
    seed: int
    run: RunDirectory | None
    reporter: Reporter
    select: str

    def __call__(self, train_loader: Iterable[Batch], val_loader: Iterable[Batch] | None) -> History:
        trainer = self.trainer
        model = self.engine.prepare(trainer.model)
        trainer.set_device(self.engine.device)
        validation = _gather(val_loader, self.engine) if val_loader is not None else None
        rule = trainer.stopping
        if rule is not None and rule.validation_steps and validation is None:
            raise DeatError(f"{trainer.attack} stops by validation and needs images to validate on; give a val_loader")
        batches = len(train_loader) if isinstance(train_loader, Sized) else sum(1 for _ in train_loader)
        history = History()
        kept: deque[tuple[EpochStats, dict[str, Tensor]]] = deque(maxlen=rule.lookback if rule else 1)
        best: tuple[EpochStats, dict[str, Tensor]] | None = None
        try:
            for epoch in range(1, self.epochs + 1):
                row = self._epoch(epoch, train_loader, batches)
                row = self._validated(row, validation)
                stop = rule.update(row) if rule else None
                if stop is not None:
                    row = replace(row, stopped=stop.reason)
                trainer.schedule.update(row)
                trainer.follow_schedule()
                history.rows.append(row)
                kept.append((row, _copy(model)))
                if self.run is not None:
                    self.run.append(row)
                if stop is not None:
                    history.stopped = stop.reason
                    while kept[-1][0].epoch > stop.keep and len(kept) > 1:
                        kept.pop()
                elif best is None or (row.val_robust_acc or 0) > (best[0].val_robust_acc or 0):
                    best = kept[-1]
                    self._save("best", best)
                self._save("last", kept[-1])
                self.reporter.epoch_ended(row)
                if stop is not None:
                    break
        except KeyboardInterrupt:
            raise Interrupted(self._kept(history)) from None
        chosen = kept[-1] if self.select == "last" or best is None else best
        history.selected = chosen[0].epoch
        model.load_state_dict(chosen[1])
        return history

    def _epoch(self, epoch: int, loader: Iterable[Batch], batches: int) -> EpochStats:
        trainer, engine, model = self.trainer, self.engine, self.trainer.model
        if not model.training:
            model.train()
        steps, alpha = trainer.steps, trainer.alpha
        self.reporter.epoch_begins(epoch, self.epochs, batches, steps)
        sums = EpochSums()
        size = 0
        began = time.perf_counter()
        randomness.seed_global(self.seed, "epoch", epoch)
        for number, (images, labels) in enumerate(_of_epoch(loader, epoch)):
            images, labels = engine.receive(images, labels)
            if number == 0:
                size = images[0].numel()
                if epoch == 1:
                    _check_first(trainer, images, labels)
            trainer.rate = partial(self._rate_within, epoch - 1, number, batches)
            set_rate(self.optimizer, trainer.rate(0.0))
            randomness.seed_global(self.seed, "batch", epoch, number)
            sums.add(trainer.training_step(images, labels, self.optimizer, engine))
            self.reporter.batch_ended(sums)
        if sums.batches == 0:
            raise DeatError(f"the training loader gave no batch in epoch {epoch}; give one that can be iterated anew")
        totals = sums.read()
        seconds = time.perf_counter() - began
        if not (math.isfinite(totals["loss"]) and math.isfinite(totals["l_x"])):
            good = f"epoch {epoch - 1} is the last good one" if epoch > 1 else "there is no good epoch before it"
            raise DeatError(
                f"the loss or the gradient is no longer finite in epoch {epoch}; {good}; try a smaller --lr"
            )
        return EpochStats(
            epoch=epoch,
            steps=steps,
            alpha=alpha,
            l_x=totals["l_x"],
            lipschitz=lipschitz_lower_bound(totals["l_x"], examples=sums.examples, eps=trainer.eps, size=size),
            examples=sums.examples,
            loss=totals["loss"] / sums.examples,
            train_acc=totals["correct"] / sums.examples,
            backwards=totals["backwards"],
            forwards=totals["forwards"],
            updates=sums.updates,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=seconds,
            images_per_second=sums.examples / seconds,
            peak_memory=engine.peak_memory(),
        )

    def _rate_within(self, epochs_done: int, batch: int, batches: int, share: float) -> float:
        """The learning rate where a share of a batch is done."""
        return self.rate((epochs_done + min((batch + share) / batches, 1)) / self.epochs)

    def _validated(self, row: EpochStats, validation: Batch | None) -> EpochStats:
        if validation is None:
            return row
        self.reporter.validation_begins()
        began = time.perf_counter()
        images, labels = validation
        options: dict[str, Any] = {"eps": self.trainer.eps, "seed": self.seed}
        with self.engine.autocast():
            natural, robust = validate(self.trainer.model, images, labels, steps=20, **options)
            row = replace(row, val_acc=natural, val_robust_acc=robust)
            rule = self.trainer.stopping
            if rule is not None and rule.validation_steps:
                batch = images[:STOP_BATCH], labels[:STOP_BATCH]
                _, robust = validate(self.trainer.model, *batch, steps=rule.validation_steps, **options)
                row = replace(row, stop_robust_acc=robust)
        return replace(row, val_seconds=time.perf_counter() - began)

    def _save(self, which: str, weights: tuple[EpochStats, dict[str, Tensor]]) -> None:
        if self.run is not None:
            self.run.save_weights(which, weights[1], weights[0])

    def _kept(self, history: History) -> str:
        if self.run is None:
            return f"{len(history.rows)} of {self.epochs} epochs were trained; the model holds the newest weights"
        if not history.rows:
            return f"the first epoch was not complete; {self.run.path} holds the configuration only"
        return f"{self.run.path} keeps the weights and metrics of {len(history.rows)} of {self.epochs} epochs"


def _of_epoch(loader: Iterable[Batch], epoch: int) -> Iterator[Batch]:
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    return iter(loader)


def _gather(loader: Iterable[Batch], engine: Engine) -> Batch:
    batches = list(loader)
    if not batches:
        raise DeatError("the validation loader gave no batch; give validation images or none at all")
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    check_batch(images, labels)
    return engine.receive(images, labels)


def _check_first(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
    check_batch(images, labels)
    with modes_restored(trainer.model), torch.no_grad():
        classes = trainer.model.eval()(images[:1]).shape[1]
    check_batch(images, labels, classes)


def _copy(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
