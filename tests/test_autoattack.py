"""AutoAttack on few classes, and which of its parts exist there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deat_rb.evaluation.autoattack import parts_for
from deat_rb.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def blobs() -> dict[int, tuple[nn.Module, Tensor, Tensor]]:
    """For 2, 3 and 4 classes a network trained on images whose quarter of class k is brighter, and 8 such images."""
    return {classes: _trained(classes) for classes in (2, 3, 4)}


def _trained(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(classes)
    labels = torch.arange(64) % classes
    images = 0.25 + 0.3 * torch.rand(64, 1, 4, 4, generator=stream)
    height = torch.linspace(0.05, 0.6, 64)  # the first are close to the boundary, the last far from it
    for index, label in enumerate(labels.tolist()):
        top, left = 2 * (label // 2), 2 * (label % 2)
        images[index, 0, top : top + 2, left : left + 2] += height[index]
    images = images.clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classes)
        model = nn.Sequential(nn.Conv2d(1, 8, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, classes))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
    chosen = torch.arange(7, 64, 8)
    return model.eval(), images[chosen], labels[chosen]


@pytest.mark.parametrize(
    ("classes", "parts", "targets"),
    [(2, "apgd-ce, fab-t, square", 1), (3, "apgd-ce, fab-t, square", 2), (4, "apgd-ce, apgd-t, fab-t, square", 3)],
)
def test_autoattack_with_few_classes(
    blobs: dict[int, tuple[nn.Module, Tensor, Tensor]], classes: int, parts: str, targets: int
) -> None:
    model, images, labels = blobs[classes]
    told: list[str] = []
    report = evaluate(
        model,
        images,
        labels,
        attacks="pgd-20,autoattack",
        eps=0.1,
        batch_size=8,
        progress=lambda name, *_: told.append(name),
    )
    found = report.results["autoattack"]
    assert found.parameters["parts"] == parts
    assert found.parameters["targets"] == targets
    assert 0 < found.n_correct < report.results["natural"].n_correct
    # Nothing that AutoAttack leaves may fall to a weaker attack on networks as plain as these.
    assert not (report.verdicts["autoattack"] & ~report.verdicts["pgd-20"]).any()
    assert [name for name in told if "/" in name] == [f"autoattack/{part}" for part in parts.split(", ")]
    assert (found.notes[0] == f"{classes} classes: a DLR loss that apgd-t would need does not exist, so it ran without"
            ) == (classes < 4)  # fmt: skip
    assert any(f"{targets} targets where the standard has 9" in note for note in found.notes)
    assert found.notes[-1] == f"{found.n_correct} of 8 correct after square"
    assert found.backwards > 0


def test_parts_of_autoattack() -> None:
    assert parts_for(10) == (("apgd-ce", "apgd-t", "fab-t", "square"), 9)
    assert parts_for(100) == (("apgd-ce", "apgd-t", "fab-t", "square"), 9)
    assert parts_for(5)[1] == 4
    assert parts_for(10, "plus")[0] == ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
    assert parts_for(3, "plus")[0] == ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t")
    assert parts_for(10, "rand")[0] == ("apgd-ce", "apgd-dlr")
    assert parts_for(2, "rand")[0] == ("apgd-ce",)
