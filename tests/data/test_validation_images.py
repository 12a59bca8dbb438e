"""Validation images that are read in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deat_rb.data.datasets import load_data
from deat_rb.data.images import ImageSet, Reader
from deat_rb.data.validation_images import ValidationImages


class RecordedWindows(ImageSet):
    """Images that record which windows of them were asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        object.__setattr__(self, "windows", [])

    windows: list[tuple[int, int]]

    def reader(self, device: torch.device | str) -> Reader:
        read = super().reader(device)

        def recorded(order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
            self.windows.extend((window.start, window.stop) for window in windows)
            return read(order, windows)

        return recorded


def test_validation_images_of_files_are_the_tensors_parts(image_folder: Path) -> None:
    files = load_data("folder", data_dir=image_folder, memory_limit=0).test
    images, labels = files.tensors()
    held = ValidationImages(files, "cpu")
    assert len(held) == 16
    assert torch.equal(held.labels, labels)
    parts = list(held.split(6))
    assert [len(part) for part in parts] == [6, 6, 4]
    assert torch.equal(torch.cat(parts), images)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    assert torch.equal(held[:5], images[:5])
    assert torch.equal(held.first(5), images[:5])
    assert torch.equal(held.first(17), images)
    [(batch, of_batch)] = held
    assert torch.equal(batch, images)
    assert torch.equal(of_batch, labels)


def test_validation_images_are_read_32_at_a_time() -> None:
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    data = RecordedWindows(images, torch.zeros(100, dtype=torch.int64))
    parts = list(ValidationImages(data, "cpu").split(70))
    assert data.windows == [(0, 32), (32, 64), (64, 70), (70, 100)]
    assert [(255 * part[:, 0, 0, 0]).round().tolist() for part in parts] == [[*range(70)], [*range(70, 100)]]


def test_first_validation_images_are_read_without_workers() -> None:
    data = RecordedWindows(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert ValidationImages(data, "cpu").first(2).shape == (2, 3, 2, 2)
    assert data.windows == []
