"""Work on a study by one process and by several that are killed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_runs import identical
from small_studies import small_study, table_json, work
from training_problems import ARCH

from deat_rb.reproduction.folder import StudyFolder
from deat_rb.reproduction.results import collect
from deat_rb.reproduction.study import Evaluation
from deat_rb.reproduction.work import Worker
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.train import train
from deat_rb.utils.errors import UnwritableError

KILLED_AT_WRITE = (1, 2, 5, 8, 3, 6)
"""The file at whose writing each worker is killed: fewer than the study writes, so no worker finishes before."""


pytestmark = pytest.mark.usefixtures("without_curves")


@pytest.mark.slow
def test_work_trains_evaluates_and_records(tmp_path: Path) -> None:
    study = small_study({"method": "pgd-1"}, {"method": "free-2"})
    folder = work(study, tmp_path)
    results = collect(folder, study.runs)
    assert [(each.label, each.status) for each in results] == [("pgd-1", "done"), ("free-2", "done")]
    assert set(results[0].values) == {"natural", "fgsm", "pgd-2", "backward passes", "minutes", "epochs"}
    assert [each.values["backward passes"] for each in results] == [8, 8]  # 2 batches, 2 epochs: 1 + 1 and 2 passes
    # the run is the one that `train` makes with the same options
    alone, _ = train(study.runs[0].options, output=tmp_path / "alone")
    there = RunDirectory.open(folder.run_path(study.runs[0]))
    assert identical(alone, there)


@pytest.mark.slow
def test_work_evaluates_in_the_norm_of_training(tmp_path: Path) -> None:
    study = small_study({"method": "pgd-1", "norm": "L2", "eps": 2.0})
    folder = work(study, tmp_path)
    assert collect(folder, study.runs)[0].status == "done"
    found = folder.report(study.runs[0], "fgsm", 16)
    assert found is not None
    assert (found[1].norm, found[1].eps, found[0].name) == ("L2", 2.0, "eval.json")


@pytest.mark.slow
def test_work_runs_no_module_that_a_found_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a study whose own networks are trusted."""
    (tmp_path / "evil_run.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    study, folder = small_study(), StudyFolder(tmp_path)
    monkeypatch.setattr(Worker, "_evaluate", lambda *_: (_ for _ in ()).throw(UnwritableError("full")))
    with pytest.raises(UnwritableError):
        Worker(study, folder).work()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    config = folder.run_path(study.runs[0]) / "config.json"
    config.write_text(config.read_text().replace(ARCH, "evil_run:build"))
    work(study, tmp_path)
    reason = collect(folder, study.runs)[0].reason
    assert "builds its network with 'evil_run:build', which runs that module's code" in reason


def test_work_counts_the_training_of_an_earlier_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = small_study(), StudyFolder(tmp_path)
    monkeypatch.setattr(Worker, "_evaluate", lambda *_: (_ for _ in ()).throw(UnwritableError("full")))
    with pytest.raises(UnwritableError):
        Worker(study, folder).work()
    trained = folder.record(study.runs[0])
    assert trained is not None
    folder.write_record(study.runs[0], trained.model_copy(update={"seconds": 1000.0}))
    monkeypatch.undo()
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda *_, **__: None)
    Worker(study, folder).work()
    record = folder.record(study.runs[0])
    assert record is not None
    assert record.seconds > 1000


@pytest.mark.slow
def test_work_skips_what_is_done_and_adds_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work(small_study(), tmp_path)
    monkeypatch.setattr("deat_rb.reproduction.work.train", None)
    monkeypatch.setattr("deat_rb.reproduction.work.resume", None)
    work(small_study(), tmp_path)
    more = small_study(evaluation=Evaluation(("fgsm", "pgd-3"), 16))
    work(more, tmp_path)
    assert {"fgsm", "pgd-3"} <= collect(folder, more.runs)[0].values.keys()


def test_a_failed_run_stops_no_other_and_is_tried_again_on_request(tmp_path: Path) -> None:
    study = small_study({"method": "u-fgsm", "lr": 1e30}, {"method": "pgd-1"})
    folder = work(study, tmp_path)
    failed, done = collect(folder, study.runs)
    assert (failed.status, done.status) == ("failed", "done")
    assert "diverged" in failed.reason
    assert "diverged" in table_json(study, folder).decode()
    before = folder.record(study.runs[0])
    work(study, tmp_path)
    assert folder.record(study.runs[0]) == before
    folder.forget_failure(study.runs[0])
    assert folder.status(study.runs[0]) == "begun"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its workers")
def test_killed_workers_give_the_same_table(tmp_path: Path) -> None:
    study = small_study({"method": "pgd-1"}, {"method": "m-deat"}, {"method": "u-fgsm", "lr": 1e30}, seeds=(0, 1))
    undisturbed = table_json(study, work(study, tmp_path / "undisturbed"))
    folder = StudyFolder(tmp_path / "killed")
    folder.create()

    def started(kill_at_write: int | None) -> int:
        child = os.fork()
        if child == 0:
            try:
                if kill_at_write is not None:
                    kill_at_call(os, "replace", kill_at_write)
                Worker(study, folder).work()
                os._exit(0)
            finally:
                os._exit(1)
        return child

    workers = {started(kill_at_write) for kill_at_write in KILLED_AT_WRITE[:2]}
    for kill_at_write in (*KILLED_AT_WRITE[2:], None, None):
        assert os.WIFSIGNALED(ended(workers))
        workers.add(started(kill_at_write))
    assert [ended(workers), ended(workers)] == [0, 0]
    again = table_json(study, folder).replace(b"/killed/", b"/undisturbed/")
    assert again == undisturbed
    assert b'"failed"' in again


def ended(children: set[int]) -> int:
    """Wait for the first of the children to end, remove it from the set and return its status."""
    while True:
        for child in children:
            pid, status = os.waitpid(child, os.WNOHANG)  # os.wait() would also return children of other tests
            if pid:
                children.remove(child)
                return status
        time.sleep(0.05)


def kill_at_call(module: ModuleType, name: str, number: int) -> None:
    """Kill this process at call ``number`` (from 1) of a function, before or, at even numbers, after its work."""
    function, calls = getattr(module, name), itertools.count(1)

    def counted(*args: Any) -> None:
        last = next(calls) == number
        if not (last and number % 2):
            function(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, counted)
