"""`fit`: train a trainer's model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch

from deat_rb.training.base import Batch, TrainerBase
from deat_rb.training.best_weights import BestWeights
from deat_rb.training.callbacks import Callback
from deat_rb.training.checkpointing import Checkpointing, MetricsWriter
from deat_rb.training.early_stopping import EarlyStopping
from deat_rb.training.engine import Engine
from deat_rb.training.history import History
from deat_rb.training.loop import LearningRate, Loop
from deat_rb.training.lr import check_layout
from deat_rb.training.nonfinite import ON_NONFINITE, NonFiniteMonitor
from deat_rb.training.run_store import RunStore
from deat_rb.training.state import TrainingState
from deat_rb.utils import seeding
from deat_rb.utils.devices import resolve_device, resolve_precision
from deat_rb.utils.distributed import world
from deat_rb.utils.errors import DeatError


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
    early_stopping: bool = True,
    on_nonfinite: str = "stop",
    compile: bool = False,
    sync_bn: bool = False,
    run: RunStore | None = None,
    resume: bool = False,
    save_every: float = 5.0,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train a trainer's model.

    Each call continues from the model's weights; the schedule and the stopping rule start anew.

    Under torchrun, all ranks train the model together: each rank is given the global batches and takes its share of
    each. `deat_rb.data.batches.Batches` loads the share alone.

    Args:
        trainer: The method and the model.
        train_loader: An iterable, once per epoch, of batches of images (N, C, H, W) in [0, 1] and labels (N,). Its
            ``set_epoch``, where it has one, is called before each epoch.
        val_loader: Held-out training images, attacked by PGD-20 after each epoch. Never the test set.
        epochs: T, the number of epochs.
        lr: The peak learning rate.
        lr_schedule: ``cyclic``, ``multistep`` or ``flat``; see `deat_rb.training.lr`.
        lr_epochs: For how many epochs a multistep schedule is laid out; ``epochs`` by default.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        device: Where to train; by default where the model is.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto``.
        select: The weights that the model ends with: ``best`` (most robust on validation) or ``last``. By default
            ``best`` where there is a ``val_loader``.
        seed: Fixes every random number; torch's global generators are restored afterwards.
        early_stopping: Whether a stopping rule ends training; otherwise its decision is only recorded in the metrics.
        on_nonfinite: On a loss, gradient or l_X that is NaN or Inf: ``stop``, with the weights of the last good epoch,
            or ``skip``: roll the batch back and go on, which waits for the device at each batch.
        compile: Whether to compile the model with `torch.compile`.
        sync_bn: Whether to compute BatchNorm's statistics over all ranks; GPUs only.
        run: Where to write metrics, weights and checkpoints, if anywhere. Ctrl-C and SIGTERM then stop training after
            the current batch.
        resume: Whether to resume from the run's newest checkpoint.
        save_every: Minutes between two checkpoints within an epoch; there is one after each epoch as well.
        callbacks: Called on rank 0, in this order.

    Returns:
        The history. The model holds the selected weights; where a stopping rule ended training, ``last`` are those of
        the epoch that the rule keeps.

    Raises:
        DeatError: An option or the first batch cannot be used, or training is no longer finite; the model then has the
            weights of the last good epoch.
        Interrupted: On Ctrl-C, with what was saved.
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
    target = resolve_device(str(device or next(trainer.model.parameters()).device))
    ranks = world(cpu=target.type == "cpu")
    engine = Engine(target, resolve_precision(precision, target), world=ranks, compiled=compile, sync_bn=sync_bn)
    if not resume:
        trainer.reset_schedule()
    try:
        with seeding.preserved(), engine.prepared(trainer.model):
            state = TrainingState(
                trainer=trainer,
                engine=engine,
                optimizer=engine.sgd(trainer.model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay),
                epochs=epochs,
                seed=seed,
                run=run,
                recent=deque(maxlen=trainer.stopping.lookback if trainer.stopping else 1),
            )
            # In this order: what is not finite is never saved, and metrics are written before weights and checkpoint.
            own: list[Callback] = [NonFiniteMonitor(skip=on_nonfinite == "skip")]
            if trainer.stopping is not None:
                own.append(EarlyStopping(trainer.stopping, enabled=early_stopping))
            weights = BestWeights(select or ("best" if val_loader is not None else "last"))
            if run is not None:
                own.append(MetricsWriter(run))
            own.append(weights)
            if run is not None:
                own.append(Checkpointing(run, weights, save_every=60 * save_every, resume=resume))
            loop = Loop(
                state,
                LearningRate(lr, lr_schedule, lr_epochs or epochs),
                [*own, *(callbacks if ranks.is_main else ())],
            )
            return loop(train_loader, val_loader)
    finally:
        trainer.set_replay_lr(None)
