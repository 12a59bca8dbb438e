"""FGSM and PGD for evaluation: iterates, early removal from the batch, starts, and the eps-ball."""

from __future__ import annotations

import pytest
import torch
from small_problems import Plane, batch_for, plain_pgd, plane_images, small_network
from torch import Tensor, nn
from transfers import Transfers

from deat_rb.attacks import losses
from deat_rb.attacks.functional import CountingModel, logits_and_gradient, pgd
from deat_rb.attacks.threat_models import Linf
from deat_rb.utils import seeding


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def batch(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    return batch_for(network)


@pytest.mark.parametrize("every", [1, 3, 5, 100])
def test_pgd_result_does_not_depend_on_leave_every(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], every: int
) -> None:
    images, labels = batch
    start = Linf(0.04).start(images, torch.Generator().manual_seed(1))
    first = plain_pgd(network, images, labels, start, 0.04, 0.01, 10, margin=False)
    counted = CountingModel(network)
    crafted = pgd(
        counted,
        images,
        labels,
        start=start,
        threat=Linf(0.04),
        alpha=0.01,
        steps=10,
        loss=losses.cross_entropy,
        leave_every=every,
    )
    assert crafted.misclassified.tolist() == (first <= 10).tolist()
    with torch.no_grad():
        assert ((network(crafted.images).argmax(1) != labels) == crafted.misclassified).all()
    assert (crafted.images[first == 0] == start[first == 0]).all()
    assert Linf(0.04).contains(crafted.images, images).all()
    if every == 1:  # each example is forwarded up to its first misclassified iterate
        expected = (int((first.clamp(max=10) + 1).sum()), int((first + 1).clamp(max=10).sum()))
        assert crafted.passes == expected
        assert counted.forwards >= expected[0], "and some to fill up the smallest batches"
    if every == 100:  # none leaves before the end
        assert crafted.passes == (48 * 11, 48 * 10)


def test_pgd_waits_for_the_device_at_checks_only() -> None:
    """On a GPU the index of the examples that take steps is copied when it changes; copying it waits."""
    images, labels, _ = (part.to("meta") for part in plane_images())
    before: list[int] = []
    with Transfers() as transfers:

        def model(batch: Tensor) -> Tensor:
            before.append(len(transfers.names))
            transfers.names.clear()
            return batch.flatten(1)[:, :2]

        pgd(model, images, labels, start=images, threat=Linf(0.1), alpha=0.02, steps=10, loss=losses.cross_entropy)
    # Checks are before steps 1 and 6, and after the last step, where the examples end.
    assert [count > 0 for count in before] == [True] + 4 * [False] + [True] + 4 * [False] + [True]


def test_uniform_start_draws_from_the_generator() -> None:
    images = torch.rand(4, 3, 5, 5)
    start = Linf(0.1).start(images, seeding.generator(2, "evaluate", "pgd-5", 1))
    with seeding.preserved():
        torch.manual_seed(seeding.derive(2, "evaluate", "pgd-5", 1))
        noise = torch.empty_like(images).uniform_(-0.1, 0.1)
    assert torch.equal(start, torch.clamp(images + noise, 0, 1))


def test_contains_checks_ball_bounds_and_finiteness() -> None:
    image = torch.full((6, 1, 1, 2), 0.95)
    adv = image.clone()
    adv[1] += 0.03
    adv[2] += 0.03 + 2e-6
    adv[3, 0, 0, 1] = float("nan")
    adv[4] = 1.0 + 1e-3
    adv[5] -= 0.04
    assert Linf(0.03).contains(adv, image).tolist() == [True, True, False, False, False, False]


def test_logits_and_gradient_works_under_no_grad() -> None:
    images, labels, _ = plane_images()
    with torch.no_grad():
        _, gradient = logits_and_gradient(Plane(), images, labels, losses.margin)
    # margin = z_1 - z_0 = -(w.x + 1) for class 0, and w.x + 1 for class 1
    assert gradient[0].flatten().tolist() == [-1.0, 2.0, -3.0, 4.0]
    assert gradient[3].flatten().tolist() == [1.0, -2.0, 3.0, -4.0]
