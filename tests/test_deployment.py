"""`deat_rb.deployment`: ONNX files and torch.export programs, served without deat_rb."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from training_problems import run_config

import deat_rb
from deat_rb import deployment
from deat_rb.cli import main
from deat_rb.deployment import deploy
from deat_rb.models.spec import model_spec
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra onnx")
MEAN, STD = (0.25, 0.5, 0.75), (0.5, 0.25, 0.125)


def mean_run(path: Path, scale: float = 3.0) -> Path:
    """A run directory whose network's logits are ``scale`` times the mean of each normalized channel."""
    path.mkdir()
    spec = model_spec("tiny_networks:Mean", num_classes=3, image_size=8, mean=MEAN, std=STD)
    config = run_config(method="pgd-7", image_size=8, arch=spec.arch, eps=8 / 255, network=spec, dataset="folder",
                        data_dir="/photos", data_fingerprint="d" * 64, versions={}, classes=("red", "green", "bläu"),
                        )  # fmt: skip
    (path / "config.json").write_text(config.model_dump_json())
    tensors = {"mu": torch.tensor(MEAN), "sigma": torch.tensor(STD), "net.scale": torch.full((3,), scale)}
    save_tensors(path / "last.safetensors",
                 {name: tensor.view(1, -1, 1, 1) if name != "net.scale" else tensor for name, tensor in tensors.items()}
                 )  # fmt: skip
    return path


def grey(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Images of the value 1/2: their logits are 3 (0.5 - 0.25) / 0.5, 0 and 3 (0.5 - 0.75) / 0.125."""
    return np.full((count, 3, 8, 8), 0.5, dtype=np.float32)


LOGITS = [1.5, 0.0, -6.0]


def names_this_machine(file: Path) -> bool:
    """Return whether a file has paths of source code, which the converters record for debugging."""
    data = file.read_bytes()
    return b"tiny_networks.py" in data or str(Path(deat_rb.__file__).parent).encode() in data


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)], prog_name="deat-rb")


@pytest.mark.slow  # importing onnxscript takes seconds
@needs_onnx
def test_deploy_onnx_serves_batches_of_any_size_with_the_normalization_inside(tmp_path: Path) -> None:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    run = mean_run(tmp_path / "run")
    done = cli(run, "--format", "onnx", "--output", tmp_path, "--trust-code")
    assert done.exit_code == 0, done.output
    assert "classes    red, green, bläu" in done.stdout
    assert "check      logits from onnxruntime differ by at most " in done.stdout
    assert done.stdout.endswith(f"written: {tmp_path / 'run.onnx'}\n")
    session = onnxruntime.InferenceSession(tmp_path / "run.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        logits = session.run(["logits"], {"images": grey(count)})[0]
        assert logits == pytest.approx(np.tile(LOGITS, (count, 1)), abs=1e-6)
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    assert not names_this_machine(tmp_path / "run.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["red", "green", "bläu"]
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == (list(MEAN), list(STD))
    assert (metadata["run"], metadata["method"], metadata["eps"], metadata["norm"]) == ("run", "pgd-7", "8/255", "Linf")
    assert metadata["input"] == "images: float32 (N, 3, 8, 8), RGB in [0, 1], not normalized"


def test_deploy_torch_export_saves_a_program(tmp_path: Path) -> None:
    deployed = deploy(mean_run(tmp_path / "run"), format="torch-export", output=tmp_path, trust_code=True)
    assert deployed.path == tmp_path / "run.pt2"
    assert deployed.classes == ("red", "green", "bläu")
    assert deployed.difference < 1e-5
    assert not names_this_machine(deployed.path)
    extra = {"metadata.json": ""}
    program = torch.export.load(str(deployed.path), extra_files=extra).module()
    for count in (1, 3):
        logits = program(torch.from_numpy(grey(count))).detach().numpy()
        assert logits == pytest.approx(np.tile(LOGITS, (count, 1)), abs=1e-6)
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == ["red", "green", "bläu"]


def test_deploy_refuses_a_file_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = deployment._torch_export

    def wrong(*arguments: Any, **options: Any) -> Any:
        content, run = convert(*arguments, **options)
        return content, lambda images: run(images) + 0.1

    monkeypatch.setattr(deployment, "_torch_export", wrong)
    with pytest.raises(DeatError, match=r"logits of the converted network differ by up to 0\.1 "):
        deploy(mean_run(tmp_path / "run"), format="torch-export", output=tmp_path, trust_code=True)
    assert not (tmp_path / "run.pt2").exists()


def test_deploy_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mean_run(tmp_path / "run")
    (tmp_path / "run.pt2").touch()

    def refusal(*arguments: object) -> str:
        done = cli(*arguments)
        assert done.exit_code == 2
        return done.stderr.splitlines()[-1].removeprefix("Error: ")

    program = ("--format", "torch-export", "--trust-code", "--output")
    assert refusal(run, "--format", "torch-export", "--output", tmp_path / "other.pt2").startswith(
        f"the run {run} builds its network with 'tiny_networks:Mean', which runs that module's code"
    )
    assert refusal(run, *program, tmp_path).startswith(f"{tmp_path / 'run.pt2'} exists: ")
    assert refusal(run, *program, tmp_path / "a.onnx").endswith("neither an existing folder nor a file name ending in "
                                                                 ".pt2")  # fmt: skip
    assert "does not exist: create it" in refusal(run, *program, tmp_path / "none" / "a.pt2")
    assert refusal(run, *program, tmp_path / "b.pt2", "--venue", "ICLR") == (
        "--venue is only for --format robustbench, not for torch-export: omit it"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(run, "--format", "onnx") == (
        "--format onnx needs onnx, onnxscript, onnxruntime, which must be installed: pip install 'deat-rb[onnx]'"
    )


def test_deploy_refuses_a_diverged_network(tmp_path: Path) -> None:
    run = mean_run(tmp_path / "run", scale=float("nan"))
    with pytest.raises(DeatError, match="returns NaN or infinity, so its training probably diverged"):
        deploy(run, format="torch-export", output=tmp_path, trust_code=True)


def test_load_model_gives_the_class_names(tmp_path: Path) -> None:
    model = deat_rb.load_model(mean_run(tmp_path / "run"), trust_code=True)
    assert model.classes == ("red", "green", "bläu")
    assert model(torch.from_numpy(grey(1)))[0].tolist() == pytest.approx(LOGITS)
