"""Extra images: reading .npz files without pickle, and batches with a fixed share of them."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_image_sets import epoch_of, grids
from torch import Tensor

from deat_rb.data.batches import Batches
from deat_rb.data.extra_data import load_extra_data, mixed_order
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import ImageSet
from deat_rb.utils.errors import DeatError

SHAPE = (3, 5, 4)


def arrays(count: int = 30, classes: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8), "label": rng.integers(0, classes, count)}


def load(path: Path, **options: Any) -> Any:
    return load_extra_data(path, shape=SHAPE, num_classes=4, **options)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_load_extra_data_reads_numpys_files(tmp_path: Path, compressed: bool, kind: type) -> None:
    given = arrays()
    given["label"] = given["label"].astype(kind)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "extra.npz", other=np.arange(3), **given)
    extra = load(tmp_path / "extra.npz")
    assert extra.mapped is not compressed
    assert extra.images.shape == SHAPE
    assert np.array_equal(extra.images.images.permute(0, 2, 3, 1).numpy(), given["image"])
    assert extra.images.labels.tolist() == given["label"].tolist()
    assert extra.images.labels.dtype == torch.int64


def test_mapped_images_are_not_read_before_they_are_used(tmp_path: Path) -> None:
    count = 200_000
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        for name, array in (("label", np.zeros(count, np.int64)), ("image", np.zeros((count, 5, 4, 3), np.uint8))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array)
    extra = load(tmp_path / "big.npz", memory_limit=2_000_000)
    assert extra.mapped
    extra.images.images[0] += 1  # a copy-on-write page
    assert load(tmp_path / "big.npz").images.images[0].sum() == 0, "the file is not changed"


def test_fingerprint_depends_on_images_and_labels_only(tmp_path: Path) -> None:
    given = arrays()
    np.savez(tmp_path / "a.npz", **given)
    np.savez_compressed(tmp_path / "b.npz", **given)
    a, b = (load(tmp_path / name).fingerprint for name in ("a.npz", "b.npz"))
    given["label"][7] = (given["label"][7] + 1) % 4
    np.savez(tmp_path / "c.npz", **given)
    assert a == b != load(tmp_path / "c.npz").fingerprint


class _Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def write(path: Path, change: str) -> None:
    """Write a file that is wrong in one way."""
    with warnings.catch_warnings():
        _write(path, change)


def _write(path: Path, change: str) -> None:
    given = arrays()
    if change == "objects":
        given["label"] = np.array([_Attack()] * 30, dtype=object)
    elif change == "records":
        given["label"] = np.zeros(30, dtype=[("日", "i8")])
        warnings.simplefilter("ignore")  # NumPy's, about the version of the format
    elif change == "no label":
        del given["label"]
    elif change == "float images":
        given["image"] = given["image"] / 255
    elif change == "other size":
        given["image"] = given["image"][:, :4]
    elif change == "channels first":
        given["image"] = given["image"].transpose(0, 3, 1, 2).copy()
    elif change == "fewer labels":
        given["label"] = given["label"][:-1]
    elif change == "float labels":
        given["label"] = given["label"] / 1
    elif change == "label 4":
        given["label"][3] = 4
    elif change == "label -1":
        given["label"][3] = -1
    np.savez(path, **given)
    if change == "cut off":
        path.write_bytes(path.read_bytes()[:-600])
    elif change == "header":
        with zipfile.ZipFile(path, "w") as archive:
            held = io.BytesIO()
            np.save(held, given["label"])
            archive.writestr("label.npy", held.getvalue())
            held = io.BytesIO()
            header = {"descr": "|u1", "fortran_order": False, "shape": (10**15, 5, 4, 3)}
            np.lib.format.write_array_header_1_0(held, header)
            archive.writestr("image.npy", held.getvalue() + bytes(100))
    elif change == "text":
        path.write_text("no archive")
    elif change == "pickle":
        path.write_bytes(pickle.dumps(_Attack()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objects", "has Python objects in the array label, which are not unpickled"),
        ("records", "has the array label in version (3, 0) of NumPy's format, which is for structured arrays"),
        ("no label", "has no array label (found: image): give an .npz file as published by DM-Improves-AT"),
        ("float images", "has the array image of type float64 and shape (30, 5, 4, 3): give an .npz file"),
        ("other size", "has images of shape (4, 4, 3), but the training images are (H, W, C) = (5, 4, 3)"),
        ("channels first", "has images of shape (3, 5, 4), but the training images are (H, W, C) = (5, 4, 3)"),
        ("fewer labels", "has 30 images but the array label of type int64 and shape (29,)"),
        ("float labels", "has 30 images but the array label of type float64 and shape (30,)"),
        ("label 4", "has the label 4, which is out of range: labels of the 4 classes must be 0 to 3"),
        ("label -1", "has the label -1, which is out of range"),
        ("cut off", "is damaged or not an .npz file"),
        ("header", "is damaged: the array image should have 60000000000000000 bytes, but has 100"),
        ("text", "is damaged or not an .npz file"),
        ("pickle", "is damaged or not an .npz file"),
    ],
)
def test_load_extra_data_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "extra.npz"
    write(path, change)
    with pytest.raises(DeatError) as caught:
        load(path)
    assert str(caught.value).startswith(f"--extra-data {path} {message}")
    assert not (tmp_path / "ran").exists()


def test_load_extra_data_refuses_missing_files_and_large_compressed_ones(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=r"none\.npz cannot be read: No such file"):
        load(tmp_path / "none.npz")
    np.savez_compressed(tmp_path / "extra.npz", **arrays())
    with pytest.raises(DeatError, match=r"is compressed, and its .* exceed --memory-limit: save it with numpy.savez"):
        load(tmp_path / "extra.npz", memory_limit=100)


# Batches


def test_mixed_order_by_hand() -> None:
    # 10 images in batches of 4, of which 1 is extra: 3 batches of 3, none of the 10 images twice.
    order = mixed_order(10, 5, 3, 3, 1, seed=0, epoch=0).view(3, 4)
    assert ((order >= 10).sum(dim=1) == 1).all()
    own = order[order < 10]
    assert len(own.unique()) == 9
    assert int(order.max()) < 15
    # 5 batches of 3 take all 10 images once, and 5 of them twice.
    counts = torch.bincount(mixed_order(10, 5, 5, 3, 1, seed=0, epoch=0).clamp(max=10), minlength=11)
    assert sorted(counts[:10].tolist()) == [1] * 5 + [2] * 5
    assert counts[10] == 5


def mixed(count: int = 22, **options: Any) -> tuple[ImageSet, ImageSet, Batches]:
    own = grids(count)
    rest = grids(count + 40)
    extra = ImageSet(rest.images[count:], rest.labels[count:])
    given = {"shuffle": True, "extra": extra, "extra_fraction": 0.7, "seed": 3, **options}
    return own, extra, Batches(own, 8, **given)


def test_every_batch_has_the_share_of_extra_images_with_their_labels() -> None:
    own, extra, batches = mixed()
    known = {
        tuple(image.flatten().tolist()): (source, int(label))
        for source, images in (("own", own), ("extra", extra))
        for image, label in zip(images.images, images.labels, strict=True)
    }
    assert len(known) == 62
    assert len(batches) == 3, "as many as without extra images: 22 / 8, rounded up"
    first_places = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        seen = []
        for images, labels in batches:
            assert len(images) == 8
            pixels = [tuple((255 * image).round().to(torch.uint8).flatten().tolist()) for image in images]
            found = [known[each] for each in pixels]
            assert [label for _, label in found] == labels.tolist()
            assert sum(source == "extra" for source, _ in found) == 5  # 0.7 of 8 is 5.6
            first_places.append(found[0][0])
            seen += [each for each in pixels if known[each][0] == "own"]
        assert len(set(seen)) == 9, "without replacement"
    assert set(first_places) == {"own", "extra"}, "in any order"


def test_extra_images_are_drawn_uniformly() -> None:
    drawn = torch.cat([mixed_order(20, 10, 5, 2, 8, seed=1, epoch=epoch) for epoch in range(50)])
    counts = torch.bincount(drawn[drawn >= 20] - 20, minlength=10)
    assert int(counts.sum()) == 2000
    assert bool((counts - 200).abs().max() < 5 * 13.5)  # 5 standard deviations of 13.4


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_divided_and_resumed_batches_are_those_of_the_whole_epoch(processes: int) -> None:
    _, _, whole = mixed(augmentation="crop-flip")
    parts = [whole.divided(rank, processes) for rank in range(processes)]
    expected = list(whole)
    for number, shares in enumerate(zip(*(part.starting_at(1) for part in parts), strict=True), 1):
        assert torch.equal(torch.cat([images for images, _ in shares]), expected[number][0])
        assert torch.equal(torch.cat([labels for _, labels in shares]), expected[number][1])
    assert whole.examples_in(2) == 8


def test_batches_of_files_and_mapped_images_equal_those_in_memory(image_folder: Path, tmp_path: Path) -> None:
    from deat_rb.data.datasets import load_data

    data = load_data("folder", data_dir=image_folder, image_size=8, memory_limit=0)
    assert isinstance(data.train, ImageFolder)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "e.npz", image=rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), label=np.zeros(9, np.int64))
    extra = load_extra_data(tmp_path / "e.npz", shape=(3, 8, 8), num_classes=2)

    def batches(own: Any, more: ImageSet) -> tuple[Tensor, Tensor]:
        return epoch_of(Batches(own, 4, shuffle=True, extra=more, extra_fraction=0.5, seed=1))

    from_files = batches(data.train, extra.images)
    held = batches(data.train.in_memory(), ImageSet(extra.images.images.clone(), extra.images.labels))
    assert torch.equal(from_files[0], held[0])
    assert torch.equal(from_files[1], held[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_fraction": 0.1}, "--extra-fraction 0.1 of --batch-size 8 is invalid: give a fraction below 1"),
        ({"extra_fraction": 1.0}, "--extra-fraction 1 of --batch-size 8 is invalid"),
        ({"extra": grids(7)}, "7 extra images are fewer than one batch of --batch-size 8"),
        ({"extra": grids(9, channels=1)}, "the extra images are (1, 5, 5), but the training images are (3, 5, 5)"),
        ({"shuffle": False}, "extra images are mixed into shuffled batches only: set shuffle=True"),
    ],
)
def test_batches_refuse_extra_images(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError) as caught:
        mixed(**options)
    assert str(caught.value).startswith(message)
