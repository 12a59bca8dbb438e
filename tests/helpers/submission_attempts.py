"""Ways to prepare an untrusted submission from a valid one."""

from __future__ import annotations

import io
import json
import os
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from board_problems import SHARES, FakeEvaluation, bare_state, claim, make_checkpoint, make_run, network, report_of
from torch import Tensor

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.robustbench.format import ExportPaths
from deat_rb.utils import safe_load

NAME = "Evil2026Model"


@dataclass
class Attempt:
    """A submission in preparation.

    Attributes:
        folder: Working folder.
        board: The board's folder.
        fake: The board's measurements.
        limit: Sets the size limit of weights, for the test only.
        target: The submitted path.
        metadata: Declared metadata.
        options: Options of `Board.submit`.
    """

    folder: Path
    board: Path
    fake: FakeEvaluation
    limit: Callable[[int], None]
    target: Path = Path()
    metadata: dict[str, Any] = field(default_factory=lambda: {"model_name": NAME})
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **changes: Any) -> Path:
        self.target = make_run(self.folder / "run", **changes)
        return self.target

    def checkpoint(self, state: Any = None, **changes: Any) -> Path:
        self.target = make_checkpoint(self.folder / "export", NAME, state, **changes)
        self.metadata["data_dir"] = self.folder
        return self.target

    @property
    def info(self) -> Path:
        return ExportPaths.below(self.folder / "export", "cifar10", NAME).info

    def submit(self) -> Entry:
        return Board(self.board).submit(self.target, SubmissionMetadata(**self.metadata), **self.options)


Setup = Callable[[Attempt], Any]


def declared(**metadata: Any) -> Setup:
    """A valid run with declared metadata."""
    return lambda it: (it.run(), it.metadata.update(metadata))


def info(**changes: Any) -> Setup:
    """A valid checkpoint with changes to its model_info."""
    return lambda it: it.checkpoint(**changes)


def raw_info(data: bytes) -> Setup:
    """A valid checkpoint with another model_info."""
    return lambda it: (it.checkpoint(), it.info.write_bytes(data))


def metrics(data: bytes) -> Setup:
    """A valid run with other metrics."""
    return lambda it: (it.run() / "metrics.jsonl").write_bytes(data)


def written(data: bytes) -> Setup:
    """A checkpoint of these bytes."""
    return lambda it: it.checkpoint().write_bytes(data)


def weights(name: str, change: Callable[[Tensor], Tensor | None]) -> Setup:
    """A valid checkpoint with one tensor changed or, if that gives None, left out."""
    changed = {key: change(value) if key == name else value for key, value in bare_state().items()}
    return lambda it: it.checkpoint({key: value for key, value in changed.items() if value is not None})


def extra(content: Any, name: str = "extra") -> Setup:
    """A valid checkpoint with one more item."""
    return lambda it: it.checkpoint({**bare_state(), name: content})


def edited(name: str, **changes: Any) -> Setup:
    """A valid run with changes to one of its JSON files; dicts are merged."""

    def setup(it: Attempt) -> None:
        path = it.run() / name
        content = json.loads(path.read_text())
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(content))

    return setup


def replaced(name: str, old: str, new: str) -> Setup:
    """A valid run with a text replaced in one of its files."""

    def setup(it: Attempt) -> None:
        path = it.run() / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return setup


def truncated(name: str, size: int) -> Setup:
    """A valid run with one file cut, or grown by zeros that take no space."""
    return lambda it: os.truncate(it.run() / name, size)


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Expanded:
    """Pickles to a tensor with stride 0, which torch.save would not write so."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __reduce__(self) -> Any:
        import torch._utils

        storage = torch.zeros(1).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, tuple([0] * len(self.shape)), False, {})


def repacked(*, compression: int = zipfile.ZIP_STORED, pkl: bytes | None = None, more: dict[str, bytes] | None = None,
             rename: Callable[[str], str] = str) -> bytes:  # fmt: skip
    """A valid checkpoint's archive with changes; weights are zeros where it is compressed."""
    state = {name: value * (compression == zipfile.ZIP_STORED) for name, value in bare_state().items()}
    file, changed = io.BytesIO(), io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as valid, zipfile.ZipFile(changed, "w", compression) as archive:
        for name in valid.namelist():
            archive.writestr(rename(name), pkl if pkl is not None and name.endswith("data.pkl") else valid.read(name))
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return changed.getvalue()


def bomb(data: bytes, limit: int) -> Setup:
    """A checkpoint that is below the size limit, and above it when unpacked."""

    def setup(it: Attempt) -> None:
        written(data)(it)
        it.limit(limit)

    return setup


def overlapping() -> bytes:
    """An archive with many members on the same bytes, as in the quoted zip bomb."""
    data = repacked()
    end_at = data.rindex(b"PK\5\6")
    start = int.from_bytes(data[end_at + 16 : end_at + 20], "little")
    record = next(each for each in data[start:end_at].split(b"PK\1\2")[1:] if b"data/0" in each)
    more = b"".join(b"PK\1\2" + record.replace(b"data/0", b"data/%d" % digit) for digit in range(1, 10)) * 60
    end = bytearray(data[end_at:])
    members = int.from_bytes(end[10:12], "little")
    end[8:10] = end[10:12] = (members + 9 * 60).to_bytes(2, "little")
    end[12:16] = (end_at - start + len(more)).to_bytes(4, "little")
    return data[:end_at] + more + bytes(end)


def linked(name: str) -> Setup:
    """A valid run with one file replaced by a symlink to it."""

    def setup(it: Attempt) -> None:
        path = it.run() / name
        path.rename(it.folder / "secret")
        path.symlink_to(it.folder / "secret")

    return setup


def linked_export(it: Attempt) -> None:
    """An export whose folder of weights is a symlink to the board keeper's own."""
    folder = it.checkpoint().parent
    folder.rename(it.folder / "keepers")
    folder.symlink_to(it.folder / "keepers")
    it.target = it.folder / "export"


def linked_board(it: Attempt) -> None:
    it.run()
    (it.board / "entries/digits").rename(it.folder / "away")
    (it.board / "entries/digits").symlink_to(it.folder / "away")


def special(make: Callable[[str], Any]) -> Setup:
    """A valid run with a pipe, socket or folder instead of its weights."""

    def setup(it: Attempt) -> None:
        path = it.run() / "last.safetensors"
        path.unlink()
        make(str(path))

    return setup


def bind(path: str) -> None:
    here = os.getcwd()
    os.chdir(Path(path).parent)  # a socket's path has to be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(Path(path).name)
    finally:
        os.chdir(here)


def claimed(*, sample: int = 500, **shares: float) -> Setup:
    """A run whose own evaluation has other accuracies than the board's measurement."""

    def setup(it: Attempt) -> None:
        valid = json.loads((it.run() / "eval.json").read_text())
        it.options["sample"] = sample
        same = {key: valid[key] for key in ("provenance", "model_sha256", "examples_sha256")}
        report_of(500, shares={**SHARES, **shares}, **same).save(it.target)

    return setup


def result(**changes: Any) -> Setup:
    """A run whose AutoAttack result was edited or, without changes, removed."""

    def setup(it: Attempt) -> None:
        content = json.loads((it.run() / "eval.json").read_text())
        content["results"]["autoattack"].update(changes)
        if not changes:
            del content["results"]["autoattack"]
        (it.target / "eval.json").write_text(json.dumps(content))
        (it.target / "eval-verdicts.safetensors").unlink()

    return setup


def verdicts(change: Callable[[Tensor], Tensor]) -> Setup:
    def setup(it: Attempt) -> None:
        path = it.run() / "eval-verdicts.safetensors"
        safe_load.save_tensors(path, {name: change(value) for name, value in safe_load.load_tensors(path).items()})

    return setup


FAILED = (Check(name="gradients present", status="fail", figure=0.0, sentence="There are none."),)


def own_checks(it: Attempt) -> None:
    claim(it.run(), checks=FAILED)


def measured_checks(it: Attempt) -> None:
    it.run()
    it.fake.checks = FAILED


def other_weights(it: Attempt) -> None:
    safe_load.save_tensors(it.run() / "last.safetensors", network(1).state_dict())


def another_eps(it: Attempt) -> None:
    it.run()
    it.fake.shares["pgd-100"] = 0.0
