"""Malicious, broken and dishonest submissions, by kind: those that are refused, and archives that do no harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from board_problems import (
    INFO,
    SHARES,
    FakeEvaluation,
    bare_state,
    claim,
    make_checkpoint,
    make_run,
    network,
    report_of,
)
from torch import Tensor

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.leaderboard.untrusted import MAX_JSON
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
ZERO = "0" * 64
SCRIPT = "<script>alert(1)</script>"
ESCAPE = "x\x1b]0;owned\x07\x1b[2J"


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


# Kind, with the pattern of its refusals: name of the submission, and how it is made (with a pattern of its own).
# fmt: off
REFUSED: dict[tuple[str, str], dict[str, Setup | tuple[Setup, str]]] = {
    ("pickle that runs code", "pickled objects|truncated or not a checkpoint|damaged"): {
        "os.system": extra(Runs(os.system, "true")),
        "eval": extra(Runs(eval, "1")),
        "import": extra(Runs(__import__, "os")),
        "plain pickle": written(pickle.dumps({"w": Runs(os.system, "true")})),
        "protocol 4": written(repacked(pkl=pickle.dumps(Runs(os.system, "true"), 4))),
        "INST opcode": written(repacked(pkl=b"(S'true'\nios\nsystem\n.")),
        "whole model": lambda it: it.checkpoint(network()),
    },
    ("small file that asks for memory", "state dict|claims|sparse"): {
        "bytearray": extra(Runs(bytearray, 10**6)),
        "torch.Tensor": extra(Runs(torch.Tensor, 1000, 1000)),
        "sparse": extra(torch.zeros(9, 9).to_sparse()),
    },
    ("zip bomb", "is too large: it unpacks to"): {
        "deflate": bomb(repacked(compression=zipfile.ZIP_DEFLATED), 200_000),
        "bzip2": bomb(repacked(compression=zipfile.ZIP_BZIP2), 200_000),
        "lzma": bomb(repacked(compression=zipfile.ZIP_LZMA), 200_000),
        "overlapping members": (bomb(overlapping(), 600_000), "too large|truncated or not a checkpoint"),
    },
    ("tensors larger than their file", "claims|too large"): {
        "stride 0": lambda it: it.checkpoint({name: Expanded(*value.shape) for name, value in bare_state().items()}),
        "huge network": extra(Expanded(10**5, 10**5), "conv1.weight"),
        "many tensors": (lambda it: it.checkpoint({f"w{n}": torch.zeros(0) for n in range(20_001)}), "classifier"),
        "one storage for all": lambda it: it.checkpoint(
            {name: Expanded(*value.shape) if value.ndim == 4 else value for name, value in bare_state().items()}),
    },
    ("path tricks in an archive", "truncated or not a checkpoint"): {name: written(repacked(more={member: b"x"}))
        for name, member in {"up": "../../evil.txt", "absolute": "/etc/evil", "backslash": "..\\..\\evil"}.items()},
    ("archive with two meanings", "truncated or not a checkpoint"): {
        "two folders": written(repacked(more={"other/data.pkl": b"."})),
        "letters' case": written(repacked(more={"ARCHIVE/data/0": b"."})),
    },
    ("path tricks in names", "does not have the form"): {
        **{name: declared(model_name=bad) for name, bad in {
            "up": "../../Evil2026Model", "slash": "Evil2026Model/x", "dots": "Evil2026Model_..",
            "absolute": "/tmp/Evil2026Model", "backslash": "..\\Evil2026Model", "empty": "",
            "NUL": "Evil2026Model\0.json", "long": "Evil2026" + "A" * 300}.items()},
        **{name: (declared(dataset_name=bad), "dataset name .* is not valid") for name, bad in {
            "data up": "../entries", "data slash": "digits/x", "data dot": ".", "data case": "Digits"}.items()},
        "data in JSON": (info(dataset="../../x"), "dataset: .* is not valid"),
    },
    ("unicode tricks in names", "does not have the form"): {
        **{name: declared(model_name=bad) for name, bad in {
            "homoglyph": "Wang2021Gr\u0430dient", "full width": "Wang2021\uff27radient",
            "zero width": "Wang2021\u200bGradient", "right to left": "Wang2021Gradient_\u202egnp",
            "line end": "Wang2021Gradient\n", "digits": "Wang\u0662\u0660\u0662\u0661Gradient"}.items()},
        "case": (declared(model_name="Wang2021GRADIENT"), "only in upper and lower case"),
        "blank in JSON": (info(architecture="\u3164"), r"invisible character U\+3164"),
        "digits in JSON": (info(architecture="WideResNet-\u0661\u0660-1"), "digits other than 0 to 9"),
    },
    ("symlinks and devices", "is a symlink"): {
        **{name: (linked(name), f"{re.escape(name)} is a symlink; submit the file itself") for name in (
            "config.json", "metrics.jsonl", "eval.json", "eval-verdicts.safetensors", "last.safetensors")},
        "folder of an export": (linked_export, "Linf is a symlink"),
        "pipe": (special(os.mkfifo), "not a regular file"),
        "socket": (special(bind), "cannot read|not a regular file"),
        "folder": (special(os.mkdir), "not a regular file"),
        "link in the board": (linked_board, "is a symlink and may lead out of the board"),
    },
    ("HTML or script in a text", "has HTML"): {
        **{name: declared(**{name: f"x {SCRIPT}"}) for name in (
            "name", "authors", "venue", "footnote", "hardware", "dataset_note")},
        **{f"{name} in JSON": info(**{name: '<img src=x onerror="alert(1)">'}) for name in ("name", "architecture")},
        "entity": declared(footnote="&#60;script&#62;"),
        "versions": edited("config.json", versions={"torch": SCRIPT}),
        "hardware in config": lambda it: it.run(device=SCRIPT),
    },
    ("address that is none", "link: "): {name: info(link=bad) for name, bad in {
        "javascript": "javascript:alert(1)", "data": "data:text/html,x", "file": "file:///etc/passwd",
        "quote": 'https://a.org/" onclick="alert(1)', "user": "https://arxiv.org@evil.org/",
        "empty user": "https://:x@evil.org/", "port": "https://a.org:99999999/",
        "homoglyph": "https://\u0430rxiv.org/", "relative": "//evil.org"}.items()},
    ("impossible accuracy or number", "is not an accuracy in percent"): {
        **{name: info(clean_acc=bad) for name, bad in {
            "101": "101", "negative": "-1", "exponent": "1e2", "infinite": "inf", "words": "99,9"}.items()},
        "number": (info(clean_acc=83.3), "clean_acc: "),
        "NaN": (raw_info(b'{"dataset": "cifar10", "eps": "8/255", "x": NaN}'), "the number NaN"),
        "1e999": (raw_info(b'{"dataset": "cifar10", "eps": "8/255", "x": 1e999}'), "1e999, which is not finite"),
        **{f"eps {bad}": (info(eps=bad), r"eps: ") for bad in ("255", "nan/255", "8/nan", "inf")},
        "best known": (declared(external=99.0), "external 99.00 is above autoattack"),
        "metrics": (metrics(b'{"epoch": 1, "backwards": -Infinity}\n'), "the number -Infinity"),
        "metrics as text": (metrics(b'{"epoch": "1", "backwards": "0"}\n'), "metrics.jsonl, line 1: epoch"),
    },
    ("JSON that is huge, deep or broken", "is not valid JSON"): {
        "huge": (raw_info(json.dumps({**INFO, "footnote": "x" * MAX_JSON}).encode()), "is too large"),
        "huge and sparse": (truncated("eval.json", 2**36), "is too large"),
        "long text": (info(footnote="x" * 3000), "footnote: .* at most 2000"),
        "deep lists": raw_info(b"[" * 10**6),
        "deep objects": metrics(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
        "string without end": raw_info(b'"' + b'\\"' * 10**6),
        "many keys": (raw_info(json.dumps({**INFO, **dict.fromkeys(map(str, range(2000)))}).encode()), "0: Extra inp"),
        "no object": (raw_info(b"[]"), "is not a JSON object"),
        "long number": raw_info(b'{"x": ' + b"9" * 5000 + b"}"),
        "not UTF-8": raw_info(b'{"x": "\xff"}'),
        "half a character": (raw_info(json.dumps({**INFO, "name": "\ud800"}).encode()), "Invalid JSON"),
        "unknown field": (info(rank=1), "rank: "),
    },
    ("key that is there twice", "has the key '[a-z]+' twice"): {
        "model_info": raw_info(b'{"eps": "8/255", "eps": "1/255"}'),
        "config": replaced("config.json", '"epochs":2', '"epochs":2,"epochs":900'),
        "eval": replaced("eval.json", '"eps": 0.1', '"eps": 0.1, "eps": 0.01'),
    },
    ("weights of another network", "missing|unexpected|another shape|shapes differ|names differ"): {
        "missing": (weights("fc.bias", lambda w: None), "fc.bias"),
        "unexpected": (extra(torch.zeros(1), "evil"), "evil"),
        "shape": (weights("conv1.weight", lambda w: w[:, :1]), "conv1"),
        "odd name": extra(torch.zeros(1), "a\x1b[31m"),
        "file too large": (truncated("last.safetensors", 3 * 2**30), "is too large"),
    },
    ("weights of another dtype, or none", r"in torch\.\w+ instead of torch.float32"): {
        "half": weights("conv1.weight", Tensor.half),
        "integers": weights("conv1.weight", Tensor.long),
        "double": weights("conv1.weight", Tensor.double),
        "NaN": (weights("conv1.weight", lambda w: w * torch.nan), "has NaN or infinity"),
        "infinity": (weights("fc.bias", lambda w: w + torch.inf), "has NaN or infinity"),
        "sigma 0": (weights("sigma", lambda w: w * 0), "std"),
        "list": (lambda it: it.checkpoint([1, 2, 3]), "state dict"),
    },
    ("not a checkpoint", "truncated|not a checkpoint|damaged"): {
        "web page": (written(b"<!DOCTYPE html><html>quota exceeded</html>"), "is a web page"),
        "empty": (written(b""), "is empty"),
        "half a file": written(repacked()[:20000]),
        "half a safetensors": truncated("last.safetensors", 5000),
        "safetensors' head": lambda it: (it.run() / "last.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{" + b"x" * 99),
        "archive without pickle": written(repacked(rename=lambda name: name.replace("data.pkl", "data/9"))),
    },
    ("metadata that lie", "another architecture|another network|differ"): {
        "architecture": info(architecture="WideResNet-16-1"),
        "no such one": (info(architecture="GPT-5"), "GPT-5"),
        "enormous": (info(architecture="WideResNet-34-999"), "which is too large"),
        "data": (info(dataset="imagenet"), "imagenet"),
        "config's network": edited("config.json", network={"arch": "wrn-16-1"}),
        "config's classes": edited("config.json", network={"num_classes": 100}),
        "config's size": (edited("config.json", network={"image_size": 64}), "32x32"),
        "accuracy of model_info": (info(autoattack_acc="79.00"), "claims 79.00 % under autoattack"),
    },
    ("code in the architecture", "never runs submitted code|timm has no model"): {name: edited(
        "config.json", network={"arch": arch}) for name, arch in {
            "os": "os:system", "own": "evil_module:make", "hub": "timm:hf-hub:evil/model"}.items()},
    ("SHA-256 of something else", "is of other|was trained on another dataset"): {
        "weights": edited("eval.json", provenance={"weights_sha256": ZERO}),
        "data": edited("eval.json", provenance={"data_sha256": ZERO}),
        "network": edited("eval.json", model_sha256=ZERO),
        "images": edited("eval.json", examples_sha256=ZERO),
        "training data": edited("config.json", data_fingerprint=ZERO),
        "weights exchanged": other_weights,
    },
    ("evaluation that claims too much", r"claims \d+\.\d\d %"): {
        "too high": (claimed(autoattack=0.7), "claims 70.00 % under autoattack, but the board measured 40.00 %"),
        "too low": (claimed(natural=0.5, fgsm=0.5), "claims 50.00 % under natural, but the board measured 80.00 %"),
        "another eps": (another_eps, "under pgd-100, but the board measured 0.00 %"),
        "bf16": (edited("eval.json", precision="bf16"), "in bf16 and Linf"),
        "L2": (edited("eval.json", norm="L2"), "in fp32 and L2"),
        "does not add up": (result(accuracy=0.99), "99.00 % under autoattack with 200 of 500 correct"),
        "more than all": (result(n_correct=501, accuracy=1.002), "501 of 500"),
        "without AutoAttack": (result(), "has no autoattack"),
        "a little too high": (claimed(autoattack=0.46), "on 30 of 500 examples under autoattack"),
        "no verdicts": (lambda it: (it.run() / "eval-verdicts.safetensors").unlink(), "has no eval-verdicts"),
        "verdicts of NaN": (verdicts(lambda v: v * torch.nan), "has no verdicts, one for each example"),
        "one verdict": (verdicts(lambda v: v.any()), "has no verdicts, one for each example"),
        "other verdicts": (verdicts(lambda v: ~v), "verdicts"),
        "own checks": (own_checks, "eval.json of .* fails the check 'gradients present'"),
        "measured checks": (measured_checks, "fails the check 'gradients present'"),
        "too many examples": (edited("eval.json", n_examples=10**9), "of other test images|add up|examples"),
    },
    ("terminal escape codes", r"U\+001B"): {
        **{name: info(**{name: ESCAPE}) for name in ("name", "authors", "venue", "architecture", "footnote")},
        "key": (raw_info(json.dumps({**INFO, "\x1b[2J": 1}).encode()), r"\\x1b\[2J: "),
        "dataset": (declared(dataset_name="\x1b[2J"), r"'\\x1b\[2J' is not valid"),
        "bidi": (declared(venue="\u202eelcyc"), r"U\+202E"),
        "line end": (declared(venue="a\nproblem: none"), r"U\+000A"),
        "device": (lambda it: it.run(device="cpu\x9b2J"), r"U\+009B"),
    },
    ("spreadsheet formula", "which spreadsheets read as a formula"): {name: declared(venue=bad) for name, bad in {
        "equals": '=HYPERLINK("http://evil.org";"paper")', "plus": "+1+cmd", "minus": "-2+3", "at": "@SUM(1+1)",
        "after ;": "x;=1+1", "full width": "\uff1d1+1"}.items()},
    ("Markdown", "has Markdown in it"): {name: declared(venue=bad) for name, bad in {
        "link": "[paper](javascript:alert)", "image": "![x](http://evil.org/track.png)", "column": "x | 99.99 |",
        "code": "`x`"}.items()},
    ("TeX command", "has the TeX command|has Markdown"): {name: declared(venue=bad) for name, bad in {
        "input": r"\input{/etc/passwd}", "write18": r"\write18{id}", "catcode": r"\catcode`\%=0",
        "carets": "^^5cinput"}.items()},
}

HARMLESS = {
    "path tricks in an archive: inside": repacked(more={"archive/data/../../../evil": b"x"}),
    "path tricks in an archive: device": repacked(more={"archive/CON:": b"x"}),
    "path tricks in an archive: code": repacked(more={"archive/code/__torch__.py": b"x"}),
    "archive with two meanings: data.pkl twice": repacked(more={"archive//data.pkl": b"."}),
}
"""Checkpoints with more in their archive than torch reads: only their tensors reach the board."""
# fmt: on


def rows() -> list[tuple[str, Setup, str]]:
    """All refused submissions: kind and name, how it is made, and the pattern of its refusal."""
    table = []
    for (kind, usual), submissions in REFUSED.items():
        for name, each in submissions.items():
            setup, pattern = each if isinstance(each, tuple) else (each, usual)
            table.append((f"{kind}: {name}", setup, pattern))
    return table
