"""A small float64 run for ranks; rank 0 writes the weights."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from training_problems import Positioned

import deat_rb
from deat_rb.utils import distributed

EPS = 8 / 255


def small_model() -> nn.Module:
    """Return a float64 network with a BatchNorm in eval mode, for 3x8x8 images of 4 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
    ).double()
    model[1].eval()
    return model


def data() -> Positioned:
    """Return five batches, of 7, 7, 7, 7 and 4 examples."""
    generator = torch.Generator().manual_seed(1)
    return Positioned(
        (torch.rand(size, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(size) % 4)
        for size in (7, 7, 7, 7, 4)
    )


def train(method: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights and the metrics after an epoch of five batches; ``ema`` in the name averages the weights.

    With ``awp`` they are perturbed.
    """
    model = small_model()
    name, _, option = method.partition(" ")
    trainer = deat_rb.create(name, model, eps=EPS, awp=0.1 if option == "awp" else None)
    if method.startswith("m"):
        trainer.steps = 2
    history = trainer.fit(data(), epochs=1, lr=0.1, lr_schedule="flat", ema=0.8 if option == "ema" else None)
    row = history.rows[0]
    metrics = [row.l_x, row.loss, row.train_acc, row.backwards, row.forwards, float(row.updates), float(row.examples)]
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, metrics


def write_freed(folder: Path, groups: list[weakref.ref[object]]) -> None:
    """Write whether the process group was freed; its threads would abort a process that exits."""
    (folder / f"left-{os.environ['RANK']}").write_text(str([group() is None for group in groups]))


def train_on_ranks(folder: Path, methods: Iterable[str]) -> None:
    """Train with each method and write weights and metrics to ``<folder>/<method>.safetensors``."""
    groups: list[weakref.ref[object]] = []
    atexit.register(write_freed, folder, groups)  # registered first, so that it runs after what `world` registers
    distributed.world(cpu=True)
    groups.append(weakref.ref(dist.group.WORLD))
    for method in methods:
        weights, metrics = train(method)
        if distributed.is_main():
            save_file(
                {**weights, "metrics": torch.tensor(metrics, dtype=torch.float64)}, folder / f"{method}.safetensors"
            )
