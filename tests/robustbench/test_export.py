"""RobustBench's form, and RobustBench loading it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deat_rb.evaluation.report import AttackResult, Report
from deat_rb.loading import load_model
from deat_rb.models.spec import build_model, model_spec
from deat_rb.robustbench.export import export
from deat_rb.robustbench.format import ExportPaths, exported_spec
from deat_rb.robustbench.register import register
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils import compat, files, safe_load
from deat_rb.utils.errors import DeatError

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
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


class Run:
    """As much of a run directory as an export takes, with weights that are no longer the fresh ones."""

    def __init__(self, path: Path, arch: str = "wrn-10-1", dataset: str = "cifar10", num_classes: int = 10) -> None:
        path.mkdir()
        self.path = path
        self.config = SimpleNamespace(
            attack=SimpleNamespace(method="m+trades", eps=8 / 255),
            data=SimpleNamespace(dataset=dataset, data_dir="/data/my-images"),
        )
        self.model_spec = model_spec(
            arch, num_classes=num_classes, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)
        )
        self.selected_weights_path = path / "best.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = self.model_spec.build()
            self.model(torch.rand(8, 3, 32, 32))  # moves BatchNorm's statistics
        self.model.eval()
        safe_load.save_tensors(self.selected_weights_path, self.model.state_dict())

    def evaluated(self, *, n: int = 200, eps: float = 8 / 255, **accuracies: int) -> None:
        """Writes an evaluation with so many correct examples per attack."""
        names = {name.replace("_", "-"): correct for name, correct in {"natural": 150, **accuracies}.items()}
        verdicts = {name: torch.arange(n) < correct for name, correct in names.items()}
        results = [
            AttackResult.of(name, correct, seconds=1.0, forwards=n, backwards=n) for name, correct in verdicts.items()
        ]
        provenance = {"weights_sha256": files.sha256_file(self.selected_weights_path)}
        Report.of(results, verdicts, eps=eps, num_classes=10, seed=0, batch_size=n, device="cpu", versions={},
                  provenance=provenance).save(self.path)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return opened(Run(tmp_path / "run"), monkeypatch)


def opened(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(RunDirectory, "open", lambda path: run)
    return run


def info_of(paths: ExportPaths) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(paths.info.read_text())
    return content


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_files_and_fields(run: Run, tmp_path: Path) -> None:
    run.evaluated(fgsm=110, pgd_100=101, autoattack=97, n=200)
    paths = export(run.path, model_name="Wang2021Gradient_WRN-10-1", output=tmp_path / "out")
    assert everything(tmp_path / "out") == {
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
    assert paths.unknown == ()


def test_weights_are_named_as_robustbench_names_them(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    tensors = torch.load(paths.weights, weights_only=True)
    assert {"mu", "sigma", "conv1.weight", "block1.layer.0.bn1.running_mean", "fc.bias"} <= tensors.keys()
    assert not [name for name in tensors if name.startswith(("net.", "module.", "model."))]
    assert torch.equal(tensors["mu"], torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))


@pytest.mark.parametrize("arch", ["wrn-10-1", "preactresnet18"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_robustbench_loads_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, dataset: str
) -> None:
    run = opened(Run(tmp_path / "run", arch, dataset, {"cifar10": 10, "cifar100": 100}[dataset]), monkeypatch)
    name = f"Wang2021Gradient_{arch}"
    paths = export(run.path, model_name=name, output=tmp_path / "out")
    assert register(tmp_path / "out") == (name,)
    assert register(str(tmp_path / "out")) == (name,), "once more is no error"
    robustbench: Any = compat.robustbench()
    loaded = robustbench.load_model(name, model_dir=tmp_path / "out" / "models", dataset=dataset, threat_model="Linf")
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), run.model(IMAGES))
    ours = load_model(paths.weights)
    assert torch.equal(ours(IMAGES), run.model(IMAGES))


def test_pull_request_is_python_that_robustbench_can_use(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put into the zoo as the text says, the class loads the file through `robustbench.load_model`."""
    paths = export(run.path, model_name="Wang2021Gradient_R18-fast", output=tmp_path)
    robustbench: Any = compat.robustbench()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts

    written: dict[str, Any] = {}
    exec(compile(paths.source.read_text(), str(paths.source), "exec"), written)
    entries = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    monkeypatch.setitem(entries, "Wang2021Gradient_R18-fast", written["linf"]["Wang2021Gradient_R18-fast"])
    loaded = robustbench.load_model("Wang2021Gradient_R18-fast", model_dir=tmp_path / "models", threat_model="Linf")
    assert type(loaded).__name__ == "Wang2021Gradient_R18_fastNet"
    assert torch.equal(loaded(IMAGES), run.model(IMAGES))


def test_other_data_stand_for_a_data_set_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(Run(tmp_path / "run", dataset="folder"), monkeypatch)
    with pytest.raises(DeatError, match="no dataset 'folder': say with as_dataset which of cifar10, cifar100"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    paths = export(
        run.path, model_name="Wang2021Gradient", output=tmp_path / "out", as_dataset="cifar10", footnote="Mine."
    )
    assert info_of(paths)["dataset"] == "cifar10"
    assert info_of(paths)["footnote"] == (
        "Trained with deat-rb, method m+trades. "
        "Trained and evaluated on a folder named my-images, not on CIFAR-10. Mine."
    )


@pytest.mark.parametrize(
    ("arch", "num_classes", "as_dataset", "sentence"),
    [("wrn-10-1", 7, "cifar10", "7 classes cannot stand for cifar10, which has 10"),
     ("wrn-10-1", 10, "cifar", "RobustBench has no dataset 'cifar': did you mean"),
     ("wrn-10-1", 1000, "imagenet", "224x224"),
     ("torchvision:squeezenet1_1", 10, "cifar10", "'torchvision:squeezenet1_1' is not one of RobustBench's")],
)  # fmt: skip
def test_what_cannot_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, num_classes: int, as_dataset: str, sentence: str
) -> None:
    run = opened(Run(tmp_path / "run", arch, "folder", num_classes), monkeypatch)
    with pytest.raises(DeatError, match=sentence):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out", as_dataset=as_dataset)
    assert not (tmp_path / "out").exists()


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
def test_malformed_names(run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(DeatError, match="does not have RobustBench's form <FirstAuthor><Year><Word>"):
        export(run.path, model_name=name, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Wong2020Fast", "RodriguezMunoz2024Characterizing_Swin-B", "Wu2020Adversarial_extra",
                                  "Rebuffi2021Fixing_70_16_cutmix_extra", "Ding2020MMA"])  # fmt: skip
def test_names_of_robustbench_are_well_formed(run: Run, tmp_path: Path, name: str) -> None:
    assert export(run.path, model_name=name, output=tmp_path / "out").weights.stem == name


def test_without_an_evaluation_accuracies_are_nan(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    info = info_of(paths)
    assert paths.unknown == ("clean_acc", "reported", "autoattack_acc")
    assert all(math.isnan(float(info[field])) for field in paths.unknown)
    assert info["footnote"] == "Trained with deat-rb, method m+trades."


def test_without_autoattack_only_its_accuracy_is_nan(run: Run, tmp_path: Path) -> None:
    run.evaluated(fgsm=110, pgd_100=101)
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path, external=40.123, unreliable=True)
    info = info_of(paths)
    assert (info["reported"], info["autoattack_acc"], paths.unknown) == ("50.50", "nan", ("autoattack_acc",))
    assert (info["external"], info["unreliable"]) == ("40.12", True)


def test_accuracies_at_another_eps_are_not_taken(run: Run, tmp_path: Path) -> None:
    run.evaluated(autoattack=97, eps=4 / 255)
    info = info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path))
    assert (info["clean_acc"], info["reported"], info["autoattack_acc"]) == ("75.00", "nan", "nan")


def test_evaluation_of_other_weights(run: Run, tmp_path: Path) -> None:
    run.evaluated(autoattack=97)
    safe_load.save_tensors(run.selected_weights_path, {n: t + 1 for n, t in run.model.state_dict().items()})
    with pytest.raises(DeatError, match="of other weights than the run has selected: evaluate again"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")


def test_credit_of_a_method_that_is_not_the_papers(run: Run, tmp_path: Path) -> None:
    run.config.attack.method = "pgd-7"
    info = info_of(export(run.path, model_name="Madry2017Towards", output=tmp_path, venue="ICLR 2018", reported=47.04))
    assert (info["name"], info["authors"], info["venue"], info["reported"]) == ("", "", "ICLR 2018", "47.04")


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "8/255"), (0.031, "0.031"), (0.15, "0.15"), (1.0, "255/255")])
def test_eps_as_text(run: Run, tmp_path: Path, eps: float, text: str) -> None:
    run.config.attack.eps = eps
    assert info_of(export(run.path, model_name="Wang2021Gradient", output=tmp_path))["eps"] == text


def test_percentages(run: Run, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"reported": 120.0}, {"external": -1.0}, {"reported": math.nan}]
    for options in wrong:
        with pytest.raises(DeatError, match="is not in percent"):
            export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_overwritten_unasked(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    with pytest.raises(DeatError, match=r"Wang2021Gradient\.pt exists"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path, venue="new")
    assert info_of(paths)["venue"] == "arXiv, Mar 2021"
    export(run.path, model_name="Wang2021Gradient", output=tmp_path, venue="new", overwrite=True)
    assert info_of(paths)["venue"] == "new"


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_full_disk_leaves_no_half_export(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    before = {path: (tmp_path / "out" / path).read_bytes() for path in everything(tmp_path / "out")}
    calls = iter(range(1, 10))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == nth:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeatError, match=r"cannot write .*Wang2021Gradient\.\w+: No space left on device"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out", venue="new", overwrite=True)
    assert {path: (tmp_path / "out" / path).read_bytes() for path in everything(tmp_path / "out")} == before
    assert info_of(paths)["venue"] != "new"


def test_output_that_is_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DeatError, match=r"cannot write below .*out"):
        export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")


def known_models() -> set[str]:
    compat.robustbench()
    from robustbench.model_zoo.models import model_dicts

    return {name for threats in model_dicts.values() for models in threats.values() for name in models}


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def damage(paths: ExportPaths, how: str, touched: Path) -> None:
    """Spoils an export in one way."""
    info = info_of(paths)
    if how == "code in the weights":
        torch.save({"mu": Touch(touched)}, paths.weights)
    elif how == "truncated weights":
        paths.weights.write_bytes(paths.weights.read_bytes()[:5000])
    elif how == "missing weights":
        paths.weights.unlink()
    elif how == "no JSON":
        paths.info.write_text("{")
    elif how == "another network":
        torch.save({**build_model("preactresnet18", dataset="cifar10").net.state_dict(), "mu": torch.zeros(3),
                    "sigma": torch.ones(3)}, paths.weights)  # fmt: skip
    else:
        paths.info.write_text(json.dumps({**info, "architecture": how}))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("code in the weights", "would run code"),
        ("truncated weights", "truncated"),
        ("missing weights", "does not exist"),
        ("no JSON", "not valid JSON"),
        ("another network", "another architecture"),
        ("WideResNet-16-1", "another architecture"),
        ("WideResNet-994-999", "is too large"),
        ("WideResNet-11-1", "depth D"),
        ("os:system", "known are ResNet-18, PreActResNet-18"),
        ("PreActResNet-18", "another architecture"),
    ],
)
def test_damaged_exports_register_nothing(run: Run, tmp_path: Path, how: str, sentence: str) -> None:
    export(run.path, model_name="Aaa2021Good", output=tmp_path / "out")
    paths = export(run.path, model_name="Wang2021Bad", output=tmp_path / "out")
    damage(paths, how, tmp_path / "executed")
    before = known_models()
    with pytest.raises(DeatError, match=sentence):
        register(tmp_path / "out")
    with pytest.raises(DeatError, match=sentence):
        load_model(paths.weights)
    assert known_models() == before
    assert not (tmp_path / "executed").exists()


def test_register_runs_no_code_of_the_folder(run: Run, tmp_path: Path) -> None:
    paths = export(run.path, model_name="Wang2021Gradient_noexec", output=tmp_path / "out")
    paths.source.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert register(tmp_path / "out") == ("Wang2021Gradient_noexec",)
    assert not (tmp_path / "executed").exists()


def test_register_refuses(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="there are no exports below"):
        register(tmp_path / "nothing")
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path / "out")
    paths.info.rename(paths.info.with_name("Wong2020Fast.json"))
    paths.weights.rename(paths.weights.with_name("Wong2020Fast.pt"))
    with pytest.raises(DeatError, match="RobustBench has a model 'Wong2020Fast' of its own"):
        register(tmp_path / "out")
    paths.info.with_name("Wong2020Fast.json").rename(paths.info.with_name("my model.json"))
    with pytest.raises(DeatError, match=r"my model\.json is not named as"):
        register(tmp_path / "out")


def test_spec_of_an_export_reads_sizes_from_the_tensors(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = export(run.path, model_name="Wang2021Gradient", output=tmp_path)
    spec = exported_spec(paths.weights)
    assert (spec.arch, spec.num_classes) == ("wrn-10-1", 10)
    assert spec.mean == pytest.approx(run.model_spec.mean)
    monkeypatch.chdir(paths.weights.parent)
    assert exported_spec(paths.weights.name) == spec
