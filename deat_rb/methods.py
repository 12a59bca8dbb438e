"""The table of methods: the one place where a method is registered.

A method is a row of four choices: an attack that crafts, a surrogate loss that learns, a schedule that says how many
steps the attack takes next epoch, and a rule that stops. Step sizes are written for eps = 8/255 and grow with eps.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn
from torchattacks.attack import Attack

from deat_rb import losses
from deat_rb.attacks import PGD
from deat_rb.errors import DeatError, nearest
from deat_rb.losses import SurrogateLoss
from deat_rb.schedules import AccuracyThreshold, Constant, EveryDEpochs, GradientMagnitude, Schedule
from deat_rb.stopping import GradientRatio, RobustnessDrop, StoppingRule
from deat_rb.threat import check_eps
from deat_rb.trainers import AttackTrainer, ReplayTrainer, Trainer

PAPER_EPS = 8 / 255


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        attack: Makes the attack: called with the model and eps=, alpha=, steps= and ``attack_options``.
        steps: The attack's steps, the first epoch's where a schedule raises them.
        alpha: The step size at eps = 8/255.
        attack_options: What else the attack is made with.
        loss: The surrogate loss.
        schedule: The schedule's class.
        schedule_options: What it is made with, beside ``steps`` (``start`` of those that rise).
        stopping: The stopping rule's class, or None.
        trainer: Which trainer puts the row together.
        trainer_options: What it is made with.
        fast_epochs: T of the fast setting.
        summary: What the attack is, for the table.
        cost: Backward passes over T epochs of M mini-batches.
        paper: Where the paper has it.
        notes: Where the paper is silent or slips, and what is done.
    """

    attack: Callable[..., Attack] = PGD
    steps: int = 1
    alpha: float = 2 / 255
    attack_options: Mapping[str, Any] = field(default_factory=dict)
    loss: str | SurrogateLoss = "ce"
    schedule: type[Schedule] = Constant
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    stopping: type[StoppingRule] | None = None
    trainer: type[Trainer] = AttackTrainer
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    fast_epochs: int = 10
    summary: str = ""
    cost: str = ""
    paper: str = ""
    notes: tuple[str, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether the gradient magnitude sets the steps."""
        return self.schedule.guided


UNIFORM = {"start": "uniform"}
NORMAL = {"start": "normal"}
KL = {"loss": "kl", "start": "normal"}
FRIENDLY = {"tau": 3, "attack_mode": "eval"}
CLAMPED = "Algorithms 1-5 leave the image bounds out; every crafted image is kept within [0, 1]."
START_ONE = "The released runs of M+TRADES begin with 0 crafting steps; the text's 1 is kept."
GROWS_WITH_ALPHA = (
    "The released runs of M+PGD and M+MART let the steps grow while alpha r < eps; the text's rule is kept."
)
SMALL_STEP = (
    "The text has alpha = 10/255 for all guided methods; 2/255 is what the released runs used, and what A.2 adjusts."
)


def _standard() -> Recipe:
    return Recipe(
        steps=0, attack_options={"start": "none"}, summary="none", cost="MT", paper="the baseline: plain training"
    )


def _free(r: int) -> Recipe:
    return Recipe(
        steps=r,
        alpha=8 / 255,
        attack_options={"start": "none"},
        trainer=ReplayTrainer,
        trainer_options={"carry": True},
        summary=f"{r} replays, alpha = eps, delta carried from batch to batch",
        cost="rMT",
        paper="section 3; Shafahi et al. 2019, arXiv:1904.12843",
        notes=(CLAMPED, "The learning rate moves once per batch; FREE's public code moves it per replay."),
    )


def _replays(steps: str, **row: Any) -> Recipe:
    return Recipe(
        alpha=10 / 255,
        attack_options=UNIFORM,
        trainer=ReplayTrainer,
        summary=f"replays of 10/255, uniform start: {steps}",
        cost="sum of r, times M",
        **row,
    )


def _deat_every(d: int) -> Recipe:
    return _replays(
        f"one more every {d} epochs",
        schedule=EveryDEpochs,
        schedule_options={"every": d},
        fast_epochs=12,
        paper="section 4.1, Algorithm 1",
        notes=(CLAMPED,),
    )


def _deat_accuracy(percent: int) -> Recipe:
    return _replays(
        f"one more after training accuracy above {percent} %",
        schedule=AccuracyThreshold,
        schedule_options={"threshold": percent / 100},
        fast_epochs=11,
        paper="section 4.1, Algorithm 1",
        notes=(CLAMPED, "The training accuracy is that of the last replay's predictions."),
    )


def _m_deat() -> Recipe:
    return _replays(
        "guided, at most 8",
        schedule=GradientMagnitude,
        schedule_options={"max_steps": 8},
        fast_epochs=11,
        paper="section 4.2, Algorithms 2 and 3",
        notes=(CLAMPED,),
    )


def _pgd(n: int) -> Recipe:
    return Recipe(
        steps=n,
        attack_options=UNIFORM,
        summary=f"{n} steps of 2/255, uniform start",
        cost="(i + 1)MT",
        paper="section 3, Equation 3; Madry et al. 2018, arXiv:1706.06083",
        notes=(CLAMPED,),
    )


def _m_pgd() -> Recipe:
    return Recipe(
        attack_options=UNIFORM,
        schedule=GradientMagnitude,
        schedule_options={"max_steps": 7},
        summary="steps of 2/255, uniform start: guided, at most 7",
        cost="sum of (r + 1), times M",
        paper="section 5.2, Algorithm 4",
        notes=(CLAMPED, "Algorithm 4's inner loop runs to N where r is meant.", GROWS_WITH_ALPHA, SMALL_STEP),
    )


def _u_fgsm() -> Recipe:
    return Recipe(
        steps=1,
        alpha=10 / 255,
        attack_options=UNIFORM,
        stopping=RobustnessDrop,
        fast_epochs=15,
        summary="one step of 10/255, uniform start",
        cost="2MT",
        paper="section 5.3; Wong et al. 2020, arXiv:2001.03994",
        notes=(
            CLAMPED,
            "15 epochs in the fast setting, as in its public code and by Table 5's minutes; Fig. 2 has 10.",
        ),
    )


def _m_u_fgsm() -> Recipe:
    return Recipe(
        steps=1,
        alpha=10 / 255,
        attack_options=UNIFORM,
        stopping=GradientRatio,
        fast_epochs=15,
        summary="one step of 10/255, uniform start",
        cost="2MT",
        paper="section 5.3, Algorithm 5, Equation 8",
        notes=(
            CLAMPED,
            "Algorithm 5 never adds to l_X; it is added.",
            "R^t > gamma R^{t-1} taken literally fires on noise; l_X has to be rising by 40 % an epoch as well.",
        ),
    )


def _fat(n: int) -> Recipe:
    return Recipe(
        steps=n,
        attack_options={**NORMAL, **FRIENDLY},
        summary=f"{n} steps of 2/255, start 0.001 N(0,1), friendly with tau = 3",
        cost="(share still moving + 1)MT",
        paper="section 5.2; Zhang et al. 2020, arXiv:2002.11242",
    )


def _regularised(loss: str, craft: Mapping[str, Any], on: str, kind: str) -> Recipe:
    source = {"trades": "Zhang et al. 2019, arXiv:1901.08573", "mart": "Wang et al. 2020, ICLR"}[loss]
    if kind == "guided":
        return Recipe(
            attack_options=craft,
            loss=loss,
            schedule=GradientMagnitude,
            schedule_options={"max_steps": 10},
            summary=f"steps of 2/255 on {on}, start 0.001 N(0,1): guided, at most 10",
            cost="sum of (r + 1), times M",
            paper=f"section 5.2, Algorithm 4; {source}",
            notes=(
                CLAMPED,
                "Algorithm 4's inner loop runs to N where r is meant.",
                START_ONE if loss == "trades" else GROWS_WITH_ALPHA,
                SMALL_STEP,
            ),
        )
    friendly = kind == "friendly"
    return Recipe(
        steps=10,
        attack_options={**craft, **FRIENDLY} if friendly else craft,
        loss=loss,
        summary=f"10 steps of 2/255 on {on}, start 0.001 N(0,1)" + (", friendly with tau = 3" if friendly else ""),
        cost="(share still moving + 1)MT" if friendly else "(i + 1)MT",
        paper=f"section 5.2; {source}" + ("; Zhang et al. 2020, arXiv:2002.11242" if friendly else ""),
        notes=("Its public code crafts on KL, unlike MART's.",) if friendly and loss == "mart" else (),
    )


# Each family: the name shown in tables, the pattern that it is read by, an example, and what makes its row.
_FAMILIES: list[tuple[str, str, str, Callable[..., Recipe]]] = [
    ("standard", r"standard", "standard", _standard),
    ("free-R", r"free-(\d+)", "free-8", _free),
    ("deat-D", r"deat-(\d+)", "deat-3", _deat_every),
    ("deat-P%", r"deat-(\d+)%", "deat-40%", _deat_accuracy),
    ("m-deat", r"m-deat", "m-deat", _m_deat),
    ("pgd-N", r"pgd-(\d+)", "pgd-7", _pgd),
    ("m+pgd", r"m\+pgd", "m+pgd", _m_pgd),
    ("u-fgsm", r"u-fgsm", "u-fgsm", _u_fgsm),
    ("m+u-fgsm", r"m\+u-fgsm", "m+u-fgsm", _m_u_fgsm),
    ("fat-N", r"fat-(\d+)", "fat-5", _fat),
    ("trades", r"trades?", "trades", lambda: _regularised("trades", KL, "KL", "plain")),
    ("f+trades", r"f\+trades?", "f+trades", lambda: _regularised("trades", KL, "KL", "friendly")),
    ("m+trades", r"m\+trades?", "m+trades", lambda: _regularised("trades", KL, "KL", "guided")),
    ("mart", r"mart", "mart", lambda: _regularised("mart", NORMAL, "CE", "plain")),
    ("f+mart", r"f\+mart", "f+mart", lambda: _regularised("mart", KL, "KL", "friendly")),
    ("m+mart", r"m\+mart", "m+mart", lambda: _regularised("mart", NORMAL, "CE", "guided")),
]

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
    raise DeatError(f"there is no method '{name}': {nearest(asked, known_methods())}")


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
        loss = losses.surrogate(loss, beta=given.pop("beta"))
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
    return row.trainer(attack, loss=loss, schedule=schedule, stopping=stopping, name=canonical, **trainer_options)


def _taken(factory: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Takes out of ``given`` what ``factory`` has a parameter for, but for the steps, which are the attack's."""
    names = set(inspect.signature(factory).parameters) - {"steps", "start"}
    return {key: given.pop(key) for key in list(given) if key in names}


def _parameters(attack: Callable[..., Attack]) -> set[str]:
    """Of ``alpha``, ``steps`` and ``attack_mode``, what an attack is made with: torchattacks' APGD has no alpha."""
    parameters = inspect.signature(attack).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {name for name in ("alpha", "steps", "attack_mode") if anything or name in parameters}
