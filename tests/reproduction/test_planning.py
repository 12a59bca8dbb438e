"""Plans of a study's runs, and the data that its runs in a folder were trained on."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_folder import SIZE, make_folder
from PIL import Image
from small_reports import FGSM, NATURAL, report_of
from small_studies import small_study

from deat_rb.reproduction.folder import Evaluated, Record, StudyFolder
from deat_rb.reproduction.planning import Planner, check_evaluation, check_same_data
from deat_rb.reproduction.results import collect
from deat_rb.reproduction.study import Evaluation, RunSpec, Study
from deat_rb.reproduction.work import Worker
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors

ROW: dict[str, Any] = {"dataset": "folder", "image_size": SIZE, "batch_size": 9, "train_size": 18, "val_size": 3}


def folder_study(path: Path, **changes: Any) -> Study:
    return small_study({**ROW, "data_dir": str(path), **changes})


def begun(study: Study, path: Path) -> StudyFolder:
    """Return a study's folder in which its runs have begun."""
    folder = StudyFolder(path)
    for run in study.runs:
        RunDirectory.create(folder.run_path(run), Planner().plan(run.options).config)
    return folder


@pytest.mark.slow
def test_planner_loads_images_once_and_in_the_size_of_each_plan(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "images")
    own, seed, other = (
        folder_study(path, **changes).runs[0].options for changes in ({}, {"lr": 0.1}, {"image_size": 16})
    )
    planner = Planner()
    first = planner.plan(own)
    assert planner.plan(seed).data is first.data
    assert planner.plan(other).train.shape == (3, 16, 16)
    # the library's size, which is known only after the options are resolved
    (pretrained,) = small_study(
        {
            "dataset": "folder",
            "data_dir": str(path),
            "arch": "torchvision:resnet18",
            "pretrained": True,
            "batch_size": 9,
        }
    ).runs
    planned = Planner(dry=True).plan(pretrained.options.but(train_size=18, val_size=3))
    assert planned.train.shape == (3, 224, 224)
    assert planned.config.network.image_size == 224


def test_check_evaluation_refuses_attacks_in_another_norm_than_the_run() -> None:
    attacks = Evaluation(("fgsm", "torchattacks.PGDL2()"), 16)
    for norm in ("L2", "Linf"):
        (run,) = small_study({"method": "pgd-1", "norm": norm}, evaluation=attacks).runs
        planned = Planner(dry=True).plan(run.options)
        if norm == "L2":
            check_evaluation(run, planned)
            continue
        with pytest.raises(DeatError, match=r"PGDL2\(\) attacks in L2, but the evaluation is in Linf"):
            check_evaluation(run, planned)


def test_runs_on_other_images_in_a_folder_of_the_same_name_are_refused(tmp_path: Path) -> None:
    flowers, birds = (make_folder(tmp_path / name / "images") for name in ("flowers", "birds"))
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(birds / "train" / "a" / "1.png")
    study = folder_study(flowers)
    folder = begun(study, tmp_path / "study")
    check_same_data(folder, study.runs)
    assert folder_study(birds).runs[0].name == study.runs[0].name
    with pytest.raises(DeatError, match=r"was trained with --data-dir .*flowers/images, whose images are not those of "
                                        r".*birds/images; choose another --output$"):  # fmt: skip
        check_same_data(folder, folder_study(birds).runs)
    flowers.parent.rename(tmp_path / "moved")
    check_same_data(folder, folder_study(tmp_path / "moved" / "images").runs)
    check_same_data(folder, folder_study(tmp_path / "nowhere" / "images").runs)


def test_runs_with_other_extra_images_of_the_same_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name / "extra.npz" for name in ("first", "second", "copy")]
    for path, value in zip(paths, (0, 1, 0), strict=True):
        path.parent.mkdir()
        np.savez(path, image=np.full((90, 32, 32, 3), value, dtype=np.uint8), label=np.arange(90) % 10)
    first, second, copy = (small_study({"method": "pgd-1", "extra_data": str(path)}) for path in paths)
    folder = begun(first, tmp_path / "study")
    check_same_data(folder, first.runs)
    check_same_data(folder, copy.runs)
    with pytest.raises(DeatError, match=r"was trained with --extra-data .*first/extra.npz, whose images are not those"):
        check_same_data(folder, second.runs)


def test_runs_on_images_that_were_changed_in_place_are_not_averaged(tmp_path: Path) -> None:
    """Neither is a further one begun on the changed images."""
    images = make_folder(tmp_path / "images")
    study = small_study({**ROW, "data_dir": str(images)}, seeds=(0, 1), evaluation=Evaluation(()))
    first, second = study.runs
    folder = begun(replace(study, runs=(first,)), tmp_path / "study")
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(images / "train" / "a" / "1.png")
    worker = Worker(study, folder)
    worker.work()
    assert list(worker.refused) == [first.name, second.name]
    named = f"{folder.run_path(first)} and {folder.run_path(second)} have different images of {images}, which were"
    assert worker.refused[second.name].startswith(named)
    begun(replace(study, runs=(second,)), tmp_path / "study")
    for run in study.runs:
        folder.write_record(run, Record(status="done"))
    with pytest.raises(DeatError, match="have different images") as raised:
        collect(folder, study.runs)
    assert str(raised.value).startswith(named)


def test_runs_with_extra_images_that_were_changed_in_place_are_not_averaged(tmp_path: Path) -> None:
    extra = tmp_path / "extra.npz"
    np.savez(extra, image=np.zeros((90, 32, 32, 3), dtype=np.uint8), label=np.arange(90) % 10)
    study = small_study({"method": "pgd-1", "extra_data": str(extra)}, seeds=(0, 1), evaluation=Evaluation(()))
    folder = begun(study, tmp_path / "study")
    paths = [folder.run_path(run) for run in study.runs]
    RunDirectory.open(paths[1]).reconfigure(RunDirectory.open(paths[1]).config.but(extra_fingerprint="0" * 64))
    folder.create()
    for run in study.runs:
        folder.write_record(run, Record(status="done"))
    with pytest.raises(DeatError, match=f"{paths[0].name} and .*{paths[1].name} have different images of {extra}"):
        collect(folder, study.runs)


def test_runs_from_initial_weights_that_were_changed_in_place_are_not_averaged(tmp_path: Path) -> None:
    """Neither is a further one begun from the changed weights."""
    weights = tmp_path / "pre.safetensors"
    initial = Planner().plan(small_study().runs[0].options).trainer.model.state_dict()
    save_tensors(weights, initial)
    study = small_study({"method": "pgd-1", "init_from": str(weights)}, seeds=(0, 1), evaluation=Evaluation(()))
    first, second = study.runs
    folder = begun(replace(study, runs=(first,)), tmp_path / "study")
    save_tensors(weights, {name: 2 * tensor for name, tensor in initial.items()})
    worker = Worker(study, folder)
    worker.work_on(second)
    named = f"{folder.run_path(first)} and {folder.run_path(second)} have different initial weights of {weights}, which"
    assert worker.refused[second.name].startswith(named)
    begun(replace(study, runs=(second,)), tmp_path / "study")
    for run in study.runs:
        folder.write_record(run, Record(status="done"))
    with pytest.raises(DeatError, match=re.escape(named)):
        collect(folder, study.runs)


def test_seeds_in_the_precisions_of_unlike_machines_are_not_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a further one begun where it would be in another precision; a study may compare precisions."""
    study = small_study({"method": "pgd-1", "precision": "auto"}, seeds=(0, 1), evaluation=Evaluation(()))
    first, second = study.runs
    monkeypatch.setattr("deat_rb.runs.resolution.resolve_precision", lambda name, device: "fp32")
    folder = begun(replace(study, runs=(first,)), tmp_path / "study")
    monkeypatch.setattr("deat_rb.runs.resolution.resolve_precision", lambda name, device: "bf16")
    worker = Worker(study, folder)
    worker.work_on(second)
    named = f"{folder.run_path(first)} and {folder.run_path(second)} differ only in the seed, but one is in fp32 and "
    assert worker.refused[second.name].startswith(f"{named}one in bf16, as their machines chose: train both on")
    assert not folder.run_path(second).exists()
    begun(replace(study, runs=(second,)), tmp_path / "study")
    for run in study.runs:
        folder.write_record(run, Record(status="done"))
    with pytest.raises(DeatError, match=re.escape(named)):
        collect(folder, study.runs)
    monkeypatch.undo()
    both = small_study({"method": "pgd-1"}, {"method": "pgd-1", "precision": "bf16"}, evaluation=Evaluation(()))
    folder = begun(both, tmp_path / "both")
    folder.create()
    for run in both.runs:
        folder.write_record(run, Record(status="done"))
    assert [each.status for each in collect(folder, both.runs)] == ["done", "done"]


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_was_extended_is_neither_evaluated_nor_averaged(tmp_path: Path, evaluated: bool) -> None:
    """As by `deat-rb train --resume RUN --epochs 12`, after its evaluation or before it."""
    study = small_study(
        {"method": "pgd-1", "lr_schedule": "flat"}, evaluation=Evaluation(() if evaluated else ("fgsm",))
    )
    (run,) = study.runs
    folder = begun(study, tmp_path / "study")
    own = RunDirectory.open(folder.run_path(run))
    own.reconfigure(own.config.extended(12))
    folder.create()
    folder.write_record(run, Record(status="done" if evaluated else "trained"))
    named = f"{own.path} was extended to 12 epochs by --resume, which the study does not describe: move it elsewhere"
    with pytest.raises(DeatError, match=re.escape(named)):
        collect(folder, study.runs)
    worker = Worker(study, folder)
    worker.work()
    assert [reason.startswith(named) for reason in worker.refused.values()] == ([] if evaluated else [True])


def test_reports_on_other_images_are_not_those_of_the_study(tmp_path: Path) -> None:
    study = small_study()
    (run,) = study.runs
    folder = begun(study, tmp_path)
    config = RunDirectory.open(folder.run_path(run)).config
    own, other = (
        report_of(natural=NATURAL, **{"pgd-2": verdicts}).model_copy(
            update={"seed": 0, "model_sha256": "a", "provenance": {"data_sha256": digest}}
        )
        for verdicts, digest in ((FGSM, config.data_fingerprint), (NATURAL, "0" * 64))
    )
    evaluated = Evaluated(attacks=("natural", "pgd-2"), asked=16, n_examples=5, model_sha256="a")
    folder.create()
    folder.write_record(run, Record(status="done", evaluations=(evaluated,)))
    (folder.run_path(run) / "evaluations").mkdir()
    other.save(folder.run_path(run) / "evaluations" / "a.json")
    with pytest.raises(DeatError, match=r"no longer has a report of pgd-2"):
        folder.report(run, "pgd-2", 16)
    own.save(folder.run_path(run) / "evaluations" / "b.json")
    found = folder.report(run, "pgd-2", 16)
    assert found is not None
    assert found[1].results["pgd-2"].n_correct == 3


def test_a_status_does_not_send_a_worker_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--status` holds the lock of each run for a moment."""
    study, folder = small_study(), StudyFolder(tmp_path)
    folder.create()

    def process(worker: Worker, run: RunSpec, number: int) -> bool:
        folder.write_record(run, Record(status="failed"))
        return True

    monkeypatch.setattr(Worker, "_process", process)
    with ExitStack() as status:
        status.enter_context(folder.claimed(study.runs[0]))
        monkeypatch.setattr("deat_rb.reproduction.work.time.sleep", lambda seconds: status.close())
        Worker(study, folder).work(wait=False)
    assert folder.status(study.runs[0]) == "failed"
