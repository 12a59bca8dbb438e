"""Parts of image sets, batches, augmentation, and the check of foreign batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deat_rb.data.augment import crop_and_flip
from deat_rb.data.batches import Batches
from deat_rb.data.check import check_batch
from deat_rb.data.images import ImageSet, fits_on_device, subset, train_val_split
from deat_rb.utils.errors import DeatError


def image_set(counts: tuple[int, ...]) -> ImageSet:
    """Images of which each has its position as its only pixel, with the classes in turn as far as they go."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.arange(len(labels)) * 7 % len(labels)]
    return ImageSet(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


def positions(data: ImageSet) -> list[int]:
    return data.images.flatten().tolist()


def grids(count: int, channels: int = 3) -> ImageSet:
    """5x5 images of which no two pixels are equal within a channel of an image, and none is black."""
    stream = torch.Generator().manual_seed(0)
    rows = [torch.randperm(255, generator=stream)[: channels * 25] + 1 for _ in range(count)]
    images = torch.stack(rows).view(count, channels, 5, 5)
    return ImageSet(images.to(torch.uint8), torch.arange(count) % 3)


def epoch_of(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    batches.set_epoch(epoch)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


class TestImageSet:
    def test_gives_float_images_in_the_unit_range(self) -> None:
        data = ImageSet(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 1, 0]))
        images, labels = data.tensors()
        assert images.dtype == torch.float32
        assert images.flatten().tolist() == [0.0, torch.tensor(0.2).item(), 1.0]
        assert labels.tolist() == [0, 1, 0]

    def test_select_keeps_the_order_asked_for(self) -> None:
        chosen = image_set((3, 3)).select([4, 0])
        assert positions(chosen) == [4, 0]
        assert chosen.labels.tolist() == [image_set((3, 3)).labels[4].item(), image_set((3, 3)).labels[0].item()]

    def test_first_is_what_comes_first(self) -> None:
        assert positions(image_set((3, 3)).first(2)) == [0, 1]

    @pytest.mark.parametrize("count", [0, 7, -1])
    def test_first_refuses_what_is_not_there(self, count: int) -> None:
        with pytest.raises(DeatError, match=f"first {count} of 6 .* from 1 to 6"):
            image_set((3, 3)).first(count)

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), r"uint8 .* not float32 of shape \(2, 3, 4, 4\)"),
            (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"not uint8 of shape \(2, 4, 4\)"),
            (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2).int(), r"int64 .* not int32 of shape \(2,\)"),
            (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 1).long(), r"not int64 of shape \(2, 1\)"),
            (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "2 images have 3 labels"),
            (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, -1]), "label -1 is out of range"),
        ],
    )
    def test_refuses_what_is_not_one(self, images: Tensor, labels: Tensor, message: str) -> None:
        with pytest.raises(DeatError, match=message):
            ImageSet(images, labels)

    def test_takes_no_more_than_a_quarter_of_what_a_gpu_has_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 1000))
        rooms = [
            (size, fits_on_device(size, torch.device(device))) for device in ("cuda", "cpu") for size in (100, 101)
        ]
        assert rooms == [(100, True), (101, False), (100, True), (101, True)]

    @pytest.mark.parametrize(("room", "place"), [(True, "meta"), (False, "cpu")])
    def test_lies_on_the_device_or_goes_there_batch_by_batch(
        self, room: bool, place: str, monkeypatch: pytest.MonkeyPatch
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


class TestHoldOut:
    def test_takes_each_class_in_proportion(self) -> None:
        train, val = train_val_split(image_set((60, 30, 10)), 20, seed=0)
        assert val.labels.bincount().tolist() == [12, 6, 2]
        assert train.labels.bincount().tolist() == [48, 24, 8]

    def test_leftovers_go_to_the_largest_remainders(self) -> None:
        # 10 of (5, 9, 11) of 25 are shares of 2.0, 3.6 and 4.4: the class of 9 is rounded up.
        _, val = train_val_split(image_set((5, 9, 11)), 10, seed=0)
        assert val.labels.bincount().tolist() == [2, 4, 4]

    def test_parts_are_disjoint_complete_and_in_order(self) -> None:
        data = image_set((60, 30, 10))
        train, val = train_val_split(data, 20, seed=3)
        assert sorted(positions(train) + positions(val)) == list(range(100))
        for part in (train, val):
            assert positions(part) == sorted(positions(part))
            assert torch.equal(part.labels, data.labels[positions(part)])

    def test_follows_from_the_seed_alone(self) -> None:
        data = image_set((60, 30, 10))
        torch.manual_seed(1)
        one = positions(train_val_split(data, 20, seed=3)[1])
        torch.manual_seed(2)
        assert positions(train_val_split(data, 20, seed=3)[1]) == one
        assert positions(train_val_split(data, 20, seed=4)[1]) != one

    @pytest.mark.parametrize("size", [0, 100, 101, -1])
    def test_refuses_to_leave_nothing(self, size: int) -> None:
        with pytest.raises(DeatError, match=f"--val-size {size} .* 100 training images: give a number from 1 to 99"):
            train_val_split(image_set((60, 30, 10)), size, seed=0)


class TestSubset:
    def test_takes_each_class_in_proportion_without_repeats(self) -> None:
        data = image_set((60, 30, 10))
        part = subset(data, 50, seed=0)
        assert part.labels.bincount().tolist() == [30, 15, 5]
        assert len(set(positions(part))) == 50
        assert torch.equal(part.labels, data.labels[positions(part)])

    def test_follows_from_the_seed(self) -> None:
        data = image_set((60, 30, 10))
        assert positions(subset(data, 50, seed=1)) == positions(subset(data, 50, seed=1))
        assert positions(subset(data, 50, seed=1)) != positions(subset(data, 50, seed=2))

    def test_of_all_is_all(self) -> None:
        assert positions(subset(image_set((5, 5)), 10, seed=0)) == list(range(10))

    @pytest.mark.parametrize("size", [0, 101])
    def test_refuses_what_is_not_there(self, size: int) -> None:
        with pytest.raises(DeatError, match=f"--train-size {size} .* 100 training images: give a number from 1 to 100"):
            subset(image_set((60, 30, 10)), size, seed=0)


class TestCropAndFlip:
    IMAGE = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)

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
    def test_by_hand(self, top: int, left: int, flip: bool, expected: list[list[int]]) -> None:
        moved = crop_and_flip(self.IMAGE, torch.tensor([top]), torch.tensor([left]), torch.tensor([flip]))
        assert moved.dtype == torch.uint8
        assert moved[0, 0].tolist() == expected

    def test_takes_images_that_are_not_square(self) -> None:
        image = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]], dtype=torch.uint8)
        moved = crop_and_flip(image, torch.tensor([5]), torch.tensor([3]), torch.tensor([False]))
        assert moved[0, 0].tolist() == [[0, 4, 5], [0, 0, 0]]


class TestAugmentation:
    def test_every_image_is_some_crop_of_its_own_padded_original(self) -> None:
        data = grids(64)
        images, _ = epoch_of(Batches(data, 16, augment=True))
        seen = [self.placements(image, original) for image, original in zip(images, data.images, strict=True)]
        assert all(seen)
        assert {flip for placements in seen for _, _, flip in placements} == {False, True}
        # 64 draws of 9 offsets miss one of them with a probability below 9 * (8/9)**64 = 0.5 %; the seed is fixed.
        certain = [placements[0] for placements in seen if len(placements) == 1]
        assert {top for top, _, _ in certain} == set(range(9))
        assert {left for _, left, _ in certain} == set(range(9))

    @staticmethod
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

    def test_half_are_mirrored_and_offsets_are_uniform(self) -> None:
        # One bright column left of the middle, in wide images so that no crop loses it: its place tells the flip.
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

    def test_images_of_a_batch_are_augmented_independently(self) -> None:
        same = ImageSet(grids(1).images.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64))
        ((images, _),) = Batches(same, 32, augment=True)
        assert len({tuple(image.flatten().tolist()) for image in images}) > 10

    def test_batches_of_an_epoch_and_epochs_differ(self) -> None:
        same = ImageSet(grids(1).images.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64))
        batches = Batches(same, 16, augment=True)
        one, two = (images for images, _ in batches)
        assert not torch.equal(one, two)
        batches.set_epoch(1)
        assert not torch.equal(next(iter(batches))[0], one)

    def test_stored_images_stay_as_they_are(self) -> None:
        data = grids(8)
        before = data.images.clone()
        epoch_of(Batches(data, 4, augment=True))
        epoch_of(Batches(data, 4))
        assert torch.equal(data.images, before)


class TestBatches:
    def test_without_shuffle_all_images_in_order(self) -> None:
        batches = Batches(image_set((5, 5)), 4)
        assert len(batches) == 3
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        images, labels = epoch_of(batches)
        assert images.dtype == torch.float32
        assert torch.equal((images * 255).round().flatten(), torch.arange(10.0))
        assert torch.equal(labels, image_set((5, 5)).labels)

    def test_values_are_the_bytes_divided_by_255(self) -> None:
        images, _ = epoch_of(Batches(image_set((128, 128)), 100))
        assert torch.equal(images.flatten(), torch.arange(256, dtype=torch.float32) / 255)

    def test_shuffled_epochs_hold_every_image_with_its_label_once(self) -> None:
        data = image_set((60, 30, 10))
        batches = Batches(data, 16, shuffle=True)
        orders = []
        for epoch in range(3):
            images, labels = epoch_of(batches, epoch)
            orders.append((images * 255).round().flatten().long().tolist())
            assert sorted(orders[-1]) == list(range(100))
            assert torch.equal(labels, data.labels[orders[-1]])
        assert orders[0] != orders[1] != orders[2] != orders[0]

    def test_same_seed_and_epoch_are_bitwise_equal(self) -> None:
        data = grids(20)
        torch.manual_seed(1)
        one = epoch_of(Batches(data, 8, shuffle=True, augment=True, seed=5), 2)
        torch.manual_seed(2)
        two = epoch_of(Batches(data, 8, shuffle=True, augment=True, seed=5), 2)
        other = epoch_of(Batches(data, 8, shuffle=True, augment=True, seed=6), 2)
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert not torch.equal(one[0], other[0])

    def test_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        epoch_of(Batches(grids(20), 8, shuffle=True, augment=True))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("start", range(4))
    def test_continues_in_mid_epoch(self, start: int) -> None:
        data = grids(20)
        batches = Batches(data, 8, shuffle=True, augment=True, seed=5)
        batches.set_epoch(3)
        whole = list(batches)
        fresh = Batches(data, 8, shuffle=True, augment=True, seed=5)
        fresh.set_epoch(3)
        rest = list(fresh.starting_at(start))
        assert len(rest) == 3 - start
        for (images, labels), (expected_images, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)

    @pytest.mark.parametrize("start", [-1, 4])
    def test_refuses_to_continue_where_there_is_nothing(self, start: int) -> None:
        with pytest.raises(DeatError, match=f"3 batches cannot be continued at batch {start}"):
            Batches(grids(20), 8).starting_at(start)

    def test_drop_last_leaves_the_rest_out(self) -> None:
        batches = Batches(image_set((5, 5)), 4, drop_last=True)
        assert len(batches) == 2
        assert [len(labels) for _, labels in batches] == [4, 4]
        assert len(Batches(image_set((4, 4)), 4, drop_last=True)) == 2

    def test_channels_last_changes_only_the_layout(self) -> None:
        data = grids(8)
        one, _ = next(iter(Batches(data, 8, shuffle=True, augment=True)))
        two, _ = next(iter(Batches(data, 8, shuffle=True, augment=True, memory_format=torch.channels_last)))
        assert torch.equal(one, two)
        assert two.is_contiguous(memory_format=torch.channels_last)
        assert one.is_contiguous()

    def test_does_not_wait_for_the_device(self) -> None:
        # What makes an accelerator wait: a value taken to the host, or a shape that depends on values.
        waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
        batches = Batches(grids(20), 8, shuffle=True, augment=True)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            for _ in batches:
                pass
        seen = {event.key for event in record.key_averages()}
        assert "aten::gather" in seen
        assert not seen & waiting

    def test_refuses_fewer_images_than_a_batch_of_training(self) -> None:
        for shuffle, drop_last in ((True, False), (False, True)):
            with pytest.raises(DeatError, match="10 training images are fewer than one batch of --batch-size 11"):
                Batches(image_set((5, 5)), 11, shuffle=shuffle, drop_last=drop_last)
        assert len(Batches(image_set((5, 5)), 11)) == 1

    @pytest.mark.parametrize("size", [0, -3])
    def test_refuses_empty_batches(self, size: int) -> None:
        with pytest.raises(DeatError, match=f"--batch-size {size} "):
            Batches(image_set((5, 5)), size)


class TestDivided:
    @given(
        count=st.integers(1, 40),
        batch_size=st.integers(1, 20),
        processes=st.integers(1, 5),
        epoch=st.integers(0, 3),
        shuffle=st.booleans(),
        augment=st.booleans(),
        drop_last=st.booleans(),
        skipped=st.integers(0, 3),
    )
    @settings(max_examples=80, deadline=None)
    def test_the_shares_of_all_ranks_are_the_batch_of_one_process(
        self, count: int, batch_size: int, processes: int, epoch: int, shuffle: bool, augment: bool, drop_last: bool,
        skipped: int,
    ) -> None:  # fmt: skip
        batch_size = min(batch_size, count)
        data = grids(count, channels=1)
        whole = Batches(data, batch_size, shuffle=shuffle, augment=augment, drop_last=drop_last, seed=7)
        sizes = [len(labels) for _, labels in whole]
        if min(sizes) < processes:
            with pytest.raises(DeatError, match=f"leave one of {min(sizes)}, which cannot be divided over {processes}"):
                whole.divided(0, processes)
            return
        whole.set_epoch(epoch)
        parts = [whole.divided(rank, processes) for rank in range(processes)]
        start = min(skipped, len(whole))
        assert {len(part) for part in parts} == {len(whole)}
        for (images, labels), *shares in zip(*(loader.starting_at(start) for loader in (whole, *parts)), strict=True):
            assert torch.equal(torch.cat([share for share, _ in shares]), images)
            assert torch.equal(torch.cat([share for _, share in shares]), labels)
            lengths = [len(share) for share, _ in shares]
            assert max(lengths) - min(lengths) <= 1

    def test_three_processes_by_hand(self) -> None:
        parts = [Batches(image_set((4, 4)), 5, rank=rank, processes=3) for rank in range(3)]
        shares = [[(255 * images).round().flatten().tolist() for images, _ in part] for part in parts]
        # 5 images: 0 to 5/3, to 10/3, to 5, rounded down; then the 3 that remain, one each.
        assert shares == [[[0], [5]], [[1, 2], [6]], [[3, 4], [7]]]

    def test_is_asked_of_the_global_batch_and_leaves_the_undivided_as_it_is(self) -> None:
        whole = Batches(grids(12), 6, shuffle=True, seed=1)
        before = epoch_of(whole, 2)
        half = whole.divided(1, 2)
        assert torch.equal(epoch_of(half.divided(0, 1), 2)[0], before[0])
        half.set_epoch(3)
        assert (whole.epoch, whole.rank, whole.processes) == (2, 0, 1)
        assert torch.equal(epoch_of(whole, 2)[0], before[0])

    def test_does_not_copy_the_images(self) -> None:
        data = image_set((4, 4))
        whole = Batches(data, 4)
        data.images.fill_(9)
        images, _ = epoch_of(whole.divided(1, 2))
        assert (255 * images).round().flatten().tolist() == [9, 9, 9, 9]

    @pytest.mark.parametrize(("rank", "processes"), [(-1, 2), (2, 2), (0, 0)])
    def test_refuses_ranks_that_are_none(self, rank: int, processes: int) -> None:
        with pytest.raises(DeatError, match=f"rank {rank} of {processes} processes is not possible"):
            Batches(grids(8), 4).divided(rank, processes)


class TestCheckBatch:
    IMAGES = torch.linspace(0, 1, 24).view(2, 3, 2, 2)
    LABELS = torch.tensor([0, 2])

    def test_takes_what_is_right(self) -> None:
        check_batch(self.IMAGES, self.LABELS)
        check_batch(self.IMAGES.half(), self.LABELS, 3)
        check_batch(self.IMAGES.requires_grad_(), self.LABELS, 3)
        check_batch(self.IMAGES.detach() + 5e-7, self.LABELS, 3)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (IMAGES * 4 - 2, r"not in \[-2, 2\]: .* normalisation belongs in the model"),
            (IMAGES + 0.01, r"not in \[0.01, 1.01\]"),
            (IMAGES * 255, r"not in \[0, 255\]: divide by 255"),
            (IMAGES * float("nan"), "contain NaN"),
            (IMAGES.where(IMAGES < 1, float("nan")), "contain NaN"),
            (IMAGES.where(IMAGES < 1, float("inf")), r"not in \[0, inf\]"),
            ((IMAGES * 255).byte(), "not uint8 of shape .* divide images of 0 to 255 by 255"),
            ((IMAGES * 255).long(), "not int64 of shape .* divide images of 0 to 255 by 255"),
            (IMAGES[0], r"\(N, C, H, W\) .* not float32 of shape \(3, 2, 2\)"),
            (IMAGES[:0], r"not be empty, not float32 of shape \(0, 3, 2, 2\)"),
        ],
    )
    def test_refuses_images(self, images: Tensor, message: str) -> None:
        with pytest.raises(DeatError, match=message):
            check_batch(images, self.LABELS[: len(images)])

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 3]), "label 3 is out of range: labels are 0 to 2, as there are 3 classes"),
            (torch.tensor([-1, 2]), "label -1 is out of range: labels are 0 to 2"),
            (torch.tensor([0.0, 1.0]), r"int64 class numbers of shape \(N,\), not float32 of shape \(2,\)"),
            (torch.tensor([0, 1], dtype=torch.int32), "not int32"),
            (torch.eye(2).long(), r"not int64 of shape \(2, 2\)"),
            (torch.tensor([0, 1, 2]), "2 images have 3 labels"),
        ],
    )
    def test_refuses_labels(self, labels: Tensor, message: str) -> None:
        with pytest.raises(DeatError, match=message):
            check_batch(self.IMAGES.detach(), labels, 3)

    def test_refuses_what_is_no_tensor(self) -> None:
        foreign: Any = [[0.5]]
        with pytest.raises(DeatError, match="must be tensors, not list and Tensor"):
            check_batch(foreign, self.LABELS)
