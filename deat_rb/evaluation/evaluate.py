"""`evaluate`: robust accuracy of a model under several attacks on the same images, in one report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deat_rb.attacks.captured import captures_for
from deat_rb.attacks.names import PREFIX, SQUARE_TILES, parse_attacks
from deat_rb.attacks.registry import build_attack
from deat_rb.attacks.threat_models import DEFAULT_EPS, check_norm, check_radius
from deat_rb.attacks.types import Attack, AttackContext
from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.frozen_model import PreparedModel, prepared_for_eval, sha256_examples
from deat_rb.evaluation.report import CHECK_LEVELS, CurvePoint, Norm, Report
from deat_rb.evaluation.resume import ResumeStore, open_store
from deat_rb.evaluation.runner import NATURAL, AttackOutcome, AttackRunner, EvaluationCallback, Progress
from deat_rb.utils.devices import uses_tf32
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError, Interrupted, did_you_mean
from deat_rb.utils.safe_load import sha256_tensors
from deat_rb.utils.text import counted, replace_invisible
from deat_rb.utils.units import exact_fraction
from deat_rb.utils.versions import versions

Eps = str | float | Sequence[str | float]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}

KEPT_BYTES = 2 * 2**30
"""Maximum total size up to which the adversarial images of all attacks are kept by default."""

UPPER_BOUND = (
    "the attacks ran in bf16: their adversarial examples were confirmed in fp32, but attacks in fp32 may find more, so "
    "robust accuracies are upper bounds"
)


def evaluate(
    model: nn.Module,
    images: Tensor | LabeledImages,
    labels: Tensor,
    *,
    attacks: str | Sequence[str] = ("fgsm", "pgd-100", "cw-20"),
    eps: Eps | None = None,
    main_eps: str | float | None = None,
    norm: str = "Linf",
    batch_size: int | None = None,
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
    ranks: World | None = None,
) -> Report:
    """Measure accuracy without an attack and under each of ``attacks``.

    The model is evaluated in eval mode; afterwards its mode, parameters, gradients and buffers, the images and torch's
    random state are as before. Only correctly classified examples are attacked.

    Args:
        model: Model for images in [0, 1], shape (N, C, H, W), that returns logits (N, K).
        images: In [0, 1], (N, C, H, W), on any device; batches are moved to ``device``. Pixels that are outside by at
            most 1e-6, as after resampling, are clamped. Images that `load_data` leaves in their files because of a
            memory limit are decoded batch by batch.
        labels: (N,), int64.
        attacks: See `parse_attacks`. ``noise-gaussian`` and ``noise-uniform`` add noise of size ``eps``; ``fgsm`` takes
            one step of ``eps`` without a random start; ``pgd-N`` takes N steps of eps / 4 on the cross-entropy
            from a uniform random start, ``cw-N`` on the margin max_{k != y} z_k - z_y, and ``pgd-NxR`` has R restarts;
            ``autoattack`` is AutoAttack's standard version, ``autoattack-plus`` and ``autoattack-rand`` are the other
            two, and ``square`` is its black-box attack alone; ``torchattacks.NAME(...)`` is an attack of torchattacks,
            with ``eps`` unless its arguments set another, and with ``alpha`` in its default proportion to eps unless
            they set one; it must take eps in ``norm``.
        eps: Radius, in [0, 1] pixel units, as a number or a string such as ``8/255``; several make a sweep. By default
            8/255, in L2 0.5.
        main_eps: The radius of a sweep for which accuracies are reported; the last if None or not part of the sweep.
        norm: ``Linf`` or ``L2``.
        batch_size: Number of examples attacked together; by default 500 on a GPU, otherwise 128.
        seed: Seed from which the random numbers of each batch are derived.
        device: Device to run on; by default the model's.
        precision: ``fp32``, or ``bf16`` for a faster evaluation whose robust accuracies are upper bounds. In ``fp32``,
            torch computes convolutions in TF32 on NVIDIA's GPUs; the report says so. Verdicts are always in float32.
        channels_last: Whether to use the channels_last memory format on a CPU or GPU, if the model supports it. It is
            faster and changes logits by rounding errors, about 1e-7 of their size.
        keep_adversarial: Whether the report keeps the adversarial images of the main radius; by default only if those
            of all attacks take at most 2 GiB.
        checks: Level of sanity checks: ``none``, ``quick`` or ``full``.
        state: Folder that stores the result of each batch until the evaluation has finished, for resuming it.
        resume: True to require an unfinished evaluation in ``state``, False to discard it, None to resume it if there
            is one. An unfinished evaluation with different settings raises an error.
        progress: Called as ``(attack, done, total, robust)`` after each batch, first of ``natural``, where ``robust``
            is the number of examples classified correctly so far. Stages of an attack have names such as
            ``autoattack/square``, and their ``robust`` counts all examples; attacks of a sweep have names such as
            ``fgsm (eps 4/255)``. A `deat_rb.evaluation.runner.EvaluationCallback` has more
            hooks.
        provenance: Source of the model and the data, for the report; invisible characters are replaced with U+FFFD.
        finish: Function that saves the report; called before ``state`` is removed, so that nothing is lost if it fails.
        ranks: The ranks that share the evaluation, from `deat_rb.utils.distributed.world`; all must call this with the
            same arguments. Only rank 0 calls ``finish``. By default, this process evaluates alone.

    Returns:
        The report, with `Report.verdicts` and `Report.adversarial`.

    Raises:
        UnusableStoreError: ``state`` holds a different evaluation, or a damaged one.
        DeatError: An argument is invalid.
        Interrupted: Ctrl-C was pressed; the message says what is stored.
    """
    names = parse_attacks(attacks)
    norm = check_norm(norm)
    check_options(precision=precision, checks=checks)
    radii, main = _radii(DEFAULT_EPS[norm] if eps is None else eps, main_eps, norm)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise DeatError(f"seed = {seed!r} is invalid; give a whole number from 0 to 2^63 - 1")
    seed = int(seed)
    hooks = progress if isinstance(progress, EvaluationCallback) else EvaluationCallback(progress)
    with ExitStack() as stack:
        with prepared_for_eval(
            model, images, labels, batch_size=batch_size, device=device, channels_last=channels_last
        ) as prepared:
            _check_images(names, norm, images)
            ranks = ranks or World()
            keep = keep_adversarial
            if keep is None:
                keep = 4 * len(images) * math.prod(images.shape[-3:]) * (len(names) - 1) <= KEPT_BYTES
            context = AttackContext(norm, main, seed, prepared.num_classes, prepared.device)
            plans = {radius: _attacks(names, replace(context, eps=radius)) for radius in sorted({*radii, main})}
            digests = _digests(model, images, labels)
            settings = {
                "norm": norm,
                "eps": ", ".join(map(exact_fraction, radii)),
                "main eps": exact_fraction(main),
                "attacks": ", ".join(names),
                "seed": str(seed),
                "batch size": str(prepared.batch_size),
                "precision": precision,
                "layout": "channels_last" if prepared.channels_last else "own",
                "device": _device_name(prepared.device),
                "adversarial images": "kept" if keep else "not kept",
            }
            # The step size is no part of an attack's name; earlier versions did not scale it with eps.
            settings |= {name: repr(each.parameters) for name, each in plans[main].items() if name.startswith(PREFIX)}
            tf32 = precision == "fp32" and uses_tf32(prepared.device)
            if tf32:
                settings["convolutions"] = "TF32"
            store = _shared_store(stack, state, {**digests, **settings, **versions()}, resume, ranks)
            stack.enter_context(_explained(store, prepared))
            for sentence in filter(None, (store.message, _sweep_cost(plans, len(images)))):
                hooks.say(sentence)
            runner = AttackRunner(
                prepared, context, store, keep, PRECISIONS[precision], hooks, sweeping=len(plans) > 1,
                confirm=tf32 or precision != "fp32", ranks=ranks,
                captures=captures_for(model, prepared.device, prepared.batch_size),
            )  # fmt: skip
            outcomes, curve = _run(runner, plans, main)
        report = Report.of(
            [outcome.result(attack) for attack, outcome in outcomes.items()],
            {attack.name: outcome.correct for attack, outcome in outcomes.items()},
            norm=cast(Norm, norm),
            eps=main,
            num_classes=prepared.num_classes,
            seed=seed,
            batch_size=prepared.batch_size,
            precision=precision,
            tf32=tf32,
            layout=cast(Any, settings["layout"]),
            device=settings["device"],
            versions=versions(),
            curve=curve if len(plans) > 1 else (),
            model_sha256=digests["weights"],
            examples_sha256=digests["examples"],
            notes=(UPPER_BOUND,) if precision != "fp32" else (),
            provenance={name: replace_invisible(str(each)) for name, each in (provenance or {}).items()},
        )
        report._adversarial.update(
            {attack.name: each.adversarial for attack, each in outcomes.items() if each.adversarial is not None}
        )
        if checks != "none":
            from deat_rb.evaluation.checks.registry import run_checks

            checking = partial(
                run_checks, model, images, labels, report, level=checks, eps=main, norm=norm,
                batch_size=report.batch_size, seed=seed, device=device, progress=hooks.checking,
            )  # fmt: skip
            report = report.model_copy(update={"checks": ranks.on_main(checking)})
        if finish is not None:
            ranks.on_main(partial(_finish, finish, report, store))
    return report


def _shared_store(
    stack: ExitStack, state: str | Path | None, settings: Mapping[str, str], resume: bool | None, ranks: World
) -> ResumeStore:
    """Open the store on rank 0, which removes it in the end, and then the same folder on the other ranks."""
    opened: list[ResumeStore] = []
    ranks.on_main(lambda: opened.append(stack.enter_context(open_store(state, settings, resume))))
    return opened[0] if opened else ResumeStore(None if state is None else Path(state))


def _finish(finish: Callable[[Report], None], report: Report, store: ResumeStore) -> None:
    """Call ``finish``; if it fails, append to the error message which results are stored."""
    try:
        finish(report)
    except DeatError as error:
        raise DeatError(f"{error}; {store.status}" if store.status else str(error)) from error


def _run(
    runner: AttackRunner, plans: Mapping[float, Mapping[str, Attack]], main: float
) -> tuple[dict[Attack, AttackOutcome], tuple[CurvePoint, ...]]:
    """Classify the clean images once and run the attacks at each radius."""
    natural = runner.run(NATURAL, torch.ones(len(runner.prepared), dtype=torch.bool))
    results: dict[Attack, AttackOutcome] = {NATURAL: natural}
    curve = []
    for radius, attacks in plans.items():
        at_radius = replace(runner, context=replace(runner.context, eps=radius), keep=runner.keep and radius == main)
        verdicts = {"natural": natural.correct}
        for name, attack in attacks.items():
            # The ball of radius 0 is the clean image, so attacks are skipped there unless it is the main radius.
            outcome = at_radius.run(attack, natural.correct) if radius > 0 or radius == main else natural
            verdicts[name] = outcome.correct
            if radius == main:
                results[attack] = outcome
        curve.append(CurvePoint.of(radius, verdicts))
    return results, tuple(curve)


def _attacks(names: Sequence[str], context: AttackContext) -> dict[str, Attack]:
    return {name: build_attack(name, context) for name in names if name != "natural"}


def _sweep_cost(plans: Mapping[float, Mapping[str, Attack]], n_examples: int) -> str:
    """Describe the cost of a sweep; empty for a single radius or if the cost is unknown."""
    calls = {name: sum(stage.calls for stage in attack.parts) for name, attack in plans[max(plans)].items()}
    count = sum(radius > 0 for radius in plans)
    if count < 2 or not sum(calls.values()):
        return ""
    dearest = max(calls, key=lambda name: calls[name])
    return (f"sweep over {count} radii: at most {count} x {sum(calls.values()):,} forward passes for each of "
            f"{counted(n_examples, 'image')}, of which {dearest} needs {count} x {calls[dearest]:,}")  # fmt: skip


def _check_images(names: Sequence[str], norm: str, images: Tensor | LabeledImages) -> None:
    """Refuse float64, in which AutoAttack does not compute, and images below the size of Square's tiles in L2."""
    auto = [name for name in names if name.startswith("autoattack")]
    if auto and isinstance(images, Tensor) and images.dtype == torch.float64:
        raise DeatError(f"{auto[0]} is computed in float32, not float64: give model.float() and images.float()")
    squares = [name for name in names if name in ("square", "autoattack", "autoattack-plus")]
    height, width = images.shape[-2:]
    if norm == "L2" and squares and min(height, width) < SQUARE_TILES:
        raise DeatError(f"{squares[0]} in L2 needs images of at least 5x5 pixels, not {height}x{width}: use other "
                        "attacks, such as pgd-100")  # fmt: skip


def _radii(eps: Eps, main_eps: str | float | None, norm: str) -> tuple[tuple[float, ...], float]:
    """Parse the radii; return them and the main one."""
    several = isinstance(eps, Sequence) or getattr(eps, "ndim", 0) == 1  # a list, array or tensor
    values: Any = eps.split(",") if isinstance(eps, str) else eps if several else (eps,)
    radii = tuple(dict.fromkeys(check_radius(each, norm=norm) for each in values))
    if not radii:
        raise DeatError("eps is an empty list; give one or more radii such as 8/255")
    if main_eps is None:
        return radii, radii[-1]
    main = check_radius(main_eps, "main_eps", norm=norm)
    near = [radius for radius in radii if abs(radius - main) < 1e-9]
    return radii, near[0] if near else radii[-1]


def check_options(*, precision: str, checks: str) -> None:
    """Check the precision and the level of checks.

    Raises:
        DeatError: The precision or the level is unknown.
    """
    if str(precision) not in PRECISIONS:
        raise DeatError(f"unknown evaluation precision '{precision}': {did_you_mean(str(precision), PRECISIONS)}")
    if str(checks) not in CHECK_LEVELS:
        raise DeatError(f"unknown level of checks '{checks}': {did_you_mean(str(checks), CHECK_LEVELS)}")


@contextmanager
def _explained(store: ResumeStore, prepared: PreparedModel) -> Iterator[None]:
    """Extend error messages: on Ctrl-C, say which results are stored; if memory ran out, say what to change."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(store.status) from None
    except torch.OutOfMemoryError as error:
        restart = ", with deat-rb eval also --no-resume" if store.status else ""
        raise DeatError(f"{_device_name(prepared.device)} has too little memory for batches of {prepared.batch_size} "
                        f"images: use a smaller --batch-size{restart}") from error  # fmt: skip


def _digests(model: nn.Module, images: Tensor | LabeledImages, labels: Tensor) -> dict[str, str]:
    """Return SHA-256 digests of the weights, the repr of the network, and the examples."""
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    description = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    return {
        "weights": sha256_tensors(weights),
        "network": sha256(description.encode()).hexdigest(),
        "examples": sha256_examples(images, labels),
    }


def _device_name(device: torch.device) -> str:
    """Return a device's type and name, without its index: the GPUs of a machine that have one name are equal."""
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
