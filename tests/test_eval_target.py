"""`deat_rb.eval_target`: targets of an evaluation, their examples and their data."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from training_problems import run_config

from deat_rb.data.datasets import load_data
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.normalization import NORMALIZATION
from deat_rb.eval_target import EvalTarget, combine, open_target
from deat_rb.loading import Network
from deat_rb.models.spec import ModelSpec, build_model
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.train import train
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors


@pytest.fixture
def target(image_folder: Path, tmp_path: Path) -> EvalTarget:
    """A checkpoint for the folder's 4 classes."""
    path = tmp_path / "weights.pt"
    torch.save(build_model("wrn-10-1", num_classes=4).net.state_dict(), path)
    return open_target(path, arch="WRN10-1", dataset="folder", data_dir=image_folder)


def examples(target: EvalTarget, count: int | None = None) -> tuple[Tensor, Tensor]:
    images, labels = target.test_images(count)
    assert isinstance(images, Tensor)
    return images, labels


def test_examples_take_the_classes_in_turn(target: EvalTarget) -> None:
    images, labels = examples(target, 6)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert images.shape == (6, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(examples(target)[0][:6], images)
    assert len(examples(target)[0]) == 16


def test_open_checkpoint_without_mean_takes_images_as_they_are(target: EvalTarget) -> None:
    assert not target.model.training
    assert target.run is None
    assert target.eps == 8 / 255
    buffers = dict(target.model.named_buffers())
    assert buffers["mu"].unique().tolist() == [0]
    assert buffers["sigma"].unique().tolist() == [1]
    assert target.model(examples(target, 2)[0]).shape == (2, 4)


@pytest.fixture
def run_and_data(without_curves: None, image_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of one epoch, and the folder it was trained on."""
    data = shutil.copytree(image_folder, tmp_path / "data")
    options = {"method": "standard", "dataset": "folder", "data_dir": str(data), "arch": "wrn-10-1", "val_size": 8,
               "batch_size": 8, "epochs": 1, "eps": 0.25, "device": "cpu", "precision": "fp32"}  # fmt: skip
    return train(options, output=tmp_path, name="run")[0].path, data


def test_open_target_of_a_run(run_and_data: tuple[Path, Path]) -> None:
    run, _ = run_and_data
    target = open_target(run)
    assert (target.eps, target.run, target.data.name) == (0.25, run, "folder")
    assert not target.model.training
    saved = load_file(run / "last.safetensors")
    assert torch.equal(target.model.state_dict()["net.conv1.weight"], saved["net.conv1.weight"])
    assert "note" not in target.provenance


def test_open_target_notes_files_that_were_left_out(run_and_data: tuple[Path, Path]) -> None:
    run, data = run_and_data
    (data / "test" / "red" / "photo.heic").touch()
    assert open_target(run).provenance["note"] == "1 file skipped: .heic (1)"


def test_open_target_notes_changed_data(run_and_data: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = run_and_data
    moved = data.rename(tmp_path / "elsewhere")
    with pytest.raises(
        DeatError, match=f"the folder of the images, {data}, does not exist: give its present place by --data-dir"
    ):
        open_target(run)
    assert "note" not in open_target(run, data_dir=moved).provenance
    shutil.copy(moved / "test" / "red" / "0000.png", moved / "test" / "blue" / "0000.png")
    assert "differ from those that the run was trained on" in open_target(run, data_dir=moved).provenance["note"]


def test_open_target_of_a_run_refuses_options_of_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="--arch wrn-10-1 is only for checkpoints: the run"):
        open_target(tmp_path, arch="wrn-10-1")


# Labels are matched by class name


COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "grey": (128, 128, 128), "red": (200, 60, 40)}
"""Those of the images that `image_folder` writes."""


class ByColour(nn.Module):
    """Logits for images of one colour: negative distances to the colours of ``names``."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.register_buffer("colours", torch.tensor([COLOURS[name] for name in names]) / 255)

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(images.mean(dim=(2, 3)), self.get_buffer("colours"))


def colour_folder(root: Path, source: Path, names: Mapping[str, str]) -> Path:
    """Copy a folder's classes under other names."""
    for part in ("train", "test"):
        for name, new in names.items():
            shutil.copytree(source / part / name, root / part / new)
    return root


def accuracy(target: EvalTarget) -> float:
    images, labels = examples(target)
    return float((target.model(images).argmax(dim=1) == labels).float().mean())


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that know the folder's classes in the order of the folder's names, and in another."""
    networks = SimpleNamespace(
        sorted=lambda: ByColour(("blue", "green", "grey", "red")),
        shuffled=lambda: ByColour(("red", "grey", "blue", "green")),
        build=lambda num_classes: ByColour(("blue", "green", "grey", "red")),
    )
    monkeypatch.setitem(sys.modules, "colour_networks", networks)


@pytest.mark.slow
@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("count", [4, 3, 2])
def test_open_target_matches_labels_with_the_network_by_name(image_folder: Path, tmp_path: Path, count: int) -> None:
    names = ("red", "green", "blue", "grey")[:count]
    folder = colour_folder(tmp_path / "some", image_folder, {name: name for name in names})
    given: dict[str, Any] = {"dataset": "folder", "data_dir": folder, "image_size": 32}
    order = ("red", "grey", "blue", "green")
    target = open_target("colour_networks:shuffled", classes=order, **given)
    assert accuracy(target) == 1
    assert target.classes == order
    assert "labels were matched to logits by class name" in target.provenance["note"]
    (tmp_path / "classes.txt").write_text("\n".join(order))
    assert accuracy(open_target("colour_networks:shuffled", classes=tmp_path / "classes.txt", **given)) == 1
    if count < 4:
        with pytest.raises(DeatError, match=rf"^colour_networks:shuffled has 4 logits, but folder has {count} classes"):
            open_target("colour_networks:shuffled", **given)
    else:
        by_position = open_target("colour_networks:shuffled", **given)
        assert accuracy(by_position) == 0
        assert (
            "logits are assumed to be in this order of classes: blue, green, grey, red; --classes FILE"
            in (by_position.provenance["note"])
        )


@pytest.mark.usefixtures("colours")
def test_open_target_refuses_classes_that_the_network_does_not_have(image_folder: Path, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "renamed", image_folder, {"red": "crimson", "blue": "blue"})
    with pytest.raises(DeatError, match=r"^folder has the class 'crimson', which colour_networks:sorted lacks"):
        open_target("colour_networks:sorted", dataset="folder", data_dir=folder, image_size=32,
                    classes=("blue", "green", "grey", "red"))  # fmt: skip


@pytest.fixture
def colour_run(image_folder: Path, tmp_path: Path, colours: None) -> Path:
    """A run whose network is right on every image of the folder."""
    data = load_data("folder", data_dir=image_folder)
    spec = ModelSpec(arch="colour_networks:build", num_classes=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    config = run_config(arch=spec.arch, network=spec, dataset="folder", data_dir=str(image_folder), image_size=32,
                        classes=data.classes, data_fingerprint=data.fingerprint)  # fmt: skip
    RunDirectory.create(tmp_path / "run", config)
    save_tensors(tmp_path / "run" / "last.safetensors", spec.build().state_dict())
    return tmp_path / "run"


def test_open_target_of_a_run_matches_labels_of_other_data_by_name(
    colour_run: Path, image_folder: Path, tmp_path: Path
) -> None:
    own = open_target(colour_run, trust_code=True)
    assert accuracy(own) == 1
    assert "note" not in own.provenance
    some = colour_folder(tmp_path / "some", image_folder, {"green": "green", "red": "red"})
    target = open_target(colour_run, data_dir=some, trust_code=True)
    assert accuracy(target) == 1
    assert set(examples(target)[1].tolist()) == {1, 3}
    assert target.provenance["note"] == (
        "the data differ from those that the run was trained on; labels were matched to logits by class name (2 of 4 "
        "classes)"
    )
    renamed = colour_folder(tmp_path / "renamed", image_folder, {"red": "crimson", "green": "green"})
    with pytest.raises(DeatError, match=r"^folder has the class 'crimson', which the run .*run lacks"):
        open_target(colour_run, data_dir=renamed, trust_code=True)


def test_open_target_keeps_large_test_sets_in_their_files(colour_run: Path) -> None:
    in_memory = open_target(colour_run, trust_code=True)
    streamed = open_target(colour_run, trust_code=True, memory_limit=0)
    images, labels = streamed.test_images(6)
    assert isinstance(images, ImageFolder)
    assert torch.equal(images.tensors()[0], examples(in_memory, 6)[0])
    assert torch.equal(labels, examples(in_memory, 6)[1])
    assert not isinstance(in_memory.test_images()[0], ImageFolder)


# What a checkpoint does not say


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A network for images standardized as CIFAR-10's, without its normalization; beside it an average of weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model("wrn-10-1", num_classes=4).net.eval()
    state = net.state_dict()
    averaged = {name: tensor * 0.5 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "both.pt")
    torch.save(state, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_open_target_with_a_normalization(checkpoint: Path, image_folder: Path) -> None:
    given: dict[str, Any] = {"arch": "wrn-10-1", "dataset": "folder", "data_dir": image_folder}
    mean, std = NORMALIZATION["cifar10"]
    plain = open_target(checkpoint, **given)
    target = open_target(checkpoint, normalization=(mean, std), **given)
    images = examples(target)[0]
    standardized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(target.model(images), plain.model(standardized), atol=1e-5)
    assert target.provenance["normalization"] == "mean 0.4914, 0.4822, 0.4465; std 0.2471, 0.2435, 0.2616"
    torch.save(target.model.state_dict(), checkpoint)
    with pytest.raises(DeatError, match=r"weights\.pt already contains a mean and standard deviation: omit --mean"):
        open_target(checkpoint, normalization=(mean, std), **given)


def test_open_target_of_one_of_several_state_dicts(checkpoint: Path, image_folder: Path) -> None:
    given: dict[str, Any] = {"arch": "wrn-10-1", "dataset": "folder", "data_dir": image_folder}
    both = checkpoint.with_name("both.pt")
    raw, averaged = open_target(both, **given), open_target(both, weights_key="state_dict_ema", **given)
    assert "loaded the weights under 'state_dict'; the file also has 'state_dict_ema'" in raw.provenance["note"]
    weight = "net.conv1.weight"
    assert torch.equal(averaged.model.state_dict()[weight], 0.5 * raw.model.state_dict()[weight])
    assert averaged.provenance["weights_key"] == "state_dict_ema"
    with pytest.raises(DeatError, match=r"has no state dict under 'ema': give --weights-key one of"):
        open_target(both, weights_key="ema", **given)


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnet10t", "colour_networks:build"])
@pytest.mark.usefixtures("colours")
def test_open_target_needs_the_image_size_of_networks_for_several(
    arch: str, checkpoint: Path, image_folder: Path
) -> None:
    given: dict[str, Any] = {"dataset": "folder", "data_dir": image_folder}
    message = r"accepts images of several sizes \(.*\): give --image-size, the size that it was"
    with pytest.raises(DeatError, match=message):
        open_target(checkpoint, arch=arch, **given)
    with pytest.raises(DeatError, match=message):
        open_target("colour_networks:sorted", **given)
    model = build_model(arch, num_classes=4, image_size=48)
    torch.save(model.state_dict(), checkpoint)
    assert open_target(checkpoint, arch=arch, image_size=48, **given).data.test.shape == (3, 48, 48)


def test_open_target_refuses_a_network_for_other_sizes_before_decoding(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="'wrn-10-1' takes 3x32x32 images, not 3x64x64"):
        open_target(checkpoint, arch="wrn-10-1", dataset="folder", data_dir=tmp_path / "nothing", image_size=64)


@pytest.mark.parametrize(("written", "named"), [("preactresnet18-bn", "preactresnet18"), ("resnet18", "resnet18")])
def test_open_target_detects_the_variant_of_a_resnet(written: str, named: str, tmp_path: Path) -> None:
    net = build_model(written, num_classes=10).net
    torch.save({"net": net.state_dict()}, tmp_path / "net.pt")
    target = open_target(tmp_path / "net.pt", arch=named, dataset="digits")
    assert target.provenance["arch"] == written
    expected = "the weights are for preactresnet18-bn, not preactresnet18" if written != named else None
    assert target.provenance.get("note") == expected


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("run", {"weights_key": "ema"}, "--weights-key ema is only for checkpoints: the run"),
        (
            "run",
            {"normalization": NORMALIZATION["cifar10"]},
            "--mean, --std, --normalize is only for checkpoints: the run",
        ),
        ("run", {"classes": ("a", "b")}, "--classes is only for networks without class names: the run"),
        ("weights.pt", {"model_dir": "models", "arch": "wrn-10-1"}, "--model-dir models is only for robustbench:NAME"),
        (
            "timm:resnet10t",
            {"weights_key": "ema"},
            "--weights-key ema is only for checkpoints: timm:resnet10t specifies",
        ),
    ],
)
def test_open_target_refuses_options_that_do_not_apply(
    target: str, options: dict[str, Any], message: str, colour_run: Path, checkpoint: Path, image_folder: Path
) -> None:
    data: dict[str, Any] = {} if target == "run" else {"dataset": "folder", "data_dir": image_folder}
    path = colour_run if target == "run" else checkpoint if target == "weights.pt" else target
    with pytest.raises(DeatError, match=f"^{message}"):
        open_target(path, trust_code=True, **data, **options)


@pytest.mark.usefixtures("colours")
def test_open_target_does_not_note_transparent_training_images(image_folder: Path, tmp_path: Path) -> None:
    images = shutil.copytree(image_folder, tmp_path / "images")
    Image.new("RGBA", (32, 32), (200, 60, 40, 0)).save(images / "train" / "red" / "clear.png")
    data = load_data("folder", data_dir=images)
    assert data.transparency == "1 image has transparency and was composited on white"
    target = combine(Network(ByColour(("blue", "green", "grey", "red")), "net", {}), data)
    assert "transparency" not in target.provenance.get("note", "")


@pytest.mark.usefixtures("colours")
def test_open_target_says_that_a_network_was_trained_on_another_size(image_folder: Path) -> None:
    network = Network(ByColour(("blue", "green", "grey", "red")), "net", {}, image_size=224)
    target = combine(network, load_data("folder", data_dir=image_folder))
    assert target.provenance["note"].endswith("the network was trained on 224x224 images, but these are 32x32")


def test_open_target_of_robustbench_needs_its_dataset(image_folder: Path) -> None:
    with pytest.raises(
        DeatError,
        match=r"^robustbench:Wong2020Fast does not specify the RobustBench dataset it was "
        r"trained on: give robustbench:DATASET/Wong2020Fast with one of cifar10",
    ):
        open_target("robustbench:Wong2020Fast", dataset="folder", data_dir=image_folder)
