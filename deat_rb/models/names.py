"""Architectures' names."""

from __future__ import annotations

import re

from deat_rb.utils.errors import DeatError, did_you_mean

PREACTRESNET18 = "preactresnet18"

PRETRAINED = ("torchvision", "timm")
"""Packages whose networks are had by name."""


def canonical_arch(arch: str) -> str:
    """Spells an architecture's name: ``WRN34-10`` becomes ``wrn-34-10``.

    Raises:
        DeatError: There is no such architecture.
    """
    if ":" in arch:
        return arch
    if re.fullmatch(r"pre-?act-?resnet-?18", arch.lower()):
        return PREACTRESNET18
    wide = re.fullmatch(r"(?:wrn|wide-?resnet)-?(\d{1,3})-(\d{1,3})", arch.lower())
    if wide is None:
        raise DeatError(
            f"architecture '{arch}' is unknown: {did_you_mean(arch, (PREACTRESNET18, 'wrn-34-10', 'wrn-10-1'))} "
            "Also known are timm:NAME, torchvision:NAME and package.module:factory"
        )
    depth, width = int(wide[1]), int(wide[2])
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise DeatError(
            f"architecture '{arch}' does not exist: the depth D of wrn-D-W is 10, 16, 22, 28, 34 and so on, "
            "and its width W at least 1"
        )
    return f"wrn-{depth}-{width}"


def check_trust(arch: str, trust_code: bool, *, source: str) -> None:
    """Refuses to build a network by code that somebody else has named, unless that is allowed.

    Args:
        arch: The architecture.
        trust_code: Whether it is allowed.
        source: Who named it, for instance a run directory.

    Raises:
        DeatError: If the architecture is a ``package.module:factory`` and that is not allowed.
    """
    kind, colon, _ = arch.partition(":")
    if colon and kind not in PRETRAINED and not trust_code:
        raise DeatError(
            f"{source} has its network built by '{arch}', which runs that module's code: "
            "allow it by --trust-code (trust_code=True) if you know where that comes from"
        )
