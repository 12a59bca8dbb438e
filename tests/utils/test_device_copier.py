"""Copies to a GPU beside its work: the order of events, with stand-ins for CUDA's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from deat_rb.utils.device_copier import DeviceCopier


def test_on_a_cpu_and_for_tensors_in_place_nothing_is_copied() -> None:
    images, labels = torch.rand(2, 3), torch.tensor([0, 1])
    assert all(
        copy is tensor for copy, tensor in zip(DeviceCopier("cpu")(images, labels), (images, labels), strict=True)
    )
    assert DeviceCopier("cuda").beside
    meta = torch.rand(2, device="meta")
    assert DeviceCopier("meta", beside=True)(meta) == [meta]


def test_copies_run_on_a_stream_of_their_own_and_at_most_one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third copy waits on the host until the GPU has come to where it was at the second: after the first batch."""
    log: list[str] = []
    batch = 0

    class Event:
        def __init__(self, at: int) -> None:
            self.at = at

        def synchronize(self) -> None:
            log.append(f"host waits for the work queued before batch {self.at}")

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> Event:
            return Event(batch)

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        log.append(f"enter {entered.name}")
        yield
        log.append(f"leave {entered.name}")

    def pin_memory(tensor: Tensor) -> Tensor:
        log.append("pin")
        return tensor.clone()

    current = Stream("compute")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, used_on: log.append(f"used on {used_on.name}"))
    copier = DeviceCopier("cpu", beside=True)
    images = torch.rand(2, 3)
    one = ["enter copies", "pin", "leave copies", "compute waits for copies", "used on compute"]
    for batch in range(1, 4):
        log.clear()
        (copy,) = copier(images)
        assert torch.equal(copy, images)
        waits = [f"host waits for the work queued before batch {batch - 1}"] if batch > 1 else []
        assert log == waits + one


def test_only_tensors_on_the_cpu_are_pinned_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU, on which the loader's labels already are."""
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, used_on: None)
    images, labels = torch.rand(2, 3), torch.empty(2, dtype=torch.int64, device="meta")
    copies = DeviceCopier("meta", beside=True)(images, labels)
    assert [each is images for each in pinned] == [True]
    assert copies[0].device.type == "meta"
    assert copies[1] is labels
