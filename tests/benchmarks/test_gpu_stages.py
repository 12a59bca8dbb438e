"""The stages of ``python -m benchmarks.gpu``, on the CPU at the smallest sizes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from small_problems import small_network

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import attacks, steps, table1
from benchmarks.gpu.session import Session
from deat_rb.attacks.names import parse_attacks
from deat_rb.attacks.registry import build_attack
from deat_rb.attacks.types import AttackContext

ROOT = Path(__file__).parents[2]


def test_decoded_images_are_read_from_their_cache(image_folder: Path, tmp_path: Path) -> None:
    session = Session(argparse.Namespace(data=str(image_folder), cache=tmp_path / "images.pt", out=tmp_path))
    decoded, cached = table1._data(session), table1._data(session)
    assert [row["stage"] for row in session.rows] == ["decode"], "the second time from the cache"
    for name in ("classes", "mean", "std", "fingerprint"):
        assert getattr(cached, name) == getattr(decoded, name)
    for part in ("train", "test"):
        images = getattr(decoded, part).in_memory()
        assert torch.equal(getattr(cached, part).images, images.images)
        assert torch.equal(getattr(cached, part).labels, images.labels)


def test_the_cache_of_another_folder_is_not_read(image_folder: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(data=str(image_folder), cache=tmp_path / "images.pt", out=tmp_path)
    table1._data(Session(options))
    other = tmp_path / "other"
    for part in ("train", "test"):
        shutil.copytree(image_folder / part, other / part, ignore=shutil.ignore_patterns("green"))
    decoded = table1._data(Session(argparse.Namespace(**{**vars(options), "data": str(other)})))
    assert decoded.classes == ("blue", "grey", "red")


@pytest.mark.skipif(os.name == "nt", reason="sends a signal that Windows does not have")
def test_a_stage_is_ended_when_the_budget_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's signal comes while the stage measures its first method; the next stage finds no time left."""
    timers: list[float] = []
    ended: list[str] = []
    monkeypatch.setattr(signal, "setitimer", lambda _, seconds: timers.append(seconds))

    def measure(session: Session) -> None:
        for method in ("pgd-7", "trades"):
            with session.recording_failure("speed", method=method):
                session.options.budget = 0
                signal.raise_signal(signal.SIGALRM)
            ended.append(method)

    command = ["benchmarks.gpu", "speed,bench", "--out", str(tmp_path), "--budget", "1e6"]
    monkeypatch.setattr(sys, "argv", command)
    for stage in ("speed", "bench"):
        monkeypatch.setitem(gpu.STAGES, stage, measure)
    gpu.main()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["stage"], "left_out" in row, "failed" in row) for row in rows] == [
        ("speed", True, False), ("bench", True, False),
    ]  # fmt: skip
    assert not ended
    assert [round(seconds, -3) for seconds in timers] == [1e6, 0], "the time that is left, then none"


class Result(NamedTuple):
    """What a GPU's evaluation measures."""

    accuracy: float = 0.5
    seconds: float = 2.125
    energy_kwh: float | None = 0.25
    peak_memory: int | None = 3 * 2**20 + 1


def session_with_a_network(folder: Path) -> Session:
    options = argparse.Namespace(device="cpu", out=folder, test_size=2, autoattack_size=2, graphs_size=2, eval_batch=2,
                                 attacks="pgd-2")  # fmt: skip
    return Session(options, trained={"m-deat": small_network()})


def test_evaluations_record_time_energy_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_with_a_network(tmp_path)
    report = SimpleNamespace(results={"natural": Result(), "pgd-2": Result(energy_kwh=None, peak_memory=None)})
    for module in (table1, attacks):
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: report)
        monkeypatch.setattr(module, "test_images", lambda *_: (torch.rand(2, 3, 8, 8), torch.tensor([0, 1])))
    table1._evaluate(session, "m-deat", 2, "table1-eval")
    attacks.autoattack(session)
    assert [row["stage"] for row in session.rows] == ["table1-eval", "autoattack"]
    for row in session.rows:
        assert row["attack_seconds"] == {"natural": 2.12, "pgd-2": 2.12}
        assert (row["kWh"], row["peak_MiB"]) == ({"natural": 0.25}, {"natural": 3})


def test_graphs_are_compared_where_passes_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, seen, sizes = session_with_a_network(tmp_path), list[str](), list[int]()
    monkeypatch.setattr(attacks, "GRAPHS_WARM_UP", 1)
    monkeypatch.setattr(attacks, "test_images", lambda *_: (torch.rand(2, 3, 8, 8), torch.tensor([0, 1])))

    def evaluated(_: object, images: torch.Tensor, *__: object, attacks: str, **___: object) -> SimpleNamespace:
        seen.extend(parse_attacks(attacks))
        sizes.append(len(images))
        return SimpleNamespace(results={"square": Result()})

    monkeypatch.setattr(attacks, "evaluate", evaluated)
    attacks.graphs(session)
    assert [row["enabled"] for row in session.rows] == [True, False]
    assert sizes == [1, 2, 2], "the first is to warm up"
    context = AttackContext("Linf", 0.1, 0, 5, torch.device("cpu"))
    stages = [stage for name in seen if name != "natural" for stage in build_attack(name, context).parts]
    assert stages
    assert all(stage.recordable for stage in stages)


def test_the_packages_for_a_gpu_can_measure_energy() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    packed = (ROOT / "benchmarks/gpu/prepare.sh").read_text(encoding="utf-8")
    assert [f"{package.partition('>')[0]}==" in packed for package in extras["energy"]] == [True]


@pytest.mark.slow
def test_stages_run_on_a_cpu(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few of the methods, since many processors compute bf16 slowly."""
    monkeypatch.setattr(steps, "METHODS", ("m-deat", "f+trades"))
    monkeypatch.setattr(steps, "PROFILED", (("u-fgsm", "bf16"), ("m-deat", "fp32")))
    stages = "env,smoke,speed,profile,throughput,decode,table1,full"
    sizes = ["--val-size", "8", "--test-size", "4", "--full-size", "8", "--epochs", "1", "--batch-size", "4",
             "--eval-batch", "4", "--eval-batches", "4", "--repeats", "1"]  # fmt: skip
    command = ["benchmarks.gpu", stages, "--device", "cpu", "--arch", "tiny_networks:Strided", *sizes,
               "--attacks", "fgsm,pgd-2", "--methods", "m-deat,u-fgsm", "--data", str(image_folder),
               "--cache", str(tmp_path / "images.pt"), "--out", str(tmp_path), "--budget", "100000"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row or "left_out" in row]
    assert {row["stage"] for row in rows} == {*stages.split(","), "table1-eval", "full-eval"} - {"full"}
    assert {row["method"] for row in rows if row["stage"] == "full-eval"} == {"m-deat", "u-fgsm"}
