"""Names of evaluation attacks: parsing and validation."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.units import format_fraction

Value = bool | int | float | str | None | tuple[Any, ...]

PLAIN = ("natural", "noise-gaussian", "noise-uniform", "fgsm")

AUTOATTACK = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}

KNOWN = (*PLAIN, "pgd-100", "pgd-50x5", "cw-20", *AUTOATTACK, "square", "torchattacks.NAME(...)")

PREFIX = "torchattacks."

L2_ATTACKS = ("PGDL2", "PGDRSL2")
"""Attacks of torchattacks with an eps in L2 and no argument that says so; see `norm_of`."""

LEAST = {"eps": 0, "alpha": 0, "steps": 1}
"""Smallest sensible values: below them torchattacks' attacks do nothing or reduce the loss."""

SQUARE_TILES = 5
"""Square in L2 starts from this many tiles per side, so images must have at least this height and width."""


def norm_of(attack: Any, norm: str = "Linf") -> str:
    """Return the norm of an attack's eps.

    Args:
        attack: The attack's class, or a function that creates it.
        norm: The norm that it is given, if its class does not determine it.
    """
    return "L2" if any(each.__name__ in L2_ATTACKS for each in getattr(attack, "__mro__", ())) else norm


def split_names(text: str) -> tuple[str, ...]:
    """Split a list at commas outside parentheses, as in ``fgsm,torchattacks.PGD(steps=5,eps=0.1)``."""
    names, depth, begin = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth <= 0:
            names.append(text[begin:position])
            begin = position + 1
    return tuple(name.strip() for name in (*names, text[begin:]))


def parse_attacks(attacks: str | Sequence[str]) -> tuple[str, ...]:
    """Parse attack names.

    Valid names, in any case, are ``natural``, ``noise-gaussian``, ``noise-uniform``, ``fgsm``, ``pgd-N``, ``cw-N``,
    ``pgd-NxR`` and ``cw-NxR`` with R random starts, ``autoattack``, ``autoattack-rand``, ``autoattack-plus`` and
    ``square``. ``torchattacks.NAME(argument=value, ...)`` is case-sensitive after the dot.

    Args:
        attacks: The names, or one comma-separated string of them.

    Returns:
        The canonical names without duplicates, in the given order, after ``natural``, which is always evaluated.

    Raises:
        DeatError: If an attack is unknown or has 0 steps or starts.
    """
    if not isinstance(attacks, str | Iterable):
        raise DeatError(f"attacks = {attacks!r} is not a list of names; give a string such as 'fgsm,pgd-100'")
    names = split_names(attacks) if isinstance(attacks, str) else tuple(attacks)
    return tuple(dict.fromkeys(("natural", *(_canonical(name) for name in names))))


def _canonical(text: str) -> str:
    if not isinstance(text, str):
        raise DeatError(f"attack names must be strings such as 'pgd-100', not {type(text).__name__}")
    name = text.strip().lower()
    if name in PLAIN or name in AUTOATTACK or name == "square":
        return name
    if name.startswith(PREFIX):
        return str(parse_torchattack(text))
    match = re.fullmatch(r"(pgd|cw)-([0-9]{1,6})(?:x([0-9]{1,3}))?", name)
    if match is None:
        raise DeatError(f"there is no attack '{text.strip()}': {did_you_mean(name, KNOWN)}")
    kind, steps, restarts = match[1], int(match[2]), int(match[3] or 1)
    if steps == 0:
        raise DeatError(f"attack '{text.strip()}' has 0 steps; give 1 or more, such as {kind}-20")
    if restarts == 0:
        raise DeatError(f"attack '{text.strip()}' has 0 starts; give 1 or more, such as {kind}-{steps}x5")
    return f"{kind}-{steps}" + (f"x{restarts}" if restarts > 1 else "")


def steps_and_restarts(name: str) -> tuple[str, int, int]:
    """Return the kind, the number of steps and the number of starts of a name such as ``pgd-50x5``."""
    kind, _, numbers = name.partition("-")
    steps, _, restarts = numbers.partition("x")
    return kind, int(steps), int(restarts or 1)


@dataclass(frozen=True)
class TorchAttack:
    """An attack of torchattacks with its arguments.

    Attributes:
        name: Name of the class.
        arguments: Names and values, in the order written.
    """

    name: str
    arguments: tuple[tuple[str, Value], ...]

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}({', '.join(f'{name}={_spelled(value)}' for name, value in self.arguments)})"

    def settings(self, **known: Value) -> dict[str, Value]:
        """Return all arguments: defaults, overridden by those in ``known`` that the attack has, then by `arguments`.

        Unless `arguments` has ``alpha``, it is as large relative to eps as in the class's defaults.
        """
        defaults: dict[str, Any] = {name: each.default for name, each in _parameters(self.name).items()}
        written = dict(self.arguments)
        settings = defaults | {name: known[name] for name in defaults if name in known} | written
        if "alpha" in defaults and "alpha" not in written and isinstance(settings["eps"], int | float):
            settings["alpha"] = settings["eps"] * (defaults["alpha"] / defaults["eps"])
        return settings

    def check_norm(self, norm: str) -> None:
        """Check that the attack, if it has a radius, takes it in ``norm``.

        Raises:
            DeatError: It takes it in another norm.
        """
        settings = self.settings(norm=norm)
        if not {"eps", "max_epsilon"} & settings.keys():
            return
        import torchattacks

        own = norm_of(getattr(torchattacks, self.name), str(settings.get("norm", "Linf")))
        if own != norm:
            raise DeatError(
                f"{self} attacks in {own}, but the evaluation is in {norm}: use an attack in {norm}, such as "
                f"torchattacks.{'PGDL2' if norm == 'L2' else 'PGD'}, or evaluate in the attack's norm"
            )


def parse_torchattack(text: str) -> TorchAttack:
    """Parse ``torchattacks.MIFGSM(steps=20, eps=8/255)`` without executing anything.

    Values are literals, or fractions of numbers.

    Raises:
        DeatError: If the text does not have that form, or the attack, an argument or a value is invalid.
    """
    text = text.strip()
    match = re.fullmatch(rf"(?i:{re.escape(PREFIX)})([A-Za-z0-9_]+)(\(.*\))?", text, re.DOTALL)
    if match is None:
        raise DeatError(f"attack '{text}' cannot be read: write torchattacks.NAME(argument=value, ...)")
    parameters = _parameters(match[1])
    arguments = _keywords(text, f"attack{match[2] or '()'}")
    for name, value in arguments.items():
        if name not in parameters:
            raise DeatError(f"torchattacks.{match[1]} has no argument '{name}': {did_you_mean(name, parameters)}")
        least = LEAST.get(name)
        if isinstance(value, int | float) and not (_finite(value) and (least is None or value >= least)):
            wanted = "finite" if least is None else f"{least} or more"
            raise DeatError(f"attack '{text}' has {name}={value}: give a number that is {wanted}")
    return TorchAttack(match[1], tuple(arguments.items()))


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of an attack's class, except for the model."""
    import torchattacks

    attacks = {
        known: list(inspect.signature(getattr(torchattacks, known).__init__).parameters.values())
        for known in torchattacks.__all__
    }
    usable = {
        known: {parameter.name: parameter for parameter in parameters[2:]}
        for known, parameters in attacks.items()
        if parameters[1].name == "model" and all(each.default is not each.empty for each in parameters[2:])
    }
    if name not in usable:
        why = "needs arguments besides the model, so it cannot be used here" if name in attacks else "does not exist"
        close = {known.lower(): known for known in usable}
        sentence = did_you_mean(name, usable)
        for lower, known in close.items():
            sentence = sentence.replace(f"'{lower}'", f"'{known}'")
        raise DeatError(f"torchattacks.{name} {why}: {sentence}")
    return usable[name]


def _keywords(text: str, call: str) -> dict[str, Value]:
    try:
        expression = ast.parse(call, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        expression = None
    if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name) or expression.args:
        raise DeatError(f"attack '{text}' cannot be read: write torchattacks.NAME(argument=value, ...)")
    arguments = [(_name(text, keyword), _literal(text, call, keyword.value)) for keyword in expression.keywords]
    if len(dict(arguments)) < len(arguments):
        raise DeatError(f"attack '{text}' has an argument twice: remove one of them")
    return dict(arguments)


def _name(text: str, keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise DeatError(f"attack '{text}' cannot be read: write out its arguments instead of using **")
    return keyword.arg


def _literal(text: str, call: str, node: ast.expr) -> Value:
    try:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            top, bottom = ast.literal_eval(node.left), ast.literal_eval(node.right)
            if all(type(number) in (int, float) for number in (top, bottom)):
                return float(top / bottom)
        value = ast.literal_eval(node)
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        value = ...
    value = tuple(value) if isinstance(value, list) else value
    if value is not None and not isinstance(value, bool | int | float | str | tuple):
        written = ast.get_source_segment(call, node)
        raise DeatError(
            f"attack '{text}' has the invalid value {written}: values must be numbers, fractions such as 8/255, quoted "
            "strings, lists of these, True, False or None"
        )
    return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _spelled(value: Value) -> str:
    if isinstance(value, float) and "/" in format_fraction(value):
        return format_fraction(value)
    return repr(value)
