"""Losses on two-class softmaxes by hand, against NumPy, and for very large logits."""

from __future__ import annotations

import math

import pytest
import torch

from deat_rb.attacks import losses

# Two classes with probabilities 3/4 and 1/4, and 1/2 and 1/2.
SURE, UNSURE = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])


def test_cross_entropy_by_hand() -> None:
    assert losses.cross_entropy(SURE, FIRST).item() == pytest.approx(math.log(4 / 3))
    assert losses.cross_entropy(SURE, SECOND).item() == pytest.approx(math.log(4))


def test_kl_divergence_by_hand() -> None:
    # KL(clean || adv): the expectation is over the clean prediction. KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3 - ln 2 ...
    assert losses.kl_divergence(UNSURE, SURE).item() == pytest.approx(0.75 * math.log(3) - math.log(2))
    # ... and KL((1/2, 1/2) || (3/4, 1/4)) = ln 2 - 1/2 ln 3 is another number.
    assert losses.kl_divergence(SURE, UNSURE).item() == pytest.approx(math.log(2) - 0.5 * math.log(3))
    assert losses.kl_divergence(SURE, SURE).item() == 0


def test_kl_divergence_gradient_is_the_difference_of_predictions() -> None:
    adv = UNSURE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.kl_divergence(adv, SURE).sum(), adv)
    torch.testing.assert_close(gradient, torch.tensor([[0.5 - 0.75, 0.5 - 0.25]]))


def test_margin_is_positive_once_misclassified() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [-2.0, -2.0, -3.0]])
    assert losses.margin(logits, torch.tensor([0, 1, 2, 0])).tolist() == [3.0, -1.5, 1.5, 0.0]


def test_margin_gradient_is_nonzero_for_two_logits() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.margin(logits, torch.tensor([1])).sum(), logits)
    assert gradient.tolist() == [[0.0, -1.0, 1.0]]
