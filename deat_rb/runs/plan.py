"""What `deat-rb train` is about to do: options resolved, data loaded, the network built, and nothing written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from deat_rb.attacks.pgd import PGD
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.images import LabeledImages, subset, train_val_split
from deat_rb.methods.describe import describe
from deat_rb.methods.registry import create, recipe
from deat_rb.methods.trainers import AttackTrainer, ReplayTrainer
from deat_rb.models.spec import NormalizedModel, model_spec
from deat_rb.models.weights import load_weights
from deat_rb.runs.config import RunConfig, RuntimeConfig, TrainOptions
from deat_rb.runs.defaults import dataset_defaults, setting_defaults
from deat_rb.training.lr import check_layout
from deat_rb.training.trainer import Trainer
from deat_rb.utils import seeding
from deat_rb.utils.devices import check_sync_bn, resolve_device, resolve_precision
from deat_rb.utils.distributed import world
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import check_eps, format_fraction
from deat_rb.utils.versions import versions


@dataclass(eq=False)
class TrainingPlan:
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
    data: Dataset
    train: LabeledImages
    val: LabeledImages
    trainer: Trainer = field(repr=False)
    processes: int = 1

    @property
    def batches(self) -> int:
        """M, the mini-batches of an epoch."""
        return -(-len(self.train) // self.config.batch_size)

    def costs(self) -> dict[str, int] | None:
        """Backward and forward passes and updates of the whole run, in units of mini-batches (law 6).

        None where they depend on what training will see (guided and accuracy schedules, friendly crafting, stopping
        rules) or on an attack or a trainer of one's own.
        """
        trainer, crafter, epochs, m = self.trainer, self.trainer.crafter, self.config.epochs, self.batches
        steps = trainer.schedule.total_steps(epochs)
        may_stop = trainer.stopping is not None and self.config.heed_stop
        if steps is None or may_stop or type(crafter) is not PGD or crafter.tau is not None:
            return None
        if type(trainer) is ReplayTrainer:
            return {"backwards": steps * m, "forwards": steps * m, "updates": steps * m}
        if type(trainer) is not AttackTrainer:
            return None
        forwards = steps + epochs * (2 if trainer.loss.needs_clean else 1)
        if steps and crafter.loss == "kl":
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


def plan(
    options: TrainOptions,
    *,
    memory_limit: int | None = None,
    continues: RunConfig | None = None,
    begun: bool = False,
) -> TrainingPlan:
    """Resolves options, loads the data and builds the model; writes nothing.

    Args:
        options: What is asked for.
        memory_limit: In bytes: a folder whose decoded images exceed it is read by worker processes, batch by batch.
        continues: The configuration of the run that is to go on, whose data it has to be.
        begun: Whether that has weights of its own already, so that those it began with are not needed.

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
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and ":" in options.device:
        raise DeatError(
            f"--device {options.device} is one device for all of the {processes} processes; leave it out, and each has "
            "its own"
        )
    device = resolve_device(options.device)
    check_sync_bn(options.sync_bn, device)
    together = world(cpu=device.type == "cpu")
    # One process of each machine downloads, unpacks and surveys, and the others find what it has done.
    data = together.local_main_first(
        lambda: load_data(
            options.dataset, data_dir=options.data_dir, image_size=options.image_size, memory_limit=memory_limit
        )
    )
    if continues is not None and data.fingerprint != continues.data_fingerprint:
        raise DeatError(f"the data of {continues.dataset} are not those of the run; start a new run for them")
    val_size = options.val_size
    if val_size is None:
        val_size = default_val_size(min(options.train_size or len(data.train), len(data.train)))
    train, val = train_val_split(data.train, val_size, seed=options.seed)
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
            "conduct": RuntimeConfig(memory_limit=memory_limit),
        }
    )
    check_layout(config.lr_schedule, config.lr_epochs, "--lr-epochs")
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
    trainer = create(method, _initial(config, begun), eps=eps, **config.method_options())
    trainer.check_attack(train.first(min(8, len(train))).tensors()[0])
    return TrainingPlan(config, data, train, val, trainer, together.size)


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


def _initial(config: RunConfig, begun: bool) -> NormalizedModel:
    with seeding.preserved():
        seeding.seed_global(config.seed, "weights")
        model = config.model.build()
    if config.init_from is not None and not begun:
        load_weights(model, load_tensors(Path(config.init_from)), source=config.init_from)
    return model


def default_val_size(images: int) -> int:
    """How many are held out: 1,000 of CIFAR-10's 50,000, in proportion for fewer, but 100 if a fifth allows it."""
    return max(min(100, images // 5), min(1000, images // 50))


def default_name(config: RunConfig) -> str:
    """What a run is called where nobody said."""
    return f"{config.method}-{config.dataset}-{config.arch.replace(':', '-')}-s{config.seed}".replace("/", "-")
