"""Training plan: resolved options, loaded data and the model, before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deat_rb.data.augmentations import AUGMENTATIONS
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.extra_data import ExtraData, check_share, load_extra_data
from deat_rb.data.folder_info import rare_classes
from deat_rb.data.image_files import check_utf8
from deat_rb.data.images import LabeledImages, subset, train_val_split
from deat_rb.data.statistics import Progress
from deat_rb.methods.describe import describe
from deat_rb.methods.losses import balanced_weights
from deat_rb.methods.registry import create
from deat_rb.methods.schedules import EveryDEpochs
from deat_rb.models.initialization import InitialWeights, freeze_parameters, initial_weights
from deat_rb.models.spec import model_spec
from deat_rb.runs.batch_sizes import check_batches
from deat_rb.runs.config import RunConfig
from deat_rb.runs.defaults import default_val_size
from deat_rb.runs.directory import CONFIG, RunDirectory
from deat_rb.runs.hub_run import open_hub
from deat_rb.runs.options import DataConfig, ModelConfig, TrainOptions
from deat_rb.runs.resolution import resolve
from deat_rb.training.costs import Costs
from deat_rb.training.lr import MOMENTUM_RANGE
from deat_rb.training.options import OptimConfig
from deat_rb.training.schedule import Schedule
from deat_rb.training.trainer import Trainer
from deat_rb.utils import seeding
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.distributed import World, world
from deat_rb.utils.errors import DeatError
from deat_rb.utils.hub import is_hub
from deat_rb.utils.options import OPEN, validate
from deat_rb.utils.text import counted
from deat_rb.utils.units import format_fraction
from deat_rb.utils.versions import versions


@dataclass(eq=False)
class TrainingPlan:
    """A run that is ready to start; nothing has been written yet.

    Attributes:
        config: The run's configuration.
        data: The dataset.
        train: The training images, without those for validation.
        val: The validation images: the dataset's own, or else held out of the training images.
        extra: Images in addition to the training images, mixed into every batch.
        frozen: Number of frozen parameters, as text.
        trainer: The method and the model.
        ranks: Number of ranks of data-parallel training.
        notes: Notes for the user, such as which weights of a checkpoint were loaded.
    """

    config: RunConfig
    data: Dataset
    train: LabeledImages
    val: LabeledImages
    trainer: Trainer = field(repr=False)
    ranks: int = 1
    notes: tuple[str, ...] = ()
    extra: ExtraData | None = None
    frozen: str | None = None

    @property
    def batches(self) -> int:
        """M, the number of mini-batches per epoch."""
        return -(-len(self.train) // self.config.data.batch_size)

    @property
    def may_end_early(self) -> bool:
        """Whether a stopping rule may end training before its last epoch, or the attack may stop early at examples."""
        trainer, optim = self.trainer, self.config.optim
        return (
            optim.patience is not None
            or (trainer.stopping is not None and optim.early_stopping)
            or getattr(trainer.crafter, "tau", None) is not None
        )

    def costs(self) -> Costs | None:
        """Return the passes and updates of the whole run.

        None if they are not known in advance (schedules guided by gradient magnitude or accuracy, friendly attacks,
        stopping rules) or if the attack, schedule or trainer is not built in.
        """
        bounds = self.cost_bounds()
        return bounds[0] if bounds is not None and bounds[0] == bounds[1] and not self.may_end_early else None

    def cost_bounds(self) -> tuple[Costs, Costs] | None:
        """Return the `costs` with the fewest and with the most attack steps that the schedule may take.

        They are those of all epochs; None for an open-ended run and where the attack, schedule or trainer has none.
        """
        config, epochs, last = self.config, self.config.optim.epochs, self.batches - 1
        steps = None if epochs == OPEN else self.trainer.step_bounds(epochs)
        if steps is None:
            return None
        size = config.data.batch_size
        sizes = [size] * last + [len(self.train) - last * size if self.extra is None else size]
        fewest, most = (
            self.trainer.costs(sum(each), epochs, sizes, config.network.num_classes)
            for each in zip(*steps, strict=True)
        )
        return None if fewest is None or most is None else (fewest, most)

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as pairs of a heading and a text, as printed by ``--dry-run``; warnings come last."""
        data, attack, optim, runtime = self.config.data, self.config.attack, self.config.optim, self.config.runtime
        text = describe(attack.method, eps=attack.eps, **self.config.method_options())
        bounds = self.cost_bounds()
        if costs := self.costs():
            cost = str(costs)
        elif bounds:
            cost = f"at most {bounds[1]} ({text.cost}; M = {self.batches})"
        else:
            cost = f"counted during training ({text.cost}; M = {self.batches})"
        stored = self.trainer.stored_bytes(len(self.train), math.prod(self.train.shape))
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        network = self.config.model
        library = f"{network.arch.partition(':')[0]} (pretrained)" if network.pretrained else None
        origin = network.init_from or network.weights or library
        weights = f", weights from {origin}" if origin else ""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        threads = f", {counted(runtime.threads, 'thread')}" if runtime.threads else ""
        compiled = ", compiled" if runtime.compile else ""
        deterministic = ", deterministic algorithms only" if runtime.deterministic else ""
        per_replay = ", updated after each replay" if attack.lr_per_replay else ""
        epochs = counted(optim.epochs, "epoch") if optim.epochs < OPEN else "open-ended"
        rise = optim.warmup_epochs
        warmup = f" after {counted(rise, 'epoch', 'g')} of warm-up" if rise else ""
        alpha = "" if self.trainer.alpha is None else f", alpha = {format_fraction(self.trainer.alpha)}"
        if alpha and type(self.trainer.schedule).alpha is not Schedule.alpha:
            alpha += " in the first epoch"
        return [
            ("method", f"{attack.method} ({text.paper})"),
            ("attack", f"{text.attack}; eps = {format_fraction(attack.eps)}{alpha}"),
            ("loss", text.loss),
            *([("weighting", self._class_weights())] if attack.class_weights == "balanced" else []),
            ("schedule", text.schedule),
            ("stop", text.stop if optim.early_stopping or text.stop == "-" else f"{text.stop}: only recorded"),
            ("setting", f"{attack.setting}: {epochs}, {optim.lr_schedule} LR up to {optim.lr:g}"
                        f"{warmup}{per_replay}"),
            ("optimizer", f"{_optimizer(optim)}, batches of {data.batch_size}, seed {optim.seed}"),
            *([] if optim.patience is None else [
                ("patience", "ends when robust validation accuracy has not risen for "
                             f"{counted(optim.patience, 'epoch')}")
            ]),
            *([] if not optim.ema else [
                ("average", f"exponential moving average of the weights, decay {optim.ema:g}, after every update")
            ]),
            ("precision", f"{runtime.precision} on {resolve_device(runtime.device)}{threads}{ranks}{compiled}"
                          f"{deterministic}"),
            ("model", f"{self.config.model.arch}, {parameters:,} parameters, {self.config.network.num_classes} classes"
                      f"{weights}"),
            *([] if self.frozen is None else [("frozen", self.frozen)]),
            ("data", f"{data.dataset}: {self._training_images()} training, {len(self.val):,} validation, "
                     f"{len(self.data.test):,} test images of {data.image_size}x{data.image_size}"),
            *([] if self.extra is None else [("extra data", self._extra_share(self.extra))]),
            *(("files", note) for note in (*self.data.notes, self.data.transparency) if note),
            *([] if self.data.is_placeholder else [("classes", self._class_counts())]),
            ("augment", AUGMENTATIONS[data.augment or "none"]),
            *([] if optim.validate_every == 1 else [
                ("validation", f"every {optim.validate_every} epochs"
                               f"{'' if optim.epochs == OPEN else ', and after the last one'}")
            ]),
            ("result", f"the weights of the {optim.select} epoch"),
            ("cost", cost),
            *([] if not stored else [
                ("state", f"{_gigabytes(stored)} more on the device and in each checkpoint, for what {attack.method} "
                           f"keeps of each of the {len(self.train):,} training images")
            ]),
            *(("note", note) for note in self.notes),
            *(("warning", warning) for warning in self.warnings()),
        ]  # fmt: skip

    def warnings(self) -> list[str]:
        """Return warnings about options and data that are probably not intended."""
        schedule, method, epochs = self.trainer.schedule, self.config.attack.method, self.config.optim.epochs
        warnings, length = [], counted(epochs, "epoch")
        if isinstance(schedule, EveryDEpochs) and epochs <= schedule.every:
            percent = f"{method}% adds them by training accuracy" if schedule.every < 100 else "choose a smaller D"
            warnings.append(
                f"{method} adds a replay every {counted(schedule.every, 'epoch')}, so this run of {length} never adds "
                f"one; {percent}"
            )
        elif schedule.max_steps is not None and schedule.steps >= schedule.max_steps:
            warnings.append(
                f"the schedule starts at its maximum of {counted(schedule.max_steps, 'step')} and never adds one; "
                "increase --max-steps"
            )
        rise = self.config.attack.eps_warmup
        if rise is not None and rise >= epochs:
            warnings.append(
                f"eps rises over {counted(rise, 'epoch')}, so this run of {epochs} never trains at the full radius"
            )
        warmup = self.config.attack.awp_warmup
        if warmup is not None and epochs <= warmup:
            warnings.append(
                f"AWP begins after {counted(warmup, 'epoch')}, so this run of {length} never uses it; decrease "
                "--awp-warmup"
            )
        counts = [] if self.data.is_placeholder else self._counts()
        rare = rare_classes(dict(zip(self.data.classes, counts, strict=True))) if counts else []
        if rare:
            named = ", ".join(f"'{name}'" for name in rare[:3]) + (f" and {len(rare) - 3} more" * (len(rare) > 3))
            warnings.append(
                f"rare classes, with less than a tenth of the most frequent class's images: {named}; overall accuracy "
                "says little about them"
            )
        return warnings

    def _training_images(self) -> str:
        """Return the number of training images, with that of all of them if some are not used."""
        held_out = len(self.val) if self.data.val is None else 0
        unused = len(self.train) + held_out < len(self.data.train)
        return f"{len(self.train):,}" + (f" of {len(self.data.train):,}" if unused else "")

    def _counts(self) -> list[int]:
        counts: list[int] = torch.bincount(self.train.labels, minlength=len(self.data.classes)).tolist()
        return counts

    def _extra_share(self, extra: ExtraData) -> str:
        size, epoch = self.config.data.batch_size, self.batches * self.config.data.batch_size
        drawn = int(size * (self.config.data.extra_fraction or 0))
        where = "mapped from" if extra.mapped else "in memory from"
        return (f"{len(extra.images):,} images {where} {extra.path.name}, {drawn} in each batch of {size}; an epoch is "
                f"{counted(self.batches, 'batch')}, as without them: {epoch - self.batches * drawn:,} training and "
                f"{self.batches * drawn:,} extra images")  # fmt: skip

    def _class_weights(self) -> str:
        by_class, names = self.trainer.loss.class_weights, self.data.classes
        weights = [] if by_class is None else by_class.weights.tolist()
        low, high = min(weights), max(weights)
        return (f"balanced: {low:.3g} ('{names[weights.index(low)]}') to {high:.3g} ('{names[weights.index(high)]}'), "
                "multiplied with each example's loss")  # fmt: skip

    def _class_counts(self) -> str:
        counts, names = self._counts(), self.data.classes
        fewest, most = min(counts), max(counts)
        if fewest == most:
            return f"{fewest:,} training images each"
        return (f"{fewest:,} ('{names[counts.index(fewest)]}') to {most:,} ('{names[counts.index(most)]}') training "
                "images")  # fmt: skip


def plan(
    options: TrainOptions,
    *,
    continues: RunConfig | None = None,
    started: bool = False,
    dry: bool = False,
    data: Dataset | None = None,
    extra: ExtraData | None = None,
    progress: Progress | None = None,
) -> TrainingPlan:
    """Resolve options, load the data and build the model; write nothing.

    All checks that do not need the data are made before any image is decoded.

    Args:
        options: The options.
        continues: The configuration of the run to continue; the data must be the same.
        started: Whether that run has a checkpoint, so that the weights it was initialized from are not needed.
        dry: Whether the plan is only displayed, not trained. No dataset or pretrained weights are then downloaded, and
            of a folder only the images needed to check the attack are decoded.
        data: The dataset, if it was already loaded with these options.
        extra: The images of ``extra_data``, likewise.
        progress: Called with the number of decoded images and the total, if images are not kept in memory.

    Raises:
        DeatError: An option or the data are invalid, or options conflict.
    """
    resolved = resolve(options)
    for flag, path in (("--init-from", resolved.model.init_from), ("--weights", resolved.model.weights)):
        if path is not None:
            check_utf8(path, flag)
    weights = None if started else _initial_weights(resolved.model, dry)
    ranks = world(cpu=resolve_device(resolved.runtime.device).type == "cpu")
    if data is None:
        data = _load(resolved.data, ranks, dry, progress)
    if continues is not None and data.fingerprint != continues.data_fingerprint:
        raise DeatError(
            f"the data of {continues.data.dataset} differ from those of the run; restore them, or start a new run"
        )
    if (resolved.output.curve_test or 0) > len(data.test):
        raise DeatError(
            f"--curve-test {resolved.output.curve_test} is more than the {len(data.test)} test images; give fewer"
        )
    train, val = _split(data, resolved.data, resolved.optim.seed)
    if resolved.data.extra_data is not None:
        if extra is None:
            extra = load_extra_data(resolved.data.extra_data, shape=train.shape, num_classes=len(data.classes),
                                    memory_limit=resolved.data.memory_limit)  # fmt: skip
        check_share(extra.images, train.shape, resolved.data.extra_fraction or 0.0, resolved.data.batch_size)
    decoded = not dry or data.known_fingerprint is not None  # normalization and fingerprint take all images
    mean, std = _normalization(data, resolved, decoded)
    spec = model_spec(resolved.model.arch, num_classes=len(data.classes), image_size=train.shape[-1],
                      channels=train.shape[0], mean=mean, std=std)  # fmt: skip
    facts = {
        "image_size": train.shape[-1],
        "classes": data.classes,
        "network": spec,
        "data_fingerprint": data.fingerprint if decoded else "",
        "extra_fingerprint": None if extra is None or dry else extra.fingerprint,
        "init_sha256": None if weights is None else weights.sha256(),
        "train_images": len(train),
        "val_images": len(val),
        "versions": versions(),
    }
    config = validate(RunConfig, {**resolved.flat(), **facts})
    if continues is not None:
        _check_files(continues, config, weights)
    check_batches(len(train), config, ranks.size)
    with seeding.preserved():
        seeding.seed_global(config.optim.seed, "weights")
        model = spec.build()
    notes: tuple[str, ...] = ()
    if weights is not None:
        # A run with --pretrained records the library's normalization as its options.
        is_given = options.model.mean is not None and not options.model.pretrained
        notes, spec = weights.load_into(model, spec, is_given=is_given)
        config = config.but(network=spec)
    frozen = None if config.model.freeze is None else freeze_parameters(model, config.model.freeze)
    class_weights = _class_weights(config, train, extra) if config.attack.class_weights == "balanced" else None
    trainer = create(
        config.attack.method, model, eps=config.attack.eps, class_weights=class_weights, **config.method_options()
    )
    trainer.check_attack(train.first(min(8, len(train))).tensors()[0])
    return TrainingPlan(config, data, train, val, trainer, ranks.size, notes, extra, frozen)


def _initial_weights(options: ModelConfig, dry: bool) -> InitialWeights | None:
    if dry and options.pretrained and options.weights is None:
        return None  # a dry run downloads nothing
    source = options.init_from
    if source is not None and is_hub(source):
        source = str(open_hub(source).weights)
    elif source is not None and Path(source, CONFIG).is_file():
        source = str(RunDirectory.open(source).selected_weights_path)
    return initial_weights(
        options.arch, init_from=source, new_head=options.new_head, pretrained=options.pretrained,
        file=options.weights, weights_key=options.weights_key,
    )  # fmt: skip


def _load(options: DataConfig, ranks: World, dry: bool, progress: Progress | None) -> Dataset:
    # One rank per machine downloads, unpacks and reads the images first; the others use its files.
    return ranks.local_main_first(
        lambda: load_data(
            options.dataset,
            data_dir=options.data_dir,
            image_size=options.image_size,
            memory_limit=0 if dry else options.memory_limit,
            test_only=dry and options.dataset == "folder",  # does not decode the training images
            download=not dry,
            progress=progress,
        )
    )


def _split(data: Dataset, options: DataConfig, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """Return the training and the validation images: the dataset's own ones, or some of the training images."""
    if data.val is not None:
        train = data.train
        val = data.val if options.val_size is None else subset(data.val, options.val_size, seed, "--val-size")
    else:
        val_size = options.val_size
        if val_size is None:
            val_size = default_val_size(min(options.train_size or len(data.train), len(data.train)))
        train, val = train_val_split(data.train, val_size, seed=seed)
    return train if options.train_size is None else subset(train, options.train_size, seed), val


def _normalization(data: Dataset, options: TrainOptions, decoded: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel: the given ones, those of the images, or 0 and 1."""
    channels = data.train.shape[0]
    none = (0.0,) * channels, (1.0,) * channels
    mean, std = options.model.mean, options.model.std
    if mean is None and options.attack.setting == "fastat":
        mean, std = none
    return (mean or data.mean, std or data.std) if decoded else (mean or none[0], std or none[1])


def _check_files(continues: RunConfig, config: RunConfig, weights: InitialWeights | None) -> None:
    """Check that a run continues with the extra images and the initial weights that it began with."""
    if config.extra_fingerprint != continues.extra_fingerprint:
        raise DeatError(f"the images of --extra-data {config.data.extra_data} differ from those of the run; restore "
                        "them, or start a new run")  # fmt: skip
    if weights is not None and continues.init_sha256 not in (None, config.init_sha256):
        raise DeatError(f"the initial weights of {weights.source} differ from those of the run; restore them, or start "
                        "a new run")  # fmt: skip


def _class_weights(config: RunConfig, train: LabeledImages, extra: ExtraData | None) -> torch.Tensor:
    """Return weights of the classes by their shares of the images that a batch has."""
    counts = torch.bincount(train.labels, minlength=len(config.classes))
    if extra is not None:
        added = torch.bincount(extra.images.labels, minlength=len(config.classes))
        share = int(config.data.batch_size * (config.data.extra_fraction or 0)) / config.data.batch_size
        counts = (1 - share) * counts / counts.sum() + share * added / added.sum()
    return balanced_weights(counts)


def _gigabytes(size: int) -> str:
    """Return a size in GB, or in MB if it is less than 0.1 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _optimizer(optim: OptimConfig) -> str:
    momentum = f"{optim.momentum:g}"
    if optim.lr_schedule == "onecycle":
        momentum += f" +- {MOMENTUM_RANGE:g}"
    if optim.optimizer == "adamw":
        text = f"AdamW, betas {momentum} and 0.999"
    else:
        text = f"SGD, {'Nesterov ' if optim.nesterov else ''}momentum {momentum}"
    text += f", weight decay {optim.weight_decay:g}"
    if optim.no_decay:
        text += f" except for {' and '.join(optim.no_decay)}"
    return text + (f", gradient norm clipped to {optim.grad_clip:g}" if optim.grad_clip else "")
