"""Whole files or none; nothing that was read is executed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from deat_rb.utils import files, safe_load
from deat_rb.utils.errors import DeatError

WEIGHTS = {
    "conv.weight": torch.arange(12.0).reshape(1, 3, 2, 2),
    "bn.num_batches_tracked": torch.tensor(7),
    "half": torch.tensor([0.1, -0.0, float("inf")], dtype=torch.bfloat16),
}


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.atomic_write(path, b"old")
    files.atomic_write(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(DeatError, match=r"cannot write .*a\.bin: No space left on device"):
        files.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a.bin"])


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"old")
    with pytest.raises(DeatError, match=r"cannot write .*second: No such file or directory"):
        files.write_all({tmp_path / "first": b"new", tmp_path / "missing" / "second": b"new"})
    assert ((tmp_path / "first").read_bytes(), os.listdir(tmp_path)) == (b"old", ["first"])


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"eps": "8/255", "numbers": [1, 0.1, None, True], "word": "Müller"}
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content
    assert "Müller" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="no NaN"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff{}", b"[" * 100_000])
def test_invalid_json_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(DeatError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [files.read_json, safe_load.load_tensors, files.sha256_file])
def test_missing_file_and_folder(tmp_path: Path, read: Any) -> None:
    with pytest.raises(DeatError, match=r"gone\.pt does not exist"):
        read(tmp_path / "gone.pt")
    with pytest.raises(DeatError, match="is a folder where a file is needed"):
        read(tmp_path)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_keep_their_values_whatever_their_memory(tmp_path: Path) -> None:
    shared = torch.arange(24.0).reshape(2, 3, 2, 2)
    tensors = {**WEIGHTS, "a": shared, "b": shared[:, 1:], "c": shared.to(memory_format=torch.channels_last)}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    safe_load.save_tensors(tmp_path / "a.safetensors", tensors, {"epoch": "3"})
    assert_same(safe_load.load_tensors(tmp_path / "a.safetensors"), tensors)
    header = (tmp_path / "a.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"epoch":"3"}' in header


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, *safe_load.WRAPPERS])
def test_state_dicts_of_torch_save(tmp_path: Path, legacy: bool, key: str | None) -> None:
    prefixed = OrderedDict((f"module.{name}", tensor) for name, tensor in WEIGHTS.items())
    content = prefixed if key is None else {"epoch": 3, key: prefixed, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(safe_load.load_tensors(tmp_path / "a.pt"), WEIGHTS)


def test_safetensors_of_any_name(tmp_path: Path) -> None:
    safe_load.save_tensors(tmp_path / "a.bin", WEIGHTS)
    assert_same(safe_load.load_tensors(tmp_path / "a.bin"), WEIGHTS)


class Touch:
    """Pickled code: unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", [0, 2, 4, 5, "zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, how: int | str) -> None:
    path, content = tmp_path / "a.pt", {"weight": Touch(tmp_path / "executed")}
    if isinstance(how, int):
        path.write_bytes(pickle.dumps(content, protocol=how))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(
        DeatError, match=r"a\.pt is (a pickle that would run code|truncated or no checkpoint)"
    ) as refusal:
        safe_load.load_tensors(path)
    if how in (2, "zip", "legacy"):
        assert "(io.open)" in str(refusal.value)
    assert not (tmp_path / "executed").exists()
    if isinstance(how, int):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "the file must really hold code"


class Makes:
    """Pickles to a call, here of something that takes as much memory as it is told to."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> Any:
        return self.called, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_takes_years_to_hash_is_refused(tmp_path: Path, legacy: bool) -> None:
    """A dict whose key is a tuple of a tuple twice, of a tuple twice, ...: torch's safe loader, too, hashes it."""
    nested = b"".join(b"h%ch%c\x86q%ca" % (level, level, level + 1) for level in range(60))
    years = b"\x80\x02]" + b")q\x00a" + nested + b"}h<K\x01s\x86."
    path = tmp_path / "a.pt"
    if legacy:
        path.write_bytes(years)
    else:
        torch.save(WEIGHTS, path)
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as hostile:
            for member in archive.namelist():
                hostile.writestr(member, years if member.endswith("data.pkl") else archive.read(member))
        path = tmp_path / "b.pt"
    with pytest.raises(DeatError, match="tuples in its pickle that are there again and again"):
        safe_load.load_tensors(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("called", [bytearray, torch.Tensor, torch.FloatTensor, torch.UntypedStorage])
def test_a_kilobyte_that_asks_for_gigabytes(tmp_path: Path, called: Any, legacy: bool) -> None:
    torch.save({"w": Makes(called, 10**6)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DeatError, match=rf"a\.pt has a pickle that makes a \S*{called.__name__} of any size"):
        safe_load.load_tensors(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["w"] is not None, "torch itself must fall for it"


def test_an_archive_that_grows(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10**5)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(DeatError, match=r"a\.pt would grow from \d+ to 4\d+ bytes"):
        safe_load.load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_larger_than_its_file(tmp_path: Path, legacy: bool) -> None:
    content = {"w": torch.zeros(1).expand(10**5, 10**5)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DeatError, match=r"its tensor w says that it takes 40000000000"):
        safe_load.load_tensors(tmp_path / "a.pt")


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(DeatError, match=r"would run code .*Linear"):
        safe_load.load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, how: str, share: float) -> None:
    path = tmp_path / ("a.safetensors" if how == "safetensors" else "a.pt")
    if how == "safetensors":
        safe_load.save_tensors(path, WEIGHTS)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=how == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DeatError, match=rf"{path.name} is truncated or (no checkpoint|not a safetensors file)"):
        safe_load.load_tensors(path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DeatError, match=f"{name} is empty"):
        safe_load.load_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html>Google Drive - Quota exceeded", b"\xef\xbb\xbf\n <HTML><head>"]
)
def test_web_page(tmp_path: Path, name: str, page: bytes) -> None:
    (tmp_path / name).write_bytes(page)
    with pytest.raises(DeatError, match=f"{name} is a web page, probably a failed download"):
        safe_load.load_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "data", [b"hello world, no checkpoint", bytes(1000), b"PK\x03\x04" + bytes(50), b"\x80\x02}q\x00."]
)
def test_other_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(DeatError, match=r"a\.pt (is truncated or no checkpoint|does not hold a state dict)"):
        safe_load.load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{}, {"a": 1.0}, [torch.ones(1)], torch.ones(1), {"a": torch.ones(1), "b": 2},
                                     {1: torch.ones(1)}, {"state_dict": {"a": "text"}}])  # fmt: skip
def test_what_is_no_dict_of_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DeatError, match="does not hold a state dict"):
        safe_load.load_tensors(tmp_path / "a.pt")


def test_safetensors_whose_header_lies(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(DeatError, match="truncated or not a safetensors file"):
        safe_load.load_tensors(tmp_path / "a.safetensors")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "a") == expected == hashlib.sha256(b"abc").hexdigest()


def test_sha256_of_tensors_sees_values_and_not_memory() -> None:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    digest = safe_load.sha256_tensors({"a": base, "b": torch.tensor(1)})
    assert digest == safe_load.sha256_tensors({"b": torch.tensor(1), "a": base.to(memory_format=torch.channels_last)})
    others: list[dict[str, torch.Tensor]] = [
        {"a": base.reshape(3, 2, 2, 2), "b": torch.tensor(1)},
        {"a": base.double(), "b": torch.tensor(1)},
        {"a": base, "b": torch.tensor(2)},
        {"a": base, "c": torch.tensor(1)},
    ]
    assert len({digest, *map(safe_load.sha256_tensors, others)}) == 5


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.eye(3, device="meta"),
        torch.eye(3, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "rows", "meta", "complex", "quantised"],
)
def test_what_are_no_plain_numbers(tmp_path: Path, tensor: torch.Tensor) -> None:
    """No network's weights could be made of these, or only by leaving something out."""
    torch.save({**WEIGHTS, "odd": tensor}, tmp_path / "a.pt")
    with pytest.raises(DeatError, match=r"a\.pt holds no plain numbers in its tensor odd, which is sparse, "):
        safe_load.load_tensors(tmp_path / "a.pt")
