"""Choice of a method, its epochs and options for a budget of passes or of time, from measured results.

The results are in budget.json; `Table` describes the form of each of its tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from deat_rb.methods.registry import recipe
from deat_rb.reproduction.estimate import Clock, seconds_of
from deat_rb.runs.options import GROUP_OF, make_options
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted, duration

UNITS = {"s": 1, "m": 60, "h": 3600}

MOST = 2.0
"""How many times the epochs that were measured a longer run may have."""

LONGEST = 8191
"""The most epochs of a run whose method was not measured."""


class Measured(BaseModel):
    """A measured run.

    Attributes:
        options: Options of `deat-rb train`, with at least ``method`` and ``epochs``; others keep their defaults.
        passes: Backward passes over the training images of the whole run, counted in units of all images.
        last_epoch: Those of its last epoch, or fewer, if a schedule raises the steps; None if each epoch has as many.
        natural: Natural accuracy, in percent.
        robust: Accuracy under the attack of `Table.attack`, in percent.
        source: Where it was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: dict[str, Any]
    passes: float = Field(gt=0)
    last_epoch: float | None = Field(None, gt=0)
    natural: float = Field(ge=0, le=100)
    robust: float = Field(ge=0, le=100)
    source: str

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.options["method"])

    @property
    def epochs(self) -> int:
        """The epochs of the run."""
        return int(self.options["epochs"])

    def within(self, amount: float, cost: float) -> int:
        """Return the epochs for a budget: more than were measured cost as much as the last one, each, or more.

        Args:
            amount: The budget.
            cost: The cost of the measured run, in the same unit.
        """
        if amount < cost:
            return int(self.epochs * amount / cost)
        each = cost / self.epochs if self.last_epoch is None else cost * self.last_epoch / self.passes
        return min(self.epochs + int((amount - cost) / each), int(MOST * self.epochs))


class Table(BaseModel):
    """Measured runs that can be compared with each other, from which a budget's method is chosen.

    Attributes:
        data: Data and network of the runs.
        attack: The attack that ranks them.
        rows: The runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    attack: str
    rows: tuple[Measured, ...] = Field(min_length=1)


class NetworkTable(Table):
    """Runs with the options of those of another table and another network.

    Attributes:
        arch: The network.
    """

    arch: str


class Tables(BaseModel):
    """Tables of measured runs.

    Attributes:
        schema_version: Version of the schema.
        tables: The tables from which is chosen, the most trustworthy one first.
        other_networks: Those of other networks, which are printed beside the choice if the network is trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3]
    tables: tuple[Table, ...] = Field(min_length=1)
    other_networks: tuple[NetworkTable, ...] = ()


CHANGE_COST = frozenset({"steps", "max_steps", "gamma", "awp", "awp_warmup", "tau"})
"""Options that change the number of passes of a measured run."""

CHANGE_ACCURACY = {name for name, group in GROUP_OF.items() if group in ("model", "attack", "optim")} - {
    "method", "setting", "arch", "seed",
} | {"augment", "extra_data"}  # fmt: skip
"""Options that change the accuracy of a measured run, whose data and network are named beside it."""


class Budget(NamedTuple):
    """A budget: passes over the training images, or seconds of training and validation."""

    amount: float
    unit: Literal["passes", "seconds"]

    def __str__(self) -> str:
        return counted(self.amount, "pass", "g") if self.unit == "passes" else duration(self.amount)


@dataclass(frozen=True)
class Choice:
    """A choice for a budget.

    Attributes:
        options: Options of `deat-rb train`, including the given ones.
        reasons: What was chosen, and why.
    """

    options: dict[str, Any]
    reasons: tuple[str, ...]


def read_tables() -> Tables:
    """Return the tables that come with deat-rb."""
    return Tables.model_validate_json(files("deat_rb.reproduction").joinpath("budget.json").read_bytes())


def parse_budget(text: str) -> Budget:
    """Return a budget such as ``40`` (passes over the training images), ``30m``, ``2h`` or ``90s``.

    Raises:
        DeatError: ``text`` is not a budget above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smh]?)", text.strip(), re.ASCII)
    amount = float(match[1]) * UNITS.get(match[2], 1) if match else 0.0
    if match is None or not amount:
        raise DeatError(
            f"--budget '{text}' is not a budget; give passes over the training images such as 40, or a time such as 30m"
        )
    return Budget(amount, "seconds" if match[2] else "passes")


def choose(
    budget: Budget,
    given: Mapping[str, Any],
    *,
    tables: Tables | None = None,
    notify: Callable[[str], None] = print,
) -> Choice:
    """Choose options for a budget.

    The first table decides that has runs of the given method and setting whose methods take the given options. Of these
    runs the most robust is taken that the budget allows, and its epochs are raised to the budget, at most twofold. If
    the budget is smaller than all of them, the epochs of the cheapest are reduced. A given method that was not measured
    gets as many epochs as it can.

    Args:
        budget: The budget. A budget of time is converted by timing ten batches of each network and loss.
        given: Options of `deat-rb train`, which override the chosen ones; ``epochs`` must not be among them.
        tables: The measured runs; by default those that come with deat-rb.
        notify: Called with a sentence before each measurement.

    Raises:
        DeatError: The budget is less than an epoch, the cost of the given method is not known in advance, an option is
            invalid, or no measured method takes the given options.
    """
    if given.get("epochs") is not None:
        raise DeatError(f"--epochs {given['epochs']} and --budget exclude each other; give only one")
    costs = _Costs(budget, Clock(notify))
    refused: dict[str, DeatError] = {}
    tables = read_tables() if tables is None else tables
    for table in tables.tables:
        candidates, refusing = _candidates([row for row in table.rows if _agrees(row, given)], given, costs)
        refused |= refusing
        if candidates:
            return _measured(
                budget, table, candidates, costs, left_out=sorted(refused), other_networks=tables.other_networks
            )
    if refused:
        raise next(iter(refused.values()))
    return _unmeasured(budget, given, costs)


def _measured(
    budget: Budget,
    table: Table,
    candidates: Sequence[_Candidate],
    costs: _Costs,
    *,
    left_out: Sequence[str],
    other_networks: Sequence[NetworkTable],
) -> Choice:
    """Choose from measured runs of one table."""
    allowed = [each for each in candidates if each.cost <= budget.amount]
    if allowed:
        chosen = max(allowed, key=lambda each: (each.row.robust, each.row.natural))
        why = f"the most robust of {counted(len(allowed), 'measured run')} within {budget}"
    else:
        chosen = min(candidates, key=lambda each: each.cost / each.row.epochs)
        all_runs = counted(len(candidates), "measured run")
        why = f"the cheapest per epoch of {all_runs}, all of which take more than {budget}"
    row = chosen.row
    if chosen.has_its_passes:
        epochs = row.within(budget.amount, chosen.cost)
    else:
        epochs = costs.most_epochs(chosen.options, int(MOST * row.epochs))
    if epochs < 1:
        each = Budget(chosen.cost / row.epochs, budget.unit)
        raise DeatError(
            f"--budget is too small: an epoch of {row.method} takes {each}, but the budget is {budget}; give more"
        )
    reasons = [f"{row.method}, {counted(epochs, 'epoch')}: {why}", _result(table, row)]
    arch = make_options(chosen.options).model.arch
    for network in other_networks:
        if network.arch == arch:
            reasons += [_result(network, measured) for measured in network.rows if measured.options == row.options]
    if epochs != row.epochs:
        change = "raised" if epochs > row.epochs else "reduced"
        reasons.append(f"for the budget, the epochs are {change} to {epochs}, which were not measured")
    if epochs > row.epochs and row.last_epoch is not None:
        reasons.append(
            f"further epochs are counted with {row.last_epoch:g} passes each; if the steps rise, the run takes more "
            f"than {budget}"
        )
    if left_out:
        reasons.append(f"left out {', '.join(left_out)}, which your options exclude")
    if others := sorted(chosen.changed & CHANGE_ACCURACY):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        reasons.append(f"measured without your {flags}, which may change these accuracies")
    accurate = [each.row for each in allowed if each.row.natural > row.natural and each.row.method != row.method]
    if accurate:
        other = max(accurate, key=lambda each: each.robust)
        reasons.append(
            f"more accurate on clean images and less robust: --method {other.method} "
            f"(natural {other.natural:g} %, {table.attack} {other.robust:g} % with {other.passes:.3g} passes)"
        )
    return Choice({**chosen.options, "epochs": epochs}, tuple(reasons))


def _result(table: Table, row: Measured) -> str:
    """Return what was measured, as a sentence."""
    others = {name: value for name, value in row.options.items() if name not in ("method", "setting", "epochs")}
    flags = "".join(f", --{name.replace('_', '-')} {value}" for name, value in others.items())
    return (
        f"measured with {counted(row.epochs, 'epoch')}{flags}, {row.passes:.3g} passes: natural {row.natural:g} %, "
        f"{table.attack} {row.robust:g} % ({table.data}; {row.source})"
    )


def _agrees(row: Measured, given: Mapping[str, Any]) -> bool:
    """Return whether a run has the given method and setting."""
    method = given.get("method")
    if method is not None and recipe(str(method))[0] != row.method:
        return False
    return given.get("setting") in (None, row.options.get("setting", "fast"))


class _Candidate(NamedTuple):
    """A measured run with the given options.

    Attributes:
        row: The measured run.
        options: Its options and the given ones.
        changed: The given options that it had otherwise.
        cost: Its cost in the unit of the budget.
    """

    row: Measured
    options: dict[str, Any]
    changed: frozenset[str]
    cost: float

    @property
    def has_its_passes(self) -> bool:
        """Whether it takes the measured number of passes."""
        return not CHANGE_COST & self.changed


def _candidates(
    rows: Sequence[Measured], given: Mapping[str, Any], costs: _Costs
) -> tuple[list[_Candidate], dict[str, DeatError]]:
    """Return the runs whose methods take the given options, and why the other methods do not."""
    candidates: list[_Candidate] = []
    refused: dict[str, DeatError] = {}
    for row in rows:
        try:
            changed = _changed(row, given)
            # A learning rate is for its schedule and optimizer only.
            dropped = {"lr"} if {"optimizer", "lr_schedule"} & changed else set()
            options = {**{name: value for name, value in row.options.items() if name not in dropped}, **given}
            resolve(make_options(options))
        except DeatError as error:
            refused.setdefault(row.method, error)
            continue
        cost = costs.of(options, None if CHANGE_COST & changed else row.passes)
        candidates.append(_Candidate(row, options, changed, cost))
    taken = {each.row.method for each in candidates}
    return candidates, {method: error for method, error in refused.items() if method not in taken}


def _changed(row: Measured, given: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the given options that a measured run had otherwise."""
    before, after = (make_options(values).flat() for values in (row.options, {**row.options, **given}))
    return frozenset(name for name in given if before[name] != after[name])


class _Costs:
    """The cost of runs in the unit of a budget."""

    def __init__(self, budget: Budget, clock: Clock) -> None:
        self._budget, self._clock = budget, clock

    def of(self, options: Mapping[str, Any], passes: float | None = None) -> float:
        """Return the cost of a run; its number of passes must be given if it is not known in advance."""
        if passes is not None and self._budget.unit == "passes":
            return passes
        planned = self._clock.plan(make_options(options))
        if passes is None:
            bounds = planned.cost_bounds()
            if bounds is None:
                method = planned.config.attack.method
                raise DeatError(f"the cost of {method} is not known in advance: give --epochs instead of --budget")
            passes = bounds[1].backwards / planned.batches
        if self._budget.unit == "passes":
            return passes
        return seconds_of(planned, self._clock.times(planned), passes * planned.batches)

    def most_epochs(self, options: Mapping[str, Any], most: int) -> int:
        """Return the largest number of epochs, up to ``most``, whose cost is within the budget."""
        epochs, step = 0, 1 << most.bit_length()
        while step:  # the cost rises with the epochs, but not in proportion if a schedule raises the steps
            if epochs + step <= most and self.of({**options, "epochs": epochs + step}) <= self._budget.amount:
                epochs += step
            step >>= 1
        return epochs


def _unmeasured(budget: Budget, given: Mapping[str, Any], costs: _Costs) -> Choice:
    """Choose as many epochs as the budget allows, for a method without measured runs."""
    epochs = costs.most_epochs(given, LONGEST)
    method = recipe(make_options(given).attack.method)[0]
    if not epochs:
        raise DeatError(f"--budget is too small: an epoch of {method} takes more than {budget}; give more")
    return Choice(
        {**given, "epochs": epochs},
        (f"{method}, {counted(epochs, 'epoch')}: as many as fit {budget}; there is no measured run of it to compare",),
    )
