"""Training plan: options resolved, data loaded and the model built, before anything is written."""

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
from deat_rb.runs.config import RunConfig
from deat_rb.runs.defaults import dataset_defaults, setting_defaults
from deat_rb.runs.options import TrainOptions
from deat_rb.runs.trackers import check_trackers
from deat_rb.training.lr import check_layout
from deat_rb.training.trainer import Trainer
from deat_rb.utils import seeding
from deat_rb.utils.devices import check_sync_bn, resolve_device, resolve_precision
from deat_rb.utils.distributed import world
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import validate
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import check_eps, format_fraction
from deat_rb.utils.versions import versions


@dataclass(eq=False)
class TrainingPlan:
    """A run that is ready to start, before anything is written.

    Attributes:
        config: Its configuration.
        data: The dataset.
        train: The training images.
        val: The images held out of them for validation.
        trainer: The method and the model.
        ranks: How many processes train together.
    """

    config: RunConfig
    data: Dataset
    train: LabeledImages
    val: LabeledImages
    trainer: Trainer = field(repr=False)
    ranks: int = 1

    @property
    def batches(self) -> int:
        """M, the number of mini-batches per epoch."""
        return -(-len(self.train) // self.config.data.batch_size)

    def costs(self) -> dict[str, int] | None:
        """Return the passes and updates of the whole run, in units of mini-batches (invariant 6).

        None where they depend on the run (guided and accuracy schedules, friendly attacks, stopping rules) or on an
        attack or a trainer that is not built in.
        """
        trainer, crafter, epochs, m = self.trainer, self.trainer.crafter, self.config.optim.epochs, self.batches
        steps = trainer.schedule.total_steps(epochs)
        may_stop = trainer.stopping is not None and self.config.optim.early_stopping
        if steps is None or may_stop or type(crafter) is not PGD or crafter.tau is not None:
            return None
        if type(trainer) is ReplayTrainer:
            return {"backward passes": steps * m, "forward passes": steps * m, "updates": steps * m}
        if type(trainer) is not AttackTrainer:
            return None
        forwards = steps + epochs * (2 if trainer.loss.needs_clean else 1)
        if steps and crafter.loss == "kl":
            forwards += epochs
        return {"backward passes": (steps + epochs) * m, "forward passes": forwards * m, "updates": epochs * m}

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan in words, as ``--dry-run`` prints it."""
        data, attack, optim, runtime = self.config.data, self.config.attack, self.config.optim, self.config.runtime
        text = describe(attack.method)
        costs = self.costs()
        cost = (
            ", ".join(f"{count:,} {name}" for name, count in costs.items())
            if costs
            else f"depends on the run ({text.cost}; M = {self.batches})"
        )
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        return [
            ("method", f"{attack.method} ({text.paper})"),
            ("attack", f"{text.attack}; here eps = {format_fraction(attack.eps)}, alpha = {_size(self.trainer.alpha)}"),
            ("loss", text.loss),
            ("schedule", text.schedule),
            ("stop", text.stop if optim.early_stopping or text.stop == "-" else f"{text.stop}: only recorded"),
            ("setting", f"{attack.setting}: {optim.epochs} epochs, {optim.lr_schedule} LR up to {optim.lr:g}"),
            ("precision", f"{runtime.precision} on {resolve_device(runtime.device)}"
                          f"{f', {self.ranks} ranks' if self.ranks > 1 else ''}"),
            ("model", f"{self.config.model.arch}, {parameters:,} parameters, {self.config.network.num_classes} "
                      "classes"),
            ("data", f"{data.dataset}: {len(self.train):,} training, {len(self.val):,} validation, "
                     f"{len(self.data.test):,} test images of {data.image_size}x{data.image_size}"),
            *(("files", note) for note in self.data.notes),
            ("result", f"the weights of the {optim.select} epoch"),
            ("cost", cost),
        ]  # fmt: skip


def _size(alpha: float | None) -> str:
    return "-" if alpha is None else format_fraction(alpha)


def plan(options: TrainOptions, *, continues: RunConfig | None = None, started: bool = False) -> TrainingPlan:
    """Resolve options, load the data and build the model; write nothing.

    Args:
        options: The options.
        continues: The configuration of the run to continue, whose data these have to be.
        started: Whether that run has a checkpoint, so that the weights it was initialized from are not needed.

    Raises:
        DeatError: Something is not admissible.
    """
    asked = options.data
    method, row = recipe(_for_dataset(options.attack.method, asked.dataset))
    defaults = dataset_defaults(asked.dataset)
    given = options.given()
    arch = given.get("arch", defaults.arch)
    setting = setting_defaults(options.attack.setting, row, arch)
    setting["epochs"] *= defaults.epoch_factor
    eps = check_eps(given.get("eps", defaults.eps), "--eps")
    check_trackers(options.output.track)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and ":" in options.runtime.device:
        raise DeatError(
            f"--device {options.runtime.device} is one device for all of the {ranks} processes; leave it out, and each "
            "has its own"
        )
    device = resolve_device(options.runtime.device)
    check_sync_bn(options.runtime.sync_bn, device)
    together = world(cpu=device.type == "cpu")
    # One process of each machine downloads, unpacks and reads the images, and the others use what it has stored.
    data = together.local_main_first(
        lambda: load_data(
            asked.dataset, data_dir=asked.data_dir, image_size=asked.image_size, memory_limit=asked.memory_limit
        )
    )
    if continues is not None and data.fingerprint != continues.data_fingerprint:
        raise DeatError(f"the data of {continues.data.dataset} are not those of the run; start a new run for them")
    val_size = asked.val_size
    if val_size is None:
        val_size = default_val_size(min(asked.train_size or len(data.train), len(data.train)))
    train, val = train_val_split(data.train, val_size, seed=options.optim.seed)
    if asked.train_size is not None:
        train = subset(train, asked.train_size, options.optim.seed)
    channels, size = train.shape[0], train.shape[-1]
    spec = model_spec(
        arch, num_classes=len(data.classes), image_size=size, channels=channels, mean=data.mean, std=data.std
    )
    values = {
        **options.flat(),
        "batch_size": defaults.batch_size,
        **setting,
        **given,
        "method": method,
        "data_dir": _absolute(asked.data_dir),
        "init_from": _absolute(options.model.init_from),
        "eps": eps,
        "arch": spec.arch,
        "image_size": size,
        "train_size": len(train),
        "val_size": len(val),
        "precision": resolve_precision(given.get("precision", setting["precision"]), device),
        "classes": data.classes,
        "network": spec,
        "data_fingerprint": data.fingerprint,
        "versions": versions(),
    }
    config = validate(RunConfig, values)
    check_layout(config.optim.lr_schedule, config.optim.lr_epochs, "--lr-epochs")
    batch_size = config.data.batch_size
    if len(train) < batch_size:
        raise DeatError(
            f"{len(train)} training images are fewer than a batch of {batch_size}; give a smaller --batch-size"
        )
    if len(train) % batch_size == 1 and ":" in spec.arch:
        raise DeatError(
            f"{len(train)} training images in batches of {batch_size} leave one of a single image, from which "
            "BatchNorm cannot learn; give another --batch-size or --train-size"
        )
    _check_shares(len(train), batch_size, together.size)
    trainer = create(method, _initial(config, started), eps=eps, **config.method_options())
    trainer.check_attack(train.first(min(8, len(train))).tensors()[0])
    return TrainingPlan(config, data, train, val, trainer, together.size)


def _check_shares(images: int, batch_size: int, ranks: int) -> None:
    """Raise an error for batches of which a rank would get less than the two images that BatchNorm needs."""
    if ranks == 1:
        return
    for size in {batch_size, images % batch_size or batch_size}:
        if size < 2 * ranks:
            raise DeatError(
                f"{images} training images in batches of {batch_size} leave one of {size}, too few for two images on "
                f"each of {ranks} processes; give another --batch-size or --train-size"
            )


def _for_dataset(method: str, dataset: str) -> str:
    """Fill in the P of ``deat-P%``: 20 on CIFAR-100, 40 elsewhere (section 5.1)."""
    percent = 20 if dataset == "cifar100" else 40
    return f"deat-{percent}%" if method.strip().lower() in ("deat-p%", "deat-%") else method


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _initial(config: RunConfig, started: bool) -> NormalizedModel:
    with seeding.preserved():
        seeding.seed_global(config.optim.seed, "weights")
        model = config.network.build()
    source = config.model.init_from
    if source is not None and not started:
        load_weights(model, load_tensors(Path(source)), source=source)
    return model


def default_val_size(images: int) -> int:
    """Return how many images are held out: 1,000 of CIFAR-10's 50,000, in proportion for fewer, at least 100.

    No more than a fifth of the images for the sake of the 100.
    """
    return max(min(100, images // 5), min(1000, images // 50))


def default_name(config: RunConfig) -> str:
    """Return a run's default name."""
    arch = config.model.arch.replace(":", "-")
    return f"{config.attack.method}-{config.data.dataset}-{arch}-s{config.optim.seed}".replace("/", "-")
