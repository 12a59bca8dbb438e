"""Robust accuracy of any model under any of the attacks, on the same images, in one report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deat_rb.attacks.names import SQUARE_TILES, parse_attacks, split_names
from deat_rb.attacks.registry import build_attack
from deat_rb.attacks.threat_models import check_norm, check_radius
from deat_rb.attacks.types import Attack, AttackContext
from deat_rb.evaluation.frozen_model import PreparedModel, prepared_for_eval
from deat_rb.evaluation.report import AttackResult, Check, CurvePoint, Norm, Report
from deat_rb.evaluation.resume import ResumeStore, opened
from deat_rb.evaluation.runner import NATURAL, AttackOutcome, AttackRunner, Progress
from deat_rb.evaluation.statistics import wilson
from deat_rb.training.validation import validate
from deat_rb.utils.errors import DeatError, Interrupted, did_you_mean
from deat_rb.utils.safe_load import sha256_tensors
from deat_rb.utils.text import replace_invisible
from deat_rb.utils.units import format_fraction
from deat_rb.utils.versions import versions

__all__ = ["AttackResult", "Report", "evaluate", "parse_attacks", "split_names", "validate", "wilson"]

Eps = str | float | Sequence[str | float]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}

CHECKS = ("none", "quick", "full")

KEPT_BYTES = 2 * 2**30
"""Adversarial images are kept by default as long as those of all attacks together take no more."""

UPPER_BOUND = (
    "the attacks crafted in bf16: what they broke was confirmed in fp32, but what they missed was not looked for "
    "there, so robust accuracies are upper bounds"
)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: str | Sequence[str] = ("fgsm", "pgd-100", "cw-20"),
    eps: Eps = 8 / 255,
    main_eps: str | float | None = None,
    norm: str = "Linf",
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    channels_last: bool = True,
    keep_adversarial: bool | None = None,
    checks: str = "none",
    state: str | Path | None = None,
    resume: bool | None = None,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
    finish: Callable[[Report], None] | None = None,
) -> Report:
    """Measures accuracy without an attack and under each of ``attacks``.

    The model is evaluated in eval mode; modes, parameters, gradients, buffers and torch's random state are
    afterwards what they were. Only what is correctly classified is attacked.

    Args:
        model: Takes images in [0, 1], shape (N, C, H, W), and returns logits (N, K).
        images: In [0, 1], (N, C, H, W), wherever they are: batches are moved to the device.
        labels: (N,), int64.
        attacks: See `parse_attacks`. ``noise-gaussian`` and ``noise-uniform`` are of size ``eps``; ``fgsm`` is one step
            of ``eps`` without a random start; ``pgd-N`` takes N steps of eps / 4 on the cross-entropy from a uniform
            start, ``cw-N`` on the margin max_{k != y} z_k - z_y, and ``pgd-NxR`` starts R times; ``autoattack`` is
            AutoAttack's standard version, ``autoattack-plus`` and ``autoattack-rand`` are the other two, and ``square``
            is its black-box part alone; ``torchattacks.NAME(...)`` is that attack, within ``eps`` unless told its own.
        eps: The radius, in [0, 1] pixel units, as a number or a text such as ``8/255``; several make a sweep.
        main_eps: Of a sweep, the radius that the report is about; by default, and if it is not one of them, the last.
        norm: ``Linf`` or ``L2``.
        batch_size: How many examples are attacked together.
        seed: Fixes everything random, batch by batch.
        device: Where to run; by default where the model is.
        precision: ``fp32``, or ``bf16`` for a quicker look, whose robust accuracies are upper bounds.
        channels_last: On a CPU, lays the convolutions' weights out so while they are evaluated, where the model takes
            it. That is quicker and rounds otherwise, by some 1e-7 of the logits; without it they are left as they are.
        keep_adversarial: Whether the report keeps the adversarial images of the main radius; by default if those of
            all attacks take no more than 2 GiB.
        checks: ``none``, ``quick`` or ``full``: how much is looked at that would make the figures suspect.
        state: A folder in which every batch is kept until the evaluation has ended, so that it can be continued.
        resume: True to continue what is in ``state``, False to start anew; by default it is continued if there is
            something. What is of another evaluation is refused.
        progress: Told ``(attack, done, total, robust)`` after every batch, ``robust`` being how many are correct
            so far. The parts of an attack are named as in ``autoattack/square``, and for them it is of all examples;
            those of a sweep as in ``fgsm (eps 4/255)``.
            If it has a method ``within``, that is told ``(attack, batch, batches, share)`` while a batch is attacked.
        provenance: Where model and data came from, for the report; what cannot be seen or written becomes U+FFFD.
        finish: Given the report, to write it, while what is in ``state`` is still there: where it raises, nothing is
            lost.

    Returns:
        The report, with `Report.verdicts` and `Report.adversarial`.

    Raises:
        DeatError: If images, labels, eps or a name cannot be used, or ``state`` holds another evaluation.
        Interrupted: On Ctrl-C; it says what is kept.
    """
    names = parse_attacks(attacks)
    norm = check_norm(norm)
    check_options(precision=precision, checks=checks)
    radii, main = _radii(eps, main_eps, norm)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise DeatError(f"seed = {seed!r} is not possible; give a whole number of 0 or more")
    seed = int(seed)
    with ExitStack() as stack:
        with prepared_for_eval(
            model, images, labels, batch_size=batch_size, device=device, channels_last=channels_last
        ) as held:
            _check_square(names, norm, images)
            keep = keep_adversarial
            if keep is None:
                keep = 4 * images.numel() * (len(names) - 1) <= KEPT_BYTES
            context = AttackContext(norm, main, seed, held.num_classes, held.device)
            plans = {radius: _attacks(names, replace(context, eps=radius)) for radius in sorted({*radii, main})}
            facts = _facts(model, images, labels)
            settings = {
                "norm": norm,
                "eps": ", ".join(map(_exactly, radii)),
                "main eps": _exactly(main),
                "attacks": ", ".join(names),
                "seed": str(seed),
                "batch size": str(held.batch_size),
                "precision": precision,
                "layout": "channels_last" if held.channels_last else "own",
                "device": _device_name(held.device),
                "adversarial images": "kept" if keep else "not kept",
            }
            journal = stack.enter_context(opened(state, {**facts, **settings, **versions()}, resume))
            stack.enter_context(_explained(journal, held))
            if journal.said and hasattr(progress, "say"):
                cast(Any, progress).say(journal.said)
            attacker = AttackRunner(held, context, journal, keep, PRECISIONS[precision], progress, len(plans) > 1)
            found, curve = _run(attacker, plans, main)
        report = Report.of(
            [each.result(attack) for attack, each in found.items()],
            {attack.name: each.correct for attack, each in found.items()},
            norm=cast(Norm, norm),
            eps=main,
            num_classes=held.num_classes,
            seed=seed,
            batch_size=held.batch_size,
            precision=precision,
            layout=cast(Any, settings["layout"]),
            device=settings["device"],
            versions=versions(),
            curve=curve if len(plans) > 1 else (),
            model_sha256=facts["weights"],
            examples_sha256=facts["examples"],
            notes=(UPPER_BOUND,) if precision != "fp32" else (),
            provenance={name: replace_invisible(str(each)) for name, each in (provenance or {}).items()},
        )
        report._adversarial.update(
            {attack.name: each.adversarial for attack, each in found.items() if each.adversarial is not None}
        )
        if checks != "none":
            made = _checked(model, images, labels, report, checks, device, progress)
            report = report.model_copy(update={"checks": made})
        if finish is not None:
            _finish(finish, report, journal)
    return report


def _finish(finish: Callable[[Report], None], report: Report, journal: ResumeStore) -> None:
    """Hands the report over; where it cannot be taken, says what is kept."""
    try:
        finish(report)
    except DeatError as error:
        raise DeatError(f"{error}; {journal.kept}" if journal.kept else str(error)) from error


def _run(
    attacker: AttackRunner, plans: Mapping[float, Mapping[str, Attack]], main: float
) -> tuple[dict[Attack, AttackOutcome], tuple[CurvePoint, ...]]:
    """Runs the natural pass once, and the attacks at every radius."""
    everyone = torch.ones(len(attacker.held), dtype=torch.bool)
    natural = attacker.run(NATURAL, everyone)
    results: dict[Attack, AttackOutcome] = {NATURAL: natural}
    curve = []
    for radius, attacks in plans.items():
        here = replace(attacker, context=replace(attacker.context, eps=radius), keep=attacker.keep and radius == main)
        verdicts = {"natural": natural.correct}
        for name, attack in attacks.items():
            # Within a radius of 0 there is nothing but the image; only as the report's own is that tried out.
            found = here.run(attack, natural.correct) if radius > 0 or radius == main else natural
            verdicts[name] = found.correct
            if radius == main:
                results[attack] = found
        curve.append(CurvePoint.of(radius, verdicts))
    return results, tuple(curve)


def _attacks(names: Sequence[str], context: AttackContext) -> dict[str, Attack]:
    return {name: build_attack(name, context) for name in names if name != "natural"}


def _exactly(radius: float) -> str:
    """Writes a radius so that no other is written alike."""
    short = format_fraction(radius)
    return short if "/" in short or float(short) == radius else repr(radius)


def _check_square(names: Sequence[str], norm: str, images: Tensor) -> None:
    """Square in L2 begins with tiles of a fifth of the image's height."""
    squares = [name for name in names if name in ("square", "autoattack", "autoattack-plus")]
    if norm == "L2" and squares and min(images.shape[-2:]) < SQUARE_TILES:
        raise DeatError(f"{squares[0]} in L2 needs images of 5x5 and more, and these are of {images.shape[-2]}x"
                        f"{images.shape[-1]}: choose other attacks, such as pgd-100")  # fmt: skip


def _radii(eps: Eps, main_eps: str | float | None, norm: str) -> tuple[tuple[float, ...], float]:
    """Reads the radii, and says which of them the report is about."""
    given = eps.split(",") if isinstance(eps, str) else eps if isinstance(eps, Sequence) else (eps,)
    radii = tuple(dict.fromkeys(check_radius(each, norm=norm) for each in given))
    if not radii:
        raise DeatError("eps is an empty list; give one or more radii such as 8/255")
    if main_eps is None:
        return radii, radii[-1]
    main = check_radius(main_eps, "main_eps", norm=norm)
    near = [radius for radius in radii if abs(radius - main) < 1e-9]
    return radii, near[0] if near else radii[-1]


def check_options(*, precision: str, checks: str) -> None:
    """Checks what `evaluate` takes one of a few words for.

    Raises:
        DeatError: There is no such precision or level of checks.
    """
    if str(precision) not in PRECISIONS:
        raise DeatError(
            f"there is no precision '{precision}' to evaluate in: {did_you_mean(str(precision), PRECISIONS)}"
        )
    if str(checks) not in CHECKS:
        raise DeatError(f"there is no level of checks '{checks}': {did_you_mean(str(checks), CHECKS)}")


def _checked(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    report: Report,
    level: str,
    device: torch.device | str | None,
    progress: Progress | None,
) -> tuple[Check, ...]:
    from deat_rb.evaluation.checks.registry import run_checks

    return run_checks(
        model,
        images,
        labels,
        report,
        level=level,
        eps=report.eps,
        norm=report.norm,
        batch_size=report.batch_size,
        seed=report.seed,
        device=device,
        progress=getattr(progress, "checking", None),
    )


@contextmanager
def _explained(journal: ResumeStore, held: PreparedModel) -> Iterator[None]:
    """Lets Ctrl-C say what is kept, and a full accelerator what helps."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(journal.kept) from None
    except torch.OutOfMemoryError as error:
        anew = " and start anew by --no-resume" if journal.kept else ""
        raise DeatError(f"{_device_name(held.device)} has too little memory for batches of {held.batch_size} images: "
                        f"give a smaller --batch-size{anew}") from error  # fmt: skip


def _facts(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, str]:
    """What the evaluation is of: SHA-256 of the weights, the network's description and the examples."""
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    description = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    return {
        "weights": sha256_tensors(weights),
        "network": sha256(description.encode()).hexdigest(),
        "examples": sha256_tensors({"images": images, "labels": labels}),
    }


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
