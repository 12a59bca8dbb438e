"""Random crop and horizontal flip of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4


def _augment(images: Tensor, stream: torch.Generator, size: int, own: slice) -> Tensor:
    """Draw crops and flips for a global batch of ``size`` images, and apply those of this rank's part, ``own``."""
    offsets = torch.randint(0, 2 * PADDING + 1, (2, size), generator=stream)
    flipped = torch.randint(0, 2, (1, size), generator=stream)
    top, left, flip = torch.cat((offsets, flipped))[:, own].to(images.device, non_blocking=True)
    return crop_and_flip(images, top, left, flip > 0)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad each image with 4 zeros on every side, crop it to its original size and flip some horizontally.

    Args:
        images: Images (N, C, H, W) of any dtype.
        top: First row of each crop, (N,) int64, 0 to 8; 4 is the first row of the image.
        left: First column of each crop, (N,) int64, 0 to 8.
        flip: Whether each crop is flipped, (N,) bool.

    Returns:
        The augmented images, (N, C, H, W), of the same dtype.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (PADDING, PADDING, PADDING, PADDING))
    column = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    flat = pixels.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, flat).view(count, channels, height, width)
