"""Loaders that `fit` accepts and refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import Generated, equal, fitted, weights
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training_problems import images_and_labels, loader, made, run_config

import deat_rb
import deat_rb.methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.dataloading import ShardedLoader
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError


def test_fit_takes_any_iterable_of_batches() -> None:
    expected = fitted()
    images, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    assert equal(fitted(data=tuple(loader())), expected)
    assert equal(fitted(data=Generated()), expected)
    assert equal(fitted(data=DataLoader(TensorDataset(images, labels), batch_size=6)), expected)
    assert not equal(expected, weights(made()))


def test_epoch_batches_calls_set_epoch() -> None:
    epochs: list[int] = []

    class SetsEpoch(Generated):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    fitted(data=SetsEpoch(), epochs=3)
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("make_loader", [lambda: iter(loader()), lambda: (batch for batch in loader())])
def test_fit_refuses_an_iterator(make_loader: Any) -> None:
    with pytest.raises(DeatError, match="is an iterator, which is exhausted after one epoch"):
        fitted(data=make_loader())


IMAGES, LABELS = images_and_labels()


BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "over one": ((IMAGES * 255, LABELS), r"must be in \[0, 1\], not in .*move normali[sz]ation into the model"),
    "under zero": ((IMAGES - 0.5, LABELS), r"must be in \[0, 1\]"),
    "NaN": ((IMAGES / 0 * 0, LABELS), "NaN"),
    "label too high": ((IMAGES, LABELS + 1), "label 4 is out of range: labels must be 0 to 3"),
    "label negative": ((IMAGES, LABELS - 1), "label -1 is out of range"),
    "bytes": (((IMAGES * 255).byte(), LABELS), "floating-point"),
    "fewer labels": ((IMAGES, LABELS[1:]), "there are 6 images but 5 labels"),
    "float labels": ((IMAGES, LABELS.float()), "int64"),
    "one image": ((IMAGES[0], LABELS[:1]), r"\(N, C, H, W\)"),
    "numpy": ((IMAGES.numpy(), LABELS.numpy()), "must yield pairs of tensors"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_check_first_batch_refuses_before_anything_is_written(case: str, tmp_path: Path) -> None:
    batch, message = BAD_BATCHES[case]
    model, run = made(), RunDirectory.create(tmp_path / "run", run_config())
    before = weights(model)
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", model).fit([batch], epochs=1, run=run)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json"]
    assert equal(weights(model), before)


@pytest.mark.parametrize("case", ["over one", "NaN", "label too high"])
def test_materialize_refuses_bad_validation_images(case: str) -> None:
    batch, message = BAD_BATCHES[case]
    model = made()
    before = weights(model)
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", model).fit(loader(), [batch], epochs=1, lr=0.1)
    assert equal(weights(model), before)


def test_sharded_loader_refuses_a_batch_smaller_than_the_ranks() -> None:
    shares = ShardedLoader(
        [(torch.zeros(5, 3, 4, 4), torch.zeros(5)), (torch.zeros(3, 3, 4, 4), torch.zeros(3))], World(1, 4)
    )
    batches = shares.epoch_batches(1, 0, 0, lambda batch, number: batch)
    assert len(next(batches)[0][1]) == 1
    with pytest.raises(DeatError, match="a batch of 3 images cannot be split among 4 ranks; drop"):
        next(batches)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are darkened by a random factor."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw
        self.images, self.labels = images_and_labels()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] * self.draw(), self.labels[index]


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_fit_seeds_the_generators_with_which_loaders_augment(draw: Callable[[], float]) -> None:
    """In training and in validation; what the caller draws next does not depend on training."""
    results = []
    for first in (1, 2):
        random.seed(first)
        np.random.seed(first)
        expected = [draw(), draw()]
        random.seed(first)
        np.random.seed(first)
        data = DataLoader(Augmented(draw), batch_size=3)
        assert draw() == expected[0]
        history = deat_rb.create("pgd-1", made()).fit(data, data, epochs=2, lr=0.1, seed=3)
        assert draw() == expected[1]
        results.append([(row.loss, row.l_x, row.val_acc) for row in history.rows])
    assert results[0] == results[1]
