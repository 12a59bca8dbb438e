"""The table of methods: the one place where a method is registered.

A method is a row of four choices: an attack that crafts, a surrogate loss that learns, a schedule that says how many
steps the attack takes next epoch, and a rule that stops. Step sizes are written for eps = 8/255 and grow with eps.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn
from torchattacks.attack import Attack

from deat_rb.methods import losses as methods_losses
from deat_rb.methods.losses import surrogate
from deat_rb.methods.recipes import _FAMILIES, PAPER_EPS, Recipe
from deat_rb.methods.trainers import ReplayTrainer
from deat_rb.training.base import Constant, Schedule
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.units import check_eps

UNSAID_PERCENT = ("deat-p%", "deat-%")
"""What stands for DEAT-P% with the data set's own P."""

_registered: dict[str, Recipe] = {}


def register_method(name: str, recipe: Recipe) -> None:
    """Adds a method of one's own; the command line knows one that is an entry point in the group ``deat_rb.methods``.

    Args:
        name: Read case-insensitively.
        recipe: Its row.

    Raises:
        DeatError: If the name is taken, or is none.
    """
    canonical = name.strip().lower()
    if not isinstance(recipe, Recipe):
        raise DeatError(f"a method needs a name and a Recipe, not '{name}' and {type(recipe).__name__}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9+%._-]*", canonical):
        raise DeatError(
            f"'{name}' cannot be a method's name, of which runs' folders are made: begin with a letter or a digit, and "
            "go on with those and + % . _ -"
        )
    if is_of_the_table(canonical) or canonical in known_methods():
        raise DeatError(f"there is a method '{canonical}' already; register yours under another name")
    _registered[canonical] = recipe


def known_methods() -> list[str]:
    """The names of all methods: the paper's, an example of each family, and those registered."""
    return [example for _, _, example, _ in _FAMILIES] + list(_registered) + list(_plugins())


def family(canonical: str) -> str:
    """How the names of a method's family are written: ``free-R`` of ``free-8``; of one that stands alone, its name."""
    return next((shown for shown, pattern, _, _ in _FAMILIES if re.fullmatch(pattern, canonical)), canonical)


def is_of_the_table(canonical: str) -> bool:
    """Whether a name is one of the paper's methods."""
    return any(re.fullmatch(pattern, canonical) for _, pattern, _, _ in _FAMILIES)


def _plugins() -> dict[str, EntryPoint]:
    """Others' entry points; a name of the table stays the table's."""
    points = {point.name.strip().lower(): point for point in entry_points(group="deat_rb.methods")}
    return {name: point for name, point in points.items() if name not in _registered and not is_of_the_table(name)}


def recipe(name: str) -> tuple[str, Recipe]:
    """Finds a method's row.

    Args:
        name: As the paper writes it, in any case: ``M+TRADES``, ``M+TRADE``, ``DEAT-40%``, ``FREE-8``; ``deat-P%`` is
            ``deat-40%``.

    Returns:
        Its canonical name, such as ``m+trades``, and its row.

    Raises:
        DeatError: If there is no such method, or its number makes none.
    """
    asked = name.strip().lower()
    if asked in UNSAID_PERCENT:
        asked = "deat-40%"
    for shown, pattern, _, make in _FAMILIES:
        match = re.fullmatch(pattern, asked)
        if match:
            numbers = [int(group) for group in match.groups()]
            if numbers and not 1 <= numbers[0] <= (99 if shown == "deat-P%" else 1000):
                raise DeatError(
                    f"{numbers[0]} in the method '{asked}' makes no {shown}; the paper has {_example(shown)}"
                )
            return (re.sub(r"\d+", str(*numbers), asked) if numbers else shown), make(*numbers)
    if asked in _plugins():
        _registered[asked] = _load(_plugins()[asked])
    if asked in _registered:
        return asked, _registered[asked]
    raise DeatError(f"there is no method '{name}': {did_you_mean(asked, known_methods())}")


def _load(point: EntryPoint) -> Recipe:
    try:
        row = point.load()
    except Exception as error:  # somebody else's code
        raise DeatError(
            f"the method '{point.name}' of the entry point {point.value} cannot be loaded: {error}"
        ) from error
    if not isinstance(row, Recipe):
        raise DeatError(f"the entry point {point.value} of the method '{point.name}' is no deat_rb.Recipe")
    return row


def _example(shown: str) -> str:
    return next(example for family, _, example, _ in _FAMILIES if family == shown)


def create(name: str, model: nn.Module, *, eps: float = PAPER_EPS, **overrides: Any) -> Trainer:
    """Makes the trainer of a method.

    Args:
        name: The method, see `recipe`.
        model: What is trained: takes images in [0, 1] (N, C, H, W), returns logits (N, K).
        eps: The Linf radius, in [0, 1] pixel units.
        overrides: What differs from the method's own row: ``alpha``, ``steps`` (the first epoch's where a schedule
            raises them), ``max_steps``, ``gamma``, ``beta``, ``tau``, ``attack_mode``, ``lr_per_replay``, and what
            else the row's schedule and stopping rule are made with. None leaves the row's own value.

    Returns:
        A torchattacks attack that can `fit`.

    Raises:
        DeatError: If the method is unknown, or does not have what an override would change.
    """
    canonical, row = recipe(name)
    given = {key: value for key, value in overrides.items() if value is not None}
    check_eps(eps)

    attack_options = dict(row.attack_options)
    if "tau" in given and "tau" in attack_options:
        attack_options["tau"] = given.pop("tau")
    alpha, steps = row.alpha * (eps / PAPER_EPS), row.steps
    takes = _parameters(row.attack)
    if "attack_mode" in given and "attack_mode" in takes and row.trainer is not ReplayTrainer:
        attack_options["attack_mode"] = given.pop("attack_mode")
    if steps > 0 or row.guided:
        alpha = given.pop("alpha", alpha) if "alpha" in takes else alpha
        steps = given.pop("steps", steps) if "steps" in takes else steps

    trainer_options = dict(row.trainer_options)
    if row.trainer is ReplayTrainer and "lr_per_replay" in given:
        trainer_options["lr_per_replay"] = given.pop("lr_per_replay")

    loss = row.loss
    if "beta" in given and loss in ("trades", "mart"):
        loss = methods_losses.surrogate(loss, beta=given.pop("beta"))
    begins = "start" if "start" in inspect.signature(row.schedule).parameters else "steps"
    schedule: Schedule | None = None
    if "steps" in takes or row.schedule is not Constant:
        schedule = row.schedule(**{begins: steps, **row.schedule_options, **_taken(row.schedule, given)})
    stopping = row.stopping(**_taken(row.stopping, given)) if row.stopping else None
    if given:
        raise DeatError(
            f"the method {canonical} has no {', '.join(sorted(given))} to change; see deat-rb methods {canonical}"
        )
    sizes = {key: value for key, value in (("alpha", alpha), ("steps", steps)) if key in takes}
    try:
        attack = row.attack(model, eps=eps, **sizes, **attack_options)
    except TypeError as error:
        raise DeatError(
            f"the attack of the method {canonical} cannot be made with the model, eps=, alpha= and steps= ({error})"
        ) from error
    return row.trainer(
        attack, loss=surrogate(loss), schedule=schedule, stopping=stopping, name=canonical, **trainer_options
    )


def _taken(factory: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Takes out of ``given`` what ``factory`` has a parameter for, but for the steps, which are the attack's."""
    names = set(inspect.signature(factory).parameters) - {"steps", "start"}
    return {key: given.pop(key) for key in list(given) if key in names}


def _parameters(attack: Callable[..., Attack]) -> set[str]:
    """Of ``alpha``, ``steps`` and ``attack_mode``, what an attack is made with: torchattacks' APGD has no alpha."""
    parameters = inspect.signature(attack).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {name for name in ("alpha", "steps", "attack_mode") if anything or name in parameters}
