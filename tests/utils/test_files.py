from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from deat_rb.utils import files
from deat_rb.utils.errors import DeatError


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.atomic_write(path, b"old")
    files.atomic_write(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_atomic_write_has_the_usual_permissions(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_atomic_write_on_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(DeatError, match=r"cannot write .*a\.bin: No space left on device"):
        files.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_atomic_write_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a.bin"])


def test_write_all_writes_all_files_or_none(tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"old")
    with pytest.raises(DeatError, match=r"cannot write .*second: No such file or directory"):
        files.write_all({tmp_path / "first": b"new", tmp_path / "missing" / "second": b"new"})
    assert ((tmp_path / "first").read_bytes(), os.listdir(tmp_path)) == (b"old", ["first"])


def test_write_json_and_read_json_round_trip(tmp_path: Path) -> None:
    content = {"eps": "8/255", "numbers": [1, 0.1, None, True], "word": "Müller"}
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content
    assert "Müller" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="JSON does not support NaN"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_write_json_refuses_text_that_is_not_unicode(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match=r'a\.json: "classes": "caf\\udce9" is not UTF-8; rename the file or folder'):
        files.write_json(tmp_path / "a.json", {"word": "Müller", "classes": os.fsdecode(b"caf\xe9")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff{}", b"[" * 100_000])
def test_read_json_refuses_invalid_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(DeatError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [files.read_json, files.sha256_file])
def test_reading_refuses_a_missing_file_and_a_folder(tmp_path: Path, read: Any) -> None:
    with pytest.raises(DeatError, match=r"gone\.pt does not exist"):
        read(tmp_path / "gone.pt")
    with pytest.raises(DeatError, match="is a folder; give a file"):
        read(tmp_path)


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "a") == expected == hashlib.sha256(b"abc").hexdigest()
