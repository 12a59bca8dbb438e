"""PGD on models whose optimum is known, against torchattacks bit for bit, and what a call preserves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import Plane, batch_for, plane_images, small_network
from torch import Tensor, nn
from torchattacks.attack import Attack

import deat_rb
from deat_rb.attacks.base import AttackMode
from deat_rb.attacks.pgd import PGD
from deat_rb.utils.errors import DeatError

EPS, ALPHA = 8 / 255, 2 / 255
# Plane: logits (w.x + 1, 0), so the gradient of either loss at the input is a multiple of w.
WEIGHTS = torch.tensor([1.0, -2.0, 3.0, -4.0])
L1_OF_WEIGHTS = 10.0


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------ known optima


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("start", ["uniform", "normal", "none"])
def test_pgd_reaches_the_optimum_of_a_linear_model(loss: str, start: str) -> None:
    # The worst perturbation of Linf norm eps is -eps sign(w) for label 0 and +eps sign(w) for label 1, cut to [0, 1].
    images, labels, _ = plane_images()
    towards = torch.where(labels == 0, -1.0, 1.0)[:, None] * WEIGHTS.sign()
    optimum = (images + 0.1 * towards.view(8, 1, 2, 2)).clamp(0, 1)
    adv = PGD(Plane(), eps=0.1, alpha=0.05, steps=5, loss=loss, start=start)(images, labels)
    torch.testing.assert_close(adv, optimum, rtol=0, atol=1e-6)


def test_pgd_moves_alpha_per_step() -> None:
    images, labels = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    adv = PGD(Plane(), eps=0.5, alpha=0.125, steps=3, start="none")(images, labels)
    assert adv.flatten().tolist() == [0.125, 0.875, 0.125, 0.875]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pgd_l_x_is_the_l1_norm_of_the_last_gradient(steps: int) -> None:
    # With label 0 and margin m = w.x + 1 the loss is ln(1 + e^-m), its gradient -sigmoid(-m) w, of L1 norm
    # 10 sigmoid(-m). Images of margins 1 and 1.75; each step of 1/64 takes 10/64 off them.
    images = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.75, 0.5]]).view(2, 1, 2, 2)
    images = images + torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2) * 0.25
    margins = [(image.flatten() @ WEIGHTS).item() + 1 for image in images]
    assert margins == [0.25, 1.0]
    before_last = [margin - (steps - 1) * 10 / 64 for margin in margins]
    attack = PGD(Plane(), eps=0.5, alpha=1 / 64, steps=steps, start="none")
    _, stats = attack.craft(images, torch.tensor([0, 0]))
    assert stats.l_x.item() == pytest.approx(sum(10 * sigmoid(-margin) for margin in before_last), rel=1e-5)
    assert (stats.forwards, stats.backwards) == (steps, steps)


def test_pgd_l_x_of_the_margin_by_hand() -> None:
    images, labels, _ = plane_images()
    _, stats = PGD(Plane(), eps=0.1, alpha=0.05, steps=2, loss="margin").craft(images, labels)
    assert stats.l_x.item() == pytest.approx(8 * L1_OF_WEIGHTS)


def test_pgd_on_kl_moves_away_from_the_clean_prediction() -> None:
    # The clean image has m = 1, its neighbour 0.125 to the right in w_1 has m = 1.125. The gradient of
    # KL(clean || adv) is (sigmoid(m_adv) - sigmoid(m_clean)) w, positive along w: away from the clean image.
    images = torch.full((1, 1, 2, 2), 0.5)
    model = Plane()
    with torch.no_grad():
        model.linear.bias[0] = 2.0  # m = -1 + 2
    start = images.clone()
    start[0, 0, 0, 0] += 0.125
    attack = PGD(model, eps=0.25, alpha=0.0625, steps=1, loss="kl")
    adv, stats = attack.craft(images, None, adv=start)
    assert adv.flatten().tolist() == [0.6875, 0.4375, 0.5625, 0.4375]
    assert stats.l_x.item() == pytest.approx(10 * (sigmoid(1.125) - sigmoid(1.0)), rel=1e-4)
    assert (stats.forwards, stats.backwards) == (2, 1)  # one forward more, for the clean prediction


def test_pgd_on_kl_does_not_move_from_the_clean_image() -> None:
    images = torch.full((2, 1, 2, 2), 0.5)
    adv, stats = PGD(Plane(), loss="kl", start="none", steps=3).craft(images, None)
    assert torch.equal(adv, images)
    assert stats.l_x.item() == 0


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_pgd_without_steps_returns_the_start(loss: str) -> None:
    images, labels, _ = plane_images()
    adv, stats = PGD(Plane(), loss=loss, start="none", steps=0).craft(images, labels)
    assert torch.equal(adv, images)
    assert (float(stats.l_x), stats.forwards, stats.backwards) == (0.0, 0, 0)


def test_pgd_in_l2_has_its_own_radius_and_step() -> None:
    """RobustBench's radius, and a quarter of it, as 2/255 is of 8/255."""
    assert [(attack.eps, attack.alpha) for attack in (PGD(Plane(), norm="L2"), PGD(Plane(), norm="L2", eps=2))] == [
        (0.5, 0.125), (2, 0.5),
    ]  # fmt: skip
    assert (PGD(Plane()).eps, PGD(Plane(), eps="4/255").alpha) == (8 / 255, 2 / 255)


# ------------------------------------------------------------------------------------------------ torchattacks


def both(ours: Attack, theirs: Attack, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    results = []
    for attack in (ours, theirs):
        torch.manual_seed(11)
        results.append(attack(images, labels))
    return results[0], results[1]


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(("eps", "alpha", "steps"), [(EPS, ALPHA, 1), (EPS, ALPHA, 7), (0.1, 0.03, 4)])
def test_pgd_equals_torchattacks_pgd(random_start: bool, eps: float, alpha: float, steps: int) -> None:
    model = small_network()
    images, labels = batch_for(model)
    start = "uniform" if random_start else "none"
    ours = PGD(model, eps=eps, alpha=alpha, steps=steps, start=start, attack_mode="eval")
    theirs = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps, random_start=random_start)
    found, expected = both(ours, theirs, images, labels)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("steps", [1, 5])
def test_pgd_on_kl_equals_torchattacks_tpgd(steps: int) -> None:
    model = small_network()
    images, labels = batch_for(model)
    ours = PGD(model, eps=EPS, alpha=ALPHA, steps=steps, loss="kl", start="normal", attack_mode="eval")
    found, expected = both(ours, torchattacks.TPGD(model, eps=EPS, alpha=ALPHA, steps=steps), images, labels)
    assert torch.equal(found, expected)


def test_pgd_with_one_step_equals_torchattacks_ffgsm() -> None:
    model = small_network()
    images, labels = batch_for(model)
    torch.manual_seed(5)
    theirs = torchattacks.FFGSM(model, eps=EPS, alpha=10 / 255)(images, labels)
    torch.manual_seed(5)
    # FFGSM draws normal numbers first and discards them, so its start is passed in.
    start = (images + torch.randn_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    ours = PGD(model, eps=EPS, alpha=10 / 255, steps=1, attack_mode="eval")
    assert torch.equal(ours.craft(images, labels, adv=start)[0], theirs)


def test_pgd_with_one_step_of_eps_equals_torchattacks_fgsm() -> None:
    model = small_network()
    images, labels = batch_for(model)
    ours = PGD(model, eps=EPS, alpha=EPS, steps=1, start="none", attack_mode="eval")
    theirs = torchattacks.FGSM(model, eps=EPS)
    # FGSM does not project, which is one rounding less.
    torch.testing.assert_close(ours(images, labels), theirs(images, labels), rtol=0, atol=1.2e-7)


def test_pgd_with_normalization_used_equals_torchattacks() -> None:
    model = small_network()
    images, labels = batch_for(model)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    attacks = (PGD(model, steps=3, attack_mode="eval"), torchattacks.PGD(model, steps=3))
    for attack in attacks:
        attack.set_normalization_used(mean, std)
    normalized = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    found, expected = both(*attacks, normalized, labels)
    assert torch.equal(found, expected)
    assert attacks[0]._normalization_applied is True


def test_pgd_in_train_mode_equals_torchattacks_in_train_mode() -> None:
    model = small_network()
    model[3] = nn.Identity()  # for the dropout, which draws from the generator that the start is drawn from
    images, labels = batch_for(model)
    theirs = torchattacks.PGD(model, steps=3)
    theirs.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
    found, expected = both(PGD(model.train(), steps=3, attack_mode="train"), theirs, images, labels)
    assert torch.equal(found, expected)
    still = PGD(model, steps=3, attack_mode="eval")
    assert not torch.equal(both(still, theirs, images, labels)[0], expected)


# ------------------------------------------------------------------------------------------------ properties


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(1 / 255, 0.5),
    alpha=st.floats(1 / 255, 1.0),
    steps=st.integers(0, 3),
    loss=st.sampled_from(["ce", "kl", "margin"]),
    start=st.sampled_from(["uniform", "normal", "none"]),
    tau=st.sampled_from([None, 0, 2]),
    mode=st.sampled_from(["train", "eval"]),
    training=st.booleans(),
)
def test_pgd_stays_in_the_ball_and_preserves_the_model(
    seed: int,
    eps: float,
    alpha: float,
    steps: int,
    loss: str,
    start: str,
    tau: int | None,
    mode: AttackMode,
    training: bool,
) -> None:
    model = small_network().train(training)
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 3, 4, 4, generator=stream).mul(1.4).sub(0.2).clamp(0, 1)  # many at 0 and at 1
    labels = torch.randint(5, (5,), generator=stream)
    kept, state = images.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    attack = PGD(model, eps=eps, alpha=alpha, steps=steps, loss=loss, start=start, tau=tau, attack_mode=mode)
    adv = attack(images, labels)

    # A start of 0.001 N(0, 1) is projected by the first step only, which an early-stopped example may not take.
    stepped = steps > 0 and tau is None
    bound = eps if stepped or start != "normal" else max(eps, 0.006)
    assert (adv - images).abs().max() <= bound + 1e-6
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert not adv.requires_grad
    assert torch.equal(images, kept)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cut=st.integers(1, 8),
    loss=st.sampled_from(["ce", "kl", "margin"]),
    tau=st.sampled_from([None, 1]),
    scale=st.sampled_from([1.0, 2.0**16, 3.0]),
)
def test_pgd_l_x_does_not_depend_on_batch_or_loss_scale(
    seed: int, cut: int, loss: str, tau: int | None, scale: float
) -> None:
    model = small_network().double()
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand(9, 3, 4, 4, dtype=torch.float64, generator=stream)
    start = (images + 0.02 * torch.randn(images.shape, dtype=torch.float64, generator=stream)).clamp(0, 1)
    labels = torch.randint(5, (9,), generator=stream)
    attack = PGD(model, eps=0.1, alpha=0.05, steps=2, loss=loss, tau=tau, attack_mode="eval")
    whole_adv, whole = attack.craft(images, labels, adv=start)
    attack.loss_scale = scale
    parts = [attack.craft(images[rows], labels[rows], adv=start[rows]) for rows in (slice(0, cut), slice(cut, 9))]
    assert sum(float(stats.l_x) for _, stats in parts) == pytest.approx(float(whole.l_x), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(torch.cat([adv for adv, _ in parts]), whole_adv, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ refusals

REFUSALS: list[tuple[Callable[[nn.Module], object], str]] = [
    (lambda m: PGD(m, loss="KL"), r"no attack loss 'KL': did you mean 'kl'\?"),
    (lambda m: PGD(m, start="gauss"), r"no start 'gauss': choose one of uniform, normal, none"),
    (lambda m: PGD(m, steps=-1), r"steps = -1 is not a non-negative whole number"),
    (lambda m: PGD(m, alpha=0.0), r"alpha = 0 is not a positive number"),
    (lambda m: PGD(m, alpha=math.nan), r"alpha = nan is not a positive number"),
    (lambda m: PGD(m, tau=-1), r"tau = -1 is not a non-negative whole number"),
    (lambda m: PGD(m, eps=8), r"eps = 8 is outside \(0, 1\]"),
    (lambda m: PGD(m, attack_mode=cast(AttackMode, "evil")), r"attack_mode = 'evil' is neither 'train' nor 'eval'"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_constructor_refuses_invalid_settings(make: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        make(Plane())


def test_constructor_takes_numpy_integers() -> None:
    sizes: dict[str, Any] = {"steps": np.int64(3), "tau": np.int32(1), "eps": np.float32(0.1)}
    attack = deat_rb.PGD(Plane(), **sizes)
    assert (attack.steps, attack.tau) == (3, 1)
    assert isinstance(attack.steps, int)


# ------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("tau", [None, 3])
@pytest.mark.parametrize("start", ["normal", "none"])
def test_pgd_takes_the_first_step_on_kl_in_full_precision(start: str, tau: int | None) -> None:
    """In bf16 images 0.001 apart are equal, and the gradient of their KL divergence is rounding noise."""
    model = small_network()
    images, labels = batch_for(model)
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    attack = PGD(model, loss="kl", start=start, steps=1, tau=tau, attack_mode="eval")
    torch.manual_seed(3)
    exact = attack(images, labels)
    seen.clear()
    attack.steps = 3
    with torch.autocast("cpu", torch.bfloat16):
        attack(images, labels)
        assert seen == [False, False, True, True], "the clean forward and the first step, then the others"
        attack.steps = 1
        torch.manual_seed(3)
        half = attack(images, labels)
    assert torch.equal(half, exact)


@pytest.mark.parametrize(("loss", "start"), [("ce", "normal"), ("margin", "none"), ("kl", "uniform")])
def test_pgd_takes_all_other_steps_under_autocast(loss: str, start: str) -> None:
    model = small_network()
    images, labels = batch_for(model)
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        PGD(model, loss=loss, start=start, steps=2, attack_mode="eval")(images, labels)
    assert len(seen) == 2 + (loss == "kl")
    assert all(seen)
