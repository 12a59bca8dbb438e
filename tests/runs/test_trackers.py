"""Experiment trackers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
from click.testing import CliRunner, Result
from small_runs import SMALL

from deat_rb.cli import main
from deat_rb.evaluation.report import Report
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.trackers import log_evaluation
from deat_rb.runs.train import resume, train
from deat_rb.training.callbacks import Callback
from deat_rb.utils.errors import DeatError

pytestmark = pytest.mark.usefixtures("without_curves")


def test_tracker_logs_each_epoch_and_the_result_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, history = train({**SMALL, "track": ["tensorboard"]}, output=tmp_path, name="run")
    log_evaluation(run, {"fgsm": 0.25})
    logged: dict[str, dict[int, float]] = {}
    for folder in {file.parent for file in (run.path / "tensorboard").rglob("events*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in events.Tags()["scalars"]:
            logged.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    assert logged["l_x"] == {row.epoch: pytest.approx(row.l_x) for row in history.rows}
    assert logged["result/epoch"] == {2: history.selected}
    assert logged["eval/fgsm"] == {2: 0.25}


class FakeWandb(ModuleType):
    """The calls of wandb that Accelerate makes, recorded.

    As in wandb (its issue 5632), steps must not fall, and those of a continued run begin after its last one; values of
    other steps are dropped.
    """

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.next_step = 0
        self.finished = 0
        self.config = SimpleNamespace(values={}, update=self._update)
        self.summary = SimpleNamespace(values={}, update=self._summarize)
        self.fails = False
        self.fails_at: int | None = None

    def _update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:
        self.config.values.update(values)

    def init(self, **options: Any) -> FakeWandb:
        if self.fails:
            raise RuntimeError("No API key configured.\nUse `wandb login`")
        self.started.append(options)
        self.next_step = self.logged[-1][0] + 1 if self.logged else 0
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._may_fail(step)
        if step >= self.next_step:
            self.logged.append((step, values))
            self.next_step = step

    def _summarize(self, values: dict[str, Any]) -> None:
        self._may_fail(self.next_step)
        self.summary.values.update(values)

    def _may_fail(self, step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to host\nretry later")

    def finish(self) -> None:
        self.finished += 1
        if self.fails_at == -1:
            raise ConnectionError("no route to host")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["wandb"])
    yield fake
    assert fake.finished == len(fake.started)


def test_wandb_gets_project_name_tags_options_epochs_and_result(tmp_path: Path, wandb: FakeWandb) -> None:
    run, history = train({**SMALL, "track": ["wandb"], "project": "thesis"}, output=tmp_path, name="first")
    (started,) = wandb.started
    assert (started["project"], started["name"], started["resume"]) == ("thesis", "first", "allow")
    assert {"pgd-1", "digits", "seed 0", "fast"} <= set(started["tags"])
    assert wandb.config.values["lr"] == run.config.optim.lr
    assert wandb.config.values["track"] == "['wandb']"
    assert [step for step, _ in wandb.logged] == [1, 2]
    assert wandb.logged[0][1]["loss"] == history.rows[0].loss
    assert wandb.summary.values["result/backward_passes"] == history.backwards

    log_evaluation(run, {"fgsm": 0.25})
    assert wandb.started[1]["id"] == started["id"]  # the same run, not another one
    assert wandb.summary.values["eval/fgsm"] == 0.25


def test_wandb_run_is_continued_with_its_identifier(tmp_path: Path, wandb: FakeWandb) -> None:
    flat = {**SMALL, "lr_schedule": "flat", "track": ["wandb"]}
    run, _ = train(flat, output=tmp_path, name="run")
    resume(run.path, {"epochs": 3}, trust_code=True)
    log_evaluation(run, {"fgsm": 0.25})
    resume(run.path, {"epochs": 4}, trust_code=True)
    assert [started["id"] for started in wandb.started] == [wandb.started[0]["id"]] * 4
    assert wandb.started[0]["project"] == "deat-rb"
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4]
    with pytest.raises(DeatError, match="--project other cannot be used: run is already logged to the project deat-rb"):
        resume(run.path, {"epochs": 5, "project": "other"}, trust_code=True)
    assert len(RunDirectory.open(run.path).rows()) == 4


@pytest.mark.parametrize("fails_at", [1, -1])
def test_tracker_that_fails_during_training_does_not_end_it(tmp_path: Path, wandb: FakeWandb, fails_at: int) -> None:
    wandb.fails_at = fails_at
    warnings: list[str] = []

    class Warnings(Callback):
        def on_warning(self, message: str) -> None:
            warnings.append(message)

    run, history = train({**SMALL, "track": ["wandb"]}, output=tmp_path, name="run", callbacks=[Warnings()])
    assert [each for each in warnings if "wandb" in each] == [
        "wandb failed and lacks values from here on (ConnectionError: no route to host); they are in metrics.jsonl"
    ]
    assert len(run.rows()) == len(history.rows) == 2
    assert len(wandb.logged) == (0 if fails_at == 1 else 2)
    wandb.finished = len(wandb.started)  # a tracker that fails is not closed


def test_log_evaluation_refuses_a_tracker_that_fails(tmp_path: Path, wandb: FakeWandb) -> None:
    run, _ = train({**SMALL, "track": ["wandb"]}, output=tmp_path, name="run")
    wandb.fails_at = len(run.rows()) + 1
    with pytest.raises(DeatError, match=r"--track wandb failed .* \(ConnectionError: no route to host\); .* eval.json"):
        log_evaluation(run, {"fgsm": 0.25})
    wandb.finished = len(wandb.started)


def test_tracker_that_does_not_start_leaves_no_run(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.fails = True
    with pytest.raises(DeatError, match=r"--track wandb cannot be started \(RuntimeError: No API key configured\.\): "
                                        "log in with wandb login, or set WANDB_MODE=offline"):  # fmt: skip
        train({**SMALL, "track": ["wandb"]}, output=tmp_path, name="run")
    assert not list(tmp_path.iterdir())


def test_mlflow_run_is_continued_with_its_identifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    def start_run(**options: Any) -> SimpleNamespace:
        started.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    fake = ModuleType("mlflow")
    fake.__dict__.update(
        start_run=start_run, search_experiments=lambda **_: [], create_experiment=lambda **options: options["name"],
        log_params=logged.append, log_metrics=lambda values, step: logged.append(values), end_run=lambda: None,
        utils=SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["mlflow"])
    run, _ = train({**SMALL, "track": ["mlflow"]}, output=tmp_path, name="run")
    log_evaluation(run, {"fgsm": 0.25})
    assert [(each["experiment_id"], each["run_name"], each["run_id"]) for each in started] == [
        ("deat-rb", "run", None), ("deat-rb", "run", "abc")
    ]  # fmt: skip
    assert started[0]["tags"]["method"] == "pgd-1"
    assert json.loads((run.path / "trackers.json").read_text()) == {"mlflow": {"project": "deat-rb", "id": "abc"}}
    assert logged[-1] == {"eval/fgsm": 0.25}


def test_check_trackers_refuses_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="--track tensorbord is unknown: did you mean 'tensorboard'"):
        train({"method": "pgd-1", "track": ["tensorbord"]}, output=tmp_path)
    with pytest.raises(DeatError, match=r"--track wandb needs the package wandb, .*: pip install wandb"):
        train({"method": "pgd-1", "track": ["wandb"]}, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_eval_track_needs_a_tracked_run(tmp_path: Path) -> None:
    run, _ = train(SMALL, output=tmp_path, name="run")
    done = CliRunner().invoke(main, ["eval", str(run.path), "--track", "--trust-code"])
    assert done.exit_code == 2
    assert done.stderr.endswith("run was not logged to a tracker during training: omit --track\n")


def test_eval_track_logs_the_runs_own_evaluation_only(tmp_path: Path, wandb: FakeWandb) -> None:
    run, _ = train({**SMALL, "track": ["wandb"]}, output=tmp_path, name="run")

    def evaluate(*options: str) -> Result:
        fixed = ["--attacks", "fgsm", "--checks", "none", "--no-page", "--device", "cpu", "--trust-code", "--track"]
        return CliRunner().invoke(main, ["eval", str(run.path), *fixed, *options])

    assert evaluate("--n-examples", "32").stdout.endswith("logged to wandb\n")
    report = Report.load(run.path)
    logged = dict(wandb.summary.values)
    assert logged["eval/fgsm"] == report.results["fgsm"].accuracy
    assert logged["eval/n_examples"] == 32
    assert evaluate("--n-examples", "8").stdout.endswith("not logged, because it is not the run's eval.json\n")
    for options in (["--eps", "0"], ["--norm", "L2"]):
        refused = evaluate(*options)
        assert refused.exit_code == 2
        assert "--track is only for evaluations of a run on its own dataset, with its norm and eps" in refused.stderr
    assert evaluate("--n-examples", "32", "--eps", "0.05,0.1").stdout.endswith("logged to wandb\n")
    assert wandb.summary.values == logged
