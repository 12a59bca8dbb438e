"""`deat-rb train`: from options to a run directory."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deat_rb import randomness
from deat_rb.batches import Batches, LabelledImages, hold_out, subset
from deat_rb.catalogue import describe
from deat_rb.config import RunConfig, TrainOptions, dataset_defaults, make_options, setting_defaults
from deat_rb.data import DataSet, load_data
from deat_rb.engine import resolve_device, resolve_precision
from deat_rb.errors import DeatError
from deat_rb.evaluation.subject import in_turn
from deat_rb.files import load_tensors
from deat_rb.fit import fit
from deat_rb.history import History, Reporter
from deat_rb.methods import create, recipe
from deat_rb.models import NormalizedModel, check_trust, load_weights, model_spec
from deat_rb.plots import plot_curves
from deat_rb.processes import world
from deat_rb.runs import CURVES, RunDirectory, check_free, check_name
from deat_rb.threat import check_eps, format_fraction
from deat_rb.tracking import Tracked, check_trackers
from deat_rb.trainers import ReplayTrainer, Trainer


@dataclass(eq=False)
class Plan:
    """A run that is ready to start and has written nothing yet.

    Attributes:
        config: Everything that decides it.
        data: The data set.
        train: The training images.
        val: The images held out of them.
        trainer: The method and the model.
        processes: How many train together.
    """

    config: RunConfig
    data: DataSet
    train: LabelledImages
    val: LabelledImages
    trainer: Trainer = field(repr=False)
    processes: int = 1

    @property
    def batches(self) -> int:
        """M, the mini-batches of an epoch."""
        return -(-len(self.train) // self.config.batch_size)

    def costs(self) -> dict[str, int] | None:
        """Backward and forward passes and updates of the whole run, in units of mini-batches (law 6).

        None where they depend on what training will see: guided and accuracy schedules, friendly crafting, stopping
        rules.
        """
        trainer, epochs, m = self.trainer, self.config.epochs, self.batches
        steps = trainer.schedule.total_steps(epochs)
        may_stop = trainer.stopping is not None and self.config.heed_stop
        if steps is None or may_stop or getattr(trainer.crafter, "tau", None) is not None:
            return None
        if isinstance(trainer, ReplayTrainer):
            return {"backwards": steps * m, "forwards": steps * m, "updates": steps * m}
        forwards = steps + epochs * (2 if trainer.loss.needs_clean else 1)
        if steps and getattr(trainer.crafter, "loss", None) == "kl":
            forwards += epochs
        return {"backwards": (steps + epochs) * m, "forwards": forwards * m, "updates": epochs * m}

    def lines(self) -> list[tuple[str, str]]:
        """The plan in words, as ``--dry-run`` prints it."""
        config, text = self.config, describe(self.config.method)
        costs = self.costs()
        spent = (
            ", ".join(f"{count:,} {name}" for name, count in costs.items())
            if costs
            else f"depends on the run ({text.cost}; M = {self.batches})"
        )
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        return [
            ("method", f"{config.method} ({text.paper})"),
            ("attack", f"{text.attack}; here eps = {format_fraction(config.eps)}, alpha = {_size(self.trainer.alpha)}"),
            ("loss", text.loss),
            ("schedule", text.schedule),
            ("stop", text.stop if config.heed_stop or text.stop == "-" else f"{text.stop}: noted, not heeded"),
            ("setting", f"{config.setting}: {config.epochs} epochs, {config.lr_schedule} LR up to {config.lr:g}"),
            ("precision", f"{config.precision} on {resolve_device(config.device)}"
                          f"{f', {self.processes} processes' if self.processes > 1 else ''}"),
            ("model", f"{config.arch}, {parameters:,} parameters, {config.model.num_classes} classes"),
            ("data", f"{config.dataset}: {len(self.train):,} training, {len(self.val):,} validation, "
                     f"{len(self.data.test):,} test images of {config.image_size}x{config.image_size}"),
            ("result", f"the weights of the {config.select} epoch"),
            ("cost", spent),
        ]  # fmt: skip


def _size(alpha: float | None) -> str:
    return "-" if alpha is None else format_fraction(alpha)


def plan(options: TrainOptions, *, memory_limit: int | None = None) -> Plan:
    """Resolves options, loads the data and builds the model; writes nothing.

    Args:
        options: What is asked for.
        memory_limit: In bytes: a folder whose decoded images exceed it is read by worker processes, batch by batch.

    Raises:
        DeatError: If any of it is not admissible.
    """
    method, row = recipe(_for_dataset(options.method, options.dataset))
    defaults = dataset_defaults(options.dataset)
    arch = options.arch or defaults.arch
    setting = setting_defaults(options.setting, row, arch)
    setting["epochs"] *= defaults.epoch_factor
    given = {key: value for key, value in options.model_dump().items() if value is not None}
    eps = check_eps(options.eps if options.eps is not None else defaults.eps, "--eps")
    device = resolve_device(options.device)
    together = world(cpu=device.type == "cpu")

    def load() -> DataSet:
        return load_data(
            options.dataset, data_dir=options.data_dir, image_size=options.image_size, memory_limit=memory_limit
        )

    if memory_limit is not None:
        together.first(lambda: load().name)  # it surveys a folder once, and the others find what it found
    data = load()
    val_size = options.val_size
    if val_size is None:
        val_size = default_val_size(min(options.train_size or len(data.train), len(data.train)))
    train, val = hold_out(data.train, val_size, seed=options.seed)
    if options.train_size is not None:
        train = subset(train, options.train_size, options.seed)
    channels, size = train.shape[0], train.shape[-1]
    spec = model_spec(
        arch, num_classes=len(data.classes), image_size=size, channels=channels, mean=data.mean, std=data.std
    )
    config = RunConfig.model_validate(
        {
            **options.model_dump(),
            "batch_size": defaults.batch_size,
            **setting,
            **given,
            "method": method,
            "data_dir": _absolute(options.data_dir),
            "init_from": _absolute(options.init_from),
            "eps": eps,
            "arch": spec.arch,
            "image_size": size,
            "train_size": len(train),
            "val_size": len(val),
            "precision": resolve_precision(given.get("precision", setting["precision"]), device),
            "classes": data.classes,
            "model": spec,
            "data_fingerprint": data.fingerprint,
            "versions": versions(),
        }
    )
    if len(train) < config.batch_size:
        raise DeatError(
            f"{len(train)} training images are fewer than a batch of {config.batch_size}; give a smaller --batch-size"
        )
    if len(train) % config.batch_size == 1 and ":" in config.arch:
        raise DeatError(
            f"{len(train)} training images in batches of {config.batch_size} leave one of a single image, from which "
            "BatchNorm cannot learn; give another --batch-size or --train-size"
        )
    _check_shares(len(train), config.batch_size, together.size)
    trainer = create(method, _initial(config), eps=eps, **config.method_options())
    return Plan(config, data, train, val, trainer, together.size)


def _check_shares(images: int, batch_size: int, processes: int) -> None:
    """Refuses batches of which a process would get less than the two images that BatchNorm needs."""
    if processes == 1:
        return
    for size in {batch_size, images % batch_size or batch_size}:
        if size < 2 * processes:
            raise DeatError(
                f"{images} training images in batches of {batch_size} leave one of {size}, too few for two images on "
                f"each of {processes} processes; give another --batch-size or --train-size"
            )


def _for_dataset(method: str, dataset: str) -> str:
    """The P that ``deat-P%`` stands for on a data set: 20 on CIFAR-100, 40 elsewhere (section 5.1)."""
    percent = 20 if dataset == "cifar100" else 40
    return f"deat-{percent}%" if method.strip().lower() in ("deat-p%", "deat-%") else method


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _initial(config: RunConfig) -> NormalizedModel:
    with randomness.preserved():
        randomness.seed_global(config.seed, "weights")
        model = config.model.build()
    if config.init_from is not None:
        load_weights(model, load_tensors(Path(config.init_from)), source=config.init_from)
    return model


def default_val_size(images: int) -> int:
    """How many are held out: 1,000 of CIFAR-10's 50,000, in proportion for fewer, but 100 if a fifth allows it."""
    return max(min(100, images // 5), min(1000, images // 50))


def default_name(config: RunConfig) -> str:
    """What a run is called where nobody said."""
    return f"{config.method}-{config.dataset}-{config.arch.replace(':', '-')}-s{config.seed}".replace("/", "-")


def train(
    options: TrainOptions | dict[str, Any] | Plan,
    *,
    output: str | Path = "runs",
    name: str | None = None,
    reporter: Reporter | None = None,
    save_every: float = 5.0,
    track: Sequence[str] = (),
    memory_limit: int | None = None,
) -> tuple[RunDirectory, History]:
    """Trains as `deat-rb train` does.

    Args:
        options: What is asked for, as `TrainOptions` has it, or a plan made of it.
        output: The folder of all runs.
        name: The run's name; by default made of method, data set, architecture and seed.
        reporter: Is told how it goes.
        save_every: Minutes between two checkpoints within an epoch.
        track: Trackers that are told of each epoch, such as ``tensorboard``.
        memory_limit: As for `plan`.

    Returns:
        The run directory and the history.

    Raises:
        DeatError: If something is not admissible; then nothing has been written.
    """
    if name is not None:
        check_name(name)
    check_trackers(track)
    planned = options if isinstance(options, Plan) else plan(
        make_options(options) if isinstance(options, dict) else options, memory_limit=memory_limit
    )  # fmt: skip
    config = planned.config
    together = world(cpu=resolve_device(config.device).type == "cpu")
    path = Path(output) / (name or default_name(config))
    run = RunDirectory(path, config)
    together.first(lambda: RunDirectory.create(path, config).path)
    with run.locked() if together.is_main else nullcontext():
        return run, _fit(planned, run, reporter, save_every, track)


def resume(
    path: str | Path,
    changes: Mapping[str, Any],
    *,
    reporter: Reporter | None = None,
    save_every: float = 5.0,
    track: Sequence[str] = (),
    memory_limit: int | None = None,
    trust_code: bool = False,
) -> tuple[RunDirectory, History]:
    """Goes on with a run that was stopped in any way at any moment, as `deat-rb train --resume` does.

    Args:
        path: The run directory.
        changes: Options asked for anew. None may differ from the run's, but ``epochs`` may grow under a flat or
            multistep learning rate.
        reporter: Is told how it goes.
        save_every: Minutes between two checkpoints within an epoch.
        track: Trackers that are told of each epoch, such as ``tensorboard``.
        memory_limit: As for `plan`.
        trust_code: Whether the run may have its network built by a ``package.module:factory``; nothing else of a run is
            ever executed.

    Raises:
        DeatError: If it is no run, another process is at it, or an option or the data have changed; by name.
    """
    check_trackers(track)
    run = RunDirectory.open(path)
    config = run.config
    check_trust(config.arch, trust_code, source=f"the run {path}")
    values = {key: value for key, value in config.model_dump().items() if key in TrainOptions.model_fields}
    planned = plan(make_options({**values, **changes}), memory_limit=memory_limit)
    for option in changes:
        was, now = getattr(config, option), getattr(planned.config, option)
        if option in ("data_dir", "on_nonfinite") or (
            option == "epochs" and now > was and config.lr_schedule != "cyclic"
        ):
            continue
        if now != was:
            hint = "; a cyclic learning rate cannot be prolonged" if option == "epochs" else ""
            name = f"--{option.replace('_', '-')}"
            raise DeatError(f"{name} = {now} differs from the run's {was}{hint}; start a new run for it")
    if planned.config.data_fingerprint != config.data_fingerprint:
        raise DeatError(f"the data of {config.dataset} are not those of the run {path}; start a new run for them")
    together = world(cpu=resolve_device(config.device).type == "cpu")
    with run.locked() if together.is_main else nullcontext():
        if planned.config.epochs != config.epochs:
            longer = config.model_copy(update={"epochs": planned.config.epochs})
            together.first(lambda: run.reconfigured(longer).path)
            run = RunDirectory(run.path, longer)
        return run, _fit(planned, run, reporter, save_every, track, resume=True)


def _fit(
    planned: Plan,
    run: RunDirectory,
    reporter: Reporter | None,
    save_every: float,
    track: Sequence[str],
    resume: bool = False,
) -> History:
    config = planned.config
    device = resolve_device(config.device)
    is_main = world(cpu=device.type == "cpu").is_main
    tracked = Tracked(track, run, reporter or Reporter()) if track and is_main else None
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
            Batches(in_turn(planned.val).held(), config.batch_size, device=device),
            epochs=config.epochs,
            lr=config.lr,
            lr_schedule=config.lr_schedule,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            device=device,
            precision=config.precision,
            select=config.select,
            seed=config.seed,
            heed_stop=config.heed_stop,
            on_nonfinite=config.on_nonfinite,
            compiled=config.compiled,
            sync_bn=config.sync_bn,
            run=run,
            resume=resume,
            save_every=save_every,
            reporter=tracked or reporter,
        )
    finally:
        if tracked is not None:
            tracked.close()
        rows = run.rows()
        if rows and is_main:
            plot_curves(rows, run.path / CURVES, title=f"{config.method} on {config.dataset}, {config.arch}")


def train_seeds(
    options: TrainOptions,
    seeds: Sequence[int],
    *,
    output: str | Path = "runs",
    name: str | None = None,
    reporter: Reporter | None = None,
    save_every: float = 5.0,
    track: Sequence[str] = (),
    memory_limit: int | None = None,
) -> list[tuple[RunDirectory, History]]:
    """Trains the same with one seed after another.

    Args:
        options: What is asked for; their seed is not used.
        seeds: The seeds, each once.
        output: The folder of all runs.
        name: The runs' name, to which ``-s`` and the seed are added.
        reporter: Is told how each goes.
        save_every: Minutes between two checkpoints within an epoch.
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
        train(p, output=output, name=each, reporter=reporter, save_every=save_every, track=track)
        for p, each in zip(plans, names, strict=True)
    ]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (0 for a single value), as the paper's Tables 6 and 7 give them."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for distribution in ("deat-rb", "torch", "torchvision", "torchattacks", "robustbench"):
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found
