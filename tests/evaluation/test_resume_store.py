"""The store of unfinished evaluations: resuming gives the same verdicts, other settings are refused."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from children import run_in_child
from click.testing import CliRunner
from short_autoattack import shorten
from small_problems import batch_for, small_network
from torch import Tensor, nn
from training_problems import ARCH

from deat_rb.cli import main
from deat_rb.data.datasets import load_data
from deat_rb.evaluation.evaluate import _device_name, evaluate
from deat_rb.evaluation.report import Report
from deat_rb.evaluation.resume import ResumeStore, open_store
from deat_rb.models.spec import build_model
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its evaluations")
@pytest.mark.parametrize("write", [2, 12, 30])
def test_evaluate_resumes_after_a_kill_while_writing(
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

        with patch.object(os, "fsync", fsync):
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


def test_evaluate_ctrl_c_says_what_is_stored(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    kept = interrupted(network, batch, tmp_path / "state")
    count = len(list((tmp_path / "state").glob("*.safetensors")))
    assert count > 3
    assert kept == f"{count} batches are stored in {tmp_path / 'state'}; repeat the command to continue"
    with pytest.raises(Interrupted, match="repeat the command without --no-resume to continue"):
        run(Stops(network, 60), batch, state=tmp_path / "state", resume=False)
    with pytest.raises(Interrupted) as interrupt:
        run(Stops(network, 20), batch)
    assert interrupt.value.kept == ""


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "eps by a hair": ({"eps": (0.0, 0.02, 0.04 + 1e-9)}, "eps: 0, 0.02, 0.04, now 0, 0.02, 0.040000001; main eps: "),
    "eps": ({"eps": (0.0, 0.02, 0.05)}, "eps: 0, 0.02, 0.04, now 0, 0.02, 0.05; main eps: 0.04, now 0.05"),
    "seed": ({"seed": 3}, "seed: 2, now 3"),
    "batch size": ({"batch_size": 7}, "batch size: 8, now 7"),
    "norm": ({"norm": "L2", "attacks": "fgsm"}, "norm: Linf, now L2"),
    "attacks": ({"attacks": "fgsm"}, "attacks: natural, fgsm, pgd-6x2, autoattack,"),
    "precision": ({"precision": "bf16"}, "precision: fp32, now bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "named"), CHANGES.values(), ids=CHANGES)
def test_evaluate_refuses_to_resume_other_settings(
    changes: dict[str, Any], named: str, network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    interrupted(network, batch, tmp_path / "state")
    before = sorted((tmp_path / "state").iterdir())
    for resume in (True, None):
        with pytest.raises(
            DeatError, match=re.escape(f"of a different evaluation ({named}") + ".* or start over with --no-resume$"
        ):
            run(network, batch, state=tmp_path / "state", resume=resume, **changes)
        assert sorted((tmp_path / "state").iterdir()) == before
    changes = {"attacks": "fgsm"} | changes
    restarted = run(network, batch, state=tmp_path / "state", resume=False, **changes)
    assert same(restarted, run(network, batch, **changes))


def test_evaluate_refuses_to_resume_other_weights_or_examples(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    interrupted(network, batch, tmp_path / "state")
    other = small_network()
    other.get_parameter("0.bias").data.add_(1e-3)
    with pytest.raises(DeatError, match=r"a different evaluation \(weights: [0-9a-f]{64}, now [0-9a-f]{64}\)"):
        run(other, batch, state=tmp_path / "state", resume=True)
    with pytest.raises(DeatError, match=r"a different evaluation \(network: "):
        run(nn.Sequential(*network, nn.Identity()), batch, state=tmp_path / "state", resume=True)
    images, labels = batch
    with pytest.raises(DeatError, match=r"a different evaluation \(examples: "):
        run(network, (images, labels.roll(1)), state=tmp_path / "state", resume=True)


def test_evaluate_refuses_to_resume_torchattacks_with_another_step_size(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """As of a version that did not record it, whose step size was 2/255 at every eps."""
    interrupted(network, batch, tmp_path / "state")
    settings = tmp_path / "state" / "evaluation.json"
    stored = json.loads(settings.read_text())
    assert "'alpha': 0.01," in stored.pop("torchattacks.PGD(steps=2)")
    settings.write_text(json.dumps(stored))
    with pytest.raises(DeatError, match=r"a different evaluation \(torchattacks.PGD\(steps=2\): None, now "):
        run(network, batch, state=tmp_path / "state")


def test_open_store_refuses_other_versions(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_store(tmp_path / "state", {"torch": "2.6"}, None):
        _ = 1 / 0
    with (
        pytest.raises(DeatError, match=r"a different evaluation \(torch: 2.6, now 2.7\)"),
        open_store(tmp_path / "state", {"torch": "2.7"}, True),
    ):
        pass


def test_evaluate_no_resume_starts_over(network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    interrupted(network, batch, tmp_path / "state")
    counted = Forwards(network)
    run(counted, batch, attacks="fgsm", eps=0.04)
    whole, counted.calls = counted.calls, 0
    run(counted, batch, attacks="fgsm", eps=0.04, state=tmp_path / "state", resume=False)
    assert counted.calls == whole


@pytest.mark.parametrize("error", [DeatError("cannot write eval.json"), KeyboardInterrupt()])
def test_evaluate_keeps_batches_when_finish_fails(
    error: BaseException, network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    def fail(report: Report) -> None:
        assert report.provenance == {"run": "a"}
        raise error

    options: dict[str, Any] = {"state": tmp_path / "state", "provenance": {"run": "a"}, "eps": 0.04}
    with pytest.raises(
        (DeatError, Interrupted), match=r"[0-9]+ batches are stored in .*; repeat the command to continue"
    ):
        run(network, batch, finish=fail, **options)
    counted, reports = Forwards(network), list[Report]()
    again = run(counted, batch, finish=reports.append, **options)
    assert counted.calls <= 3, "nothing is attacked again"
    assert reports == [again]
    assert same(again, run(network, batch, provenance={"run": "a"}, eps=0.04))
    assert not (tmp_path / "state").exists()


def test_evaluate_keeps_batches_when_checks_are_interrupted(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deat_rb.evaluation.checks.registry.run_checks", interrupt)
    with pytest.raises(Interrupted) as interrupted:
        run(network, batch, checks="quick", state=tmp_path / "state")
    assert "repeat the command to continue" in interrupted.value.kept


def test_evaluate_removes_the_store_when_no_attack_ran(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    bad = "torchattacks.PGD(steps='many')"
    with pytest.raises(DeatError, match=r"failed \(TypeError"):
        run(network, batch, attacks=bad, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    with pytest.raises(DeatError, match=r"failed \(TypeError"):
        run(network, batch, attacks=f"fgsm,{bad}", state=tmp_path / "state")
    assert (tmp_path / "state").exists(), "what FGSM found may have taken long"


def test_resume_store_refuses_damaged_files(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    interrupted(network, batch, folder)
    file = min(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    for damaged in (b"", b"\0" * 100, whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(DeatError, match=rf"{file.name} .*damaged; start over with --no-resume"):
            run(network, batch, state=folder)
    file.write_bytes(whole)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(DeatError, match="its settings are damaged"):
        run(network, batch, state=folder, resume=True)


def test_resume_store_keeps_batches_apart(tmp_path: Path) -> None:
    store = ResumeStore(tmp_path)
    for number in range(3):
        store.save(f"batch {number}", {"misclassified": torch.tensor([number == 1])})
    loaded = [(ResumeStore(tmp_path).load(f"batch {number}") or {})["misclassified"].tolist() for number in range(3)]
    assert loaded == [[False], [True], [False]]
    assert ResumeStore(tmp_path).load("batch 3") is None


def test_resume_store_says_what_is_stored_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store, result = ResumeStore(tmp_path), {"misclassified": torch.tensor([True])}
    store.save("a", result)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeatError, match=r"No space left on device; 1 batch is .*repeat the command to continue$"):
        store.save("b", result)


def test_open_store_refuses_folders_with_other_files(
    network: nn.Sequential, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"precious")
    with pytest.raises(DeatError, match=r"because it contains last.safetensors: give another folder"):
        run(network, batch, state=tmp_path)
    with pytest.raises(DeatError, match=r"there is no unfinished evaluation in .*: omit --resume"):
        run(network, batch, state=tmp_path / "state", resume=True)
    with pytest.raises(DeatError, match="--resume needs a run directory or --json"):
        run(network, batch, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_open_store_is_exclusive(tmp_path: Path) -> None:
    with open_store(tmp_path / "state", {}, None) as store:
        assert isinstance(store, ResumeStore)
        with (
            pytest.raises(DeatError, match="another process is evaluating in"),
            open_store(tmp_path / "state", {}, None),
        ):
            pass


def test_open_store_removes_a_lock_file_that_cannot_be_removed_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, unlink = set[Path](), Path.unlink

    @contextmanager
    def windows_lock(path: Path, **_: str) -> Iterator[None]:
        path.touch()
        held.add(path)
        yield
        held.remove(path)
        path.unlink()

    def windows_unlink(path: Path, missing_ok: bool = False) -> None:
        if path in held:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok)

    monkeypatch.setattr("deat_rb.evaluation.resume.exclusive_lock", windows_lock)
    monkeypatch.setattr(Path, "unlink", windows_unlink)
    with open_store(tmp_path / "state", {}, None) as store:
        store.save("a", {"misclassified": torch.tensor([True])})
    assert not (tmp_path / "state").exists()


# Through the command.


def command(folder: Path, attacks: str) -> list[str]:
    return ["eval", str(folder / "weights.pt"), "--arch", ARCH, "--dataset", "digits", "--attacks", attacks,
            "--eps", "1e-4", "--n-examples", "20", "--batch-size", "1", "--checks", "none", "--no-page", "--device",
            "cpu", "--json", str(folder / "report.json")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its evaluations")
def test_eval_command_resumes_after_sigkill(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(ARCH, num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state, kept, save = tmp_path / "report-state", 23, ResumeStore.save

    def save_or_die(store: ResumeStore, key: str, tensors: Mapping[str, Tensor]) -> None:
        if len(list(state.glob("*.safetensors"))) == kept:  # 20 batches without an attack, and three with
            os.kill(os.getpid(), signal.SIGKILL)
        save(store, key, tensors)

    def work() -> None:
        with patch.object(ResumeStore, "save", save_or_die):
            main(command(tmp_path, "pgd-60"))

    assert not run_in_child(work), "it is to be killed before it ends"
    assert not (tmp_path / "report.json").exists()
    refused = CliRunner().invoke(main, [*command(tmp_path, "pgd-61"), "--resume"])
    assert refused.exit_code == 2
    assert "a different evaluation (attacks: natural, pgd-60, now natural, pgd-61)" in refused.output
    again = CliRunner().invoke(main, [*command(tmp_path, "pgd-60"), "--resume"])
    assert again.exit_code == 0, again.output
    assert f"resuming from {kept} batches in {state}" in again.stderr
    assert not state.exists()
    report = Report.load(tmp_path / "report.json")
    images, labels = load_data("digits").test.first(20).tensors()
    expected = evaluate(model, images, labels, attacks="pgd-60", eps=1e-4, batch_size=1)
    assert all(torch.equal(report.verdicts[name], expected.verdicts[name]) for name in expected.verdicts)
    assert report.results["pgd-60"].forwards == expected.results["pgd-60"].forwards > 60


def test_the_index_of_a_gpu_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun each process has an index, without it none; and another of several equal GPUs may continue."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert {_device_name(torch.device(name)) for name in ("cuda", "cuda:0", "cuda:1")} == {"cuda (NVIDIA H200)"}
