"""Names of the augmentations, in a separate module so that `deat-rb train --help` does not import torch."""

from __future__ import annotations

AUGMENTATIONS = {
    "none": "none",
    "flip": "horizontal flips",
    "crop-flip": "random crops of images padded by 4 pixels, horizontal flips",
    "cutout": "crops and flips; a black square of half the height (Cutout)",
    "trivialaugment": "crops and flips; one random operation per image (TrivialAugment)",
    "randaugment": "crops and flips; two random operations per image (RandAugment)",
    "autoaugment": "crops and flips; AutoAugment's policy for CIFAR-10",
    "resized-crop": "crops of 8 to 100 % of the area, resized to the full size, horizontal flips",
    "cutmix": "crops and flips; a rectangle of another image of the batch, labels mixed by area (CutMix)",
    "mixup": "crops and flips; averages with another image of the batch, and of the labels (MixUp)",
}
"""Names of the augmentations, with descriptions."""

MIXING = ("cutmix", "mixup")
"""Augmentations that mix the images of a batch and their labels."""
