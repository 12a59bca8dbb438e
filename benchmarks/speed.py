"""Times of training steps against the published loops and the bare passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

from benchmarks.limit import Pass
from benchmarks.problem import Problem, Step, fix_steps, full_pass_side, limit_side, published_side
from benchmarks.published import LOOPS, family
from benchmarks.timing import Clock, Notify, Times, alternate, device_clock, ratio
from deat_rb import create
from deat_rb.methods.registry import known_methods, recipe
from deat_rb.utils.errors import DeatError

LIMIT_TARGET = 0.93
TARGETS: Mapping[str, Mapping[str, float]] = {
    "bf16": {"pgd-7": 3.5, "trades": 5.5, "mart": 3.2, "m-deat": 2.2},
    "fp32": {"pgd-7": 1.6, "trades": 2.6, "mart": 1.5, "m-deat": 1.15},
}
"""Target speedups over the published loop, for PreActResNet-18 and batches of 128 on two CPU cores."""

PUBLISHED_FULL_PASS = 3.04
PUBLISHED_SECONDS = {"pgd-7": 25.0, "trades": 64.0, "mart": 34.0, "m-deat": 5.4}
PUBLISHED_STEPS = {"m-deat": 2}
"""Measurements of the authors' scripts: seconds per full pass and per batch, and steps where they differ from ours.

They are for PreActResNet-18 and batches of 128.
"""

FAITHFUL = 0.1


@dataclass(frozen=True)
class Row:
    """Times of a method in one precision.

    Attributes:
        method: Name of the method, and of those with the same training step.
        precision: Precision of our step and the bare passes; the published loop runs in float32.
        steps: Number of attack steps or replays.
        passes: Number of forward passes (with a backward pass, if there is one), in mini-batches.
        batch_size: Images per batch.
        published: Seconds per batch of the published loop, by round.
        ours: Seconds per training step, by round.
        limit: Seconds of the bare passes, by round.
        target: Target for the speedup over the published loop, if there is one.
    """

    method: str
    precision: str
    steps: int
    passes: float
    batch_size: int
    published: list[float]
    ours: list[float]
    limit: list[float]
    target: float | None = None

    @property
    def milliseconds_per_image(self) -> float:
        """Milliseconds per image of the training step."""
        return 1000 * median(self.ours) / self.batch_size

    @property
    def passes_per_second(self) -> float:
        """Mini-batch passes per second of the training step."""
        return self.passes / median(self.ours)

    @property
    def speedup(self) -> float:
        """The published loop's time divided by ours."""
        return ratio(self.published, self.ours)

    @property
    def of_limit(self) -> float:
        """The bare passes' time divided by the training step's."""
        return ratio(self.limit, self.ours)


@dataclass(frozen=True)
class Faithful:
    """Cost of our copy of a published loop compared with the authors' script, in full passes.

    Attributes:
        method: Name of the method.
        steps: Number of attack steps or replays.
        loop: Time of the loop divided by that of a full pass: median over the rounds.
        script: Time of the script divided by that of a full pass.
    """

    method: str
    steps: int
    loop: float
    script: float

    @property
    def deviation(self) -> float:
        """Relative deviation of the loop's cost from the script's."""
        return self.loop / self.script - 1


def check_methods(names: Sequence[str]) -> list[str]:
    """Return the canonical names of methods; without names, of all methods with a published loop.

    Raises:
        DeatError: A method is unknown or has no published loop.
    """
    canonical = [recipe(name)[0] for name in names or known_methods()]
    if not names:
        return [name for name in canonical if family(name) in LOOPS]
    for name in canonical:
        if family(name) not in LOOPS:
            raise DeatError(f"--methods {name} has no published loop to compare with; omit it")
    return list(dict.fromkeys(canonical))


def alike(problem: Problem, methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Group methods with the same training step after `fix_steps`, such as PGD-7 and M+PGD at its maximum.

    A group is measured once. Methods with a known time of the authors' script come first in their group.
    """
    groups: dict[tuple[str, int, float | None], list[str]] = {}
    for name in methods:
        trainer = create(name, problem.model)
        fix_steps(trainer)
        groups.setdefault((family(name), trainer.steps, trainer.alpha), []).append(name)
    return [tuple(sorted(names, key=lambda name: name not in PUBLISHED_SECONDS)) for names in groups.values()]


def targets_apply(arch: str, problem: Problem) -> bool:
    """Return whether the targets apply to this network, batch size and device."""
    return arch == "preactresnet18" and len(problem.images) == 128 and problem.device.type == "cpu"


def measure(
    problem: Problem,
    methods: Sequence[str],
    precisions: Sequence[str],
    repeats: int,
    *,
    with_targets: bool = False,
    compiled: bool = False,
    clock: Clock | None = None,
    notify: Notify = lambda side: None,
) -> Iterator[tuple[list[Row], Faithful | None]]:
    """Measure each group of `alike` methods once, alternating its sides.

    Args:
        problem: The network and the batch.
        methods: Names of the methods.
        precisions: Precisions among fp32, bf16 and fp16.
        repeats: Number of rounds.
        with_targets: Whether the targets apply to this problem.
        compiled: Whether to use `torch.compile` for our passes.
        clock: Function that returns seconds; by default that of the device.
        notify: Called with the name of the next measurement.

    Yields:
        The rows of a group, one per precision, and the cost of its published loop if the authors' time is known.
    """
    clock = clock or device_clock(problem.device)
    for names in alike(problem, methods):
        method = names[0]
        steps = {precision: Step(problem, method, precision, compiled=compiled) for precision in precisions}
        trainer = steps[precisions[0]].trainer
        sides = {"published": published_side(problem, method, trainer)}
        known_script = with_targets and method in PUBLISHED_SECONDS
        if known_script:
            sides["full pass"] = full_pass_side(problem)
            if method in PUBLISHED_STEPS:
                sides["script"] = published_side(problem, method, trainer, PUBLISHED_STEPS[method])
        passes: dict[str, list[Pass]] = {}
        with ExitStack() as prepared:
            for precision, step in steps.items():
                prepared.enter_context(step)
                passes[precision] = step.passes()
                sides[f"ours {precision}"] = step.side()
                sides[f"limit {precision}"] = limit_side(problem, passes[precision], precision)
            times = alternate(sides, repeats, clock=clock, notify=partial(_notify, notify, method))
        rows = [
            Row(
                ", ".join(names),
                precision,
                steps=trainer.steps,
                passes=sum(each.rows for each in passes[precision]) / len(problem.images),
                batch_size=len(problem.images),
                published=times["published"],
                ours=times[f"ours {precision}"],
                limit=times[f"limit {precision}"],
                target=TARGETS.get(precision, {}).get(method) if with_targets else None,
            )
            for precision in precisions
        ]
        yield rows, _faithful(method, trainer.steps, times) if known_script else None


def _notify(notify: Notify, method: str, side: str) -> None:
    notify(f"{method}: {side}")


def _faithful(method: str, steps: int, times: Times) -> Faithful:
    script = times.get("script", times["published"])
    return Faithful(
        method,
        PUBLISHED_STEPS.get(method, steps),
        loop=ratio(script, times["full pass"]),
        script=PUBLISHED_SECONDS[method] / PUBLISHED_FULL_PASS,
    )
