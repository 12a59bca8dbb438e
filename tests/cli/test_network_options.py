"""Options about networks that do not describe themselves: `deat-rb eval`, `predict` and `export` of checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from deat_rb.cli import main
from deat_rb.cli.network_options import import_from_current_folder
from deat_rb.models.spec import build_model
from deat_rb.robustbench.format import robustbench_weights
from deat_rb.utils.errors import DeatError

COMMAND = str(Path(sys.executable).parent / "deat-rb")
FAST = ["--attacks", "natural", "--checks", "none", "--no-page", "--device", "cpu", "--n-examples", "4"]
MODULE = """
import torch
from my_layers import Means
def trained(): return Means()
def build(num_classes): return Means()
"""
LAYERS = """
import torch
class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, images): return images.mean((2, 3)) * self.scale
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="deat-rb")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module, a checkpoint for it, and an image of each class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for name in ("mynet", "my_layers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mynet.py").write_text(MODULE)
    (tmp_path / "my_layers.py").write_text(LAYERS)
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "net.pt")
    (tmp_path / "classes.txt").write_text("rot\ngrün\nblau\n")
    for index, name in enumerate(("r", "g", "b")):
        Image.new("RGB", (9, 9), tuple(255 * (channel == index) for channel in range(3))).save(f"{name}.png")
    for part in ("train", "test"):
        for index, name in enumerate(("blau", "grün", "rot")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            colour = tuple(255 * (channel == 2 - index) for channel in range(3))
            for number in range(2):
                Image.new("RGB", (9, 9), colour).save(tmp_path / "data" / part / name / f"{number}.png")
    return tmp_path


@pytest.mark.slow
def test_eval_finds_a_module_in_the_current_folder(here: Path) -> None:
    """Through the installed command, whose path does not have the current folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [COMMAND, "eval", "net.pt", "--arch", "mynet:build", "--classes", "classes.txt", "--image-size", "8",
               "--dataset", "folder", "--data-dir", "data", "--json", "report.json", *FAST]  # fmt: skip
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((here / "report.json").read_text())
    assert report["results"]["natural"]["accuracy"] == 1
    assert report["provenance"]["note"] == "labels were matched to logits by class name (all 3 classes)"


def test_train_finds_a_module_in_the_current_folder(here: Path) -> None:
    result = run("train", "--method", "standard", "--dataset", "folder", "--data-dir", "data", "--arch", "mynet:build",
                 "--image-size", 8, "--val-size", 2, "--batch-size", 2, "--epochs", 1, "--device", "cpu", "--dry-run"
                 )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mynet:build, 1 parameters" in result.output


def test_eval_of_a_run_does_not_import_from_the_current_folder(here: Path) -> None:
    """The architecture in a run's file is not the user's: it has to be on Python's path, and trusted."""
    trained = run("train", "--method", "standard", "--dataset", "folder", "--data-dir", "data", "--arch", "mynet:build",
                  "--image-size", 8, "--val-size", 2, "--batch-size", 2, "--epochs", 1, "--device", "cpu",
                  "--precision", "fp32", "--name", "net")  # fmt: skip
    assert trained.exit_code == 0, trained.output
    sys.path.remove(str(here))
    for name in ("mynet", "my_layers"):
        del sys.modules[name]
    refused = run("eval", "runs/net", *FAST, "--trust-code")
    assert refused.exit_code == 2
    assert "cannot be imported (No module named 'mynet')" in refused.stderr
    assert "PYTHONPATH=. adds the current folder" in refused.stderr


def test_import_from_current_folder_ignores_installed_packages_and_paths(here: Path) -> None:
    before = list(sys.path)
    for name in ("timm:resnet18", "wrn-10-1", "torchvision:resnet18", "no_such_module:net", "a/b:c", "json:loads"):
        import_from_current_folder(name)
    assert sys.path == before


def test_import_from_current_folder_names_what_fails(here: Path) -> None:
    (here / "broken.py").write_text("raise OSError('no weights\\nat all')")
    with pytest.raises(DeatError, match=r"^'broken:net' cannot be imported from .* \(OSError: no weights\)$"):
        import_from_current_folder("broken:net")


def test_predict_of_a_checkpoint(here: Path) -> None:
    result = run("predict", "net.pt", "r.png", "b.png", "--arch", "mynet:build", "--classes", "classes.txt",
                 "--image-size", 8, "--json", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    guesses = [each["guesses"][0] for each in json.loads(result.output)]
    assert [(guess["index"], guess["name"]) for guess in guesses] == [(0, "rot"), (2, "blau")]
    # Logits 2, 0, 0: e^2 / (e^2 + 2).
    assert guesses[0]["confidence"] == pytest.approx(0.786986, abs=1e-6)
    named = run("predict", "mynet:trained", "g.png", "--image-size", 8, "--json", "--device", "cpu")
    assert json.loads(named.output)[0]["guesses"][0]["name"] == "1"


def test_predict_says_which_state_dict_it_loaded(here: Path) -> None:
    torch.save({"model": {"scale": torch.tensor(2.0)}, "model_ema": {"scale": torch.tensor(-2.0)}}, here / "both.pt")
    given = ["predict", "both.pt", "r.png", "--arch", "mynet:build", "--num-classes", 3, "--image-size", 8, "--json",
             "--device", "cpu"]  # fmt: skip
    raw, averaged = run(*given), run(*given, "--weights-key", "model_ema")
    assert "note: loaded the weights under 'model'; the file also has 'model_ema'" in raw.stderr
    assert json.loads(raw.stdout)[0]["guesses"][0]["index"] == 0
    assert json.loads(averaged.stdout)[0]["guesses"][0]["index"] != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.pt"], "net.pt does not specify its network: give --arch"),
        (["net.pt", "--arch", "mynet:build"], "accepts images of several sizes (mynet:build): give --image-size"),
        (["net.pt", "--arch", "mynet:build", "--image-size", "8"], "give --classes or --num-classes"),
        (["mynet:trained", "--image-size", "8", "--classes", "two.txt"], "has 3 logits but 2 class names"),
        (["mynet:trained"], "give --image-size"),
        (["C:\\runs\\typo"], "C:\\runs\\typo does not exist"),
        (["net.pt", "--mean", "1,x"], "'1,x' is not a list of numbers; give numbers such as 0.485"),
    ],
)
def test_predict_says_what_is_missing(here: Path, arguments: list[str], message: str) -> None:
    (here / "two.txt").write_text("a\nb\n")
    result = run("predict", *arguments[:1], "r.png", *arguments[1:], "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr


def test_export_of_an_own_network_and_of_a_checkpoint(here: Path) -> None:
    program = ("--format", "torch-export", "--image-size", 8)
    for target, written in ((["mynet:trained"], "mynet-trained.pt2"), (["net.pt", "--arch", "mynet:build"], "net.pt2")):
        result = run("export", *target, *program, "--classes", "classes.txt")
        assert result.exit_code == 0, result.output
        assert "classes    rot, grün, blau" in result.output
        assert torch.export.load(here / written).module()(torch.ones(3, 3, 8, 8)).shape == (3, 3)
    refused = run("export", "net.pt", "--model-name", "Me2026Net", "--image-size", 8)
    assert refused.exit_code == 2
    assert "--image-size is only for --format onnx and torch-export: omit it" in refused.stderr


def test_image_size_of_an_export_cannot_be_changed(here: Path) -> None:
    folders = [here / kind / "cifar10" / "Linf" for kind in ("models", "model_info")]
    for folder in folders:
        folder.mkdir(parents=True)
    model = build_model("wrn-10-1", dataset="cifar10")
    (folders[0] / "Me2026Net.pt").write_bytes(robustbench_weights(model))
    (folders[1] / "Me2026Net.json").write_text('{"architecture": "WideResNet-10-1"}')
    given = ["predict", "models/cifar10/Linf/Me2026Net.pt", "r.png", "--device", "cpu", "--image-size"]
    refused = run(*given, 64)
    assert refused.exit_code == 2
    assert "--image-size 64 differs from the 32 pixels of models/cifar10/Linf/Me2026Net.pt: omit it" in refused.stderr
    assert run(*given, 32).exit_code == 0


def test_eval_with_a_named_normalization(here: Path) -> None:
    torch.save(build_model("wrn-10-1", num_classes=3).net.state_dict(), here / "wrn.pt")
    given = ["eval", "wrn.pt", "--arch", "wrn-10-1", "--dataset", "folder", "--data-dir", "data", *FAST]
    assert run(*given, "--normalize", "cifar10", "--json", "a.json").exit_code == 0
    numbers = ["--mean", "0.4914,0.4822,0.4465", "--std", "0.2471,0.2435,0.2616"]
    assert run(*given, *numbers, "--json", "b.json").exit_code == 0
    first, second = (json.loads((here / name).read_text()) for name in ("a.json", "b.json"))
    assert first["model_sha256"] == second["model_sha256"]
    assert first["provenance"]["normalization"].startswith("mean 0.4914")
