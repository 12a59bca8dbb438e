"""Times of several sides of a comparison, taken in turn in one process."""

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
    """What is timed.

    Attributes:
        run: The work.
        prepare: Puts everything back to where ``run`` begins; not timed.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def device_clock(device: torch.device) -> Clock:
    """A clock that first waits for what is queued on the device."""
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
    """Times every side ``repeats`` times, in turn.

    What slows the machine down for a while then slows all sides. Every other round runs backwards, so that no side
    always comes after the same one.

    Args:
        sides: By name.
        repeats: Rounds.
        warm_up: Whether each runs once untimed before.
        clock: Gives seconds.
        notify: Is told the side that is about to run.

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
    """The median of the rounds' ratios ``above / below``."""
    return median(a / b for a, b in zip(above, below, strict=True))
