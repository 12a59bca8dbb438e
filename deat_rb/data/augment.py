"""Augmentation of batches of training images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from deat_rb.data.augmentations import AUGMENTATIONS, MIXING
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.seeding import derive, generator

PADDING = 4


def draw(name: str, *, seed: int, epoch: int, batch: int, size: int, height: int, width: int) -> Tensor:
    """Draw the random numbers of an augmentation for a global batch, on the CPU.

    Args:
        name: A key of `deat_rb.data.augmentations.AUGMENTATIONS`.
        seed: Seed of the run.
        epoch: Number of the epoch.
        batch: Number of the batch in the epoch.
        size: Number of images of the global batch.
        height: Height of the images.
        width: Their width.

    Returns:
        int64 (k, size): for each image whether it is flipped; or the first row and column of its crop, whether it is
        flipped and, with Cutout, the center of the square. k is 0 for ``none`` and for torchvision's transforms of
        whole images, and 3 for its others, which follow a crop and a flip. `mix` draws its numbers itself.
    """
    if name in ("none", "resized-crop"):
        return torch.empty((0, size), dtype=torch.int64)
    stream = generator(seed, "augment", epoch, batch)
    if name == "flip":
        return torch.randint(0, 2, (1, size), generator=stream)
    offsets = torch.randint(0, 2 * PADDING + 1, (2, size), generator=stream)
    drawn = [offsets, torch.randint(0, 2, (1, size), generator=stream)]
    if name == "cutout":
        drawn += [torch.randint(0, length, (1, size), generator=stream) for length in (height, width)]
    return torch.cat(drawn)


def augment(
    name: str, images: Tensor, *, seed: int, epoch: int, batch: int, size: int, own: slice, drawn: Tensor | None = None
) -> Tensor:
    """Augment one rank's part of a global batch.

    Each image is augmented by itself; the result depends on the seed, the epoch, the batch and the position of the
    image in the global batch. TrivialAugment, RandAugment, AutoAugment and resized crops are torchvision's v2
    transforms, on the images' device, called image by image: few images of a batch draw the same operation and
    strength, so that calling them by groups takes nearly as long.

    Args:
        name: A key of `deat_rb.data.augmentations.AUGMENTATIONS`.
        images: The images of this rank, uint8 (n, C, H, W).
        seed: Seed of the run.
        epoch: Number of the epoch.
        batch: Number of the batch in the epoch.
        size: Number of images of the global batch.
        own: This rank's part of the global batch.
        drawn: The columns ``own`` of what `draw` returns, on the images' device; by default they are drawn here.

    Returns:
        The augmented images, uint8 (n, C, H, W); for ``cutmix`` and ``mixup`` those that `mix` takes.
    """
    if name == "none":
        return images
    height, width = images.shape[2:]
    if drawn is None:
        numbers = draw(name, seed=seed, epoch=epoch, batch=batch, size=size, height=height, width=width)
        drawn = numbers[:, own].to(images.device, non_blocking=True)
    if name == "flip":
        return torch.where(drawn[0, :, None, None, None] > 0, images.flip(-1), images)
    if name != "resized-crop":
        images = crop_and_flip(images, drawn[0], drawn[1], drawn[2] > 0)
    if name == "crop-flip" or name in MIXING:
        return images
    if name == "cutout":
        return cut_out(images, drawn[3], drawn[4], height // 2)
    transform = _transform(name, height, width)
    before = torch.get_rng_state()
    try:  # torchvision's transforms draw from the CPU's global generator
        augmented = []
        for position, image in enumerate(images, own.start):
            torch.default_generator.manual_seed(derive(seed, "augment", epoch, batch, position))
            augmented.append(transform(image))
        return torch.stack(augmented)
    finally:
        torch.set_rng_state(before)


def mix(
    name: str, images: Tensor, labels: Tensor, *, num_classes: int, seed: int, epoch: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a batch, and their labels, by torchvision's v2.CutMix or v2.MixUp with alpha = 1.

    Each image is mixed with the one before it, the first one with the last one. As in both papers' public code, a batch
    has one mixing ratio, and for CutMix one rectangle. They are drawn from torch's CPU generator, which is seeded for
    the batch and restored afterwards.

    Args:
        name: ``cutmix`` or ``mixup``.
        images: The images, floating-point (N, C, H, W): of the global batch, or consecutive ones of it.
        labels: Their labels, (N,) int64.
        num_classes: Number of classes, K.
        seed: Seed of the run.
        epoch: Number of the epoch.
        batch: Number of the batch in the epoch.

    Returns:
        The mixed images, (N, C, H, W), and the shares of the classes in each, float32 (N, K).
    """
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(derive(seed, "mix", epoch, batch))
        mixed: tuple[Tensor, Tensor] = _mixing(name, num_classes)(images, labels)
        return mixed
    finally:
        torch.set_rng_state(before)


@cache
def _mixing(name: str, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return torchvision's transform of a batch and its labels."""
    from torchvision.transforms import v2

    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = {"cutmix": v2.CutMix, "mixup": v2.MixUp}[name](
        num_classes=num_classes
    )
    return transform


@cache
def _transform(name: str, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """Return torchvision's transform of one image."""
    from torchvision.transforms import v2

    if name == "resized-crop":
        chain: Callable[[Tensor], Tensor] = v2.Compose(
            [v2.RandomResizedCrop((height, width), antialias=True), v2.RandomHorizontalFlip()]
        )
    else:
        chain = {
            "trivialaugment": v2.TrivialAugmentWide,
            "randaugment": v2.RandAugment,
            "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        }[name]()
    return chain


def check_augmentation(name: str) -> None:
    """Check that an augmentation exists.

    Raises:
        DeatError: There is no such augmentation.
    """
    if name not in AUGMENTATIONS:
        raise DeatError(f"--augment {name} is unknown: {did_you_mean(name, AUGMENTATIONS)}")


def cut_out(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Set a square of each image to zero (DeVries & Taylor 2017); squares at the border are cut off.

    Args:
        images: Images (N, C, H, W) of any dtype.
        row: Row of the center of each square, (N,) int64.
        column: Column of the center, (N,) int64.
        side: Side of the squares; they begin ``side // 2`` pixels before the center.

    Returns:
        The images with the squares, (N, C, H, W).
    """

    def inside(length: int, center: Tensor) -> Tensor:
        distance = torch.arange(length, device=images.device) - center[:, None]
        return (distance >= -(side // 2)) & (distance < side - side // 2)

    square = inside(images.shape[2], row)[:, :, None] & inside(images.shape[3], column)[:, None, :]
    return images.masked_fill(square[:, None], 0)


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
