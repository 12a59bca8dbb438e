"""The paper's settings and the data sets' defaults."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from deat_rb.methods.recipes import Recipe
from deat_rb.runs.config import Setting
from deat_rb.utils.errors import DeatError, did_you_mean


class DatasetDefaults(BaseModel):
    """What a data set suggests where nothing is said.

    Attributes:
        arch: The architecture.
        eps: The radius.
        epoch_factor: How many times the setting's epochs: a small data set needs more of them for as many updates.
        batch_size: Images per mini-batch.
    """

    arch: str = "preactresnet18"
    eps: float = 8 / 255
    epoch_factor: int = 1
    batch_size: int = 128


DATASET_DEFAULTS = {
    "digits": DatasetDefaults(arch="wrn-10-1", eps=0.1, epoch_factor=2, batch_size=64),
    "cifar10": DatasetDefaults(),
    "cifar100": DatasetDefaults(),
    "folder": DatasetDefaults(),
}


def dataset_defaults(dataset: str) -> DatasetDefaults:
    """What a data set suggests.

    Raises:
        DeatError: If there is no such data set.
    """
    if dataset not in DATASET_DEFAULTS:
        raise DeatError(f"there is no data set '{dataset}': {did_you_mean(dataset, DATASET_DEFAULTS)}")
    return DATASET_DEFAULTS[dataset]


def setting_defaults(setting: Setting, row: Recipe, arch: str) -> dict[str, Any]:
    """The paper's two training settings (sections 5.1 and 5.2).

    Args:
        setting: ``fast``: cyclic LR 0 -> 0.1 -> 0, 10 epochs (DEAT-D 12, DEAT-P% and M-DEAT 11, U-FGSM 15), half
            precision, gamma 1.0 for PreActResNet and 1.01 for WRN, the last epoch is the result. ``standard``: 50
            epochs, LR 0.05 divided by 10 after 25 and 40, full precision, gamma 1.01, the epoch most robust on
            validation is the result.
        row: The method's row.
        arch: The architecture.
    """
    if setting == "fast":
        defaults: dict[str, Any] = {
            "epochs": row.fast_epochs, "lr": 0.1, "lr_schedule": "cyclic", "precision": "auto", "select": "last",
        }  # fmt: skip
    else:
        defaults = {"epochs": 50, "lr": 0.05, "lr_schedule": "multistep", "precision": "fp32", "select": "best"}
    if row.guided:
        defaults["gamma"] = 1.0 if setting == "fast" and arch.lower().startswith("preactresnet") else 1.01
    return defaults
