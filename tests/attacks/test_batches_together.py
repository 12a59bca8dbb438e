"""PGD on several batches together: results, full batches and bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_problems import Plane, plain_pgd, small_network
from torch import Tensor, nn

from deat_rb.attacks import losses
from deat_rb.attacks.functional import MOST_HELD, AttackOutput, pgd, pgd_on_batches
from deat_rb.attacks.threat_models import L2, Linf, threat_model

EPS = 0.04
BALL = Linf(EPS)

Batches = list[tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """A network in double precision, so that no result depends on how a CPU rounds batches of different sizes."""
    return small_network().double()


@pytest.fixture(scope="module")
def batches(network: nn.Sequential) -> Batches:
    """Six batches of 20 images, with random starts."""
    stream = torch.Generator().manual_seed(5)
    images = torch.rand(120, 3, 8, 8, generator=stream, dtype=torch.float64)
    with torch.no_grad():
        labels = network(images).argmax(dim=1)
    start = Linf(EPS).start(images, stream)
    return list(zip(images.split(20), labels.split(20), start.split(20), strict=True))


def attacked(
    model: nn.Module, batches: Batches | Iterator[tuple[Tensor, Tensor, Tensor]], size: int, *,
    steps: int = 12, every: int = 1, threat: Linf | L2 = BALL,
) -> Iterator[AttackOutput]:  # fmt: skip
    return pgd_on_batches(model, batches, size=size, threat=threat, alpha=EPS / 4, steps=steps,
                          loss=losses.cross_entropy, leave_every=every)  # fmt: skip


@pytest.mark.parametrize(("size", "every"), [(20, 1), (20, 5), (64, 3), (500, 1)])
def test_results_are_those_of_the_plain_attack(network: nn.Sequential, batches: Batches, size: int, every: int) -> None:
    outputs = list(attacked(network, batches, size, every=every))
    assert len(outputs) == 6
    found = set()
    for output, (images, labels, start) in zip(outputs, batches, strict=True):
        first = plain_pgd(network, images, labels, start, EPS, EPS / 4, 12, margin=False)
        assert output.misclassified.tolist() == (first <= 12).tolist()
        assert torch.equal(output.images[first == 0], start[first == 0])
        found |= set(first.tolist())
        if every == 1:  # up to the first misclassified iterate
            assert output.passes == (int((first.clamp(max=12) + 1).sum()), int((first + 1).clamp(max=12).sum()))
    assert len(found) > 5, "examples should leave at several steps"
    assert 13 in found


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("size", [16, 48])
def test_images_are_those_of_batches_attacked_alone(
    network: nn.Sequential, batches: Batches, norm: str, size: int
) -> None:
    """Each batch alone is forwarded whole until the end."""
    threat = threat_model(norm, {"Linf": EPS, "L2": 0.3}[norm])
    outputs = list(attacked(network, batches, size, threat=threat))
    for output, (images, labels, start) in zip(outputs, batches, strict=True):
        alone = pgd(network, images, labels, start=start, threat=threat, alpha=EPS / 4, steps=12,
                    loss=losses.cross_entropy, leave_every=1000)  # fmt: skip
        assert torch.equal(output.misclassified, alone.misclassified)
        torch.testing.assert_close(output.images, alone.images)


def test_passes_are_full_until_no_batch_is_left(network: nn.Sequential, batches: Batches) -> None:
    sizes: list[int] = []
    taken: list[int] = []

    def supply() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in batches:
            taken.append(len(sizes))
            yield batch

    hook = network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        list(attacked(network, supply(), 20))
        together, last = list(sizes), taken[-1]
        sizes.clear()
        for images, labels, start in batches:
            pgd(network, images, labels, start=start, threat=Linf(EPS), alpha=EPS / 4, steps=12,
                loss=losses.cross_entropy)  # fmt: skip
    finally:
        hook.remove()
    assert last > 12
    assert together[:last].count(20) >= 0.9 * last
    assert len(together) < 0.8 * len(sizes), "fewer passes than batch by batch"


def test_few_batches_are_held_however_weak_the_model_is() -> None:
    """The first example of every batch of 16 is robust; the others are wrong from the start."""
    model = Plane()
    images = torch.full((16, 1, 2, 2), 0.5)
    images[0, 0, 0, 1] = 0.0  # margin 1 off the plane
    labels = torch.tensor([0] + [1] * 15)
    with torch.no_grad():
        assert (model(images[1:]).argmax(dim=1) == 0).all()
    taken = 0

    def supply() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield images, labels, images

    outputs = attacked(model, supply(), 16, steps=30, threat=Linf(1e-3))
    for number in range(20):
        output = next(outputs)
        assert output.misclassified.tolist() == [False] + [True] * 15
        assert output.passes == (31 + 15, 30 + 15)
        assert taken <= min(number + MOST_HELD + 1, 20)
    assert list(outputs) == []


@pytest.mark.parametrize("every", [1, 5])
def test_batches_may_be_empty_and_steps_none(network: nn.Sequential, batches: Batches, every: int) -> None:
    images, labels, start = batches[0]
    empty = (images[:0], labels[:0], start[:0])
    wrong = network(start).argmax(dim=1) != labels
    outputs = list(attacked(network, [empty, batches[0], empty, batches[0], empty], 6, steps=0, every=every))
    assert [len(output.images) for output in outputs] == [0, 20, 0, 20, 0]
    assert [output.passes for output in outputs] == [(0, 0), (20, 0), (0, 0), (20, 0), (0, 0)]
    assert all(torch.equal(output.misclassified, wrong) for output in outputs if len(output.images))
    assert list(attacked(network, [], 6)) == []
