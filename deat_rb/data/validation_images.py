"""Validation images for `fit` that are made floating-point batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deat_rb.data.images import LabeledImages, as_floats

BATCH = 128
"""Images in a batch of the iteration."""


class ValidationImages:
    """Validation images that stay bytes in host memory, or files, and are moved to a device in parts.

    `split` and slices are those of a tensor of all images, float32 in [0, 1] and in channels_last.

    Attributes:
        labels: Class indices, (N,) int64, on the device.
        device: The device.
    """

    def __init__(self, data: LabeledImages, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.labels = data.labels.to(device)
        self._read = data.reader("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.split(BATCH), self.labels.split(BATCH), strict=True)

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(len(self))
        return torch.cat([*self._parts([slice(start, stop)])])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in parts of ``size``, of which the last may be smaller."""
        return self._parts([slice(start, min(start + size, len(self))) for start in range(0, len(self), size)])

    def _parts(self, windows: list[slice]) -> Iterator[Tensor]:
        for images, _ in self._read(None, windows):
            yield as_floats(images.to(self.device)).contiguous(memory_format=torch.channels_last)
