"""AutoAttack's verdicts are those of pyautoattack's own evaluation, example for example."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from short_autoattack import robust_network, shorten, theirs
from torch import Tensor, nn

from deat_rb.evaluation.evaluate import evaluate

SEED = 3


@cache
def problem(classes: int, eps: float) -> tuple[nn.Module, Tensor, Tensor]:
    return robust_network(classes, eps)


@pytest.mark.slow
def test_autoattack_standard_equals_pyautoattack() -> None:
    model, images, labels = problem(4, 0.15)
    images, labels = images[:9], labels[:9]
    report = evaluate(model, images, labels, attacks="autoattack", eps=0.15, batch_size=4, seed=SEED)
    expected = theirs(model, images, labels, version="standard", eps=0.15, batch_size=4, seed=SEED)
    assert report.verdicts["autoattack"].tolist() == expected.tolist()
    left = [int(note.split()[0]) for note in report.results["autoattack"].notes if " correct after " in note]
    assert report.results["natural"].n_correct > left[-1] > 4, "every part should have two batches to attack"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "norm", "classes", "eps", "count"),
    [
        ("standard", "Linf", 10, 0.15, 200),
        ("plus", "Linf", 10, 0.15, 60),
        ("square", "Linf", 10, 0.15, 200),
        ("standard", "L2", 10, 0.8, 100),
        ("standard", "Linf", 4, 0.2, 200),
        ("rand", "Linf", 3, 0.25, 60),
        ("plus", "Linf", 2, 0.3, 60),
    ],
)
def test_autoattack_versions_norms_and_classes_equal_pyautoattack(
    version: str, norm: str, classes: int, eps: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, iterations=5, queries=40)
    model, images, labels = problem(classes, 0.15)
    images, labels, batch_size = images[:count], labels[:count], count // 3
    name = {"standard": "autoattack", "square": "square"}.get(version, f"autoattack-{version}")
    report = evaluate(model, images, labels, attacks=name, eps=eps, norm=norm, batch_size=batch_size, seed=SEED)
    expected = theirs(model, images, labels, version=version, eps=eps, norm=norm, batch_size=batch_size, seed=SEED)
    assert torch.equal(report.verdicts[name], expected)
    found = report.results[name]
    assert 0.2 < found.accuracy < 0.8
    assert found.inadmissible == 0
    with torch.no_grad():
        assert torch.equal(model(report.adversarial[name]).argmax(dim=1) == labels, expected)


def test_square_depends_on_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=3)
    model, images, labels = problem(10, 0.15)
    first, second, again = (
        evaluate(model, images, labels, attacks="square", eps=0.15, batch_size=64, seed=seed).verdicts["square"]
        for seed in (SEED, 4, SEED)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
