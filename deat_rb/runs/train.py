"""Training and resuming of runs, as by `deat-rb train`."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deat_rb.data.batches import Batches
from deat_rb.data.datasets import Dataset
from deat_rb.data.extra_data import ExtraData
from deat_rb.data.images import interleave_classes
from deat_rb.data.validation_images import ValidationImages
from deat_rb.models.names import check_trust
from deat_rb.runs.config import RunConfig
from deat_rb.runs.curve_test import CurveTest
from deat_rb.runs.directory import CURVES, RunDirectory, check_free, check_name
from deat_rb.runs.options import MAY_CHANGE, TrainOptions, had_another_start, make_options
from deat_rb.runs.plan import TrainingPlan, plan
from deat_rb.runs.plots import plot_curves
from deat_rb.runs.resolution import default_name, resolve
from deat_rb.runs.trackers import TrackerError, Trackers
from deat_rb.training import checkpoint
from deat_rb.training.callbacks import Callback, check_callbacks
from deat_rb.training.early_stopping import NOT_RISEN
from deat_rb.training.fit import fit
from deat_rb.training.history import History
from deat_rb.training.state import read
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.distributed import World, world
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.options import format_epochs
from deat_rb.utils.text import counted
from deat_rb.utils.versions import versions


def train(
    options: TrainOptions | Mapping[str, Any] | TrainingPlan,
    *,
    output: str | Path = "runs",
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[RunDirectory, History]:
    """Train as `deat-rb train` does.

    Args:
        options: The options by name (see docs/options.md), or a plan created from them.
        output: Parent folder of the run directory.
        name: The run's name; by default composed of method, dataset, architecture and seed.
        callbacks: Called during training, on rank 0.

    Returns:
        The run directory and the history.

    Raises:
        DeatError: An option or the data are invalid, or the name is taken; nothing has been written then.
    """
    check_callbacks(callbacks)
    if name is not None:
        check_name(name)
    if not isinstance(options, TrainingPlan):
        options = plan(options if isinstance(options, TrainOptions) else make_options(options))
    config = options.config
    ranks = _world(config)
    run = RunDirectory(Path(output) / (name or default_name(config)), config)
    ranks.on_main(lambda: RunDirectory.create(run.path, config).path)
    try:
        with _exclusive(run, ranks):
            return run, _fit(options, run, callbacks)
    except TrackerError:  # before the first batch: the name stays free
        ranks.on_main(lambda: shutil.rmtree(run.path, ignore_errors=True))
        raise


def resume(
    path: str | Path,
    changes: Mapping[str, Any],
    *,
    callbacks: Sequence[Callback] = (),
    trust_code: bool = False,
) -> tuple[RunDirectory, History]:
    """Continue a run that was interrupted, as `deat-rb train --resume` does.

    Args:
        path: The run directory.
        changes: Options to change. Those that affect the result must equal the run's, except ``epochs``, which may be
            increased with a flat or multistep learning rate.
        callbacks: Called during training, on rank 0.
        trust_code: Whether the run's ``package.module:factory`` may be called to build the network; no other code
            named in a run is ever executed.

    Raises:
        DeatError: The folder is not a run, another process is training in it, or an option, the data or the run's
            configuration has changed.
    """
    run = RunDirectory.open(path)
    config = run.config
    check_trust(config.model.arch, trust_code, source=f"the run {path}")
    options = make_options({**config.flat(), **{name: value for name, value in changes.items() if value is not None}})
    ranks = _world(options)
    with _exclusive(run, ranks):
        run.refuse_links()
        newest = checkpoint.newest(run.checkpoints, lambda damage: None)  # `fit` warns when it reads it
        state = read(newest) if newest is not None else None
        if state is not None and (differing := config.differences(state.config)):
            raise DeatError(
                f"{run.path / 'config.json'} was changed after the run began, in {', '.join(differing)}; "
                "restore the original values, or start a new run"
            )
        _refuse_changes(changes, options, config, RESOLVED)
        _refuse_changes(changes, resolve(options), config)
        longer = config.extended(options.optim.epochs)
        if longer.optim.epochs > config.optim.epochs and state is not None and state.stopped is not None:
            how = "without --patience" if state.stopped.startswith(NOT_RISEN) else "with --no-early-stopping"
            raise DeatError(
                f"--epochs = {format_epochs(longer.optim.epochs)} cannot extend a run that was ended by its stopping "
                f"rule ({state.stopped}); start a new run, {how} to train all epochs"
            )
        planned = plan(options, continues=config, started=newest is not None)
        if longer.optim.epochs > config.optim.epochs and planned.trainer.schedule.needs_epochs:
            raise DeatError(
                f"--epochs = {format_epochs(longer.optim.epochs)} cannot extend a run of {config.attack.method}, whose "
                f"steps are laid out over {counted(config.optim.epochs, 'epoch')}; start a new run"
            )
        for package, version in versions().items():
            if config.versions.get(package, version) != version:
                _warn(callbacks, f"{package} is {version} here, but the run started with {config.versions[package]}")
        if state is not None and had_another_start(state.config):
            _warn(
                callbacks,
                f"the run began with an earlier version, in which the attack of {config.attack.method} had a different "
                "start (docs/methods.md), and continues with the current one; for comparable results, start a new run",
            )
        threads, usable = config.runtime.threads, planned.config.runtime.threads
        if "threads" not in changes and threads is not None and usable is not None and usable < threads:
            be = "is" if usable == 1 else "are"
            _warn(callbacks, f"the run used {counted(threads, 'thread')}, but there {be} only "
                  f"{counted(usable, 'processor')} here; the number of threads affects rounding")  # fmt: skip
        if longer.optim.epochs != config.optim.epochs:
            layout = longer.optim.lr_epochs
            milestones = f"; the learning rate keeps the milestones for {counted(layout, 'epoch')}" if layout else ""
            before, after = config.optim.epochs, format_epochs(longer.optim.epochs)
            _warn(callbacks, f"the run is extended from {before} to {after} epochs{milestones}")
        resolved = planned.config.flat()
        now = longer.but(**{name: resolved[name] for name in MAY_CHANGE if changes.get(name) is not None})
        if now != config:
            ranks.on_main(lambda: run.reconfigure(now).path)
        run = RunDirectory(run.path, now)
        return run, _fit(planned, run, callbacks, resume=True)


RESOLVED = ("method", "arch", "precision", "init_from", "weights", "extra_data")
"""Options whose recorded values differ from the given ones, so that they are compared after resolution."""


def _refuse_changes(changes: Mapping[str, Any], now: TrainOptions, before: RunConfig, but: Sequence[str] = ()) -> None:
    was, values = before.flat(), now.flat()
    for name in changes:
        if name not in (*MAY_CHANGE, "epochs", *but) and values[name] != was[name]:
            flag = f"--{name.replace('_', '-')}"
            raise DeatError(f"{flag} = {values[name]} differs from the run's {was[name]}; omit it or start a new run")


def _world(options: TrainOptions) -> World:
    return world(cpu=resolve_device(options.runtime.device).type == "cpu")


@contextmanager
def _exclusive(run: RunDirectory, ranks: World) -> Iterator[None]:
    """Lock a run against training by other processes; turn Ctrl-C into `Interrupted` with a hint how to resume."""
    with ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(run.locked()))
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt:
            kept = f"{run.path} is kept; continue with {run.command('train --resume')}"
            raise Interrupted(kept) from None


def _warn(callbacks: Sequence[Callback], message: str) -> None:
    for each in callbacks:
        each.on_warning(message)


def _fit(planned: TrainingPlan, run: RunDirectory, callbacks: Sequence[Callback], resume: bool = False) -> History:
    config = run.config
    device = resolve_device(config.runtime.device)
    ranks, trackers = _world(config), list[Trackers]()
    if config.output.track:  # an error on rank 0 ends the other ranks, too
        warn = partial(_warn, callbacks)
        ranks.on_main(lambda: trackers.append(Trackers(config.output.track, run, config.output.project, warn)))
    drawn = config.output.curve_test
    curve = [CurveTest(run.path, *planned.data.test.first(drawn).tensors())] if drawn and ranks.is_main else []
    batch_size = config.data.batch_size
    batches = Batches(
        planned.train,
        batch_size,
        shuffle=True,
        augmentation=planned.config.data.augment or "none",
        num_classes=len(planned.data.classes),
        extra=None if planned.extra is None else planned.extra.images,
        extra_fraction=planned.config.data.extra_fraction or 0.0,
        seed=config.optim.seed,
        device=device,
        memory_format=torch.channels_last,
    )
    try:
        return fit(
            planned.trainer,
            batches,
            ValidationImages(interleave_classes(planned.val), device),
            run=run,
            resume=resume,
            callbacks=[*curve, *callbacks, *trackers],
            **dict(config.optim),
            **dict(config.runtime),
        )
    finally:
        # An error here must not hide the one that ended training, such as a full disk.
        try:
            for each in trackers:
                each.close()
            if ranks.is_main and (rows := run.rows()):
                plot_curves(rows, run.path / CURVES, title=run.title, chosen=run.selected_epoch)
        except (DeatError, OSError) as error:
            _warn(callbacks, f"the plots may be incomplete: {error}")


def train_seeds(
    options: TrainOptions,
    seeds: Sequence[int],
    *,
    output: str | Path = "runs",
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    data: Dataset | None = None,
    extra: ExtraData | None = None,
) -> list[tuple[RunDirectory, History]]:
    """Train once with each of several seeds.

    Args:
        options: The options; their seed is ignored.
        seeds: The seeds, all different.
        output: Parent folder of the run directories.
        name: Prefix of the runs' names, followed by ``-s`` and the seed.
        callbacks: Called during training, on rank 0.
        data: The dataset, if it was already loaded.
        extra: The images of ``extra_data``, likewise.

    Raises:
        DeatError: An option or the data are invalid, or a name is taken; nothing has been written then.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        twice = [seed for seed, count in Counter(seeds).items() if count > 1]
        problem = f"has {twice[0]} twice: remove the duplicates" if twice else "is empty: give seeds such as 0,1,2"
        raise DeatError(f"--seeds {','.join(map(str, seeds))} {problem}")
    plans = [plan(options.but(seed=seeds[0]), data=data, extra=extra)]
    plans += [plan(options.but(seed=seed), data=plans[0].data, extra=plans[0].extra) for seed in seeds[1:]]
    names = [f"{name}-s{p.config.optim.seed}" if name else default_name(p.config) for p in plans]
    for each in names:
        check_free(Path(output) / each)
    results: list[tuple[RunDirectory, History]] = []
    for each in names:
        if results:  # free the network and the method's state on the device, which refer to each other
            for callback in callbacks:
                vars(callback).pop("state", None)
            gc.collect()
        results.append(train(plans.pop(0), output=output, name=each, callbacks=callbacks))
    return results
