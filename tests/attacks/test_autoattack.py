"""AutoAttack with few classes and on images wider than high."""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import pytest
import torch
from short_autoattack import shorten
from torch import Tensor, nn

from deat_rb.attacks.autoattack import _Leaving, _Suite, build, parts_for
from deat_rb.attacks.functional import CountingModel
from deat_rb.attacks.types import AttackContext, Batch
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "parts", "targets"),
    [(2, "apgd-ce, fab-t, square", 1), (3, "apgd-ce, fab-t, square", 2), (4, "apgd-ce, apgd-t, fab-t, square", 3)],
)
def test_autoattack_with_few_classes(
    blobs: dict[int, tuple[nn.Module, Tensor, Tensor]],
    classes: int,
    parts: str,
    targets: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, iterations=20, queries=200)
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
    # On such plain networks no weaker attack succeeds where AutoAttack does not.
    assert not (report.verdicts["autoattack"] & ~report.verdicts["pgd-20"]).any()
    assert [name for name in told if "/" in name] == [f"autoattack/{part}" for part in parts.split(", ")]
    assert (found.notes[0] == f"{classes} classes: AutoAttack skipped apgd-t, whose DLR loss is undefined"
            ) == (classes < 4)  # fmt: skip
    assert any(f"{targets} targets instead of the standard 9" in note for note in found.notes)
    assert found.notes[-1] == f"{found.n_correct} of 8 correct after square"
    assert found.backwards > 0


def test_parts_for_depends_on_the_number_of_classes() -> None:
    assert parts_for(10) == (("apgd-ce", "apgd-t", "fab-t", "square"), 9)
    assert parts_for(100) == (("apgd-ce", "apgd-t", "fab-t", "square"), 9)
    assert parts_for(5)[1] == 4
    assert parts_for(10, "plus")[0] == ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
    assert parts_for(3, "plus")[0] == ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t")
    assert parts_for(10, "rand")[0] == ("apgd-ce", "apgd-dlr")
    assert parts_for(2, "rand")[0] == ("apgd-ce",)


def test_autoattack_stages_have_their_restarts_and_targets() -> None:
    """As in pyautoattack's `run_standard_evaluation`, whichever stage ran before."""
    suite = _Suite("plus", AttackContext("Linf", 0.1, 0, 10, torch.device("cpu")), 9, [])
    model = CountingModel(nn.Flatten())
    for name in ("fab", "fab-t", "fab", "apgd-ce", "apgd-dlr", "apgd-t"):
        attack: Any = cast(MethodType, suite._perturb(name, model)).__self__
        assert attack.n_restarts == (1 if name.endswith("-t") else 5)
        assert getattr(attack, "targeted", None) == {"fab": False, "fab-t": True}.get(name)
        assert name.startswith("fab") or name == "apgd-t" or attack.loss == name.removeprefix("apgd-")


def test_leaving_restores_the_first_misclassified_images() -> None:
    """The brighter half decides; the last image is misclassified in the second pass and correct again in the third."""
    staying = torch.tensor([0.9, 0.1]).expand(16, 2)
    leaving = _Leaving(lambda images: images.flatten(1), torch.zeros(17, dtype=torch.int64))
    looks = [torch.cat([staying, torch.tensor([last])]).view(17, 1, 1, 2)
             for last in ([0.8, 0.3], [0.2, 0.3], [0.8, 0.1])]  # fmt: skip
    for images in looks:
        logits = leaving(images)
    assert logits.argmax(dim=1).tolist() == [0] * 16 + [1], "the last one is not looked at again"
    assert torch.equal(leaving.restore(looks[2]), looks[1])


def test_leaving_forwards_at_least_the_smallest_batch() -> None:
    sizes: list[int] = []

    def model(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.flatten(1)

    leaving = _Leaving(model, torch.zeros(20, dtype=torch.int64))
    kept = torch.tensor([0.9, 0.1])
    for broken in (0, 2, 15, 20, 20):
        leaving(torch.cat([kept.flip(0).expand(broken, 2), kept.expand(20 - broken, 2)]).view(20, 1, 1, 2))
    # All are forwarded until some are misclassified, then the 18 others, then 16 (5 remain), and in the end none.
    assert sizes == [20, 20, 18, 16]


@pytest.mark.slow
def test_square_in_l2_attacks_wide_images_as_it_does_high_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=500)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        high = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
        images = torch.rand(6, 1, 10, 6)
    with torch.no_grad():
        labels = high(images).argmax(dim=1)
    wide = nn.Sequential(Transposed(), high)
    contexts = AttackContext("L2", 0.5, 0, 3, torch.device("cpu"))
    results = []
    for model, batch in ((high, images), (wide, images.transpose(2, 3).contiguous())):
        stage = build("square", contexts).parts[0]
        everything = Batch(batch, labels, torch.ones(6, dtype=torch.bool), 0, torch.arange(6))
        results.append(stage.craft(CountingModel(model.eval()), everything))
    assert 0 < int(results[0].misclassified.sum()) < 6
    assert torch.equal(results[0].images, results[1].images.transpose(2, 3))
    assert torch.equal(results[0].misclassified, results[1].misclassified)
    assert ((results[1].images - images.transpose(2, 3)).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all()


SIZES = ((19, 19), (14, 14), (24, 24), (12, 10), (10, 12), (8, 12), (28, 20), (9, 30))


@pytest.mark.parametrize("size", [(12, 12), *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES)])
def test_square_in_l2_attacks_every_size(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=500)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], 3)).eval()
        images = torch.rand(4, 3, *size)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    stage = build("square", AttackContext("L2", 1.0, 0, 3, torch.device("cpu"))).parts[0]
    batch = Batch(images, labels, torch.ones(4, dtype=torch.bool), 0, torch.arange(4))
    result = stage.craft(CountingModel(model), batch)
    assert result.images.shape == images.shape
    assert ((result.images - images).flatten(1).norm(dim=1) <= 1 + 1e-5).all()
    assert result.misclassified.any()


class Transposed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.transpose(2, 3)
