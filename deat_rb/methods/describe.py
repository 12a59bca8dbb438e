"""The table of methods in words: what `deat-rb methods` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deat_rb.methods.registry import family, is_of_the_table, known_methods, recipe
from deat_rb.methods.schedules import AccuracyThreshold, EveryDEpochs, GradientMagnitude
from deat_rb.methods.stopping import GradientRatio, RobustnessDrop
from deat_rb.training.base import Constant, Schedule, StoppingRule
from deat_rb.utils.errors import DeatError


@dataclass(frozen=True)
class MethodRow:
    """A line of `deat-rb methods`, all text.

    Attributes:
        name: The method's or, of a family, an example's.
        family: How the names of its family are written, such as ``free-R``; the name itself where it stands alone.
        attack: What crafts.
        loss: What is learnt from.
        schedule: What sets the steps.
        stop: What ends training early.
        cost: Backward passes over T epochs of M mini-batches.
        paper: Where the paper has it, and its source.
    """

    name: str
    family: str
    attack: str
    loss: str
    schedule: str
    stop: str
    cost: str
    paper: str


def describe(name: str) -> MethodRow:
    """A method's row in words."""
    canonical, row = recipe(name)
    loss = row.loss if isinstance(row.loss, str) else row.loss.name
    return MethodRow(
        name=canonical,
        family=family(canonical),
        attack=row.summary or getattr(row.attack, "__name__", "an attack of its own"),
        loss={"ce": "CE", "trades": "CE(clean) + 6 KL", "mart": "MART, lambda 6"}.get(loss, loss),
        schedule=_SCHEDULES.get(row.schedule, row.schedule.__name__),
        stop=_STOPS.get(row.stopping, row.stopping.__name__ if row.stopping else "-"),
        cost=row.cost or "counted",
        paper=row.paper or "-",
    )


_SCHEDULES: dict[type[Schedule], str] = {
    Constant: "constant",
    EveryDEpochs: "every D epochs",
    AccuracyThreshold: "training accuracy",
    GradientMagnitude: "gradient magnitude",
}

_STOPS: dict[type[StoppingRule] | None, str] = {
    None: "-",
    RobustnessDrop: "PGD-5 drops by over 20 points",
    GradientRatio: "l_X surges (m = 2, gamma 1.5)",
}


def method_table(complain: Callable[[str], None] | None = None) -> list[MethodRow]:
    """The whole table, each family by its example, and the methods registered.

    Args:
        complain: Is told of each entry point that cannot be loaded, in a sentence; without it the first one is raised.

    Raises:
        DeatError: An entry point cannot be loaded.
    """
    rows = []
    for name in known_methods():
        try:
            rows.append(describe(name))
        except DeatError as error:
            if complain is None:
                raise
            complain(str(error))
    return rows


def explain(name: str) -> str:
    """About ten lines on a method: the four choices, the cost, where the paper has it, and what was settled."""
    canonical, row = recipe(name)
    text = describe(canonical)
    settings = (
        "fast: " + str(row.fast_epochs) + " epochs, cyclic LR to 0.1; standard: 50 epochs, LR 0.05 cut at 25 and 40"
    )
    guided = "guided by the gradient magnitude" if row.guided else text.schedule
    lines = [
        f"{canonical}: {guided}; {row.trainer.__name__}",
        f"  attack     {text.attack}",
        f"  loss       {text.loss}",
        f"  schedule   {text.schedule}" + ("; alpha* = max(alpha, eps/r)" if row.guided else ""),
        *([] if text.stop == "-" else [f"  stop       {text.stop}"]),
        f"  cost       {text.cost} backward passes over T epochs of M mini-batches",
        f"  settings   {settings}",
        f"  paper      {'arXiv:2103.03076, ' if is_of_the_table(canonical) else ''}{text.paper}",
    ]
    return "\n".join(lines + [f"  note       {note}" for note in row.notes])
