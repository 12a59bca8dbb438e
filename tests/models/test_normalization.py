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
        (HALF, None, None, "--mean and --std belong together"),
        (None, HALF, None, "--mean and --std belong together"),
        (HALF, (0.5,), None, "one number per channel each"),
        (HALF, HALF, "cifar10", "--normalize cifar10 and --mean, --std exclude each other"),
        (None, None, "cifar", "--normalize cifar is unknown: did you mean 'cifar10'"),
        ((125.3, 123.0, 113.9), HALF, None, r"--mean has 125\.3, not in \[0, 1\]: give values for images in \[0, 1\]"),
        (HALF, (0.0, 0.5, 0.5), None, "--std has 0, not in"),
        ((float("nan"),) * 3, HALF, None, "--mean has nan"),
    ],
)
def test_parse_normalization_refuses(mean: Any, std: Any, name: str | None, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        parse_normalization(mean, std, name)
