"""Training steps of the package beside those of the reference loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from reference_loops import (
    Batch,
    run,
)
from torch import nn
from torch.optim import SGD

import deat_rb
import deat_rb.methods
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats
from deat_rb.training.place import Place
from deat_rb.training.trainer import Trainer
from deat_rb.utils.seeding import seed_global

LR = 0.1


SIZES = (8, 8, 5, 8, 3)


CASES = [
    ("standard", None),
    ("free-1", None),
    ("free-4", None),
    ("deat-3", 1),
    ("deat-3", 3),
    ("deat-40%", 1),
    ("deat-40%", 3),
    ("m-deat", 1),
    ("m-deat", 3),
    ("pgd-3", None),
    ("pgd-7", None),
    ("m+pgd", 1),
    ("m+pgd", 3),
    ("m+pgd", 6),
    ("u-fgsm", None),
    ("m+u-fgsm", None),
    ("n-fgsm", None),
    ("m+n-fgsm", None),
    ("gradalign", None),
    ("amata-2-10", None),
    ("amata-2-10", 5),
    ("yopo-5-3", None),
    ("yopo-2-1", None),
    ("fgsm-pgi", None),
    ("liet", None),
    ("fat-5", None),
    ("trades", None),
    ("f+trades", None),
    ("m+trades", 1),
    ("m+trades", 3),
    ("m+trades", 6),
    ("mart", None),
    ("f+mart", None),
    ("m+mart", 1),
    ("m+mart", 3),
    ("m+mart", 6),
]


def network(seed: int = 0) -> nn.Sequential:
    """A small network with BatchNorm, in double precision: the sign of a gradient must not depend on rounding."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    return net.double().train()


def batches(sizes: Sequence[int] = SIZES) -> list[Batch]:
    """Images of which a third of the pixels lie on the bounds; labels that the network can learn, by colour."""
    draw = torch.Generator().manual_seed(7)
    made = []
    for size in sizes:
        labels = torch.randint(0, 4, (size,), generator=draw)
        images = torch.rand(size, 3, 8, 8, generator=draw, dtype=torch.float64) * 1.5 - 0.25
        images[:, 0] += 0.3 * (labels % 2).reshape(-1, 1, 1)
        images[:, 1] -= 0.3 * (labels // 2).reshape(-1, 1, 1)
        made.append((images.clamp(0, 1), labels))
    return made


def seed_batch(epoch: int, batch: int) -> None:
    seed_global(11, "batch", epoch, batch)


def backward_and_step(
    trainer: Trainer, data: Sequence[Batch], epoch: int, optimizer: SGD, epochs: int = 1
) -> list[BatchStats]:
    done: list[BatchStats] = []
    first, total = 0, sum(len(labels) for _, labels in data)
    for i, (images, labels) in enumerate(data):
        seed_batch(epoch, i)
        kept = images.clone()
        rows = torch.arange(first, first + len(images))
        passes = trainer.begin_batch(images, Place(epoch + 1, epochs, i, len(images), 4, rows, total), Engine("cpu"))
        stats = trainer.training_step(images, labels, optimizer)
        done.append(replace(stats, forwards=stats.forwards + passes, backwards=stats.backwards + passes))
        assert torch.equal(images, kept)
        first += len(images)
    return done


def sgd(model: nn.Module, lr: float = LR) -> SGD:
    return SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    for key, value in expected.state_dict().items():
        assert torch.allclose(actual.state_dict()[key], value, rtol=0, atol=1e-9), key


def assert_trains_as_the_reference_loop(name: str, steps: int | None) -> None:
    expected, actual = network(), network()
    (epoch,) = run(name, expected, [batches()], lr=LR, seed_batch=seed_batch, start_steps=steps)

    trainer = deat_rb.create(name, actual, eps=8 / 255)
    if steps is not None:
        trainer.steps = steps
    done = backward_and_step(trainer, batches(), 0, sgd(actual))

    assert_same_state(actual, expected)
    assert sum(stats.examples for stats in done) == epoch.examples == sum(SIZES)
    assert sum(float(stats.l_x) for stats in done) == pytest.approx(epoch.l_x, rel=1e-6)
    assert sum(float(stats.loss) for stats in done) == pytest.approx(epoch.loss, rel=1e-6)
    assert sum(int(stats.correct) for stats in done) == epoch.correct
    assert sum(float(stats.forwards) for stats in done) == pytest.approx(epoch.forwards)
    assert sum(float(stats.backwards) for stats in done) == pytest.approx(epoch.backwards)
    assert sum(stats.updates for stats in done) == epoch.updates
