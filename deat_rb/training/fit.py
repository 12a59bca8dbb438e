"""`fit`: training a trainer's model, with everything that may be said about how."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from deat_rb.training.callbacks import Callback, History
from deat_rb.training.engine import Engine
from deat_rb.training.loop import Loop
from deat_rb.training.lr import LR_SCHEDULES, check_layout
from deat_rb.training.nonfinite import ON_NONFINITE
from deat_rb.utils import seeding
from deat_rb.utils.devices import resolve_device, resolve_precision
from deat_rb.utils.distributed import world
from deat_rb.utils.errors import DeatError

if TYPE_CHECKING:
    from deat_rb.training.base import Batch, TrainerBase
    from deat_rb.training.run_store import RunStore


def fit(
    trainer: TrainerBase,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    *,
    epochs: int = 10,
    lr: float = 0.1,
    lr_schedule: str = "cyclic",
    lr_epochs: int | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    select: str | None = None,
    seed: int = 0,
    heed_stop: bool = True,
    on_nonfinite: str = "stop",
    compiled: bool = False,
    sync_bn: bool = False,
    run: RunStore | None = None,
    resume: bool = False,
    save_every: float = 5.0,
    reporter: Callback | None = None,
) -> History:
    """Trains a trainer's model.

    A trainer may fit more than once: each time the model goes on from its weights, and the method begins anew.

    Started by torchrun, all processes train it together: a loader gives each of them the global batches, of which it
    takes its share. `deat_rb.data.batches.Batches` makes no more than the share.

    Args:
        trainer: The method and the model.
        train_loader: Batches of images (N, C, H, W) in [0, 1] and labels (N,), to be iterated once per epoch. Where it
            has ``set_epoch`` that is called before each.
        val_loader: Held-out training images; after each epoch they are attacked by PGD-20. Never the test set.
        epochs: T.
        lr: The peak learning rate.
        lr_schedule: ``cyclic``, ``multistep`` or ``flat``, see `deat_rb.rates`.
        lr_epochs: How many epochs a multistep one is laid out for; by default as many as are trained.
        momentum: Of SGD.
        weight_decay: Of SGD.
        device: Where to train; by default where the model is.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto``.
        select: Which weights the model ends with: those most robust on validation (``best``) or the ``last``. By
            default best where there is a ``val_loader``.
        seed: Fixes every random number drawn; torch's global generators are given back as they were.
        heed_stop: Whether a stopping rule ends training; otherwise its verdicts are only noted in the metrics.
        on_nonfinite: What to do about a batch whose loss, gradient or l_X is not finite: ``stop``, with the model as it
            was after the last good epoch, or ``skip``: undo the batch and go on, which looks at each and so waits for
            the device.
        compiled: Whether `torch.compile` makes the passes.
        sync_bn: Whether BatchNorm takes its statistics over all processes; on GPUs only.
        run: Where to write metrics, weights and checkpoints, if anywhere. Ctrl-C and SIGTERM then wait for the batch.
        resume: Go on from the run's newest checkpoint.
        save_every: Minutes between two checkpoints within an epoch; there is one after each epoch as well.
        reporter: Is told how it goes.

    Returns:
        The history; the model holds the selected weights. Where a stopping rule ended training, ``last`` are the last
        healthy weights.

    Raises:
        DeatError: If an option or the first batch is not admissible, or training is no longer finite; the model then
            holds the last good epoch's weights.
        Interrupted: On Ctrl-C, saying what was kept.
    """
    check_layout(lr_schedule, lr_epochs)
    if epochs < 1:
        raise DeatError(f"epochs = {epochs} is below 1; training needs an epoch")
    if select not in (None, "best", "last"):
        raise DeatError(f"select = '{select}' is neither 'best' nor 'last'")
    if select == "best" and val_loader is None:
        raise DeatError("select = 'best' needs validation images to choose by; give a val_loader or select = 'last'")
    if on_nonfinite not in ON_NONFINITE:
        raise DeatError(f"on_nonfinite = '{on_nonfinite}' is neither 'stop' nor 'skip'")
    if resume and run is None:
        raise DeatError("resume = True needs the run to go on with; give run")
    where = resolve_device(str(device or next(trainer.model.parameters()).device))
    together = world(cpu=where.type == "cpu")
    engine = Engine(where, resolve_precision(precision, where), world=together, compiled=compiled, sync_bn=sync_bn)
    if not resume:
        trainer.reset_schedule()
    try:
        with seeding.preserved(), engine.prepared(trainer.model):
            loop = Loop(
                trainer=trainer,
                engine=engine,
                optimizer=engine.sgd(trainer.model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay),
                rate=lambda done: lr * LR_SCHEDULES[lr_schedule](done),
                epochs=epochs,
                lr_epochs=lr_epochs or epochs,
                seed=seed,
                run=run,
                save_every=60 * save_every,
                reporter=reporter if reporter and together.is_main else Callback(),
                heed_stop=heed_stop,
                skips=on_nonfinite == "skip",
                select=select or ("best" if val_loader is not None else "last"),
                kept=deque(maxlen=trainer.stopping.lookback if trainer.stopping else 1),
            )
            return loop(train_loader, val_loader, resume)
    finally:
        trainer.set_replay_lr(None)
