"""Times of training steps beside the published loops and beside the bare passes."""

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
"""Speedups over the published loop to be reached, for PreActResNet-18 and batches of 128 on two CPU cores."""

PUBLISHED_FULL_PASS = 3.04
PUBLISHED_SECONDS = {"pgd-7": 25.0, "trades": 64.0, "mart": 34.0, "m-deat": 5.4}
PUBLISHED_STEPS = {"m-deat": 2}
"""The authors' scripts: seconds per batch of 128 with PreActResNet-18 where a full pass takes `PUBLISHED_FULL_PASS`."""

FAITHFUL = 0.1


@dataclass(frozen=True)
class Row:
    """Times of one method in one precision.

    Attributes:
        method: Its name, and those of the methods whose step is the same.
        precision: Of ours and the limit; the published loop runs in float32.
        steps: Number of steps or replays.
        passes: Forward passes, with their backward pass if they have one, in mini-batches.
        batch_size: N.
        published: Seconds per batch of the published loop, by round.
        ours: Seconds of the training step.
        limit: Seconds of the bare passes.
        target: The speedup over the published loop to be reached, if there is a target.
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
    """Cost of a published loop beside the authors' script, in full passes.

    Attributes:
        method: Its name.
        steps: Number of steps or replays.
        loop: The loop's time in its own full passes: the median of the rounds' ratios.
        script: The script's time in its full passes.
    """

    method: str
    steps: int
    loop: float
    script: float

    @property
    def deviation(self) -> float:
        """Relative excess of the loop's cost."""
        return self.loop / self.script - 1


def check_methods(names: Sequence[str]) -> list[str]:
    """Return the canonical names of methods; without names, of all methods with a published loop.

    Raises:
        DeatError: There is no such method, or no published loop for it.
    """
    canonical = [recipe(name)[0] for name in names or known_methods()]
    if not names:
        return [name for name in canonical if family(name) in LOOPS]
    for name in canonical:
        if family(name) not in LOOPS:
            raise DeatError(f"--methods {name} has no published loop to compare with; leave it out")
    return list(dict.fromkeys(canonical))


def alike(problem: Problem, methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Group methods whose training steps are the same after `fix_steps`, such as PGD-7 and M+PGD at its bound.

    A group is measured once. Its first method is one with a target or a known time of the authors' script.
    """
    groups: dict[tuple[str, int, float | None], list[str]] = {}
    for name in methods:
        trainer = create(name, problem.model)
        fix_steps(trainer)
        groups.setdefault((family(name), trainer.steps, trainer.alpha), []).append(name)
    return [tuple(sorted(names, key=lambda name: name not in PUBLISHED_SECONDS)) for names in groups.values()]


def targets_apply(arch: str, problem: Problem) -> bool:
    """Return whether the targets hold for this network, batch and device."""
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
    """Measure the methods, those that are `alike` once, alternating the sides of a method.

    Args:
        problem: The network and the batch.
        methods: Names of the methods.
        precisions: fp32, bf16, fp16.
        repeats: Number of rounds.
        with_targets: Whether the targets hold for this problem.
        compiled: Whether `torch.compile` makes our passes.
        clock: Returns seconds; by default the device's.
        notify: Called with the name of what runs next.

    Yields:
        A group's rows, one per precision, and the cost of its published loop, if the authors' time is known.
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
