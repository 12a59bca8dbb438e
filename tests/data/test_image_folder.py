from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from children import run_in_child
from PIL import Image

from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.image_files import ImageLister
from deat_rb.data.image_folder import Paths
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


def test_folder_classes_images_and_labels(folder: Path) -> None:
    data = load(folder)
    assert data.classes == ("blue", "green", "red")
    assert data.notes == ()
    assert data.train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.train.in_memory().images.shape == (12, 3, 32, 32)
    for image, label in zip(data.train.in_memory().images, data.train.labels.tolist(), strict=True):
        assert image.amax((1, 2)).tolist() == list(COLOURS[data.classes[label]])
        assert image.amin((1, 2)).tolist() == list(COLOURS[data.classes[label]])


def test_image_lister_are_those_of_torchvision(folder: Path) -> None:
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


def test_folder_mean_and_std_by_hand(folder: Path) -> None:
    # Red: 5 of 12 images are 1, the others 0; green 4 of 12; blue 3 of 12.
    data = load(folder)
    assert data.mean == pytest.approx((5 / 12, 4 / 12, 3 / 12), abs=1e-12)
    assert data.std == pytest.approx(((35 / 144) ** 0.5, (32 / 144) ** 0.5, (27 / 144) ** 0.5), abs=1e-12)


def test_folder_std_of_a_constant_channel_is_not_zero(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_image(tmp_path / part / "a" / "0.png", (10, 0, 0))
        write_image(tmp_path / part / "b" / "0.png", (20, 0, 0))
    assert load(tmp_path).std[1:] == (1 / 255, 1 / 255)


@pytest.mark.parametrize("size", [8, 48])
def test_read_image_resizes(folder: Path, size: int) -> None:
    assert load(folder, size).train.in_memory().images.shape == (12, 3, size, size)


def test_read_image_keeps_the_center_and_the_aspect_ratio(folder: Path) -> None:
    # 64 high, 128 wide: red, with the central square green. Only that is kept.
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    wide.paste((0, 255, 0), (32, 0, 96, 64))
    wide.save(folder / "test" / "green" / "0.png")
    image = load(folder).test.in_memory().images[1]
    # Averaging reaches one pixel beyond the cut, so that the outermost columns have a share of red.
    assert torch.equal(image[:, :, 1:-1], torch.tensor([0, 255, 0]).byte().view(3, 1, 1).expand(3, 32, 30))
    assert image[0].max() < 64


def test_folder_fingerprint_depends_on_pixels_labels_and_class_names(folder: Path) -> None:
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


def test_image_lister_follows_links_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "one.png", (255, 0, 0))
    for part in ("train", "test"):
        write_image(elsewhere / part / "0.png", (255, 255, 0))
        (folder / part / "yellow").symlink_to(elsewhere / part)
    (folder / "train" / "red" / "linked.png").symlink_to(elsewhere / "one.png")
    data = load(folder)
    assert data.classes == ("blue", "green", "red", "yellow")
    assert data.train.labels.bincount().tolist() == [3, 4, 6, 1]


def test_folder_needs_a_data_dir() -> None:
    with pytest.raises(DeatError, match="--dataset folder needs --data-dir"):
        load_data("folder")


@pytest.mark.parametrize("part", ["train", "test"])
def test_folder_needs_train_and_test(folder: Path, part: str) -> None:
    (folder / part).rename(folder / "other")
    with pytest.raises(DeatError, match=f"--data-dir {folder} has no folder {part}"):
        load(folder)


def test_folder_refuses_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=f"the folder of the images, {tmp_path / 'nowhere'}, does not exist: give"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, -8])
def test_folder_refuses_image_sizes_below_1(folder: Path, size: int) -> None:
    with pytest.raises(DeatError, match=f"--image-size {size} "):
        load(folder, size)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "truncated"], ids=["empty", "html", "cut"])
def test_read_image_names_a_damaged_image(folder: Path, content: bytes | str) -> None:
    path = folder / "train" / "green" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500] if isinstance(content, str) else content)
    with pytest.raises(DeatError, match=f"{path} cannot be read as an image"):
        load(folder)


def test_image_lister_refuses_a_broken_link(folder: Path) -> None:
    (folder / "train" / "red" / "gone.png").symlink_to(folder / "gone.png")
    with pytest.raises(DeatError, match=r"gone\.png is a broken link, since .*gone\.png does not exist: repair"):
        load(folder)


def test_read_image_refuses_more_than_8_bits(folder: Path) -> None:
    path = folder / "train" / "red" / "deep.png"
    Image.fromarray(np.full((32, 32), 4000, dtype=np.uint16)).save(path)
    with pytest.raises(DeatError, match=f"{path} has more than 8 bits"):
        load(folder)


@pytest.mark.parametrize("part", ["train", "test"])
def test_image_lister_refuses_a_class_without_images(folder: Path, part: str) -> None:
    for name in ("train", "test"):
        (folder / name / "yellow").mkdir()
    write_image(folder / {"train": "test", "test": "train"}[part] / "yellow" / "0.png", (255, 255, 0))
    (folder / part / "yellow" / "notes.txt").write_text("no image")
    with pytest.raises(DeatError, match=f"{folder / part / 'yellow'} has no images"):
        load(folder)


def test_folder_refuses_fewer_than_two_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DeatError, match="train has no classes: at least two are needed"):
        load(tmp_path)
    for part in ("train", "test"):
        write_image(tmp_path / part / "red" / "0.png", (255, 0, 0))
    with pytest.raises(DeatError, match="train has only one class, red: at least two are needed"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_folder_refuses_different_classes_in_train_and_test(folder: Path, part: str) -> None:
    write_image(folder / part / "yellow" / "0.png", (255, 255, 0))
    with pytest.raises(DeatError, match=r"the class 'yellow' is in only one of .*train and .*test"):
        load(folder)


# What is left out, and what is refused.


def test_image_lister_leaves_out_hidden_and_system_names_and_counts_them(folder: Path) -> None:
    before = load(folder)
    for part in ("train", "test"):
        for place in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "red/.ipynb_checkpoints", "red/@eaDir/x"):
            write_image(folder / part / place / "0-checkpoint.png", (1, 2, 3))
        write_image(folder / part / "red" / "._0.png", (1, 2, 3))
    data = load(folder)
    assert ImageLister().class_names(folder / "train") == list(data.classes)
    assert (data.classes, data.fingerprint) == (before.classes, before.fingerprint)
    assert data.left_out == {"hidden": 12}
    assert data.notes == ("12 files skipped: hidden (12)",)


def test_image_lister_counts_files_of_other_types_by_suffix(folder: Path) -> None:
    for number, name in enumerate(("a.heic", "b.HEIC", "c.txt", "LICENSE")):
        (folder / "train" / "red" / name).write_bytes(bytes(number))
    (folder / "test" / "list.csv").touch()
    lister = ImageLister()
    lister.classes(folder / "train")
    assert lister.left_out == {".heic": 2, ".txt": 1, "no suffix": 1}
    (note,) = load(folder).notes
    assert note.startswith("5 files skipped: .heic (2), ")
    assert "outside the class folders (1)" in note


def test_image_lister_of_a_class_of_other_types_says_which(folder: Path) -> None:
    for path in (folder / "train" / "red").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DeatError, match=r"red has no images \(5 files skipped: \.heic \(5\)\): add some"):
        load(folder)


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".gif", ".jp2", ".tga", ".webp", ".pbm", ".apng"])
def test_image_lister_reads_what_pillow_reads(folder: Path, suffix: str) -> None:
    Image.new("RGB", (32, 32), (255, 0, 0)).save(folder / "train" / "red" / f"more{suffix}")
    data = load(folder)
    assert (len(data.train), data.left_out) == (13, Counter())


@pytest.mark.parametrize("target", [".", "..", "../..", "../green"])
def test_image_lister_refuses_a_link_to_a_folder_that_is_read_already(folder: Path, target: str) -> None:
    (folder / "train" / "red" / "more").symlink_to(target)
    with pytest.raises(DeatError, match=r"is the same folder as .*, through a link: remove the link"):
        load(folder)


@pytest.mark.parametrize(
    ("link", "target"), [("test", "train"), ("test/red", "../train/red"), ("test/red/more", "../../train/red")]
)
def test_load_data_refuses_test_images_that_are_links_to_training_images(folder: Path, link: str, target: str) -> None:
    if (folder / link).is_dir():
        shutil.rmtree(folder / link)
    (folder / link).symlink_to(target)
    for test_only in (False, True):
        with pytest.raises(DeatError, match=r"is the same folder as .*train.*, through a link"):
            load_data("folder", data_dir=folder, image_size=8, test_only=test_only)


def test_image_lister_refuses_a_class_that_is_a_link_to_another(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "rouge").symlink_to("red")
    with pytest.raises(DeatError, match=r"rouge is the same folder as .*red, through a link"):
        load(folder)


def test_image_lister_refuses_a_link_to_itself_and_a_pipe(folder: Path) -> None:
    (folder / "train" / "red" / "self").symlink_to("self")
    with pytest.raises(DeatError, match=r"self cannot be read: .*symbolic links"):
        load(folder)
    (folder / "train" / "red" / "self").unlink()
    os.mkfifo(folder / "train" / "red" / "pipe.png")
    with pytest.raises(DeatError, match=r"pipe\.png is not a regular file: remove it"):
        load(folder)


@pytest.mark.parametrize("link", ["train/pink", "train/red/more", "test/red/more.png", "train/red/notes.txt"])
def test_image_lister_refuses_a_broken_link_by_its_name(folder: Path, link: str) -> None:
    (folder / link).symlink_to("nowhere")
    with pytest.raises(DeatError, match=rf"{link} is a broken link, since nowhere does not exist: repair or remove it"):
        load(folder)


def test_load_data_says_which_images_are_links_to_others_of_their_class(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "one.png", (255, 0, 0))
    (folder / "train" / "red" / "one.png").symlink_to(elsewhere / "one.png")
    assert load(folder).notes == ()
    (folder / "train" / "red" / "a.png").symlink_to("0.png")
    data = load(folder)
    assert (data.notes, len(data.train)) == (
        ("1 image is a link to another image of the same class, which counts again",),
        14,
    )
    (folder / "test" / "red" / "b.png").symlink_to(folder / "test" / "red" / "0.png")
    (folder / "train" / "red" / "two.png").symlink_to(elsewhere / "one.png")
    # The folder may itself be reached through a link.
    linked = elsewhere / "linked"
    linked.symlink_to(folder)
    (note,) = load(linked).notes
    assert note == "3 images are links to another image of the same class, which counts again"


@pytest.mark.parametrize(
    ("link", "target", "where"),
    [
        ("train/red/b.png", "../blue/0.png", "in two classes"),
        ("test/red/b.png", "../../train/red/0.png", "in the training and the test images"),
        ("train/red/b.png", "../../test/red/0.png", "in the training and the test images"),
    ],
)
def test_load_data_refuses_links_to_images_of_other_classes_and_parts(
    folder: Path, link: str, target: str, where: str
) -> None:
    (folder / link).symlink_to(target)
    with pytest.raises(
        DeatError, match=rf"0\.png and .*b\.png are the same file \(through a link\) {where}: remove one"
    ):
        load(folder)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can read, as a test cannot take permissions away from root."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        for part in ("train", "test"):
            for name, colour in COLOURS.items():
                write_image(Path(root, part, name, "0.png"), colour)
                write_image(Path(root, part, name, "sub", "1.png"), colour)
        yield Path(root)


@pytest.mark.parametrize("place", [".", "train", "train/red", "train/red/sub", "train/red/0.png"])
def test_folder_without_read_permission_is_refused(public_folder: Path, place: str) -> None:
    path = public_folder / place
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)

    def refused() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)  # nobody
        with pytest.raises(DeatError, match=r"cannot be read: Permission denied$") as refusal:
            load(public_folder)
        assert str(path) in str(refusal.value)

    assert run_in_child(refused)
    path.chmod(mode)


def test_folder_refuses_names_that_are_not_utf8(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_image(folder / "train" / "red" / f"{name}.png", (255, 0, 0))
    assert len(load(folder).train) == 13, "a file may have any name"
    for part in ("train", "test"):
        write_image(folder / part / name / "0.png", (1, 2, 3))
    with pytest.raises(DeatError, match=r"the class folder .*train/caf\\xe9 has a name that is not UTF-8: rename it"):
        load(folder)
    (tmp_path / name).mkdir()
    for dataset in ("folder", "cifar10"):
        with pytest.raises(DeatError, match=r"--data-dir .*caf\\xe9 has a name that is not UTF-8: rename it"):
            load_data(dataset, data_dir=tmp_path / name)


def test_folder_names_classes_that_differ_in_unicode_normalization(folder: Path) -> None:
    write_image(folder / "train" / "caf\u00e9" / "0.png", (1, 2, 3))
    write_image(folder / "test" / "cafe\u0301" / "0.png", (1, 2, 3))
    with pytest.raises(DeatError, match=r"in only one of .*in different Unicode normalization forms"):
        load(folder)
    write_image(folder / "train" / "cafe\u0301" / "0.png", (1, 2, 3))
    write_image(folder / "test" / "caf\u00e9" / "0.png", (1, 2, 3))
    with pytest.raises(DeatError, match="train has the class 'caf\u00e9' twice, in different Unicode norm"):
        load(folder)


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_folder_counts_images_with_transparency(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_limit: int | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "train" / "red" / "a.png")
    Image.new("LA", (32, 32), (0, 0)).save(folder / "test" / "red" / "a.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 255)).save(folder / "train" / "red" / "opaque.png")
    data = load_data("folder", data_dir=folder, memory_limit=memory_limit)
    assert data.transparency == "2 images have transparency and were composited on white"


def test_paths_returns_paths_of_any_name() -> None:
    names = ["a", "", "ä/ö.png", os.fsdecode(b"\xff\xfe.png"), "b" * 300]
    paths = Paths.of(names)
    assert [str(paths[number]) for number in range(5)] == ["a", ".", *names[2:]]
