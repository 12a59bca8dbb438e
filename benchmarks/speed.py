"""Training steps beside the published loops and beside the bare passes."""

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
"""How many times as fast as the published loop, for PreActResNet-18 and batches of 128 on two CPU cores."""

PUBLISHED_FULL_PASS = 3.04
PUBLISHED_SECONDS = {"pgd-7": 25.0, "trades": 64.0, "mart": 34.0, "m-deat": 5.4}
PUBLISHED_STEPS = {"m-deat": 2}
"""The authors' scripts: seconds per batch of 128 with PreActResNet-18 where a full pass takes `PUBLISHED_FULL_PASS`."""

FAITHFUL = 0.1


@dataclass(frozen=True)
class Row:
    """One method in one precision.

    Attributes:
        method: Its name, and those of the methods whose step is the same.
        precision: Ours and the limit's; the published loop runs in float32.
        steps: The steps or replays.
        passes: Forwards with their backwards, if they have one, in mini-batches.
        batch_size: N.
        published: Seconds per batch of the published loop, by round.
        ours: Of the training step.
        limit: Of the bare passes.
        target: How many times as fast as the published loop it is to be, where that is said.
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
        """Of the training step."""
        return 1000 * median(self.ours) / self.batch_size

    @property
    def passes_per_second(self) -> float:
        """Mini-batch passes of the training step."""
        return self.passes / median(self.ours)

    @property
    def speedup(self) -> float:
        """How many times as fast as the published loop."""
        return ratio(self.published, self.ours)

    @property
    def of_limit(self) -> float:
        """The bare passes' share of the training step."""
        return ratio(self.limit, self.ours)


@dataclass(frozen=True)
class Faithful:
    """Whether a published loop costs what the authors' script costs, in full passes.

    Attributes:
        method: Its name.
        steps: Its steps or replays.
        loop: The loop's time in its own full passes: the median of the rounds' ratios.
        script: The script's.
    """

    method: str
    steps: int
    loop: float
    script: float

    @property
    def deviation(self) -> float:
        """By which share the loop costs more."""
        return self.loop / self.script - 1


def check_methods(names: Sequence[str]) -> list[str]:
    """The canonical names of the methods to be measured; of none, all that have a published loop.

    Raises:
        DeatError: There is no such method, or no published loop for it.
    """
    found = [recipe(name)[0] for name in names or known_methods()]
    if not names:
        return [name for name in found if family(name) in LOOPS]
    for name in found:
        if family(name) not in LOOPS:
            raise DeatError(f"--methods {name} has no published loop to be compared with; leave it out")
    return list(dict.fromkeys(found))


def alike(problem: Problem, methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups methods whose steps are the same once `fix_steps` has fixed them, such as PGD-7 and M+PGD at its bound.

    One measurement is then all of theirs. The first of a group is one that a target or the authors' time is for.
    """
    groups: dict[tuple[str, int, float | None], list[str]] = {}
    for name in methods:
        trainer = create(name, problem.model)
        fix_steps(trainer)
        groups.setdefault((family(name), trainer.steps, trainer.alpha), []).append(name)
    return [tuple(sorted(names, key=lambda name: name not in PUBLISHED_SECONDS)) for names in groups.values()]


def targets_apply(arch: str, problem: Problem) -> bool:
    """Whether the targets beside the published loops are for this network, batch and device."""
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
    """Measures method after method, those that are `alike` once; all sides of a method run in turn.

    Args:
        problem: The network and the batch.
        methods: Their names.
        precisions: fp32, bf16, fp16.
        repeats: Rounds.
        with_targets: Whether the targets beside the published loops are for this problem.
        compiled: Whether `torch.compile` makes our passes.
        clock: Gives seconds; by default the device's.
        notify: Is told what is about to run.

    Yields:
        A method's rows, one per precision, and how faithful its published loop is, where the authors' time is known.
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
            times = alternate(sides, repeats, clock=clock, notify=partial(_tell, notify, method))
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


def _tell(notify: Notify, method: str, side: str) -> None:
    notify(f"{method}: {side}")


def _faithful(method: str, steps: int, times: Times) -> Faithful:
    script = times.get("script", times["published"])
    return Faithful(
        method,
        PUBLISHED_STEPS.get(method, steps),
        loop=ratio(script, times["full pass"]),
        script=PUBLISHED_SECONDS[method] / PUBLISHED_FULL_PASS,
    )
