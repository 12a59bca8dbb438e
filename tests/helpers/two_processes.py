"""What tests/utils/test_distributed.py has torchrun start: a small run in float64, whose weights process 0 writes."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import deat_rb
from deat_rb.utils import distributed

EPS = 8 / 255


def small_model() -> nn.Module:
    """Convolution, BatchNorm and a linear layer on 3x8x8 images of 4 classes, in float64, BatchNorm in eval."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
    ).double()
    model[1].eval()
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    """Five batches of 7, 7, 7, 7 and 4 examples."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(size, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(size) % 4)
        for size in (7, 7, 7, 7, 4)
    ]


def train(method: str) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after an epoch of five batches, and l_X and the passes."""
    model = small_model()
    trainer = deat_rb.create(method, model, eps=EPS)
    if method.startswith("m"):
        trainer.steps = 2
    history = trainer.fit(data(), epochs=1, lr=0.1, lr_schedule="flat")
    row = history.rows[0]
    figures = [row.l_x, row.loss, row.train_acc, row.backwards, row.forwards, float(row.updates), float(row.examples)]
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, figures


def left(folder: str, groups: list[weakref.ref[object]]) -> None:
    """Writes whether nothing has held the group of all processes, whose threads would abort a process that ends."""
    Path(folder, f"left-{os.environ['RANK']}").write_text(str([group() is None for group in groups]))


def main() -> None:
    """Trains by each method named, and writes ``<folder>/<method>.safetensors`` with the weights and the figures."""
    folder, methods = sys.argv[1], sys.argv[2:]
    groups: list[weakref.ref[object]] = []
    atexit.register(left, folder, groups)  # to be called after what `world` registers
    distributed.world(cpu=True)
    groups.append(weakref.ref(dist.group.WORLD))
    for method in methods:
        weights, figures = train(method)
        if distributed.is_main():
            save_file(
                {**weights, "figures": torch.tensor(figures, dtype=torch.float64)}, f"{folder}/{method}.safetensors"
            )


if __name__ == "__main__":
    main()
