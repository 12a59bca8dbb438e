from __future__ import annotations

import math

import pytest
import torch
from small_image_sets import epoch_of, grids
from torch import Tensor

from deat_rb.data.augment import crop_and_flip
from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet


@pytest.mark.parametrize(
    ("top", "left", "flip", "expected"),
    [
        (4, 4, False, [[1, 2], [3, 4]]),
        (4, 4, True, [[2, 1], [4, 3]]),
        (5, 4, False, [[3, 4], [0, 0]]),
        (3, 4, False, [[0, 0], [1, 2]]),
        (4, 5, False, [[2, 0], [4, 0]]),
        (4, 5, True, [[0, 2], [0, 4]]),
        (5, 3, True, [[3, 0], [0, 0]]),
        (0, 8, False, [[0, 0], [0, 0]]),
    ],
)
def test_crop_and_flip_by_hand(top: int, left: int, flip: bool, expected: list[list[int]]) -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    moved = crop_and_flip(image, torch.tensor([top]), torch.tensor([left]), torch.tensor([flip]))
    assert moved.dtype == torch.uint8
    assert moved[0, 0].tolist() == expected


def test_crop_and_flip_of_images_that_are_not_square() -> None:
    image = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]], dtype=torch.uint8)
    moved = crop_and_flip(image, torch.tensor([5]), torch.tensor([3]), torch.tensor([False]))
    assert moved[0, 0].tolist() == [[0, 4, 5], [0, 0, 0]]


def test_augmented_images_are_crops_of_their_padded_originals() -> None:
    data = grids(64)
    images, _ = epoch_of(Batches(data, 16, augment=True))
    seen = [placements(image, original) for image, original in zip(images, data.images, strict=True)]
    assert all(seen)
    assert {flip for placements in seen for _, _, flip in placements} == {False, True}
    # 64 draws of 9 offsets miss one of them with a probability below 9 * (8/9)**64 = 0.5 %; the seed is fixed.
    certain = [placements[0] for placements in seen if len(placements) == 1]
    assert {top for top, _, _ in certain} == set(range(9))
    assert {left for _, left, _ in certain} == set(range(9))


def placements(image: Tensor, original: Tensor) -> list[tuple[int, int, bool]]:
    padded = torch.zeros(3, 13, 13)
    padded[:, 4:9, 4:9] = original.float() / 255
    found = []
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 5, left : left + 5]
            found += [(top, left, False)] if torch.equal(image, crop) else []
            found += [(top, left, True)] if torch.equal(image, crop.flip(-1)) else []
    return found


def test_augmentation_flips_half_and_draws_offsets_uniformly() -> None:
    # One bright column left of the middle, in wide images so that no crop loses it: its column shows the flip.
    images = torch.zeros(2000, 1, 1, 40, dtype=torch.uint8)
    images[..., 10] = 255
    data = ImageSet(images, torch.zeros(2000, dtype=torch.int64))
    moved, _ = epoch_of(Batches(data, 500, augment=True))
    visible = moved[moved.amax((1, 2, 3)) > 0]
    # The one row is kept by one of nine vertical offsets: 222 of 2,000, give or take 5 standard deviations of 14.
    assert 152 < len(visible) < 292
    columns = visible[:, 0, 0].argmax(1)
    assert set(columns.tolist()) == {*range(6, 15), *range(25, 34)}
    assert abs((columns > 20).float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(visible))


def test_augmentation_differs_between_images_of_a_batch() -> None:
    same = ImageSet(grids(1).images.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64))
    ((images, _),) = Batches(same, 32, augment=True)
    assert len({tuple(image.flatten().tolist()) for image in images}) > 10


def test_augmentation_differs_between_batches_and_epochs() -> None:
    same = ImageSet(grids(1).images.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64))
    batches = Batches(same, 16, augment=True)
    one, two = (images for images, _ in batches)
    assert not torch.equal(one, two)
    batches.set_epoch(1)
    assert not torch.equal(next(iter(batches))[0], one)


def test_augmentation_does_not_change_the_stored_images() -> None:
    data = grids(8)
    before = data.images.clone()
    epoch_of(Batches(data, 4, augment=True))
    epoch_of(Batches(data, 4))
    assert torch.equal(data.images, before)
