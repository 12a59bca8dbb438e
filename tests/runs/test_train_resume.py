"""Resuming a run: what is kept, what may change, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_in_child
from resumed_runs import Stops
from small_runs import SMALL, identical

from deat_rb.data.datasets import load_data
from deat_rb.methods.stopping import RobustnessDrop
from deat_rb.runs import plan
from deat_rb.runs import train as training
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import had_another_start, make_options, nest, read_options
from deat_rb.runs.train import resume, train
from deat_rb.training import checkpoint
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.stopping_rule import Stop
from deat_rb.utils import threads
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError, Interrupted

pytestmark = pytest.mark.usefixtures("without_curves")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    with pytest.raises(Interrupted):
        train(SMALL, output=path, name="run", callbacks=[Stops(3)])
    return path / "run"


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run of 2 epochs with a cyclic learning rate, interrupted after the first batch of the second."""
    shutil.copytree(stopped_once, tmp_path / "run")
    return tmp_path / "run"


def edit(run: Path, **changes: Any) -> None:
    content = json.loads((run / "config.json").read_text())
    for key, value in nest(changes).items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (run / "config.json").write_text(json.dumps(content))


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.2}, "lr"),
        ({"epochs": 3}, "epochs"),
        ({"epochs": 1}, "epochs"),
        ({"momentum": 0.5, "seed": 3}, "momentum, seed"),
        ({"lr_schedule": "flat"}, "lr_schedule"),
        ({"lr_epochs": 7}, "lr_epochs"),
        ({"batch_size": 16}, "batch_size"),
        ({"method": "pgd-2"}, "method"),
        ({"early_stopping": False}, "early_stopping"),
        ({"data_fingerprint": "0"}, "data_fingerprint"),
        ({"select": "best"}, "select"),
    ],
)
def test_resume_refuses_an_edited_configuration(change: dict[str, Any], named: str, stopped: Path) -> None:
    edit(stopped, **change)
    before = everything(stopped)
    with pytest.raises(DeatError, match=f"config.json was changed after the run began, in {named}; restore"):
        resume(stopped, {}, trust_code=True)
    assert everything(stopped) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, "--lr = 0.2 differs from the run's 0.1; omit it or start a new run"),
        ({"method": "pgd-2"}, "--method = pgd-2 differs from the run's pgd-1"),
        ({"dataset": "cifar10"}, "--dataset = cifar10 differs from the run's digits"),
        ({"train_size": 70}, "--train-size = 70 differs from the run's 64"),
        ({"arch": "wrn-10-1"}, "--arch = wrn-10-1 differs from the run's training_problems:network"),
        ({"precision": "bf16"}, "--precision = bf16 differs from the run's fp32"),
        ({"seed": 1}, "--seed = 1 differs from the run's 0"),
        ({"sync_bn": True}, "--sync-bn = True differs from the run's False"),
        ({"compile": True}, "--compile = True differs from the run's False"),
        (
            {"epochs": 3},
            "--epochs = 3 differs from the run's 2, and a run with a cyclic learning rate, .*, cannot be extended",
        ),
        ({"epochs": 1}, "--epochs = 1 is less than the run's 2; start a new run"),
        ({"init_from": "w.pt"}, "--init-from = .*w.pt differs from the run's None"),
    ],
)
def test_resume_refuses_an_option_that_changes_the_run(
    change: dict[str, Any], message: str, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("the data were loaded")

    monkeypatch.setattr(plan, "load_data", load)
    before = everything(stopped)
    with pytest.raises(DeatError, match=message):
        resume(stopped, change, trust_code=True)
    assert everything(stopped) == before


def test_resume_refuses_fewer_epochs(tmp_path: Path) -> None:
    run, _ = train({**SMALL, "lr_schedule": "flat"}, output=tmp_path)
    with pytest.raises(DeatError) as refusal:
        resume(run.path, {"epochs": 1}, trust_code=True)
    assert str(refusal.value) == "--epochs = 1 is less than the run's 2; start a new run"


def test_resume_accepts_unchanged_options_and_another_device(stopped: Path, tmp_path: Path) -> None:
    edit(stopped, device="auto")
    changes = {"method": "PGD-1", "lr": 0.1, "epochs": 2, "on_nonfinite": "skip", "device": "cpu"}
    run, history = resume(stopped, changes, trust_code=True)
    assert len(history.rows) == 2
    assert (run.config.runtime.on_nonfinite, run.config.runtime.device) == ("skip", "cpu")
    assert RunDirectory.open(stopped).config == run.config
    whole, _ = train(SMALL, output=tmp_path, name="whole")
    assert identical(run, whole)


def test_resume_warns_of_other_versions(stopped: Path) -> None:
    versions = json.loads((stopped / "config.json").read_text())["versions"]
    edit(stopped, versions={**versions, "torch": "1.0"})
    callback = Stops(10**6)
    _, history = resume(stopped, {}, callbacks=[callback], trust_code=True)
    assert callback.warnings == [f"torch is {versions['torch']} here, but the run started with 1.0"]
    assert len(history.rows) == 2


class Threads(Stops):
    """Record the number of CPU threads of each batch."""

    def __init__(self) -> None:
        super().__init__(10**6)
        self.used: set[int] = set()

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        self.used.add(torch.get_num_threads())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recorded", "given", "used", "kept", "warned"),
    [(2, {}, 2, 2, False), (64, {}, 3, 64, True), (2, {"threads": 1}, 1, 1, False)],
)
def test_resume_keeps_the_number_of_threads(
    recorded: int, given: dict[str, int], used: int, kept: int, warned: bool, stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert RunDirectory.open(stopped).config.runtime.threads == torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "processors", lambda: 3)
    edit(stopped, threads=recorded)
    callback = Threads()
    run, _ = resume(stopped, given, callbacks=[callback], trust_code=True)
    assert callback.used == {used}
    assert RunDirectory.open(run.path).config.runtime.threads == kept
    warning = "the run used 64 threads, but there are only 3 processors here; the number of threads affects rounding"
    assert callback.warnings == [warning] * warned


def test_train_writes_a_checkpoint_before_the_first_batch(tmp_path: Path) -> None:
    """So that what a run began with is known from then on, and a configuration edited in the first epoch is noticed."""

    class Dies(Callback):
        def on_batch_end(self, sums: Any) -> None:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(SMALL, output=tmp_path, name="run", callbacks=[Dies()])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000001.safetensors"]
    edit(tmp_path / "run", lr=0.3)
    with pytest.raises(DeatError, match="was changed after the run began, in lr"):
        resume(tmp_path / "run", {}, trust_code=True)


@pytest.mark.slow
def test_resume_keeps_runtime_options_unless_given_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(Interrupted):
        train({**SMALL, "save_every": 7, "track": ["tensorboard"]}, output=tmp_path, name="run", callbacks=[Stops(3)])
    config = RunDirectory.open(tmp_path / "run").config
    assert (config.runtime.save_every, config.output.track) == (7, ("tensorboard",))
    run, _ = resume(tmp_path / "run", {"save_every": 3}, trust_code=True)
    config = RunDirectory.open(run.path).config
    assert (config.runtime.save_every, config.output.track) == (3, ("tensorboard",))
    assert steps_told(run) == [1, 2]
    with pytest.raises(DeatError, match="--save-every = 0 cannot be used: it should be greater than 0"):
        resume(run.path, {"save_every": 0}, trust_code=True)


def steps_told(run: RunDirectory) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: list[int] = []
    for folder in sorted({path.parent for path in (run.path / "tensorboard").rglob("events*")}):
        events = EventAccumulator(str(folder))
        events.Reload()
        if "l_x" in events.Tags()["scalars"]:
            told += [event.step for event in events.Scalars("l_x")]
    return sorted(told)


def test_resume_with_more_epochs_keeps_the_milestones(tmp_path: Path) -> None:
    """Of 4 epochs at 0.1 the third has 0.01 (after 1/2) and the last batch 0.001 (after 4/5)."""
    options = {**SMALL, "lr_schedule": "multistep", "epochs": 4}
    run, history = train(options, output=tmp_path, name="run")
    rates = [row.lr for row in history.rows]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])
    for epochs, before in ((6, 4), (7, 6)):
        callback = Stops(10**6)
        run, history = resume(run.path, {"epochs": epochs}, callbacks=[callback], trust_code=True)
        assert callback.warnings == [
            f"the run is extended from {before} to {epochs} epochs; the learning rate keeps the milestones for 4 epochs"
        ]
        assert [row.lr for row in history.rows] == pytest.approx(rates + [0.001] * (epochs - 4))
    kept = {path.name: json.loads(path.read_text())["optim"]["epochs"] for path in run.path.glob("config*.json")}
    assert kept == {"config.json": 7, "config-4-epochs.json": 4, "config-6-epochs.json": 6}
    again, _ = train(read_options(run.path / "config.json"), output=tmp_path, name="again")
    assert identical(run, again)


def test_resume_after_a_kill_before_the_first_checkpoint_of_an_extension(tmp_path: Path) -> None:
    run, _ = train({**SMALL, "lr_schedule": "multistep"}, output=tmp_path, name="run")
    edit(run.path, epochs=3, lr_epochs=2)
    callback = Stops(10**6)
    assert len(resume(run.path, {}, callbacks=[callback], trust_code=True)[1].rows) == 3
    edit(run.path, epochs=4, lr_epochs=4)
    with pytest.raises(DeatError, match="was changed after the run began, in epochs, lr_epochs"):
        resume(run.path, {}, trust_code=True)


def test_resume_does_not_extend_a_run_ended_by_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(rule: RobustnessDrop, stats: EpochStats) -> Stop:
        return Stop("the test says so", keep=stats.epoch)

    monkeypatch.setattr(RobustnessDrop, "update", stop)
    run, history = train({**SMALL, "method": "u-fgsm", "lr_schedule": "flat"}, output=tmp_path)
    assert len(history.rows) == 1
    with pytest.raises(
        DeatError, match=r"--epochs = 3 cannot extend a run that was ended by its stopping rule .the test says"
    ):
        resume(run.path, {"epochs": 3}, trust_code=True)
    assert len(resume(run.path, {}, trust_code=True)[1].rows) == 1
    without = {**SMALL, "lr_schedule": "flat", "lr": 1e-9, "patience": 1}  # the weights stay: nothing rises
    run, history = train(without, output=tmp_path, name="patience")
    assert len(history.rows) == 2
    with pytest.raises(DeatError, match="start a new run, without --patience to train all epochs"):
        resume(run.path, {"epochs": 3}, trust_code=True)


def test_resume_does_not_extend_steps_laid_out_over_the_epochs(tmp_path: Path) -> None:
    run, history = train({**SMALL, "method": "amata-1-3", "lr_schedule": "flat"}, output=tmp_path)
    assert history.steps == [1, 2]
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(DeatError, match="cannot extend a run of amata-1-3, whose steps are laid out over 2 epochs"):
        resume(run.path, {"epochs": 3}, trust_code=True)
    assert (run.path / "config.json").read_bytes() == before


def test_resume_compares_the_configuration_with_the_newest_intact_checkpoint(stopped: Path) -> None:
    """The bit that was flipped is in the configuration that the checkpoint holds."""
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    content = newest.read_bytes()
    assert content.count(rb"\"momentum\": 0.9") == 1
    newest.write_bytes(content.replace(rb"\"momentum\": 0.9", rb"\"momentum\": 0.8"))
    callback = Stops(10**6)
    assert len(resume(stopped, {}, callbacks=[callback], trust_code=True)[1].rows) == 2
    assert len(callback.warnings) == 1
    assert (
        f"{newest} is damaged (its checksum does not match); the previous checkpoint is used instead"
        in callback.warnings[0]
    )


def test_plan_refuses_lr_epochs_of_a_cyclic_schedule() -> None:
    with pytest.raises(DeatError, match=r"--lr-epochs = 3 applies only to the multistep schedule, not to cyclic"):
        plan.plan(make_options({**SMALL, "lr_epochs": 3}))


def test_resume_refuses_a_link_before_reading_or_writing(stopped: Path, tmp_path: Path) -> None:
    (stopped / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (stopped / "metrics.jsonl").symlink_to(tmp_path / "metrics.jsonl")
    before = everything(tmp_path)
    with pytest.raises(DeatError, match=r"metrics\.jsonl is a link or special file"):
        resume(stopped, {}, trust_code=True)
    assert everything(tmp_path) == before


def test_resume_refuses_a_second_process_before_loading_data(stopped: Path) -> None:
    """The second is refused before it loads data, whatever becomes of the first one's files meanwhile."""

    def second() -> None:
        with pytest.raises(DeatError, match=f"another process is training in {stopped}; wait until it finishes"):
            resume(stopped, {}, trust_code=True)

    with RunDirectory.open(stopped).locked():
        assert run_in_child(second)
    assert len(resume(stopped, {}, trust_code=True)[1].rows) == 2


def test_exclusive_raises_on_all_ranks(stopped: Path) -> None:
    """The lock is process 0's, and its refusal has to come to all of them."""

    class Second(World):
        def on_main(self, action: Any) -> Any:
            raise DeatError("another process is training")  # what process 0 has broadcast

    with (
        pytest.raises(DeatError, match="another process"),
        training._exclusive(RunDirectory.open(stopped), Second(1, 2)),
    ):
        pass


@pytest.mark.parametrize("begun", [False, True])
def test_resume_interrupted_outside_an_epoch_says_what_is_kept(
    begun: bool, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deat_rb.runs.train.plot_curves" if begun else "deat_rb.runs.plan.load_data", interrupt)
    with pytest.raises(Interrupted) as interrupted:
        resume(stopped, {}, trust_code=True)
    assert interrupted.value.kept == f"{stopped} is kept; continue with deat-rb train --resume {stopped} --trust-code"


def test_resume_on_a_full_disk_reports_the_disk(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("deat_rb.utils.files._write_synced", full)
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda rows, path, **_: full(path, b""))
    callback = Stops(10**6)
    with pytest.raises(DeatError, match=r"No space left .*run keeps 1 of 2 epochs and 1 batch of the next; deat-rb"):
        resume(stopped, {}, callbacks=[callback], trust_code=True)
    assert [warning.partition(":")[0] for warning in callback.warnings] == ["the plots may be incomplete"]


def test_train_refuses_devices_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeatError, match="--sync-bn needs GPUs"):
        train({**SMALL, "sync_bn": True}, output=tmp_path / "runs")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeatError, match="--device cuda:1 is a single device for 2 ranks; omit it"):
        train({**SMALL, "device": "cuda:1"}, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_plan_loads_data_on_the_first_rank_of_a_machine_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Watched(World):
        def local_main_first(self, action: Any) -> Any:
            asked.append("first")
            return action()

    def loaded(*arguments: Any, **options: Any) -> Any:
        asked.append("load")
        return load_data(*arguments, **options)

    monkeypatch.setattr(plan, "world", lambda cpu: Watched())
    monkeypatch.setattr(plan, "load_data", loaded)
    plan.plan(make_options(SMALL))
    assert asked == ["first", "load"]


@pytest.mark.parametrize("method", ["trades", "pgd-1"])
def test_resume_says_that_the_start_of_the_attack_has_changed(method: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train({**SMALL, "method": method, "steps": 1}, output=tmp_path, name="run", callbacks=[Stops(3)])
    run = tmp_path / "run"
    saved = checkpoint.newest(run / "checkpoints", print)
    assert saved is not None
    for name in ("omega", "carry"):  # as in a configuration that was written before there were these options
        del saved.facts["config"]["attack"][name]
    checkpoint.write(run / "checkpoints", saved)
    again = Stops(0)
    resume(run, {}, callbacks=[again], trust_code=True)
    begun = "the run began with an earlier version, in which the attack of trades had a different start"
    assert [warning[: len(begun)] for warning in again.warnings] == ([begun] if method == "trades" else [])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"method": "m+mart", "eps": 0.1, "model": {"num_classes": 10}}, True),
        ({"attack": {"method": "fat-5"}}, True),
        ({"attack": {"method": "fat-5", "omega": None}}, False),
        ({"attack": {"method": "f+trades"}}, False),
        ({"attack": {"method": "m-deat"}}, False),
    ],
)
def test_had_another_start(config: dict[str, Any], expected: bool) -> None:
    assert had_another_start(config) == expected
