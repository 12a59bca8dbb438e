from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import WRAPPERS, load_state_dict, load_tensors, save_tensors, sha256_tensors

WEIGHTS = {
    "conv.weight": torch.arange(12.0).reshape(1, 3, 2, 2),
    "bn.num_batches_tracked": torch.tensor(7),
    "half": torch.tensor([0.1, -0.0, float("inf")], dtype=torch.bfloat16),
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_save_tensors_keeps_values_of_views_and_channels_last(tmp_path: Path) -> None:
    shared = torch.arange(24.0).reshape(2, 3, 2, 2)
    tensors = {**WEIGHTS, "a": shared, "b": shared[:, 1:], "c": shared.to(memory_format=torch.channels_last)}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    save_tensors(tmp_path / "a.safetensors", tensors, {"epoch": "3"})
    assert_same(load_tensors(tmp_path / "a.safetensors"), tensors)
    header = (tmp_path / "a.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"epoch":"3"}' in header


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, *WRAPPERS])
def test_load_tensors_reads_torch_save_and_strips_module(tmp_path: Path, legacy: bool, key: str | None) -> None:
    prefixed = OrderedDict((f"module.{name}", tensor) for name, tensor in WEIGHTS.items())
    content = prefixed if key is None else {"epoch": 3, key: prefixed, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(load_tensors(tmp_path / "a.pt"), WEIGHTS)


def test_load_tensors_recognizes_safetensors_by_content(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.bin", WEIGHTS)
    assert_same(load_tensors(tmp_path / "a.bin"), WEIGHTS)


class Touch:
    """Pickled code: unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", [0, 2, 4, 5, "zip", "legacy"])
def test_load_tensors_does_not_run_pickled_code(tmp_path: Path, how: int | str) -> None:
    path, content = tmp_path / "a.pt", {"weight": Touch(tmp_path / "executed")}
    if isinstance(how, int):
        path.write_bytes(pickle.dumps(content, protocol=how))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(
        DeatError,
        match=r"a\.pt (holds pickled objects .* can run code: save only the weights|is truncated or not a checkpoint)",
    ) as refusal:
        load_tensors(path)
    if how in (2, "zip", "legacy"):
        assert re.search(r"\(_?io\.open\)", str(refusal.value)), "Python 3.12 says _io"
    assert not (tmp_path / "executed").exists()
    if isinstance(how, int):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "the file must really hold code"


@pytest.mark.parametrize("legacy", [False, True])
def test_load_tensors_refuses_a_tensor_larger_than_the_file(tmp_path: Path, legacy: bool) -> None:
    content = {"w": torch.zeros(1).expand(10**5, 10**5)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DeatError, match=r"tensor w in .*a\.pt claims 40000000000 bytes, more than the file"):
        load_tensors(tmp_path / "a.pt")


def test_load_tensors_refuses_a_pickled_model(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(DeatError, match=r"holds pickled objects \(.*Linear.*: save only the weights, with torch\.save"):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_load_tensors_refuses_truncated_files(tmp_path: Path, how: str, share: float) -> None:
    path = tmp_path / ("a.safetensors" if how == "safetensors" else "a.pt")
    if how == "safetensors":
        save_tensors(path, WEIGHTS)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=how == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DeatError, match=rf"{path.name} is truncated or (not a checkpoint|not a safetensors file)"):
        load_tensors(path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_load_tensors_refuses_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DeatError, match=f"{name} is empty"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html>Google Drive - Quota exceeded", b"\xef\xbb\xbf\n <HTML><head>"]
)
def test_load_tensors_refuses_a_web_page(tmp_path: Path, name: str, page: bytes) -> None:
    (tmp_path / name).write_bytes(page)
    with pytest.raises(DeatError, match=f"{name} is a web page, probably a failed download"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "data", [b"hello world, no checkpoint", bytes(1000), b"PK\x03\x04" + bytes(50), b"\x80\x02}q\x00."]
)
def test_load_tensors_refuses_other_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(DeatError, match=r"a\.pt (is truncated or not a checkpoint|does not contain a state dict)"):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{}, {"a": 1.0}, [torch.ones(1)], torch.ones(1), {"a": torch.ones(1), "b": 2},
                                     {1: torch.ones(1)}, {"state_dict": {"a": "text"}}])  # fmt: skip
def test_load_tensors_refuses_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DeatError, match="does not contain a state dict"):
        load_tensors(tmp_path / "a.pt")


def test_load_tensors_refuses_a_safetensors_header_beyond_the_file(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(DeatError, match="truncated or not a safetensors file"):
        load_tensors(tmp_path / "a.safetensors")


def test_sha256_tensors_depends_on_values_not_on_memory_format() -> None:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    digest = sha256_tensors({"a": base, "b": torch.tensor(1)})
    assert digest == sha256_tensors({"b": torch.tensor(1), "a": base.to(memory_format=torch.channels_last)})
    others: list[dict[str, torch.Tensor]] = [
        {"a": base.reshape(3, 2, 2, 2), "b": torch.tensor(1)},
        {"a": base.double(), "b": torch.tensor(1)},
        {"a": base, "b": torch.tensor(2)},
        {"a": base, "c": torch.tensor(1)},
    ]
    assert len({digest, *map(sha256_tensors, others)}) == 5


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.eye(3, device="meta"),
        torch.eye(3, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "rows", "meta", "complex", "quantized"],
)
def test_load_tensors_refuses_tensors_that_are_not_dense_and_real(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({**WEIGHTS, "odd": tensor}, tmp_path / "a.pt")
    with pytest.raises(DeatError, match=r"tensor odd in .*a\.pt is sparse, quantized, complex or on the meta device"):
        load_tensors(tmp_path / "a.pt")


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


OTHER = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
BESIDE = {
    "state_dict_ema": {"epoch": 3, "state_dict": OTHER, "state_dict_ema": WEIGHTS},
    "model_ema": {"model": OTHER, "model_ema": WEIGHTS},
    "ema.shadow": {"net": OTHER, "ema": {"decay": 0.999, "shadow": {f"module.{k}": v for k, v in WEIGHTS.items()}}},
    "swa_model": {"model": OTHER, "swa_model": {"n_averaged": torch.tensor(3), **WEIGHTS}},
    "best": {"last": OTHER, "best": WEIGHTS},
    "ema_model": {"state_dict": {f"model.{name}": each for name, each in OTHER.items()}, "ema_model": WEIGHTS},
}


@pytest.mark.parametrize("key", BESIDE)
def test_load_state_dict_names_other_weights_in_the_file_and_loads_the_chosen_ones(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path / "a.pt", BESIDE[key])
    usual = load_state_dict(path)
    assert all(not tensor.any() for tensor in usual.tensors.values())
    assert usual.others == (key,)
    assert usual.note == f"loaded the weights under '{usual.key}'; the file also has '{key}': choose with --weights-key"
    chosen = load_state_dict(path, key)
    assert (chosen.key, chosen.others) == (key, (usual.key,))
    assert_same({name: tensor for name, tensor in chosen.tensors.items() if name != "n_averaged"}, WEIGHTS)


def test_load_state_dict_of_one_state_dict_has_no_note(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    path = saved(tmp_path / "a.pt", {"model": WEIGHTS, "optimizer": optimizer, "loss": torch.tensor(1.0)})
    assert load_state_dict(path).note == load_state_dict(saved(tmp_path / "b.pt", WEIGHTS)).note == ""


@pytest.mark.parametrize("key", ["generator", "checkpoint.backbone"])
def test_load_state_dict_accepts_any_key_of_a_single_state_dict(tmp_path: Path, key: str) -> None:
    content: Any = WEIGHTS
    for name in reversed(key.split(".")):
        content = {name: content, "epoch": 1}
    content["metrics"] = {"loss": torch.tensor(0.1)}
    found = load_state_dict(saved(tmp_path / "a.pt", content))
    assert found.key == key
    assert_same(found.tensors, WEIGHTS)


def test_load_state_dict_asks_which_of_several_unusual_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"teacher": WEIGHTS, "student": OTHER})
    with pytest.raises(DeatError, match="has several state dicts: give --weights-key one of 'teacher', 'student'"):
        load_state_dict(path)
    with pytest.raises(DeatError, match="no state dict under 'x': give --weights-key one of 'teacher', 'student'"):
        load_state_dict(path, "x")
    with pytest.raises(DeatError, match="no state dict under 'x': it is a single state dict; omit --weights-key"):
        load_state_dict(saved(tmp_path / "b.pt", WEIGHTS), "x")


def test_load_state_dict_takes_a_prefix_of_the_names_as_key(tmp_path: Path) -> None:
    both = {f"{prefix}.{name}": each for prefix, of in (("ema", WEIGHTS), ("raw", OTHER)) for name, each in of.items()}
    assert_same(load_state_dict(saved(tmp_path / "a.pt", both), "ema").tensors, WEIGHTS)
