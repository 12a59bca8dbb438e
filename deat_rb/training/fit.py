"""`fit`: train a trainer's model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from deat_rb.training.averaging import WeightAverage
from deat_rb.training.base import Batch, TrainerBase
from deat_rb.training.best_weights import BestWeights
from deat_rb.training.callbacks import Callback, check_callbacks
from deat_rb.training.checkpointing import Checkpointing, MetricsWriter
from deat_rb.training.checks import check_fit, check_requirements
from deat_rb.training.cuda_graphs import choose_graphs
from deat_rb.training.early_stopping import EarlyStopping, Patience
from deat_rb.training.engine import Engine
from deat_rb.training.history import History
from deat_rb.training.loop import Loop
from deat_rb.training.nonfinite import NonFiniteMonitor
from deat_rb.training.optimizers import build_optimizer
from deat_rb.training.options import OptimConfig, RuntimeConfig, check_optim, optimizer_defaults
from deat_rb.training.run_store import RunStore
from deat_rb.training.state import TrainingState
from deat_rb.utils import seeding
from deat_rb.utils.devices import check_outside_autocast, resolve_device, resolve_precision
from deat_rb.utils.distributed import world
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.options import OPEN, validate
from deat_rb.utils.threads import cpu_threads


def fit(
    trainer: TrainerBase,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    *,
    run: RunStore | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> History:
    """Train a trainer's model.

    Each call continues from the model's current weights, with a fresh schedule and stopping rule.

    Under torchrun, all ranks train the model together: the loader yields the global batches on each rank, which takes
    its share of each. `deat_rb.data.batches.Batches` loads only that share.

    Args:
        trainer: The method and the model.
        train_loader: Iterable over batches of images (N, C, H, W) in [0, 1] and labels (N,), used once per epoch. Its
            ``set_epoch`` method, if any, is called before each epoch. Methods on cross-entropy or TRADES also take
            class probabilities (N, K) as labels, as CutMix and MixUp give.
        val_loader: Held-out training images, attacked with PGD-20 after each epoch; never use the test set.
        run: Storage of metrics, weights and checkpoints; None to store nothing. With a run, Ctrl-C and SIGTERM stop
            training after the current batch.
        resume: Whether to resume from the run's newest checkpoint.
        callbacks: Called on rank 0, in this order.
        **options: Options of `OptimConfig` and `RuntimeConfig` in `deat_rb.training.options`, such as ``epochs``,
            ``lr``, ``select``, ``seed`` and ``precision``; see docs/options.md. ``device`` defaults to the model's, and
            ``select`` to ``best`` if there is a ``val_loader``.

    Returns:
        The history. The model holds the selected weights; if a stopping rule ended training, ``last`` means the epoch
        that the rule keeps.

    Raises:
        DeatError: An option or a batch is invalid, or training diverged to NaN or Inf; in the latter case the model has
            the weights of the last finite epoch.
        Interrupted: Ctrl-C was pressed; the message says what is saved. Without a run the model has the newest weights
            or, if training is open-ended, the selected ones.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "device" in given:
        given["device"] = str(given["device"])
    check_callbacks(callbacks)
    optim, runtime = _grouped(given)
    check_optim(optim, "")
    if optim.select == "best" and val_loader is None:
        raise DeatError("select = 'best' needs validation images; give a val_loader, or set select = 'last'")
    if optim.patience is not None and val_loader is None:
        raise DeatError(f"patience = {optim.patience} needs validation images; give a val_loader, or omit it")
    if resume and run is None:
        raise DeatError("resume = True needs a run to resume: pass it as run")
    check_fit(trainer.model)
    check_requirements(type(trainer), trainer.attack, compiled=runtime.compile, open_ended=optim.epochs == OPEN)
    target = resolve_device(runtime.device if "device" in given else str(next(trainer.model.parameters()).device))
    check_outside_autocast(target)
    ranks = world(cpu=target.type == "cpu")
    precision = resolve_precision(runtime.precision, target)
    engine = Engine(
        target,
        precision,
        world=ranks,
        compiled=runtime.compile,
        sync_bn=runtime.sync_bn,
        deterministic=runtime.deterministic,
    )
    engine.graphs = choose_graphs(runtime.cuda_graphs, target, ranks.size)
    if resume:
        trainer.keep_first_schedule()
    else:
        trainer.reset_schedule()
    trainer.schedule.begin(optim.epochs)
    try:
        threads = cpu_threads(runtime.threads if ranks.size == 1 else None)
        with seeding.preserved(), threads, engine.prepared(trainer.model):
            optimizer = build_optimizer(trainer.model, optim, target, recorded=engine.graphs is not None)
            optimizer.register_step_post_hook(trainer.after_step)
            average = None
            if optim.ema:
                average = WeightAverage(trainer.model, optim.ema)
                optimizer.register_step_post_hook(average.after_step)
            state = TrainingState(
                trainer=trainer,
                engine=engine,
                optimizer=optimizer,
                average=average,
                epochs=optim.epochs,
                seed=optim.seed,
                run=run,
                recent=deque(maxlen=trainer.stopping.lookback if trainer.stopping else 1),
            )
            # The order ensures that NaN is never saved and that metrics are written before weights and checkpoint.
            own: list[Callback] = [NonFiniteMonitor(skip=runtime.on_nonfinite == "skip")]
            if trainer.stopping is not None:
                own.append(EarlyStopping(trainer.stopping, enabled=optim.early_stopping))
            if optim.patience is not None:
                own.append(Patience(optim.patience))
            weights = BestWeights(optim.select or ("best" if val_loader is not None else "last"))
            if run is not None:
                own.append(MetricsWriter(run))
            own.append(weights)
            if run is not None:
                own.append(Checkpointing(run, weights, save_every=60 * runtime.save_every, resume=resume))
            loop = Loop(
                state,
                optim.learning_rate,
                [*own, *(callbacks if ranks.is_main else ())],
                validate_every=optim.validate_every,
            )
            with state.writer:
                return loop(train_loader, val_loader)
    finally:
        trainer.set_replay_lr(None)


def _grouped(options: dict[str, Any]) -> tuple[OptimConfig, RuntimeConfig]:
    """Split keyword arguments into validated option groups."""
    names = OptimConfig.model_fields | RuntimeConfig.model_fields
    if unknown := [name for name in options if name not in names]:
        raise DeatError(f"there is no option {unknown[0]}: {did_you_mean(unknown[0], names)}")
    optim = optimizer_defaults(options.get("optimizer"))
    optim |= {name: value for name, value in options.items() if name in OptimConfig.model_fields}
    runtime = {name: value for name, value in options.items() if name in RuntimeConfig.model_fields}
    return validate(OptimConfig, optim, ""), validate(RuntimeConfig, runtime, "")
