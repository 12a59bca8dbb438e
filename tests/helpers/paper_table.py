"""The paper's table of methods and the other rows, with the values of the paper and of the authors' code."""

from __future__ import annotations

from typing import Any

from deat_rb.methods.schedules import AccuracyThreshold as Accuracy
from deat_rb.methods.schedules import Annealed, EveryDEpochs
from deat_rb.methods.schedules import GradientMagnitude as Guided
from deat_rb.methods.stopping import GradientRatio, RobustnessDrop
from deat_rb.training.schedule import Constant

D = {"every": 3, "max_steps": None}
NOT_IN_THE_PAPER = ("n-fgsm", "m+n-fgsm", "gradalign", "amata-2-10", "yopo-5-3", "fgsm-pgi", "liet")
P = {"threshold": 0.4, "max_steps": None}
DROP = {"drop": 0.2, "validation_steps": 5}
RATIO = {"m": 2, "gamma": 1.5, "guard": 0.4}


def at_most(steps: int) -> dict[str, Any]:
    return {"max_steps": steps}


# The paper: section 3 (FREE, PGD-7), 4.1 (DEAT), 4.2 (M-DEAT), 5.1 (alpha = 10/255 and 2/255, T of the fast setting),
# 5.2 (TRADES, MART, FAT: 10 or 5 steps of 2/255, tau = 3, lambda = 6), 5.3 (M+U-FGSM: m = 2, gamma = 1.5).
# The authors' code: starts, the mode of the model during the attack, the bounds 8, 7 and 10, U-FGSM's 15 epochs.
#
# Columns: trainer, steps of the first epoch, alpha in 255ths | start, loss of the attack, tau, mode | surrogate loss |
# schedule and its values | stopping rule and its values | T of the fast setting
TABLE: dict[str, tuple[Any, ...]] = {
    "standard": ("attack",  0,  2, "none",    "ce", None, "train", "ce",     Constant, {}, None, {}, 10),
    "free-8":   ("carried", 8,  8, "none",    "ce", None, "train", "ce",     Constant, {}, None, {}, 10),
    "deat-3":   ("replay",  1, 10, "uniform", "ce", None, "train", "ce",     EveryDEpochs, D, None, {}, 12),
    "deat-40%": ("replay",  1, 10, "uniform", "ce", None, "train", "ce",     Accuracy, P, None, {}, 11),
    "m-deat":   ("replay",  1, 10, "uniform", "ce", None, "train", "ce",     Guided, at_most(8), None, {}, 11),
    "pgd-7":    ("attack",  7,  2, "uniform", "ce", None, "train", "ce",     Constant, {}, None, {}, 10),
    "m+pgd":    ("attack",  1,  2, "uniform", "ce", None, "train", "ce",     Guided, at_most(7), None, {}, 10),
    "u-fgsm":   ("attack",  1, 10, "uniform", "ce", None, "train", "ce",     Constant, {}, RobustnessDrop, DROP, 15),
    "m+u-fgsm": ("attack",  1, 10, "uniform", "ce", None, "train", "ce",     Constant, {}, GradientRatio, RATIO, 15),
    "fat-5":    ("attack",  5,  2, "uniform", "ce", 3,    "eval",  "ce",     Constant, {}, None, {}, 10),
    "trades":   ("attack", 10,  2, "normal",  "kl", None, "train", "trades", Constant, {}, None, {}, 10),
    "f+trades": ("attack", 10,  2, "normal",  "kl", 3,    "eval",  "trades", Constant, {}, None, {}, 10),
    "m+trades": ("attack",  1,  2, "normal",  "kl", None, "train", "trades", Guided, at_most(10), None, {}, 10),
    "mart":     ("attack", 10,  2, "normal",  "ce", None, "train", "mart",   Constant, {}, None, {}, 10),
    "f+mart":   ("attack", 10,  2, "normal",  "kl", 3,    "eval",  "mart",   Constant, {}, None, {}, 10),
    "m+mart":   ("attack",  1,  2, "normal",  "ce", None, "train", "mart",   Guided, at_most(10), None, {}, 10),
    # Not in the paper. N-FGSM: de Jorge et al. 2022, section 4 (alpha = eps); T as U-FGSM.
    "n-fgsm":   ("attack",  1,  8, "uniform", "ce", None, "train", "ce",     Constant, {}, None, {}, 15),
    "m+n-fgsm": ("attack",  1,  8, "uniform", "ce", None, "train", "ce",     Constant, {}, GradientRatio, RATIO, 15),
    # GradAlign: Andriushchenko and Flammarion 2020, section 4 (FGSM without a random start); T as U-FGSM.
    "gradalign": ("attack", 1,  8, "none",    "ce", None, "train", "ce",     Constant, {}, None, {}, 15),
    # Amata: Ye et al. 2021, Algorithm 1; tau = 20/255 = 2 * 10/255 as in the code of DEAT (amata_cifar10.py).
    "amata-2-10": ("attack", 2, 10, "none",   "ce", None, "train", "ce",     Annealed, at_most(10), None, {}, 10),
    # YOPO: Zhang et al. 2019, section 4 (m = 5, n = 3, steps of 2/255); its code (start, Linf steps).
    "yopo-5-3": ("yopo",    5,  2, "uniform", "ce", None, "train", "ce",     Constant, {}, None, {}, 10),
    # FGSM-PGI: Jia et al. 2022, Algorithm 3; LIET: Pan et al. 2025, Algorithm 1 (both alpha = eps); T as U-FGSM.
    "fgsm-pgi": ("shared",  1,  8, "none",    "ce", None, "train", "ce",     Constant, {}, None, {}, 15),
    "liet":     ("shared",  1,  8, "none",    "ce", None, "train", "nls",    Constant, {}, None, {}, 15),
}  # fmt: skip
