from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_image_sets import epoch_of, grids
from torch import Tensor

from deat_rb.data.augment import augment, crop_and_flip, cut_out, mix
from deat_rb.data.augmentations import AUGMENTATIONS
from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import plan
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError


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
    images, _ = epoch_of(Batches(data, 16, augmentation="crop-flip"))
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
    moved, _ = epoch_of(Batches(data, 500, augmentation="crop-flip"))
    visible = moved[moved.amax((1, 2, 3)) > 0]
    # The one row is kept by one of nine vertical offsets: 222 of 2,000, give or take 5 standard deviations of 14.
    assert 152 < len(visible) < 292
    columns = visible[:, 0, 0].argmax(1)
    assert set(columns.tolist()) == {*range(6, 15), *range(25, 34)}
    assert abs((columns > 20).float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(visible))


def test_augmentation_differs_between_images_of_a_batch() -> None:
    same = ImageSet(grids(1).images.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64))
    ((images, _),) = Batches(same, 32, augmentation="crop-flip")
    assert len({tuple(image.flatten().tolist()) for image in images}) > 10


def test_augmentation_differs_between_batches_and_epochs() -> None:
    same = ImageSet(grids(1).images.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64))
    batches = Batches(same, 16, augmentation="crop-flip")
    one, two = (images for images, _ in batches)
    assert not torch.equal(one, two)
    batches.set_epoch(1)
    assert not torch.equal(next(iter(batches))[0], one)


def test_augmentation_does_not_change_the_stored_images() -> None:
    data = grids(8)
    before = data.images.clone()
    epoch_of(Batches(data, 4, augmentation="crop-flip"))
    epoch_of(Batches(data, 4))
    assert torch.equal(data.images, before)


def test_cut_out_by_hand() -> None:
    images = torch.ones(3, 1, 4, 4, dtype=torch.uint8)
    # Squares of 2 pixels begin one pixel before the center; the second and third are cut off at the border.
    cut = cut_out(images, torch.tensor([2, 0, 3]), torch.tensor([1, 0, 3]), 2)
    assert cut[0, 0].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert cut[1, 0].tolist() == [[0, 1, 1, 1]] + [[1] * 4] * 3
    assert cut[2, 0].tolist() == [[1] * 4] * 2 + [[1, 1, 0, 0]] * 2
    assert images.min() == 1


def augmented(name: str, images: Tensor, **changes: int) -> Tensor:
    where: dict[str, Any] = {"seed": 3, "epoch": 2, "batch": 1, "size": len(images), **changes}
    return augment(name, images, own=slice(0, len(images)), **where)


def test_flip_flips_half_of_the_images() -> None:
    images = grids(200).images
    flipped = augmented("flip", images)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 65 < int(same.sum()) < 135  # 100, give or take 5 standard deviations of 7


def test_cutout_blackens_a_square_of_half_the_height() -> None:
    white = torch.full((400, 3, 8, 8), 255, dtype=torch.uint8)
    cropped, cut = augmented("crop-flip", white), augmented("cutout", white)
    assert torch.equal(cut[cut > 0], cropped[cut > 0])
    removed = ((cropped > 0) & (cut == 0))[:, 0]
    rows, columns = removed.any(2).sum(1), removed.any(1).sum(1)
    assert (int(rows.max()), int(columns.max())) == (4, 4)
    assert bool((removed.sum((1, 2)) == rows * columns).all()), "a rectangle"


@pytest.mark.parametrize("name", ["trivialaugment", "randaugment", "autoaugment", "resized-crop"])
def test_torchvisions_augmentations_differ_per_image_and_spare_the_global_generator(name: str) -> None:
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = images.repeat(24, 1, 1, 1)
    state = torch.get_rng_state()
    once = augmented(name, images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(augmented(name, images), once)
    assert (once.shape, once.dtype) == (images.shape, torch.uint8)
    assert len({tuple(image.flatten().tolist()) for image in once}) > 12
    for change in ({"epoch": 3}, {"batch": 0}, {"seed": 4}):
        assert not torch.equal(augmented(name, images, **change), once)


def test_trivialaugment_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import v2

    seen = []
    forward = v2.TrivialAugmentWide.forward

    def watched(self: v2.TrivialAugmentWide, image: Tensor) -> Tensor:
        seen.append(image)
        result: Tensor = forward(self, image)
        return result

    monkeypatch.setattr(v2.TrivialAugmentWide, "forward", watched)
    images = grids(4).images
    augmented("trivialaugment", images)
    assert torch.equal(torch.stack(seen), augmented("crop-flip", images)), "of cropped and flipped images, one by one"


def test_augment_defaults_to_that_of_the_dataset() -> None:
    assert resolve(make_options({"dataset": "digits"})).data.augment == "none"
    assert resolve(make_options({"dataset": "cifar10"})).data.augment == "crop-flip"
    planned = plan(make_options({"augment": "cutout", "method": "standard"}), dry=True)
    assert dict(planned.lines())["augment"] == AUGMENTATIONS["cutout"]
    with pytest.raises(DeatError, match=r"^--augment = 'blur' cannot be used: it should be 'none', 'flip'"):
        make_options({"augment": "blur"})
    with pytest.raises(DeatError, match=r"^--augment blur is unknown: choose one of none, flip, crop-flip"):
        Batches(grids(4), 2, augmentation="blur")
    with pytest.raises(DeatError, match=r"^augmentation = 'cutmix' needs num_classes"):
        Batches(grids(4), 2, augmentation="cutmix")


def mixed(name: str, images: Tensor, labels: Tensor, **changes: int) -> tuple[Tensor, Tensor]:
    where: dict[str, Any] = {"seed": 3, "epoch": 2, "batch": 1, **changes}
    return mix(name, images, labels, num_classes=5, **where)


def test_cutmix_replaces_a_rectangle_and_shares_labels_by_area() -> None:
    images = torch.arange(5).float().view(5, 1, 1, 1).expand(5, 2, 8, 6) / 10
    shares = set()
    for batch in range(12):
        cut, labels = mixed("cutmix", images, torch.arange(5), batch=batch)
        for number in range(5):
            other = (number - 1) % 5
            replaced = (cut[number] != images[number])[0]
            assert torch.equal(cut[number][:, replaced], images[other][:, replaced])
            assert int(replaced.sum()) == int(replaced.any(0).sum()) * int(replaced.any(1).sum()), "a rectangle"
            share = int(replaced.sum()) / 48
            expected = torch.zeros(5).index_put_((torch.tensor([number, other]),), torch.tensor([1 - share, share]))
            torch.testing.assert_close(labels[number], expected)
            shares.add(share)
    assert len(shares) > 6


def test_mixup_averages_images_and_labels_in_one_ratio() -> None:
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ratios = set()
    for batch in range(8):
        averaged, labels = mixed("mixup", images, torch.arange(5), batch=batch)
        ratio = float(labels[0, 0])
        ratios.add(ratio)
        torch.testing.assert_close(averaged, ratio * images + (1 - ratio) * images[[4, 0, 1, 2, 3]])
        torch.testing.assert_close(labels, ratio * torch.eye(5) + (1 - ratio) * torch.eye(5)[[4, 0, 1, 2, 3]])
    assert len(ratios) == 8
    assert 0 <= min(ratios) < 0.5 < max(ratios) <= 1


@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_mixing_depends_on_seed_epoch_and_batch_only(name: str) -> None:
    images, labels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    state = torch.get_rng_state()
    once = mixed(name, images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    again = mixed(name, images, labels)
    assert torch.equal(again[0], once[0])
    assert torch.equal(again[1], once[1])
    for change in ({"epoch": 3}, {"batch": 0}, {"seed": 4}):
        assert not torch.equal(mixed(name, images, labels, **change)[1], once[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mart"}, "but the loss mart needs one class per image: use a method with cross-entropy or TRADES"),
        ({"method": "m+mart"}, "but the loss mart needs one class per image"),
        ({"method": "f+trades"}, "but a friendly attack, which stops early at a misclassification, needs one class"),
        ({"method": "fat-5"}, r"but a friendly attack, .* instead of fat-5, or another --augment$"),
        ({"method": "deat-40%"}, "but a schedule by training accuracy needs one class per image"),
        ({"class_weights": "balanced"}, "but --class-weights balanced needs one class per image: omit one of them$"),
    ],
)
@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_mixing_is_refused_where_one_class_per_image_is_needed(name: str, options: Any, message: str) -> None:
    with pytest.raises(DeatError, match=rf"^--augment {name} mixes the labels of images, {message}"):
        resolve(make_options({"augment": name, **options}))


@pytest.mark.parametrize("method", ["standard", "free-4", "deat-3", "m-deat", "pgd-7", "m+pgd", "u-fgsm", "m+u-fgsm",
                                    "trades", "m+trades", "n-fgsm", "gradalign"])  # fmt: skip
def test_mixing_is_accepted_with_cross_entropy_and_trades(method: str) -> None:
    assert (
        resolve(make_options({"augment": "cutmix", "method": method, "label_smoothing": 0.1})).data.augment == "cutmix"
    )
