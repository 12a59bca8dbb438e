"""A board of made-up entries: none of their accuracies was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.entry import Accuracy, Entry
from deat_rb.models.spec import ModelSpec

NOTE = "Made up for the tests: nothing here was measured."
ATTACKS = ("natural", "fgsm", "pgd-100", "cw-20", "autoattack")


def model_spec(arch: str, num_classes: int = 10) -> ModelSpec:
    return ModelSpec(arch=arch, num_classes=num_classes, mean=(0.5,) * 3, std=(0.25,) * 3)


def metrics(epochs: int) -> tuple[dict[str, int | float | None], ...]:
    """Epochs in which the accuracies and l_X rise, and the steps with every third epoch."""
    return tuple(
        {
            "epoch": epoch,
            "steps": 1 + epoch // 3,
            "l_x": 1000.0 + 450.0 * epoch + 90.0 * (epoch % 3),
            "train_acc": 0.8 - 0.6 / epoch,
            "val_acc": 0.95 - 0.6 / epoch,
            "val_robust_acc": 0.75 - 0.55 / epoch if epoch % 2 else None,
        }
        for epoch in range(1, epochs + 1)
    )


def entry(
    name: str = "Doe2021Made_A",
    method: str = "m+trades",
    correct: tuple[int, ...] = (490, 433, 416, 405, 400),
    backward_passes: float | None = 1121.0,
    **fields: Any,
) -> Entry:
    """An entry of digits; ``correct`` are the counts under `ATTACKS`, of ``n_examples``."""
    n_examples = fields.get("n_examples", 500)
    counts = zip(ATTACKS, correct, strict=False)
    figures = {attack: Accuracy(n_correct=count, n_examples=n_examples) for attack, count in counts}
    known: dict[str, Any] = {
        "link": "https://arxiv.org/abs/2103.03076",
        "name": "Gradient-Guided Dynamic Efficient Adversarial Training",
        "authors": "Jane Doe, John Roe",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "digits",
        "venue": "arXiv, Mar 2021",
        "architecture": "WideResNet-10-1",
        "eps": "0.1",
        "clean_acc": figures["natural"].percent if figures else None,
        "autoattack_acc": figures["autoattack"].percent if "autoattack" in figures else None,
        "model_name": name,
        "kind": "measured",
        "dataset_note": NOTE,
        "method": method,
        "setting": "standard",
        "steps": (1, 1, 2, 2, 2, 3, 3, 3, 4, 4),
        "epochs": 10,
        "backward_passes": backward_passes,
        "train_seconds": 99.0,
        "hardware": "2 CPU cores",
        "peak_memory": 410 * 2**20,
        "figures": figures,
        "n_examples": n_examples,
        "n_test": 500,
        "checks": (
            Check(name="gradients", status="pass", figure=0.0, sentence="No image has a zero gradient."),
            Check(name="more steps", status="warn", figure=0.4, sentence="Ten times the steps take 0.4 points more."),
        ),
        "metrics": metrics(10),
        "command": f"deat-rb train --name {name} --method {method} --epochs 10",
        "seed": 0,
        "model": model_spec("wrn-10-1"),
        "classes": tuple("0123456789"),
        "weights_sha256": "ab" * 32,
        "weights_file": f"weights/{fields.get('dataset', 'digits')}/Linf/{name}.safetensors",
        "data_sha256": "cd" * 32,
        "versions": {"python": "3.11.9", "torch": "2.14.1"},
        "evaluated_on": "cuda",
        "evaluated_with": {"python": "3.12.1", "torch": "2.14.2"},
        "submitted": "2026-01-31",
    }
    return Entry(**{**known, **fields})


def cifar(name: str, method: str, correct: tuple[int, ...], backward_passes: float, **fields: Any) -> Entry:
    """An entry of CIFAR-10 at 8/255."""
    known = {"dataset": "cifar10", "eps": "8/255", "n_examples": 10_000, "n_test": 10_000, "setting": "fast",
             "architecture": "PreActResNet-18", "model": model_spec("preactresnet18"), "train_seconds": 4000.0,
             "hardware": "a GPU that is not there"}  # fmt: skip
    return entry(name, method, correct, backward_passes, **{**known, **fields})


def board() -> list[Entry]:
    """Eleven models on two data sets, one of them evaluated in part and one published."""
    return [
        entry("Doe2021Made_MTRADES", "m+trades", (490, 433, 416, 405, 404), 1121.0, train_seconds=99.0),
        entry("Doe2021Made_TRADES", "trades", (488, 436, 419, 409, 407), 2090.0, train_seconds=171.0),
        entry("Doe2021Made_FreeEight", "free-8", (481, 410, 390, 380, 377), 1520.0, train_seconds=140.0),
        entry("Doe2021Made_UFGSM", "u-fgsm", (492, 420, 380, 372, 368), 380.0, train_seconds=35.5),
        entry("Doe2021Made_Plain", "standard", (498, 12, 0, 0, 0), 190.0, train_seconds=22.0, unreliable=False,
              footnote="Trained without an attack."),
        entry("Doe2021Made_MDEAT", "m-deat", (489, 428, 401, 396, 391), 640.0, train_seconds=60.0, external="77.90"),
        entry("Doe2021Made_NoAA", "pgd-7", (480, 421, 404), 1520.0, train_seconds=None),
        entry("Doe2021Made_Part", "mart", (196, 171, 166, 161, 160), 2090.0, n_examples=200),
        cifar("Roe2022Made_MDEAT", "m-deat", (7990, 4981, 4340, 4331, 4120), 12903.0),
        cifar("Roe2022Made_PGD", "pgd-7", (7090, 4637, 4317, 4101, 4002), 31280.0, train_seconds=9050.0),
        cifar("Roe2022Made_FREE", "free-4", (7846, 4952, 4397, 4316, 4090), 15640.0, additional_data=True),
        entry("Poe2020Claimed_R18", "trades", (), None, kind="published", dataset="cifar10", eps="8/255",
              clean_acc="82.10", autoattack_acc="49.50", n_examples=None, n_test=None, model=None, weights_sha256=None,
              weights_file=None, data_sha256=None, checks=(), metrics=(), steps=None, train_seconds=None,
              hardware=None, command=None),
    ]  # fmt: skip


def write(folder: Path, entries: list[Entry]) -> Path:
    """Writes entries where a board has them, and gives back the board."""
    for each in entries:
        path = folder / "entries" / f"{each.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(each.json_bytes())
    return folder
