"""A killed evaluation is continued batch by batch to the same verdicts, and another's is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from short_autoattack import shorten
from small_problems import batch_for, small_network
from torch import Tensor, nn

from deat_rb.cli import main
from deat_rb.data.datasets import load_data
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Report
from deat_rb.evaluation.resume import ResumeStore, opened
from deat_rb.models.spec import build_model
from deat_rb.utils import files, safe_load
from deat_rb.utils.errors import DeatError, Interrupted

ATTACKS = "fgsm,pgd-6x2,autoattack,torchattacks.PGD(steps=2)"


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def batch(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    images, labels = batch_for(network)
    return images[:20], labels[:20]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=8)


def run(model: nn.Module, batch: tuple[Tensor, Tensor], **changes: Any) -> Report:
    options: dict[str, Any] = {"attacks": ATTACKS, "eps": (0.0, 0.02, 0.04), "batch_size": 8, "seed": 2} | changes
    return evaluate(model, *batch, **options)


def same(left: Report, right: Report) -> bool:
    """Whether two reports are equal but for the seconds."""

    def content(report: Report) -> object:
        return json.loads(re.sub(r'"seconds": ?[0-9.e+-]+', '"seconds":0', report.model_dump_json()))

    return (
        content(left) == content(right)
        and all(torch.equal(left.verdicts[name], right.verdicts[name]) for name in left.verdicts)
        and left.adversarial.keys() == right.adversarial.keys()
        and all(torch.equal(left.adversarial[name], right.adversarial[name]) for name in left.adversarial)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its evaluations")
@pytest.mark.parametrize("write", [2, 12, 30])
def test_killed_while_it_writes_and_continued(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path, write: int
) -> None:
    counted = Forwards(network)
    expected = run(counted, batch)
    whole, folder = counted.calls, tmp_path / "state"
    child = os.fork()
    if child == 0:
        calls, sync = 0, os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 2 * write:  # a file, then its folder
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        files.os.fsync = fsync  # type: ignore[attr-defined]  # the child is not to live on
        run(network, batch, state=folder)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it is to be killed before it ends"
    kept = len(list(folder.glob("*.safetensors")))
    assert kept == write - 1, "the description is the first file"
    forwards = Forwards(network)
    assert same(run(forwards, batch, state=folder), expected)
    assert forwards.calls < whole
    assert not folder.exists()


class Forwards(nn.Module):
    """Counts calls; its state dict and its description are the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.network(images)
        return logits

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.network)


class Stops(Forwards):
    """Is interrupted at its last call."""

    def __init__(self, network: nn.Module, calls: int) -> None:
        super().__init__(network)
        self.left = calls

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().forward(images)


def interrupted(network: nn.Module, batch: tuple[Tensor, Tensor], folder: Path) -> str:
    with pytest.raises(Interrupted) as interrupt:
        run(Stops(network, 60), batch, state=folder)
    return interrupt.value.kept


def test_ctrl_c_says_what_is_kept(network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    kept = interrupted(network, batch, tmp_path / "state")
    count = len(list((tmp_path / "state").glob("*.safetensors")))
    assert count > 3
    assert kept == f"{count} batches are in {tmp_path / 'state'}; the same command with --resume continues"
    with pytest.raises(Interrupted) as interrupt:
        run(Stops(network, 20), batch)
    assert interrupt.value.kept == ""


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "eps by a hair": ({"eps": (0.0, 0.02, 0.04 + 1e-9)}, "eps: 0, 0.02, 0.04, now 0, 0.02, 0.040000001; main eps: "),
    "eps": ({"eps": (0.0, 0.02, 0.05)}, "eps: 0, 0.02, 0.04, now 0, 0.02, 0.05; main eps: 0.04, now 0.05"),
    "seed": ({"seed": 3}, "seed: 2, now 3"),
    "batch size": ({"batch_size": 7}, "batch size: 8, now 7"),
    "norm": ({"norm": "L2"}, "norm: Linf, now L2"),
    "attacks": ({"attacks": "fgsm"}, "attacks: natural, fgsm, pgd-6x2, autoattack,"),
    "precision": ({"precision": "bf16"}, "precision: fp32, now bf16"),
}


@pytest.mark.parametrize(("changes", "named"), CHANGES.values(), ids=CHANGES)
def test_another_evaluation_is_refused_unless_to_be_begun_anew(
    changes: dict[str, Any], named: str, network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    interrupted(network, batch, tmp_path / "state")
    before = sorted((tmp_path / "state").iterdir())
    for resume in (True, None):
        with pytest.raises(DeatError, match=re.escape(f"is another's ({named}") + ".* or start anew by --no-resume$"):
            run(network, batch, state=tmp_path / "state", resume=resume, **changes)
        assert sorted((tmp_path / "state").iterdir()) == before
    changes = {"attacks": "fgsm"} | changes
    anew = run(network, batch, state=tmp_path / "state", resume=False, **changes)
    assert same(anew, run(network, batch, **changes))


def test_other_weights_and_examples_are_refused(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    interrupted(network, batch, tmp_path / "state")
    other = small_network()
    other.get_parameter("0.bias").data.add_(1e-3)
    with pytest.raises(DeatError, match=r"another's \(weights: [0-9a-f]{64}, now [0-9a-f]{64}\)"):
        run(other, batch, state=tmp_path / "state", resume=True)
    with pytest.raises(DeatError, match=r"another's \(network: "):
        run(nn.Sequential(*network, nn.Identity()), batch, state=tmp_path / "state", resume=True)
    images, labels = batch
    with pytest.raises(DeatError, match=r"another's \(examples: "):
        run(network, (images, labels.roll(1)), state=tmp_path / "state", resume=True)


def test_other_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "state", {"torch": "2.6"}, None):
        _ = 1 / 0
    with (
        pytest.raises(DeatError, match=r"another's \(torch: 2.6, now 2.7\)"),
        opened(tmp_path / "state", {"torch": "2.7"}, True),
    ):
        pass


def test_starting_anew(network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    interrupted(network, batch, tmp_path / "state")
    counted = Forwards(network)
    run(counted, batch, attacks="fgsm", eps=0.04)
    whole, counted.calls = counted.calls, 0
    run(counted, batch, attacks="fgsm", eps=0.04, state=tmp_path / "state", resume=False)
    assert counted.calls == whole


@pytest.mark.parametrize("error", [DeatError("cannot write eval.json"), KeyboardInterrupt()])
def test_a_report_that_cannot_be_written_is_not_lost(
    error: BaseException, network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    def fail(report: Report) -> None:
        assert report.provenance == {"run": "a"}
        raise error

    options: dict[str, Any] = {"state": tmp_path / "state", "provenance": {"run": "a"}}
    with pytest.raises((DeatError, Interrupted), match=r"[0-9]+ batches are in .*; the same command with --resume"):
        run(network, batch, finish=fail, **options)
    counted, reports = Forwards(network), list[Report]()
    again = run(counted, batch, finish=reports.append, **options)
    assert counted.calls <= 3, "nothing is attacked again"
    assert reports == [again]
    assert same(again, run(network, batch, provenance={"run": "a"}))
    assert not (tmp_path / "state").exists()


def test_checks_that_are_interrupted_lose_nothing(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deat_rb.evaluation.checks.registry.run_checks", interrupt)
    with pytest.raises(Interrupted) as interrupted:
        run(network, batch, checks="quick", state=tmp_path / "state")
    assert "the same command with --resume continues" in interrupted.value.kept


def test_an_attack_that_cannot_run_at_all_leaves_nothing(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    bad = "torchattacks.PGD(steps='many')"
    with pytest.raises(DeatError, match="cannot be run here"):
        run(network, batch, attacks=bad, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    with pytest.raises(DeatError, match="cannot be run here"):
        run(network, batch, attacks=f"fgsm,{bad}", state=tmp_path / "state")
    assert (tmp_path / "state").exists(), "what FGSM found may have taken long"


def test_damage_is_refused(network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    interrupted(network, batch, folder)
    (folder / "00002.safetensors").write_bytes((folder / "00001.safetensors").read_bytes())
    with pytest.raises(DeatError, match=r"00002.safetensors is damaged, or not of eps 0.04, natural, all, batch 1;"):
        run(network, batch, state=folder)
    for damaged in (b"", b"\0" * 100, (folder / "00001.safetensors").read_bytes()[:-1]):
        (folder / "00002.safetensors").write_bytes(damaged)
        with pytest.raises(DeatError, match=r"00002.safetensors .*damaged; start anew by --no-resume"):
            run(network, batch, state=folder)
    safe_load.save_tensors(folder / "00002.safetensors", {"broken": torch.ones(2)})
    with pytest.raises(DeatError, match="start anew by --no-resume"):
        run(network, batch, state=folder)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(DeatError, match="its description is damaged"):
        run(network, batch, state=folder, resume=True)


def test_not_one_bit_may_be_another(tmp_path: Path) -> None:
    """A verdict is one bit: a batch with one flipped would be believed."""
    journal = ResumeStore(tmp_path)
    journal.find("a")
    journal.keep("a", {"broken": torch.tensor([True, False]), "seconds": torch.tensor(1.5)})
    file = tmp_path / "00001.safetensors"
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DeatError, match=r"start anew by --no-resume$"):
            ResumeStore(tmp_path).find("a")
    file.write_bytes(whole)
    assert (ResumeStore(tmp_path).find("a") or {})["broken"].tolist() == [True, False]
    with pytest.raises(DeatError, match=r"is damaged, or not of b; start anew by --no-resume$"):
        ResumeStore(tmp_path).find("b")


def test_a_full_disk_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal, found = ResumeStore(tmp_path), {"broken": torch.tensor([True])}
    journal.find("a")
    journal.keep("a", found)
    journal.find("b")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeatError, match=r"00002.* No space left on device; 1 batch is in .*--resume continues$"):
        journal.keep("b", found)


def test_a_folder_of_something_else_is_left_alone(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"precious")
    with pytest.raises(DeatError, match=r"which holds last.safetensors: give a folder of its own"):
        run(network, batch, state=tmp_path)
    with pytest.raises(DeatError, match=r"there is no unfinished evaluation in .*: leave out --resume"):
        run(network, batch, state=tmp_path / "state", resume=True)
    with pytest.raises(DeatError, match="nowhere to continue from"):
        run(network, batch, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with opened(tmp_path / "state", {}, None) as journal:
        assert isinstance(journal, ResumeStore)
        with pytest.raises(DeatError, match="another process is evaluating in"), opened(tmp_path / "state", {}, None):
            pass


# Through the command.


def command(folder: Path, attacks: str) -> list[str]:
    return ["eval", str(folder / "weights.pt"), "--arch", "wrn-10-1", "--dataset", "digits", "--attacks", attacks,
            "--eps", "1e-4", "--n-examples", "60", "--batch-size", "1", "--checks", "none", "--no-page", "--device",
            "cpu", "--json", str(folder / "report.json")]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="sends a signal that Windows does not have")
def test_sigkill_and_the_same_command_again(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("wrn-10-1", num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = tmp_path / "report-state"
    program = [sys.executable, "-m", "deat_rb"]
    running = subprocess.Popen([*program, *command(tmp_path, "pgd-60")], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(state.glob("*.safetensors"))) >= 61, running)
    running.kill()
    running.wait()
    assert not (tmp_path / "report.json").exists()
    kept = len(list(state.glob("*.safetensors")))
    refused = CliRunner().invoke(main, [*command(tmp_path, "pgd-61"), "--resume"])
    assert refused.exit_code == 2
    assert "another's (attacks: natural, pgd-60, now natural, pgd-61)" in refused.output
    again = CliRunner().invoke(main, [*command(tmp_path, "pgd-60"), "--resume"])
    assert again.exit_code == 0, again.output
    assert f"continued from {kept} batches in {state}" in again.stderr
    assert not state.exists()
    report = Report.load(tmp_path / "report.json")
    images, labels = load_data("digits").test.first(60).tensors()
    expected = evaluate(model, images, labels, attacks="pgd-60", eps=1e-4, batch_size=1)
    assert all(torch.equal(report.verdicts[name], expected.verdicts[name]) for name in expected.verdicts)
    assert report.results["pgd-60"].forwards == expected.results["pgd-60"].forwards > 60


def wait_until(reached: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
