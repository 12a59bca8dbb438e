"""Registration of exports with RobustBench for `robustbench.load_model`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.attacks.threat_models import THREATS
from deat_rb.models.spec import ModelSpec, robustbench_class
from deat_rb.robustbench.format import NAME, ExportPaths, exported_spec
from deat_rb.utils import compat
from deat_rb.utils.compat import robustbench
from deat_rb.utils.errors import DeatError

NOT_ONLINE = "registered by deat_rb: load_model finds it in model_dir, not online"
"""Placeholder for the Google Drive ID in RobustBench's entries."""


def add_to_zoo(entries: Sequence[tuple[str, str, str, Callable[[], nn.Module]]]) -> None:
    """Add models to RobustBench's model zoo, all or none; `robustbench.load_model` reads their files from model_dir.

    Args:
        entries: Name, dataset (cifar10, cifar100 or imagenet), threat model (Linf or L2) and network factory of each
            model; the weights are loaded into the factory's network.

    Raises:
        DeatError: RobustBench already has a model of that name.
    """
    robustbench()
    enums: Any = importlib.import_module("robustbench.model_zoo.enums")
    zoo: Any = importlib.import_module("robustbench.model_zoo.models")
    models = [
        zoo.model_dicts[enums.BenchmarkDataset(dataset)].setdefault(enums.ThreatModel(norm), {})
        for _, dataset, norm, _ in entries
    ]
    for (name, *_), present in zip(entries, models, strict=True):
        if name in present and present[name]["gdrive_id"] != NOT_ONLINE:
            raise DeatError(f"RobustBench already has a model '{name}': export yours under another name")
    for (name, _, _, factory), present in zip(entries, models, strict=True):
        present[name] = {"model": factory, "gdrive_id": NOT_ONLINE}


def register(folder: str | Path) -> tuple[str, ...]:
    """Register all exports below ``folder`` with `robustbench.load_model`; no code in the folder is executed.

    Examples:
        >>> register("exported")
        ('Wang2021Gradient_R18',)
        >>> robustbench.load_model("Wang2021Gradient_R18", model_dir="exported/models", threat_model="Linf")

    Returns:
        Names of the models.

    Raises:
        DeatError: There are no exports, one is damaged, or RobustBench already has a model of that name; no model is
            registered in these cases.
    """
    found = sorted(file for norm in THREATS for file in Path(folder).glob(f"model_info/*/{norm}/*.json"))
    if not found:
        raise DeatError(f"there are no exports in {folder}: it must contain model_info/<dataset>/<norm>/<name>.json")
    entries = []
    for info in found:
        dataset, norm, name = info.parts[-3], info.parts[-2], info.stem
        compat.check_dataset(dataset)
        if NAME.fullmatch(name) is None:
            raise DeatError(f"{info} is not named <FirstAuthor><Year><FirstWordOfTitle>.json, as RobustBench requires, "
                            "such as Wang2021Gradient.json: rename it and its weights")  # fmt: skip
        spec = exported_spec(ExportPaths.below(Path(folder), dataset, name, norm).weights)
        entries.append((name, dataset, norm, _factory(spec)))
    add_to_zoo(entries)
    return tuple(name for name, *_ in entries)


def _factory(spec: ModelSpec) -> Callable[[], nn.Module]:
    """Return the class defined in the pull request: RobustBench's architecture with normalization as a layer."""
    network, arguments, options = robustbench_class(spec)
    base: Any = network

    class Exported(base):
        def __init__(self) -> None:
            super().__init__(*arguments, **options)
            for name, values in (("mu", spec.mean), ("sigma", spec.std)):
                self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

        def forward(self, images: Tensor) -> Any:
            return super().forward((images - self.mu) / self.sigma)

    return Exported
