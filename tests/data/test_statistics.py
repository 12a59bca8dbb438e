from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from noise_folder import SIZE, TEST, TRAIN, assert_equal, load, make_folder, path_of
from PIL import Image

from deat_rb.data import statistics
from deat_rb.data.images import train_val_split
from deat_rb.utils.errors import DeatError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images")


def test_statistics_and_images_are_the_same_in_memory_and_in_files(folder: Path) -> None:
    in_memory, in_files = load(folder, None), load(folder)
    assert (in_files.fingerprint, in_files.mean, in_files.std) == (
        in_memory.fingerprint, in_memory.mean, in_memory.std
    )  # fmt: skip
    assert in_files.classes == in_memory.classes
    for ours, theirs in ((in_files.train, in_memory.train), (in_files.test, in_memory.test)):
        assert ours.shape == theirs.shape == (3, SIZE, SIZE)
        assert len(ours) == len(theirs)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.in_memory().images, theirs.in_memory().images)


def test_splits_and_subsets_are_the_same_in_memory_and_in_files(folder: Path) -> None:
    in_memory, in_files = load(folder, None), load(folder)
    for ours, theirs in zip(
        train_val_split(in_files.train, 6, seed=3), train_val_split(in_memory.train, 6, seed=3), strict=True
    ):
        assert_equal([ours.tensors()], [theirs.tensors()])
    chosen = torch.tensor([20, 3, 11])
    assert_equal([in_files.train.select(chosen).tensors()], [in_memory.train.select(chosen).tensors()])
    assert_equal([in_files.test.first(4).tensors()], [in_memory.test.first(4).tensors()])
    with pytest.raises(DeatError, match="first 7 of 6 images"):
        in_files.test.first(7)


@pytest.mark.parametrize("memory_limit", [0, None])
def test_cache_is_outside_of_the_folder_and_used(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, memory_limit: int | None
) -> None:
    before = sorted(folder.rglob("*"))
    first = load(folder, memory_limit)
    assert sorted(folder.rglob("*")) == before
    assert len(list(cache.rglob("*.json"))) == 1
    monkeypatch.setattr(statistics, "compute_statistics", None)
    again = load(folder.rename(folder.parent / "moved"))
    assert (again.fingerprint, again.mean, again.std) == (first.fingerprint, first.mean, first.std)


def test_cache_is_not_used_for_changed_files(folder: Path) -> None:
    first = load(folder)
    path = path_of(first.test, 0)
    times = path.stat()
    content = bytearray(path.read_bytes())
    image = Image.new("RGB", (SIZE, SIZE))
    image.save(path, format="BMP")
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0")[: len(content)])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert load(folder).fingerprint == load(folder, None).fingerprint != first.fingerprint


def test_cache_is_not_used_after_an_update_of_pillow_heif(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint, real = load(folder).fingerprint, metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.1" if name == "pillow-heif" else real(name))
    assert load(folder).fingerprint == fingerprint
    assert len(list(cache.rglob("*.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{}", '{"fingerprint": "a", "mean": [NaN], "std": [1]}'])
def test_cache_that_is_damaged_is_written_anew(folder: Path, cache: Path, content: str) -> None:
    fingerprint = load(folder).fingerprint
    (cached,) = cache.rglob("*.json")
    cached.write_text(content)
    assert load(folder).fingerprint == fingerprint
    assert json.loads(cached.read_text())["fingerprint"] == fingerprint


def test_cache_that_cannot_be_written_is_ignored(folder: Path, cache: Path) -> None:
    cache.write_text("a file where a folder would have to be")
    assert load(folder).fingerprint == load(folder, None).fingerprint


def test_compute_statistics_reports_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.data.image_folder.CHUNK_BYTES", 10 * 3 * SIZE * SIZE)
    seen: list[tuple[int, int]] = []
    data = load(folder, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(done, TRAIN + TEST) for done in (10, 20, 27, 33)]
    assert data.fingerprint == load(folder, None).fingerprint
