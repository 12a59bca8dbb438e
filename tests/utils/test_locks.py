from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from children import run_in_child

from deat_rb.utils.errors import DeatError
from deat_rb.utils.locks import exclusive_lock


def test_exclusive_lock_refuses_a_second_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive_lock(path, busy="taken"), pytest.raises(DeatError, match=r"^taken$"):
        exclusive_lock(path, busy="taken").__enter__()
    with exclusive_lock(path, busy="taken"):
        pass


def test_exclusive_lock_is_freed_when_its_holder_is_killed_though_a_forked_worker_lives(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def work() -> None:
        with exclusive_lock(tmp_path / "lock", busy="taken"):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(writer, worker.to_bytes(4, "big"))
            os.kill(os.getpid(), signal.SIGKILL)

    assert not run_in_child(work)
    worker = int.from_bytes(os.read(reader, 4), "big")
    try:
        with exclusive_lock(tmp_path / "lock", busy="taken"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_exclusive_lock_without_a_busy_message_waits(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with exclusive_lock(tmp_path / "lock", busy="taken"):
            os.write(writer, b".")
            time.sleep(0.5)
        os._exit(0)
    os.read(reader, 1)
    began = time.monotonic()
    with exclusive_lock(tmp_path / "lock"):
        assert time.monotonic() - began > 0.2
    os.waitpid(child, 0)


def test_exclusive_lock_does_not_follow_a_link(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="other locks do not open the file")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DeatError, match=r"^no lock \("):
        exclusive_lock(tmp_path / "lock", busy="taken", failed="no lock").__enter__()
    assert (tmp_path / "precious").read_text() == "mine"
