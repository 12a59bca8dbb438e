"""FAT's early stop on models of one pixel, where every iterate of every example is known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from small_problems import batch_for, small_network
from torch import Tensor, nn

from deat_rb.attacks.base import AttackMode
from deat_rb.attacks.pgd import PGD


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Threshold(nn.Module):
    """One pixel x: logits (5 (t - x), 5 (x - t)), so label 0 is right below t = 0.45 and the attack moves x up."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, images: Tensor) -> Tensor:
        distance = self.scale * (0.45 - images.flatten(1))
        return torch.cat([distance, -distance], dim=1)


# Steps of 0.1 up for label 0 and down for label 1, eps 0.4. Six examples, where each begins, its label, and the number
# of steps after which it is first misclassified: 0.3 > 0.4 > 0.5 is wrong after 2, and so on.
STARTS = [0.30, 0.10, 0.40, 0.60, 0.62, 0.50]
LABELS = [0, 0, 0, 1, 1, 0]
FIRST_WRONG = [2, 4, 1, 2, 2, 0]


def expected_path(tau: int, steps: int) -> tuple[list[int], int]:
    """How many steps each example takes, and how many example-passes that costs: one more for a stop."""
    taken = [min(first + tau, steps) for first in FIRST_WRONG]
    return taken, sum(count + (count < steps) for count in taken)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("tau", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_early_stop_takes_tau_steps_after_misclassification(mode: AttackMode, tau: int, steps: int) -> None:
    images = torch.tensor(STARTS).view(6, 1, 1, 1)
    labels = torch.tensor(LABELS)
    taken, passes = expected_path(tau, steps)
    towards = [1 - 2 * label for label in LABELS]
    found, stats = crafting(Threshold(), mode, tau=tau, steps=steps).craft(images, labels)
    # eps 0.4 holds those that would take a fifth step.
    expected = [x + way * 0.1 * min(count, 4) for x, way, count in zip(STARTS, towards, taken, strict=True)]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)

    # l_X: each example's gradient at the last iterate that it left. CE = ln(1 + e^-2a) with a = 5 (t - x) for label 0
    # has the derivative 10 sigmoid(-2a); for label 1 a changes its sign. An example that never moves has none.
    norms = []
    for x, way, count in zip(STARTS, towards, taken, strict=True):
        last = x + way * 0.1 * min(count - 1, 4)
        norms.append(10 * sigmoid(-2 * 5 * way * (0.45 - last)) if count else 0.0)
    assert stats.l_x.item() == pytest.approx(sum(norms), rel=1e-4)
    assert float(stats.backwards) == pytest.approx(passes / 6)
    assert float(stats.forwards) == pytest.approx(passes / 6)


def crafting(model: nn.Module, mode: AttackMode, *, tau: int, steps: int) -> PGD:
    """A FAT attack whose model is in the mode that a call would set."""
    model.train(mode == "train")
    return PGD(model, eps=0.4, alpha=0.1, start="none", attack_mode=mode, tau=tau, steps=steps)


def test_early_stop_keeps_the_order_of_examples() -> None:
    # A shuffled batch gives the shuffled result: perturbations are not mixed up when the batch shrinks.
    images, labels = torch.tensor(STARTS).view(6, 1, 1, 1), torch.tensor(LABELS)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    attack = crafting(Threshold(), "eval", tau=1, steps=5)
    assert torch.equal(attack(images[order], labels[order]), attack(images, labels)[order])
    for index in range(6):
        alone = attack(images[index : index + 1], labels[index : index + 1])
        assert torch.equal(alone[0], attack(images, labels)[index])


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_early_stop_by_masks_equals_the_shrinking_batch(loss: str, tau: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    images, labels = torch.rand(20, 3, 4, 4, dtype=torch.float64), torch.randint(4, (20,))
    start = (images + 0.01 * torch.randn_like(images)).clamp(0, 1)
    results = []
    for mode in (True, False):
        attack = PGD(model.train(mode), eps=0.3, alpha=0.05, steps=6, loss=loss, tau=tau)
        results.append(attack.craft(images, labels, adv=start))
    (masked_adv, masked), (shrunk_adv, shrunk) = results
    torch.testing.assert_close(shrunk_adv, masked_adv, rtol=0, atol=1e-12)
    assert float(shrunk.l_x) == pytest.approx(float(masked.l_x), rel=1e-9)
    assert float(shrunk.backwards) == pytest.approx(float(masked.backwards))
    assert 0 < float(shrunk.backwards) <= 6


def test_early_stop_forwards_only_moving_examples_on_a_cpu() -> None:
    seen: dict[str, list[int]] = {"train": [], "eval": []}
    for mode, sizes in seen.items():
        attack = crafting(Threshold(), "train" if mode == "train" else "eval", tau=0, steps=5)
        attack.model.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        attack.craft(torch.tensor(STARTS).view(6, 1, 1, 1), torch.tensor(LABELS))
    # First wrong after 2, 4, 1, 2, 2, 0 steps: 6 are forwarded, then 5, 4, 1 and 1.
    assert seen["eval"] == [6, 5, 4, 1, 1]
    assert seen["train"] == [6, 6, 6, 6, 6]


def test_early_stop_counts_misclassified_steps_in_total() -> None:
    class Valley(nn.Module):
        """Logits (|x - 0.5| - 0.06, 0): label 0 is wrong within 0.06 of 0.5, and the attack oscillates there."""

        def __init__(self) -> None:
            super().__init__()
            self.width = nn.Parameter(torch.tensor(0.06))

        def forward(self, images: Tensor) -> Tensor:
            first = (images.flatten(1) - 0.5).abs() - self.width
            return torch.cat([first, torch.zeros_like(first)], dim=1)

    # From 0.35 in steps of 0.1: 0.35 right, 0.45 wrong (patience 2 > 1), 0.55 wrong (1 > 0), 0.45 wrong and it stays.
    # From 0.33: 0.43 right, 0.53 wrong (2 > 1), 0.43 right, 0.53 wrong (1 > 0), 0.43 right, 0.53 wrong and it stays.
    attack = PGD(Valley(), eps=0.4, alpha=0.1, steps=9, start="none", tau=2, attack_mode="eval")
    for start, end, passes in ((0.35, 0.45, 4), (0.33, 0.53, 7)):
        adv, stats = attack.craft(torch.tensor([start]).view(1, 1, 1, 1), torch.tensor([0]))
        assert adv.item() == pytest.approx(end)
        assert float(stats.backwards) == passes


def test_early_stop_with_a_large_tau_is_plain_pgd() -> None:
    model = small_network()
    images, labels = batch_for(model)
    plain = PGD(model, steps=4, start="none", attack_mode="eval")
    patient = PGD(model, steps=4, start="none", tau=4, attack_mode="eval")
    assert torch.equal(patient(images, labels), plain(images, labels))
    assert float(patient.craft(images, labels)[1].backwards) == 4


def test_early_stop_on_kl_costs_one_forward_more() -> None:
    images, labels = torch.tensor(STARTS).view(6, 1, 1, 1), torch.tensor(LABELS)
    attack = PGD(Threshold(), eps=0.4, alpha=0.1, steps=2, loss="kl", tau=5, attack_mode="train")
    _, stats = attack.craft(images, labels)
    assert (float(stats.forwards), float(stats.backwards)) == (3, 2)
