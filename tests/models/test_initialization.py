"""Initial weights: pretrained weights of libraries, checkpoints with another last layer, and frozen parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deat_rb.models.initialization import freeze_parameters, initial_weights
from deat_rb.models.pretrained import library_input
from deat_rb.models.spec import build_model
from deat_rb.models.weights import with_new_head
from deat_rb.runs.options import make_options, read_options
from deat_rb.runs.plan import plan
from deat_rb.runs.train import train
from deat_rb.training.callbacks import Callback
from deat_rb.utils.errors import DeatError

NET = "timm:mobilenetv3_small_050"
"""Half a million parameters without the last layer, trained on ImageNet at 224x224 pixels."""

SMALL: dict[str, Any] = {
    "method": "pgd-1", "arch": NET, "train_size": 64, "val_size": 16, "batch_size": 32, "epochs": 1, "eps": 0.1,
    "precision": "fp32", "device": "cpu", "pretrained": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> dict[str, Tensor]:
    """Weights of the network with ImageNet's 1,000 classes, as the library would publish them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return build_model(NET, num_classes=1000).net.state_dict()


@pytest.fixture
def file(library: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(library, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_with_new_head_keeps_all_but_the_last_layer(library: dict[str, Tensor]) -> None:
    model = build_model(NET, num_classes=10)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded, names = with_new_head(model, library, 10)
    assert names == ("net.classifier.weight", "net.classifier.bias")
    for name, tensor in own.items():
        expected = tensor if name in (*names, "mu", "sigma") else library[name.removeprefix("net.")]
        assert torch.equal(loaded[name], expected)
    same = build_model(NET, num_classes=1000)
    assert with_new_head(same, library, 1000)[1] == ()
    without = {name: tensor for name, tensor in library.items() if not name.startswith("classifier")}
    assert with_new_head(model, without, 10)[1] == names, "a network published without a last layer"


@pytest.mark.parametrize("change", ["middle", "unequal"])
def test_with_new_head_leaves_other_differences_to_be_reported(library: dict[str, Tensor], change: str) -> None:
    model = build_model(NET, num_classes=10)
    wrong = dict(library)
    wrong["conv_stem.weight" if change == "middle" else "classifier.bias"] = torch.zeros(3)
    assert with_new_head(model, wrong, 10)[1] == ()
    weights = initial_weights(NET)
    assert weights is None


def test_pretrained_file_initializes_a_run(file: Path, library: dict[str, Tensor]) -> None:
    planned = plan(make_options({**SMALL, "weights": str(file)}))
    net = planned.trainer.model.state_dict()
    for name, tensor in library.items():
        assert torch.equal(net[f"net.{name}"], tensor) or name.startswith("classifier.")
    assert net["net.classifier.weight"].shape == (10, library["classifier.weight"].shape[1])
    (note,) = planned.notes
    assert note == f"the last layer of {file} is for other classes; classifier.weight, classifier.bias are new"
    # timm's constants for ImageNet.
    assert planned.config.network.mean == (0.485, 0.456, 0.406)
    assert planned.config.network.std == (0.229, 0.224, 0.225)
    own = plan(make_options({**SMALL, "weights": str(file), "mean": (0.5,) * 3, "std": (0.5,) * 3}))
    assert own.config.network.mean == (0.5, 0.5, 0.5)


def test_config_of_a_run_from_a_pretrained_file_with_a_normalization_repeats_it(tmp_path: Path) -> None:
    weights, config = tmp_path / "own.pt", tmp_path / "config.json"
    torch.save(build_model(NET, num_classes=4, mean=(0.25,) * 3, std=(0.5,) * 3).state_dict(), weights)
    first = plan(make_options({**SMALL, "weights": str(weights)})).config
    config.write_text(first.model_dump_json())
    assert first.network.mean == (0.25, 0.25, 0.25)
    assert plan(make_options(read_options(config))).config.network == first.network


def test_pretrained_folder_takes_the_librarys_image_size(file: Path, image_folder: Path) -> None:
    options = {**SMALL, "weights": str(file), "dataset": "folder", "data_dir": str(image_folder), "train_size": None,
               "batch_size": 2, "val_size": 2}  # fmt: skip
    assert plan(make_options(options)).config.network.image_size == 224
    assert plan(make_options({**options, "image_size": 64})).config.network.image_size == 64


def test_pretrained_downloads_only_without_a_file_and_not_in_a_dry_run(
    monkeypatch: pytest.MonkeyPatch, library: dict[str, Tensor], file: Path
) -> None:
    asked = []

    def download(arch: str) -> dict[str, Tensor]:
        asked.append(arch)
        return library

    monkeypatch.setattr("deat_rb.models.initialization.library_weights", download)
    plan(make_options({**SMALL, "weights": str(file)}))
    assert "timm (pretrained)" in dict(plan(make_options(SMALL), dry=True).lines())["model"]
    assert asked == []
    planned = plan(make_options(SMALL))
    assert asked == [NET]
    assert torch.equal(planned.trainer.model.state_dict()["net.conv_stem.weight"], library["conv_stem.weight"])


def test_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", fail)
    message = (
        f"the weights of {NET} cannot be loaded (no route to host): download them once with internet access, "
        "or give their file with --weights"
    )
    with pytest.raises(DeatError, match=re.escape(message)):
        plan(make_options(SMALL))


def test_library_input_is_known_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_input("torchvision:resnet18") == (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 224)
    assert library_input(NET)[1] == 224
    with pytest.raises(DeatError, match=r"^timm has no model 'mobilenetv3_smal'"):
        library_input("timm:mobilenetv3_smal")
    with pytest.raises(DeatError, match=r"^timm:mobilenetv3_small_050\.none is unknown \(Invalid pretrained tag"):
        library_input(f"{NET}.none")
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: None)
    with pytest.raises(DeatError, match=rf"^{NET} has no pretrained weights: omit --pretrained, or choose another"):
        library_input(NET)


def test_checkpoint_of_other_classes_is_refused_unless_a_new_head_is_asked_for(tmp_path: Path) -> None:
    torch.save(build_model("wrn-10-1", num_classes=4).state_dict(), tmp_path / "four.pt")
    options = {**SMALL, "arch": "wrn-10-1", "pretrained": False, "init_from": str(tmp_path / "four.pt")}
    with pytest.raises(DeatError, match="has a different architecture or number of classes: shapes differ"):
        plan(make_options(options))
    planned = plan(make_options({**options, "new_head": True}))
    *_, note = planned.notes  # after that on the checkpoint's normalization
    assert note == f"the last layer of {tmp_path / 'four.pt'} is for other classes; fc.weight, fc.bias are new"
    torch.save(build_model("wrn-10-1", num_classes=10).state_dict(), tmp_path / "ten.pt")
    kept = plan(make_options({**options, "init_from": str(tmp_path / "ten.pt"), "new_head": True}))
    assert kept.notes[-1] == f"the last layer of {tmp_path / 'ten.pt'} has 10 classes as well and is kept"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "wrn-10-1"}, "--pretrained is for --arch timm:NAME and torchvision:NAME, not wrn-10-1"),
        ({"init_from": "a.pt"}, "--pretrained and --init-from .*a.pt are mutually exclusive: give only one"),
        (
            {"pretrained": False, "weights": "a.pt"},
            "--weights .*a.pt requires --pretrained, whose download it replaces",
        ),
        ({"new_head": True}, "--new-head replaces the last layer of a checkpoint: give the checkpoint"),
        ({"weights_key": "model"}, "--weights-key model requires --init-from: give the checkpoint"),
        ({"freeze": "("}, r"--freeze '\(' is not a regular expression: "),
        ({"weights": "none.pt"}, "none.pt does not exist"),
    ],
)
def test_plan_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=f"^.*{message}"):
        plan(make_options({**SMALL, **changes}))


class First(Callback):
    """Keeps the weights before the first batch."""

    def on_fit_start(self, state: Any) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["deat-3", "m+trades"])
def test_frozen_parameters_do_not_change(method: str, file: Path, tmp_path: Path) -> None:
    options = {**SMALL, "method": method, "weights": str(file), "freeze": "conv_stem|blocks.0", "weight_decay": 0.1}
    first = First()
    planned = plan(make_options(options))
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters; \d+ BatchNorm layers? .*", dict(planned.lines())["frozen"])
    run, _ = train(planned, output=tmp_path, callbacks=[first])
    for name, tensor in planned.trainer.model.named_parameters():
        frozen = re.match("net.(conv_stem|blocks.0)", name) is not None
        assert tensor.requires_grad is not frozen
        assert torch.equal(tensor, first.tensors[name]) is frozen, name
    assert run.config.model.freeze == "conv_stem|blocks.0"
    statistics = {name: tensor for name, tensor in planned.trainer.model.named_buffers() if "running" in name}
    kept = {name for name, tensor in statistics.items() if torch.equal(tensor, first.tensors[name])}
    assert kept == {name for name in statistics if name.startswith("net.blocks.0")} != set()


@pytest.mark.parametrize(
    ("pattern", "which"), [("head", "no parameter"), (".", "all parameters"), ("onv_stem", "no parameter")]
)
def test_freeze_refuses_patterns_that_match_nothing_or_everything(pattern: str, which: str) -> None:
    message = f"--freeze '{pattern}' matches {which} of the network (conv_stem.weight, "
    with pytest.raises(DeatError, match=re.escape(message)):
        freeze_parameters(build_model(NET, num_classes=10), pattern)
