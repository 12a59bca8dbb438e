"""The rows of the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchattacks.attack import Attack

from deat_rb.attacks.pgd import PGD
from deat_rb.methods.schedules import AccuracyThreshold, EveryDEpochs, GradientMagnitude
from deat_rb.methods.stopping import GradientRatio, RobustnessDrop
from deat_rb.methods.trainers import AttackTrainer, ReplayTrainer
from deat_rb.training.base import Constant, Schedule, StoppingRule, SurrogateLoss
from deat_rb.training.trainer import Trainer

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
