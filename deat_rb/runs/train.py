"""`deat-rb train`: from options to a run directory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from deat_rb.data.batches import Batches
from deat_rb.data.images import interleave_classes
from deat_rb.models.names import check_trust
from deat_rb.runs.config import MAY_DIFFER, RunConfig, TrainOptions, make_options
from deat_rb.runs.directory import CURVES, RunDirectory, check_free, check_name
from deat_rb.runs.plan import TrainingPlan, default_name, plan
from deat_rb.runs.plots import plot_curves
from deat_rb.runs.trackers import Trackers, check_trackers
from deat_rb.training import checkpoint
from deat_rb.training.callbacks import Callback
from deat_rb.training.fit import fit
from deat_rb.training.history import History
from deat_rb.training.state import read
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.distributed import World, world
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.versions import versions


def train(
    options: TrainOptions | dict[str, Any] | TrainingPlan,
    *,
    output: str | Path = "runs",
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    save_every: float | None = None,
    track: Sequence[str] | None = None,
    memory_limit: int | None = None,
) -> tuple[RunDirectory, History]:
    """Trains as `deat-rb train` does.

    Args:
        options: What is asked for, as `TrainOptions` has it, or a plan made of it.
        output: The folder of all runs.
        name: The run's name; by default made of method, data set, architecture and seed.
        callbacks: Called during training, on rank 0.
        save_every: Minutes between two checkpoints within an epoch, by default 5.
        track: Trackers that are told of each epoch, such as ``tensorboard``.
        memory_limit: As for `plan`; a plan that was made has it.

    Returns:
        The run directory and the history.

    Raises:
        DeatError: If something is not admissible; then nothing has been written.
    """
    if name is not None:
        check_name(name)
    check_trackers(track or ())
    planned = options if isinstance(options, TrainingPlan) else plan(
        make_options(options) if isinstance(options, dict) else options, memory_limit=memory_limit
    )  # fmt: skip
    conduct = planned.config.conduct.but(save_every=save_every, track=track)
    config = planned.config.model_copy(update={"conduct": conduct})
    together = _together(config)
    run = RunDirectory(Path(output) / (name or default_name(config)), config)
    together.on_main(lambda: RunDirectory.create(run.path, config).path)
    with _alone(run, together):
        return run, _fit(planned, run, callbacks)


def resume(
    path: str | Path,
    changes: Mapping[str, Any],
    *,
    callbacks: Sequence[Callback] = (),
    save_every: float | None = None,
    track: Sequence[str] | None = None,
    memory_limit: int | None = None,
    trust_code: bool = False,
) -> tuple[RunDirectory, History]:
    """Goes on with a run that was stopped in any way at any moment, as `deat-rb train --resume` does.

    Args:
        path: The run directory.
        changes: Options asked for anew. None may differ from the run's, but for where the data and the device are, what
            is done about a batch that is not finite, and ``epochs``, which may grow under a flat or multistep learning
            rate.
        callbacks: Called during training, on rank 0.
        save_every: As for `train`; by default, as for the next two, what the run was started or resumed with last.
        track: As for `train`.
        memory_limit: As for `plan`.
        trust_code: Whether the run may have its network built by a ``package.module:factory``; nothing else of a run is
            ever executed.

    Raises:
        DeatError: If it is no run, another process is at it, or an option, the data or the run's own configuration have
            changed; by name.
    """
    run = RunDirectory.open(path)
    config = run.config
    check_trust(config.arch, trust_code, source=f"the run {path}")
    conduct = config.conduct.but(save_every=save_every, track=track, memory_limit=memory_limit)
    check_trackers(conduct.track)
    values = {key: value for key, value in config.model_dump().items() if key in TrainOptions.model_fields}
    asked = make_options({**values, **changes})
    together = _together(config.model_copy(update={"device": asked.device}))
    with _alone(run, together):
        run.refuse_links()
        begun = checkpoint.newest(run.checkpoints, lambda damage: None)  # which is told when it goes on from there
        position = read(begun) if begun is not None else None
        if position is not None and (differing := config.differences(position.config)):
            raise DeatError(
                f"{run.path / 'config.json'} was changed after the run had begun, in {', '.join(differing)}; "
                "put back what it was, or start a new run"
            )
        _refuse_changes(changes, asked, config, RESOLVED)
        longer = config.extended(asked.epochs or config.epochs)
        if longer.epochs > config.epochs and position is not None and position.stopped is not None:
            raise DeatError(
                f"--epochs = {longer.epochs} does not prolong a run that its rule has ended ({position.stopped}); "
                "start a new run, with --no-stop if it is to go on"
            )
        planned = plan(asked, memory_limit=conduct.memory_limit, continues=config, begun=begun is not None)
        _refuse_changes(changes, planned.config, config)
        for package, version in versions().items():
            if config.versions.get(package, version) != version:
                _warn(callbacks, f"{package} is {version} here, and the run began with {config.versions[package]}")
        if longer.epochs != config.epochs:
            layout = f"; its learning rate stays laid out for {longer.lr_epochs}" if longer.lr_epochs else ""
            _warn(callbacks, f"the run goes on to {longer.epochs} epochs, where it was to have {config.epochs}{layout}")
        anew = {name: getattr(planned.config, name) for name in MAY_DIFFER if name in changes}
        now = longer.model_copy(update={**anew, "conduct": conduct})
        if now != config:
            together.on_main(lambda: run.reconfigured(now).path)
        run = RunDirectory(run.path, now)
        return run, _fit(planned, run, callbacks, resume=True)


RESOLVED = ("method", "arch", "precision", "init_from")
"""Options that are not recorded as they were given, so that only a plan can be compared."""


def _refuse_changes(
    changes: Mapping[str, Any], now: TrainOptions | RunConfig, before: RunConfig, but: Sequence[str] = ()
) -> None:
    for name in changes:
        was, asked = getattr(before, name), getattr(now, name)
        if name not in (*MAY_DIFFER, "epochs", *but) and asked != was:
            raise DeatError(
                f"--{name.replace('_', '-')} = {asked} differs from the run's {was}; start a new run for it"
            )


def _together(config: RunConfig) -> World:
    return world(cpu=resolve_device(config.device).type == "cpu")


@contextmanager
def _alone(run: RunDirectory, together: World) -> Iterator[None]:
    """Keeps other processes than these from training in a run, and has an interruption say what is kept of it."""
    with ExitStack() as stack:
        together.on_main(lambda: stack.enter_context(run.locked()))
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt:
            kept = f"{run.path} keeps what it had; deat-rb train --resume {run.path} goes on from there"
            raise Interrupted(kept) from None


def _warn(callbacks: Sequence[Callback], message: str) -> None:
    for each in callbacks:
        each.on_warning(message)


def _fit(planned: TrainingPlan, run: RunDirectory, callbacks: Sequence[Callback], resume: bool = False) -> History:
    config = run.config
    device = resolve_device(config.device)
    is_main = _together(config).is_main
    trackers = Trackers(config.conduct.track, run) if config.conduct.track and is_main else None
    batches = Batches(
        planned.train,
        config.batch_size,
        shuffle=True,
        augment=planned.data.augment,
        seed=config.seed,
        device=device,
        memory_format=torch.channels_last,
    )
    try:
        return fit(
            planned.trainer,
            batches,
            Batches(interleave_classes(planned.val).in_memory(), config.batch_size, device=device),
            epochs=config.epochs,
            lr=config.lr,
            lr_schedule=config.lr_schedule,
            lr_epochs=config.lr_epochs,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            device=device,
            precision=config.precision,
            select=config.select,
            seed=config.seed,
            early_stopping=config.heed_stop,
            on_nonfinite=config.on_nonfinite,
            compile=config.compiled,
            sync_bn=config.sync_bn,
            run=run,
            resume=resume,
            save_every=config.conduct.save_every,
            callbacks=[*callbacks, *([trackers] if trackers else [])],
        )
    finally:
        # Whatever ended training is what is told, not that after it the disk was still full.
        try:
            if trackers is not None:
                trackers.close()
            if is_main and (rows := run.rows()):
                plot_curves(rows, run.path / CURVES, title=f"{config.method} on {config.dataset}, {config.arch}")
        except (DeatError, OSError) as error:
            _warn(callbacks, f"the curves and the trackers are not complete: {error}")


def train_seeds(
    options: TrainOptions,
    seeds: Sequence[int],
    *,
    output: str | Path = "runs",
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    save_every: float | None = None,
    track: Sequence[str] | None = None,
    memory_limit: int | None = None,
) -> list[tuple[RunDirectory, History]]:
    """Trains the same with one seed after another.

    Args:
        options: What is asked for; their seed is not used.
        seeds: The seeds, each once.
        output: The folder of all runs.
        name: The runs' name, to which ``-s`` and the seed are added.
        callbacks: Called during each training, on rank 0.
        save_every: As for `train`.
        track: As for `train`.
        memory_limit: As for `plan`.

    Raises:
        DeatError: If something is not admissible or one of the names is taken; then nothing has been written.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise DeatError(f"--seeds {','.join(map(str, seeds))} has to name different seeds; give such as 0,1,2")
    plans = [plan(options.model_copy(update={"seed": seed}), memory_limit=memory_limit) for seed in seeds]
    names = [f"{name}-s{p.config.seed}" if name else default_name(p.config) for p in plans]
    for each in names:
        check_free(Path(output) / each)
    return [
        train(p, output=output, name=each, callbacks=callbacks, save_every=save_every, track=track)
        for p, each in zip(plans, names, strict=True)
    ]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (0 for a single value), as the paper's Tables 6 and 7 give them."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
