"""Default options of the settings and of each dataset."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deat_rb.methods.recipes import CONSTANT, path_of
from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from deat_rb.methods.recipes import Recipe


@dataclass(frozen=True)
class DatasetDefaults:
    """Default options of a dataset.

    Attributes:
        arch: Architecture.
        eps: Perturbation radius.
        epoch_factor: Multiplier of the setting's epochs, since small datasets have fewer updates per epoch.
        batch_size: Images per mini-batch.
        augment: Augmentation of the training images.
    """

    arch: str = "preactresnet18"
    eps: float = 8 / 255
    epoch_factor: int = 1
    batch_size: int = 128
    augment: str = "crop-flip"


DATASET_DEFAULTS = {
    "digits": DatasetDefaults(arch="wrn-10-1", eps=0.1, epoch_factor=2, batch_size=64, augment="none"),
    "cifar10": DatasetDefaults(),
    "cifar100": DatasetDefaults(),
    "folder": DatasetDefaults(),
}


@dataclass(frozen=True)
class SettingDefaults:
    """Default options of a setting; ``epochs`` is None if it depends on the method."""

    epochs: int | None
    lr: float
    lr_schedule: str
    precision: str
    select: str


SETTINGS = {
    "fast": SettingDefaults(epochs=None, lr=0.1, lr_schedule="cyclic", precision="auto", select="last"),
    "standard": SettingDefaults(epochs=50, lr=0.05, lr_schedule="multistep", precision="fp32", select="best"),
    "fastat": SettingDefaults(epochs=100, lr=0.1, lr_schedule="onecycle", precision="fp32", select="best"),
}
"""Section 5.1 (half precision, cyclic LR 0 -> 0.1 -> 0) and section 5.2 (LR divided by 10 after epochs 25 and 40) of
the paper, and the protocol of FastAT Benchmark (arXiv:2604.22853; fzjcdt/FastAT_Benchmark b99c0de, configs/cifar10)."""

FASTAT_EMA, FASTAT_LABEL_SMOOTHING, FASTAT_REPLAYS = 0.9995, 0.4, 200
"""FastAT's EMA decay ``tau``, ``label_smoothing`` and, for FREE, ``total_epoch``: number of epochs times replays."""

ANYTIME: dict[str, Any] = {"lr_schedule": "flat", "lr": 0.05, "ema": 0.999, "select": "best"}
"""Default options of an open-ended run, whose averaged weights are a result after every epoch."""

DEFAULT_TEXTS = {
    "arch": "wrn-10-1 for digits, else preactresnet18; resnet18 fastat on CIFAR",
    "eps": "0.1 for digits, else 8/255; 0.5 in L2",
    "batch_size": "64 for digits, else 128",
    "augment": "none for digits, else crop-flip",
    "epochs": "setting's: 10 to 15 fast, by method; 50 standard; 100 fastat (free-R 200/R, deat 50); digits twice that",
    "ema": "off; 0.9995 fastat",
    "label_smoothing": "0 (fgsm-pgi 0.4, liet 0.6); 0.4 fastat (liet 0.6)",
    "gamma": "setting's: 1.0 fast with preactresnet18, else 1.01; 1.5 m+u-fgsm and m+n-fgsm",
    "val_size": "2 % of the images, at most 1,000 and at least 100 (20 % of fewer than 500)",
    **{
        name: "setting's: " + ", ".join(f"{getattr(row, name)} {setting}" for setting, row in SETTINGS.items())
        for name in ("lr", "lr_schedule", "precision", "select")
    },
    "weight_decay": "0.0005; 0.01 with adamw",
}
DEFAULT_TEXTS["lr"] += "; yopo-m-n 0.2/m fast and fastat; 0.001 with adamw"
"""Descriptions of the defaults that depend on the dataset, the setting or the method."""


def dataset_defaults(dataset: str) -> DatasetDefaults:
    """Return the default options of a dataset.

    Raises:
        DeatError: The dataset is unknown.
    """
    if dataset not in DATASET_DEFAULTS:
        raise DeatError(f"unknown dataset '{dataset}': {did_you_mean(dataset, DATASET_DEFAULTS)}")
    return DATASET_DEFAULTS[dataset]


def default_arch(dataset: str, setting: str) -> str:
    """Return the default architecture: FastAT's is ResNet-18 for CIFAR and PreActResNet-18 for Tiny-ImageNet."""
    if setting == "fastat" and dataset in ("cifar10", "cifar100"):
        return "resnet18"
    return dataset_defaults(dataset).arch


def fastat_epochs(row: Recipe) -> int:
    """Return the epochs of the setting ``fastat``: 200/R for FREE-R, 50 for other replays, as for FREE-4, else 100."""
    if not row.replays:
        return 100
    return max(FASTAT_REPLAYS // max(row.steps, 1), 1) if path_of(row.schedule) == CONSTANT else FASTAT_REPLAYS // 4


def setting_defaults(setting: str, row: Recipe, arch: str) -> dict[str, Any]:
    """Return the default options of a setting.

    Args:
        setting: ``fast``: cyclic LR 0 -> 0.1 -> 0, 10 epochs (DEAT-D 12, DEAT-P% and M-DEAT 11, U-FGSM 15), half
            precision, gamma 1.0 for PreActResNet and 1.01 for WRN, FREE's perturbation carried from batch to batch,
            weights of the last epoch. ``standard``: 50 epochs, LR 0.05 divided by 10 after epochs 25 and 40, full
            precision, gamma 1.01, FREE's perturbation reset to zero in each batch, weights of the epoch with the
            highest validation robust accuracy. ``fastat``: FastAT Benchmark's protocol, 100 epochs (replays: see
            `fastat_epochs`), one-cycle LR up to 0.1, full precision, averaged weights, label smoothing (not for MART),
            images that are not normalized, gamma 1.01, the most robust epoch.
        row: The method's recipe.
        arch: The architecture.
    """
    defaults = asdict(SETTINGS[setting])
    defaults["epochs"] = defaults["epochs"] or row.fast_epochs
    if setting == "fastat":
        defaults |= {"epochs": fastat_epochs(row), "ema": FASTAT_EMA}
        if row.loss in ("ce", "trades"):
            defaults["label_smoothing"] = FASTAT_LABEL_SMOOTHING
    if setting != "standard":
        defaults["lr"] = row.peak_lr
    if "carry" in row.trainer_options:
        defaults["carry"] = setting == "fast"
    if row.guided:
        defaults["gamma"] = 1.0 if setting == "fast" and arch.lower().startswith("preactresnet") else 1.01
    return defaults


def default_val_size(images: int) -> int:
    """Return the default number of validation images: 2 %, at most 1,000 and at least 100 (or 20 % if that is less)."""
    return max(min(100, images // 5), min(1000, images // 50))
