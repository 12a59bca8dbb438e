"""Data-parallel training: two ranks train what one would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_processes
from children import exit_status, run_in_child
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_two_ranks, start_two_ranks
from safetensors.torch import load_file

from deat_rb.cli import main
from deat_rb.utils import seeding
from deat_rb.utils.distributed import World, is_peer_failure, share
from deat_rb.utils.errors import DeatError

METHODS = ("standard", "pgd-2", "trades", "mart", "fat-5", "free-3", "m-deat", "m+trades", "free-3 ema", "trades awp",
           "yopo-2-2", "fgsm-pgi", "liet")  # fmt: skip


@given(st.integers(0, 300), st.integers(1, 9))
def test_share_is_a_partition(count: int, size: int) -> None:
    parts = [share(count, rank, size) for rank in range(size)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 12), st.integers(1, 4), st.booleans())
def test_global_batch_noise_of_the_shares_is_that_of_the_batch(count: int, size: int, normal: bool) -> None:
    draw = seeding.normal_like if normal else seeding.uniform_like
    images = torch.zeros(count, 3, 4, 4)
    torch.manual_seed(5)
    whole = draw(images, 0.5)
    parts = []
    for rank in range(size):
        part = share(count, rank, size)
        with seeding.global_batch_noise(part, count, torch.Generator().manual_seed(5)):
            parts.append(draw(images[part].to(memory_format=torch.channels_last), 0.5))
    assert torch.equal(torch.cat(parts), whole)


def test_world_of_one_rank_is_the_identity() -> None:
    world, tensor = World(), torch.ones(3)
    assert world.is_main
    assert (world.share(7), world.max_over_ranks(2)) == (slice(0, 7), 2)
    assert world.sum(tensor) is tensor
    world.average([tensor])
    assert tensor.tolist() == [1, 1, 1]
    with pytest.raises(DeatError, match="no"):
        world.on_main(lambda: (_ for _ in ()).throw(DeatError("no")))


def test_average_of_equal_tensors_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))
    tensor = torch.rand(1000)
    before = tensor.clone()
    World(0, 3).average([tensor])
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(("local_rank", "order"), [("0", ["acts", "gathers"]), ("1", ["gathers", "acts"])])
def test_local_main_first_runs_before_the_other_ranks_of_a_machine(
    local_rank: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    refusals: list[DeatError | None] = [None, None]

    def gather(values: list[Any], value: Any, group: Any) -> None:
        done.append("gathers")
        values[:] = refusals

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    world = World(3, 2)
    world.local_main_first(lambda: done.append("acts"))
    assert done == order
    refusals[0] = DeatError("no archive")
    with pytest.raises(DeatError, match="no archive"):
        world.local_main_first(lambda: done.append("acts"))
    assert done.count("acts") == 2 - int(local_rank)


def test_leave_frees_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        pass

    class Replica:
        """In a circle, as torch's are."""

        def __init__(self, group: Group) -> None:
            self.group, self.itself = group, self

    world = World(0, 2, Group())
    group = weakref.ref(world._control)
    Replica(world._control)
    seen: list[bool] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append(group() is None))
    world.leave()
    assert seen == [True]


def test_is_peer_failure_only_for_communication_errors() -> None:
    two = World(0, 2)
    assert is_peer_failure(RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer"), two)
    assert not is_peer_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), two)
    assert not is_peer_failure(RuntimeError("Connection closed by peer"), World())


@pytest.mark.slow
def test_fit_on_two_ranks_equals_one_rank(tmp_path: Path) -> None:
    """In float64 with BatchNorm in eval, after five batches, the last of them short."""
    on_two_ranks(lambda: two_processes.train_on_ranks(tmp_path, METHODS), tmp_path / "log")
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == ["[True]"] * 2
    for method in METHODS:
        weights, metrics = two_processes.train(method)
        stored = load_file(tmp_path / f"{method}.safetensors")
        for name, tensor in weights.items():
            torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-8)
        torch.testing.assert_close(stored["metrics"], torch.tensor(metrics, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def train(*arguments: str) -> None:
    main(["train", *arguments])


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SMALL = ("--arch", "tiny_networks:Strided", "--train-size", "170", "--batch-size", "32", "--val-size", "20",
         "--lr-schedule", "flat", "--lr", "0.05")  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_train_resumes_with_another_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ranks for two epochs, 1 for the third, 2 for the fourth; beside 1 for four."""
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    on_two_ranks(lambda: train("--method", "m+pgd", *SMALL, "--epochs", "2", "--name", "two"), log)
    assert log.read_text().count("result     epoch 2") == 1  # rank 0 alone prints
    resume = ("--resume", "runs/two", "--trust-code", "--epochs")
    assert run_in_child(lambda: train(*resume, "3"))
    on_two_ranks(lambda: train(*resume, "4"), log)
    assert run_in_child(lambda: train("--method", "m+pgd", *SMALL, "--epochs", "4", "--name", "one"))
    two, one = (rows(tmp_path / "runs" / name) for name in ("two", "one"))
    assert [row["processes"] for row in two] == [2, 2, 1, 2]
    for ours, theirs in zip(two, one, strict=True):
        for name in ("epoch", "steps", "alpha", "examples", "backwards", "forwards", "updates", "lr"):
            assert ours[name] == pytest.approx(theirs[name]), name
        # BatchNorm's statistics are per rank, so the weights differ slightly.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_train_on_two_ranks_survives_sigterm_and_a_killed_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time by torchrun itself."""
    monkeypatch.chdir(tmp_path)
    run, log = tmp_path / "runs" / "run", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deat_rb",
               "train", "--method", "pgd-3", *SMALL, "--epochs", "9999", "--name", "run"]  # fmt: skip
    helpers = str(Path(two_processes.__file__).parent)
    with open(log, "w") as file:
        first = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": helpers}, stdout=file, stderr=file)
        wait_for(run, 1, first.pid)
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=900)
    assert "deat-rb train --resume runs/run --trust-code resumes it" in log.read_text()
    before = len(rows(run))
    assert 1 <= before < 9999

    def resume() -> None:
        Path(os.environ["RANK"]).write_text(str(os.getpid()))
        train("--resume", "runs/run", "--trust-code")

    second = start_two_ranks(resume, log)
    wait_for(run, before + 1, second)
    os.kill(int(Path("1").read_text()), signal.SIGKILL)
    assert exit_status(second) == 1
    text = log.read_text()
    assert "lost contact with another of the 2 ranks, so this one stops too; runs/run keeps" in text
    assert "loop.py" not in text  # the one traceback is torchrun's
    assert len(rows(run)) > before


def wait_for(run: Path, epochs: int, process: int) -> None:
    until = time.monotonic() + 600
    while not (run / "metrics.jsonl").is_file() or len(rows(run)) < epochs:
        assert os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        assert time.monotonic() < until
        time.sleep(0.05)
