"""Submissions that are malicious, broken or dishonest: the table `HOSTILE`, by kind."""

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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from board_problems import (
    INFO,
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
    """A submission that is about to be handed in.

    Attributes:
        folder: Where there is room for it.
        board: The board's folder.
        fake: What the board will measure.
        target: What is handed in: at first a sound run.
        terms: What is said of it.
        options: Of `Board.submit`.
    """

    folder: Path
    board: Path
    fake: FakeEvaluation
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
HOSTILE: list[tuple[str, str, Setup, str]] = []
"""Kind, name, what makes the attempt, and what the refusal says."""


def with_terms(**metadata: Any) -> Setup:
    """A sound run, of which something is said."""

    def setup(attempt: Attempt) -> None:
        attempt.run()
        attempt.metadata.update(metadata)

    return setup


def with_info(**changes: Any) -> Setup:
    """A sound checkpoint with something else in its model_info."""
    return lambda attempt: attempt.checkpoint(**changes)


def with_archive(**changes: Any) -> Setup:
    """A sound checkpoint, packed otherwise."""
    return lambda attempt: written(attempt, repacked(attempt, **changes))


def add(kind: str, name: str, setup: Setup, sentence: str) -> None:
    HOSTILE.append((kind, name, setup, sentence))


# What runs code when it is unpickled


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(attempt: Attempt, content: Any) -> None:
    attempt.checkpoint({**bare_state(), "extra": content})


def written(attempt: Attempt, data: bytes) -> None:
    attempt.checkpoint().write_bytes(data)


HANG = "kilobyte that takes years"
CODE = "pickle that runs code"
add(CODE, "os.system", lambda it: saved(it, Runs(os.system, "true")), "asks for posix.system, which is no tensor")
add(CODE, "eval", lambda it: saved(it, Runs(eval, "1")), r"asks for (__builtin__|builtins)\.eval")
add(CODE, "import", lambda it: saved(it, Runs(__import__, "os")), r"__import__, which is no tensor")
add(
    CODE, "plain pickle", lambda it: written(it, pickle.dumps({"w": Runs(os.system, "true")})), "no checkpoint that a b"
)
add(CODE, "protocol 4", lambda it: written(it, repacked(it, pkl=pickle.dumps(Runs(os.system, "true"), 4))),
    "asks for STACK_GLOBAL")  # fmt: skip
add(CODE, "INST opcode", lambda it: written(it, repacked(it, pkl=b"(S'true'\nios\nsystem\n.")), "asks for os.system")


def doubling(levels: int) -> bytes:
    """A pickle of a dict whose key is a tuple of a tuple twice, of a tuple twice, ...: its hash takes 2 ** levels."""
    nested = b"".join(b"h%ch%c\x86q%ca" % (level, level, level + 1) for level in range(levels))
    return b"\x80\x02]" + b")q\x00a" + nested + b"}h%cK\x01s\x86." % levels


add(HANG, "tuples", lambda it: written(it, repacked(it, pkl=doubling(60))), "that are there again and again")
add(CODE, "whole model", lambda it: it.checkpoint(network()), "asks for deat_rb.models.spec.NormalizedModel")

# What torch's own safe loader takes, at a price

MEMORY = "kilobyte that asks for gigabytes"
add(MEMORY, "bytearray", lambda it: saved(it, Runs(bytearray, 10**6)), "asks for __builtin__.bytearray")
add(MEMORY, "torch.Tensor", lambda it: saved(it, Runs(torch.Tensor, 1000, 1000)), "asks for torch.Tensor")
add(MEMORY, "sparse", lambda it: saved(it, torch.zeros(9, 9).to_sparse()), "_rebuild_sparse_tensor")


def repacked(attempt: Attempt, *, compression: int = zipfile.ZIP_STORED, pkl: bytes | None = None,
             more: dict[str, bytes] | None = None, rename: Callable[[str], str] = str) -> bytes:  # fmt: skip
    """A sound checkpoint's archive, made anew with something else in it."""
    state = bare_state() if compression == zipfile.ZIP_STORED else {k: v * 0 for k, v in bare_state().items()}
    file, anew = io.BytesIO(), io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as sound, zipfile.ZipFile(anew, "w", compression) as archive:
        for name in sound.namelist():
            is_pickle = name.endswith("data.pkl") and pkl is not None
            archive.writestr(rename(name), pkl if is_pickle and pkl is not None else sound.read(name))
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return anew.getvalue()


ZIP = "zip bomb"
for how, method in (("deflate", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
    add(ZIP, how, with_archive(compression=method), "would grow from")


def overlapping(attempt: Attempt) -> None:
    """Every member is the same bytes of the file: as in the quoted bomb, the sum is many times the file."""
    data = repacked(attempt)
    archive = zipfile.ZipFile(io.BytesIO(data))
    one = next(member for member in archive.infolist() if member.filename.endswith("data/0"))
    ends = data.rindex(b"PK\5\6")
    start = int.from_bytes(data[ends + 16 : ends + 20], "little")
    record = next(found for found in data[start:ends].split(b"PK\1\2")[1:] if b"data/0" in found)
    extra = b"".join(b"PK\1\2" + record.replace(b"data/0", b"data/%d" % digit) for digit in range(1, 10)) * 60
    end = bytearray(data[ends:])
    for at in (8, 10):
        end[at : at + 2] = (len(archive.infolist()) + 9 * 60).to_bytes(2, "little")
    end[12:16] = (ends - start + len(extra)).to_bytes(4, "little")
    assert one.file_size
    written(attempt, data[:ends] + extra + bytes(end))


add(ZIP, "overlapping members", overlapping, "would grow from|of one name|damaged archive")


def expanded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As large as it says, on four bytes of storage."""
    return {name: torch.zeros(1).expand(value.shape) if value.ndim == 4 else value for name, value in state.items()}


class Expanded:
    """Pickles to a tensor with stride 0, which torch.save would not write so."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __reduce__(self) -> Any:
        import torch._utils

        storage = torch.zeros(1).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, tuple([0] * len(self.shape)), False, {})


LARGER = "tensors larger than their file"
add(
    LARGER,
    "stride 0",
    lambda it: it.checkpoint({n: Expanded(*v.shape) for n, v in bare_state().items()}),
    "says that it takes",
)
add(LARGER, "huge network", lambda it: it.checkpoint({**bare_state(), "conv1.weight": Expanded(10**5, 10**5)}),
    "says that it takes")  # fmt: skip
add(LARGER, "many tensors", lambda it: it.checkpoint({f"w{number}": torch.zeros(0) for number in range(20_001)}),
    "and 20000 are allowed")  # fmt: skip
add(LARGER, "one storage for all", lambda it: it.checkpoint(expanded(bare_state())), "says? that (it takes|they take)")

MEMBERS = "path tricks in an archive"
for label, member in (("up", "../../evil.txt"), ("absolute", "/etc/cron.d/evil"), ("backslash", "..\\..\\evil"),
                      ("inside", "archive/data/../../../evil"), ("device", "archive/CON:"),
                      ("code", "archive/code/__torch__.py")):  # fmt: skip
    add(MEMBERS, label, with_archive(more={member: b"x"}), "has a member '")

TWO = "archive that means two things"
add(TWO, "two pickles", lambda it: written(it, doubled(it)), "members of one name")
add(
    TWO,
    "two folders",
    lambda it: written(it, repacked(it, more={"other/data.pkl": b"."})),
    "members of one name, or of",
)
add(TWO, "no pickle", lambda it: written(it, repacked(it, rename=lambda name: name.replace("data.pkl", "data/9"))),
    "has no data.pkl|members of one name")  # fmt: skip
add(TWO, "letters' case", lambda it: written(it, repacked(it, more={"ARCHIVE/data/0": b"."})), "members of one name")


def doubled(attempt: Attempt) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return repacked(attempt, more={"archive/data.pkl": b"."})


NAMES = "path tricks in names"
for label, bad in (("up", "../../Evil2026Model"), ("slash", "Evil2026Model/x"), ("dots", "Evil2026Model_.."),
                   ("absolute", "/tmp/Evil2026Model"), ("backslash", "..\\Evil2026Model"), ("empty", ""),
                   ("NUL", "Evil2026Model\0.json"), ("long", "Evil2026" + "A" * 300)):  # fmt: skip
    add(NAMES, label, with_terms(model_name=bad), "does not have the form")
for label, bad in (("data up", "../entries"), ("data slash", "digits/x"), ("data dot", "."), ("data case", "Digits")):
    add(NAMES, label, with_terms(dataset_name=bad), "is no name for a board")
add(NAMES, "data in JSON", lambda it: it.checkpoint(dataset="../../x"), "dataset: .* is no name for a board")

UNICODE = "unicode tricks in names"
for label, bad in (("blank title", "\u3164"), ("marks", "e" + "\u0301" * 60), ("digits", "WideResNet-\u0661\u0660-1")):
    add(UNICODE, f"{label} in JSON", with_info(architecture=bad), "of which nothing|marks on one letter|are not 0 to 9")
for label, bad in (("homoglyph", "Wang2021Gr\u0430dient"), ("full width", "Wang2021\uff27radient"),
                   ("zero width", "Wang2021\u200bGradient"), ("right to left", "Wang2021Gradient_\u202egnp"),
                   ("line end", "Wang2021Gradient\n"), ("digits", "Wang\u0662\u0660\u0662\u0661Gradient")):  # fmt: skip
    add(UNICODE, label, with_terms(model_name=bad), "does not have the form")
add(UNICODE, "case", with_terms(model_name="Wang2021GRADIENT"), "small and capital letters")


def linked(attempt: Attempt, name: str) -> None:
    path = attempt.run() / name
    secret = attempt.folder / "secret"
    path.rename(secret)
    path.symlink_to(secret)


LINKS = "links and devices"
for file in ("config.json", "metrics.jsonl", "eval.json", "eval-verdicts.safetensors", "last.safetensors"):
    add(LINKS, file, partial(linked, name=file), f"{re.escape(file)} is a link: hand in the file itself")
add(LINKS, "folder of an export", lambda it: linked_export(it), "Linf is a link, and leads to files of somebody else's")
add(LINKS, "pipe", lambda it: special(it, os.mkfifo), "is no regular file")
add(LINKS, "socket", lambda it: special(it, bind), "cannot read|is no regular file")
add(LINKS, "folder", lambda it: special(it, os.mkdir), "is no regular file")
add(LINKS, "link in the board", lambda it: linked_board(it), "is a link, and would lead out of the board")


def linked_export(attempt: Attempt) -> None:
    """The weights are the keeper's own, of whom nobody had them."""
    folder = attempt.checkpoint().parent
    folder.rename(attempt.folder / "keepers")
    folder.symlink_to(attempt.folder / "keepers")
    attempt.target = attempt.folder / "export"


def linked_board(attempt: Attempt) -> None:
    attempt.run()
    away = attempt.folder / "away"
    (attempt.board / "entries/digits").rename(away)
    (attempt.board / "entries/digits").symlink_to(away)


def special(attempt: Attempt, make: Callable[[str], Any]) -> None:
    path = attempt.run() / "last.safetensors"
    path.unlink()
    make(str(path))


def bind(path: str) -> None:
    here = os.getcwd()
    os.chdir(Path(path).parent)  # a socket's path has to be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(Path(path).name)
    finally:
        os.chdir(here)


HTML = "HTML or script in a text"
SCRIPT = "<script>alert(1)</script>"
for label in ("name", "authors", "venue", "footnote", "hardware", "dataset_note"):
    add(HTML, label, with_terms(**{label: f"x {SCRIPT}"}), f"{label}: has HTML")
for label in ("name", "architecture"):
    add(HTML, f"{label} in JSON", with_info(**{label: '<img src=x onerror="alert(1)">'}),
        f"{label}: has HTML")  # fmt: skip
add(HTML, "entity", with_terms(footnote="&#60;script&#62;"), "footnote: has HTML")
add(HTML, "versions", lambda it: edited(it, "config.json", {"versions": {"torch": SCRIPT}}), "versions.*has HTML")
add(HTML, "hardware in config", lambda it: it.run(device=SCRIPT), "hardware: has HTML")

ADDRESS = "address that is none"
for label, bad in (("javascript", "javascript:alert(1)"), ("data", "data:text/html,x"), ("file", "file:///etc/passwd"),
                   ("quote", 'https://a.org/" onclick="alert(1)'), ("user", "https://arxiv.org@evil.org/"),
                   ("empty user", "https://:x@evil.org/"), ("port", "https://a.org:99999999/"),
                   ("homoglyph", "https://\u0430rxiv.org/"), ("relative", "//evil.org")):  # fmt: skip
    add(ADDRESS, label, with_info(link=bad), "link: ")

NUMBERS = "accuracy that cannot be"
for label, bad in (("101", "101"), ("negative", "-1"), ("exponent", "1e2"), ("infinite", "inf"), ("words", "99,9")):
    add(NUMBERS, label, with_info(clean_acc=bad), "clean_acc: is no accuracy in percent")
add(NUMBERS, "number", lambda it: it.checkpoint(clean_acc=83.3), "clean_acc: ")
add(NUMBERS, "NaN", lambda it: raw_info(it, b'{"dataset": "cifar10", "eps": "8/255", "x": NaN}'), "the number NaN")
add(NUMBERS, "1e999", lambda it: raw_info(it, b'{"dataset": "cifar10", "eps": "8/255", "x": 1e999}'), "1e999, which is")
for bad in ("255", "nan/255", "8/nan", "inf"):
    add(NUMBERS, f"eps {bad}", with_info(eps=bad), r"eps: eps = (255|nan|inf) is outside \(0, 1\]")
add(NUMBERS, "best known", with_terms(external=99.0), "external 99.00 is above autoattack")
add(NUMBERS, "metrics", lambda it: metrics(it, b'{"epoch": 1, "backwards": -Infinity}\n'), "the number -Infinity")
add(
    NUMBERS, "metrics as text", lambda it: metrics(it, b'{"epoch": "1", "backwards": "0"}\n'), "has no number for epoch"
)


def raw_info(attempt: Attempt, data: bytes) -> None:
    attempt.checkpoint()
    attempt.info.write_bytes(data)


def metrics(attempt: Attempt, data: bytes) -> None:
    (attempt.run() / "metrics.jsonl").write_bytes(data)


JSON = "JSON that is huge, deep or broken"
add(JSON, "huge", lambda it: raw_info(it, json.dumps({**INFO, "footnote": "x" * MAX_JSON}).encode()), "is too large")
add(JSON, "huge and sparse", lambda it: truncated(it, "eval.json", 2**36), "is too large")
add(JSON, "long text", lambda it: it.checkpoint(footnote="x" * 3000), "footnote: .* at most 2000")
add(JSON, "deep lists", lambda it: raw_info(it, b"[" * 10**6), "nested deeper than")
add(JSON, "deep objects", lambda it: metrics(it, b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested deeper than")
add(JSON, "string without end", lambda it: raw_info(it, b'"' + b'\\"' * 10**6), "is not valid JSON")
add(
    JSON,
    "many keys",
    lambda it: raw_info(it, json.dumps(dict.fromkeys(map(str, range(2000)))).encode()),
    "2000 keys, a",
)
add(JSON, "no object", lambda it: raw_info(it, b"[]"), "is no JSON object")
add(JSON, "long number", lambda it: raw_info(it, b'{"x": ' + b"9" * 5000 + b"}"), "is not valid JSON")
add(JSON, "not UTF-8", lambda it: raw_info(it, b'{"x": "\xff"}'), "is not valid JSON")
add(JSON, "half a character", lambda it: raw_info(it, json.dumps({**INFO, "name": "\ud800"}).encode()), "Invalid JSON")
add(JSON, "unknown field", lambda it: it.checkpoint(rank=1), "rank: ")

TWICE = "key that is there twice"
add(TWICE, "model_info", lambda it: raw_info(it, b'{"eps": "8/255", "eps": "1/255"}'), "has the key 'eps' twice")
add(TWICE, "config", lambda it: twice(it, "config.json", '"epochs":2', '"epochs":2,"epochs":900'), "key 'epochs' twice")
add(TWICE, "eval", lambda it: twice(it, "eval.json", '"eps": 0.1', '"eps": 0.1, "eps": 0.01'), "key 'eps' twice")


def twice(attempt: Attempt, name: str, old: str, new: str) -> None:
    path = attempt.run() / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def truncated(attempt: Attempt, name: str, size: int) -> None:
    os.truncate(attempt.run() / name, size)


def changed(name: str, change: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    state = bare_state()
    made = change(state[name])
    return {**{key: value for key, value in state.items() if key != name}, **({} if made is None else {name: made})}


SHAPES = "weights of another network"
add(SHAPES, "missing", lambda it: it.checkpoint(changed("fc.bias", lambda w: None)), "missing: net.fc.bias")
add(SHAPES, "unexpected", lambda it: it.checkpoint({**bare_state(), "evil": torch.zeros(1)}), "unexpected: net.evil")
add(
    SHAPES,
    "shape",
    lambda it: it.checkpoint(changed("conv1.weight", lambda w: w[:, :1])),
    "of another shape: net.conv1",
)
add(SHAPES, "odd name", lambda it: it.checkpoint({**bare_state(), "a\x1b[31m": torch.zeros(1)}), "which no network has")
add(SHAPES, "file too large", lambda it: truncated(it, "last.safetensors", 3 * 2**30), "is too large")

TYPES = "weights of another type, or none"
add(TYPES, "half", lambda it: it.checkpoint(changed("conv1.weight", Tensor.half)), "as torch.float16 where the network")
add(
    TYPES,
    "integers",
    lambda it: it.checkpoint(changed("conv1.weight", Tensor.long)),
    "as torch.int64 where the network",
)
add(
    TYPES, "double", lambda it: it.checkpoint(changed("conv1.weight", Tensor.double)), "as torch.float64 where the netw"
)
add(TYPES, "NaN", lambda it: it.checkpoint(changed("conv1.weight", lambda w: w * torch.nan)), "has NaN or infinity")
add(TYPES, "infinity", lambda it: it.checkpoint(changed("fc.bias", lambda w: w + torch.inf)), "has NaN or infinity")
add(TYPES, "sigma 0", lambda it: it.checkpoint(changed("sigma", lambda w: w * 0)), r"std")
add(TYPES, "list", lambda it: it.checkpoint([1, 2, 3]), "does not hold a state dict")

NONE = "no checkpoint at all"
add(NONE, "web page", lambda it: written(it, b"<!DOCTYPE html><html>quota exceeded</html>"), "is a web page")
add(NONE, "empty", lambda it: written(it, b""), "no checkpoint that a board reads")
add(NONE, "half a file", lambda it: written(it, it.checkpoint().read_bytes()[:20000]), "damaged archive")
add(NONE, "half a safetensors", lambda it: truncated(it, "last.safetensors", 5000), "truncated or not a safetensors")
add(NONE, "safetensors' head", lambda it: headless(it), "not a safetensors")


def headless(attempt: Attempt) -> None:
    (attempt.run() / "last.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{" + b"x" * 99)


LIES = "metadata that lie"
add(LIES, "architecture", lambda it: it.checkpoint(architecture="WideResNet-16-1"), "of another architecture")
add(LIES, "no such one", lambda it: it.checkpoint(architecture="GPT-5"), "of architecture 'GPT-5'")
add(LIES, "enormous", lambda it: it.checkpoint(architecture="WideResNet-34-999"), "of another architecture")
add(LIES, "data", lambda it: it.checkpoint(dataset="imagenet"), "imagenet")
add(
    LIES,
    "config's network",
    lambda it: edited(it, "config.json", {"network": {"arch": "wrn-16-1"}}),
    "of another archi",
)
add(
    LIES,
    "config's classes",
    lambda it: edited(it, "config.json", {"network": {"num_classes": 100}}),
    "number of classes",
)
add(
    LIES, "config's size", lambda it: edited(it, "config.json", {"network": {"image_size": 64}}), "takes 3x32x32 images"
)
add(LIES, "accuracy of model_info", lambda it: it.checkpoint(autoattack_acc="79.00"), "claims 79.00 % under autoattack")


def edited(attempt: Attempt, name: str, changes: dict[str, Any]) -> None:
    path = attempt.run() / name
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


FACTORY = "code in the architecture"
for label, arch in (("os", "os:system"), ("own", "evil_module:make"), ("hub", "timm:hf-hub:evil/model")):
    add(FACTORY, label, partial(edited, name="config.json", changes={"network": {"arch": arch}}),
        "a board runs nobody's|timm has no model")  # fmt: skip


SHA = "SHA-256 of something else"
ZERO = "0" * 64
add(SHA, "weights", lambda it: edited(it, "eval.json", {"provenance": {"weights_sha256": ZERO}}), "of other weights")
add(SHA, "data", lambda it: edited(it, "eval.json", {"provenance": {"data_sha256": ZERO}}), "of other data")
add(SHA, "network", lambda it: edited(it, "eval.json", {"model_sha256": ZERO}), "of other model")
add(SHA, "images", lambda it: edited(it, "eval.json", {"examples_sha256": ZERO}), "of other test images")
add(SHA, "training data", lambda it: edited(it, "config.json", {"data_fingerprint": ZERO}), "was trained on other data")
add(SHA, "weights exchanged", lambda it: safe_load.save_tensors(it.run() / "last.safetensors", network(1).state_dict()),
    "of other weights")  # fmt: skip

CLAIMS = "evaluation that claims too much"
add(CLAIMS, "too high", lambda it: claimed(it, autoattack=0.7), "claims 70.00 % under autoattack, and 40.00 %")
add(CLAIMS, "too low", lambda it: claimed(it, natural=0.5, fgsm=0.5), "claims 50.00 % under natural, and 80.00 %")
add(CLAIMS, "another eps", lambda it: (it.run(), it.fake.shares.update({"pgd-100": 0.0})), "under pgd-100, and 0.00 %")
add(CLAIMS, "bf16", lambda it: edited(it, "eval.json", {"precision": "bf16"}), "in bf16 and Linf")
add(CLAIMS, "L2", lambda it: edited(it, "eval.json", {"norm": "L2"}), "in fp32 and L2")
add(CLAIMS, "does not add up", lambda it: result(it, accuracy=0.99), "99.00 % under autoattack with 200 of 500 correct")
add(CLAIMS, "more than all", lambda it: result(it, n_correct=501, accuracy=1.002), "which does not add up")
add(CLAIMS, "without AutoAttack", lambda it: without_autoattack(it), "has no autoattack")
add(CLAIMS, "a little too high", lambda it: claimed(it, autoattack=0.46), "something else of 30 of 500 exam")
add(CLAIMS, "no verdicts", lambda it: (it.run() / "eval-verdicts.safetensors").unlink(), "has no eval-verdicts.safet")
add(CLAIMS, "verdicts of NaN", lambda it: verdicts(it, lambda v: v * torch.nan), "has no verdicts, one of each example")
add(CLAIMS, "one verdict", lambda it: verdicts(it, lambda v: v.any()), "has no verdicts, one of each example, under")
add(CLAIMS, "other verdicts", lambda it: verdicts(it, lambda v: ~v), "holds another report's verdicts")
add(CLAIMS, "own checks", lambda it: failing(it, claimed_too=True), "eval.json of .* fails the check 'gradients pres")
add(CLAIMS, "measured checks", lambda it: failing(it), "fails the check 'gradients present'")
add(
    CLAIMS,
    "too many examples",
    lambda it: edited(it, "eval.json", {"n_examples": 10**9}),
    "of other test images|add up",
)


def verdicts(attempt: Attempt, change: Callable[[Tensor], Tensor]) -> None:
    path = attempt.run() / "eval-verdicts.safetensors"
    safe_load.save_tensors(path, {name: change(value) for name, value in safe_load.load_tensors(path).items()})


def failing(attempt: Attempt, *, claimed_too: bool = False) -> None:
    failed = Check(name="gradients present", status="fail", figure=0.0, sentence="There are none.")
    attempt.run()
    if claimed_too:
        claim(attempt.target, checks=(failed,))
    else:
        attempt.fake.checks = (failed,)


def claimed(attempt: Attempt, *, sample: int = 500, **shares: float) -> None:
    from board_problems import SHARES

    attempt.run()
    attempt.options["sample"] = sample
    sound = json.loads((attempt.target / "eval.json").read_text())
    kept = {key: sound[key] for key in ("provenance", "model_sha256", "examples_sha256")}
    report_of(500, shares={**SHARES, **shares}, **kept).save(attempt.target)


def result(attempt: Attempt, **changes: Any) -> None:
    attempt.run()
    content = json.loads((attempt.target / "eval.json").read_text())
    content["results"]["autoattack"].update(changes)
    (attempt.target / "eval.json").write_text(json.dumps(content))
    (attempt.target / "eval-verdicts.safetensors").unlink()


def without_autoattack(attempt: Attempt) -> None:
    attempt.run()
    content = json.loads((attempt.target / "eval.json").read_text())
    (attempt.target / "eval-verdicts.safetensors").unlink()
    del content["results"]["autoattack"]
    (attempt.target / "eval.json").write_text(json.dumps(content))


ESCAPES = "terminal escape codes"
for label in ("name", "authors", "venue", "architecture", "footnote"):
    add(ESCAPES, label, with_info(**{label: "x\x1b]0;owned\x07\x1b[2J"}), r"U\+001B")
add(ESCAPES, "key", lambda it: raw_info(it, json.dumps({**INFO, "\x1b[2J": 1}).encode()), r"\\x1b\[2J: ")
add(ESCAPES, "data set", with_terms(dataset_name="\x1b[2J"), r"'\\x1b\[2J' is no name")
add(ESCAPES, "bidi", with_terms(venue="\u202eelcyc"), r"U\+202E")
add(ESCAPES, "line end", with_terms(venue="a\nproblem: none"), r"U\+000A")
add(ESCAPES, "method", lambda it: it.run(device="cpu\x9b2J"), r"U\+009B")

FORMULA = "spreadsheet formula"
for label, bad in (("equals", '=HYPERLINK("http://evil.org";"paper")'), ("plus", "+1+cmd"), ("minus", "-2+3"),
                   ("at", "@SUM(1+1)"), ("after ;", "x;=1+1"), ("full width", "\uff1d1+1")):  # fmt: skip
    add(FORMULA, label, with_terms(venue=bad), "which spreadsheets take for a form")

MARKDOWN = "Markdown that is more than text"
for label, bad in (("link", "[paper](javascript:alert)"), ("image", "![x](http://evil.org/track.png)"),
                   ("column", "x | 99.99 |"), ("code", "`x`")):  # fmt: skip
    add(MARKDOWN, label, with_terms(venue=bad), "has Markdown in it")

TEX = "TeX command"
for label, bad in (("input", r"\input{/etc/passwd}"), ("write18", r"\write18{id}"), ("catcode", r"\catcode`\%=0"),
                   ("carets", "^^5cinput")):  # fmt: skip
    add(TEX, label, with_terms(venue=bad), "has the TeX command|has Markdown")
