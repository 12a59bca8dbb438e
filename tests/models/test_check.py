"""`deat_rb.models.check`: trial forward passes and what cannot be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deat_rb.models.check import check_trainable, trial_logits
from deat_rb.utils.errors import DeatError

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Forward(nn.Module):
    """A network whose forward is a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def means(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


def failing(images: Tensor) -> Tensor:
    raise RuntimeError("no memory\nat all")


def in_place(images: Tensor) -> Tensor:
    return images.sub_(0.5).mean(dim=(2, 3))


def test_trial_logits_returns_the_logits() -> None:
    assert torch.equal(trial_logits(Forward(means), IMAGES, num_classes=3), means(IMAGES))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            failing,
            {},
            r"^the model does not accept torch\.float32 images of 3x8x8 on cpu \(RuntimeError: no memory\): ",
        ),
        (in_place, {}, "^the model changes its input in place"),
        (lambda x: (means(x), means(x)), {}, "^the model returns a tuple for 2 images of 3x8x8"),
        (lambda x: {"logits": means(x)}, {}, "^the model returns a dict"),
        (lambda x: means(x).argmax(dim=1), {}, r"^the model returns torch\.int64 logits"),
        (lambda x: means(x)[:, 0], {}, r"logits of shape \(2,\) for 2 images of 3x8x8, not \(2, K\) with K >= 2:"),
        (lambda x: means(x)[:, :1], {}, r"logits of shape \(2, 1\)"),
        (lambda x: means(x)[:1], {}, r"logits of shape \(1, 3\)"),
        (
            means,
            {"num_classes": 4, "source": "a.pt"},
            r"^a\.pt returns logits of shape \(2, 3\) .* not \(2, 4\)",
        ),
        (means, {"num_classes": 4, "advice": "try another"}, r"not \(2, 4\): try another$"),
    ],
)
def test_trial_logits_refuses(function: Callable[[Tensor], Any], options: dict[str, Any], message: str) -> None:
    before = IMAGES.clone()
    with pytest.raises(DeatError, match=message):
        trial_logits(Forward(function), IMAGES, **options)
    assert torch.equal(IMAGES, before)


def test_trial_logits_restores_the_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    trial_logits(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.AvgPool1d(48)), IMAGES)
    assert torch.equal(torch.rand(1), expected)


class ExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


class TensorExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(1)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), r"^x has lazy layers \(1\.weight has no shape yet\)"),
        (nn.Sequential(ExtraState(3, 2)), r"^x has a dict under '0\._extra_state' in its state dict"),
        (nn.Linear(3, 2, dtype=torch.complex64), "^x has the complex tensor 'weight'"),
    ],
)
def test_check_trainable_refuses_what_cannot_be_saved(net: nn.Module, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        check_trainable(net, source="x")


def test_check_trainable_accepts_extra_state_that_is_a_tensor() -> None:
    check_trainable(TensorExtraState(3, 2), source="x")
    check_trainable(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), source="x")
