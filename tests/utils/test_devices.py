"""Choice of the device under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch

from deat_rb.training.engine import fast_gpu_math
from deat_rb.utils.devices import default_batch_size, full_float32, resolve_device, uses_tf32

CUDA = torch.device("cuda")

has_two_apis = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has one API for TF32"
)


def test_resolve_device_takes_the_gpu_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(*size))  # there is no such GPU here
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:2")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(("device", "size"), [("cpu", 128), ("cuda:1", 500), ("mps", 128)])
def test_default_batch_size(device: str, size: int) -> None:
    assert default_batch_size(torch.device(device)) == size


@pytest.mark.parametrize(
    ("device", "capability", "allowed", "hip", "expected"),
    [
        ("cuda", (9, 0), True, None, True),
        ("cuda", (9, 0), False, None, False),
        ("cuda", (7, 5), True, None, False),
        ("cuda", (9, 0), True, "6.1", False),
        ("cpu", (9, 0), True, None, False),
    ],
)
def test_uses_tf32_on_recent_gpus(
    device: str, capability: tuple[int, int], allowed: bool, hip: str | None, expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert uses_tf32(torch.device(device)) is expected


@pytest.fixture
def float32_settings() -> Iterator[None]:
    """Set both APIs to torch's defaults on exit."""
    yield
    if hasattr(torch.backends.cudnn, "conv"):
        set_newer("fp32_precision", "none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def set_newer(name: str, precision: str) -> None:
    part, _, attribute = f"backends.{name}".rpartition(".")
    setattr(attrgetter(part)(torch), attribute, precision)


def newer() -> list[str]:
    names = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul")
    return [attrgetter(f"backends.{name}.fp32_precision")(torch) for name in names]


def older() -> list[Any]:
    """Return the settings of the first API, or how its getters fail."""
    found: list[Any] = []
    for getter in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(getter())
        except RuntimeError as error:
            found.append(str(error))
    return found


@has_two_apis
@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"cuda.matmul": "tf32"}, {"cuda.matmul": "ieee"}, {"cudnn.conv": "ieee"}, {"cudnn.conv": "tf32"},
        {"cuda.matmul": "tf32", "cudnn.conv": "ieee", "mkldnn.matmul": "bf16"},
    ],
)  # fmt: skip
def test_float32_precision_of_either_api_is_changed_and_restored(
    matmul: str, convolutions: bool, changes: dict[str, str], float32_settings: None
) -> None:
    """Also what the first API has, once the second agrees with it again."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions
    own = newer()
    for name, precision in changes.items():
        set_newer(f"{name}.fp32_precision", precision)
    before = newer(), older()
    with fast_gpu_math(CUDA):
        assert newer()[:3] == ["tf32", *before[0][1:3]]
        with full_float32(CUDA):
            assert newer()[:3] == ["ieee"] * 3
            assert older() == ["highest", False]
        assert newer()[:3] == ["tf32", *before[0][1:3]]
    assert (newer(), older()) == before
    for name, precision in zip(("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul"), own, strict=True):
        set_newer(f"{name}.fp32_precision", precision)
    assert older() == [matmul, convolutions]


@has_two_apis
def test_tf32_that_is_allowed_for_all_backends_is_off_in_full_float32(float32_settings: None) -> None:
    torch.backends.cudnn.allow_tf32 = False
    set_newer("fp32_precision", "tf32")
    assert newer()[1] == "tf32"
    with full_float32(CUDA):
        assert newer()[1] == "ieee"
    assert newer()[1] == "tf32"


@pytest.mark.parametrize("matmul", ["highest", "medium"])
def test_float32_precision_with_the_first_api_alone(
    matmul: str, float32_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deat_rb.utils.devices._newer_settings", list)
    torch.set_float32_matmul_precision(matmul)
    with fast_gpu_math(CUDA):
        assert older() == ["high", True]
        with full_float32(CUDA):
            assert older() == ["highest", False]
        assert older() == ["high", True]
    assert older() == [matmul, True]


@has_two_apis
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_uses_tf32_where_the_second_api_allows_it(
    precision: str, float32_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    torch.backends.cudnn.allow_tf32 = precision == "ieee"
    set_newer("cudnn.conv.fp32_precision", precision)
    assert uses_tf32(CUDA) == (precision == "tf32")
