"""Choice of the device under torchrun."""

from __future__ import annotations

import pytest
import torch

from deat_rb.utils.devices import default_batch_size, resolve_device, uses_tf32


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
