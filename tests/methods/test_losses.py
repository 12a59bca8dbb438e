"""Surrogate losses of TRADES and MART by hand; all losses against NumPy and for very large logits."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deat_rb.attacks import losses
from deat_rb.methods import losses as methods_losses
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.errors import DeatError

# Two classes with probabilities 3/4 and 1/4, and 1/2 and 1/2.
SURE, UNSURE = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])


def test_boosted_cross_entropy_by_hand() -> None:
    # -ln p_y - ln(1.0001 - p_other): with p_y = 3/4 and with p_y = 1/4.
    assert methods_losses.boosted_cross_entropy(SURE, FIRST).item() == pytest.approx(math.log(4 / 3) - math.log(0.7501))
    assert methods_losses.boosted_cross_entropy(SURE, SECOND).item() == pytest.approx(math.log(4) - math.log(0.2501))


def test_boosted_cross_entropy_is_bounded() -> None:
    # At p_other = 1 what is left of the second term is -ln 0.0001 = 9.2103; cross-entropy takes the rest, here 2e4.
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    right, wrong = methods_losses.boosted_cross_entropy(logits, torch.tensor([0, 0])).tolist()
    assert right == pytest.approx(-math.log(1.0001), abs=1e-6)
    assert wrong - 2e4 == pytest.approx(9.2103, abs=2e-3)


def test_boosted_cross_entropy_uses_the_strongest_wrong_class() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    found = [methods_losses.boosted_cross_entropy(logits, torch.tensor([k])).item() for k in range(3)]
    expected = [-math.log(0.2) - math.log(0.5001), -math.log(0.5) - math.log(0.7001), -math.log(0.3) - math.log(0.5001)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_class_probabilities_is_the_mean_over_classes() -> None:
    # 0.3 (-ln 3/4) + 0.7 (-ln 1/4).
    share = torch.tensor([[0.3, 0.7]])
    expected = 0.3 * math.log(4 / 3) + 0.7 * math.log(4)
    assert losses.cross_entropy(SURE, share).item() == pytest.approx(expected, rel=1e-6)
    assert losses.cross_entropy(SURE.double(), share).item() == pytest.approx(expected, rel=1e-6)
    assert losses.cross_entropy(SURE.bfloat16(), share).dtype == torch.float32
    # Smoothing by 0.2 makes the shares 0.34 and 0.66.
    smoothed = losses.cross_entropy(SURE, share, label_smoothing=0.2).item()
    assert smoothed == pytest.approx(0.34 * math.log(4 / 3) + 0.66 * math.log(4), rel=1e-6)
    kl = 0.75 * math.log(3) - math.log(2)
    assert methods_losses.trades(UNSURE, share, SURE).item() == pytest.approx(expected + 6 * kl, rel=1e-5)


def test_trades_and_mart_by_hand() -> None:
    # Clean (3/4, 1/4), adversarial (1/2, 1/2), label 0.
    kl = 0.75 * math.log(3) - math.log(2)
    assert methods_losses.trades(UNSURE, FIRST, SURE).item() == pytest.approx(math.log(4 / 3) + 6 * kl, rel=1e-5)
    assert methods_losses.trades(UNSURE, FIRST, SURE, beta=1.5).item() == pytest.approx(
        math.log(4 / 3) + 1.5 * kl, rel=1e-5
    )
    boosted = math.log(2) - math.log(0.5001)
    assert methods_losses.mart(UNSURE, FIRST, SURE).item() == pytest.approx(boosted + 6 * kl * 0.25, rel=1e-5)
    assert methods_losses.mart(UNSURE, SECOND, SURE, beta=2).item() == pytest.approx(boosted + 2 * kl * 0.75, rel=1e-5)


def numpy_losses(adv: np.ndarray[Any, Any], clean: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> dict[str, Any]:
    """All of them in float64, from the papers' formulas."""
    rows = np.arange(len(y))
    log_p, log_q = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) for logits in (clean, adv))
    p, others, logits = np.exp(log_p), np.exp(log_q), adv.copy()
    others[rows, y], logits[rows, y] = -1, -np.inf
    ce, clean_ce = -log_q[rows, y], -log_p[rows, y]
    kl = (p * (log_p - log_q)).sum(axis=1)
    bce = ce - np.log(1.0001 - others.max(axis=1) + 1e-12)
    return {
        "cross_entropy": ce,
        "kl_divergence": kl,
        "margin": logits.max(axis=1) - adv[rows, y],
        "boosted_cross_entropy": bce,
        "trades": clean_ce + 6 * kl,
        "mart": bce + 6 * kl * (1 - p[rows, y]),
    }


def call(name: str, adv: Tensor, labels: Tensor, clean: Tensor) -> Tensor:
    function: Callable[..., Tensor] = getattr(losses, name, None) or getattr(methods_losses, name)
    if name == "kl_divergence":
        return function(adv, clean)
    if name in ("trades", "mart"):
        return function(adv, labels, clean)
    return function(adv, labels)


NAMES = ("cross_entropy", "kl_divergence", "margin", "boosted_cross_entropy", "trades", "mart")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 7), st.floats(0.1, 12))
def test_losses_equal_the_papers_formulas(seed: int, classes: int, scale: float) -> None:
    numbers = np.random.default_rng(seed)
    adv, clean = numbers.normal(scale=scale, size=(2, 6, classes))
    labels = numbers.integers(classes, size=6)
    expected = numpy_losses(adv, clean, labels)
    for name in NAMES:
        found = call(name, torch.tensor(adv), torch.tensor(labels), torch.tensor(clean))
        assert found.shape == (6,)
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_equal_finite_differences(name: str) -> None:
    stream = torch.Generator().manual_seed(0)
    adv, clean = torch.randn(2, 4, 3, dtype=torch.float64, generator=stream).requires_grad_()
    labels = torch.tensor([0, 1, 2, 1])
    assert torch.autograd.gradcheck(lambda a, c: call(name, a, labels, c), (adv, clean))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_for_saturated_logits(name: str, dtype: torch.dtype) -> None:
    """All pairs of logits out of {-1e4, 0, 1e4}^3 with all labels."""
    corners = list(itertools.product((-1e4, 0.0, 1e4), repeat=3))
    rows = [(a, c, y) for a in corners for c in corners for y in range(3)]
    adv = torch.tensor([a for a, _, _ in rows]).to(dtype).requires_grad_()
    clean = torch.tensor([c for _, c, _ in rows]).to(dtype).requires_grad_()
    labels = torch.tensor([y for _, _, y in rows])
    loss = call(name, adv, labels, clean)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), (adv, clean), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    # And they are right: no row is lost to a clamp.
    expected = numpy_losses(adv.detach().double().numpy(), clean.detach().double().numpy(), labels.numpy())[name]
    np.testing.assert_allclose(loss.detach().double().numpy(), expected, rtol=1e-6, atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    adv = torch.tensor([[2.0, -1.0, 0.5], [0.25, 0.75, 3.0]])  # exact in both
    clean = torch.tensor([[1.5, 0.0, -0.5], [4.0, 0.5, 1.0]])
    labels = torch.tensor([0, 1])
    for name in NAMES:
        assert torch.equal(call(name, adv.to(dtype), labels, clean.to(dtype)), call(name, adv, labels, clean)), name


def test_surrogate_returns_losses_by_name() -> None:
    ce, trades, mart = (methods_losses.surrogate(name, beta=2.0) for name in ("ce", "trades", "mart"))
    assert (ce.name, trades.name, mart.name) == ("ce", "trades", "mart")
    assert (ce.needs_clean, trades.needs_clean, mart.needs_clean) == (False, True, True)
    assert torch.equal(ce.function(SURE, FIRST), losses.cross_entropy(SURE, FIRST))
    assert torch.equal(trades.function(UNSURE, FIRST, SURE), methods_losses.trades(UNSURE, FIRST, SURE, beta=2.0))
    assert torch.equal(mart.function(UNSURE, FIRST, SURE), methods_losses.mart(UNSURE, FIRST, SURE, beta=2.0))
    assert methods_losses.surrogate(mart) is mart


def test_surrogate_beta_is_six_by_default() -> None:
    found = methods_losses.surrogate("trades").function(UNSURE, FIRST, SURE)
    assert torch.equal(found, methods_losses.trades(UNSURE, FIRST, SURE, beta=6.0))


def test_label_smoothing_by_hand() -> None:
    """p = (1/4, 3/4), the label has p = 3/4, and s = 0.2 leaves a target of (0.1, 0.9)."""
    logits, labels = torch.tensor([[0.0, math.log(3)]]), torch.tensor([1])
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    smoothed = methods_losses.surrogate("ce", label_smoothing=0.2)
    assert smoothed.function(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert torch.nn.CrossEntropyLoss(label_smoothing=0.2)(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    trades = methods_losses.surrogate("trades", beta=2.0, label_smoothing=0.2)
    even = torch.zeros(1, 2)  # KL(p || even) = log 2 - H(p)
    kl = math.log(2) - math.log(4) / 4 - 3 / 4 * math.log(4 / 3)
    assert trades.function(even, labels, logits).item() == pytest.approx(expected + 2 * kl, rel=1e-6)


def test_surrogate_refuses_label_smoothing_for_mart_and_own_losses() -> None:
    own = SurrogateLoss("half", lambda logits, labels: losses.cross_entropy(logits, labels) / 2)
    for loss, name in (("mart", "mart"), (own, "half")):
        with pytest.raises(DeatError, match=f"label_smoothing = 0.1 is .* not for the loss {name}; omit it"):
            methods_losses.surrogate(loss, label_smoothing=0.1)
        assert methods_losses.surrogate(loss, label_smoothing=0.0).name == name
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(DeatError, match=r"label_smoothing = .* is not in \[0, 1\)"):
            methods_losses.surrogate("ce", label_smoothing=wrong)


def test_surrogate_suggests_the_nearest_name() -> None:
    with pytest.raises(DeatError, match="no surrogate loss 'trade': did you mean 'trades'"):
        methods_losses.surrogate("trade")
    with pytest.raises(DeatError, match="choose one of ce, nls, trades, mart"):
        methods_losses.surrogate("xxxxxx")


# Weights of classes


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = methods_losses.balanced_weights(torch.tensor([6, 3, 1]))
    # N / (K n) = 10/18, 10/9 and 10/3.
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert weights.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert methods_losses.balanced_weights(torch.tensor([0.6, 0.3, 0.1])).tolist() == pytest.approx(weights.tolist())
    assert methods_losses.balanced_weights(torch.tensor([2, 0, 6])).tolist() == pytest.approx([2, 1, 2 / 3])


@pytest.mark.parametrize("name", ["ce", "trades", "mart"])
def test_weighted_multiplies_each_examples_loss(name: str) -> None:
    stream = torch.Generator().manual_seed(0)
    adv, clean = torch.randn(2, 5, 3, generator=stream).double()
    labels = torch.tensor([0, 1, 2, 1, 0])
    loss = methods_losses.surrogate(name, label_smoothing=0.1 if name == "ce" else 0.0)
    weighted = methods_losses.weighted(loss, torch.tensor([0.5, 2.0, 4.0]))
    given = (adv, labels, clean) if loss.needs_clean else (adv, labels)
    expected = loss.function(*given) * torch.tensor([0.5, 2, 4, 2, 0.5])
    assert torch.allclose(weighted.function(*given), expected, atol=0, rtol=1e-12)
    assert (weighted.name, weighted.needs_clean) == (loss.name, loss.needs_clean)
    assert torch.equal(pickle.loads(pickle.dumps(weighted)).function(*given), weighted.function(*given))
