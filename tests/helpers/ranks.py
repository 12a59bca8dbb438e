"""Two ranks as torchrun starts them, except that they and their launcher are forks, which have everything imported."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from children import exit_status, fork
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deat_rb.utils import distributed


def start_two_ranks(work: Callable[[], None], output: Path) -> int:
    """Start a launcher that runs ``work`` on two ranks, which print into ``output``; return its process id."""

    def rank() -> None:
        atexit._clear()
        PartialState._reset_state()
        distributed.world.cache_clear()
        try:
            work()
        finally:
            atexit._run_exitfuncs()  # a fork of multiprocessing does not

    def launch() -> None:
        config = LaunchConfig(1, 1, 2, run_id="test", rdzv_endpoint="localhost:0", rdzv_backend="c10d", max_restarts=0,
                              start_method="fork")  # fmt: skip
        elastic_launch(config, rank)()

    return fork(launch, output)


def on_two_ranks(work: Callable[[], None], output: Path) -> None:
    """Run ``work`` on two ranks, which print into ``output``."""
    assert exit_status(start_two_ranks(work, output)) == 0, output.read_text(encoding="utf-8")
