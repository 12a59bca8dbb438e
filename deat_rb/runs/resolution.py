"""Resolution of options: fills in the defaults of dataset, setting and method, and rejects conflicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deat_rb.attacks.threat_models import DEFAULT_EPS
from deat_rb.data.augmentations import MIXING
from deat_rb.data.image_files import ImageLister
from deat_rb.methods.build import build_schedule, check_mixed_labels, configure, own_norm
from deat_rb.methods.recipes import Recipe
from deat_rb.methods.recipes import resolve as load
from deat_rb.methods.registry import recipe
from deat_rb.models.initialization import check_initialization
from deat_rb.models.names import canonical_arch
from deat_rb.models.pretrained import library_input
from deat_rb.models.spec import DATASETS as SPEC_DATASETS
from deat_rb.models.spec import check_image_size, model_spec, robustbench_class
from deat_rb.runs.defaults import ANYTIME, dataset_defaults, default_arch, setting_defaults
from deat_rb.runs.hub_run import pinned
from deat_rb.runs.options import TrainOptions
from deat_rb.runs.trackers import check_trackers
from deat_rb.training.checks import check_requirements
from deat_rb.training.options import check_optim, optimizer_defaults
from deat_rb.utils import seeding
from deat_rb.utils.devices import (
    check_cuda_graphs,
    check_outside_autocast,
    check_sync_bn,
    resolve_device,
    resolve_precision,
)
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN, validate
from deat_rb.utils.threads import thread_count
from deat_rb.utils.units import check_eps

EXTRA_FRACTION = 0.7
"""Share of extra images in a batch, as in DM-Improves-AT for CIFAR-10."""


def resolve(options: TrainOptions) -> TrainOptions:
    """Fill in the defaults of the dataset, the setting and the method, and check the options without loading data.

    Raises:
        DeatError: An option is invalid, or options conflict.
    """
    explicit, dataset, device_name = options.explicit(), options.data.dataset, options.runtime.device
    defaults = dataset_defaults(dataset)
    method, row = recipe(_for_dataset(options.attack.method, dataset))
    arch, setting = method_defaults(options)
    check_trackers(options.output.track)
    norm = explicit.get("norm", own_norm(row))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and ":" in device_name:
        raise DeatError(
            f"--device {device_name} is a single device for {ranks} ranks; omit it to use one device per rank"
        )
    device = resolve_device(device_name)
    check_outside_autocast(device)
    check_sync_bn(options.runtime.sync_bn, device)
    check_cuda_graphs(options.runtime.cuda_graphs, device, ranks)
    network = options.model
    check_initialization(
        arch, init_from=network.init_from, new_head=network.new_head, pretrained=network.pretrained,
        weights=network.weights, weights_key=network.weights_key, freeze=network.freeze,
    )  # fmt: skip
    values = {
        **options.flat(),
        **(_library_input(arch, dataset) if network.pretrained else {}),
        "batch_size": defaults.batch_size,
        "augment": defaults.augment,
        **setting,
        **explicit,
        "method": method,
        "data_dir": _absolute(options.data.data_dir),
        "init_from": pinned(options.model.init_from) or _absolute(options.model.init_from),
        "weights": _absolute(options.model.weights),
        "extra_data": _absolute(options.data.extra_data),
        "extra_fraction": explicit.get("extra_fraction", EXTRA_FRACTION if options.data.extra_data else None),
        "norm": norm,
        "eps": check_eps(
            explicit.get("eps", defaults.eps if norm == "Linf" else DEFAULT_EPS[norm]), "--eps", norm=norm
        ),
        "arch": arch,
        "precision": resolve_precision(explicit.get("precision", setting["precision"]), device),
        "threads": thread_count(options.runtime.threads) if ranks == 1 and device.type == "cpu" else None,
    }
    resolved = validate(TrainOptions, values)
    check_optim(resolved.optim)
    configured = configure(method, row, eps=resolved.attack.eps, **resolved.method_options())
    if (schedule := build_schedule(configured.recipe)) is not None:
        schedule.begin(resolved.optim.epochs)
    _check_trainer(method, row, resolved)
    if resolved.data.augment in MIXING:
        check_mixed_labels(configured, resolved.data.augment, class_weights=resolved.attack.class_weights)
    if ("mean" in explicit) != ("std" in explicit):
        raise DeatError("--mean and --std must be given together; omit both for those of the dataset or, with "
                        "--pretrained, of the library")  # fmt: skip
    if resolved.data.extra_data is None and resolved.data.extra_fraction is not None:
        raise DeatError(f"--extra-fraction {resolved.data.extra_fraction:g} requires --extra-data: give both")
    _check_arch(resolved)
    return resolved


def method_defaults(options: TrainOptions) -> tuple[str, dict[str, Any]]:
    """Return the architecture, and what follows from it, the setting, method, steps, epochs and optimizer."""
    explicit, dataset = options.explicit(), options.data.dataset
    _, row = recipe(_for_dataset(options.attack.method, dataset))
    arch = canonical_arch(explicit.get("arch", default_arch(dataset, options.attack.setting)))
    defaults = setting_defaults(options.attack.setting, row.with_steps(options.attack.steps), arch)
    defaults["epochs"] *= dataset_defaults(dataset).epoch_factor
    anytime = ANYTIME if explicit.get("epochs") == OPEN else {}
    return arch, defaults | anytime | optimizer_defaults(explicit.get("optimizer"))


def _check_trainer(method: str, row: Recipe, options: TrainOptions) -> None:
    """Check that the method's trainer works with the other options."""
    trainer = load(row.trainer)
    check_requirements(trainer, method, compiled=options.runtime.compile, open_ended=options.optim.epochs == OPEN)
    if trainer.needs_positions and options.data.extra_data is not None:
        raise DeatError(f"{method} keeps a perturbation for each training image, but extra images are drawn at random "
                        "from too many: omit --extra-data")  # fmt: skip
    if trainer.needs_positions and options.data.augment in MIXING:
        raise DeatError(f"{method} keeps a perturbation for each training image, but --augment {options.data.augment} "
                        "mixes two images: use another --augment")  # fmt: skip


def _library_input(arch: str, dataset: str) -> dict[str, Any]:
    """Return the normalization and, for a folder, the image size of a library's pretrained weights."""
    (mean, std), size = library_input(arch)
    return {"mean": mean, "std": std, **({"image_size": size} if dataset == "folder" else {})}


def _check_arch(options: TrainOptions) -> None:
    """Check that the architecture exists and accepts the dataset's images.

    The number of classes is taken from the dataset's name or folder, so that no images are needed.
    """
    dataset, size = options.data.dataset, options.data.image_size or 32
    if dataset in SPEC_DATASETS:
        classes, size = SPEC_DATASETS[dataset][0], 32
    else:
        train = Path(options.data.data_dir or "", "train")
        classes = len(ImageLister().class_names(train)) if os.path.isdir(train) else 2
    network = options.model
    if network.init_from is not None and dataset == "folder":
        check_image_size(network.arch, options.data.image_size, source=network.init_from, required=True)
    spec = model_spec(network.arch, num_classes=max(classes, 2), image_size=size, mean=network.mean, std=network.std)
    if ":" not in spec.arch:
        robustbench_class(spec)
        return
    if dataset != "digits":  # loading them is fast, so this is checked later
        with seeding.preserved():
            spec.build()


def _for_dataset(method: str, dataset: str) -> str:
    """Replace P in ``deat-P%`` by 20 for CIFAR-100 and 40 otherwise (section 5.1)."""
    percent = 20 if dataset == "cifar100" else 40
    return f"deat-{percent}%" if method.strip().lower() in ("deat-p%", "deat-%") else method


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def default_name(options: TrainOptions) -> str:
    """Return a run's default name."""
    dataset = options.data.dataset
    method, _ = recipe(_for_dataset(options.attack.method, dataset))
    arch = canonical_arch(options.explicit().get("arch", default_arch(dataset, options.attack.setting)))
    return f"{method}-{dataset}-{arch.replace(':', '-')}-s{options.optim.seed}".replace("/", "-")
