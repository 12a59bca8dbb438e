"""Malicious, broken and dishonest submissions, by kind: those that are refused, and archives that do no harm."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile

import torch
from board_problems import INFO, bare_state, network
from submission_attempts import (
    Expanded,
    Runs,
    Setup,
    another_eps,
    bind,
    bomb,
    claimed,
    declared,
    edited,
    extra,
    info,
    linked,
    linked_board,
    linked_export,
    measured_checks,
    metrics,
    other_weights,
    overlapping,
    own_checks,
    raw_info,
    repacked,
    replaced,
    result,
    special,
    truncated,
    verdicts,
    weights,
    written,
)  # fmt: skip
from torch import Tensor

from deat_rb.leaderboard.untrusted import MAX_JSON

ZERO = "0" * 64
SCRIPT = "<script>alert(1)</script>"
ESCAPE = "x\x1b]0;owned\x07\x1b[2J"

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
        "many tensors": (lambda it: it.checkpoint({f"w{n}": torch.zeros(0) for n in range(2_001)}), "classifier"),
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
        "case": (declared(model_name="Wang2021GRADIENT"), "only in letter case"),
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
        **{f"eps {bad}": (info(eps=bad), r"eps: |eps 255 is outside") for bad in ("255", "nan/255", "8/nan", "inf")},
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
    ("metadata that lie", "different architecture|differ"): {
        "architecture": info(architecture="WideResNet-16-1"),
        "no such one": (info(architecture="GPT-5"), "GPT-5"),
        "enormous": (info(architecture="WideResNet-34-999"), "which is too large"),
        "data": (info(dataset="imagenet"), "imagenet"),
        "config's network": edited("config.json", network={"arch": "wrn-16-1"}),
        "config's classes": edited("config.json", network={"num_classes": 100}),
        "config's size": (edited("config.json", network={"image_size": 64}), "32x32"),
        "accuracy of model_info": (info(autoattack_acc="79.00"), "claims 79.00 % under autoattack"),
    },
    ("code in the architecture", "submitted code is never run|timm has no model"): {name: edited(
        "config.json", network={"arch": arch}) for name, arch in {
            "os": "os:system", "own": "evil_module:make", "hub": "timm:hf-hub:evil/model"}.items()},
    ("SHA-256 of something else", "was computed for different|differ from those that .* was trained on"): {
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
        "bf16": (edited("eval.json", precision="bf16"), "uses bf16 and Linf, not fp32 and Linf"),
        "L2": (edited("eval.json", norm="L2"), "uses fp32 and L2, not fp32 and Linf"),
        "does not add up": (result(accuracy=0.99), "99.00 % under autoattack with 200 of 500 correct"),
        "more than all": (result(n_correct=501, accuracy=1.002), "501 of 500"),
        "without AutoAttack": (result(), "has no results for autoattack"),
        "a little too high": (claimed(autoattack=0.46), "on 30 of 500 examples under autoattack"),
        "no verdicts": (lambda it: (it.run() / "eval-verdicts.safetensors").unlink(), "has no eval-verdicts"),
        "verdicts of NaN": (verdicts(lambda v: v * torch.nan), "must have one boolean per example"),
        "one verdict": (verdicts(lambda v: v.any()), "must have one boolean per example"),
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
