"""`deat_rb.robustbench.format`: what exports contain, and reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import IMAGES, Run, opened

from deat_rb.robustbench.export import export
from deat_rb.robustbench.format import exported_spec, known_architecture
from deat_rb.utils import compat


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return opened(Run(tmp_path / "run"), monkeypatch)


def test_model_source_is_a_class_that_robustbench_can_use(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put into the zoo as the text says, the class loads the file through `robustbench.load_model`."""
    paths = export(run.path, model_name="Wang2021Gradient_R18-fast", output=tmp_path)
    robustbench: Any = compat.robustbench()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    written: dict[str, Any] = {}
    exec(compile(paths.source.read_text(), str(paths.source), "exec"), written)
    entries = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    monkeypatch.setitem(entries, "Wang2021Gradient_R18-fast", written["linf"]["Wang2021Gradient_R18-fast"])
    loaded = robustbench.load_model("Wang2021Gradient_R18-fast", model_dir=tmp_path / "models", threat_model="Linf")
    assert type(loaded).__name__ == "Wang2021Gradient_R18_fastNet"
    assert torch.equal(loaded(IMAGES), run.model(IMAGES))


def test_exported_spec_reads_sizes_from_the_tensors(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    spec = exported_spec(paths.weights)
    assert (spec.arch, spec.num_classes) == ("wrn-10-1", 10)
    assert spec.mean == pytest.approx(run.model_spec.mean)
    monkeypatch.chdir(paths.weights.parent)
    assert exported_spec(paths.weights.name) == spec


def test_exported_spec_takes_one_number_for_all_channels(run: Run, tmp_path: Path) -> None:
    tensors = dict(run.model.net.state_dict())
    tensors |= {"mu": torch.full((1, 1, 1, 1), 0.5), "sigma": torch.full((1, 1, 1, 1), 0.25)}
    torch.save(tensors, tmp_path / "weights.pt")
    spec = exported_spec(tmp_path / "weights.pt", arch="wrn-10-1")
    assert (spec.mean, spec.std, spec.channels) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 3)


@pytest.mark.parametrize(
    ("architecture", "known"),
    [("WideResNet-34-10", "wrn-34-10"), ("WRN-28-4", "wrn-28-4"), ("PreActResNet-18", "preactresnet18"),
     ("ResNet-18", "preactresnet18"), ("XCiT-S12", None)],
)  # fmt: skip
def test_known_architecture(architecture: str, known: str | None) -> None:
    assert known_architecture(architecture) == known
