from __future__ import annotations

from typing import Any

import pytest
import torch
from small_image_sets import grids, image_set, positions
from torch import Tensor

from deat_rb.data.images import ImageSet, fits_on_device, interleave_classes, subset, train_val_split
from deat_rb.utils.errors import DeatError


def test_tensors_are_float_in_the_unit_range() -> None:
    data = ImageSet(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 1, 0]))
    images, labels = data.tensors()
    assert images.dtype == torch.float32
    assert images.flatten().tolist() == [0.0, torch.tensor(0.2).item(), 1.0]
    assert labels.tolist() == [0, 1, 0]


def test_select_keeps_the_requested_order() -> None:
    chosen = image_set((3, 3)).select([4, 0])
    assert positions(chosen) == [4, 0]
    assert chosen.labels.tolist() == [image_set((3, 3)).labels[4].item(), image_set((3, 3)).labels[0].item()]


def test_first_returns_the_first_images() -> None:
    assert positions(image_set((3, 3)).first(2)) == [0, 1]


@pytest.mark.parametrize("count", [0, 7, -1])
def test_first_refuses_other_counts(count: int) -> None:
    with pytest.raises(DeatError, match=f"first {count} of 6 images: give 1 to 6"):
        image_set((3, 3)).first(count)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), r"uint8 .* not float32 of shape \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"not uint8 of shape \(2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2).int(), r"int64 .* not int32 of shape \(2,\)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 1).long(), r"not int64 of shape \(2, 1\)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "there are 2 images but 3 labels"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, -1]), "label -1 is out of range"),
    ],
)
def test_image_set_refuses_other_shapes_and_dtypes(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        ImageSet(images, labels)


def test_fits_on_device_takes_a_quarter_of_the_free_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 1000))
    rooms = [(size, fits_on_device(size, torch.device(device))) for device in ("cuda", "cpu") for size in (100, 101)]
    assert rooms == [(100, True), (101, False), (100, True), (101, True)]


@pytest.mark.parametrize(("room", "place"), [(True, "meta"), (False, "cpu")])
def test_reader_keeps_images_on_the_device_or_moves_each_batch(
    room: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies: list[str] = []
    monkeypatch.setattr("deat_rb.data.images.fits_on_device", lambda size, device: room)
    gather = Tensor.__getitem__

    def seen(images: Tensor, chosen: Any) -> Tensor:
        lies.append(images.device.type)
        return gather(images, chosen)

    read = grids(6).reader("meta")
    monkeypatch.setattr(Tensor, "__getitem__", seen)
    images, labels = next(iter(read(None, [slice(0, 4)])))
    assert (len(images), images.device.type, labels.device.type) == (4, "meta", "meta")
    assert lies == [place, place]


def test_train_val_split_is_stratified() -> None:
    train, val = train_val_split(image_set((60, 30, 10)), 20, seed=0)
    assert val.labels.bincount().tolist() == [12, 6, 2]
    assert train.labels.bincount().tolist() == [48, 24, 8]


def test_train_val_split_rounds_by_largest_remainders() -> None:
    # 10 of (5, 9, 11) of 25 are shares of 2.0, 3.6 and 4.4: the class of 9 is rounded up.
    _, val = train_val_split(image_set((5, 9, 11)), 10, seed=0)
    assert val.labels.bincount().tolist() == [2, 4, 4]


def test_train_val_split_parts_are_disjoint_complete_and_in_order() -> None:
    data = image_set((60, 30, 10))
    train, val = train_val_split(data, 20, seed=3)
    assert sorted(positions(train) + positions(val)) == list(range(100))
    for part in (train, val):
        assert positions(part) == sorted(positions(part))
        assert torch.equal(part.labels, data.labels[positions(part)])


def test_train_val_split_depends_on_its_seed_only() -> None:
    data = image_set((60, 30, 10))
    torch.manual_seed(1)
    one = positions(train_val_split(data, 20, seed=3)[1])
    torch.manual_seed(2)
    assert positions(train_val_split(data, 20, seed=3)[1]) == one
    assert positions(train_val_split(data, 20, seed=4)[1]) != one


@pytest.mark.parametrize("size", [0, 100, 101, -1])
def test_train_val_split_refuses_an_empty_part(size: int) -> None:
    with pytest.raises(DeatError, match=f"--val-size {size} .* 100 training images: give 1 to 99"):
        train_val_split(image_set((60, 30, 10)), size, seed=0)


def test_subset_is_stratified_without_repeats() -> None:
    data = image_set((60, 30, 10))
    part = subset(data, 50, seed=0)
    assert part.labels.bincount().tolist() == [30, 15, 5]
    assert len(set(positions(part))) == 50
    assert torch.equal(part.labels, data.labels[positions(part)])


def test_subset_depends_on_its_seed() -> None:
    data = image_set((60, 30, 10))
    assert positions(subset(data, 50, seed=1)) == positions(subset(data, 50, seed=1))
    assert positions(subset(data, 50, seed=1)) != positions(subset(data, 50, seed=2))


def test_subset_of_all_images_is_all() -> None:
    assert positions(subset(image_set((5, 5)), 10, seed=0)) == list(range(10))


@pytest.mark.parametrize("size", [0, 101])
def test_subset_refuses_other_sizes(size: int) -> None:
    with pytest.raises(DeatError, match=f"--train-size {size} .* 100 images: give a number from 1 to 100"):
        subset(image_set((60, 30, 10)), size, seed=0)


def test_train_val_split_leaves_each_class_a_training_image() -> None:
    """20 % of 200 images are 40: 20 of the large class and, by rounding, 20 of the 100 with a single image."""
    data = image_set((100, *[1] * 100))
    train, val = train_val_split(data, 40, seed=0)
    assert train.labels.bincount().tolist() == [60] + [1] * 100
    assert val.labels.bincount().tolist() == [40]
    train, val = train_val_split(image_set((2, 1, 1)), 3, seed=0)  # too few to leave one of each
    assert (len(train), len(val)) == (1, 3)


def labeled(*labels: int) -> ImageSet:
    """Return images whose pixels are their position."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images, torch.tensor(labels))


def test_interleave_classes_takes_them_in_turn() -> None:
    turned = interleave_classes(labeled(0, 0, 0, 1, 2, 2))
    assert turned.labels.tolist() == [0, 1, 2, 0, 2, 0]
    assert positions(turned) == [0, 3, 4, 1, 5, 2]


def test_interleave_classes_skips_missing_classes() -> None:
    assert positions(interleave_classes(labeled(0, 0, 2, 2))) == [0, 2, 1, 3]


def test_interleave_classes_keeps_a_mixed_order() -> None:
    assert positions(interleave_classes(labeled(1, 0, 0, 1, 2))) == [0, 1, 2, 3, 4]
