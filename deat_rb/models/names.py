"""Names of architectures: spelling, size limits, and whether they run user code."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deat_rb.utils.errors import DeatError, did_you_mean

PREACTRESNET18 = "preactresnet18"

PREACTRESNET18_BN = "preactresnet18-bn"
"""PreActResNet-18 with a BatchNorm before the classifier, as in robust_overfitting (Rice et al. 2020)."""

RESNET18 = "resnet18"
"""ResNet-18 for CIFAR: 3x3 stem without pooling, as in MadryLab's robustness and pytorch-cifar."""

PRETRAINED = ("torchvision", "timm")
"""Packages whose pretrained networks are available as ``package:NAME``."""

KNOWN = (PREACTRESNET18, PREACTRESNET18_BN, RESNET18, "wrn-34-10", "wrn-10-1")

MAX_PARAMETERS = 2 * 10**9
"""Limit on the size of a WideResNet; RobustBench's largest, WRN-94-16, has 0.37e9 parameters."""


OWN_FACTORIES = ("deat_rb.models.small:narrow", "deat_rb.models.small:wide")
"""Factories of this package, which do not require trust_code."""


def is_name(target: str) -> bool:
    """Return whether a target is ``package:NAME`` or ``package.module:function``, and not a path with a drive."""
    package, colon, _ = target.partition(":")
    return bool(colon) and len(package) > 1 and all(part.isidentifier() for part in package.split("."))


def canonical_arch(arch: str) -> str:
    """Return the canonical spelling of an architecture: ``WRN34-10`` becomes ``wrn-34-10``.

    Raises:
        DeatError: The architecture is unknown or too large.
    """
    if ":" in arch:
        return arch
    if resnet := re.fullmatch(r"(pre-?act-?)?resnet-?18(-?bn)?", arch.lower()):
        if resnet[1] is None and resnet[2] is None:
            return RESNET18
        if resnet[1] is not None:
            return PREACTRESNET18 if resnet[2] is None else PREACTRESNET18_BN
    wide = re.fullmatch(r"(?:wrn|wide-?resnet)-?(\d{1,3})-(\d{1,3})", arch.lower())
    if wide is None:
        hint = did_you_mean(arch, KNOWN)
        raise DeatError(f"architecture '{arch}' is unknown: {hint}{'' if hint.endswith('?') else ';'} others are "
                        "timm:NAME, torchvision:NAME and package.module:factory")  # fmt: skip
    depth, width = int(wide[1]), int(wide[2])
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise DeatError(
            f"architecture '{arch}' does not exist: the depth D of wrn-D-W must be 10, 16, 22, 28, 34, ..., and "
            "its width W at least 1"
        )
    parameters = (depth - 4) // 6 * 2 * 9 * (16**2 + 32**2 + 64**2) * width**2  # approximate, of the 3x3 convolutions
    if parameters > MAX_PARAMETERS:
        raise DeatError(f"architecture '{arch}' is too large: about {parameters / 1e9:.0f} billion parameters, but "
                        f"at most {MAX_PARAMETERS / 1e9:.0f} billion are allowed")  # fmt: skip
    return f"wrn-{depth}-{width}"


def runs_code(arch: str) -> bool:
    """Return whether an architecture is a factory of another package, whose code builds the network."""
    kind, colon, _ = arch.partition(":")
    return bool(colon) and kind not in PRETRAINED and arch not in OWN_FACTORIES


def trust_flag(arch: str) -> tuple[str, ...]:
    """Return ``--trust-code`` if the command line needs it for a network of this architecture; else nothing."""
    return ("--trust-code",) if runs_code(arch) else ()


def check_trust(arch: str, trust_code: bool, *, source: str) -> None:
    """Check that an architecture does not run untrusted code.

    Args:
        arch: The architecture.
        trust_code: Whether running code is allowed.
        source: Origin of the architecture, such as a run directory, for the error message.

    Raises:
        DeatError: The architecture is a factory of another package, but running code is not allowed.
    """
    if runs_code(arch) and not trust_code:
        raise DeatError(
            f"{source} builds its network with '{arch}', which runs that module's code: "
            "if you trust the module, allow it with --trust-code (trust_code=True)"
        )


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `did_you_mean`'s suggestion, without the list of all names if it is long."""
    sentence = did_you_mean(name, known)
    return sentence if len(sentence) < 200 else "see its documentation for the list"
