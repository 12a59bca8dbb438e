"""The data sets and what is wrong with those that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.images import ImageSet
from deat_rb.utils.errors import DeatError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, each an own colour: 3, 4 and 5 training images and one test image each."""
    for count, (name, colour) in enumerate(COLOURS.items(), 3):
        for number in range(count):
            write_image(tmp_path / "train" / name / f"{number}.png", colour)
        write_image(tmp_path / "test" / name / "0.png", colour)
    return tmp_path


def load(folder: Path, image_size: int | None = None) -> Dataset:
    return load_data("folder", data_dir=folder, image_size=image_size)


class TestLoadData:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("cifar-10", "--dataset cifar-10 is unknown: did you mean 'cifar10'"),
            ("mnist", "--dataset mnist is unknown: known are digits, cifar10, cifar100, folder"),
        ],
    )
    def test_refuses_unknown_names(self, name: str, message: str) -> None:
        with pytest.raises(DeatError, match=message):
            load_data(name)

    @pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
    def test_refuses_other_sizes_of_what_has_one(self, name: str) -> None:
        with pytest.raises(DeatError, match=f"--image-size 64 .* {name} are 32x32"):
            load_data(name, image_size=64)


class TestDataSet:
    @pytest.mark.parametrize("part", ["training", "test"])
    def test_refuses_labels_without_a_class(self, part: str) -> None:
        images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        good, bad = ImageSet(images, torch.tensor([0, 1])), ImageSet(images, torch.tensor([0, 2]))
        train, test = (bad, good) if part == "training" else (good, bad)
        with pytest.raises(DeatError, match=f"mine has the {part} label 2, out of range: its 2 classes are 0 to 1"):
            Dataset("mine", train, test, ("a", "b"), (0.0,) * 3, (1.0,) * 3, False, "")

    def test_refuses_one_class(self) -> None:
        data = ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0]))
        with pytest.raises(DeatError, match="mine has only one class, a: there must be two"):
            Dataset("mine", data, data, ("a",), (0.0,) * 3, (1.0,) * 3, False, "")

    def test_refuses_parts_of_different_size(self) -> None:
        parts = [ImageSet(torch.zeros(2, 3, n, n, dtype=torch.uint8), torch.tensor([0, 1])) for n in (4, 5)]
        with pytest.raises(DeatError, match=r"\(3, 4, 4\) and test images of \(3, 5, 5\)"):
            Dataset("mine", parts[0], parts[1], ("a", "b"), (0.0,) * 3, (1.0,) * 3, False, "")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


class TestDigits:
    def test_parts(self, digits: Dataset) -> None:
        assert (len(digits.train), len(digits.test)) == (1297, 500)
        assert digits.train.shape == (3, 32, 32)
        assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
        assert not digits.augment

    def test_is_split_in_proportion(self, digits: Dataset) -> None:
        # scikit-learn's documentation: about 180 samples of each class; here within one of 500/1797 of each.
        everywhere = np.bincount(load_digits().target)
        assert (digits.test.labels.bincount().numpy() - everywhere * 500 / 1797 < 1).all()
        assert (everywhere * 500 / 1797 - digits.test.labels.bincount().numpy() < 1).all()

    def test_images_are_the_bilinear_enlargement(self, digits: Dataset) -> None:
        # Pillow enlarges bilinearly too, about the same centres; float mode, so that it does not round in between.
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
        # Every image is found, with its label, however the split has ordered them.
        flat = torch.from_numpy(enlarged).reshape(1797, -1)
        distances = torch.cdist(ours[:, 0].reshape(1797, -1).float(), flat)
        match = distances.argmin(1)
        assert sorted(match.tolist()) == list(range(1797))
        assert (ours[:, 0].reshape(1797, -1) - flat[match]).abs().max() <= 0.5001
        assert labels.tolist() == source.target[match].tolist()

    def test_split_and_fingerprint_are_those_of_every_run(self, digits: Dataset) -> None:
        torch.manual_seed(7)
        again = load_data("digits")
        assert torch.equal(again.test.in_memory().images, digits.test.in_memory().images)
        assert again.fingerprint == digits.fingerprint
        assert digits.fingerprint.startswith("b020a8ebf728")

    def test_normalisation_comes_from_the_training_images(self, digits: Dataset) -> None:
        images, _ = digits.train.tensors()
        values = images.double().numpy()
        assert digits.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-7)
        assert digits.std == pytest.approx(values.std((0, 2, 3)).tolist(), abs=1e-7)


class TestFolder:
    def test_classes_images_and_labels(self, folder: Path) -> None:
        data = load(folder)
        assert data.classes == ("blue", "green", "red")
        assert data.augment
        assert data.train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 5
        assert data.test.labels.tolist() == [0, 1, 2]
        assert data.train.in_memory().images.shape == (12, 3, 32, 32)
        for image, label in zip(data.train.in_memory().images, data.train.labels.tolist(), strict=True):
            assert image.amax((1, 2)).tolist() == list(COLOURS[data.classes[label]])
            assert image.amin((1, 2)).tolist() == list(COLOURS[data.classes[label]])

    def test_reads_what_torchvision_reads(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "train" / "red" / "10.JPG")
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / "train" / "blue" / "grey.bmp")
        (folder / "train" / "green" / "sub").mkdir()
        write_image(folder / "train" / "green" / "sub" / "deep.png", (1, 2, 3))
        (folder / "train" / "green" / "notes.txt").write_text("no image")
        (folder / "train" / "README.md").write_text("no class")
        expected = torchvision.datasets.ImageFolder(folder / "train")
        train = load(folder).train
        assert train.labels.tolist() == expected.targets
        assert len(train) == 15
        for ours, (theirs, _) in zip(train.in_memory().images, expected, strict=True):
            assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(theirs))

    def test_mean_and_std_by_hand(self, folder: Path) -> None:
        # Red: 5 of 12 images are 1, the others 0; green 4 of 12; blue 3 of 12.
        data = load(folder)
        assert data.mean == pytest.approx((5 / 12, 4 / 12, 3 / 12), abs=1e-12)
        assert data.std == pytest.approx(((35 / 144) ** 0.5, (32 / 144) ** 0.5, (27 / 144) ** 0.5), abs=1e-12)

    def test_a_channel_without_spread_can_be_divided_by(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            write_image(tmp_path / part / "a" / "0.png", (10, 0, 0))
            write_image(tmp_path / part / "b" / "0.png", (20, 0, 0))
        assert load(tmp_path).std[1:] == (1 / 255, 1 / 255)

    @pytest.mark.parametrize("size", [8, 48])
    def test_resizes(self, folder: Path, size: int) -> None:
        assert load(folder, size).train.in_memory().images.shape == (12, 3, size, size)

    def test_resizing_keeps_the_centre_and_the_proportions(self, folder: Path) -> None:
        # 64 high, 128 wide: red, with the central square green. Only that is kept.
        wide = Image.new("RGB", (128, 64), (255, 0, 0))
        wide.paste((0, 255, 0), (32, 0, 96, 64))
        wide.save(folder / "test" / "green" / "0.png")
        image = load(folder).test.in_memory().images[1]
        # Averaging reaches one pixel beyond the cut, so that the outermost columns have a share of red.
        assert torch.equal(image[:, :, 1:-1], torch.tensor([0, 255, 0]).byte().view(3, 1, 1).expand(3, 32, 30))
        assert image[0].max() < 64

    def test_fingerprint_changes_with_everything(self, folder: Path) -> None:
        prints = [load(folder).fingerprint]
        assert load(folder).fingerprint == prints[0]
        write_image(folder / "test" / "red" / "0.png", (255, 0, 1))
        prints.append(load(folder).fingerprint)
        (folder / "train" / "blue" / "0.png").rename(folder / "train" / "green" / "9.png")
        prints.append(load(folder).fingerprint)
        for part in ("train", "test"):
            (folder / part / "red").rename(folder / part / "rouge")
        prints.append(load(folder).fingerprint)
        assert len(set(prints)) == 4

    def test_follows_links_out_of_the_folder(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        write_image(elsewhere / "yellow" / "0.png", (255, 255, 0))
        write_image(elsewhere / "one.png", (255, 0, 0))
        for part in ("train", "test"):
            (folder / part / "yellow").symlink_to(elsewhere / "yellow")
        (folder / "train" / "red" / "linked.png").symlink_to(elsewhere / "one.png")
        data = load(folder)
        assert data.classes == ("blue", "green", "red", "yellow")
        assert data.train.labels.bincount().tolist() == [3, 4, 6, 1]

    def test_needs_a_data_dir(self) -> None:
        with pytest.raises(DeatError, match="--dataset folder needs --data-dir"):
            load_data("folder")

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_needs_both_parts(self, folder: Path, part: str) -> None:
        (folder / part).rename(folder / "other")
        with pytest.raises(DeatError, match=f"--data-dir {folder} has no folder {part}"):
            load(folder)

    def test_refuses_a_path_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DeatError, match=f"--data-dir {tmp_path / 'nowhere'} has no folder train"):
            load(tmp_path / "nowhere")

    @pytest.mark.parametrize("size", [0, -8])
    def test_refuses_impossible_sizes(self, folder: Path, size: int) -> None:
        with pytest.raises(DeatError, match=f"--image-size {size} "):
            load(folder, size)

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "truncated"], ids=["empty", "html", "cut"])
    def test_names_the_broken_image(self, folder: Path, content: bytes | str) -> None:
        path = folder / "train" / "green" / "2.png"
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:1500] if isinstance(content, str) else content)
        with pytest.raises(DeatError, match=f"{path} cannot be read as an image"):
            load(folder)

    def test_refuses_a_link_to_nothing(self, folder: Path) -> None:
        (folder / "train" / "red" / "gone.png").symlink_to(folder / "gone.png")
        with pytest.raises(DeatError, match=r"gone\.png cannot be read as an image"):
            load(folder)

    def test_refuses_more_than_8_bits(self, folder: Path) -> None:
        path = folder / "train" / "red" / "deep.png"
        Image.fromarray(np.full((32, 32), 4000, dtype=np.uint16)).save(path)
        with pytest.raises(DeatError, match=f"{path} has more than 8 bits"):
            load(folder)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_refuses_an_empty_class(self, folder: Path, part: str) -> None:
        for name in ("train", "test"):
            (folder / name / "yellow").mkdir()
        write_image(folder / {"train": "test", "test": "train"}[part] / "yellow" / "0.png", (255, 255, 0))
        (folder / part / "yellow" / "notes.txt").write_text("no image")
        with pytest.raises(DeatError, match=f"{folder / part / 'yellow'} has no image"):
            load(folder)

    def test_refuses_one_class_or_none(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            (tmp_path / part).mkdir()
        with pytest.raises(DeatError, match="train has no class: there must be two"):
            load(tmp_path)
        for part in ("train", "test"):
            write_image(tmp_path / part / "red" / "0.png", (255, 0, 0))
        with pytest.raises(DeatError, match="train has only one class, red: there must be two"):
            load(tmp_path)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_refuses_different_classes(self, folder: Path, part: str) -> None:
        write_image(folder / part / "yellow" / "0.png", (255, 255, 0))
        with pytest.raises(DeatError, match=r"the class 'yellow' is under only one of .*train and .*test"):
            load(folder)
