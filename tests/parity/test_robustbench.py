"""Beside RobustBench: the same networks give the same logits, and the same attack the same verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_autoattack import shorten
from torch import nn

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.models.spec import build_model
from deat_rb.models.weights import load_weights
from deat_rb.robustbench import benchmark as robustbench_benchmark
from deat_rb.robustbench.export import UNKNOWN_ACCURACY
from deat_rb.utils import compat

IMAGES = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seeded(build: Any, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build(**options)
        model(IMAGES)  # moves BatchNorm's statistics
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("Wong2020Fast", "preactresnet18"),
        ("Hendrycks2020AugMix_WRN", "wrn-40-2"),
        ("Kireev2021Effectiveness_RLAT", "preactresnet18-bn"),
        ("Sehwag2021Proxy_R18", "resnet18"),
        pytest.param("Carmon2019Unlabeled", "wrn-28-10", marks=pytest.mark.slow),  # built with sub_block1
    ],
)
def test_load_weights_of_the_zoos_networks(name: str, arch: str) -> None:
    """Their class with ``mu`` and ``sigma`` or without, ours around their bare class: equal bit for bit."""
    compat.robustbench()
    from robustbench.model_zoo.enums import BenchmarkDataset
    from robustbench.model_zoo.models import model_dicts

    threats = model_dicts[BenchmarkDataset.cifar_10].values()
    theirs = seeded(next(models[name]["model"] for models in threats if name in models))
    ours = build_model(arch, num_classes=10).eval()
    load_weights(ours, theirs.state_dict(), source=name)
    assert torch.equal(ours(IMAGES[:4]), theirs(IMAGES[:4]))


def test_our_cifar10_normalization_is_robustbenchs() -> None:
    compat.robustbench()
    from robustbench.model_zoo.cifar10 import Wong2020FastNet

    theirs, ours = Wong2020FastNet(), build_model("preactresnet18", dataset="cifar10")
    assert torch.equal(ours.mu, theirs.mu)
    assert torch.equal(ours.sigma, theirs.sigma)


def shallow(num_classes: int = 10) -> nn.Module:
    """Cheap, and neither hopeless nor safe at the eps below."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 24), nn.Tanh(), nn.Linear(24, num_classes))


@pytest.mark.slow
def test_verdicts_are_robustbenchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard version with fewer iterations: the same images fall, whoever drives the attack."""
    shorten(monkeypatch, iterations=10, queries=100)
    model = seeded(shallow)
    labels = model(IMAGES).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 10
    clean, robust, correct = robustbench_benchmark.benchmark(model, IMAGES, labels, eps=0.02, batch_size=10, seed=5)
    report = evaluate(model, IMAGES, labels, attacks=("autoattack",), eps=0.02, batch_size=10, seed=5)
    assert report.results["natural"].accuracy == pytest.approx(clean)
    assert 0 < report.results["autoattack"].accuracy < clean, "a comparison where all or none fall shows nothing"
    assert report.results["autoattack"].accuracy == pytest.approx(robust)
    assert torch.equal(report.verdicts["autoattack"], correct)


def test_robustbench_lists_an_export_without_autoattack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RobustBench reads accuracies with ``float``, so that what is unknown has to be written as a number."""
    robustbench: Any = compat.robustbench()
    info = {"link": "", "name": "A title", "authors": "A. Author", "venue": "", "architecture": "WideResNet-10-1",
            "clean_acc": "75.00", "autoattack_acc": UNKNOWN_ACCURACY}  # fmt: skip
    file = tmp_path / "model_info" / "cifar10" / "Linf" / "Wong2020Fast.json"
    file.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    file.write_text(json.dumps(info))
    robustbench.utils.list_available_models()
    assert "**Wong2020Fast**" in capsys.readouterr().out
    file.write_text(json.dumps({**info, "autoattack_acc": "None"}))
    with pytest.raises(ValueError, match="could not convert"):
        robustbench.utils.list_available_models()
