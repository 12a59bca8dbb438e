"""Validation images for `fit` that are made floating-point batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from deat_rb.data.images import LabeledImages, as_floats

PIECE = 32
"""Images that are read at a time, so that several workers share the decoding; also a batch of the iteration."""


class ValidationImages:
    """Validation images that stay bytes in host memory, or files, and are moved to a device in parts.

    `split` and slices are those of a tensor of all images, float32 in [0, 1] and in channels_last. Iteration yields
    batches with labels, as from other loaders.

    Attributes:
        labels: Class indices, (N,) int64, on the device.
        device: The device.
    """

    def __init__(self, data: LabeledImages, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.labels = data.labels.to(device)
        self._data = data
        self._read = data.reader("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.split(PIECE), self.labels.split(PIECE), strict=True)

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(len(self))
        return torch.cat([*self._parts([range(start, stop)])])

    def first(self, count: int) -> Tensor:
        """Return the first ``count`` images, or all if there are fewer, read without worker processes."""
        return self._data.first(min(count, len(self))).tensors(self.device)[0]

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in parts of ``size``, of which the last may be smaller."""
        return self._parts([range(len(self))[start : start + size] for start in range(0, len(self), size)])

    def _parts(self, windows: list[range]) -> Iterator[Tensor]:
        pieces = [window[start : start + PIECE] for window in windows for start in range(0, len(window), PIECE)]
        read = self._read(None, [slice(piece.start, piece.stop) for piece in pieces])
        for window in windows:
            images = torch.cat([images for images, _ in islice(read, math.ceil(len(window) / PIECE))])
            yield as_floats(images.to(self.device)).contiguous(memory_format=torch.channels_last)
