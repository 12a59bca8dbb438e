"""Options, time budget and results of one invocation of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


class _BudgetSpent(BaseException):
    """The time budget is over; no Exception, which `Session.recording_failure` would record as that of a method."""


@dataclass
class Session:
    """State shared by all stages.

    Attributes:
        options: Options of the command.
        began: Start time of the command, from `time.monotonic`.
        rows: Results so far.
        trained: Networks trained by the stage ``table1``, by method.
    """

    options: argparse.Namespace
    began: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    trained: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The folder of the results."""
        out: Path = self.options.out
        return out

    @property
    def device(self) -> torch.device:
        """The measured device."""
        return torch.device(self.options.device)

    @property
    def cuda(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.device.type == "cuda"

    def seconds_left(self) -> float:
        """Return the remaining time budget in seconds."""
        budget: float = self.options.budget
        return budget - (time.monotonic() - self.began)

    def wait(self) -> None:
        """Synchronize with the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def record(self, stage: str, **values: Any) -> None:
        """Print a result and append it to results.jsonl, synced to disk immediately."""
        row = {"stage": stage, "at": round(time.monotonic() - self.began, 1), **values}
        self.rows.append(row)
        text = json.dumps(row, default=str)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text[:600], flush=True)

    @contextmanager
    def within_budget(self, stage: str) -> Iterator[None]:
        """End a stage that is not done when the time budget is over, and record that."""

        def end(*_: object) -> None:
            raise _BudgetSpent

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds_left(), 0.01))
        try:
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _BudgetSpent:
            self.record(stage, left_out=f"not done after {self.options.budget:.0f} s")
        finally:
            signal.signal(signal.SIGALRM, before)

    @contextmanager
    def recording_failure(self, stage: str, **values: Any) -> Iterator[None]:
        """Record errors, with tracebacks in log.txt, instead of raising them, so that the next measurement can run."""
        try:
            yield
        except Exception as error:
            with (self.out / "log.txt").open("a") as log:
                log.write(f"{stage} {values}\n{traceback.format_exc()}\n")
            self.record(stage, **values, failed=f"{type(error).__name__}: {str(error)[:300]}")
