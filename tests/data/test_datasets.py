from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_folder import SIZE, load, make_folder
from PIL import Image
from sklearn.datasets import load_digits

from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import ImageSet, interleave_classes
from deat_rb.data.statistics import DatasetStatistics
from deat_rb.utils.errors import DeatError

STATISTICS = DatasetStatistics("", (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar-10", "--dataset cifar-10 is unknown: did you mean 'cifar10'"),
        ("mnist", "--dataset mnist is unknown: choose one of digits, cifar10, cifar100, folder"),
    ],
)
def test_load_data_refuses_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        load_data(name)


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_load_data_refuses_other_sizes_of_datasets_of_one_size(name: str) -> None:
    with pytest.raises(DeatError, match=f"--image-size 64 is invalid: the images of {name} are 32x32"):
        load_data(name, image_size=64)


@pytest.mark.parametrize("part", ["training", "test"])
def test_dataset_refuses_labels_without_a_class(part: str) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    good, bad = ImageSet(images, torch.tensor([0, 1])), ImageSet(images, torch.tensor([0, 2]))
    train, test = (bad, good) if part == "training" else (good, bad)
    with pytest.raises(
        DeatError, match=f"mine has the {part} label 2, which is out of range: labels of its 2 classes must be 0 to 1"
    ):
        Dataset("mine", train, test, ("a", "b"), STATISTICS)


def test_dataset_refuses_one_class() -> None:
    data = ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0]))
    with pytest.raises(DeatError, match="mine has only one class, a: at least two are needed"):
        Dataset("mine", data, data, ("a",), STATISTICS)


def test_dataset_refuses_parts_of_different_size() -> None:
    parts = [ImageSet(torch.zeros(2, 3, n, n, dtype=torch.uint8), torch.tensor([0, 1])) for n in (4, 5)]
    with pytest.raises(DeatError, match=r"\(3, 4, 4\) and test images of \(3, 5, 5\)"):
        Dataset("mine", parts[0], parts[1], ("a", "b"), STATISTICS)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


def test_digits_have_1297_training_and_500_test_images(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.test)) == (1297, 500)
    assert digits.train.shape == (3, 32, 32)
    assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_digits_split_is_stratified(digits: Dataset) -> None:
    # scikit-learn's documentation: about 180 samples of each class; here within one of 500/1797 of each.
    everywhere = np.bincount(load_digits().target)
    assert (digits.test.labels.bincount().numpy() - everywhere * 500 / 1797 < 1).all()
    assert (everywhere * 500 / 1797 - digits.test.labels.bincount().numpy() < 1).all()


def test_digits_are_enlarged_bilinearly(digits: Dataset) -> None:
    # Pillow's bilinear resizing, in float mode, so that it does not round in between.
    source = load_digits()
    enlarged = np.stack(
        [
            np.asarray(Image.fromarray(image.astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR))
            for image in source.images * 255 / 16
        ]
    )
    ours = torch.cat((digits.train.in_memory().images, digits.test.in_memory().images))
    labels = torch.cat((digits.train.labels, digits.test.labels))
    assert torch.equal(ours[:, 0], ours[:, 1])
    assert torch.equal(ours[:, 0], ours[:, 2])
    # Every image occurs, with its label, whatever the order of the split.
    flat = torch.from_numpy(enlarged).reshape(1797, -1)
    distances = torch.cdist(ours[:, 0].reshape(1797, -1).float(), flat)
    match = distances.argmin(1)
    assert sorted(match.tolist()) == list(range(1797))
    assert (ours[:, 0].reshape(1797, -1) - flat[match]).abs().max() <= 0.5001
    assert labels.tolist() == source.target[match].tolist()


def test_digits_split_and_fingerprint_do_not_depend_on_the_global_seed(digits: Dataset) -> None:
    torch.manual_seed(7)
    again = load_data("digits")
    assert torch.equal(again.test.in_memory().images, digits.test.in_memory().images)
    assert again.fingerprint == digits.fingerprint
    assert digits.fingerprint.startswith("b020a8ebf728")


def test_digits_normalization_comes_from_the_training_images(digits: Dataset) -> None:
    images, _ = digits.train.tensors()
    values = images.double().numpy()
    assert digits.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-7)
    assert digits.std == pytest.approx(values.std((0, 2, 3)).tolist(), abs=1e-7)


# Options of `load_data`.


def test_load_data_memory_limit_counts_the_decoded_images_of_both_parts(tmp_path: Path) -> None:
    folder, needed = make_folder(tmp_path), (27 + 6) * 3 * SIZE * SIZE
    assert not isinstance(load(folder, needed).train, ImageFolder)
    assert isinstance(load(folder, needed - 1).train, ImageFolder)
    assert not isinstance(load(folder, None).train, ImageFolder)


def test_load_data_memory_limit_does_not_apply_to_other_datasets() -> None:
    assert not isinstance(load_data("digits", memory_limit=1).train, ImageFolder)


def test_load_data_refuses_a_negative_memory_limit(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="--memory-limit -1 is below 0"):
        load(make_folder(tmp_path), -1)


def test_load_data_test_only_does_not_decode_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "images")
    whole = load(folder, None)
    (folder / "train" / "a" / "0.jpg").write_bytes(b"damaged: decoding it would raise")
    data = load(folder, None, test_only=True)
    assert isinstance(data.test, ImageSet)
    assert torch.equal(data.test.images, whole.test.in_memory().images)
    assert (len(data.train), data.classes, data.known_fingerprint) == (27, whole.classes, None)
    with pytest.raises(DeatError, match=r"0\.jpg cannot be read as an image"):
        _ = data.fingerprint


def test_load_data_test_only_knows_cached_statistics_or_computes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "images")
    data = load(folder, None, test_only=True)
    assert data.known_fingerprint is None
    whole = load(folder, None)
    assert (data.fingerprint, data.mean, data.std) == (whole.fingerprint, whole.mean, whole.std)
    assert data.known_fingerprint == load(folder, None, test_only=True).known_fingerprint == whole.fingerprint


def test_load_data_test_only_compares_the_test_images_with_the_memory_limit(tmp_path: Path) -> None:
    folder, needed = make_folder(tmp_path), 6 * 3 * SIZE * SIZE
    assert isinstance(load(folder, needed, test_only=True).test, ImageSet)
    assert isinstance(load(folder, needed - 1, test_only=True).test, ImageFolder)


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize("test_only", [False, True])
def test_load_data_folder_test_images_take_the_classes_in_turn(
    tmp_path: Path, memory_limit: int | None, test_only: bool
) -> None:
    """The first N are those that an evaluation of N examples attacks."""
    test = load(make_folder(tmp_path), memory_limit, test_only=test_only).test
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(interleave_classes(test).tensors()[0], test.tensors()[0])


def test_load_data_without_download_returns_a_placeholder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connection(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_connection)
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        data = load_data(name, data_dir=tmp_path / "data", download=False)
        assert (len(data.train), len(data.test), len(data.classes)) == (50_000, 10_000, classes)
        assert data.is_placeholder
        assert data.notes == (f"{name} has not been downloaded yet",)
    assert not (tmp_path / "data").exists()
