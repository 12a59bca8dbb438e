"""Labels in another order, networks that predict one class, and accuracy at chance level."""

from __future__ import annotations

import pytest
import torch
from check_reports import natural, report_of
from masked_models import EPS, WantsNormalised, held_out, plain, robust
from torch import Tensor, nn

from deat_rb.evaluation.checks.context import LabelOrder
from deat_rb.evaluation.checks.registry import run_checks
from deat_rb.evaluation.report import Check

LABELS, CLASSES, CHANCE = "labels in the network's order", "several classes predicted", "accuracy above chance"


def checked(model: nn.Module, images: Tensor, labels: Tensor, level: str = "quick") -> dict[str, Check]:
    report = report_of(natural(model, images, labels))
    return {check.name: check for check in run_checks(model, images, labels, report, level=level, eps=EPS)}


class Wider(nn.Module):
    """A network with 1000 logits, its own classes at the given positions."""

    def __init__(self, net: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.net, self.positions = net, positions

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits.new_full((len(images), 1000), -30.0).index_copy(1, self.positions, logits)


BY_TEXT = torch.tensor([int(name) - 5 for name in sorted(str(number) for number in range(5, 15))])
"""The digits, in folders named 5 to 14, in the order of the names as text: 10, 11, ..., 14, 5, ..., 9."""


@pytest.mark.parametrize("level", ["quick", "full"])
def test_labels_in_order_finds_folders_sorted_by_text(level: str) -> None:
    images, labels = held_out(200)
    checks = checked(plain(), images, BY_TEXT.argsort()[labels], level)
    assert checks[LABELS].status == "fail"
    assert checks[LABELS].figure == pytest.approx(93, abs=5)
    assert "the labels are not in the network's class order" in checks[LABELS].sentence
    assert {CHANCE, "normalization inside"}.isdisjoint(checks), "accuracies do not tell there"
    assert checks[CLASSES].status == "pass"


@pytest.mark.parametrize("level", ["quick", "full"])
def test_labels_in_order_finds_a_wider_head(level: str) -> None:
    images, labels = held_out(200)
    checks = checked(Wider(plain(), 91 * torch.arange(10) + 3), images, labels, level)
    assert checks[LABELS].status == "fail"
    assert "normalization inside" not in checks


def test_labels_in_order_accepts_a_wider_head_at_its_positions() -> None:
    images, labels = held_out(200)
    positions = 91 * torch.arange(10) + 3
    checks = checked(Wider(plain(), positions), images, positions[labels])
    assert [checks[name].status for name in (LABELS, CLASSES, CHANCE)] == ["pass"] * 3


@pytest.mark.parametrize("count", [4, 12, 40, 200])
@pytest.mark.parametrize("network", [plain, robust])
def test_label_checks_accept_honest_networks_on_sets_of_any_size(network: type[nn.Module], count: int) -> None:
    images, labels = held_out(count)
    checks = checked(network(), images, labels)
    assert {checks[name].status for name in (LABELS, CLASSES, CHANCE) if name in checks} == {"pass"}


def test_labels_in_order_accepts_one_class_only() -> None:
    images, labels = held_out(200)
    three = labels == 3
    checks = checked(plain(), images[three], labels[three])
    assert checks[LABELS].status == "pass"
    assert {CLASSES, CHANCE}.isdisjoint(checks)


def test_labels_in_order_is_not_the_diagnosis_of_missing_normalization() -> None:
    images, labels = held_out(200)
    model = WantsNormalised(plain(), mean=0.9, std=0.05)
    checks = checked(model, images, labels)
    assert checks[LABELS].status == "pass"


@pytest.mark.parametrize("swapped", [(0, 1, 2), (4, 7, 9, 1)])
def test_labels_in_order_finds_some_classes_exchanged(swapped: tuple[int, ...]) -> None:
    images, labels = held_out(200)
    order = torch.arange(10)
    order[list(swapped)] = torch.tensor([*swapped[1:], swapped[0]])
    assert checked(plain(), images, order[labels])[LABELS].status == "fail"


def test_labels_in_order_finds_two_classes_exchanged() -> None:
    images, labels = held_out(200)
    two = labels < 2

    class Binary(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = plain()(images)
            return logits[:, :2]

    assert checked(Binary(), images[two], labels[two])[LABELS].status == "pass"
    assert checked(Binary(), images[two], 1 - labels[two])[LABELS].status == "fail"


class Constant(nn.Module):
    """Predicts class 2 for everything, or for all but a few images."""

    def __init__(self, others: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self.others = others

    def forward(self, images: Tensor) -> Tensor:
        logits = self.scale * images.flatten(1)[:, :6]
        logits[:, 2] += 1
        if self.others:
            logits[:: self.others, 4] += 2
        return logits


@pytest.mark.parametrize(("others", "status"), [(0, "fail"), (50, "fail"), (25, "fail")])
def test_several_classes_finds_collapsed_networks(others: int, status: str) -> None:
    images, labels = held_out(200)[0], torch.arange(200) % 6
    checks = checked(Constant(others), images, labels)
    assert checks[CLASSES].status == status
    assert checks[CHANCE].status == status
    assert checks[LABELS].status == "pass"


def test_several_classes_accepts_imbalanced_labels() -> None:
    """A network that is right about 92 % of one class is none that has collapsed."""
    images = held_out(200)[0]
    labels = Constant(12)(images).argmax(dim=1)
    assert checked(Constant(12), images, labels)[CLASSES].status == "pass"


def test_above_chance_finds_untrained_networks() -> None:
    images, labels = torch.rand(200, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 10
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in network.parameters():
            nn.init.normal_(parameter)
    checks = checked(network.eval(), images, labels)
    assert checks[CHANCE].status == "fail"
    assert checks[LABELS].status == "pass"


def test_label_order_is_measured_on_the_other_half() -> None:
    """Random predictions fit some relabeling by chance, which does not hold on other examples."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 20
    gains = [LabelOrder.of(torch.randint(0, 20, (60,), generator=random), labels).gain for _ in range(20)]
    assert max(gains) < 15
    assert sum(gains) / 20 == pytest.approx(0, abs=3)


def test_labels_in_order_says_nothing_about_collapsed_networks_with_a_wider_head() -> None:
    images, labels = held_out(200)[0], torch.arange(200) % 2
    checks = checked(Wider(Constant(), torch.arange(500, 506)), images, labels)
    assert checks[LABELS].status == "pass"
    assert checks[CLASSES].status == "fail"
