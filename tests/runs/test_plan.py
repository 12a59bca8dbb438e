"""Training plans: resolved options, costs, warnings, and refusals before any image is decoded."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_runs import SMALL, planned, state

import deat_rb
from deat_rb.cli import main
from deat_rb.data.images import LabeledImages
from deat_rb.leaderboard.training_record import training_command
from deat_rb.methods import registry
from deat_rb.methods.recipes import Recipe
from deat_rb.runs.options import make_options, read_options
from deat_rb.runs.plan import plan
from deat_rb.runs.resolution import default_name
from deat_rb.runs.train import train
from deat_rb.training.costs import Costs
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN


def test_plan_of_a_config_json_uses_the_same_images(tmp_path: Path) -> None:
    first = planned(train_size=None, batch_size=50)
    assert len(first.train) + len(first.val) == len(first.data.train)
    path = tmp_path / "config.json"
    path.write_text(first.config.model_dump_json())
    again = plan(make_options(read_options(path)))
    assert (len(again.train), len(again.val)) == (len(first.train), len(first.val))


def test_plan_of_a_config_json_uses_all_images_of_a_folder_that_has_grown(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    first = planned(**{**colours(tmp_path / "small", {"a": 20, "b": 20}), "val_size": None})
    path.write_text(first.config.model_dump_json())
    grown = {**read_options(path), "data_dir": colours(tmp_path / "grown", {"a": 100, "b": 100})["data_dir"]}
    again = plan(make_options(grown))
    assert (len(again.train), len(again.val)) == (160, 40)  # 20 % are held out
    assert " 160 training, 40 validation, " in dict(again.lines())["data"]
    fewer = plan(make_options({**grown, "train_size": 32}))
    assert " 32 of 200 training, 6 validation, " in dict(fewer.lines())["data"]


@pytest.mark.slow
def test_plan_initializes_from_given_weights(tmp_path: Path) -> None:
    first, _ = train(SMALL, output=tmp_path, name="first")
    for source in (first.path / "last.safetensors", first.path):
        begun = planned(init_from=str(source), seed=9).trainer.model.state_dict()
        assert all(torch.equal(begun[name], tensor) for name, tensor in state(first).items())
    with pytest.raises(DeatError, match=r"nowhere\.pt"):
        planned(init_from="nowhere.pt")


def test_plan_validation_images_are_not_trained_on() -> None:
    ready = planned(train_size=None, batch_size=50)

    def rows(data: LabeledImages) -> set[bytes]:
        return {image.numpy().tobytes() for image in data.in_memory().images}

    assert len(ready.val) == 16
    assert not rows(ready.val) & rows(ready.train)
    assert rows(ready.val) | rows(ready.train) == rows(ready.data.train)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "costs"),
    [  # M = 2 mini-batches, T = 2 epochs
        ("standard", Costs(4, 4, 4)),
        ("free-3", Costs(12, 12, 12)),
        ("deat-1", Costs(6, 6, 6)),
        ("pgd-2", Costs(12, 12, 4)),
        ("trades", Costs(44, 52, 4)),
        ("yopo-3-2", Costs(12, 12, 4)),
        ("amata-2-6", Costs(16, 16, 4)),  # 2 and 4 steps
        ("gradalign", Costs(16, 12, 4)),  # a penalty of 1 and 2 passes
        # In each epoch's first batch, of 32 images, a pass over 10 gray images.
        ("liet", Costs(8.625, 8.625, 4)),
        ("mart", Costs(44, 48, 4)),
    ],
)
@pytest.mark.usefixtures("without_curves")
def test_costs_are_what_a_run_counts(method: str, costs: Costs, tmp_path: Path) -> None:
    ready = planned(method=method)
    assert ready.batches == 2
    assert ready.costs() == costs
    _, history = train(ready, output=tmp_path)
    assert Costs(*(sum(getattr(row, name) for row in history.rows) for name in vars(costs))) == costs


@pytest.mark.parametrize("method", ["m-deat", "deat-40%", "m+pgd", "u-fgsm", "m+u-fgsm", "fat-2", "f+mart"])
def test_costs_are_none_where_they_depend_on_the_run(method: str) -> None:
    ready = planned(method=method, epochs=3)
    assert ready.costs() is None
    assert dict(ready.lines())["cost"].startswith("at most ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "passes"),
    [  # M = 2 mini-batches, T = 4 epochs
        ("m-deat", {}, 20),  # 1 + 2 + 3 + 4 replays
        ("m+pgd", {"max_steps": 2}, 22),  # 1 + 2 + 2 + 2 steps, and 4 updates
        ("deat-40%", {}, 20),
        ("u-fgsm", {}, 16),
        ("fat-3", {}, 32),
    ],
)
@pytest.mark.usefixtures("without_curves")
def test_cost_bounds_of_what_a_run_counts(method: str, options: dict[str, int], passes: int, tmp_path: Path) -> None:
    ready = planned(method=method, epochs=4, **options)
    bounds = ready.cost_bounds()
    assert bounds is not None
    most = bounds[1]
    assert most.backwards == passes
    _, history = train(ready, output=tmp_path)
    for name, bound in vars(most).items():
        assert sum(getattr(row, name) for row in history.rows) <= bound


class Idle(deat_rb.PGD):
    """An attack of one's own that computes no gradient."""

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return inputs


class Own(deat_rb.PGD):
    """An attack of one's own that takes as many passes as it likes."""

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.craft(super().forward(inputs, labels), labels)[0]


OWN: dict[str, type[deat_rb.PGD]] = {"own": Own, "idle": Idle}


def test_plan_of_own_attacks_has_no_costs_and_refuses_one_without_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", {name: Recipe(attack=attack) for name, attack in OWN.items()})
    own = planned(method="own")
    assert (own.costs(), own.cost_bounds()) == (None, None)
    assert dict(own.lines())["cost"].startswith("counted during training")
    with pytest.raises(DeatError, match="computes no gradient at its inputs"):
        train({**SMALL, "method": "idle"}, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_lines_state_the_plan() -> None:
    lines = dict(planned(method="DEAT-3", epochs=None, eps=8 / 255).lines())
    assert lines["method"].startswith("deat-3 (section 4.1")
    assert "eps = 8/255, alpha = 10/255" in lines["attack"]
    assert lines["setting"] == "fast: 24 epochs, cyclic LR up to 0.1"
    assert lines["precision"] == "fp32 on cpu, 1 thread"
    assert "64 of 1,297 training, 16 validation, 500 test images of 32x32" in lines["data"]
    assert lines["result"] == "the weights of the last epoch"
    # 3 * (1 + ... + 8) = 108 replays of 2 batches.
    assert lines["cost"] == "216 backward passes, 216 forward passes, 216 updates"


def test_plan_of_amata_needs_the_number_of_epochs() -> None:
    assert (
        "eps = 8/255, alpha = 10/255 in the first epoch"
        in dict(planned(method="amata-2-4", eps=8 / 255).lines())["attack"]
    )
    with pytest.raises(
        DeatError, match="so their number must be known: give epochs = 50, for example, instead of open"
    ):
        planned(method="amata-2-4", epochs="open")


def test_default_name_is_a_file_name() -> None:
    assert default_name(planned(method="DEAT-40%", seed=3).config) == "deat-40%-digits-training_problems-network-s3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line", "text"),
    [
        ({"method": "pgd-7", "steps": 10}, "attack", "10 steps of"),
        ({"method": "pgd-7", "steps": 10}, "cost", "44 backward passes"),  # 2 epochs of 2 batches, 10 + 1 each
        ({"method": "pgd-7", "alpha": "1/255"}, "attack", "7 steps of 1/255"),
        ({"method": "pgd-7", "attack_mode": "eval"}, "attack", "in eval mode"),
        ({"method": "trades", "beta": 3}, "loss", "CE(clean) + 3 KL"),
        ({"method": "m+trades", "beta": 0}, "loss", "CE(clean)"),
        ({"method": "mart", "beta": 2}, "loss", "MART, lambda 2"),
        ({"method": "fat-5", "tau": 1}, "attack", "tau = 1"),
        ({"method": "fat-5", "omega": 0.01}, "attack", "noise 0.01 N(0,1) after each step"),
        ({"method": "free-4"}, "attack", "delta carried from batch to batch"),
        ({"method": "free-4", "setting": "standard"}, "attack", "delta zero in each batch"),
        ({"method": "free-4", "carry": False}, "attack", "delta zero in each batch"),
        ({"method": "m-deat", "max_steps": 4, "gamma": 1.5}, "schedule", "gradient magnitude, at most 4, gamma 1.5"),
        ({"method": "m-deat", "steps": 2}, "schedule", "from 2"),
        ({"method": "fat-5", "omega": 0.002}, "attack", "noise 0.002 N(0,1) after each step"),
        ({"method": "free-4", "setting": "fast"}, "attack", "delta carried from batch to batch"),
        ({"method": "free-4", "setting": "standard", "carry": True}, "attack", "delta carried"),
        ({"method": "free-4", "lr_per_replay": True}, "setting", "updated after each replay"),
        ({"method": "u-fgsm", "early_stopping": False}, "stop", "only recorded"),
        ({"momentum": 0.5, "weight_decay": 0, "seed": 3}, "optimizer", "momentum 0.5, weight decay 0, batches of 32, "
         "seed 3"),
        ({"compile": True}, "precision", "fp32 on cpu, 1 thread, compiled"),
    ],
)  # fmt: skip
def test_lines_state_the_values_that_run(options: dict[str, Any], line: str, text: str) -> None:
    ready = planned(**options)
    assert text in dict(ready.lines())[line]
    assert dict(ready.lines())["loss"] != "CE(clean) + 6 KL"


@pytest.mark.parametrize(
    ("options", "carry"),
    [({}, True), ({"setting": "standard"}, False), ({"carry": False}, False),
     ({"setting": "standard", "carry": True}, True)],
)  # fmt: skip
def test_plan_of_free_carries_as_the_setting_or_the_option_has_it(options: dict[str, Any], carry: bool) -> None:
    ready = planned(method="free-4", **options)
    assert ready.config.attack.carry is carry
    trainer: Any = ready.trainer
    assert trainer.carry is carry


def test_lines_warn_of_a_schedule_that_never_rises() -> None:
    sentence = "deat-40 adds a replay every 40 epochs, so this run of 40 epochs never adds one; deat-40% adds them"
    assert sentence in dict(planned(method="deat-40", epochs=40).lines())["warning"]
    sentence = "the schedule starts at its maximum of 8 steps and never adds one; increase --max-steps"
    assert dict(planned(method="m-deat", steps=8).lines())["warning"] == sentence
    for method, epochs in (("deat-40", 41), ("deat-3", 4), ("deat-40%", 2), ("m-deat", 1)):
        assert "warning" not in dict(planned(method=method, epochs=epochs).lines())


def colours(root: Path, counts: dict[str, int]) -> dict[str, Any]:
    """A folder with so many training images per class and 2 test images, and the options to train on it."""
    for part in ("train", "test"):
        for number, (name, count) in enumerate(counts.items()):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count if part == "train" else 2):
                Image.new("RGB", (8, 8), (80 * number, index, 0)).save(folder / f"{index}.png")
    return {"dataset": "folder", "data_dir": str(root), "image_size": 8, "train_size": None, "val_size": 6}


def test_plan_expands_the_home_folder_and_records_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = colours(tmp_path / "photos", {"a": 20, "b": 20})
    torch.save(planned(**where).trainer.model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = planned(**{**where, "data_dir": "~/photos", "init_from": "~/weights.pt"}).config
    assert config.data.data_dir == str(tmp_path / "photos")
    assert config.model.init_from == str(tmp_path / "weights.pt")


def test_lines_count_the_classes_and_warn_of_rare_ones(tmp_path: Path) -> None:
    lines = dict(planned(**colours(tmp_path / "even", {"a": 20, "b": 20, "c": 20})).lines())
    assert lines["classes"] == "18 training images each"
    assert "warning" not in lines
    lines = dict(planned(**colours(tmp_path / "rare", {"a": 55, "rare": 5, "b": 60})).lines())
    assert re.fullmatch(r"[45] \('rare'\) to 5\d \('b'\) training images", lines["classes"])
    assert "rare classes" in lines["warning"]
    assert "'rare'" in lines["warning"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "wrn-10-1", "image_size": 64}, "architecture 'wrn-10-1' takes 3x32x32 images, not 3x64x64"),
        ({"arch": "torchvision:alexnet", "image_size": 8}, "'torchvision:alexnet' does not accept"),
        ({"arch": "vit"}, "'vit' is unknown: choose one of preactresnet18, .*, wrn-10-1; others are timm:NAME"),
        ({"arch": "wrn-10"}, "did you mean .*[?] others are timm:NAME, torchvision:NAME and package.module:factory"),
        ({"method": "pgd-1", "beta": 3}, "the method pgd-1 has no parameter beta"),
        ({"lr_schedule": "flat", "lr_epochs": 3}, "--lr-epochs = 3"),
        ({"init_from": "nowhere.pt"}, "nowhere.pt"),
        (
            {"init_from": "net.pt", "image_size": None},
            r"net\.pt accepts images of several sizes .*: give --image-size, the size that it was trained on",
        ),
        ({"init_from": "net.pt", "image_size": None, "arch": "wrn-10-1"}, r"net\.pt does not exist"),
        ({"mean": "0.5,0.5,0.5"}, "--mean and --std must be given together"),
        (
            {"mean": "0.5,0.5,0.5", "arch": "torchvision:resnet18", "pretrained": True},
            "--mean and --std must be given together",
        ),
        ({"mean": "0.5,0.5,0.5", "std": "1,1"}, "must have one number per channel"),
        ({"weights_key": "ema"}, "--weights-key ema requires --init-from: give the checkpoint"),
        ({"track": ["tensorbord"]}, "--track tensorbord is unknown"),
    ],
)
def test_plan_refuses_before_any_image_is_decoded(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object, **keywords: object) -> None:
        raise AssertionError("images were decoded")

    where = colours(tmp_path, {"a": 2, "b": 2})
    monkeypatch.setattr("deat_rb.runs.plan.load_data", decode)
    with pytest.raises(DeatError, match=message):
        plan(make_options({**SMALL, **where, **options}))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_dry_run_neither_downloads_nor_writes(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["train", "--dry-run", "--dataset", dataset, "--method", "pgd-7",
                                       "--batch-size", "2", "--arch", "wrn-10-1", "--device", "cpu"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(rf"data +{dataset}: 49,000 training, 1,000 validation, 10,000 test images of 32x32", result.stdout)
    assert f"files      {dataset} has not been downloaded yet" in result.stdout
    # 24,500 batches of 2, 10 epochs of 7 steps and an update.
    assert "1,960,000 backward passes" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory_limit", ["1", "1G"])
def test_dry_run_of_a_folder_decodes_few_images_and_writes_nothing(
    memory_limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = colours(tmp_path / "data", {"a": 30, "b": 30})
    decoded: list[Path] = []

    def open_image(path: Path, *arguments: Any, **keywords: Any) -> Image.Image:
        decoded.append(path)
        return open_of_pillow(path, *arguments, **keywords)

    open_of_pillow = Image.open
    monkeypatch.setattr(Image, "open", open_image)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = dict(plan(make_options({**SMALL, **where, "memory_limit": memory_limit}), dry=True).lines())
    assert "54 training, 6 validation, 4 test images of 8x8" in lines["data"]
    assert lines["classes"] == "27 training images each"
    assert len(decoded) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_plan_takes_the_state_dict_under_weights_key_and_names_the_others(tmp_path: Path) -> None:
    raw = {name: torch.zeros_like(tensor) for name, tensor in planned().trainer.model.state_dict().items()}
    good = planned(seed=3).trainer.model.state_dict()
    raw |= {name: good[name] for name in ("mu", "sigma")}
    torch.save({"state_dict": raw, "state_dict_ema": good}, tmp_path / "both.pt")
    source = str(tmp_path / "both.pt")
    chosen = planned(init_from=source, weights_key="state_dict_ema")
    assert all(torch.equal(good[name], tensor) for name, tensor in chosen.trainer.model.state_dict().items())
    assert "'state_dict_ema'" in dict(planned(init_from=source).lines())["note"]


def test_plan_normalizes_by_mean_and_std() -> None:
    network = planned(mean="0.1,0.2,0.3", std="0.4,0.5,0.6").config.network
    assert (network.mean, network.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_plan_takes_the_normalization_of_the_initial_weights(tmp_path: Path) -> None:
    source = str(tmp_path / "first.pt")
    torch.save(planned(mean="0.125,0.25,0.375", std="0.5,0.75,1").trainer.model.state_dict(), source)
    for setting in ("fast", "fastat"):
        own = planned(init_from=source, setting=setting, precision=None)
        assert (own.config.network.mean, own.config.network.std) == ((0.125, 0.25, 0.375), (0.5, 0.75, 1))
        note = f"the normalization is that of {source}: mean 0.125, 0.25, 0.375; std 0.5, 0.75, 1"
        assert dict(own.lines())["note"] == note
    again = planned(init_from=source, mean="0.125,0.25,0.375", std="0.5,0.75,1")
    assert again.config.network.mean == (0.125, 0.25, 0.375)
    with pytest.raises(DeatError, match="already contains a mean and standard deviation: omit --mean and --std"):
        planned(init_from=source, mean="0.5,0.5,0.5", std="0.5,0.5,0.5")


def test_plan_of_fastat_does_not_normalize_and_can_be_changed() -> None:
    options = {"setting": "fastat", "method": "pgd-1", "epochs": None, "precision": None}
    own = planned(**options)
    assert (own.config.network.mean, own.config.network.std) == ((0.0,) * 3, (1.0,) * 3)
    optim = own.config.optim
    assert (optim.epochs, optim.ema, optim.lr_schedule, optim.select) == (200, 0.9995, "onecycle", "best")
    lines = dict(own.lines())
    assert lines["optimizer"].startswith("SGD, momentum 0.9 +- 0.05, weight decay 0.0005")
    assert lines["average"] == "exponential moving average of the weights, decay 0.9995, after every update"
    assert lines["loss"] == "CE, label smoothing 0.4"
    changed = planned(**options, ema=0, label_smoothing=0, mean="0.5,0.5,0.5", std="0.5,0.5,0.5")
    assert changed.config.network.mean == (0.5, 0.5, 0.5)
    assert "average" not in dict(changed.lines())
    assert dict(changed.lines())["loss"] == "CE"


def test_plan_says_how_often_it_validates_and_counts_one_epoch() -> None:
    own = planned(validate_every=2, patience=1, lr_schedule="cosine", warmup_epochs=1, deterministic=True, epochs=3)
    lines = dict(own.lines())
    assert lines["validation"] == "every 2 epochs, and after the last one"
    assert lines["patience"] == "ends when robust validation accuracy has not risen for 1 epoch"
    assert lines["setting"].endswith("after 1 epoch of warm-up")
    assert lines["precision"].endswith(", deterministic algorithms only")
    assert dict(planned(epochs="open", validate_every=2).lines())["validation"] == "every 2 epochs"
    assert "validation" not in dict(planned().lines())


def test_plan_of_an_open_ended_run_has_a_flat_rate_and_averaged_weights() -> None:
    own = planned(epochs="open", patience=5, method="deat-3")
    optim = own.config.optim
    assert (optim.epochs, optim.lr_schedule, optim.lr, optim.ema, optim.select) == (OPEN, "flat", 0.05, 0.999, "best")
    assert (own.costs(), own.cost_bounds()) == (None, None)
    assert own.warnings() == []
    lines = dict(own.lines())
    assert lines["setting"] == "fast: open-ended, flat LR up to 0.05"
    assert lines["patience"] == "ends when robust validation accuracy has not risen for 5 epochs"
    assert lines["cost"].startswith("counted during training")
    assert planned(epochs="open", lr=0.2, optimizer="adamw", ema=0).config.optim.lr == 0.2
    assert planned(epochs="open", optimizer="adamw").config.optim.lr == 0.001
    with pytest.raises(
        DeatError, match="--epochs = open needs a learning-rate schedule without an end: give --lr-schedule"
    ):
        planned(epochs="open", lr_schedule="cosine")
    assert planned(epochs=7, patience=2).costs() is None
    assert own.config.model_dump(mode="json")["optim"]["epochs"] == "open"
    assert make_options(own.config.flat()).optim.epochs == OPEN
    assert "--epochs open" in training_command(own.config)


def test_plan_lines_say_which_files_of_a_folder_were_left_out(image_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "train" / "red" / "0000.png").rename(folder / "train" / "red" / "0000.heic")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / ".ipynb_checkpoints" / "0001-checkpoint.png").touch()
    lines = plan(make_options({
        "method": "pgd-1", "arch": "wrn-10-1", "dataset": "folder", "data_dir": str(folder), "val_size": 8,
        "batch_size": 8, "device": "cpu",
    })).lines()  # fmt: skip
    assert ("files", "2 files skipped: hidden (1), .heic (1)") in lines


def test_plan_refuses_an_init_from_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.pt")
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(DeatError, match=r"^--init-from .*caf\\xe9\.pt has a name that is not UTF-8: rename it$"):
        planned(init_from=str(path))
