from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from without_float64 import WithoutFloat64

from deat_rb.data.check import check_batch, check_label_values
from deat_rb.utils.errors import DeatError

IMAGES = torch.linspace(0, 1, 24).view(2, 3, 2, 2)
LABELS = torch.tensor([0, 2])


def test_check_batch_accepts_images_in_the_unit_range() -> None:
    check_batch(IMAGES, LABELS)
    check_batch(IMAGES.half(), LABELS, 3)
    check_batch(IMAGES.requires_grad_(), LABELS, 3)
    check_batch(IMAGES.detach() + 5e-7, LABELS, 3)


def test_check_label_values_of_a_device_without_float64() -> None:
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.51]]).as_subclass(WithoutFloat64)
    check_label_values(probabilities[:1], 2)
    with pytest.raises(DeatError, match=r"must be 0 or more and add up to 1 for each image"):
        check_label_values(probabilities, 2)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES * 4 - 2, r"not in \[-2, 2\]: .* move normalization into the model"),
        (IMAGES + 0.01, r"not in \[0.01, 1.01\]"),
        (IMAGES * 255, r"not in \[0, 255\]: divide by 255"),
        (IMAGES * 1.00001, r"not in \[0, 1\.00001\d*\]: divide by 255"),
        (IMAGES - 0.00001, r"not in \[-1e-05, 1\]: divide by 255"),
        (IMAGES * 1.000002, r"not in \[0, 1\.000002\d*\]: divide by 255"),
        (IMAGES * float("nan"), "contain NaN"),
        (IMAGES.where(IMAGES < 1, float("nan")), "contain NaN"),
        (IMAGES.where(IMAGES < 1, float("inf")), r"not in \[0, inf\]"),
        ((IMAGES * 255).byte(), "not uint8 of shape .* convert to float and divide by 255"),
        ((IMAGES * 255).long(), "not int64 of shape .* convert to float and divide by 255"),
        (IMAGES[0], r"\(N, C, H, W\), not float32 of shape \(3, 2, 2\)"),
        (IMAGES[:0], r"non-empty tensor .*, not float32 of shape \(0, 3, 2, 2\)"),
    ],
)
def test_check_batch_refuses_images(images: Tensor, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        check_batch(images, LABELS[: len(images)])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "label 3 is out of range: labels must be 0 to 2 for 3 classes"),
        (torch.tensor([-1, 2]), "label -1 is out of range: labels must be 0 to 2"),
        (torch.tensor([0.0, 1.0]), r"int64 class indices of shape \(N,\), not float32 of shape \(2,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), "not int32"),
        (torch.eye(2).long(), r"not int64 of shape \(2, 2\)"),
        (torch.tensor([0, 1, 2]), "there are 2 images but 3 labels"),
    ],
)
def test_check_batch_refuses_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        check_batch(IMAGES.detach(), labels, 3)


def test_check_batch_refuses_other_types() -> None:
    foreign: Any = [[0.5]]
    with pytest.raises(DeatError, match="must be tensors, not list and Tensor"):
        check_batch(foreign, LABELS)
