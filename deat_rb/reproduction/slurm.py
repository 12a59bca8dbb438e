"""Workers on a cluster, submitted through submitit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deat_rb.utils.errors import DeatError

CLUSTER = "cluster"
"""Key of the option that names submitit's executor: ``slurm`` by default, or ``local`` for this machine."""

TIMEOUTS = "slurm_max_num_timeout"
"""Key of the option that says how often a job is queued again after its time limit."""

OFTEN = 1000
"""Its default; submitit's own, 3, would end a long study."""


class WorkerJob:
    """A worker run by submitit; when a job reaches its time limit, it is queued again.

    Args:
        arguments: Arguments of `deat-rb`.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def __call__(self) -> int:
        """Run the worker and return its exit status."""
        import subprocess

        return subprocess.run([sys.executable, "-m", "deat_rb", *self.arguments]).returncode

    def checkpoint(self, *_: Any) -> Any:
        """Return the job that submitit queues after the time limit: the same worker."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(arguments: Sequence[str], count: int, options: Mapping[str, str], logs: Path) -> list[Any]:
    """Submit workers and return submitit's jobs.

    Args:
        arguments: Arguments of `deat-rb`.
        count: Number of workers.
        options: Parameters of submitit's executor, such as ``timeout_min``, ``gpus_per_node`` and
            ``slurm_partition``, ``cluster``, and ``slurm_max_num_timeout``, 1,000 by default.
        logs: Folder of submitit's files, shared by all machines.

    Raises:
        DeatError: submitit or Slurm is missing, or an option is invalid.
    """
    try:
        import submitit
    except ImportError:
        raise DeatError(
            "--slurm needs the package submitit, which is not installed: pip install 'deat-rb[slurm]'"
        ) from None

    parameters = {name: _parsed(value) for name, value in options.items() if name != CLUSTER}
    timeouts = parameters.pop(TIMEOUTS, OFTEN)  # of the executor itself, not one of its jobs' parameters
    if not isinstance(timeouts, int):
        raise DeatError(f"--slurm-option {TIMEOUTS}={timeouts} is not a whole number: give how often a job may be "
                        "queued again after its time limit")  # fmt: skip
    try:
        executor = submitit.AutoExecutor(folder=str(logs.absolute()), cluster=options.get(CLUSTER, "slurm"),
                                         slurm_max_num_timeout=timeouts)  # fmt: skip
        executor.update_parameters(name="deat-rb", **parameters)
        with executor.batch():
            return [executor.submit(WorkerJob(arguments)) for _ in range(count)]
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise DeatError(f"the workers cannot be submitted to {options.get(CLUSTER, 'slurm')}: {error}") from error


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """Return options such as ``slurm_partition=gpu`` by name.

    Raises:
        DeatError: One has no ``=``.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise DeatError(f"--slurm-option {text} is not NAME=VALUE, such as slurm_partition=gpu")
        options[name] = value
    return options


def _parsed(value: str) -> int | str:
    return int(value) if value.isdecimal() else value
