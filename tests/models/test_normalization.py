"""`deat_rb.models.normalization`: --mean, --std and --normalize."""

from __future__ import annotations

from typing import Any

import pytest

from deat_rb.data.normalization import NORMALIZATION
from deat_rb.models.normalization import parse_normalization
from deat_rb.utils.errors import DeatError

HALF = (0.5, 0.5, 0.5)


def test_parse_normalization() -> None:
    assert parse_normalization(None, None, None) is None
    assert parse_normalization(HALF, (0.25,) * 3, None) == (HALF, (0.25,) * 3)
    assert parse_normalization(None, None, "cifar100") == NORMALIZATION["cifar100"]


@pytest.mark.parametrize(
    ("mean", "std", "name", "message"),
    [
        (HALF, None, None, "--mean and --std must be given together"),
        (None, HALF, None, "--mean and --std must be given together"),
        (HALF, (0.5,), None, "each with one number per channel"),
        (HALF, HALF, "cifar10", "--normalize cifar10 cannot be combined with --mean and --std"),
        (None, None, "cifar", "--normalize cifar is unknown: did you mean 'cifar10'"),
        ((125.3, 123.0, 113.9), HALF, None, r"--mean 125\.3 is not in \[0, 1\]: give values for images in \[0, 1\]"),
        (HALF, (0.0, 0.5, 0.5), None, "--std 0 is not in"),
        ((float("nan"),) * 3, HALF, None, "--mean nan is not in"),
    ],
)
def test_parse_normalization_refuses(mean: Any, std: Any, name: str | None, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        parse_normalization(mean, std, name)
