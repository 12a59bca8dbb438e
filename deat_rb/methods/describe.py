"""Descriptions of methods: the table and the explanations that `deat-rb methods` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deat_rb.methods.recipes import (
    ACCURACY_THRESHOLD,
    ANNEALED,
    CONSTANT,
    EVERY_D_EPOCHS,
    GRADIENT_RATIO,
    PAPER_EPS,
    ROBUSTNESS_DROP,
    Recipe,
    path_of,
)
from deat_rb.methods.registry import family, is_in_paper, known_methods, recipe
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted
from deat_rb.utils.units import format_fraction

if TYPE_CHECKING:
    from deat_rb.methods.build import ConfiguredMethod


@dataclass(frozen=True)
class MethodRow:
    """A row of the table that `deat-rb methods` prints, as strings.

    Attributes:
        name: The method's name; for a family, the name of an example.
        family: Notation of the family, such as ``free-R``; for a single method, its name.
        attack: The attack.
        loss: The surrogate loss.
        schedule: The schedule of the attack's steps.
        stop: The stopping rule.
        cost: Backward passes over T epochs of M mini-batches.
        paper: Section, algorithm and source.
    """

    name: str
    family: str
    attack: str
    loss: str
    schedule: str
    stop: str
    cost: str
    paper: str


def describe(name: str, *, eps: float | str | None = None, **overrides: Any) -> MethodRow:
    """Describe a method with its parameters.

    Args:
        name: The method's name.
        eps: The radius, with which the step size scales.
        overrides: As for `deat_rb.create`.

    Raises:
        DeatError: As for `deat_rb.create`.
    """
    if eps in (None, PAPER_EPS) and all(value is None for value in overrides.values()):
        return _describe(*recipe(name), PAPER_EPS)  # without torch
    from deat_rb.methods.build import configure

    return describe_configured(configure(*recipe(name), eps=eps, **overrides))


def describe_configured(method: ConfiguredMethod) -> MethodRow:
    """Describe a method configured by `deat_rb.methods.build.configure`."""
    row, example = method.recipe, recipe(method.name)[1]
    alpha = example.alpha * method.eps / PAPER_EPS
    return _describe(method.name, row, method.eps, own_values=(row.steps, row.alpha) != (example.steps, alpha))


def _describe(canonical: str, row: Recipe, eps: float, own_values: bool = False) -> MethodRow:
    """Describe a recipe; ``own_values`` tells whether its steps or alpha differ from those in its summary."""
    summary = row.summary or path_of(row.attack).rpartition(":")[2]
    if own_values:
        summary += f"; here steps = {row.steps}, alpha = {format_fraction(row.alpha)}"
    return MethodRow(
        name=canonical,
        family=family(canonical),
        attack=_attack(row, eps) if row.uses_pgd and not row.summary else summary,
        loss=_loss(row),
        schedule=_schedule(row),
        stop=_stop(row),
        cost=_cost(row),
        paper=row.paper or "-",
    )


def _attack(row: Recipe, eps: float) -> str:
    """Describe the attack of a recipe that uses `deat_rb.PGD`."""
    options = row.attack_options
    fixed, inner = path_of(row.schedule) == CONSTANT, row.trainer_options.get("inner")
    no_step = fixed and row.steps == 0
    if no_step and options.get("start", "uniform") == "none":
        return "none"
    size = "alpha = eps" if row.replays and row.alpha == eps else f"{format_fraction(row.alpha)}"
    if inner is not None:
        text = f"{row.steps} times {counted(inner, 'step')} of {size} through the first layer"
    elif row.replays:
        number = counted(row.steps, "replay") if fixed else "replays"
        text = f"{number}, {size}" if size == "alpha = eps" else f"{number} of {size}"
    elif no_step:
        text = "no step"
    elif fixed and row.steps == 1:
        text = f"one step of {size}"
    elif path_of(row.schedule) == ANNEALED:
        total = format_fraction(row.steps * row.alpha)
        text = f"steps of ({total})/r" if "/" in total else f"steps of {total}/r"
    else:
        text = f"{counted(row.steps, 'step')} of {size}" if fixed else f"steps of {size}"
    if not row.replays and not no_step and (row.loss not in ("ce", "nls") or options.get("loss", "ce") != "ce"):
        text += " on " + {"ce": "CE", "kl": "KL", "margin": "the CW margin"}[options.get("loss", "ce")]
    start = {"uniform": ", uniform start", "normal": ", start 0.001 N(0,1)", "none": ""}[
        options.get("start", "uniform")
    ]
    if options.get("start_scale", 1) != 1:
        start += f" within {options['start_scale']:g} eps"
    if not options.get("project", True):
        start += ", not projected onto the eps-ball"
    if "carry" in row.trainer_options:
        start = ", delta carried from batch to batch" if row.trainer_options["carry"] else ", delta zero in each batch"
    if row.start:
        start = ", " + row.start.format(**row.trainer_options)
    tau, mode = options.get("tau"), options.get("attack_mode")
    friendly = "" if tau is None else f", FAT's early stop with tau = {tau}"
    if options.get("omega"):
        friendly += f", noise {options['omega']:g} N(0,1) after each step"
    if "norm" in options:
        friendly += f", in {options['norm']}"
    if row.trainer_options.get("eps_warmup"):
        warmup = row.trainer_options["eps_warmup"]
        friendly += f", eps and alpha from 0 over {counted(warmup, 'epoch')}"
    usual = None if tau is None else "eval"
    return text + start + friendly + (f", in {mode} mode" if mode not in (None, usual) else "")


def _loss(row: Recipe) -> str:
    awp, align = row.trainer_options.get("awp"), row.trainer_options.get("align")
    aligned = "" if align is None else f" + {align:g} (1 - cos of gradients)"
    penalty = " + " + row.penalty.format(**row.trainer_options) if row.penalty else ""
    perturbed = "" if awp is None else f", AWP with gamma {awp:g}{_after_warmup(row)}"
    return _surrogate(row) + aligned + penalty + perturbed


def _surrogate(row: Recipe) -> str:
    if not isinstance(row.loss, str):
        return row.loss.name
    kind = "non-uniform label smoothing" if row.loss == "nls" else "label smoothing"
    smoothed = f", {kind} {row.label_smoothing:g}" if row.label_smoothing else ""
    if row.loss == "trades":
        return (f"CE(clean) + {row.beta:g} KL" if row.beta else "CE(clean)") + smoothed
    if row.loss == "mart":
        return f"MART, lambda {row.beta:g}"
    return ("CE" if row.loss == "nls" else row.loss.upper()) + smoothed


def _after_warmup(row: Recipe) -> str:
    warmup = row.trainer_options.get("awp_warmup")
    return f" after {counted(warmup, 'epoch')}" if warmup else ""


def _schedule(row: Recipe) -> str:
    options, path = row.schedule_options, path_of(row.schedule)
    bounds = f", from {row.steps}" if row.steps != 1 and path != CONSTANT else ""
    if options.get("max_steps") is not None:
        bounds += f", at most {options['max_steps']}"
    if path == CONSTANT:
        return "constant"
    if path == ANNEALED:
        return f"rises linearly from {row.steps} towards {options.get('max_steps', 10)} over the epochs"
    if path == EVERY_D_EPOCHS:
        every = options.get("every", 3)
        return ("one more every epoch" if every == 1 else f"one more every {every} epochs") + bounds
    if path == ACCURACY_THRESHOLD:
        return (
            f"one more after an epoch with training accuracy above {100 * options.get('threshold', 0.4):g} %" + bounds
        )
    if row.guided:
        gamma = f", gamma {options['gamma']:g}" if "gamma" in options else ""
        return "gradient magnitude" + bounds + gamma
    return path.rpartition(".")[2].rpartition(":")[2]


def _stop(row: Recipe) -> str:
    if row.stopping is None:
        return "-"
    options, path = row.stopping_options, path_of(row.stopping)
    if path == ROBUSTNESS_DROP:
        return f"PGD-5 accuracy drops by over {100 * options.get('drop', 0.2):g} points"
    if path == GRADIENT_RATIO:
        return f"l_X surges (m = {options.get('m', 2)}, gamma {options.get('gamma', 1.5):g})"
    return path.rpartition(".")[2].rpartition(":")[2]


def _cost(row: Recipe) -> str:
    cost = row.cost or (_passes(row) if row.uses_pgd else "counted during training")
    return cost + (f", and 1 for AWP in each batch{_after_warmup(row)}" if row.trainer_options.get("awp") else "")


def _passes(row: Recipe) -> str:
    """Return the backward passes of a built-in trainer with `deat_rb.PGD`."""
    if inner := row.trainer_options.get("inner"):
        return f"{row.steps}MT (and {row.steps * (inner + 1)}MT through the first layer only)"
    if path_of(row.schedule) != CONSTANT:
        return "sum of r, times M" if row.replays else "sum of (r + 1), times M"
    if row.replays or row.steps < 2:
        passes = row.steps + (not row.replays)
        return f"{passes}MT" if passes > 1 else "MT"
    return f"{'at most ' if row.attack_options.get('tau') is not None else ''}({row.steps} + 1)MT"


def method_table(on_error: Callable[[str], None] | None = None) -> list[MethodRow]:
    """Return the whole table: an example of each family and all registered methods.

    Args:
        on_error: Called with the message for each entry point that cannot be loaded; by default, the first failure
            is raised.

    Raises:
        DeatError: If an entry point cannot be loaded and there is no ``on_error``.
    """
    rows = []
    for name in known_methods():
        try:
            rows.append(describe(name))
        except DeatError as error:
            if on_error is None:
                raise
            on_error(str(error))
    return rows


COLUMNS = ("method", "attack", "loss", "schedule / stop", "backward passes")


def cells(row: MethodRow) -> tuple[str, ...]:
    """Return a row's cells under `COLUMNS`."""
    schedule = row.schedule if row.stop == "-" else f"{row.schedule}; stop: {row.stop}"
    return row.name, row.attack, row.loss, schedule, row.cost


def markdown_table(rows: Iterable[MethodRow] | None = None) -> str:
    """Return a Markdown table of methods, as in docs/methods.md, with the family's notation in parentheses."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in method_table() if rows is None else rows:
        name = f"`{row.name}`" + ("" if row.family == row.name else f" (`{row.family}`)")
        lines.append("| " + " | ".join((name, *cells(row)[1:])) + " |")
    return "\n".join(lines) + "\n"


def explain(name: str) -> str:
    """Explain a method in about ten lines: attack, loss, schedule, stopping rule, cost, source and notes."""
    canonical, row = recipe(name)
    text = describe(canonical)
    settings = (
        f"fast: {counted(row.fast_epochs, 'epoch')}, cyclic LR to {row.peak_lr:g}; standard: 50 epochs, LR 0.05 cut at "
        "25 and 40"
    )
    guided = "guided by the gradient magnitude" if row.guided else text.schedule
    lines = [
        f"{canonical}: {guided}; {path_of(row.trainer).rpartition('.')[2].rpartition(':')[2]}",
        f"  attack     {text.attack}",
        f"  loss       {text.loss}",
        f"  schedule   {text.schedule}" + ("; alpha* = max(alpha, eps/r)" if row.guided else ""),
        *([] if text.stop == "-" else [f"  stop       {text.stop}"]),
        f"  cost       {text.cost} backward passes over T epochs of M mini-batches",
        f"  settings   {settings}",
        f"  paper      {'arXiv:2103.03076, ' if is_in_paper(canonical) else ''}{text.paper}",
    ]
    return "\n".join(lines + [f"  note       {note}" for note in row.notes])
