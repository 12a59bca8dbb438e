"""Recipes of the paper's methods, as plain data that can be read without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchattacks.attack import Attack

    from deat_rb.training.schedule import Schedule
    from deat_rb.training.stopping_rule import StoppingRule
    from deat_rb.training.surrogate_loss import SurrogateLoss
    from deat_rb.training.trainer import Trainer

PAPER_EPS = 8 / 255

PGD = "deat_rb.attacks.pgd:PGD"
CONSTANT = "deat_rb.training.schedule:Constant"
EVERY_D_EPOCHS = "deat_rb.methods.schedules:EveryDEpochs"
ACCURACY_THRESHOLD = "deat_rb.methods.schedules:AccuracyThreshold"
GRADIENT_MAGNITUDE = "deat_rb.methods.schedules:GradientMagnitude"
ANNEALED = "deat_rb.methods.schedules:Annealed"
ROBUSTNESS_DROP = "deat_rb.methods.stopping:RobustnessDrop"
GRADIENT_RATIO = "deat_rb.methods.stopping:GradientRatio"
ATTACK_TRAINER = "deat_rb.methods.trainers:AttackTrainer"
REPLAY_TRAINER = "deat_rb.methods.trainers:ReplayTrainer"


def resolve(reference: Any) -> Any:
    """Import the object at ``package.module:Name``; return anything other than a string unchanged."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def path_of(reference: Any) -> str:
    """Return the path ``package.module:Name`` of a class, or the path itself."""
    if isinstance(reference, str):
        return reference
    return f"{getattr(reference, '__module__', '')}:{getattr(reference, '__qualname__', '')}"


@dataclass(frozen=True)
class Recipe:
    """A method: its attack, loss, schedule, stopping rule and trainer.

    The attack, the schedule, the stopping rule and the trainer are classes, or import paths ``package.module:Name``.

    Attributes:
        attack: The attack's class, called with the model and eps=, alpha=, steps= and ``attack_options``.
        steps: The attack's steps; if the schedule raises them, those of the first epoch.
        alpha: The step size at eps = 8/255.
        attack_options: Further keyword arguments of the attack.
        loss: The surrogate loss: ``ce``, ``nls``, ``trades``, ``mart`` or a custom loss.
        beta: The weight of the regularization term of ``trades`` and ``mart`` (MART's lambda).
        label_smoothing: Label smoothing of the cross-entropy of ``ce``, ``nls`` and ``trades``.
        schedule: The class of the step schedule.
        schedule_options: Its keyword arguments, except ``steps`` (``start`` if the schedule raises them).
        stopping: The class of the stopping rule, or None.
        stopping_options: Its keyword arguments.
        trainer: The class of the trainer.
        trainer_options: Its keyword arguments.
        per_step: The fields, ``alpha`` or ``peak_lr``, whose product with ``steps`` stays if ``steps`` is changed.
        fast_epochs: Epochs of the fast setting.
        peak_lr: Peak learning rate of the settings fast and fastat.
        summary: The attack in words; needed only for an attack other than `deat_rb.PGD`.
        start: Where the attack starts, in words with ``trainer_options`` in braces, if the trainer determines it.
        penalty: What the trainer adds to the loss, in words, with its ``trainer_options`` in braces.
        cost: Backward passes over T epochs of M mini-batches; needed only for an attack other than
            `deat_rb.PGD`.
        paper: Section, algorithm and source.
        notes: Points on which the paper is silent or inconsistent, each with the choice made here.
    """

    attack: Callable[..., Attack] | str = PGD
    steps: int = 1
    alpha: float = 2 / 255
    attack_options: Mapping[str, Any] = field(default_factory=dict)
    loss: str | SurrogateLoss = "ce"
    beta: float = 6.0
    label_smoothing: float = 0.0
    schedule: type[Schedule] | str = CONSTANT
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    stopping: type[StoppingRule] | str | None = None
    stopping_options: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[Trainer] | str = ATTACK_TRAINER
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    per_step: tuple[str, ...] = ()
    fast_epochs: int = 10
    peak_lr: float = 0.1
    summary: str = ""
    start: str = ""
    penalty: str = ""
    cost: str = ""
    paper: str = ""
    notes: tuple[str, ...] = ()

    def with_steps(self, steps: int | None) -> Recipe:
        """Return the recipe with other steps and with what the method derives from them; None changes nothing."""
        if steps is None:
            return self
        share = self.steps / max(steps, 1)
        derived: dict[str, Any] = {name: getattr(self, name) * share for name in self.per_step}
        return replace(self, steps=steps, **derived)

    @property
    def guided(self) -> bool:
        """Whether the gradient magnitude determines the steps."""
        return bool(resolve(self.schedule).guided)

    @property
    def replays(self) -> bool:
        """Whether each batch is replayed: one backward pass updates the weights and the perturbation."""
        return path_of(self.trainer) == REPLAY_TRAINER

    @property
    def uses_pgd(self) -> bool:
        """Whether the attack is `deat_rb.PGD`."""
        return path_of(self.attack) == PGD


UNIFORM = {"start": "uniform"}

NORMAL = {"start": "normal", "clamp_start": False}

KL = {"loss": "kl", **NORMAL}

FAT = {"tau": 3, "omega": 0.001, "attack_mode": "eval"}

FRIENDLY_KL = {"loss": "kl", "start": "normal", "tau": 3, "omega": 0.0, "attack_mode": "eval"}

IMAGE_BOUNDS = "Algorithms 1-5 omit the image bounds; every adversarial example is kept within [0, 1]."

LOOP_TO_R = (
    "Algorithm 4's inner loop runs to N instead of r. The bound on r is from the public code; no algorithm has one."
)

STARTS_WITH_ONE = (
    "The public code starts M+PGD, M+TRADES and M+MART with 0 steps, and in 2021 increased them while alpha r < eps; "
    "here the first epoch has 1 step and the rule is that of the text."
)

BOUND = "The upper bound of 8 replays is from the public code; no algorithm has one."
NO_BOUND = "The replays have no upper bound, as in the text; the public code has {} (max_steps)."

UNCLAMPED = "The start may leave [0, 1], as in the public code; the adversarial examples do not."

FREE_START = (
    "Fast setting (Tables 1-3): the perturbation is carried from batch to batch, unclamped, as in fast_adversarial. "
    "Standard setting (Table 4): it is zero in each batch, as in section 4 and the authors' code."
)

SMALL_STEP = (
    "The text has alpha = 10/255 for all guided methods; the released runs used 2/255, which appendix A.2 adjusts."
)

FAT_SOURCE = "Zhang et al. 2020, arXiv:2002.11242"


def _standard() -> Recipe:
    return Recipe(steps=0, attack_options={"start": "none"}, paper="the baseline: training on clean images")


def _free(r: int) -> Recipe:
    return Recipe(
        steps=r,
        alpha=8 / 255,
        attack_options={"start": "none"},
        trainer=REPLAY_TRAINER,
        trainer_options={"carry": True},
        paper="section 3; Shafahi et al. 2019, arXiv:1904.12843",
        notes=(FREE_START, "The learning rate is updated once per batch; FREE's public code updates it per replay."),
    )


def _deat(schedule: str, options: Mapping[str, Any], epochs: int, paper: str, *notes: str) -> Recipe:
    return Recipe(
        alpha=10 / 255,
        attack_options=UNIFORM,
        trainer=REPLAY_TRAINER,
        schedule=schedule,
        schedule_options=options,
        fast_epochs=epochs,
        paper=paper,
        notes=(IMAGE_BOUNDS, *notes),
    )


def _deat_every(d: int) -> Recipe:
    return _deat(EVERY_D_EPOCHS, {"every": d}, 12, "section 4.1, Algorithm 1", NO_BOUND.format(5))


def _deat_accuracy(percent: int) -> Recipe:
    note = "The training accuracy is computed from the last replay's predictions."
    return _deat(
        ACCURACY_THRESHOLD, {"threshold": percent / 100}, 11, "section 4.1, Algorithm 1", NO_BOUND.format(4), note
    )


def _m_deat() -> Recipe:
    return _deat(GRADIENT_MAGNITUDE, {"max_steps": 8}, 11, "section 4.2, Algorithms 2 and 3", BOUND)


def _pgd(n: int) -> Recipe:
    return Recipe(
        steps=n,
        attack_options=UNIFORM,
        paper="section 3, Equation 3; Madry et al. 2018, arXiv:1706.06083",
        notes=(IMAGE_BOUNDS,),
    )


def _m_pgd() -> Recipe:
    return Recipe(
        attack_options=UNIFORM,
        schedule=GRADIENT_MAGNITUDE,
        schedule_options={"max_steps": 7},
        paper="section 5.2, Algorithm 4",
        notes=(IMAGE_BOUNDS, LOOP_TO_R, STARTS_WITH_ONE, SMALL_STEP),
    )


def _one_step(stopping: str, options: Mapping[str, Any], paper: str, *notes: str) -> Recipe:
    return Recipe(
        steps=1,
        alpha=10 / 255,
        attack_options=UNIFORM,
        stopping=stopping,
        stopping_options=options,
        fast_epochs=15,
        paper=paper,
        notes=(IMAGE_BOUNDS, *notes),
    )


def _u_fgsm() -> Recipe:
    note = "15 epochs in the fast setting, as in its public code and as Table 5's times imply; Fig. 2 has 10."
    return _one_step(ROBUSTNESS_DROP, {"drop": 0.2}, "section 5.3; Wong et al. 2020, arXiv:2001.03994", note)


def _m_u_fgsm() -> Recipe:
    return _one_step(
        GRADIENT_RATIO,
        {"m": 2, "gamma": 1.5},
        "section 5.3, Algorithm 5, Equation 8",
        "Algorithm 5 never accumulates l_X; here it is summed over the epoch.",
        "Taken literally, R^t > gamma R^{t-1} is triggered by noise; here l_X must also rise by 40 % per epoch.",
    )


def _fat(n: int) -> Recipe:
    note = "The noise after each step (omega) is from FAT's public code; no algorithm has it."
    return Recipe(steps=n, attack_options={**UNIFORM, **FAT}, paper=f"section 5.2; {FAT_SOURCE}", notes=(note,))


_SOURCES = {"trades": "Zhang et al. 2019, arXiv:1901.08573", "mart": "Wang et al. 2020, ICLR"}


def _regularized(loss: str, attack_options: Mapping[str, Any]) -> Recipe:
    return Recipe(
        steps=10, attack_options=attack_options, loss=loss, paper=f"section 5.2; {_SOURCES[loss]}", notes=(UNCLAMPED,),
    )  # fmt: skip


def _friendly(loss: str) -> Recipe:
    return Recipe(
        steps=10,
        attack_options=FRIENDLY_KL,
        loss=loss,
        paper=f"section 5.2; {_SOURCES[loss]}; {FAT_SOURCE}",
        notes=("As in the authors' code, the attack maximizes KL; in the code of MART and FAT it maximizes CE.",)
        if loss == "mart"
        else (),
    )


def _guided(loss: str, attack_options: Mapping[str, Any]) -> Recipe:
    return Recipe(
        attack_options=attack_options,
        loss=loss,
        schedule=GRADIENT_MAGNITUDE,
        schedule_options={"max_steps": 10},
        paper=f"section 5.2, Algorithm 4; {_SOURCES[loss]}",
        notes=(UNCLAMPED, LOOP_TO_R, STARTS_WITH_ONE, SMALL_STEP),
    )


PAPER_FAMILIES: list[tuple[str, str, str, Callable[..., Recipe]]] = [
    # notation in tables, name pattern, example, recipe factory (called with the number in the name)
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
    ("trades", r"trades?", "trades", lambda: _regularized("trades", KL)),
    ("f+trades", r"f\+trades?", "f+trades", lambda: _friendly("trades")),
    ("m+trades", r"m\+trades?", "m+trades", lambda: _guided("trades", KL)),
    ("mart", r"mart", "mart", lambda: _regularized("mart", NORMAL)),
    ("f+mart", r"f\+mart", "f+mart", lambda: _friendly("mart")),
    ("m+mart", r"m\+mart", "m+mart", lambda: _guided("mart", NORMAL)),
]
