"""Reasons to believe an evaluation or to doubt it (Carlini et al. 2019, "On Evaluating Adversarial Robustness").

A check is a row in `CHECKS`: a function of a `CheckContext` that returns status, value and sentence, or None where what
it needs is missing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from deat_rb.data.check import check_batch
from deat_rb.evaluation.checks import attack_checks, model_checks
from deat_rb.evaluation.checks.context import EXAMPLES, CheckContext, Outcome
from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.report import LEFT_OUT, Check, Report
from deat_rb.utils import seeding
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.module_state import preserve_state

LEVELS = ("none", "quick", "full")

Progress = Callable[[str, int, int], None]

CHECKS: dict[str, Callable[[CheckContext], Outcome | None]] = {
    "eval mode": model_checks.eval_mode,
    "deterministic": model_checks.deterministic,
    "independent of the batch": model_checks.independent,
    "images in [0, 1]": model_checks.in_range,
    "normalisation inside": model_checks.normalised_inside,
    "eps in 255ths": model_checks.eps_in_255ths,
    "logits, not probabilities": model_checks.logits,
    "logit scale": model_checks.logit_scale,
    "gradients present": model_checks.gradients_present,
    "no blind pixels": model_checks.no_blind_pixels,
    "gradients true": model_checks.gradients_true,
    "bf16 agrees with fp32": model_checks.bf16_agrees,
    "adversarial images admissible": attack_checks.admissible,
    "verdicts verified": attack_checks.verified,
    "eps 0 is clean": attack_checks.zero_is_clean,
    "clean >= robust": attack_checks.clean_highest,
    "FGSM <= noise": attack_checks.noise_below_fgsm,
    "PGD <= FGSM": attack_checks.pgd_below_fgsm,
    "more steps change little": attack_checks.converged,
    "accuracy falls with eps": attack_checks.falls_with_eps,
    "chance at eps 1/2": attack_checks.chance_at_half,
    "larger balls find no more": attack_checks.larger_balls,
    "Square finds no more": attack_checks.square_no_better,
    "AutoAttack <= others": attack_checks.autoattack_lowest,
    "PGD near AutoAttack": attack_checks.pgd_near_autoattack,
    "model unchanged": model_checks.unchanged,
}
"""By name; the model's state is looked at last, after all that was done to it."""


def run_checks(
    model: nn.Module,
    images: Tensor,
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
    """Looks for what makes an evaluation suspect.

    Afterwards the model, its modes and torch's random state are what they were.

    Args:
        model: What was evaluated.
        images: What it was evaluated on, in [0, 1], (N, C, H, W).
        labels: (N,).
        report: What was found. Its verdicts and its adversarial images are looked at if it has them.
        level: ``none``; ``quick``, which looks at the first 100 images and costs a fraction of a PGD-20; or ``full``,
            which looks at 200, attacks them where the report does not tell, by Square as well, and verifies every
            stored image.
        eps: The radius, in [0, 1] pixel units.
        norm: ``Linf`` or ``L2``.
        batch_size: How many images are forwarded together.
        seed: Of noise and random starts.
        device: Where to run; by default where the model is.
        progress: Told ``(check, done, total)`` before every check.

    Returns:
        The checks; the last one names those that were left out.

    Raises:
        DeatError: If there is no such level, or images and labels cannot be used.
    """
    if level not in LEVELS:
        raise DeatError(f"--checks {level} is unknown: {did_you_mean(level, LEVELS)}")
    if level == "none":
        return ()
    check_batch(images, labels)
    found, left_out = [], []
    with _examined(model, images, device) as target:
        few = slice(min(EXAMPLES[level], len(images)))
        probe = Probe(
            model, images[few].to(target), labels[few].to(target), eps=eps, norm=norm, batch_size=batch_size, seed=seed
        )
        before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        context = CheckContext(model, probe, images, labels, report, level, before)
        for done, (name, check) in enumerate(CHECKS.items()):
            if progress is not None:
                progress(name, done, len(CHECKS))
            outcome = check(context)
            if outcome is None:
                left_out.append(name)
            else:
                found.append(_as_check(name, outcome))
    return (*found, _left_out(left_out, level)) if left_out else tuple(found)


@contextlib.contextmanager
def _examined(model: nn.Module, images: Tensor, device: torch.device | str | None) -> Iterator[torch.device]:
    """Holds the model still, in eval mode and on the device, and gives it back."""
    tensors = (*model.parameters(), *model.buffers())
    home = tensors[0].device if tensors else images.device
    target = resolve_device(str(device)) if device is not None else home
    with preserve_state(model), seeding.preserved():
        model.eval().requires_grad_(False)
        if target != home:
            model.to(target)
        try:
            yield target
        finally:
            if target != home:
                model.to(home)


def _as_check(name: str, outcome: Outcome) -> Check:
    status, figure, sentence = outcome
    if figure is not None and not math.isfinite(figure):
        return Check(name=name, status="fail", figure=None, sentence=sentence)
    return Check(name=name, status=status, figure=figure, sentence=sentence)


def _left_out(names: list[str], level: str) -> Check:
    advice = "--checks full measures most of them" if level == "quick" else "more attacks would tell"
    plural = (
        "checks need figures that are not there and were"
        if len(names) > 1
        else "check needs a figure that is not there and was"
    )
    return Check(
        name=LEFT_OUT,
        status="pass",
        figure=float(len(names)),
        sentence=f"{len(names)} {plural} left out ({'; '.join(names)}): {advice}.",
    )
