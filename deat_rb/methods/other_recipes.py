"""Recipes of methods that are not in the paper, in the same form as those of its tables."""

from __future__ import annotations

from collections.abc import Callable

from deat_rb.methods.recipes import ANNEALED, GRADIENT_RATIO, UNIFORM, Recipe
from deat_rb.utils.errors import DeatError

N_FGSM_SOURCE = "de Jorge et al. 2022, arXiv:2202.01181"


def _n_fgsm() -> Recipe:
    return Recipe(
        steps=1,
        alpha=8 / 255,
        attack_options={**UNIFORM, "start_scale": 2.0, "project": False},
        fast_epochs=15,
        paper=N_FGSM_SOURCE,
        notes=(
            "Training examples may be up to 3 eps away from the clean images, within [0, 1]; validation and "
            "evaluation use eps.",
            "15 epochs in the fast setting, as for U-FGSM; N-FGSM's public code trains for 30, with a peak LR of 0.2.",
        ),
    )


def _m_n_fgsm() -> Recipe:
    row = _n_fgsm()
    return Recipe(
        steps=row.steps,
        alpha=row.alpha,
        attack_options=row.attack_options,
        stopping=GRADIENT_RATIO,
        stopping_options={"m": 2, "gamma": 1.5},
        fast_epochs=row.fast_epochs,
        paper=f"{N_FGSM_SOURCE}; the stopping rule of arXiv:2103.03076, section 5.3, Algorithm 5, Equation 8",
        notes=(*row.notes, "This combination is in neither paper."),
    )


def _gradalign() -> Recipe:
    return Recipe(
        steps=1,
        alpha=8 / 255,
        attack_options={"start": "none"},
        trainer="deat_rb.methods.grad_align:GradAlignTrainer",
        trainer_options={"align": 0.2},
        fast_epochs=15,
        cost="4MT",
        paper="Andriushchenko and Flammarion 2020, arXiv:2007.02617",
        notes=(
            "One of the four backward passes per batch goes through the gradient of another and takes longer.",
            "The weight 0.2 is the paper's for CIFAR-10 at eps 8/255 (0.063 at 4/255, 0.632 at 12/255, 2 at 16/255).",
            "15 epochs in the fast setting, as U-FGSM; its public code trains for 30 with a learning rate up to 0.3.",
        ),
    )


def _amata(first: int, last: int) -> Recipe:
    if first > last:
        raise DeatError(f"method 'amata-{first}-{last}': the number of steps cannot fall from {first} to {last}")
    return Recipe(
        steps=first,
        alpha=20 / 255 / first,
        attack_options={"start": "none"},
        schedule=ANNEALED,
        schedule_options={"max_steps": last},
        paper="Ye et al. 2021, arXiv:2012.08112; a baseline of the later version of arXiv:2103.03076",
        notes=(
            f"Epoch t of T, from 0, has {first} + {last - first} t/T steps, rounded down, so never quite {last}.",
            "tau = 20/255, the start at the clean image and the rounding are those of DEAT's public code; Amata's own "
            "code is not public.",
        ),
    )


OTHER_FAMILIES: list[tuple[str, str, str, Callable[..., Recipe]]] = [
    # as `deat_rb.methods.recipes.PAPER_FAMILIES`
    ("n-fgsm", r"n-fgsm", "n-fgsm", _n_fgsm),
    ("m+n-fgsm", r"m\+n-fgsm", "m+n-fgsm", _m_n_fgsm),
    ("gradalign", r"gradalign", "gradalign", _gradalign),
    ("amata-K-L", r"amata-(\d+)-(\d+)", "amata-2-10", _amata),
]
