"""Small runs to interrupt and resume, and the parts of a run to compare."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import torch
import torchattacks
from training_problems import images_and_labels, normalized

import deat_rb
from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.callbacks import Callback
from deat_rb.training.history import History
from deat_rb.training.metrics import EpochAccumulator
from deat_rb.training.trainer import Trainer

TIMES = {"seconds", "val_seconds", "images_per_second", "peak_memory"}


EPOCHS, BATCHES = 3, 4


class Stops(Callback):
    """Send this process a signal after ``after`` batches, and keep the warnings.

    Runs this short collapse to one class; that warning is left out.
    """

    def __init__(self, after: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.left = after
        self.number = number
        self.warnings: list[str] = []

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def on_warning(self, message: str) -> None:
        if "collapsed" not in message:
            self.warnings.append(message)


def train(
    method: str, run: RunDirectory, callback: Callback | None = None, augmentation: str = "crop-flip", **options: Any
) -> History:
    images, labels = images_and_labels(22)
    data = ImageSet((255 * images).round().to(torch.uint8), labels)
    # Four batches, the last one short.
    train_loader = Batches(
        data, 6, shuffle=True, augmentation=augmentation, num_classes=int(labels.max()) + 1,
        memory_format=torch.channels_last,
    )  # fmt: skip
    model = normalized()
    if method == "torchattacks.PGD":
        trainer: Trainer = deat_rb.AttackTrainer(torchattacks.PGD(model, steps=2))
    else:
        name, _, option = method.partition(" ")
        trainer = deat_rb.create(
            name,
            model,
            **({"steps": 2} if name in ("trades", "mart") else {}),
            **({"awp": 0.02, "awp_warmup": 1} if option == "awp" else {}),
            **({"eps_warmup": 2} if option == "eps-warmup" else {}),
        )
    return trainer.fit(
        train_loader,
        [images_and_labels(4)],
        epochs=EPOCHS,
        lr=0.1,
        precision="bf16",
        run=run,
        callbacks=[callback] if callback else [],
        **options,
    )


def outcome(run: RunDirectory) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Return the files of weights and all metrics except times and memory."""
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return (run.path / "last.safetensors").read_bytes(), (run.path / "best.safetensors").read_bytes(), metrics
