"""`deat_rb.models.pretrained`: RobustBench's zoo, torchvision's and timm's weights, functions of a module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deat_rb.models.pretrained import load_pretrained, load_zoo_model
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError


@pytest.fixture
def zoo(tmp_path: Path) -> tuple[Path, nn.Module]:
    """RobustBench's Wong2020Fast with weights of chance, at its place."""
    compat.robustbench()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        entry = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]["Wong2020Fast"]
        model: nn.Module = entry["model"]().eval()
    file = tmp_path / "zoo" / "cifar10" / "Linf" / "Wong2020Fast.pt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, file)
    return tmp_path / "zoo", model


def test_load_zoo_model_from_its_file(zoo: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = zoo
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_zoo_model("Wong2020Fast", dataset="cifar10", model_dir=folder)(images), model(images))
    file = folder / "cifar10" / "Linf" / "Wong2020Fast.pt"
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}}, file)
    with pytest.raises(DeatError, match="does not contain the weights of RobustBench's Wong2020Fast: "):
        load_zoo_model("Wong2020Fast", dataset="cifar10", model_dir=folder)
    file.unlink()
    with pytest.raises(DeatError, match=r"are not at .*Wong2020Fast.pt: download them with robustbench.load_model"):
        load_zoo_model("Wong2020Fast", dataset="cifar10", model_dir=folder)


@pytest.mark.parametrize(
    ("name", "dataset", "sentence"),
    [
        ("Wong2020Fsat", "cifar10", "RobustBench has no Linf model 'Wong2020Fsat' of cifar10: did you mean"),
        ("Wong2020Fast", "digits", "RobustBench has no dataset 'digits'"),
        ("Diffenderfer2021Winning_LRR_CARD_Deck", "cifar10", "has no Linf model"),
        ("Chen2020Adversarial", "cifar10", "consists of several files"),
    ],
)
def test_load_zoo_model_refuses(name: str, dataset: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=sentence):
        load_zoo_model(name, dataset=dataset, model_dir=tmp_path)


def test_load_pretrained_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import get_model

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    net = get_model("squeezenet1_1", weights=None)
    torch.save(net.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    model, size, classes = load_pretrained("torchvision:squeezenet1_1")
    assert (size, len(classes), classes[0]) == ((224, 224), 1000, "tench")
    images = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = net.eval()((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    assert torch.allclose(model(images), expected)
    with pytest.raises(DeatError, match="torchvision has no model 'resnet19'"):
        load_pretrained("torchvision:resnet19")
    with pytest.raises(DeatError, match="timm has no model 'nothing'"):
        load_pretrained("timm:nothing")
