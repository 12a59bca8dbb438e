"""Predictions of image files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from training_problems import ARCH, run_config

from deat_rb.cli import main
from deat_rb.inference import predict
from deat_rb.models.spec import ModelSpec
from deat_rb.runs.config import RunConfig
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_run(path: Path, config: RunConfig) -> Path:
    RunDirectory.create(path, config)
    with torch.random.fork_rng(devices=[]):
        save_tensors(path / "last.safetensors", config.network.build().state_dict())
    return path


def mean_config(**changes: object) -> RunConfig:
    spec = ModelSpec(arch="tiny_networks:Mean", num_classes=3, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    return run_config(arch=spec.arch, network=spec, dataset="folder", **changes)


@pytest.fixture
def coloured_run(tmp_path: Path) -> Path:
    """A run on a folder of three classes, whose network tells them by their colour."""
    return write_run(tmp_path / "run", mean_config(classes=("0-red", "1-green", "2-blue")))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Images of other sizes and shapes than the network's."""
    for (name, colour), size in zip(COLOURS.items(), ((30, 8), (8, 8), (5, 50)), strict=True):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in COLOURS]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_predict_returns_classes_and_confidences(coloured_run: Path, files: list[Path]) -> None:
    found = predict(coloured_run, files, top=2, trust_code=True)
    assert [each.image for each in found] == [str(file) for file in files]
    assert [each.guesses[0].name for each in found] == ["0-red", "1-green", "2-blue"]
    assert [each.guesses[0].index for each in found] == [0, 1, 2]
    # Logits 3, 0, 0: e^3 / (e^3 + 2) and 1 / (e^3 + 2).
    assert [guess.confidence for guess in found[0].guesses] == pytest.approx([0.909443, 0.045278], abs=1e-6)


def test_predict_crops_the_centered_square_as_training_does(coloured_run: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), COLOURS["red"])
    image.paste(COLOURS["blue"], (10, 0, 20, 10))
    image.save(tmp_path / "flag.png")
    assert predict(coloured_run, [tmp_path / "flag.png"], trust_code=True)[0].guesses[0].name == "2-blue"


def test_predict_gives_a_network_of_one_channel_the_mean(files: list[Path], tmp_path: Path) -> None:
    spec = ModelSpec(arch="tiny_networks:Bright", num_classes=2, image_size=8, channels=1, mean=(0.0,), std=(1.0,))
    run_path = write_run(tmp_path / "run", run_config(arch=spec.arch, network=spec, dataset="folder"))
    Image.new("RGB", (9, 9), (255, 200, 0)).save(tmp_path / "yellow.png")
    found = predict(run_path, [files[0], tmp_path / "yellow.png"], trust_code=True)
    assert [each.guesses[0].index for each in found] == [1, 0], "a third is red, 455/765 yellow"


def test_predict_top_is_at_most_the_number_of_classes(coloured_run: Path, files: list[Path]) -> None:
    guesses = predict(coloured_run, files[:1], top=9, trust_code=True)[0].guesses
    assert len(guesses) == 3
    assert sum(guess.confidence for guess in guesses) == pytest.approx(1)
    with pytest.raises(DeatError, match=r"^--top 0 is invalid: give 1 or more$"):
        predict(coloured_run, files, top=0, trust_code=True)
    with pytest.raises(DeatError, match=r"^files must be a list with at least one image"):
        predict(coloured_run, [], trust_code=True)
    with pytest.raises(DeatError, match=r"^files must be a list with at least one image"):
        predict(coloured_run, str(files[0]), trust_code=True)


def test_predict_of_unnamed_classes_returns_numbers(files: list[Path], tmp_path: Path) -> None:
    run_path = write_run(tmp_path / "run", mean_config())
    assert predict(run_path, files[2:], trust_code=True)[0].guesses[0].name == "2"


def test_predict_command_does_not_trust_code(coloured_run: Path, files: list[Path]) -> None:
    result = run(coloured_run, files[0])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tiny_networks:Mean" in result.stderr
    assert "--trust-code" in result.stderr


def test_predict_command_prints_a_table(coloured_run: Path, files: list[Path]) -> None:
    result = run(coloured_run, *files, "--trust-code", "--top", 2)
    assert result.exit_code == 0, result.output
    joined = " ".join(result.output.split())
    assert "0-red 90.94 %" in joined
    assert "2-blue 90.94 %" in joined
    assert joined.count(" 4.53 %") == 3


def test_predict_command_writes_json(coloured_run: Path, files: list[Path]) -> None:
    content = json.loads(run(coloured_run, files[1], "--trust-code", "--json").output)
    assert content == [
        {
            "image": str(files[1]),
            "guesses": [{"index": 1, "name": "1-green", "confidence": pytest.approx(0.909443, abs=1e-6)}],
        }
    ]


def test_predict_command_refuses_bad_images(coloured_run: Path, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:40])
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    for name, message in (
        ("text.png", "cannot be read as an image"),
        ("cut.png", "cannot be read as an image"),
        ("deep.png", "has more than 8 bits per value"),
        ("missing.png", "does not exist or is not a file"),
        ("data", "does not exist or is not a file"),
    ):
        result = run(coloured_run, files[0], tmp_path / name, "--trust-code")
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{tmp_path / name} {message}" in result.stderr
        assert "Traceback" not in result.stderr


def test_predict_command_refuses_other_folders(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a run directory" in run(tmp_path / "empty", files[0]).stderr
    assert run(tmp_path / "nothing", files[0]).exit_code == 2


def test_predict_refuses_a_diverged_network(tmp_path: Path, files: list[Path]) -> None:
    path = write_run(tmp_path / "run", mean_config())
    save_tensors(path / "last.safetensors", {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1),
                                             "net.scale": torch.full((3,), float("nan"))})  # fmt: skip
    with pytest.raises(DeatError, match="the model returns NaN, so its training probably diverged"):
        predict(path, files, trust_code=True)


def test_predict_runs_the_network_in_eval_mode(tmp_path: Path, files: list[Path]) -> None:
    path = write_run(tmp_path / "run", run_config())
    assert RunDirectory.open(path).config.model.arch == ARCH
    alone = [predict(path, [file], trust_code=True)[0].guesses[0].confidence for file in files]
    together = [each.guesses[0].confidence for each in predict(path, files, trust_code=True)]
    assert together == pytest.approx(alone, abs=1e-6)
