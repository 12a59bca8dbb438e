"""Configured methods: a recipe with the parameters of a run, and the trainer built from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import nn

from deat_rb.attacks.names import norm_of
from deat_rb.attacks.threat_models import DEFAULT_EPS, check_norm
from deat_rb.methods.losses import surrogate
from deat_rb.methods.recipes import CONSTANT, PAPER_EPS, Recipe, path_of, resolve
from deat_rb.models.check import check_weights_exist
from deat_rb.training.schedule import Schedule
from deat_rb.training.soft_labels import who_needs_one_class
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import check_eps, is_whole_number, parse_scalar

WHOLE_NUMBERS = frozenset(
    {"steps", "max_steps", "start", "every", "tau", "m", "awp_warmup", "eps_warmup", "prior_reset"}
)
"""Overrides that are whole numbers."""

NUMBERS = frozenset(
    {"align", "awp", "consistency", "gamma", "beta", "label_smoothing", "omega", "threshold", "drop", "guard"}
)
"""Overrides that are real numbers."""


@dataclass(frozen=True)
class ConfiguredMethod:
    """A method with all its parameters.

    Attributes:
        name: The canonical name.
        recipe: The recipe with the overrides applied; ``alpha`` is the step size at ``eps``.
        eps: The radius, in [0, 1] pixel units.
        norm: Its norm, ``Linf`` or ``L2``.
    """

    name: str
    recipe: Recipe
    eps: float
    norm: str


def own_norm(row: Recipe) -> str:
    """Return the norm of a recipe's attack if no other is asked for.

    Raises:
        DeatError: It is neither ``Linf`` nor ``L2``.
    """
    attack = resolve(row.attack)
    parameter = inspect.signature(attack).parameters.get("norm")
    default = getattr(attack, "norm", "Linf") if parameter is None else parameter.default
    return check_norm(norm_of(attack, row.attack_options.get("norm", default)))


def configure(
    canonical: str, row: Recipe, /, *, eps: float | str | None = None, norm: str | None = None, **overrides: Any
) -> ConfiguredMethod:
    """Apply overrides to a method's recipe; overrides and errors as for `deat_rb.create`."""
    values = {key: _number(key, value) for key, value in overrides.items() if value is not None}
    attack_options, trainer_options = dict(row.attack_options), dict(row.trainer_options)
    accepts = _parameters(row)
    own = own_norm(row)
    norm = own if norm is None else check_norm(norm)
    eps = check_eps(parse_scalar(DEFAULT_EPS[norm] if eps is None else eps), norm=norm)
    trainer = resolve(row.trainer)
    if norm not in getattr(trainer, "norms", (norm,)):
        raise DeatError(f"the method {canonical} is defined for {trainer.norms[0]} only: omit norm = {norm}")
    if norm != own:
        if "norm" not in accepts:
            raise DeatError(f"the attack of the method {canonical} is in {own} only: omit norm = {norm}")
        attack_options["norm"] = norm
    refused = dict(getattr(trainer, "refused", {}))
    attack_keys = {"tau", "omega"} & set(attack_options) | {"attack_mode"} & accepts - set(refused)
    attack_options |= {key: values.pop(key) for key in attack_keys & set(values)}
    takes_steps = row.steps > 0 or row.guided
    if takes_steps and "steps" in accepts:
        row = row.with_steps(values.pop("steps", None))
    alpha = row.alpha * (eps / PAPER_EPS)
    if takes_steps and "alpha" in accepts:
        alpha = values.pop("alpha", alpha)
    accepted = set(inspect.signature(trainer).parameters)
    own_keys = {"carry", "align", "consistency", "prior_reset"} & set(trainer_options)
    trainer_keys = own_keys | ({"lr_per_replay", "awp", "awp_warmup"} & accepted)
    if row.steps > 0 or row.guided:
        trainer_keys |= {"eps_warmup"}
    else:
        refused |= dict.fromkeys(("alpha", "steps", "eps_warmup"), "it trains without attack steps")
    trainer_options |= {key: values.pop(key) for key in trainer_keys & set(values)}
    beta = values.pop("beta", row.beta) if row.loss in ("trades", "mart") else row.beta
    smoothing = values.pop("label_smoothing", row.label_smoothing)
    surrogate(row.loss, beta=beta, label_smoothing=smoothing)
    schedule_options = {**row.schedule_options, **_take(resolve(row.schedule), values)}
    stopping_options = {**row.stopping_options, **_take(resolve(row.stopping), values)}
    if not_usable := sorted(set(values) & set(refused)):
        raise DeatError(
            f"the method {canonical} cannot use {not_usable[0]}: {refused[not_usable[0]]}; omit it, or choose another "
            "method, such as pgd-7, n-fgsm or trades"
        )
    if values:
        raise DeatError(
            f"the method {canonical} has no parameter {', '.join(sorted(values))}; see deat-rb methods {canonical}"
        )
    row = replace(
        row, alpha=alpha, beta=beta, label_smoothing=smoothing, attack_options=attack_options,
        trainer_options=trainer_options,
        schedule_options=schedule_options, stopping_options=stopping_options,
    )  # fmt: skip
    return ConfiguredMethod(canonical, row, eps, norm)


def check_mixed_labels(method: ConfiguredMethod, augmentation: str, *, class_weights: str = "none") -> None:
    """Check that a method can be trained on images that an augmentation mixes with others, and on their mixed labels.

    Raises:
        DeatError: It cannot.
    """
    row, options = method.recipe, method.recipe.attack_options
    part = who_needs_one_class(
        resolve(row.trainer),
        surrogate(row.loss),
        resolve(row.attack),
        options.get("loss", "ce"),
        options.get("tau"),
        resolve(row.schedule),
    )
    if part is not None:
        raise DeatError(
            f"--augment {augmentation} mixes the labels of images, but {part} needs one class per image: use a method "
            f"with cross-entropy or TRADES, such as pgd-7, m-deat or m+trades, instead of {method.name}, or another "
            "--augment"
        )
    if class_weights != "none":
        raise DeatError(
            f"--augment {augmentation} mixes the labels of images, but --class-weights {class_weights} needs one class "
            "per image: omit one of them"
        )


def build(method: ConfiguredMethod, model: nn.Module) -> Trainer:
    """Build the trainer of a configured method.

    Raises:
        DeatError: If the attack cannot be created with the recipe's parameters, or the model cannot be trained.
    """
    check_weights_exist(model, "training")
    row = method.recipe
    accepts = _parameters(row)
    stopping = resolve(row.stopping)(**row.stopping_options) if row.stopping else None
    loss = surrogate(row.loss, beta=row.beta, label_smoothing=row.label_smoothing)
    sizes = {key: value for key, value in (("alpha", row.alpha), ("steps", row.steps)) if key in accepts}
    try:
        attack = resolve(row.attack)(model, eps=method.eps, **sizes, **row.attack_options)
    except TypeError as error:
        raise DeatError(
            f"the attack of the method {method.name} cannot be created from a model, eps=, alpha= and steps= "
            f"({error}); change its recipe's attack or attack_options"
        ) from error
    trainer: Trainer = resolve(row.trainer)(
        attack, loss=loss, schedule=build_schedule(row), stopping=stopping, name=method.name, **row.trainer_options
    )
    if trainer.norm != method.norm:
        raise DeatError(
            f"the attack of the method {method.name} is in {trainer.norm}, not in {method.norm}: give its class the "
            f"attribute norm = {trainer.norm!r}"
        )
    return trainer


def build_schedule(row: Recipe) -> Schedule | None:
    """Return the schedule of a configured recipe; None for a constant one if the attack has no steps."""
    if "steps" not in _parameters(row) and path_of(row.schedule) == CONSTANT:
        return None
    schedule_class: Callable[..., Schedule] = resolve(row.schedule)
    first = "start" if "start" in inspect.signature(schedule_class).parameters else "steps"
    return schedule_class(**{first: row.steps, **row.schedule_options})


def _number(name: str, value: Any) -> Any:
    """Check the type of an override, and parse a step size written as a fraction."""
    if name == "alpha":
        return parse_scalar(value)
    if name in WHOLE_NUMBERS and not is_whole_number(value):
        raise DeatError(f"{name} = {value!r} is not a whole number")
    if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, Real)):
        raise DeatError(f"{name} = {value!r} is not a number")
    return int(value) if name in WHOLE_NUMBERS else value


def _take(factory: Callable[..., Any] | None, values: dict[str, Any]) -> dict[str, Any]:
    """Remove the parameters of ``factory`` from ``values`` and return them, except for the attack's steps."""
    if factory is None:
        return {}
    names = set(inspect.signature(factory).parameters) - {"steps", "start"}
    return {key: values.pop(key) for key in list(values) if key in names}


def _parameters(row: Recipe) -> set[str]:
    """Return which parameters besides eps the attack accepts; some of torchattacks' have no alpha."""
    parameters = inspect.signature(resolve(row.attack)).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {name for name in ("alpha", "steps", "attack_mode", "norm") if anything or name in parameters}
