"""Predictions of image files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from tiny_networks import Mean
from training_problems import ARCH, run_config
from without_float64 import WithoutFloat64

from deat_rb import inference
from deat_rb.cli import main
from deat_rb.cli.predict import _Csv, _writer
from deat_rb.data.image_files import find_images
from deat_rb.data.image_folder import read_image
from deat_rb.inference import ClassScore, Prediction, iter_predictions, predict
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
    found = predict(coloured_run, files, top_k=2, trust_code=True)
    assert [each.image for each in found] == [str(file) for file in files]
    assert [each.guesses[0].name for each in found] == ["0-red", "1-green", "2-blue"]
    assert [each.guesses[0].index for each in found] == [0, 1, 2]
    # Logits 3, 0, 0: e^3 / (e^3 + 2) and 1 / (e^3 + 2).
    assert [guess.confidence for guess in found[0].guesses] == pytest.approx([0.909443, 0.045278], abs=1e-6)


def test_predict_on_a_device_without_float64(
    coloured_run: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Mean.forward
    monkeypatch.setattr(Mean, "forward", lambda self, images: forward(self, images.as_subclass(WithoutFloat64)))
    found = predict(coloured_run, files, trust_code=True)
    assert [each.guesses[0].name for each in found] == ["0-red", "1-green", "2-blue"]


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
    guesses = predict(coloured_run, files[:1], top_k=9, trust_code=True)[0].guesses
    assert len(guesses) == 3
    assert sum(guess.confidence for guess in guesses) == pytest.approx(1)
    with pytest.raises(DeatError, match=r"^--top-k 0 is invalid: give 1 to 1000$"):
        predict(coloured_run, files, top_k=0, trust_code=True)
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
    result = run(coloured_run, *files, "--trust-code", "--top-k", 2)
    assert result.exit_code == 0, result.output
    joined = " ".join(result.output.split())
    assert "red.png 90.94 % 0-red 4.53 % " in joined
    assert "blue.png 90.94 % 2-blue 4.53 % " in joined


def test_predict_command_writes_json(coloured_run: Path, files: list[Path]) -> None:
    content = json.loads(run(coloured_run, files[1], "--trust-code", "--json").output)
    assert content == [
        {
            "image": str(files[1]),
            "guesses": [{"index": 1, "name": "1-green", "confidence": pytest.approx(0.909443, abs=1e-6)}],
        }
    ]


def test_predict_command_writes_files_or_to_stdout(coloured_run: Path, files: list[Path], tmp_path: Path) -> None:
    for option, file in (("--json", tmp_path / "out.json"), ("--csv", tmp_path / "out.csv")):
        printed = run(coloured_run, *files, "--trust-code", option)
        assert run(coloured_run, *files, "--trust-code", option, "-").stdout == printed.stdout
        written = run(coloured_run, *files, "--trust-code", option, file)
        assert written.stdout == ""
        assert f"{file}: {len(files)} images" in written.stderr
        assert file.read_text().splitlines() == printed.stdout.splitlines()


def test_predict_writes_a_name_that_is_not_text_to_a_strict_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(stream, "utf-8", errors="strict"))
    with _writer(None, _Csv, ["caf\udce9.jpg"], 1) as write:
        write(Prediction(image="caf\udce9.jpg", guesses=(ClassScore(index=0, name="0", confidence=1.0),)))
    assert b"caf\\udce9.jpg,0,1.000000," in stream.getvalue()


def test_predict_writes_no_formulas_of_class_names_into_a_csv_file(tmp_path: Path) -> None:
    names = ('=HYPERLINK("https://example.org")', "x;@SUM(1)", "\x1b[2J", "a-b")
    with _writer(tmp_path / "out.csv", _Csv, ["=a.png"], 4) as write:
        write(Prediction(image="=a.png", guesses=tuple(ClassScore(index=index, name=name, confidence=0.25)
                                                      for index, name in enumerate(names))))  # fmt: skip
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        row = list(csv.reader(file))[1]
    assert row[0] == "'=a.png"
    assert row[1:9:2] == ['\'=HYPERLINK("https://example.org")', "x;'@SUM(1)", r"\x1b[2J", "a-b"]


def test_predict_command_completes_the_json_after_ctrl_c(
    coloured_run: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, prediction in enumerate(iter_predictions(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield prediction

    monkeypatch.setattr("deat_rb.inference.iter_predictions", some)
    file = tmp_path / "out.json"
    result = run(coloured_run, *files, "--trust-code", "--json", file)
    assert result.exit_code == 130
    assert f"{file} has the first 2 of {len(files)} images" in result.stderr
    assert [row["image"] for row in json.loads(file.read_text())] == [str(each) for each in files[:2]]


def write_bad_images(folder: Path, good: Path) -> dict[str, str]:
    """Write files that cannot be read, and return what is wrong with each."""
    folder.mkdir(exist_ok=True)
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(good.read_bytes()[:40])
    Image.new("I;16", (8, 8)).save(folder / "deep.png")
    damaged = "cannot be read as an image"
    return {"cut.png": damaged, "deep.png": "has more than 8 bits per value", "text.png": damaged}


def test_predict_command_gives_a_bad_image_a_row_and_goes_on(coloured_run: Path, files: list[Path]) -> None:
    folder = files[0].parent / "bad"
    bad = write_bad_images(folder, files[0]) | {"missing.png": "does not exist or is not a file"}
    given = [each for name in bad for each in (folder / name, files[2])]
    result = run(coloured_run, *given, "--trust-code", "--json", "--batch-size", 3)
    assert result.exit_code == 1
    assert "4 of 5 paths could not be read" in result.stderr
    rows = {row["image"]: row for row in json.loads(result.stdout)}
    assert list(rows) == [str(each) for each in dict.fromkeys(given)]
    assert rows[str(files[2])]["guesses"][0]["name"] == "2-blue"
    for name, reason in bad.items():
        assert f"{folder / name} {reason}" in rows[str(folder / name)]["error"]
        assert rows[str(folder / name)]["guesses"] == []
    only_bad = run(coloured_run, folder / "cut.png", "--trust-code")
    assert (only_bad.exit_code, only_bad.stdout.count("error: ")) == (1, 1)


def test_predict_command_takes_folders_and_patterns(coloured_run: Path, files: list[Path], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "sub" / ".hidden").mkdir(parents=True)
    for number, place in enumerate(("b.png", "sub/a.png", "sub/.hidden/c.png", "sub/[1].png")):
        Image.new("RGB", (8, 8), list(COLOURS.values())[number % 3]).save(photos / place)
    (photos / "notes.txt").touch()
    (photos / "sub" / "back").symlink_to(photos)
    result = run(coloured_run, photos, "--trust-code", "--csv", tmp_path / "out.csv", "--top-k", 2)
    assert result.exit_code == 1, "the link is reported"
    assert "2 files skipped: .txt (1), hidden (1)" in result.stderr
    assert "back is the same folder as" in result.stderr
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "confidence", "class_2", "confidence_2", "error"]
    assert [(Path(row[0]).name, row[1], row[2]) for row in rows[1:]] == [
        ("b.png", "0-red", "0.909443"), ("[1].png", "0-red", "0.909443"), ("a.png", "1-green", "0.909443"),
    ]  # fmt: skip
    found = run(coloured_run, photos / "**" / "*.png", photos / "sub" / "[1].png", "--trust-code", "--json")
    assert [Path(row["image"]).name for row in json.loads(found.stdout)] == ["b.png", "[1].png", "a.png"]


def test_predict_reads_the_exif_orientation(coloured_run: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), COLOURS["red"])
    image.paste(COLOURS["blue"], (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    decoded = read_image(tmp_path / "turned.jpg", 4)
    assert decoded[2, 0].min() < 50, "the centered square of the turned image has no blue row"
    square = Image.new("RGB", (8, 8), COLOURS["red"])
    square.paste(COLOURS["blue"], (0, 0, 2, 8))
    square.save(tmp_path / "square.png", exif=exif)
    assert (read_image(tmp_path / "square.png", 8)[2].argmax(axis=0) == 0).all(), "the blue edge is on top"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-*.png"], "no file matches 'nothing-*.png'"),
        (["empty"], "the folder empty has no images"),
        (["a.png", "--csv", "a.png"], "does not end in .csv"),
        (["a.png", "--csv", "no/a.csv"], "is in a folder that does not exist"),
        (["--json", "a.png"], "'a.png' does not end in .json; give a file name that does, or - for stdout"),
        (["a.png", "--csv", "a.csv", "--json"], "--csv and --json are mutually exclusive"),
        (["a.png", "--batch-size", "0"], "--batch-size 0 is invalid: give 1 to 1000000"),
    ],
)
def test_predict_command_says_what_is_wrong(
    coloured_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save("a.png")
    before = sorted(tmp_path.iterdir())
    result = run(coloured_run, *arguments, "--trust-code")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert sorted(tmp_path.iterdir()) == before


def test_iter_predictions_reads_two_batches_ahead_at_most(
    coloured_run: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def reading(path: Path, size: int) -> NDArray[np.uint8]:
        read.append(path)
        return read_image(path, size)

    monkeypatch.setattr(inference, "read_image", reading)
    stream = iter_predictions(coloured_run, files * 10, batch_size=2, trust_code=True)
    assert read == [], "nothing is decoded before the first prediction is asked for"
    assert next(stream).guesses[0].name == "0-red"
    assert len(read) <= 4
    assert len(list(stream)) == 29


def test_predict_command_refuses_other_folders(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a run directory" in run(tmp_path / "empty", files[0]).stderr
    assert run(tmp_path / "nothing", files[0]).exit_code == 2


def test_find_images_refuses_an_empty_folder_after_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "link.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeatError, match=r"the folder .*empty has no images"):
        find_images([tmp_path / "broken", tmp_path / "empty"])


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
