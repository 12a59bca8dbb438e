"""Splits of image folders, and their facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from training_problems import ARCH

from deat_rb.cli import main
from deat_rb.data.datasets import load_data
from deat_rb.data.folder_info import folder_info
from deat_rb.data.folder_split import split_folder
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import plan
from deat_rb.utils.errors import DeatError


def write(path: Path, value: int, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> None:
    """Write an image that differs from those with other values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size)
    image.putpixel((0, 0), value % 256 if mode == "L" else (value % 256, value // 256 % 256, 7))
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """20 images of cats, 10 of dogs and 2 of foxes, of three animals per ten."""
    number = 0
    for name, count in (("cat", 20), ("dog", 10), ("fox", 2)):
        for at in range(count):
            number += 1
            write(tmp_path / "photos" / name / ("deep" if at % 2 else ".") / f"{name}{at // 3}-{at}.png", number)
    return tmp_path / "photos"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def test_split_is_stratified_complete_and_leaves_the_originals(photos: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    done = split_folder(photos)
    assert done.output == photos.parent / "photos-split"
    assert done.counts == {"cat": (16, 4), "dog": (8, 2), "fox": (1, 1)}
    train, test = names(done.output / "train"), names(done.output / "test")
    assert train | test == names(photos)
    assert not train & test
    assert {path: path.read_bytes() for path in photos.rglob("*.png")} == before
    link = done.output / "train" / min(train)
    assert (link.is_symlink(), link.resolve()) == (True, (photos / min(train)).resolve())
    data = load_data("folder", data_dir=done.output, image_size=8)
    assert torch.bincount(data.train.labels).tolist() == [16, 8, 1]


def test_split_links_through_a_parent_of_a_link(photos: Path, tmp_path: Path) -> None:
    (photos.parent / "deep").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shortcut = tmp_path / "elsewhere" / "shortcut"
    shortcut.symlink_to(photos.parent / "deep")
    done = split_folder(shortcut / ".." / photos.name, output=tmp_path / "out")
    assert names(done.output / "train") | names(done.output / "test") == names(photos)
    assert all(path.exists() for path in done.output.rglob("*.png"))


def test_split_depends_on_the_seed_only(photos: Path, tmp_path: Path) -> None:
    parts = [names(split_folder(photos, tmp_path / name, seed=seed, copy=True).output / "test")
             for name, seed in (("a", 0), ("b", 0), ("c", 1))]  # fmt: skip
    assert parts[0] == parts[1] != parts[2]
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))


def test_split_by_group_separates_no_group(photos: Path, tmp_path: Path) -> None:
    (photos / "fox" / "deep" / "fox0-1.png").rename(photos / "fox" / "deep" / "fox1-1.png")
    for seed in range(5):
        done = split_folder(photos, tmp_path / f"out{seed}", test=0.3, seed=seed, by_group=r"([a-z]+\d+)-")
        train, test = ({Path(name).name.split("-")[0] for name in names(done.output / part)}
                       for part in ("train", "test"))  # fmt: skip
        assert not train & test
        assert done.groups == 7 + 4 + 2
        assert done.counts["fox"] == (1, 1)
        # Groups of at most 3: the target of 6 of 20 is met within 1.
        assert abs(done.counts["cat"][1] - 6) <= 1


def test_split_keeps_identical_images_together(photos: Path, tmp_path: Path) -> None:
    for number in range(6):
        image = Image.open(photos / "cat" / f"cat0-{0}.png")
        image.save(photos / "cat" / f"again{number}.bmp")
    for seed in range(4):
        done = split_folder(photos, tmp_path / f"out{seed}", seed=seed)
        assert done.identical == 7
        assert not folder_info(done.output).across_parts()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"test": 1.0}, r"^--test 1 is invalid: give a share above 0 and below 1"),
        (None, {"by_group": "("}, r"^--by-group '\(' is not a regular expression: "),
        (None, {"by_group": r"cat(\d+)-"}, r"^--by-group 'cat\(\\d\+\)-' finds no group in 'dog/"),
        (None, {"by_group": "(fox|dog|cat)"}, r"^the class 'cat' has only images that belong together by --by-group"),
        (None, {"output": "photos/out"}, r"must not contain each other: give another folder$"),
        (None, {"output": "no/out"}, r"is in a folder that does not exist: create no$"),
        ("single", {}, r"^the class 'owl' has only one image, which cannot be split"),
        ("damaged", {}, r"bad.png cannot be read as an image: .*; deat-rb data info .* lists all problems$"),
        (
            "split",
            {},
            r"^.* has the folder test, so it is already split: give a folder with <class>/\*, "
            r"such as photos/test, or rename test if it is a class$",
        ),
        ("exists", {}, r"already exists: remove it, or give another folder$"),
    ],
)
def test_split_refuses_and_writes_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch, change: str | None, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(photos.parent)
    if change == "single":
        write(photos / "owl" / "0.png", 999)
    if change == "damaged":
        (photos / "cat" / "bad.png").write_text("x")
    if change == "split":
        write(photos / "test" / "0.png", 999)
    if change == "exists":
        (photos.parent / "photos-split").mkdir()
    before = sorted(photos.parent.rglob("*"))
    with pytest.raises(DeatError, match=message):
        split_folder("photos", **options)
    assert sorted(photos.parent.rglob("*")) == before


def test_info_of_a_split_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for part, count in (("train", 12), ("test", 2)):
        for at in range(count):
            write(root / part / "a" / f"{at}.png", at + 50 * (part == "test"), size=(4 + at, 3))
        write(root / part / "b" / "0.png", 200 + (part == "test"), mode="L")
    Image.open(root / "train" / "a" / "0.png").save(root / "test" / "a" / "same.tif")
    Image.open(root / "train" / "a" / "1.png").save(root / "train" / "b" / "same.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.new("RGBA", (2, 9), (9, 8, 7, 100))
    image.save(root / "train" / "b" / "turned.png", exif=turned)
    image.convert("RGB").save(root / "train" / "b" / "turned.tif", tiffinfo={0x0112: 6})
    (root / "train" / "a" / "notes.txt").touch()
    info = folder_info(root)
    train = info.parts["train"]
    assert (train.classes, info.parts["test"].classes) == ({"a": 12, "b": 4}, {"a": 3, "b": 1})
    assert (min(train.widths), max(train.widths)) == (4, 15)
    assert 9 in train.widths, "after the orientation is applied"
    assert train.modes == {"RGB": 14, "L": 1, "RGBA": 1}
    assert (train.turned, train.transparent) == (2, 1)
    assert info.across_parts() == [[("train", "a", "train/a/0.png"), ("test", "a", "test/a/same.tif")]]
    assert info.across_classes() == [[("train", "a", "train/a/1.png"), ("train", "b", "train/b/same.png")]]
    assert info.skipped == {".txt": 1}
    assert (info.problems, info.rare) == ([], [])
    shown = cli("info", root)
    assert shown.exit_code == 0
    joined = " ".join(shown.output.split())
    for text in ("train: 16 images in 2 classes", "1 group of identical images in several parts", "2 rotated by EXIF",
                 "test/a/same.tif", "1 file skipped: .txt (1)"):  # fmt: skip
        assert text in joined
    assert max(map(len, shown.output.splitlines())) <= 80
    assert json.loads(cli("info", root, "--json").output)["parts"]["train"]["widths"]["max"] == 15


def test_info_lists_every_problem(photos: Path) -> None:
    (photos / "cat" / "bad.png").write_text("x")
    (photos / "dog" / "gone.png").symlink_to("nowhere.png")
    Image.new("I;16", (3, 3)).save(photos / "dog" / "deep.png")
    (photos / "owl").mkdir()
    result = cli("info", photos)
    assert result.exit_code == 1
    assert "4 reasons why training would refuse the folder" in result.output
    for text in (
        "gone.png is a broken link, since nowhere.png",
        "bad.png cannot be read",
        "more than 8 bits",
        "owl has no images",
    ):
        assert text in result.output
    assert cli("info", photos / "nothing").exit_code == 2
    assert "has no class folders" in cli("info", photos / "owl").stderr


def test_a_class_may_be_named_train(photos: Path) -> None:
    (photos / "fox").rename(photos / "train")
    assert "all: 32 images in 3 classes" in cli("info", photos).output
    assert split_folder(photos).counts == {"cat": (16, 4), "dog": (8, 2), "train": (1, 1)}


def test_a_train_folder_of_classes_is_a_part_also_beside_other_folders(photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "root" / "extra" / "0.png", 999)
    photos.rename(tmp_path / "root" / "train")
    (tmp_path / "root" / "train" / "notes.txt").touch()
    with pytest.raises(DeatError, match="has the folder train, so it is already split: give a folder with"):
        split_folder(tmp_path / "root", tmp_path / "out")
    with pytest.raises(DeatError, match="has no folder test: it must contain train"):
        folder_info(tmp_path / "root")


def test_info_of_a_split_folder_with_a_broken_link_beside_its_parts(photos: Path) -> None:
    root = split_folder(photos).output
    (root / "latest").symlink_to("nowhere")
    info = folder_info(root)
    assert (list(info.parts), info.problems) == (["train", "test"], [])


def test_split_command_says_how_to_train(photos: Path) -> None:
    (photos / "notes.txt").touch()
    (photos / "cat" / "IMG_1.dng").touch()
    result = cli("split", photos, "--test", 0.5)
    assert result.exit_code == 0, result.output
    assert "50.0 % test images" in result.output
    assert "2 files skipped: outside the class folders (1), .dng (1)\n" in result.output
    assert f"deat-rb train --dataset folder --data-dir {photos}-split" in result.output


def test_val_is_the_test_set_without_test_and_the_validation_set_with_it(photos: Path, tmp_path: Path) -> None:
    root = split_folder(photos, tmp_path / "data", test=0.4, copy=True).output
    plain = load_data("folder", data_dir=root, image_size=32)
    (root / "test").rename(root / "val")
    as_test = load_data("folder", data_dir=root, image_size=32)
    assert as_test.notes == ("the test images are those of val, as in ImageNet",)
    assert as_test.fingerprint == plain.fingerprint
    assert as_test.val is None
    for at in range(3):
        for name in ("cat", "dog", "fox"):
            write(root / "test" / name / f"{at}.png", 1000 + at)
    both = load_data("folder", data_dir=root, image_size=32)
    assert both.notes == ("the validation images are those of val",)
    assert both.val is not None
    assert (len(both.train), len(both.test), len(both.val)) == (len(plain.train), 9, len(plain.test))
    assert both.fingerprint != as_test.fingerprint
    for limit in (0, None):  # from files, and in memory
        for test_only in (False, True):
            again = load_data("folder", data_dir=root, image_size=32, memory_limit=limit, test_only=test_only)
            assert again.fingerprint == both.fingerprint
    options = {"dataset": "folder", "data_dir": str(root), "arch": ARCH, "image_size": 32, "batch_size": 4,
               "method": "standard"}  # fmt: skip
    planned = plan(make_options(options), data=both)
    assert (len(planned.train), len(planned.val)) == (len(both.train), len(both.val))
    assert planned.val.labels.tolist() == both.val.labels.tolist()
    assert len(plan(make_options({**options, "val_size": 5}), data=both).val) == 5
    with pytest.raises(DeatError, match=r"^--val-size 99 cannot be taken from 13 images: give a number from 1 to 13$"):
        plan(make_options({**options, "val_size": 99}), data=both)
    (root / "valid").mkdir()
    with pytest.raises(DeatError, match="has the folders val and valid: keep only one of them"):
        load_data("folder", data_dir=root)


def test_data_shows_brackets_of_class_names(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / "photos" / "[bold]x" / f"{number}.png", number)
        write(tmp_path / "photos" / "[a]" / f"{number}.png", 10 + number)
    for command in ("info", "split"):
        shown = CliRunner().invoke(main, ["data", command, str(tmp_path / "photos")]).stdout
        assert {"[a]", "[bold]x"} <= set(shown.split())
