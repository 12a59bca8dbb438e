from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_image_sets import epoch_of, grids, image_set
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deat_rb.data.augmentations import AUGMENTATIONS
from deat_rb.data.batches import Batches
from deat_rb.data.images import Reader
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator


def test_batches_without_shuffle_are_in_order() -> None:
    batches = Batches(image_set((5, 5)), 4)
    assert len(batches) == 3
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    images, labels = epoch_of(batches)
    assert images.dtype == torch.float32
    assert torch.equal((images * 255).round().flatten(), torch.arange(10.0))
    assert torch.equal(labels, image_set((5, 5)).labels)


def test_batches_values_are_bytes_divided_by_255() -> None:
    images, _ = epoch_of(Batches(image_set((128, 128)), 100))
    assert torch.equal(images.flatten(), torch.arange(256, dtype=torch.float32) / 255)


def test_batches_shuffled_hold_every_image_with_its_label_once() -> None:
    data = image_set((60, 30, 10))
    batches = Batches(data, 16, shuffle=True)
    orders = []
    for epoch in range(3):
        images, labels = epoch_of(batches, epoch)
        orders.append((images * 255).round().flatten().long().tolist())
        assert sorted(orders[-1]) == list(range(100))
        assert torch.equal(labels, data.labels[orders[-1]])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_of_the_same_seed_and_epoch_are_bitwise_equal() -> None:
    data = grids(20)
    torch.manual_seed(1)
    one = epoch_of(Batches(data, 8, shuffle=True, augmentation="crop-flip", seed=5), 2)
    torch.manual_seed(2)
    two = epoch_of(Batches(data, 8, shuffle=True, augmentation="crop-flip", seed=5), 2)
    other = epoch_of(Batches(data, 8, shuffle=True, augmentation="crop-flip", seed=6), 2)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_batches_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    epoch_of(Batches(grids(20), 8, shuffle=True, augmentation="crop-flip"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", range(4))
def test_starting_at_continues_an_epoch(start: int) -> None:
    data = grids(20)
    batches = Batches(data, 8, shuffle=True, augmentation="crop-flip", seed=5)
    batches.set_epoch(3)
    whole = list(batches)
    fresh = Batches(data, 8, shuffle=True, augmentation="crop-flip", seed=5)
    fresh.set_epoch(3)
    rest = list(fresh.starting_at(start))
    assert len(rest) == 3 - start
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("start", [-1, 4])
def test_refuses_to_continue_where_there_is_nothing(start: int) -> None:
    with pytest.raises(DeatError, match=f"cannot continue from batch {start}: the epoch has 3"):
        Batches(grids(20), 8).starting_at(start)


def test_drop_last_leaves_the_rest_out() -> None:
    batches = Batches(image_set((5, 5)), 4, drop_last=True)
    assert len(batches) == 2
    assert [len(labels) for _, labels in batches] == [4, 4]
    assert len(Batches(image_set((4, 4)), 4, drop_last=True)) == 2


def test_batches_channels_last_has_the_same_values() -> None:
    data = grids(8)
    one, _ = next(iter(Batches(data, 8, shuffle=True, augmentation="crop-flip")))
    two, _ = next(iter(Batches(data, 8, shuffle=True, augmentation="crop-flip", memory_format=torch.channels_last)))
    assert torch.equal(one, two)
    assert two.is_contiguous(memory_format=torch.channels_last)
    assert one.is_contiguous()


def test_batches_do_not_synchronize_with_the_device() -> None:
    # Operations that wait for an accelerator: a value copied to the host, or a shape that depends on values.
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
    batches = Batches(grids(20), 8, shuffle=True, augmentation="crop-flip")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in batches:
            pass
    seen = {event.key for event in record.key_averages()}
    assert "aten::gather" in seen
    assert not seen & waiting


def test_batches_refuse_fewer_images_than_a_training_batch() -> None:
    for shuffle, drop_last in ((True, False), (False, True)):
        with pytest.raises(DeatError, match="10 training images are fewer than one batch of --batch-size 11"):
            Batches(image_set((5, 5)), 11, shuffle=shuffle, drop_last=drop_last)
    assert len(Batches(image_set((5, 5)), 11)) == 1


@pytest.mark.parametrize("size", [0, -3])
def test_batches_refuse_sizes_below_1(size: int) -> None:
    with pytest.raises(DeatError, match=f"--batch-size {size} "):
        Batches(image_set((5, 5)), size)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 20),
    processes=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    augmentation=st.sampled_from(sorted(AUGMENTATIONS)),
    drop_last=st.booleans(),
    skipped=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_divided_shares_of_all_ranks_are_the_global_batch(
    count: int, batch_size: int, processes: int, epoch: int, shuffle: bool, augmentation: str, drop_last: bool,
    skipped: int,
) -> None:  # fmt: skip
    batch_size = min(batch_size, count)
    data = grids(count, channels=1)
    whole = Batches(
        data, batch_size, shuffle=shuffle, augmentation=augmentation, num_classes=3, drop_last=drop_last, seed=7
    )
    sizes = [len(labels) for _, labels in whole]
    if min(sizes) < processes:
        with pytest.raises(DeatError, match=f"leave a batch of {min(sizes)}, fewer than the {processes} ranks"):
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


class Recorder:
    """Reader that records which images are read for each batch."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.seen: list[list[int]] = []

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        assert order is not None
        self.seen = [order[window].tolist() for window in windows]
        return self.reader(order, windows)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("augmentation", ["cutmix", "mixup"])
def test_divided_mixing_reads_one_more_image_than_the_share(augmentation: str, shuffle: bool) -> None:
    whole = Batches(grids(22), 8, shuffle=shuffle, augmentation=augmentation, num_classes=3)
    order = torch.randperm(22, generator=generator(0, "order", 0)).tolist() if shuffle else list(range(22))
    for rank, read in enumerate([(7, 0, 1), (1, 2, 3, 4), (4, 5, 6, 7)]):  # of the first batch, 0 to 8
        part = whole.divided(rank, 3)
        recorder = part._read = Recorder(part._read)
        lengths = [len(labels) for _, labels in part]
        assert recorder.seen[0] == [order[position] for position in read]
        assert [len(each) for each in recorder.seen] == [length + 1 for length in lengths]


def test_divided_over_three_ranks_by_hand() -> None:
    parts = [Batches(image_set((4, 4)), 5, rank=rank, processes=3) for rank in range(3)]
    shares = [[(255 * images).round().flatten().tolist() for images, _ in part] for part in parts]
    # 5 images: 0 to 5/3, to 10/3, to 5, rounded down; then the 3 that remain, one each.
    assert shares == [[[0], [5]], [[1, 2], [6]], [[3, 4], [7]]]


def test_divided_divides_the_global_batch_and_does_not_change_it() -> None:
    whole = Batches(grids(12), 6, shuffle=True, seed=1)
    before = epoch_of(whole, 2)
    half = whole.divided(1, 2)
    assert torch.equal(epoch_of(half.divided(0, 1), 2)[0], before[0])
    half.set_epoch(3)
    assert (whole.epoch, whole.rank, whole.processes) == (2, 0, 1)
    assert torch.equal(epoch_of(whole, 2)[0], before[0])


def test_divided_does_not_copy_the_images() -> None:
    data = image_set((4, 4))
    whole = Batches(data, 4)
    data.images.fill_(9)
    images, _ = epoch_of(whole.divided(1, 2))
    assert (255 * images).round().flatten().tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize(("rank", "processes"), [(-1, 2), (2, 2), (0, 0)])
def test_divided_refuses_ranks_that_do_not_exist(rank: int, processes: int) -> None:
    with pytest.raises(DeatError, match=f"rank {rank} is out of range: with {processes} ranks"):
        Batches(grids(8), 4).divided(rank, processes)
