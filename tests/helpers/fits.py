"""Short calls of `fit` on a small network, and what to compare of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from training_problems import Batch, loader, made

import deat_rb
import deat_rb.methods

EPS = 8 / 255


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def fitted(name: str = "pgd-1", data: Any = None, **options: Any) -> dict[str, Tensor]:
    model = made()
    deat_rb.create(name, model).fit(data or loader(), **{"epochs": 2, "lr": 0.05, **options})
    return weights(model)


class Generated:
    """An iterable without a length whose batches are made on the way."""

    def __iter__(self) -> Iterator[Batch]:
        yield from loader()
