"""`deat_rb.robustbench.export`: files, metadata, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner
from export_runs import DATA, Run, files_below, info_of, opened
from small_runs import SMALL, state

import deat_rb
from deat_rb.cli import main
from deat_rb.evaluation.report import Check
from deat_rb.robustbench.export import export
from deat_rb.runs.options import make_options
from deat_rb.runs.train import train
from deat_rb.utils import compat, files
from deat_rb.utils.errors import DeatError

# Every one of RobustBench's own files for Lp threats has these; the others are optional.
FIELDS = {
    "link",
    "name",
    "authors",
    "additional_data",
    "number_forward_passes",
    "dataset",
    "venue",
    "architecture",
    "eps",
    "clean_acc",
    "reported",
    "autoattack_acc",
}
OPTIONAL = {"external", "unreliable", "footnote"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return opened(Run(tmp_path / "run"), monkeypatch)


def test_export_writes_files_and_fields(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient_WRN-10-1", output=tmp_path / "out")
    assert files_below(tmp_path / "out") == {
        "models/cifar10/Linf/Wang2021Gradient_WRN-10-1.pt",
        "model_info/cifar10/Linf/Wang2021Gradient_WRN-10-1.json",
        "pull_request/cifar10/Linf/Wang2021Gradient_WRN-10-1.py",
    }
    info = info_of(paths)
    assert FIELDS <= info.keys() <= FIELDS | OPTIONAL
    assert info == {
        "link": "https://arxiv.org/abs/2103.03076",
        "name": "Gradient-Guided Dynamic Efficient Adversarial Training",
        "authors": "Fu Wang, Yanghao Zhang, Yanbin Zheng, Wenjie Ruan",
        "venue": "arXiv, Mar 2021",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "architecture": "WideResNet-10-1",
        "eps": "8/255",
        "clean_acc": "75.00",
        "reported": "48.50",
        "autoattack_acc": "48.50",
        "footnote": "Trained with deat-rb, method m+trades. Accuracies on 200 test images.",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_a_run_with_averaged_weights_is_exported_with_them(tmp_path: Path) -> None:
    import robustbench

    options = {**SMALL, "arch": "wrn-10-1", "epochs": 1, "ema": 0.9}
    run, _ = train(make_options(options), output=tmp_path)
    evaluation = ["--attacks", "pgd-2", "--n-examples", "8", "--checks", "none", "--no-page"]
    result = CliRunner().invoke(main, ["eval", str(run.path), *evaluation])
    assert result.exit_code == 0, result.output
    export(run.path, model_name="Wang2021Gradient_EMA", output=tmp_path / "exported", as_dataset="cifar10")
    (name,) = deat_rb.register(tmp_path / "exported")
    loaded = robustbench.load_model(name, model_dir=tmp_path / "exported" / "models", threat_model="Linf").eval()
    images = torch.rand(4, 3, 32, 32)
    logits = {}
    with torch.no_grad():
        for which in ("last", "last-raw"):
            model = run.config.network.build().eval()
            model.load_state_dict(state(run, which))
            logits[which] = model(images)
        exported = loaded(images)
    torch.testing.assert_close(exported, logits["last"], rtol=0, atol=1e-5)
    assert (exported - logits["last-raw"]).abs().max() > 0.01


def test_export_names_weights_as_robustbench_does(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    tensors = torch.load(paths.weights, weights_only=True)
    assert {"mu", "sigma", "conv1.weight", "block1.layer.0.bn1.running_mean", "fc.bias"} <= tensors.keys()
    assert not [name for name in tensors if name.startswith(("net.", "module.", "model."))]
    assert torch.equal(tensors["mu"], torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))


def test_export_as_another_dataset_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(Run(tmp_path / "run", dataset="folder"), monkeypatch)
    with pytest.raises(DeatError, match=r"no dataset 'folder': give the one to export it under .cifar10, cifar100"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    paths = export(
        run.path, model_name="Wang2021Gradient", output=tmp_path / "out", as_dataset="cifar10", footnote="Mine."
    )
    assert info_of(paths)["dataset"] == "cifar10"
    assert info_of(paths)["footnote"] == (
        "Trained with deat-rb, method m+trades. "
        "Trained and evaluated on a folder named my-images, not on CIFAR-10. Accuracies on 200 test images. Mine."
    )


@pytest.mark.parametrize(
    ("arch", "num_classes", "as_dataset", "sentence"),
    [("wrn-10-1", 7, "cifar10", "7 classes cannot be exported as cifar10, which has 10"),
     ("wrn-10-1", 10, "cifar", "RobustBench has no dataset 'cifar': did you mean"),
     ("wrn-10-1", 1000, "imagenet", "224x224"),
     ("torchvision:squeezenet1_1", 10, "cifar10", "'torchvision:squeezenet1_1' is not from RobustBench")],
)  # fmt: skip
def test_export_refuses_datasets_and_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, num_classes: int, as_dataset: str, sentence: str
) -> None:
    run = opened(Run(tmp_path / "run", arch, "folder", num_classes), monkeypatch)
    with pytest.raises(DeatError, match=sentence):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out", as_dataset=as_dataset)
    assert not (tmp_path / "out").exists()


def test_export_imports_no_module_that_a_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_network.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = opened(Run(tmp_path / "run"), monkeypatch)
    run.model_spec = run.model_spec.model_copy(update={"arch": "evil_network:build"})
    with pytest.raises(DeatError, match="'evil_network:build' is not from RobustBench"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "Wang2021",
        "wang2021Gradient",
        "Wang21Gradient",
        "Wang2021Gradient_",
        "",
        "My model",
        "Wang2021Gradient/R18",
        "../Wang2021Gradient",
        "Wang2021Gradient_..",
        "Wang2021Gradient\n",
        "Wäng2021Gradient",
        "Wang2021Gradient_R18'",
    ],
)
def test_export_refuses_malformed_names(run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(DeatError, match="does not have RobustBench's form <FirstAuthor><Year><Word>"):
        export(run.path, model_name=name, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Wong2020Fast", "RodriguezMunoz2024Characterizing_Swin-B", "Wu2020Adversarial_extra",
                                  "Rebuffi2021Fixing_70_16_cutmix_extra", "Ding2020MMA"])  # fmt: skip
def test_export_accepts_names_of_robustbench(run: Run, tmp_path: Path, name: str) -> None:
    assert export(run.path, model_name=name, output=tmp_path / "out").weights.stem == name


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"provenance": {}}, r"computed for weights other than the run's \(SHA-256 None instead of \w{12}\)"),
        ({"provenance": {"weights_sha256": "a" * 64, "data_sha256": DATA}}, "for weights other than the run's"),
        (
            {"data": "b" * 64},
            r"for data other than the run's \(SHA-256 b{12} instead of d{12}\): run deat-rb eval",
        ),
        ({"data": None}, "for data other than the run's"),
        ({"eps": 4 / 255}, "was computed at eps 4/255, but the run was trained for 8/255"),
        ({"norm": "L2"}, "was computed with L2 and fp32, not Linf and fp32"),
        ({"precision": "bf16"}, "was computed with Linf and bf16"),
        ({"attack": None}, "has no robust accuracy: run deat-rb eval"),
    ],
)
def test_export_refuses_evaluations_that_are_not_the_runs(
    run: Run, tmp_path: Path, evaluation: dict[str, Any], message: str
) -> None:
    if "data" in evaluation:
        own = {"weights_sha256": files.sha256_file(run.selected_weights_path), "data_sha256": evaluation.pop("data")}
        evaluation["provenance"] = {key: value for key, value in own.items() if value is not None}
    attack = evaluation.pop("attack", "autoattack")
    options: dict[str, Any] = {**evaluation, **({attack: 97} if attack else {})}
    run.evaluated(**options)
    with pytest.raises(DeatError, match=message):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_run_without_evaluation(run: Run, tmp_path: Path) -> None:
    (run.path / "eval.json").unlink()
    with pytest.raises(DeatError, match=r"run has no evaluation \(eval\.json\), so its accuracies are unknown"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")


def test_export_without_autoattack_says_that_its_accuracy_is_unknown(run: Run, tmp_path: Path) -> None:
    run.evaluated(fgsm=110, pgd_100=101)
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    info = info_of(paths)
    assert paths.unknown == ("autoattack_acc",)
    assert (info["reported"], info["autoattack_acc"], info["unreliable"]) == ("50.50", "0.00", True)
    assert "AutoAttack was not run: its accuracy of 0.00 stands for unknown." in info["footnote"]


def test_export_notes_another_eps(run: Run, tmp_path: Path) -> None:
    run.config.attack.eps = 1 / 255
    run.evaluated(eps=1 / 255, autoattack=97)
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    assert "Evaluated at eps 1/255 instead of 8/255." in info_of(paths)["footnote"]


@pytest.mark.parametrize(("attack", "expected"), [("autoattack", 48.5), ("pgd_100", 0.0)])
def test_export_is_ranked_by_robustbench(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str, expected: float
) -> None:
    """RobustBench sorts by ``float(external or autoattack_acc)``: one "nan" would break the order of all others."""
    accuracies_of_run: dict[str, Any] = {attack: 97}
    run.evaluated(**accuracies_of_run)
    compat.robustbench()
    template: Any = importlib.import_module("robustbench.leaderboard.template")
    ranked: list[dict[str, Any]] = []

    class Page:
        def render(self, models: list[dict[str, Any]], **_: object) -> str:
            ranked.extend(models)
            return ""

    class Environment:  # the wheel lacks the HTML template
        def __init__(self, **_: object) -> None: ...

        def get_template(self, _: str) -> Page:
            return Page()

    monkeypatch.setattr(template, "Environment", Environment)
    monkeypatch.setattr(template, "PackageLoader", lambda *_: None)
    folder = export(run.path, model_name="Wang2021Gradient", output=tmp_path).info.parent
    for number in range(20):
        other = {**json.loads((folder / "Wang2021Gradient.json").read_text()), "autoattack_acc": f"{7 * number % 90}.0"}
        (folder / f"Other2021Model_{number}.json").write_text(json.dumps(other))
    template.generate_leaderboard("cifar10", "Linf", str(tmp_path / "model_info"))
    accuracies = [float(model["autoattack_acc"]) for model in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    assert len(ranked) == 21
    assert expected in accuracies


def test_export_takes_external_and_unreliable(run: Run, tmp_path: Path) -> None:
    info = info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path, external=40.123, unreliable=True))
    assert (info["external"], info["unreliable"]) == ("40.12", True)


@pytest.mark.parametrize(
    ("declared", "value", "noted"), [(None, False, True), (True, True, False), (False, False, False)]
)
def test_export_says_that_additional_data_are_unknown(
    run: Run, tmp_path: Path, declared: bool | None, value: bool, noted: bool
) -> None:
    run.config.additional_data = None
    info = info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path, additional_data=declared))
    assert info["additional_data"] is value
    assert ("It is unknown whether additional training data were used" in info["footnote"]) == noted


@pytest.mark.parametrize(("status", "expected"), [("pass", None), ("warn", None), ("fail", True)])
def test_export_is_unreliable_where_a_check_failed(
    run: Run, tmp_path: Path, status: Literal["pass", "warn", "fail"], expected: bool | None
) -> None:
    run.evaluated(autoattack=97, checks=[Check(name="gradients", status=status, figure=0.0, sentence="They are 0.")])
    info = info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path / "a"))
    assert info.get("unreliable") is expected
    assert ("Failed checks of the evaluation: gradients." in info["footnote"]) == (status == "fail")
    overruled = export(run.path, model_name="Wang2021Gradient", output=tmp_path / "b", unreliable=False)
    assert info_of(overruled)["unreliable"] is False


def test_export_says_that_training_had_not_ended(run: Run, tmp_path: Path) -> None:
    run.unfinished = "1 of 6 epochs"
    info = info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out"))
    assert "Training had not ended: 1 of 6 epochs." in info["footnote"]


def test_export_of_other_methods_does_not_credit_the_paper(run: Run, tmp_path: Path) -> None:
    run.config.attack.method = "pgd-7"
    info = info_of(export(run.path, model_name="Madry2017Towards", output=tmp_path, venue="ICLR 2018", reported=47.04))
    assert (info["name"], info["authors"], info["venue"], info["reported"]) == ("", "", "ICLR 2018", "47.04")


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "8/255"), (0.031, "0.031"), (0.15, "0.15"), (1.0, "1")])
def test_export_writes_eps_as_text(run: Run, tmp_path: Path, eps: float, text: str) -> None:
    run.config.attack.eps = eps
    run.evaluated(autoattack=97, eps=eps)
    assert info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path))["eps"] == text


def test_export_refuses_bad_percentages(run: Run, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"reported": 120.0}, {"external": -1.0}, {"reported": math.nan}]
    for options in wrong:
        with pytest.raises(DeatError, match="is not a percentage"):
            export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_export_overwrites_only_if_asked(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    with pytest.raises(DeatError, match=r"Wang2021Gradient\.pt exists"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path, venue="new")
    assert info_of(paths)["venue"] == "arXiv, Mar 2021"
    export(run.path, model_name="Wang2021Gradient", output=tmp_path, venue="new", overwrite=True)
    assert info_of(paths)["venue"] == "new"


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_export_on_a_full_disk_leaves_all_files_as_they_were(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    before = {path: (tmp_path / "out" / path).read_bytes() for path in files_below(tmp_path / "out")}
    calls = iter(range(1, 10))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == nth:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeatError, match=r"cannot write .*Wang2021Gradient\.\w+: No space left on device"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out", venue="new", overwrite=True)
    assert {path: (tmp_path / "out" / path).read_bytes() for path in files_below(tmp_path / "out")} == before
    assert info_of(paths)["venue"] != "new"


def test_export_refuses_output_that_is_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DeatError, match=r"cannot write to .*out"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
