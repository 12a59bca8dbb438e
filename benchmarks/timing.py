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
        settled: Function that returns whether further runs are like the last one, which is asked after a run.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    settled: Callable[[], bool] = lambda: True

    def warm_up(self) -> None:
        """Run the side until it has settled, at least once."""
        done = False
        while not done:
            self.prepare()
            self.run()
            done = self.settled()


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
        warm_up: Whether to warm up each side before, untimed.
        clock: Function that returns seconds.
        notify: Called with the name of the next side.

    Returns:
        Seconds, by side and round.
    """
    times: Times = {name: [] for name in sides}
    for name in reversed(list(sides)) if warm_up else ():
        notify(name)
        sides[name].warm_up()
    for rounds in range(repeats):
        for name in reversed(list(sides)) if rounds % 2 else sides:
            notify(name)
            sides[name].prepare()
            began = clock()
            sides[name].run()
            times[name].append(clock() - began)
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over the rounds of ``above / below``."""
    return median(a / b for a, b in zip(above, below, strict=True))
