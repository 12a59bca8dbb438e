"""Guided training: the steps rise where l_X does, and stay where it falls or the weights are fixed."""

from __future__ import annotations

import pytest
import torch
from training_problems import Batch, images_and_labels, made

import deat_rb
from deat_rb.training.history import History


def batches(random_labels: bool) -> list[Batch]:
    """Images whose colour tells the class, or whose labels are random, so that they have to be memorized."""
    draw = torch.Generator().manual_seed(1)
    data = [images_and_labels(24, seed=seed) for seed in range(4)]
    if random_labels:
        data = [(images, torch.randint(0, 4, labels.shape, generator=draw)) for images, labels in data]
    return data


def trained(method: str, lr: float, random_labels: bool) -> History:
    trainer = deat_rb.create(method, made(), eps=4 / 255, gamma=1.05)
    return trainer.fit(batches(random_labels), epochs=12, lr=lr, lr_schedule="flat")


@pytest.mark.parametrize("method", [pytest.param("m+pgd", marks=pytest.mark.slow), "m-deat"])
def test_guided_training_follows_the_gradient_magnitude(method: str) -> None:
    rises = trained(method, 0.1, random_labels=True)
    # Labels that have to be memorized make the loss steeper around each image.
    assert rises.rows[-1].l_x > 2 * rises.rows[1].l_x
    assert rises.steps[:2] == [1, 2]
    assert rises.steps[-1] >= 6

    falls = trained(method, 0.1, random_labels=False)
    assert falls.rows[-1].l_x < 0.1 * falls.rows[1].l_x
    assert falls.steps == [1] + [2] * 11

    still = trained(method, 1e-9, random_labels=True)
    assert max(row.l_x for row in still.rows[2:]) < 1.05 * still.rows[1].l_x
    assert still.steps == [1] + [2] * 11
