"""`deat-rb eval`: what it writes and prints, the models it takes, and the code it does not run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from export_runs import evaluate_run
from torch import nn

from deat_rb.cli import main
from deat_rb.eval_target import open_target
from deat_rb.evaluation.report import Check, Report, json_schema
from deat_rb.evaluation.resume import ResumeStore
from deat_rb.loading import load_model
from deat_rb.models.spec import build_model
from deat_rb.runs.train import train
from deat_rb.utils.errors import DeatError

pytestmark = pytest.mark.usefixtures("without_curves")

DOCUMENTED = Path(__file__).parents[2] / "docs" / "schema" / "eval.schema.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fresh(arch: str, seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(arch, **options).eval()


@pytest.fixture
def described(tmp_path: Path, image_folder: Path) -> list[object]:
    torch.save(fresh("wrn-10-1", num_classes=4).state_dict(), tmp_path / "weights.pt")
    return [tmp_path / "weights.pt", "--arch", "wrn-10-1", "--dataset", "folder", "--data-dir", image_folder,
            "--device", "cpu", "--n-examples", "8", "--json", tmp_path / "report.json"]  # fmt: skip


@pytest.fixture
def verdict_of_checks(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The checks that a stand-in for `run_checks` finds."""
    found: list[Check] = []
    monkeypatch.setattr("deat_rb.evaluation.checks.registry.run_checks", lambda *_, **__: tuple(found))
    return found


@pytest.mark.parametrize(("status", "strict", "code"), [("pass", True, 0), ("warn", False, 0), ("warn", True, 1),
                                                       ("fail", True, 1)])  # fmt: skip
def test_eval_strict_exits_with_1_if_a_check_does_not_pass(
    status: str, strict: bool, code: int, described: list[object], verdict_of_checks: list[Check], tmp_path: Path
) -> None:
    verdict_of_checks.append(Check(name="well", status="pass", figure=0.0, sentence="It is."))
    odd = {"name": "odd", "status": status, "figure": 3.5, "sentence": "3.5 [of] 4."}
    verdict_of_checks.append(Check.model_validate(odd))
    verdict_of_checks.append(Check(name="skipped", status="pass", figure=5.0, sentence="Five were."))
    result = run("eval", *described, "--attacks", "fgsm", "--no-page", *(["--strict"] if strict else []))
    assert result.exit_code == code, result.output
    lines = result.stdout.splitlines()
    assert (f"{status}: odd: 3.5 [of] 4." in lines) == (status != "pass")
    assert "well: It is." not in result.stdout
    assert f"checks: {1 + (status == 'pass')} of 2 pass, 5 skipped" in lines
    assert [check.name for check in Report.load(tmp_path / "report.json").checks] == ["well", "odd", "skipped"]


def test_eval_prints_and_plots_a_sweep(described: list[object], tmp_path: Path) -> None:
    result = run("eval", *described, "--attacks", "fgsm,torchattacks.PGD(steps=2,alpha=2/255)", "--eps",
                 "0,8/255,4/255", "--checks", "none", "--no-page")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "accuracy by eps (Linf)" in result.stdout
    report = Report.load(tmp_path / "report.json")
    assert report.eps == 8 / 255, "the checkpoint's own"
    assert len(report.curve) == 3
    assert (tmp_path / "report-eps.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.splitlines()[-1] == f"written: {tmp_path / 'report.json'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report-eps.png", "report-verdicts.safetensors", "report.json", "weights.pt"
    ]  # fmt: skip
    assert report.provenance["command"].startswith("deat-rb")


def test_eval_writes_all_files_or_none(described: list[object], tmp_path: Path) -> None:
    flags = ["eval", *described, "--attacks", "fgsm", "--checks", "none"]
    assert run(*flags, "--seed", 1).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert before.keys() == {"report.json", "report.html", "report-verdicts.safetensors", "weights.pt"}
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    refused = run(*flags)
    assert refused.exit_code == 2
    assert "report.html: Is a directory" in refused.stderr
    assert "batches are stored in" in refused.stderr
    assert all((tmp_path / name).read_bytes() == was for name, was in before.items() if name != "report.html")
    (tmp_path / "report.html").rmdir()
    assert run(*flags, "--resume").exit_code == 0
    assert Report.load(tmp_path / "report.json").seed == 0
    assert b"<!DOCTYPE html>" in (tmp_path / "report.html").read_bytes()
    assert not (tmp_path / "report-state").exists()


def test_eval_escapes_markup(described: list[object]) -> None:
    """Rich takes [/] for the end of a style, and ends with an error where none was begun."""
    result = run("eval", *described, "--attacks", "torchattacks.UPGD(steps=1,loss='[/]')", "--checks", "none",
                 "--no-page")  # fmt: skip
    assert result.exit_code == 2
    assert "torchattacks.UPGD(steps=1, loss='[/]') failed" in result.stderr


QUICK = ["--attacks", "fgsm", "--n-examples", 5, "--checks", "none", "--no-page", "--device", "cpu"]


def trained(folder: Path, name: str, **changes: Any) -> Path:
    options = {"method": "standard", "arch": "wrn-10-1", "train_size": 20, "val_size": 2, "batch_size": 10,
               "epochs": 1, "device": "cpu", "precision": "fp32"}  # fmt: skip
    return train(options | changes, output=folder, name=name)[0].path


@pytest.mark.slow
def test_eval_reports_mean_and_deviation_per_group(tmp_path: Path) -> None:
    runs = [trained(tmp_path, f"{method}-{seed}", method=method, seed=seed)
            for method in ("trades", "m+trades") for seed in (0, 1)]  # fmt: skip
    result = run("eval", *runs, *QUICK)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "±" in line]
    assert [row[:2] for row in rows] == [["trades", "2"], ["m+trades", "2"]]
    assert "mean and standard deviation over runs" in result.stdout
    weights = [path / "last.safetensors" for path in runs[::2]]
    checkpoints = run("eval", *weights, "--arch", "wrn-10-1", "--dataset", "digits", *QUICK)
    assert checkpoints.exit_code == 0, checkpoints.output
    assert "±" not in checkpoints.stdout, "nothing says that they are of one method"
    single = run("eval", runs[0], runs[2], *QUICK)
    assert "±" not in single.stdout, "two methods have no common mean"


def test_eval_without_a_page_draws_no_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, drawn = trained(tmp_path, "run"), list[str]()

    def draw_curves(*_: object, title: str, **__: object) -> bytes:
        drawn.append(title)
        return b""

    monkeypatch.setattr("deat_rb.runs.summary.draw_curves", draw_curves)
    assert run("eval", path, *QUICK).exit_code == 0
    assert not drawn
    assert run("eval", path, *(flag for flag in QUICK if flag != "--no-page")).exit_code == 0
    assert drawn


@pytest.mark.slow
def test_eval_of_several_runs_resumes_those_that_have_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [trained(tmp_path, "a"), tmp_path / "b", tmp_path / "c"]
    for other in runs[1:]:
        shutil.copytree(runs[0], other)
    save = ResumeStore.save

    def save_once_in_b(store: ResumeStore, key: str, tensors: dict[str, torch.Tensor]) -> None:
        save(store, key, tensors)
        if store.folder == runs[1] / "eval-state":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ResumeStore, "save", save_once_in_b)
        stopped = run("eval", *runs, *QUICK)
    assert stopped.exit_code == 130
    stored = f"1 batch is stored in {runs[1] / 'eval-state'}; repeat the command to continue"
    assert stopped.stderr.splitlines()[-1] == f"Interrupted: {stored}; omit {runs[0]}, done already"
    resumed = run("eval", *runs[1:], *QUICK, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert f"resuming from 1 batch in {runs[1] / 'eval-state'}" in resumed.stderr
    assert all((path / "eval.json").is_file() for path in runs)
    finished = run("eval", *runs, *QUICK, "--resume")
    assert finished.exit_code == 2
    assert "there is no unfinished evaluation of any of these networks: omit --resume" in finished.stderr


@pytest.mark.slow
def test_eval_reports_no_mean_of_other_settings(tmp_path: Path) -> None:
    runs = [trained(tmp_path, "a", eps=0.1), trained(tmp_path, "b", eps=0.2)]
    for stale in ("report.html", "eval-eps.png"):
        (runs[0] / stale).write_text("of an earlier evaluation")
    unlike = run("eval", *runs, *QUICK)
    assert unlike.exit_code == 0, unlike.output
    assert {path.name for path in runs[0].glob("*e*l*")} & {"report.html", "eval-eps.png", "eval.json"} == {"eval.json"}
    assert "±" not in unlike.stdout
    twice = run("eval", runs[0], runs[0], *QUICK)
    assert (twice.exit_code, f"{runs[0]} is given twice: give each network once" in twice.stderr) == (2, True)


@pytest.mark.slow
def test_eval_keeps_the_fuller_evaluation(tmp_path: Path) -> None:
    path = trained(tmp_path, "a")
    full = ["--attacks", "fgsm,pgd-2", "--n-examples", 8, "--checks", "none", "--device", "cpu"]
    assert run("eval", path, *full).exit_code == 0
    names = ("eval.json", "eval-verdicts.safetensors", "report.html")
    before = {name: (path / name).read_bytes() for name in names}
    lesser = run("eval", path, *QUICK)
    assert lesser.exit_code == 0, lesser.output
    assert {name: (path / name).read_bytes() for name in names} == before
    assert (
        "note: eval.json keeps the more comprehensive evaluation (fgsm, pgd-2 on 8 images, Linf, eps 0.1); replace it"
        in (lesser.stdout)
    )
    (record,) = (path / "evaluations").glob("*.json")
    assert record.name.startswith("fgsm-Linf-0.1-5-")
    assert Report.load(record).n_examples == 5
    sweep = run("eval", path, *QUICK, "--eps", "0,0.05,0.1")
    assert sweep.exit_code == 0, sweep.output
    assert "sweep over 2 radii: at most 2 x 2 forward passes for each of 5 images, of which fgsm needs" in sweep.stderr
    assert len(list((path / "evaluations").glob("*-eps.png"))) == 1
    assert Report.load(path).n_examples == 8
    replaced = run("eval", path, *QUICK, "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    assert Report.load(path).n_examples == 5
    assert not (path / "report.html").exists(), "it was of the previous evaluation"
    archived = next(file for file in (path / "evaluations").glob("*.json") if "-8-" in file.name)
    assert archived.read_bytes() == before["eval.json"]
    assert archived.with_suffix(".html").read_bytes() == before["report.html"]
    assert Report.load(archived).verdicts.keys() == {"natural", "fgsm", "pgd-2"}
    assert f"the previous eval.json is now evaluations/{archived.name}" in replaced.stdout


@pytest.mark.slow
def test_eval_of_other_data_is_not_the_runs_evaluation(tmp_path: Path, image_folder: Path) -> None:
    import shutil

    path = trained(tmp_path, "a", dataset="folder", data_dir=str(image_folder), train_size=None, val_size=4)
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    for folder in sorted((other / "test").iterdir()):
        min(folder.iterdir()).unlink()
    flags = ["--attacks", "fgsm", "--checks", "none", "--no-page", "--device", "cpu"]
    result = run("eval", path, "--data-dir", other, *flags)
    assert result.exit_code == 0, result.output
    assert not (path / "eval.json").exists()
    assert len(list((path / "evaluations").glob("*.json"))) == 1
    assert "note: the data are not the run's own, so it is not its eval.json: compare the file itself" in result.stdout
    (file,) = (path / "evaluations").glob("*.json")
    compared = run("compare", path, path)
    assert compared.exit_code == 2
    assert f"on the data that it was trained on, but has others: give such a file, as {file}, or" in compared.stderr
    refused = run("eval", path, "--data-dir", other, *flags, "--overwrite")
    assert refused.exit_code == 2
    assert "--overwrite is only for evaluations of a run on its own dataset" in refused.stderr
    assert not (path / "eval-state").exists(), "nothing was attacked"
    own = run("eval", path, *flags)
    assert own.exit_code == 0, own.output
    assert (path / "eval.json").exists()


def test_eval_l2_and_bf16(described: list[object], tmp_path: Path) -> None:
    result = run("eval", *described, "--attacks", "pgd-2", "--norm", "L2", "--precision", "bf16", "--checks", "none",
                 "--no-page")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "note: the attacks ran in bf16" in result.stdout
    report = Report.load(tmp_path / "report.json")
    assert (report.norm, report.eps, report.precision) == ("L2", 0.5, "bf16")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--norm", "L1"], "unknown norm 'L1'"),
        (["--precision", "fp16"], "unknown evaluation precision 'fp16': did you mean"),
        (["--checks", "some"], "unknown level of checks 'some'"),
        (["--eps", "1/255,x"], "'x' is not a number"),
        (["--attacks", "torchattacks.PDG(steps=3),fgsm"], "torchattacks.PDG does not exist: did you mean 'PGD'"),
        (["--resume"], "there is no unfinished evaluation in"),
        (["--strict", "--checks", "none"], "--strict needs checks: omit --checks none"),
        (["--model-dir", "zoo"], "--model-dir zoo is only for robustbench:NAME"),
    ],
)
def test_eval_refuses_bad_options(flags: list[str], sentence: str, described: list[object]) -> None:
    result = run("eval", *described, *flags)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_eval_schema_is_the_documented_one() -> None:
    result = run("eval", "--schema")
    assert result.exit_code == 0
    assert result.stdout == json_schema() == DOCUMENTED.read_text(encoding="utf-8")
    schema = json.loads(result.stdout)
    assert {"results", "worst_case", "curve", "checks", "model_sha256"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


# Models by name.


MODULE = """
import pathlib, torch
pathlib.Path("was_run").touch()
class Mean(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 4)
def trained(): return Mean()
def broken(): raise OSError("no weights\\nat all")
def wrong(): return torch.nothing
def number(): return 3
def build(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, num_classes))
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A third-party module on the path."""
    (tmp_path / "their_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "their_networks", raising=False)
    return "their_networks"


def test_eval_of_a_function_in_a_module(foreign: str, tmp_path: Path) -> None:
    target = f"{foreign}:trained"
    result = run("eval", target, "--dataset", "digits", "--attacks", "natural", "--n-examples", 5, "--checks", "none",
                 "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert open_target(target, dataset="digits").provenance["model"] == target


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("their_networks:none", {"dataset": "digits"}, "'their_networks:none' cannot be imported"),
        ("no_such_module:x", {"dataset": "digits"}, "'no_such_module:x' cannot be imported"),
        ("their_networks:broken", {"dataset": "digits"}, r"failed \(OSError: no weights\): give a function"),
        ("their_networks:wrong", {"dataset": "digits"}, r"'their_networks:wrong' failed \(AttributeError: "),
        ("their_networks:number", {"dataset": "digits"}, "returned a int, not a torch.nn.Module"),
        ("their_networks:trained", {}, "does not specify its data: give the dataset"),
        (
            "their_networks:trained",
            {"dataset": "digits", "arch": "wrn-10-1"},
            "--arch wrn-10-1 is only for checkpoints",
        ),
        ("robustbench:", {"dataset": "cifar10"}, "RobustBench has no Linf model ''"),
    ],
)
def test_open_target_refuses_names(target: str, options: dict[str, Any], sentence: str, foreign: str) -> None:
    with pytest.raises(DeatError, match=sentence):
        open_target(target, **options)


def test_eval_runs_no_code_without_trust_code(foreign: str, tmp_path: Path) -> None:
    options = {"method": "standard", "arch": f"{foreign}:build", "train_size": 20, "val_size": 10, "batch_size": 10,
               "epochs": 1, "device": "cpu", "precision": "fp32"}  # fmt: skip
    path = train(options, output=tmp_path, name="theirs")[0].path
    (tmp_path / "was_run").unlink()
    del sys.modules[foreign]
    for refused in (lambda: load_model(path), lambda: open_target(path)):
        with pytest.raises(DeatError, match="'their_networks:build', which runs that module's code: if you trust"):
            refused()
    flags = ["--attacks", "fgsm", "--n-examples", 5, "--checks", "none", "--no-page", "--device", "cpu"]
    refusal = run("eval", path, *flags)
    assert refusal.exit_code == 2
    assert "--trust-code" in refusal.stderr
    assert not (tmp_path / "was_run").exists()
    assert run("eval", path, *flags, "--trust-code").exit_code == 0
    assert (tmp_path / "was_run").exists()
    assert not load_model(path, trust_code=True).training


def test_open_target_of_an_export_knows_its_architecture(tmp_path: Path) -> None:
    from deat_rb.robustbench.export import export

    options = {"method": "standard", "arch": "wrn-10-1", "train_size": 20, "val_size": 10, "batch_size": 10,
               "epochs": 1, "device": "cpu", "precision": "fp32"}  # fmt: skip
    path = train(options, output=tmp_path, name="run")[0].path
    evaluate_run(path)
    exported = export(path, model_name="Wang2021Gradient", output=tmp_path / "out", as_dataset="cifar10")
    subject = open_target(exported.weights, dataset="digits")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(subject.model(images), load_model(path)(images))
    assert subject.provenance["arch"] == "wrn-10-1"
    with pytest.raises(DeatError, match="does not specify its network and data: give --dataset"):
        open_target(exported.weights)
