"""Normalization given by the user: numbers, or the name of a dataset."""

from __future__ import annotations

import math

from deat_rb.data.normalization import NORMALIZATION, Normalization
from deat_rb.utils.errors import DeatError, did_you_mean


def parse_normalization(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, name: str | None
) -> Normalization | None:
    """Return mean and standard deviation per channel, from --mean and --std or from --normalize; None if not given.

    Raises:
        DeatError: Only one of mean and std is given, --normalize is combined with them, the name is unknown, or a value
            is invalid for images in [0, 1].
    """
    if name is not None:
        if mean is not None or std is not None:
            raise DeatError(f"--normalize {name} cannot be combined with --mean and --std: omit one or the other")
        if name not in NORMALIZATION:
            raise DeatError(f"--normalize {name} is unknown: {did_you_mean(name, NORMALIZATION)}")
        return NORMALIZATION[name]
    if mean is None and std is None:
        return None
    if mean is None or std is None or len(mean) != len(std):
        raise DeatError("--mean and --std must be given together, each with one number per channel")
    for flag, numbers, low in (("--mean", mean, 0.0), ("--std", std, 1e-6)):
        for number in numbers:
            if not (math.isfinite(number) and low <= number <= 1):
                raise DeatError(f"{flag} {number:g} is not in [{low:g}, 1]: give values for images in [0, 1], "
                                "such as 0.4914 (not 125.3)")  # fmt: skip
    return mean, std
