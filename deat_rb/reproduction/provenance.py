"""Provenance of results: git commit, machine and device, and the commands of a run."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import deat_rb
from deat_rb.models.names import trust_flag
from deat_rb.reproduction.study import RunSpec
from deat_rb.runs.options import train_options
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.text import counted


@cache
def source_commit() -> str:
    """Return the git commit of the running source code, with ``+changes`` if files differ; empty outside of git."""
    root = Path(deat_rb.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    outputs = []
    for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        outputs.append(done.stdout.strip())
    return outputs[0] + ("+changes" if outputs[1] else "")


def hardware(device: str) -> str:
    """Return the name of a GPU, or else of the processor, with the number of threads."""
    place = resolve_device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    threads = torch.get_num_threads()
    return f"{_processor()}, {counted(threads, 'thread')}"


def now() -> str:
    """Return the time in UTC, as ISO 8601 without fractions of a second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def train_command(run: RunSpec, runs: Path) -> str:
    """Return the command that trains a run into the folder ``runs``."""
    by_name = {each.name: each for each in train_options()}
    words = ["deat-rb", "train"]
    for name, value in run.options.explicit().items():
        words += by_name[name].words(value)
    return shlex.join([*words, "--output", str(runs), "--name", run.name])


def eval_command(run: RunSpec, runs: Path, attacks: Sequence[str], asked: int | None) -> str:
    """Return the command that evaluates a run."""
    words = ["deat-rb", "eval", str(runs / run.name), "--attacks", ",".join(attacks)]
    images = [] if asked is None else ["--n-examples", str(asked)]
    return shlex.join([*words, *images, *trust_flag(run.options.model.arch)])


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()
