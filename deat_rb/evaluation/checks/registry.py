"""The sanity checks for robustness evaluations (Carlini et al. 2019, "On Evaluating Adversarial Robustness").

A check is an entry of `CHECKS`: a function of a `CheckContext` that returns status, value and sentence, or None if
results that it needs are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.checks import attack_checks, label_checks, model_checks
from deat_rb.evaluation.checks.context import EXAMPLES, CheckContext, Outcome
from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.frozen_model import prepared_for_eval
from deat_rb.evaluation.report import CHECK_LEVELS, SKIPPED, Check, Report
from deat_rb.utils import seeding
from deat_rb.utils.devices import full_float32
from deat_rb.utils.errors import DeatError, did_you_mean

Progress = Callable[[str, int, int], None]

CHECKS: dict[str, Callable[[CheckContext], Outcome | None]] = {
    "labels in the network's order": label_checks.labels_in_order,
    "several classes predicted": label_checks.several_classes,
    "accuracy above chance": label_checks.above_chance,
    "eval mode": model_checks.eval_mode,
    "deterministic": model_checks.deterministic,
    "independent of the batch": model_checks.independent,
    "images in [0, 1]": model_checks.in_range,
    "normalization inside": model_checks.normalized_inside,
    "eps in 255ths": model_checks.eps_in_255ths,
    "logits, not probabilities": model_checks.logits,
    "logit scale": model_checks.logit_scale,
    "gradients present": model_checks.gradients_present,
    "gradients reach all pixels": model_checks.no_blind_pixels,
    "gradients match finite differences": model_checks.gradients_true,
    "bf16 agrees with fp32": model_checks.bf16_agrees,
    "adversarial images within eps": attack_checks.admissible,
    "verdicts reproduced": attack_checks.reproduced,
    "no change at eps 0": attack_checks.no_change_at_zero,
    "clean >= robust": attack_checks.clean_highest,
    "FGSM <= noise": attack_checks.noise_below_fgsm,
    "PGD <= FGSM": attack_checks.pgd_below_fgsm,
    "PGD converged": attack_checks.converged,
    "accuracy decreases with eps": attack_checks.falls_with_eps,
    "chance at eps 1/2": attack_checks.chance_at_half,
    "larger eps finds no more": attack_checks.larger_eps,
    "Square finds no more": attack_checks.square_no_better,
    "AutoAttack <= others": attack_checks.autoattack_lowest,
    "PGD near AutoAttack": attack_checks.pgd_near_autoattack,
    "model unchanged": model_checks.unchanged,
}
"""Checks by name; "model unchanged" comes last, after all other checks have called the model."""


def run_checks(
    model: nn.Module,
    images: Tensor | LabeledImages,
    labels: Tensor,
    report: Report,
    *,
    level: str,
    eps: float,
    norm: str = "Linf",
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Check, ...]:
    """Run the sanity checks on an evaluation, in float32 as its verdicts.

    The model, its mode and torch's random state are left unchanged.

    Args:
        model: The evaluated model.
        images: The evaluated images, in [0, 1], (N, C, H, W).
        labels: (N,).
        report: The report; its verdicts and adversarial images are checked if it has them.
        level: ``none``; ``quick``, which uses the first 100 images and costs a fraction of PGD-20; or ``full``, which
            uses 200, runs PGD and Square for results that are missing from the report, and classifies all stored
            images again.
        eps: Radius, in [0, 1] pixel units.
        norm: ``Linf`` or ``L2``.
        batch_size: Number of images per batch.
        seed: Seed of noise and random starts.
        device: Device to run on; by default the model's.
        progress: Called as ``(check, done, total)`` before each check.

    Returns:
        The results of the checks; the last one lists skipped checks, if any.

    Raises:
        DeatError: The level is unknown, or the images or labels are invalid.
    """
    if level not in CHECK_LEVELS:
        raise DeatError(f"--checks {level} is unknown: {did_you_mean(level, CHECK_LEVELS)}")
    if level == "none":
        return ()
    checks, skipped = [], []
    with (
        prepared_for_eval(model, images, labels, batch_size=batch_size, device=device) as prepared,
        full_float32(prepared.device),
        seeding.preserved(),
    ):
        few, few_labels = prepared.take(torch.arange(min(EXAMPLES[level], len(images))))
        probe = Probe(model, few, few_labels, eps=eps, norm=norm, batch_size=batch_size, seed=seed)
        before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        context = CheckContext(prepared, probe, report, level, before)
        for done, (name, check) in enumerate(CHECKS.items()):
            if progress is not None:
                progress(name, done, len(CHECKS))
            outcome = check(context)
            if outcome is None:
                skipped.append(name)
            else:
                checks.append(_as_check(name, outcome))
    return (*checks, _skipped(skipped, level)) if skipped else tuple(checks)


def _as_check(name: str, outcome: Outcome) -> Check:
    status, value, sentence = outcome
    if value is not None and not math.isfinite(value):
        return Check(name=name, status="fail", figure=None, sentence=sentence)
    return Check(name=name, status=status, figure=value, sentence=sentence)


def _skipped(names: list[str], level: str) -> Check:
    advice = "--checks full runs most of them" if level == "quick" else "evaluate with more attacks to run them"
    return Check(
        name=SKIPPED,
        status="pass",
        figure=float(len(names)),
        sentence=f"Skipped because results are missing ({'; '.join(names)}): {advice}.",
    )
