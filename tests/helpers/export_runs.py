"""A run as `deat_rb.robustbench.export` needs it, evaluated or not, and what RobustBench knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deat_rb.evaluation.report import AttackResult, Check, Report
from deat_rb.models.spec import model_spec
from deat_rb.robustbench.format import ExportPaths
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils import compat, files, safe_load

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

DATA = "d" * 64
"""Fingerprint of the run's data."""


class Run:
    """As much of a run directory as an export takes, with weights that are no longer the initial ones."""

    unfinished: str | None = None

    def __init__(self, path: Path, arch: str = "wrn-10-1", dataset: str = "cifar10", num_classes: int = 10) -> None:
        path.mkdir()
        self.path = path
        self.config = SimpleNamespace(
            attack=SimpleNamespace(method="m+trades", eps=8 / 255, norm="Linf"),
            data=SimpleNamespace(dataset=dataset, data_dir="/data/my-images"),
            additional_data=False,
            data_fingerprint=DATA,
        )
        self.model_spec = model_spec(
            arch, num_classes=num_classes, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)
        )
        self.selected_weights_path = path / "best.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = self.model_spec.build()
            self.model(torch.rand(8, 3, 32, 32))  # moves BatchNorm's statistics
        self.model.eval()
        safe_load.save_tensors(self.selected_weights_path, self.model.state_dict())

    def check_evaluation(self, provenance: Mapping[str, str], advice: str) -> None:
        """Check it as a run directory does."""
        RunDirectory.check_evaluation(cast(RunDirectory, self), provenance, advice)

    def evaluated(self, *, provenance: dict[str, str] | None = None, **options: Any) -> None:
        """Write an evaluation, see `write_evaluation`."""
        weights = files.sha256_file(self.selected_weights_path)
        own = {"weights_sha256": weights, "data_sha256": DATA} if provenance is None else provenance
        write_evaluation(self.path, own, **options)


def write_evaluation(run: Path, provenance: dict[str, str], *, n: int = 200, eps: float = 8 / 255,
                     checks: Sequence[Check] = (), norm: str = "Linf", precision: str = "fp32",
                     **accuracies: int) -> None:  # fmt: skip
    """Write an evaluation with 150 correct examples without attack, and this many per attack."""
    names = {name.replace("_", "-"): correct for name, correct in {"natural": 150, **accuracies}.items()}
    verdicts = {name: torch.arange(n) < correct for name, correct in names.items()}
    results = [
        AttackResult.of(name, correct, seconds=1.0, forwards=n, backwards=n) for name, correct in verdicts.items()
    ]
    Report.of(results, verdicts, eps=eps, num_classes=10, seed=0, batch_size=n, device="cpu", versions={},
              provenance=provenance, checks=tuple(checks), norm=norm, precision=precision).save(run)  # fmt: skip


def evaluate_run(path: Path) -> None:
    """Write an evaluation under AutoAttack of a real run's weights and data, without attacking anything."""
    run = RunDirectory.open(path)
    provenance = {"weights_sha256": files.sha256_file(run.selected_weights_path),
                  "data_sha256": run.config.data_fingerprint}  # fmt: skip
    write_evaluation(path, provenance, eps=run.config.attack.eps, autoattack=97)


def opened(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Evaluate the run under AutoAttack, and have `RunDirectory.open` return it."""
    monkeypatch.setattr(RunDirectory, "open", lambda path: run)
    run.evaluated(fgsm=110, pgd_100=101, autoattack=97)
    return run


def info_of(paths: ExportPaths) -> dict[str, Any]:
    """Return an export's metadata."""
    content: dict[str, Any] = json.loads(paths.info.read_text())
    return content


def files_below(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def known_models() -> set[str]:
    """Return the names in RobustBench's model zoo."""
    compat.robustbench()
    from robustbench.model_zoo.models import model_dicts

    return {name for threats in model_dicts.values() for models in threats.values() for name in models}
