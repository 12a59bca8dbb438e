"""Surrogate losses of one's own."""

from __future__ import annotations

from typing import Any

import pytest
from fits import equal, weights
from torch import Tensor, nn
from training_problems import loader, made

import deat_rb
from deat_rb.methods import AttackTrainer
from deat_rb.methods.losses import weighted as weigh
from deat_rb.training import SurrogateLoss
from deat_rb.utils.errors import DeatError


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def per_class(logits: Tensor, labels: Tensor) -> Tensor:
    targets = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


@pytest.mark.parametrize(("function", "shape"), [(mean, r"\(\)"), (per_class, r"\(2, 4\)")])
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_refuses_a_loss_that_is_not_per_image(function: Any, shape: str, weighted: bool) -> None:
    loss = SurrogateLoss("own", function)
    trainer = AttackTrainer(deat_rb.PGD(made(), steps=1), loss=weigh(loss, [1.0, 2.0, 3.0, 4.0]) if weighted else loss)
    before = weights(trainer.model)
    with pytest.raises(DeatError, match=rf"the loss own has the shape {shape} for 2 images, not \(2,\): return one"):
        trainer.fit(loader(), epochs=1)
    assert equal(weights(trainer.model), before)


def test_trainers_refuse_a_loss_that_is_a_function() -> None:
    loss: Any = nn.CrossEntropyLoss()
    with pytest.raises(DeatError, match=r"loss = CrossEntropyLoss\(\) is neither a name nor a SurrogateLoss: give"):
        AttackTrainer(deat_rb.PGD(made()), loss=loss)
