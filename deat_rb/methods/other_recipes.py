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
        per_step=("alpha",),
        paper="Ye et al. 2021, arXiv:2012.08112; a baseline of the later version of arXiv:2103.03076",
        notes=(
            f"Epoch t of T, from 0, has {first} + {last - first} t/T steps, rounded down, so never quite {last}.",
            "tau = 20/255, the start at the clean image and the rounding are those of DEAT's public code; Amata's own "
            "code is not public.",
        ),
    )


def _yopo(m: int, n: int) -> Recipe:
    return Recipe(
        steps=m,
        attack_options={**UNIFORM, "clamp_start": False},
        trainer="deat_rb.methods.yopo:YopoTrainer",
        trainer_options={"inner": n},
        per_step=("peak_lr",),
        peak_lr=0.2 / m,
        paper="Zhang et al. 2019, arXiv:1905.00877; a baseline of the later version of arXiv:2103.03076",
        notes=(
            f"The update sums the gradients of the {m} full passes, so the learning rate counts {m}-fold: 0.2/{m} in "
            "YOPO's public code, and here in the settings fast and fastat; 0.05 in DEAT's, and here in standard.",
            "The first layer's weights also get the gradients of the points that the inner steps reach, as in the "
            "public code.",
            "The first of the full passes is at the uniform start, which may leave [0, 1], as in the public code.",
            "l_X is that of the last full pass.",
        ),
    )


ONE_FORWARD_PASS = (
    "Attack and loss share a forward pass, in train mode: no AWP, --attack-mode or --compile. As with TRADES, the "
    "backward pass of the update goes through two forward passes."
)


def _fgsm_pgi() -> Recipe:
    return Recipe(
        steps=1,
        alpha=8 / 255,
        attack_options={"start": "none"},
        label_smoothing=0.4,
        trainer="deat_rb.methods.prior_guided:PriorGuidedTrainer",
        trainer_options={"consistency": 10.0, "prior_reset": 40},
        fast_epochs=15,
        start="from each image's perturbation of the epoch before, reset every {prior_reset} epochs",
        penalty="{consistency:g} mean squared change of the logits",
        paper="Jia et al. 2022, arXiv:2207.08859, FGSM-MEP",
        notes=(
            "The form with momentum, which is the paper's most robust one and that of its public code.",
            "As in the public code, momenta add gradients divided by the batch's L1 norm (Algorithm 3: signs), and "
            "perturbations are not cropped and flipped with the image, and are reset every 40 epochs (CIFAR-100: 10).",
            "The public code's smoothing gives the label 0.6 and the others 0.4 together; it trains for 110 epochs.",
            ONE_FORWARD_PASS,
        ),
    )


def _liet() -> Recipe:
    return Recipe(
        steps=1,
        alpha=8 / 255,
        attack_options={"start": "none"},
        loss="nls",
        label_smoothing=0.6,
        trainer="deat_rb.methods.label_information:LabelInformationTrainer",
        trainer_options={"consistency": 100.0},
        fast_epochs=15,
        cost="(2 + K/20N)MT",
        start="from the label's perturbation of a gray image, plus or minus, mixed with noise",
        penalty="{consistency:g} t/T JS divergence of start and end",
        paper="Pan et al., ICCV 2025, Algorithm 1",
        notes=(
            "As in the public code: Algorithm 1's divergence is from the start, not the clean image; its weight rises "
            "with the epoch t; the gray image's perturbations, computed every 20 batches in eval mode, take K/N passes "
            "for K classes and N images per batch.",
            "Above eps 8/255, as in the paper, examples are not projected and the noise is within 2 eps; its weights "
            "there are --consistency 20 --label-smoothing 0.4.",
            "The public code trains for 100 epochs with EMA 0.9995, on CIFAR-100 with weight 200 and smoothing 0.8.",
            ONE_FORWARD_PASS,
        ),
    )


OTHER_FAMILIES: list[tuple[str, str, str, Callable[..., Recipe]]] = [
    # as `deat_rb.methods.recipes.PAPER_FAMILIES`
    ("n-fgsm", r"n-fgsm", "n-fgsm", _n_fgsm),
    ("m+n-fgsm", r"m\+n-fgsm", "m+n-fgsm", _m_n_fgsm),
    ("gradalign", r"gradalign", "gradalign", _gradalign),
    ("amata-K-L", r"amata-(\d+)-(\d+)", "amata-2-10", _amata),
    ("yopo-m-n", r"yopo-(\d+)-(\d+)", "yopo-5-3", _yopo),
    ("fgsm-pgi", r"fgsm-pgi", "fgsm-pgi", _fgsm_pgi),
    ("liet", r"liet", "liet", _liet),
]
