"""`deat_rb.models.names`: spelling of architectures and trust."""

from __future__ import annotations

import pytest

from deat_rb.models.names import canonical_arch, check_trust
from deat_rb.utils.errors import DeatError


@pytest.mark.parametrize(
    ("arch", "canonical"),
    [("wrn-34-10", "wrn-34-10"), ("WRN-34-10", "wrn-34-10"), ("wrn34-10", "wrn-34-10"), ("WideResNet-28-4", "wrn-28-4"),
     ("PreActResNet-18", "preactresnet18"), ("preactresnet18", "preactresnet18"), ("timm:resnet18", "timm:resnet18"),
     ("wrn-94-16", "wrn-94-16")],
)  # fmt: skip
def test_canonical_arch(arch: str, canonical: str) -> None:
    assert canonical_arch(arch) == canonical


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("preactresnet19", "did you mean 'preactresnet18'"),
        ("resnet", "timm:NAME"),
        ("wrn-35-10", "depth D"),
        ("wrn-4-1", "depth D"),
        ("wrn-10-0", "width W"),
        ("", "is unknown"),
        (
            "wrn-994-999",
            "'wrn-994-999' is too large: about 15935 billion parameters, but at most 2 billion are allowed",
        ),
    ],
)
def test_canonical_arch_refuses_unknown_names(arch: str, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        canonical_arch(arch)


def test_check_trust_refuses_code_of_a_module() -> None:
    with pytest.raises(DeatError, match=r"^the run a builds its network with 'os:getcwd', which runs that module's"):
        check_trust("os:getcwd", False, source="the run a")
    check_trust("os:getcwd", True, source="the run a")
    check_trust("timm:resnet18", False, source="the run a")
    check_trust("wrn-10-1", False, source="the run a")
