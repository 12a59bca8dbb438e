"""Small runs through `deat_rb.runs.train`."""

from __future__ import annotations

from typing import Any

import torch
from training_problems import ARCH

from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import TrainingPlan, plan

SMALL: dict[str, Any] = {
    "method": "pgd-1", "arch": ARCH, "train_size": 64, "val_size": 16, "batch_size": 32, "epochs": 2, "eps": 0.1,
    "precision": "fp32", "device": "cpu",
}  # fmt: skip


def planned(**changes: Any) -> TrainingPlan:
    return plan(make_options({**SMALL, **changes}))


def state(run: RunDirectory, which: str = "last") -> dict[str, torch.Tensor]:
    from deat_rb.utils.safe_load import load_tensors

    return load_tensors(run.path / f"{which}.safetensors")


def identical(first: RunDirectory, second: RunDirectory) -> bool:
    one, two = state(first), state(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
