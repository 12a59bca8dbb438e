"""Worker of a study: claims runs one after the other, trains and evaluates each, and records the outcome."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from deat_rb.eval_target import open_target
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Report
from deat_rb.evaluation.resume import resume_or_restart
from deat_rb.evaluation.runner import Progress
from deat_rb.evaluation.store import store_report
from deat_rb.reproduction.folder import Evaluated, Record, StudyFolder
from deat_rb.reproduction.planning import (
    Planner,
    begun_runs,
    check_attacks,
    check_evaluation,
    check_not_extended,
    check_one_dataset,
    check_one_precision,
)
from deat_rb.reproduction.provenance import eval_command, hardware, now, source_commit
from deat_rb.reproduction.study import RunSpec, Study
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import MAY_CHANGE
from deat_rb.runs.summary import summary
from deat_rb.runs.train import resume, train
from deat_rb.training.callbacks import Callback
from deat_rb.training.state import TrainingState
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.errors import DeatError, UnwritableError
from deat_rb.utils.locks import BusyError

POLL = 2.0
"""Seconds between checks of the runs that other processes have claimed."""

ATTEMPTS = 5
"""Attempts to claim a run before it counts as claimed by another process: `StudyFolder.status` locks it briefly."""

PAUSE = 0.2
"""Seconds between these attempts."""


class StudyCallback:
    """Hooks of the work on a study, which do nothing by default."""

    def on_run_start(self, run: RunSpec, number: int, total: int) -> None:
        """Run when run ``number`` (from 1) of ``total`` has been claimed."""

    def on_run_end(self, run: RunSpec, record: Record) -> None:
        """Run when a run is done or has failed."""

    def on_refused(self, run: RunSpec, reason: str) -> None:
        """Run when a run cannot begin on this machine."""

    def on_waiting(self, busy: int) -> None:
        """Run when all remaining runs, ``busy`` of them, are claimed by other processes."""

    def training(self) -> AbstractContextManager[Callback]:
        """Return a callback for training."""
        return nullcontext(Callback())

    def evaluating(self) -> AbstractContextManager[Progress | None]:
        """Return the progress of an evaluation."""
        return nullcontext(None)


class _Begun(Callback):
    """Notes whether the training or evaluation of a run has begun, so that an error is the run's own.

    Before that, it may be due to this machine, such as a missing folder, device or package.
    """

    value = False

    def on_fit_start(self, state: TrainingState) -> None:
        """Note it."""
        self.value = True


class Worker:
    """Trains and evaluates the runs of a study that no other process has claimed.

    Args:
        study: The study.
        folder: Its folder.
        callback: Hooks, which may show the progress.

    Attributes:
        refused: Why runs could not begin on this machine, by name; they are left to other processes.
    """

    def __init__(self, study: Study, folder: StudyFolder, callback: StudyCallback | None = None) -> None:
        self.study = study
        self.folder = folder
        self.callback = callback or StudyCallback()
        self.refused: dict[str, str] = {}
        self._planner = Planner()

    def work(self, *, wait: bool = True) -> None:
        """Train and evaluate runs until all are done, have failed or cannot begin here.

        Args:
            wait: Whether to wait for runs that other processes have claimed, and take over those of killed ones.

        Raises:
            DeatError: The folder cannot be written or a record is damaged. Errors of a run are recorded instead.
            Interrupted: Ctrl-C was pressed; the run in progress can be resumed.
        """
        self.folder.create()
        idle = 0
        while True:
            worked, busy = self._pass()
            idle = 0 if worked else idle + 1
            if not busy or (idle == ATTEMPTS and not wait):
                return
            if idle == ATTEMPTS:
                self.callback.on_waiting(busy)
            if idle:
                time.sleep(PAUSE if idle < ATTEMPTS else POLL)

    def work_on(self, run: RunSpec) -> bool:
        """Train and evaluate one run, unless it is done or has failed; return False if another process claims it.

        It is in `refused` afterwards if it cannot begin here.
        """
        self.folder.create()
        for _ in range(ATTEMPTS):
            with self.folder.claimed(run) as free:
                if free:
                    settled = self.folder.is_settled(run)
                    return settled or self._process(run, self.study.runs.index(run) + 1)
            time.sleep(PAUSE)
        return False

    def _pass(self) -> tuple[bool, int]:
        """Try each run once; return whether one was worked on, and how many are claimed by other processes."""
        worked, busy = False, 0
        for number, run in enumerate(self.study.runs, start=1):
            if run.name in self.refused or self.folder.is_settled(run):
                continue
            with self.folder.claimed(run) as free:
                if not free:
                    busy += 1
                elif not self.folder.is_settled(run):
                    if self._process(run, number):
                        worked = True
                    else:
                        busy += 1
        return worked, busy

    def _process(self, run: RunSpec, number: int) -> bool:
        """Train and evaluate a claimed run; return False if a `deat-rb train --resume` is training it."""
        self.callback.on_run_start(run, number, len(self.study.runs))
        begun, record = _Begun(), self.folder.record(run)
        facts: dict[str, Any] = {"commit": source_commit(), "started": now()}
        try:
            check_not_extended(self.folder, run)
            facts["hardware"] = hardware(run.options.runtime.device)
            if record is None:
                self._train(run, begun)
                trained = sum(row.seconds + row.val_seconds for row in self.folder.rows(run))
                record = Record(status="trained", finished=now(), seconds=trained, **facts)
                self.folder.write_record(run, record)
            for attacks, asked in record.missing(run.evaluation):
                made = self._evaluate(run, attacks, asked, begun)
                evaluations, seconds = (*record.evaluations, made), record.seconds + made.seconds
                record = record.model_copy(update={"evaluations": evaluations, "seconds": seconds})
                self.folder.write_record(run, record)
            record = record.model_copy(update={"status": "done", "finished": now()})
        except UnwritableError:
            raise
        except BusyError:
            return False
        except Exception as error:  # an error of one run is recorded in the table and does not stop the others
            reason = str(error) if isinstance(error, DeatError) else f"{type(error).__name__}: {_first_line(error)}"
            if not begun.value:
                self.refused[run.name] = reason
                self.callback.on_refused(run, reason)
                return True
            failure = {"status": "failed", "reason": reason, "trained": record is not None, "finished": now()}
            record = (record or Record(status="failed", **facts)).model_copy(update=failure)
        self.folder.write_record(run, record)
        self.callback.on_run_end(run, record)
        return True

    def _train(self, run: RunSpec, begun: _Begun) -> None:
        gc.collect()  # frees what the run before had on the device, since networks and methods refer to each other
        path, explicit = self.folder.run_path(run), run.options.explicit()
        with self.callback.training() as callback:
            if path.is_dir():
                changes = {name: explicit[name] for name in MAY_CHANGE if name in explicit}
                resume(path, changes, callbacks=[begun, callback], trust_code=self._trusts(run))
                return
            planned = self._planner.plan(run.options)
            check_evaluation(run, planned)
            runs = [*begun_runs(self.folder, self.study.runs), (run, planned.config)]
            check_one_dataset(self.folder, runs)
            check_one_precision(self.folder, runs)
            train(planned, output=self.folder.runs, name=run.name, callbacks=[begun, callback])

    def _trusts(self, run: RunSpec) -> bool:
        """Return whether a run's files name the network that the study names, whose code is trusted."""
        config = RunDirectory.open(self.folder.run_path(run)).config
        return config.model.arch == config.network.arch == run.options.model.arch

    def _evaluate(self, run: RunSpec, attacks: Sequence[str], asked: int | None, begun: _Begun) -> Evaluated:
        begun.value = False
        gc.collect()  # as in `_train`
        path, data = self.folder.run_path(run), run.options.data
        target = open_target(path, data_dir=data.data_dir, memory_limit=data.memory_limit, trust_code=self._trusts(run))
        if target.provenance["data_sha256"] != RunDirectory.open(path).config.data_fingerprint:
            raise DeatError("the images were changed after the run was trained on them; restore them")
        images, labels = target.test_images(asked)
        check_attacks(attacks, target.norm)
        device = resolve_device(run.options.runtime.device)
        begun.value = True

        def finish(report: Report) -> None:
            store_report(report, model=target.model, images=images, labels=labels, device=device,
                         classes=target.classes, run=path, own_eps=target.eps, own_norm=target.norm,
                         training=summary(RunDirectory.open(path)))  # fmt: skip

        with self.callback.evaluating() as progress:
            # One begun on another device or with other versions starts over: it is hours, but the run is days.
            report = resume_or_restart(partial(
                evaluate,
                target.model, images, labels, attacks=attacks, eps=target.eps, norm=target.norm, device=device,
                checks="quick", state=_state(path, attacks, asked), progress=progress, finish=finish,
                provenance={**target.provenance, "command": eval_command(run, self.folder.runs, attacks, asked)},
            ))  # fmt: skip
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # natural accuracy is part of every report
        return Evaluated(attacks=tuple(dict.fromkeys(("natural", *attacks))), asked=asked, n_examples=report.n_examples,
                         model_sha256=report.model_sha256,
                         seconds=sum(each.seconds for each in report.results.values()))  # fmt: skip


def _state(run: Path, attacks: Sequence[str], asked: int | None) -> Path:
    """Return the folder of an unfinished evaluation, one for each set of attacks and number of images."""
    return run / f"eval-state-{sha256(repr((tuple(attacks), asked)).encode()).hexdigest()[:8]}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
