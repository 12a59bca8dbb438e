"""Examples in README and docs are run, and their tables are compared with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from docs_examples import replaced
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import deat_rb
from deat_rb import build_model
from deat_rb.methods.describe import markdown_table
from deat_rb.training.engine import Engine

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "from_torchattacks.ipynb"


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: deat_rb\.(\w+)$", page, re.MULTILINE)) == set(deat_rb.__all__) - {"__version__"}


@pytest.mark.slow
def test_the_notebook_runs_on_few_images(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    small = {"data.train.tensors()": "data.train.first(64).tensors()", "first(200)": "first(4)",
             "epochs=6": "epochs=1", "epochs=12": "epochs=2", "epochs=4": "epochs=2", "[::3]": "",
             "pgd-50": "pgd-5", "cw-20": "cw-5"}  # fmt: skip
    names: dict[str, Any] = {}
    exec(compile(replaced(program, small), NOTEBOOK, "exec"), names)
    assert set(names["report"].results) == {"natural", "fgsm", "pgd-5", "cw-5"}
    printed = capsys.readouterr().out
    assert re.findall(r"^epoch \d: steps \d", printed, re.MULTILINE) == ["epoch 1: steps 1", "epoch 2: steps 2"] * 2
    assert len(re.findall(r"^PGD-20 [\d.]+%", printed, re.MULTILINE)) == 2


@pytest.mark.nightly
def test_the_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    # In a process of its own: other tests of this worker may have replaced the event loop or closed its sockets.
    program = "from nbclient.cli import main; main()"
    command = [sys.executable, "-c", program, "--timeout=600", f"--output={tmp_path / 'out.ipynb'}", str(NOTEBOOK)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((tmp_path / "out.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))
    plain, robust = (float(text) for text in re.findall(r"^PGD-20 ([\d.]+)%", printed, re.MULTILINE))
    assert plain < 10
    assert robust > 40


def readme_example(changes: dict[str, str]) -> dict[str, Any]:
    """Run README's example with other words; return its names."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(replaced(block, changes), "README.md", "exec"), names)
    return names


@pytest.mark.slow
def test_readme_example_runs_on_few_images() -> None:
    names = readme_example({"data.train.tensors()": "data.train.first(64).tensors()", "first(100)": "first(4)"})
    assert len(names["history"].rows) == 4
    assert set(names["report"].results) == {"natural", "fgsm", "pgd-20"}


@pytest.mark.nightly
def test_readme_example_trains_a_robust_network() -> None:
    assert readme_example({})["report"].results["pgd-20"].accuracy > 0.3


def saved_per_image(precision: Literal["bf16", "fp32"]) -> float:
    """Return the MiB per image that autograd saves in a forward pass of PreActResNet-18, without weights."""
    model = build_model("preactresnet18", num_classes=10).train().to(memory_format=torch.channels_last)
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    taken = []
    for count in (2, 3):
        saved: dict[int, Tensor] = {}
        with Engine("cpu", precision).autocast(), saved_tensors_hooks(partial(_save, saved), lambda tensor: tensor):
            model(torch.rand(count, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_())
        taken.append(sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in weights))
    return (taken[1] - taken[0]) / 2**20


def _save(saved: dict[int, Tensor], tensor: Tensor) -> Tensor:
    saved[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


@pytest.mark.slow
def test_memory_in_large_scale_is_what_autograd_saves() -> None:
    text = (ROOT / "docs" / "large_scale.md").read_text()
    row = re.search(r"^\| `preactresnet18`.* \| ([\d.]+) MiB \| ([\d.]+) MiB \|$", text, re.MULTILINE)
    assert row is not None
    assert [float(row[1]), float(row[2])] == pytest.approx([saved_per_image("bf16"), saved_per_image("fp32")], abs=0.06)


def test_the_methods_table_of_the_docs_is_generated() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text.partition("<!-- methods -->\n")[2].partition("<!-- /methods -->")[0] == markdown_table()
