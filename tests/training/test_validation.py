"""Validation within training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_problems import images_and_labels, loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training import Callback
from deat_rb.training.validation import Validation, has_collapsed, validate


def test_validate_runs_pgd_20_on_all_and_pgd_5_on_128_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Validation:
        calls.append((images, options))
        return Validation(0.5, 0.4, len(images) * (1 + options["steps"]), len(images) * options["steps"])

    monkeypatch.setattr("deat_rb.training.validation.validate", watched)
    held = images_and_labels(150, seed=77)
    [row] = deat_rb.create("u-fgsm", made()).fit(loader(), [held], epochs=1).rows
    assert (row.val_forwards, row.val_backwards) == (150 * 21 + 128 * 6, 150 * 20 + 128 * 5)
    assert [(len(images), options["steps"]) for images, options in calls] == [(150, 20), (128, 5)]
    assert all(torch.equal(images, held[0][: len(images)]) for images, _ in calls)


def test_validate_counts_the_most_common_prediction_and_its_label() -> None:
    model: nn.Module = made().eval()
    images, labels = images_and_labels(40)
    predicted = model(images).argmax(dim=1)
    measured = validate(model, images, labels, eps=8 / 255, steps=1, batch_size=7)
    top = int(predicted.bincount().argmax())
    assert measured.top_prediction == top
    assert measured.top_predicted == int((predicted == top).sum()) / 40
    assert measured.top_labelled == int((labels == top).sum()) / 40


def test_validate_measures_each_class() -> None:
    model: nn.Module = ByColor(0.0)
    images, labels = images_and_labels(40)
    labels = torch.where(labels == 3, torch.tensor(2), labels)
    labels[:2] = 1
    measured = validate(model, images, labels, eps=8 / 255, steps=3, batch_size=7)
    assert len(measured.class_natural) == len(measured.class_robust) == 4
    assert measured.class_natural[3] is measured.class_robust[3] is None
    predicted = model(images).argmax(dim=1)
    shares = torch.bincount(labels, minlength=4).tolist()
    for label in range(3):
        of_class = labels == label
        assert measured.class_natural[label] == pytest.approx(float((predicted[of_class] == label).double().mean()))
        alone = validate(model, images[of_class], labels[of_class], eps=8 / 255, steps=3)
        assert alone.natural == pytest.approx(measured.class_natural[label])
    for total, classes in ((measured.natural, measured.class_natural), (measured.robust, measured.class_robust)):
        correct = sum((each or 0) * share for each, share in zip(classes, shares, strict=True))
        assert correct == pytest.approx(40 * total)


@pytest.mark.parametrize(
    ("predicted", "labelled", "count", "collapsed"),
    [
        (100, 20, 100, True), (90, 20, 100, True), (89, 20, 100, False),
        (95, 56, 100, False),  # right about most of one class
        (100, 90, 100, True), (100, 92, 100, False),  # predicts the majority only
        (10, 1, 10, True), (9, 1, 9, False),  # too few images to tell
    ],
)  # fmt: skip
def test_has_collapsed(predicted: int, labelled: int, count: int, collapsed: bool) -> None:
    assert has_collapsed(predicted, labelled, count) is collapsed


class ByColor(nn.Module):
    """Classify `images_and_labels` by their red and green channel, plus a bias for class 2."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0, 0, bias, 0]))

    def forward(self, images: Tensor) -> Tensor:
        red, green = (images.mean(dim=(2, 3))[:, :2] - 0.475).unbind(dim=1)
        return 20 * torch.stack([-red - green, red - green, green - red, red + green], dim=1) + self.bias


class Warnings(Callback):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_warning(self, message: str) -> None:
        self.messages.append(message)


def test_fit_warns_of_a_collapsed_model_epoch_by_epoch() -> None:
    def fit(bias: float, validation: int) -> tuple[list[float | None], list[str]]:
        warnings = Warnings()
        history = deat_rb.create("pgd-1", ByColor(bias)).fit(
            loader(1), [images_and_labels(validation)], epochs=2, lr=1e-6, callbacks=[warnings]
        )
        return [row.val_top_predicted for row in history.rows], warnings.messages

    shares, messages = fit(50.0, 40)
    assert shares == [1.0, 1.0]
    assert messages == [
        f"epoch {epoch}: the model predicts class 2 for 100% of the validation images, although only 25% have this "
        "label: it has collapsed to (nearly) one class"
        for epoch in (1, 2)
    ]
    shares, messages = fit(0.0, 40)
    assert 0.25 <= (shares[0] or 0) <= 0.4
    assert messages == []
    assert fit(50.0, 4)[1] == []  # too few images to tell
