"""Every Python example of README and docs runs, with small files in place of the reader's own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from board_problems import FakeEvaluation, make_run, network, submit
from export_runs import Run, opened
from PIL import Image
from training_problems import run_config

import deat_rb
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import RobustBenchInfo
from deat_rb.leaderboard.robustbench_export import export_board
from deat_rb.models.spec import model_spec
from deat_rb.reproduction.study import read_study
from deat_rb.utils.safe_load import save_tensors

ROOT = Path(__file__).parents[1]

RUN_ELSEWHERE = {
    "README.md": {1: "tests/test_docs.py"},
    "docs/own_method.md": dict.fromkeys((1, 2, 3, 4), "tests/methods/test_own_method.py"),
    "docs/training_loop.md": dict.fromkeys((1, 2), "tests/training/test_own_loop.py"),
}
"""Examples, by their number in the page, whose results another test looks at."""

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def examples_of(text: str) -> list[str]:
    """Return the Python programs of a page: blocks of Python, and arguments of ``python -c`` in blocks of shell."""
    found = []
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append(block)
        elif "python -c" in block:
            words = shlex.split(block, comments=True)
            found += [words[i + 2] for i, word in enumerate(words[:-2]) if (word, words[i + 1]) == ("python", "-c")]
    return found


def examples() -> list[tuple[str, int, str]]:
    """Return each example's page, number in the page, and text."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [(str(page.relative_to(ROOT)), number, example) for page in pages
            for number, example in enumerate(examples_of(page.read_text(encoding="utf-8")), 1)]  # fmt: skip


def run_example(example: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Run a program in a folder; return its names."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(example, "an example", "exec"), names)
    return names


EXAMPLES = {(page, number): text for page, number, text in examples()}
HERE: dict[tuple[str, int], Callable[..., None]] = {}


def runs(page: str, number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for the test that runs an example."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        HERE[page, number] = test
        return test

    return decorate


def test_every_python_example_is_run_by_a_test() -> None:
    elsewhere = {(page, number) for page, numbers in RUN_ELSEWHERE.items() for number in numbers}
    assert elsewhere.isdisjoint(HERE)
    assert set(EXAMPLES) == elsewhere | set(HERE)
    for page, numbers in RUN_ELSEWHERE.items():
        for test in numbers.values():
            assert Path(page).name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not run {page}"


def test_examples_of_a_page_are_blocks_and_programs_of_the_shell() -> None:
    page = "```python\na = 1\n```\n```bash\n$ ls  # it's\npython -c 'b = 2\nc = \"3\"' && ls\n```\n```json\n{}\n```\n"
    assert examples_of(page) == ["a = 1\n", 'b = 2\nc = "3"']


# The pages


def exported(folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Export a made-up run to ``folder``."""
    run = opened(Run(tmp_path / "run"), monkeypatch)
    deat_rb.export(run.path, model_name=name, output=folder)
    return run


@runs("README.md", 2)
def test_readme_loads_an_export_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = exported(tmp_path / "FOLDER", "Wang2021Gradient_R18", tmp_path, monkeypatch)
    names = run_example(EXAMPLES["README.md", 2], monkeypatch, tmp_path)
    torch.testing.assert_close(names["model"].eval()(IMAGES), run.model(IMAGES))


@runs("docs/guides/robustbench.md", 1)
def test_robustbench_guide_loads_an_export_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = exported(tmp_path / "robustbench", "Doe2026Robust_WRN-34-10", tmp_path, monkeypatch)
    names = run_example(EXAMPLES["docs/guides/robustbench.md", 1], monkeypatch, tmp_path)
    torch.testing.assert_close(names["model"].eval()(IMAGES), run.model(IMAGES))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``NAME.onnx``, ``NAME.pt2`` and a reddish ``photo.jpg``; the network's logits are the means of red,
    green and blue."""
    folder = tmp_path_factory.mktemp("served")
    spec = model_spec("tiny_networks:Mean", num_classes=3, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    run = folder / "NAME"
    run.mkdir()
    config = run_config(method="pgd-7", image_size=8, arch=spec.arch, eps=8 / 255, network=spec, dataset="folder",
                        data_dir="/photos", data_fingerprint="d" * 64, versions={}, classes=("red", "green", "blue"),
                        )  # fmt: skip
    (run / "config.json").write_text(config.model_dump_json())
    save_tensors(run / "last.safetensors", {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1),
                                            "net.scale": torch.ones(3)})  # fmt: skip
    deat_rb.deploy(run, format="torch-export", output=folder / "NAME.pt2", trust_code=True)
    Image.new("RGB", (20, 12), (200, 90, 30)).save(folder / "photo.jpg")
    return folder


@pytest.mark.slow  # importing onnxscript takes seconds
@runs("docs/deployment.md", 1)
def test_deployment_classifies_a_photo_with_onnxruntime(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    deat_rb.deploy(served / "NAME", format="onnx", output=served / "NAME.onnx", trust_code=True)
    capsys.readouterr()
    run_example(EXAMPLES["docs/deployment.md", 1], monkeypatch, served)
    assert capsys.readouterr().out == "red\n"
    (served / "dark").mkdir(exist_ok=True)
    (served / "dark" / "NAME.onnx").write_bytes((served / "NAME.onnx").read_bytes())
    Image.new("I;16", (20, 12), 700).save(served / "dark" / "photo.jpg", format="PNG")
    with pytest.raises(ValueError, match="more than 8 bits per value"):
        run_example(EXAMPLES["docs/deployment.md", 1], monkeypatch, served / "dark")


@pytest.mark.slow  # torch.export takes seconds
@runs("docs/deployment.md", 2)
def test_deployment_loads_a_program(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_example(EXAMPLES["docs/deployment.md", 2], monkeypatch, served)
    assert names["classes"] == ["red", "green", "blue"]
    blue = torch.tensor([0.1, 0.2, 0.9]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    assert names["model"](blue).argmax(dim=1).tolist() == [2, 2]


@runs("docs/sharing.md", 1)
def test_sharing_loads_a_model_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server.running() as server:
        hub_server.use(server, tmp_path / "cache", monkeypatch)
        run = make_run(tmp_path / "run")
        deat_rb.push(run, "hf:owner/name", license="mit")
        names = run_example(EXAMPLES["docs/sharing.md", 1], monkeypatch, tmp_path)
    assert torch.equal(names["model"](IMAGES), deat_rb.load_model(run)(IMAGES))


@pytest.mark.slow  # attacks 200 images
@runs("docs/lab/benchmarks.md", 1)
def test_benchmarks_count_how_full_batches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES["docs/lab/benchmarks.md", 1]
    run_example(example.replace("autoattack=True", "autoattack=False"), monkeypatch, tmp_path)
    assert "pgd-100" in capsys.readouterr().out


M_DEAT = ROOT / "leaderboard/entries/cifar10-jpeg/Linf/Wang2021Gradient_M-DEAT_WRN-10-1.json"


@runs("docs/sharing.md", 2)
def test_sharing_loads_an_entry_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_example(EXAMPLES["docs/sharing.md", 2], monkeypatch, ROOT)
    assert not names["model"].training
    assert names["model"](IMAGES).shape == (2, 10)


@runs("docs/sharing.md", 3)
def test_sharing_loads_an_entry_through_robustbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_board(ROOT / "leaderboard", tmp_path / "zoo", dataset="cifar10-jpeg", as_dataset="cifar10")
    names = run_example(EXAMPLES["docs/sharing.md", 3], monkeypatch, tmp_path)
    torch.testing.assert_close(names["model"].eval()(IMAGES), deat_rb.load_model(M_DEAT)(IMAGES))


@runs("docs/leaderboard.md", 1)
def test_leaderboard_loads_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES["docs/leaderboard.md", 1].replace("NAME", "Wang2021Gradient_DEAT-3_WRN-10-1")
    names = run_example(example, monkeypatch, ROOT)
    assert names["model"](IMAGES).shape == (2, 10)


@runs("docs/leaderboard.md", 2)
def test_leaderboard_loads_an_entry_of_ones_own_through_robustbench(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(board, make_run(tmp_path / "run"), "Wang2021Gradient_R18")
    export_board(board.path, tmp_path / "DIR", as_dataset="cifar10")
    names = run_example(EXAMPLES["docs/leaderboard.md", 2], monkeypatch, tmp_path)
    torch.testing.assert_close(names["model"].eval()(IMAGES), network()(IMAGES))


@runs("docs/shared_cpu.md", 1)
def test_shared_cpu_sets_the_threads_before_torch_is_loaded() -> None:
    text = EXAMPLES["docs/shared_cpu.md", 1]
    shown = (
        "import os, sys; print('torch' in sys.modules, sorted({'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & {*os.environ}))"
    )
    unset = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", f"{text}\n{shown}"], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() in ("False ['GOMP_SPINCOUNT']", "False ['OMP_WAIT_POLICY']"), done.stderr


# Files shown in the pages


def block(page: str, language: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert isinstance(found, str)
    return found


def test_the_study_of_the_docs_is_read(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(block("docs/studies.md", "toml"))
    study = read_study(tmp_path / "study.toml")
    assert len(study.runs) == 3 * (2 * 2 + 1)  # seeds x (grid + the single run)


def test_the_model_info_of_the_docs_is_valid() -> None:
    info = RobustBenchInfo.model_validate(json.loads(block("docs/leaderboard.md", "json")))
    assert (info.dataset, info.autoattack_acc) == ("cifar10", "43.21")
