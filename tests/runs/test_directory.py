"""Run directories: names, files, locks and damage."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_in_child
from training_problems import images_and_labels, normalized, run_config

import deat_rb
from deat_rb.runs.directory import RunDirectory, check_name
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError

ROW = EpochStats(epoch=1, steps=2, alpha=2 / 255, l_x=1 / 3, loss=0.1, examples=12, val_robust_acc=0.5)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "first", run_config())


@pytest.mark.parametrize(
    ("changes", "stopped", "said"),
    [
        ({"epochs": 6}, None, "1 of 6 epochs"),
        ({"epochs": 1}, None, None),
        ({"epochs": 6}, "l_X rose", None),
        ({"epochs": 6, "early_stopping": False}, "l_X rose", "1 of 6 epochs"),
        ({"epochs": 6, "early_stopping": False, "patience": 9}, "l_X rose", "1 of 6 epochs"),
        (
            {"epochs": 6, "early_stopping": False, "patience": 1},
            "robust validation accuracy has not risen for 1 epoch",
            None,
        ),
        ({"epochs": "open", "lr_schedule": "flat", "ema": 0.9}, None, None),
    ],
)
def test_unfinished(changes: dict[str, Any], stopped: str | None, said: str | None, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config(**changes))
    assert run.unfinished is None
    run.append(replace(ROW, stopped=stopped))
    assert run.unfinished == said


@pytest.mark.parametrize("name", ["a", "deat-40%", "m+trades-digits-wrn-10-2-s0", "v1.2_b"])
def test_check_name_accepts_file_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["a/b", "..", "../a", "a..b", "", ".hidden", "-flag", "a b", "a\n", "ü", "C:\\x"])
def test_check_name_refuses_paths_and_odd_characters(name: str) -> None:
    with pytest.raises(DeatError, match="is not a valid run name; use only letters, digits"):
        check_name(name)


def test_create_refuses_a_taken_name_and_overwrites_nothing(run: RunDirectory) -> None:
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(DeatError, match=f"{run.path} already exists; choose another --name or --output"):
        RunDirectory.create(run.path, run_config(seed=9))
    assert (run.path / "config.json").read_bytes() == before


def test_create_where_the_folder_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeatError, match=r"cannot be created .*choose another --output"):
        RunDirectory.create(tmp_path / "file" / "run", run_config())


def test_create_leaves_no_folder_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise DeatError(f"{path} cannot be written: the disk is full")

    monkeypatch.setattr("deat_rb.runs.directory.write_json", full)
    with pytest.raises(DeatError, match="disk is full"):
        RunDirectory.create(tmp_path / "run", run_config())
    assert not (tmp_path / "run").exists()


def test_create_killed_half_way_leaves_the_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        monkeypatch.setattr(
            "deat_rb.runs.directory.write_json", lambda path, content: os.kill(os.getpid(), signal.SIGKILL)
        )
        RunDirectory.create(tmp_path / "run", run_config())

    assert not run_in_child(work)
    assert RunDirectory.create(tmp_path / "run", run_config()).config == run_config()


def test_locked_refuses_a_second_process(run: RunDirectory) -> None:
    def refused() -> None:
        with (
            pytest.raises(DeatError, match=f"another process is training in {run.path}; wait until it finishes"),
            run.locked(),
        ):
            pass

    def held() -> None:
        with run.locked():
            pass

    with run.locked():
        assert run_in_child(refused)
    assert run_in_child(held)


def test_locked_does_not_follow_a_link(run: RunDirectory, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="other locks do not open the file")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run.path / ".lock").symlink_to(precious)
    with pytest.raises(DeatError, match=r"cannot lock .*\.lock against other processes"), run.locked():
        pass
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "checkpoints/00000001.safetensors", "fifo"])
def test_refuse_links_refuses_links_and_special_files(name: str, run: RunDirectory, tmp_path: Path) -> None:
    run.refuse_links()
    (run.path / name).parent.mkdir(exist_ok=True)
    if name == "fifo":
        os.mkfifo(run.path / name)
    else:
        (run.path / name).symlink_to(tmp_path)
    with pytest.raises(DeatError, match=f"{run.path / name} is a link or special file, which runs never create"):
        run.refuse_links()


def test_append_that_cannot_be_written_is_an_error(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(DeatError, match=r"metrics\.jsonl"):
        run.append(ROW)


def test_open_reads_the_configuration(run: RunDirectory) -> None:
    again = RunDirectory.open(str(run.path))
    assert again.config == run.config
    assert again.model_spec.mean == (0.4, 0.5, 0.6)


DAMAGED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "config.json"),
    "a list": ("[]", "not a valid run configuration"),
    "empty": ("{}", r"not a valid run configuration \(network: Field required"),
    "one field more": (json.dumps(run_config().model_dump() | {"sed": 1}), r"configuration \(sed: Extra inputs"),
    "a wrong value": (json.dumps(run_config().model_dump() | {"epochs": "many"}), r"configuration \(optim.epochs: "),
    "a wrong network": (
        json.dumps(run_config().model_dump() | {"network": {"arch": "wrn-11-1", "num_classes": 4}}),
        r"wrn-11-1|configuration \(network",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_open_refuses_a_damaged_configuration(case: str, run: RunDirectory) -> None:
    text, message = DAMAGED[case]
    (run.path / "config.json").write_text(text)
    with pytest.raises(DeatError, match=message):
        RunDirectory.open(run.path)


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DeatError, match=f"{path} is not a run directory: it has no config.json"):
            RunDirectory.open(path)


def test_append_and_rows_round_trip(run: RunDirectory) -> None:
    assert run.rows() == []
    second = EpochStats(epoch=2, steps=3, stopped="because", val_acc=None)
    run.append(ROW)
    run.append(second)
    assert run.rows() == [ROW, second]
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["l_x"] == 1 / 3


@pytest.mark.parametrize("line", ["{", "[1]", "7", "<html>", '{"epoch": "2"}'])
def test_rows_refuses_damaged_metrics(line: str, run: RunDirectory) -> None:
    run.append(ROW)
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DeatError, match=r"line 2, does not contain an epoch's metrics .*; restore the file"):
        run.rows()


def test_save_weights_give_the_same_logits_when_loaded(run: RunDirectory) -> None:
    images, _ = images_and_labels()
    model = normalized()
    model(images)  # moves BatchNorm
    run.save_weights("last", model.state_dict(), ROW)
    loaded = deat_rb.load_model(run.path, trust_code=True)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    about = run.checkpoint("last")
    assert (about["epoch"], about["val_robust_acc"], len(about["sha256"])) == (1, 0.5, 64)


def test_selected_weights_path_is_that_of_the_selected_epoch(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config(select="best"))
    with pytest.raises(DeatError, match=r"best\.safetensors is missing, as the run has not finished an epoch"):
        deat_rb.load_model(run.path, trust_code=True)
    best, last = normalized(), normalized()
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.add_(1)
    run.save_weights("last", last.state_dict(), ROW)
    with pytest.raises(DeatError, match=r"best\.safetensors is missing, as the run has not validated an epoch"):
        deat_rb.load_model(run.path, trust_code=True)
    run.save_weights("best", best.state_dict(), ROW)
    run.save_weights("last", last.state_dict(), ROW)
    loaded = deat_rb.load_model(run.path, trust_code=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in best.state_dict().items())


@pytest.mark.parametrize("content", ["[]", "7", "{"])
def test_checkpoint_refuses_a_damaged_file(content: Any, run: RunDirectory) -> None:
    (run.path / "best.json").write_text(content)
    with pytest.raises(DeatError, match=r"best\.json"):
        run.checkpoint("best")
