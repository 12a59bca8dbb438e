"""Timing of the sides of a comparison, alternating in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Clock = Callable[[], float]
Notify = Callable[[str], None]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        run: The function to time.
        prepare: Function that restores the state before ``run``; not timed.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def device_clock(device: torch.device) -> Clock:
    """Return a clock that synchronizes with the device first."""
    if device.type == "cpu":
        return time.perf_counter

    def read() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return read


def alternate(
    sides: Mapping[str, Side],
    repeats: int,
    *,
    warm_up: bool = True,
    clock: Clock = time.perf_counter,
    notify: Notify = lambda side: None,
) -> Times:
    """Time every side ``repeats`` times, in turn.

    A temporary slowdown of the machine then affects all sides. The order is reversed in every other round, so that no
    side always follows the same one.

    Args:
        sides: The sides by name.
        repeats: Number of rounds.
        warm_up: Whether to run each side once before, untimed.
        clock: Function that returns seconds.
        notify: Called with the name of the next side.

    Returns:
        Seconds, by side and round.
    """
    times: Times = {name: [] for name in sides}
    first = 0 if warm_up else 1
    for rounds in range(first, repeats + 1):
        for name in sides if rounds % 2 else reversed(list(sides)):
            notify(name)
            sides[name].prepare()
            began = clock()
            sides[name].run()
            seconds = clock() - began
            if rounds >= 1:
                times[name].append(seconds)
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over the rounds of ``above / below``."""
    return median(a / b for a, b in zip(above, below, strict=True))
