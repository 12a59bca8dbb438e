"""`deat_rb.robustbench.register`: RobustBench loads exports; damaged ones register nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import IMAGES, Run, info_of, known_models, opened

from deat_rb.loading import load_model
from deat_rb.models.spec import build_model
from deat_rb.robustbench.export import export
from deat_rb.robustbench.format import ExportPaths
from deat_rb.robustbench.register import register
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return opened(Run(tmp_path / "run"), monkeypatch)


LARGE = ("preactresnet18", "preactresnet18-bn", "resnet18")


@pytest.mark.parametrize(
    ("arch", "dataset"),
    [("wrn-10-1", "cifar10"), ("wrn-10-1", "cifar100"),
     *(pytest.param(name, "cifar10", marks=pytest.mark.slow) for name in LARGE)],
)  # fmt: skip
def test_register_makes_robustbench_load_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, dataset: str
) -> None:
    run = opened(Run(tmp_path / "run", arch, dataset, {"cifar10": 10, "cifar100": 100}[dataset]), monkeypatch)
    name = f"Wang2021Gradient_{arch}"
    paths = export(run.path, model_name=name, output=tmp_path / "out")
    assert register(tmp_path / "out") == (name,)
    assert register(str(tmp_path / "out")) == (name,), "once more is no error"
    robustbench: Any = compat.robustbench()
    loaded = robustbench.load_model(name, model_dir=tmp_path / "out" / "models", dataset=dataset, threat_model="Linf")
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), run.model(IMAGES))
    ours = load_model(paths.weights)
    assert torch.equal(ours(IMAGES), run.model(IMAGES))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def damage(paths: ExportPaths, how: str, touched: Path) -> None:
    """Spoils an export in one way."""
    info = info_of(paths)
    if how == "code in the weights":
        torch.save({"mu": Touch(touched)}, paths.weights)
    elif how == "truncated weights":
        paths.weights.write_bytes(paths.weights.read_bytes()[:5000])
    elif how == "missing weights":
        paths.weights.unlink()
    elif how == "no JSON":
        paths.info.write_text("{")
    elif how == "another network":
        torch.save({**build_model("preactresnet18", dataset="cifar10").net.state_dict(), "mu": torch.zeros(3),
                    "sigma": torch.ones(3)}, paths.weights)  # fmt: skip
    else:
        paths.info.write_text(json.dumps({**info, "architecture": how}))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("code in the weights", "can run code"),
        ("truncated weights", "truncated"),
        ("missing weights", "does not exist"),
        ("no JSON", "not valid JSON"),
        ("another network", "different architecture"),
        ("WideResNet-16-1", "different architecture"),
        ("WideResNet-994-999", "is too large"),
        ("WideResNet-11-1", "depth D"),
        ("os:system", "not ResNet-18, PreActResNet-18"),
        ("PreActResNet-18", "different architecture"),
    ],
)
def test_register_of_a_damaged_export_registers_nothing(run: Run, tmp_path: Path, how: str, sentence: str) -> None:
    export(run.path, model_name="Aaa2021Good", output=tmp_path / "out")
    paths = export(run.path, model_name="Wang2021Bad", output=tmp_path / "out")
    damage(paths, how, tmp_path / "executed")
    before = known_models()
    with pytest.raises(DeatError, match=sentence):
        register(tmp_path / "out")
    with pytest.raises(DeatError, match=sentence):
        load_model(paths.weights)
    assert known_models() == before
    assert not (tmp_path / "executed").exists()


def test_register_runs_no_code_of_the_folder(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient_noexec", output=tmp_path / "out")
    paths.source.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert register(tmp_path / "out") == ("Wang2021Gradient_noexec",)
    assert not (tmp_path / "executed").exists()


def test_register_refuses(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="there are no exports in"):
        register(tmp_path / "nothing")
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    paths.info.rename(paths.info.with_name("Wong2020Fast.json"))
    paths.weights.rename(paths.weights.with_name("Wong2020Fast.pt"))
    with pytest.raises(DeatError, match="RobustBench already has a model 'Wong2020Fast'"):
        register(tmp_path / "out")
    paths.info.with_name("Wong2020Fast.json").rename(paths.info.with_name("my model.json"))
    with pytest.raises(DeatError, match=r"my model\.json is not named <FirstAuthor><Year><FirstWordOfTitle>\.json, as"):
        register(tmp_path / "out")
