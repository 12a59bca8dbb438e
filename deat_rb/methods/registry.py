"""Registry of methods: looks up recipes by name.

A method combines an attack, a surrogate loss, a schedule that sets the attack's steps for each epoch, and a stopping
rule. Step sizes are given for eps = 8/255 and scale with eps. Nothing here imports torch before a trainer is created.
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from deat_rb.methods.other_recipes import OTHER_FAMILIES
from deat_rb.methods.recipes import PAPER_FAMILIES, Recipe
from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from deat_rb.training.trainer import Trainer

FAMILIES = [*PAPER_FAMILIES, *OTHER_FAMILIES]
"""The built-in methods: the paper's, then the others."""

DEFAULT_PERCENT = ("deat-p%", "deat-%")
"""Names of DEAT-P% without a number, for which the dataset determines P."""

_registered: dict[str, Recipe] = {}


def register_method(name: str, recipe: Recipe) -> None:
    """Register a method; for the command line, use an entry point in the group ``deat_rb.methods`` instead.

    Args:
        name: The method's name, case-insensitive.
        recipe: Its recipe.

    Raises:
        DeatError: If the name is taken or invalid.
    """
    canonical = name.strip().lower()
    if not isinstance(recipe, Recipe):
        raise DeatError(f"a method needs a name and a Recipe, not '{name}' and {type(recipe).__name__}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9+%._-]*", canonical):
        raise DeatError(
            f"invalid method name '{name}': use a letter or digit, then letters, digits and + % . _ -, because run "
            "directories are named after it"
        )
    if is_builtin(canonical) or canonical in known_methods():
        raise DeatError(f"the method '{canonical}' already exists; register yours under another name")
    _registered[canonical] = recipe


def known_methods() -> list[str]:
    """Return the names of all methods: the built-in ones (an example of each family) and the registered ones."""
    return [example for _, _, example, _ in FAMILIES] + list(_registered) + list(_plugins())


def family(canonical: str) -> str:
    """Return the notation of a method's family, ``free-R`` for ``free-8``; for a single method, its name."""
    return next((notation for notation, pattern, _, _ in FAMILIES if re.fullmatch(pattern, canonical)), canonical)


def is_builtin(canonical: str) -> bool:
    """Return whether a method is built in, given its canonical name."""
    return any(re.fullmatch(pattern, canonical) for _, pattern, _, _ in FAMILIES)


def is_in_paper(canonical: str) -> bool:
    """Return whether a method is one of the paper's, given its canonical name."""
    return any(re.fullmatch(pattern, canonical) for _, pattern, _, _ in PAPER_FAMILIES)


def _plugins() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages; built-in methods cannot be replaced."""
    points = {point.name.strip().lower(): point for point in entry_points(group="deat_rb.methods")}
    return {name: point for name, point in points.items() if name not in _registered and not is_builtin(name)}


def recipe(name: str) -> tuple[str, Recipe]:
    """Look up a method's recipe.

    Args:
        name: The method's name in the paper, in any case: ``M+TRADES``, ``M+TRADE``, ``DEAT-40%``, ``FREE-8``;
            ``deat-P%`` means ``deat-40%``.

    Returns:
        The canonical name, such as ``m+trades``, and the recipe.

    Raises:
        DeatError: If the method is unknown, or its number is out of range.
    """
    if not isinstance(name, str):
        raise DeatError(f"method names must be strings such as 'm+trades', not {type(name).__name__}")
    requested = name.strip().lower()
    if requested in DEFAULT_PERCENT:
        requested = "deat-40%"
    for notation, pattern, example, build in FAMILIES:
        match = re.fullmatch(pattern, requested)
        if match:
            numbers = [int(group) for group in match.groups()]
            largest = 99 if notation == "deat-P%" else 1000
            if wrong := [number for number in numbers if not 1 <= number <= largest]:
                raise DeatError(
                    f"method '{requested}': {wrong[0]} is out of range for {notation} (1 to {largest}); "
                    f"the paper has {example}"
                )
            canonical = re.sub(r"\d+", "{}", requested).format(*numbers) if numbers else notation
            return canonical, build(*numbers)
    if requested in _plugins():
        _registered[requested] = _load(_plugins()[requested])
    if requested in _registered:
        return requested, _registered[requested]
    raise DeatError(f"there is no method '{name}': {did_you_mean(requested, known_methods())}")


def _load(point: EntryPoint) -> Recipe:
    try:
        row = point.load()
    except Exception as error:  # third-party code
        raise DeatError(
            f"the method '{point.name}' of the entry point {point.value} cannot be loaded: {error}"
        ) from error
    if not isinstance(row, Recipe):
        raise DeatError(f"the entry point {point.value} of the method '{point.name}' is not a deat_rb.methods.Recipe")
    return row


def create(name: str, model: nn.Module, *, eps: float | str | None = None, **overrides: Any) -> Trainer:
    """Create the trainer of a method.

    Args:
        name: The method's name; see `recipe`.
        model: The model to train: takes images in [0, 1], (N, C, H, W), and returns logits (N, K).
        eps: The radius, in [0, 1] pixel units; strings such as ``8/255`` are accepted. By default 8/255, in L2 0.5.
        overrides: Parameters that replace the method's defaults: ``norm`` (``Linf`` or ``L2``), ``alpha``,
            ``steps`` (of the first epoch, if a schedule raises them), ``max_steps``, ``gamma``, ``beta``,
            ``label_smoothing``, ``awp``, ``awp_warmup``, ``tau``, ``omega``, ``attack_mode``, ``carry``,
            ``lr_per_replay``, ``consistency``, ``prior_reset``, ``class_weights`` (a positive number for each class,
            by which the loss of its examples is multiplied), and the other parameters of its schedule and stopping
            rule. None keeps the default.

    Returns:
        A trainer: a torchattacks attack with the method ``fit``.

    Raises:
        DeatError: If the method is unknown or has no such parameter, a parameter is invalid, or the model cannot be
            trained.
    """
    from deat_rb.methods.build import build, configure
    from deat_rb.methods.losses import weighted

    class_weights = overrides.pop("class_weights", None)
    trainer = build(configure(*recipe(name), eps=eps, **overrides), model)
    if class_weights is not None:
        trainer.loss = weighted(trainer.loss, class_weights)
    return trainer
