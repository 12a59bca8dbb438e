from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_folder import TRAIN, assert_equal, batches, epoch_of, load, make_folder, path_of
from PIL import Image
from training_problems import made

import deat_rb
from deat_rb.data.batches import Batches
from deat_rb.data.datasets import load_data
from deat_rb.data.images import train_val_split
from deat_rb.data.workers import MAX_WORKERS, WorkerReader, worker_count
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images")


@pytest.fixture(autouse=True)
def others() -> set[int]:
    """Child processes that other tests have left."""
    return children()


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def ended(others: set[int]) -> bool:
    """Return whether all child processes but ``others`` end, which takes a moment after they are told to."""
    deadline = time.monotonic() + 120
    while (running := not children() <= others) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running


# The same batches as in memory.


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_shuffled_and_augmented_equal_those_in_memory(folder: Path, layout: torch.memory_format) -> None:
    in_memory = batches(load(folder, None), memory_format=layout)
    streamed = batches(load(folder), memory_format=layout)
    assert len(streamed) == len(in_memory) == 4
    for epoch in (1, 2, 1):
        ours = epoch_of(streamed, epoch)
        assert_equal(ours, epoch_of(in_memory, epoch))
        assert all(images.is_contiguous(memory_format=layout) for images, _ in ours)


def test_batches_unshuffled_equal_those_in_memory(folder: Path) -> None:
    in_memory, streamed = (Batches(load(folder, limit).test, 4) for limit in (None, 0))
    assert_equal(list(streamed), list(in_memory))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(5))
def test_starting_at_does_not_read_the_files_of_earlier_batches(folder: Path, start: int) -> None:
    expected = epoch_of(batches(load(folder, None)), 2, start)
    data = load(folder)
    order = torch.randperm(TRAIN, generator=generator(5, "order", 2))
    for position in order[: 8 * start].tolist():
        path_of(data.train, position).unlink()
    assert_equal(epoch_of(batches(data), 2, start), expected)


@pytest.mark.parametrize("processes", [2, 3])
def test_divided_shares_of_all_ranks_are_the_global_batch(folder: Path, processes: int) -> None:
    whole, streamed = epoch_of(batches(load(folder, None)), 3), batches(load(folder))
    parts = [epoch_of(streamed.divided(rank, processes), 3, 1) for rank in range(processes)]
    united = [
        (torch.cat([images for images, _ in shares]), torch.cat([labels for _, labels in shares]))
        for shares in zip(*parts, strict=True)
    ]
    assert_equal(united, whole[1:])


def test_fit_trains_the_same_weights_as_in_memory(folder: Path) -> None:
    weights = []
    for limit in (None, 0):
        model, data = made(), load(folder, limit)
        train, val = train_val_split(data.train, 6, seed=0)
        loader = Batches(train, 7, shuffle=True, augmentation="crop-flip", seed=1)
        deat_rb.create("m-deat", model).fit(loader, [val.tensors()], epochs=3, lr=0.05, seed=1)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert not torch.equal(weights[0]["0.weight"], made().state_dict()["0.weight"])


def test_worker_reader_leaves_the_global_generators_alone(folder: Path) -> None:
    loader = batches(load(folder))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    epoch_of(loader, 1)
    epoch_of(loader, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_equal(np.random.get_state(legacy=False), before[2])


# Worker processes.


@pytest.mark.parametrize("when", ["statistics", "epoch"])
def test_worker_reader_names_a_damaged_image_as_in_memory(folder: Path, when: str, others: set[int]) -> None:
    data = load(folder) if when == "epoch" else None
    (folder / "train" / "b" / "3.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(DeatError) as expected:
        load(folder, None)
    loader = batches(data) if data is not None else None
    with pytest.raises(DeatError) as refused:
        epoch_of(loader, 1) if loader is not None else load(folder)
    assert str(refused.value) == str(expected.value)
    assert ended(others)


def test_worker_reader_keeps_its_workers_for_the_next_epochs(folder: Path, others: set[int]) -> None:
    loader = batches(load(folder))
    assert ended(others)
    epoch_of(loader, 1)
    first = children() - others
    assert len(first) == worker_count()
    epoch_of(loader, 2)
    next(iter(loader))
    epoch_of(loader, 3)
    assert children() - others == first
    del loader
    assert ended(others)


def test_worker_reader_serves_two_iterations_at_the_same_time(folder: Path) -> None:
    loader, expected = batches(load(folder)), epoch_of(batches(load(folder, None)), 0)
    pairs = list(zip(loader, loader, strict=True))
    assert_equal([one for one, _ in pairs], expected)
    assert_equal([two for _, two in pairs], expected)


def test_worker_reader_restarts_after_an_unfinished_iteration(folder: Path) -> None:
    loader, in_memory = batches(load(folder)), batches(load(folder, None))
    unfinished = iter(loader)
    next(unfinished)
    del unfinished
    assert_equal(epoch_of(loader, 1), epoch_of(in_memory, 1))


def blank(positions: list[int]) -> Any:
    return np.zeros((len(positions), 3, 4, 4), np.uint8), np.zeros(len(positions), np.int64)


@pytest.mark.parametrize("finished", [True, False])
def test_workers_end_at_once_with_a_reader_in_a_garbage_cycle(
    finished: bool, others: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DataLoader waits an interval for each worker that it cannot tell to end."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60)
    reader: Any = WorkerReader(blank, "cpu")
    reader.iteration = reader(None, [slice(start, start + 2) for start in range(0, 40, 2)])
    assert len(next(reader.iteration)[0]) == 2
    if finished:
        assert len(list(reader.iteration)) == 19
        del reader.iteration
    assert len(children() - others) == worker_count()
    reader.itself = reader
    start = time.monotonic()
    del reader
    gc.collect()
    assert ended(others)
    assert time.monotonic() - start < 60


def exit_at_once(positions: list[int]) -> Any:
    os._exit(1)


@pytest.mark.slow
def test_worker_reader_ends_with_one_sentence_when_a_worker_dies() -> None:
    read = WorkerReader(exit_at_once, "cpu")(None, [slice(0, 1)])
    with pytest.raises(
        DeatError, match=r"a worker process for decoding images ended \(DataLoader worker .*memory ran out"
    ):
        next(read)


@pytest.mark.parametrize(
    ("processes", "count"), [("", 12), ("1", 12), ("4", 3), ("5", 2), ("100", 1), ("0", 12), ("many", 12)]
)
def test_worker_count_divides_the_cores_over_the_ranks(
    monkeypatch: pytest.MonkeyPatch, processes: str, count: int
) -> None:
    monkeypatch.setattr("deat_rb.data.workers.processors", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert worker_count() == count
    monkeypatch.setattr("deat_rb.data.workers.processors", lambda: 500)
    assert worker_count() <= MAX_WORKERS


# The end of the training process, however it comes.


SCRIPT = """
import multiprocessing, os, signal, sys, time

def main():
    from deat_rb.data.batches import Batches
    from deat_rb.data.datasets import load_data
    mode, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    if mode == "spawn":
        multiprocessing.set_start_method("spawn")
    data = load_data("folder", data_dir=folder, image_size=128, memory_limit=0)
    loader = Batches(data.train, 2, shuffle=True)
    loader.set_epoch(1)
    read = iter(loader)
    next(read)
    asked = []
    if mode == "deferred":
        signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if mode == "error":
        raise ZeroDivisionError
    if mode in ("interrupt", "kill", "deferred"):
        sys.stdin.readline() if mode == "deferred" else time.sleep(60)
    print("read", 1 + len(list(read)), "asked", len(asked), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(max((os.cpu_count() or 1) // 2, 1)))
    load_data("folder", data_dir=folder, image_size=128, memory_limit=0)
    (tmp_path / "script.py").write_text(SCRIPT)
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), mode, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pids: list[int]) -> list[int]:
    """Return the processes that still run, without zombies."""
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and b") Z" not in stat(pid)]


def stat(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b") Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "last_line"), [("interrupt", "KeyboardInterrupt"), ("error", "ZeroDivisionError"), ("kill", "")]
)
def test_workers_end_with_the_training_process(script: Any, mode: str, last_line: str) -> None:
    process, pids = script(mode)
    assert pids
    if mode == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    if mode == "kill":
        process.kill()
    _, errors = process.communicate(timeout=300)
    assert errors.strip().endswith(last_line)
    assert process.returncode != 0
    deadline = time.monotonic() + 120
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pids)


@needs_proc
@pytest.mark.slow
def test_workers_ignore_ctrl_c_so_that_training_can_finish_its_batch(script: Any) -> None:
    process, _ = script("deferred")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    output, errors = process.communicate("\n", timeout=300)
    assert (output, errors, process.returncode) == ("read 14 asked 1\n", "", 0)


@needs_proc
@pytest.mark.slow
def test_workers_can_be_spawned(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    process, pids = script("spawn")
    output = process.stdout.read()  # `communicate` loses what readline has read beyond its line
    errors = process.communicate(timeout=300)[1]
    assert (output, process.returncode) == ("read 14 asked 0\n", 0)
    assert "Traceback" not in errors  # on a busy machine Python 3.12's resource tracker may warn of a semaphore
    assert not alive(pids)


MEMORY = """
import multiprocessing, re, resource, sys, time
from pathlib import Path
from deat_rb.data.batches import Batches
from deat_rb.data.datasets import load_data

def own():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def worker():
    (child,) = multiprocessing.active_children()
    return 1024 * int(re.search("VmRSS:\\\\s+(\\\\d+)", Path(f"/proc/{child.pid}/status").read_text())[1])

def epoch(folder):
    seen = grown = 0
    data = load_data("folder", data_dir=Path(sys.argv[1], folder), image_size=512, memory_limit=0)
    for images, _ in Batches(data.train, 4, shuffle=True, augmentation="crop-flip"):
        if folder == "large" and seen == 0:
            before = worker()
            time.sleep(2)
            grown = worker() - before
        seen += len(images)
    return seen, data.train.nbytes, grown

epoch("small")
before = own()
print(*epoch("large"), own() - before)
"""


@needs_proc
@pytest.mark.slow
def test_worker_reader_holds_only_some_batches_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """160 images of one pixel, which decoded to 512x512 take 120 MiB: no process grows by a third of that.

    The worker has time to decode all of them while the first batch is used, and must not.
    """
    pytest.importorskip("resource", reason="measures memory")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    for folder, count in (("small", 4), ("large", 80)):
        for part in ("train", "test"):
            for name in ("a", "b"):
                (tmp_path / folder / part / name).mkdir(parents=True)
                for number in range(count if part == "train" else 1):
                    path = tmp_path / folder / part / name / f"{number}.png"
                    Image.new("RGB", (1, 1), (number, 0, 0)).save(path)
    (tmp_path / "script.py").write_text(MEMORY)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True, check=True
    )
    seen, whole, *grown = (int(word) for word in result.stdout.split())
    assert (seen, whole) == (160, 160 * 3 * 512 * 512)
    assert max(grown) < whole / 3
