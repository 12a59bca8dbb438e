"""`deat_rb.models.pretrained`: RobustBench's zoo, torchvision's and timm's weights, functions of a module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deat_rb.loading import NetworkOptions, open_network
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


def imagenet_files(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Write the file of an ImageNet model with weights of chance; return its tensors and its path."""
    compat.robustbench()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = model_dicts[BenchmarkDataset.imagenet][ThreatModel.Linf][name]["model"]()
    tensors: dict[str, torch.Tensor] = model.get_submodule("model").state_dict()
    file = folder / "imagenet" / "Linf" / f"{name}.pt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": tensors}, file)
    return tensors, file


def test_load_zoo_model_of_imagenet_as_robustbench_does(tmp_path: Path) -> None:
    """Its file has the names of the bare network, without normalization."""
    name = "Salman2020Do_R18"
    imagenet_files(name, tmp_path)
    model = load_zoo_model(name, dataset="imagenet", model_dir=tmp_path)
    expected: nn.Module = compat.robustbench().load_model(name, tmp_path, "imagenet", "Linf")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(images), expected(images))
    options = NetworkOptions(model_dir=tmp_path, image_size=64)
    network = open_network(f"robustbench:{name}", options, dataset="imagenet")
    assert (network.eps, network.norm, network.image_size) == (4 / 255, "Linf", 64)


@pytest.mark.parametrize("lacks", ["fc.weight", "layer1.0.bn1.running_var"])
def test_load_zoo_model_refuses_a_file_without_all_weights(tmp_path: Path, lacks: str) -> None:
    """RobustBench tolerates an ImageNet model without them: it would be partly random."""
    tensors, file = imagenet_files("Salman2020Do_R18", tmp_path)
    torch.save({key: each for key, each in tensors.items() if key != lacks}, file)
    with pytest.raises(DeatError, match=rf"weights of RobustBench's Salman2020Do_R18: 1 of 124 .* model.{lacks}"):
        load_zoo_model("Salman2020Do_R18", dataset="imagenet", model_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "dataset", "sentence"),
    [
        ("Standard_R50", "imagenet", "has no file of Standard_R50, whose weights come from another package"),
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
