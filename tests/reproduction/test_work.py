"""Work on a study by one process and by several that are killed."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from noise_folder import SIZE, make_folder
from small_runs import SMALL, identical
from small_studies import small_study, table_json, work
from training_problems import ARCH

from deat_rb.evaluation.runner import Progress
from deat_rb.models.spec import NormalizedModel
from deat_rb.reproduction.folder import Evaluated, StudyFolder
from deat_rb.reproduction.planning import Planner
from deat_rb.reproduction.results import collect
from deat_rb.reproduction.study import Evaluation, RunSpec, read_study
from deat_rb.reproduction.work import StudyCallback, Worker
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.train import train
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError, Interrupted, UnwritableError

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
    worker = Worker(study, folder)
    worker.work()
    (reason,) = worker.refused.values()
    assert "builds its network with 'evil_run:build', which runs that module's code" in reason


class CountingNetworks(StudyCallback):
    """Counts the networks in memory when a training and an evaluation begin."""

    def __init__(self) -> None:
        self.before = self._count()
        self.counts: list[int] = []

    def _count(self) -> int:
        return sum(type(each) is NormalizedModel for each in gc.get_objects())

    def training(self) -> AbstractContextManager[Callback]:
        self.counts.append(self._count() - self.before)
        return super().training()

    def evaluating(self) -> AbstractContextManager[Progress | None]:
        self.counts.append(self._count() - self.before)
        return super().evaluating()


@pytest.mark.slow
def test_networks_of_earlier_runs_are_freed(tmp_path: Path) -> None:
    """Even if Python, which counts objects and not the memory of a GPU, sees no reason to look for cycles."""
    study = small_study({"method": "pgd-1"}, {"method": "free-2"})
    gc.collect()
    callback = CountingNetworks()
    gc.disable()
    try:
        Worker(study, StudyFolder(tmp_path), callback).work()
    finally:
        gc.enable()
    assert callback.counts == [0, 1, 0, 1], "an evaluation's own network is the only one"


class Interrupting(StudyCallback):
    """Ends the first epoch as if it had taken 1,000 s and were followed by Ctrl-C."""

    def training(self) -> AbstractContextManager[Callback]:
        class AfterAnEpoch(Callback):
            def on_validation_end(self, row: EpochStats) -> None:
                row.seconds = 1000.0

            def on_epoch_end(self, row: EpochStats) -> None:
                raise KeyboardInterrupt

        return nullcontext(AfterAnEpoch())


def test_seconds_include_those_before_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = small_study(), StudyFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Worker(study, folder, Interrupting()).work()
    evaluated = Evaluated(attacks=("natural", "fgsm", "pgd-2"), asked=16, n_examples=16, model_sha256="", seconds=500)
    monkeypatch.setattr(Worker, "_evaluate", lambda *_: evaluated)
    Worker(study, folder).work()
    record = folder.record(study.runs[0])
    assert record is not None
    assert record.seconds > 1500


@pytest.mark.slow
def test_a_run_that_cannot_begin_here_is_left_to_others_without_a_record(tmp_path: Path) -> None:
    """One whose images are not mounted, and one for another device; a third is trained."""
    elsewhere = {"dataset": "folder", "data_dir": str(tmp_path / "images"), "image_size": SIZE, "train_size": None,
                 "val_size": 3, "batch_size": 9}  # fmt: skip
    study = small_study(
        {"method": "free-2", **elsewhere}, {"method": "pgd-2", "device": "cuda:99"}, {"method": "pgd-1"}
    )
    folder = StudyFolder(tmp_path / "study")
    study = replace(study, runs=tuple(replace(run, evaluation=Evaluation(("fgsm",), 6)) for run in study.runs))
    worker = Worker(study, folder)
    worker.work()
    absent, other, here = study.runs
    assert [folder.status(run) for run in study.runs] == ["waiting", "waiting", "done"]
    assert not folder.run_path(absent).exists()
    assert str(tmp_path / "images") in worker.refused[absent.name]
    assert "there is no device 'cuda:99'" in worker.refused[other.name]
    make_folder(tmp_path / "images")
    Worker(study, folder).work()
    assert [folder.status(run) for run in study.runs] == ["done", "waiting", "done"]
    assert here.name not in worker.refused


@pytest.mark.parametrize("evaluation", [Evaluation(("fgsm",), 501), Evaluation(("fgsm",), 16, autoattack=501)])
def test_more_images_than_the_digits_500_are_refused_before_training(tmp_path: Path, evaluation: Evaluation) -> None:
    study, folder = small_study(evaluation=evaluation), StudyFolder(tmp_path)
    worker = Worker(study, folder)
    worker.work()
    (reason,) = worker.refused.values()
    assert reason.endswith("= 501 is more than the 500 test images of digits: give at most that many")
    assert not folder.run_path(study.runs[0]).exists()


class StoppingInPgd(StudyCallback):
    """Ends an evaluation in its second attack, as by Ctrl-C."""

    def evaluating(self) -> AbstractContextManager[Progress]:
        def progress(attack: str, done: int, total: int, robust: int) -> None:
            if attack == "pgd-2":
                raise KeyboardInterrupt

        return nullcontext(progress)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_unfinished_evaluation_that_cannot_be_resumed_here_begins_again(tmp_path: Path, damaged: bool) -> None:
    """One begun on another device, or whose stored batches are damaged."""
    study, folder = small_study(), StudyFolder(tmp_path)
    with pytest.raises(Interrupted):
        Worker(study, folder, StoppingInPgd()).work()
    (state,) = folder.run_path(study.runs[0]).glob("eval-state-*")
    batches = list(state.glob("*.safetensors"))
    assert len(batches) == 3  # natural, fgsm and pgd-2: 16 images are one batch
    if damaged:
        for batch in batches:
            batch.write_bytes(b"damaged")
    else:
        settings = state / "evaluation.json"
        settings.write_text(settings.read_text().replace('"device": "cpu"', '"device": "cuda (NVIDIA A100)"'))
        assert "A100" in settings.read_text()
    Worker(study, folder).work()
    assert folder.status(study.runs[0]) == "done"
    assert not state.exists()


def test_a_begun_run_takes_over_changed_options_that_do_not_affect_the_result(tmp_path: Path) -> None:
    study, folder = small_study(), StudyFolder(tmp_path)
    (run,) = study.runs
    RunDirectory.create(folder.run_path(run), Planner().plan(run.options).config)
    work(small_study({"method": "pgd-1", "on_nonfinite": "skip", "save_every": 7.0, "threads": 1}), tmp_path)
    runtime = RunDirectory.open(folder.run_path(run)).config.runtime
    assert (runtime.on_nonfinite, runtime.save_every, runtime.threads) == ("skip", 7.0, 1)
    assert folder.status(run) == "done"


@pytest.mark.slow
def test_work_skips_what_is_done_and_adds_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work(small_study(), tmp_path)
    monkeypatch.setattr("deat_rb.reproduction.work.train", None)
    monkeypatch.setattr("deat_rb.reproduction.work.resume", None)
    work(small_study(), tmp_path)
    more = small_study(evaluation=Evaluation(("fgsm", "pgd-3"), 16))
    work(more, tmp_path)
    assert {"fgsm", "pgd-3"} <= collect(folder, more.runs)[0].values.keys()


def test_an_attack_in_another_norm_leaves_a_finished_run_done(tmp_path: Path) -> None:
    folder = work(small_study(evaluation=Evaluation(("natural",), 16)), tmp_path)
    study = small_study(evaluation=Evaluation(("torchattacks.PGDL2(eps=0.5)",), 16))
    before = folder.record(study.runs[0])
    assert before is not None
    assert before.status == "done"
    worker = Worker(study, folder)
    worker.work()
    (reason,) = worker.refused.values()
    assert "attacks in L2, but the evaluation is in Linf" in reason
    assert folder.record(study.runs[0]) == before


def test_natural_accuracy_alone_is_measured_and_in_the_table(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    row = {name: value for name, value in SMALL.items() if name != "method"}
    file.write_text(json.dumps({"options": {**row, "epochs": 1}, "runs": [{"method": "pgd-1"}],
                                "evaluation": {"attacks": "natural", "n_examples": 16}}))  # fmt: skip
    study = read_study(file)
    folder = work(study, tmp_path / "study")
    (result,) = collect(folder, study.runs)
    assert (result.status, result.images) == ("done", {"natural": 16})
    record = folder.record(study.runs[0])
    assert record is not None
    assert [each.attacks for each in record.evaluations] == [("natural",)]


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


def test_a_retry_after_a_failed_evaluation_neither_trains_nor_repeats_the_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = small_study(evaluation=Evaluation(("fgsm",), 16, autoattack=8)), StudyFolder(tmp_path)
    (run,) = study.runs
    evaluated: list[Sequence[str]] = []

    def evaluate(worker: Worker, run: RunSpec, attacks: Sequence[str], asked: int | None, begun: Any) -> Evaluated:
        evaluated.append(attacks)
        begun.value = True
        if "autoattack" in attacks and len(evaluated) == 2:
            raise DeatError("out of memory")
        return Evaluated(attacks=("natural", *attacks), asked=asked, n_examples=16, model_sha256="")

    monkeypatch.setattr(Worker, "_evaluate", evaluate)
    Worker(study, folder).work()
    assert folder.status(run) == "failed"
    shutil.rmtree(folder.run_path(run) / "checkpoints")  # as of a run that is finished
    folder.forget_failure(run)
    Worker(study, folder).work()
    assert folder.status(run) == "done"
    assert evaluated == [("fgsm",), ("autoattack",), ("autoattack",)]


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
