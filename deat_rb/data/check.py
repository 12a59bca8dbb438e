"""Validation of user-provided images and labels."""

from __future__ import annotations

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted

ROUNDING = 1e-6
"""Tolerance for pixels outside [0, 1], which resampling of float images can cause; attacks clamp them."""


def check_batch(
    images: Tensor, labels: Tensor, num_classes: int | None = None, *, allow_nan: bool = False, soft: bool = False
) -> None:
    """Check types, shapes and values of a batch; synchronizes with the device.

    Args:
        images: Floating-point images (N, C, H, W) in [0, 1].
        labels: int64 labels (N,), from 0 to ``num_classes`` - 1.
        num_classes: The number of classes, if it is known.
        allow_nan: Whether to accept images with NaN.
        soft: Whether labels may also be floating-point class probabilities (N, K).

    Raises:
        DeatError: Images or labels have a wrong type, shape or value.
    """
    check_types(images, labels, soft=soft)
    check_pixels(images, allow_nan=allow_nan)
    check_label_values(labels, num_classes)


def check_tensors(images: Tensor, labels: Tensor) -> None:
    """Check that images and labels are tensors with values.

    Raises:
        DeatError: One is another object, or is on the device meta.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DeatError(f"images and labels must be tensors, not {type(images).__name__} and {type(labels).__name__}")
    if images.is_meta or labels.is_meta:
        raise DeatError("images or labels have no values, only shapes (device meta): create them on another device")


def check_types(images: Tensor, labels: Tensor, *, soft: bool = False) -> None:
    """Check types and shapes of a batch without reading its values; ``soft`` as for `check_batch`.

    Raises:
        DeatError: Images or labels have a wrong type or shape.
    """
    check_tensors(images, labels)
    if not images.is_floating_point():
        raise DeatError(
            f"images must be floating-point in [0, 1], not {_describe(images)}: convert to float and divide by 255"
        )
    if images.ndim != 4 or images.numel() == 0:
        raise DeatError(f"images must be a non-empty tensor of shape (N, C, H, W), not {_describe(images)}")
    _check_label_types(labels, len(images), soft=soft)


def check_pixels(images: Tensor, *, allow_nan: bool = False, tolerance: float = ROUNDING) -> None:
    """Check that floating-point images are in [0, 1], but for rounding; synchronizes with the device.

    Raises:
        DeatError: A pixel is outside [0, 1] by more than ``tolerance``, or is NaN, unless ``allow_nan``.
    """
    low, high = (bound.item() for bound in images.detach().aminmax())
    if low != low:
        if allow_nan:
            return
        raise DeatError("the images contain NaN: check the preprocessing, for instance for a division by zero")
    if low < -tolerance or high > 1 + tolerance:
        raise DeatError(
            f"images must be in [0, 1], not in [{_shown(low)}, {_shown(high)}]: "
            "divide by 255 if they are 0 to 255, and move normalization into the model, as its first layer"
        )


def _shown(bound: float) -> str:
    """Format a bound with enough digits to show whether it is outside [0, 1]."""
    short = f"{bound:.4g}"
    return short if (float(short) < 0, float(short) > 1) == (bound < 0, bound > 1) else f"{bound:.8g}"


def _check_labels(labels: Tensor, count: int, num_classes: int | None) -> None:
    _check_label_types(labels, count)
    check_label_values(labels, num_classes)


def are_soft(labels: Tensor) -> bool:
    """Return whether labels are class probabilities (N, K) rather than class indices (N,)."""
    return labels.ndim == 2 and labels.is_floating_point()


def _check_label_types(labels: Tensor, count: int, *, soft: bool = False) -> None:
    if (labels.ndim != 1 or labels.dtype != torch.int64) and not (soft and are_soft(labels)):
        also = " or floating-point class probabilities of shape (N, K)" if soft else ""
        raise DeatError(f"labels must be int64 class indices of shape (N,){also}, not {_describe(labels)}")
    if len(labels) != count:
        be = "is" if count == 1 else "are"
        found = f"{counted(count, 'image', '')} but {counted(len(labels), 'label', '')}"
        raise DeatError(f"there {be} {found}: give one label per image")


def check_label_values(labels: Tensor, num_classes: int | None = None) -> None:
    """Check that labels (N,) are from 0 to ``num_classes`` - 1, or are class probabilities (N, ``num_classes``).

    This synchronizes with the device.

    Raises:
        DeatError: A label is out of range, or probabilities are negative or do not add up to 1.
    """
    if len(labels) == 0:
        return
    if are_soft(labels):
        _check_probabilities(labels, num_classes)
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or (num_classes is not None and high >= num_classes):
        wrong = low if low < 0 else high
        allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1} for {num_classes} classes"
        raise DeatError(f"label {wrong} is out of range: labels must be {allowed}")


def _check_probabilities(labels: Tensor, num_classes: int | None) -> None:
    if num_classes is not None and labels.shape[1] != num_classes:
        raise DeatError(f"labels of {labels.shape[1]} class probabilities do not fit {num_classes} classes: give one "
                        "probability per class")  # fmt: skip
    sums = labels.float().sum(dim=1)
    if not (bool((labels >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())):
        raise DeatError("class probabilities must be 0 or more and add up to 1 for each image: check the labels")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
