"""Runs, checkpoints and evaluations for the tests of the leaderboard, made without training or attacking anything."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from training_problems import run_config

from cli import main
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.report import AttackResult, Check, Report
from deat_rb.leaderboard import measure, submission, verify
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.models.spec import NormalizedModel, model_spec
from deat_rb.robustbench.format import ExportPaths
from deat_rb.utils import files, safe_load

NAME = "Wang2021Gradient"
SPEC = model_spec("wrn-10-1", dataset="digits")
SHARES = {"natural": 0.8, "fgsm": 0.6, "pgd-100": 0.5, "cw-20": 0.48, "autoattack": 0.4}
"""Of the examples, what every model has correct under every attack, as the fake evaluation finds it."""


@cache
def digits() -> Dataset:
    return load_data("digits")


@cache
def network(seed: int = 0) -> NormalizedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SPEC.build().eval()


def report_of(n: int, *, shares: dict[str, float] | None = None, checks: tuple[Check, ...] = (), eps: float = 0.1,
              places: Tensor | None = None, of: int | None = None, **rest: Any) -> Report:  # fmt: skip
    """Of n examples, or of those at ``places`` among the first ``of``: in each the first are correct."""
    places = torch.arange(n) if places is None else places
    verdicts = {name: places < round(share * (of or n)) for name, share in (shares or SHARES).items()}
    results = [AttackResult.of(name, correct, seconds=1.0, forwards=n, backwards=n)
               for name, correct in verdicts.items()]  # fmt: skip
    return Report.of(results, verdicts, eps=eps, num_classes=10, seed=0, batch_size=n, device="cpu",
                     versions={"torch": "2"}, checks=checks, **rest)  # fmt: skip


@cache
def places_of_digits() -> dict[bytes, int]:
    images, _ = digits().test.tensors()
    return {image.numpy().tobytes(): place for place, image in enumerate(images)}


class FakeEvaluation:
    """Stands in for `deat_rb.evaluation.evaluate.evaluate`; records its calls.

    Its shares are of the first examples, if it is given those, else of the first 500.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.shares = dict(SHARES)
        self.checks: tuple[Check, ...] = (Check(name="eval mode", status="pass", figure=0.0, sentence="Fine."),)

    def __call__(self, model: nn.Module, images: Tensor | LabeledImages, labels: Tensor, **options: Any) -> Report:
        if isinstance(images, LabeledImages):
            images = images.tensors()[0]
        self.calls.append({"n": len(images), "images": images, "labels": labels, **options})
        places = torch.tensor([places_of_digits()[image.numpy().tobytes()] for image in images])
        of = len(images) if torch.equal(places, torch.arange(len(images))) else 500
        report = report_of(
            len(images), shares=self.shares, checks=self.checks, eps=options["eps"], places=places, of=of
        )
        if "finish" in options:
            options["finish"](report)
        return report


def without_evaluating(monkeypatch: pytest.MonkeyPatch) -> FakeEvaluation:
    """Has boards take the fake evaluation and the digits from memory, and draw the same examples in every run."""
    fake, draw = FakeEvaluation(), random.Random(0)
    monkeypatch.setattr(measure, "evaluate", fake)
    monkeypatch.setattr(random, "SystemRandom", lambda: draw)
    for module in (submission, verify):
        monkeypatch.setattr(module, "load_board_dataset", lambda name, **where: digits())
    return fake


def make_run(path: Path, *, n: int = 500, seed: int = 0, evaluated: bool = True, **changes: Any) -> Path:
    """A run directory of two epochs of M-DEAT on the digits."""
    path.mkdir(parents=True)
    options = {"method": "m-deat", "image_size": 32, "arch": "wrn-10-1", "eps": 0.1, "network": SPEC,
               "data_fingerprint": digits().fingerprint, "versions": {"torch": "2.14.1"}}  # fmt: skip
    config = run_config(**{**options, **changes})
    (path / "config.json").write_text(config.model_dump_json())
    rows = [{"epoch": epoch, "steps": epoch, "backwards": 10.0 * epoch, "seconds": 1.5, "peak_memory": 1000 * epoch,
             "lr": 0.1, "val_acc": None, "stopped": None} for epoch in (1, 2)]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    safe_load.save_tensors(path / "last.safetensors", network(seed).state_dict())
    if evaluated:
        claim(path, n=n, seed=seed)
    return path


def claim(path: Path, *, n: int = 500, seed: int = 0, **changes: Any) -> None:
    """Writes a run's eval.json."""
    images, labels = digits().test.first(n).tensors()
    provenance = {
        "weights_sha256": files.sha256_file(path / "last.safetensors"),
        "data_sha256": digits().fingerprint,
    }
    fields: dict[str, Any] = {
        "provenance": provenance,
        "model_sha256": safe_load.sha256_tensors(network(seed).state_dict()),
        "examples_sha256": safe_load.sha256_tensors({"images": images, "labels": labels}),
    }
    report_of(n, **{**fields, **changes}).save(path)


INFO: dict[str, Any] = {
    "link": "https://arxiv.org/abs/2001.03994", "name": "Fast is better than free", "authors": "Eric Wong, Leslie Rice",
    "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10", "venue": "ICLR 2020",
    "architecture": "WideResNet-10-1", "eps": "8/255", "clean_acc": "80.00", "reported": "46.06",
    "autoattack_acc": "40.00",
}  # fmt: skip


def bare_state() -> dict[str, Tensor]:
    """As RobustBench's classes name it."""
    return {name.removeprefix("net."): tensor.clone() for name, tensor in network().state_dict().items()}


def make_checkpoint(folder: Path, model_name: str = "Wong2020Fast", state: Any = None, **changes: Any) -> Path:
    """A checkpoint in RobustBench's form, with its model_info where an export has it."""
    paths = ExportPaths.below(folder, "cifar10", model_name)
    for path in (paths.weights, paths.info):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(bare_state() if state is None else state, paths.weights)
    info = {key: value for key, value in {**INFO, **changes}.items() if value is not ...}
    paths.info.write_text(json.dumps(info))
    return paths.weights


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def submit(board: Board, target: Path, name: str = NAME, **options: Any) -> Entry:
    """Submit ``target``; options that `SubmissionMetadata` has are metadata, the others those of `Board.submit`."""
    metadata = {key: options.pop(key) for key in list(options) if key in SubmissionMetadata.__dataclass_fields__}
    return board.submit(target, SubmissionMetadata(model_name=name, **metadata), **options)


def entry_of(board: Board, name: str, *, replace: bool = False, **changes: Any) -> Entry:
    """Commit a changed copy of the entry `NAME`, without evaluating anything."""
    template = next(entry for entry in board.entries() if entry.model_name == NAME)
    entry = Entry.create({**dict(template), "model_name": name, "weights_file": None, **changes}, name)
    weights = None if entry.weights_file is None else (board.path / entry.weights_file).read_bytes()
    board.commit(entry, weights, replace=replace)
    return entry


def cli(*arguments: object) -> Result:
    """Gives the command these arguments."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="deat-rb")
