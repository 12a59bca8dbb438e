"""Each workaround for robustbench beside the fault: where a `*_upstream` test fails, the workaround can go."""

from __future__ import annotations

import inspect
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fresh_interpreters import Fresh
from torch import nn

from deat_rb.models.spec import build_model
from deat_rb.robustbench import benchmark as robustbench_benchmark
from deat_rb.robustbench import register
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
UPSTREAM_AUTOATTACK = "autoattack" in metadata.packages_distributions()
without_upstream_autoattack = pytest.mark.skipif(UPSTREAM_AUTOATTACK, reason="upstream's autoattack is installed")


@pytest.mark.slow
@without_upstream_autoattack
def test_robustbench_alone_does_not_import_upstream(fresh: Fresh, tmp_path: Path) -> None:
    result = fresh("import robustbench", tmp_path)
    assert "ModuleNotFoundError: No module named 'autoattack'" in result.stderr


@pytest.mark.slow
def test_robustbench_imports_and_knows_the_architectures(fresh: Fresh, tmp_path: Path) -> None:
    code = """
import sys
from deat_rb.utils import compat
from robustbench.model_zoo.architectures.resnet import PreActResNet
print(["timm" in sys.modules, "pandas" in sys.modules, "torchvision" in sys.modules])
import robustbench
zoo = robustbench.model_zoo.architectures
print(compat.robustbench() is robustbench, compat.architectures() == (zoo.wide_resnet, zoo.resnet))
from importlib.util import find_spec
print("tests" in sys.modules, find_spec("autoattack") is None)
"""
    result = fresh(code, tmp_path)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [str([True] * 3), "True True", "False False"]


@pytest.mark.slow
def test_robustbench_names_a_file_that_hides_autoattack(fresh: Fresh, tmp_path: Path) -> None:
    (tmp_path / "autoattack.py").write_text("")
    code = """
from deat_rb.utils import compat
try:
    compat.robustbench()
except Exception as error:
    print(error)
"""
    result = fresh(code, tmp_path, str(tmp_path))
    hidden = f"{tmp_path}/autoattack.py shadows the package autoattack, which robustbench imports: rename it"
    assert result.stdout.strip() == hidden, result.stderr


def test_torchattacks_wheel_contains_another_robustbench_upstream() -> None:
    files = [str(file) for file in metadata.distribution("torchattacks").files or ()]
    assert "robustbench/eval.py" in files


@pytest.mark.slow
def test_pkg_resources_is_needed_upstream(fresh: Fresh, tmp_path: Path) -> None:
    code = """
import sys; sys.modules["pkg_resources"] = None
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
try:
    compat.robustbench()
except DeatError as error:
    print(error)
"""
    result = fresh(code, tmp_path)
    assert "robustbench cannot be imported" in result.stdout, result.stderr
    assert "'setuptools<82' (robustbench needs its pkg_resources)" in result.stdout


def test_pkg_resources_is_installed() -> None:
    assert util.find_spec("pkg_resources") is not None
    assert int(metadata.version("setuptools").partition(".")[0]) < 82


@pytest.mark.slow
def test_architectures_loads_the_zoos_classes_without_the_zoo(fresh: Fresh, tmp_path: Path) -> None:
    code = """
import pickle, sys
from deat_rb.models.spec import build_model
from deat_rb.utils import compat
model = build_model("preactresnet18", dataset="cifar10")
print([name in sys.modules for name in ("robustbench", "timm", "pandas", "torchvision", "gdown")])
robustbench = compat.robustbench()
import robustbench.model_zoo.cifar10 as zoo
architectures = robustbench.model_zoo.architectures
print(architectures.resnet.PreActResNet is type(model.net), zoo.PreActResNet is type(model.net))
print(isinstance(zoo.Wong2020FastNet(), type(model.net)), architectures.wide_resnet is compat.architectures()[0])
"""
    result = fresh(code, tmp_path)
    assert result.stdout.splitlines() == [str([False] * 5), "True True", "True True"], result.stderr


@pytest.mark.slow
def test_architectures_of_a_pickled_model_are_found_by_another_process(fresh: Fresh, tmp_path: Path) -> None:
    model = build_model("wrn-10-1", dataset="cifar10").eval()
    torch.save({"model": model, "images": IMAGES, "logits": model(IMAGES)}, tmp_path / "whole.pt")
    code = """
import torch
saved = torch.load("whole.pt", weights_only=False)
print(torch.equal(saved["model"](saved["images"]), saved["logits"]))
"""
    result = fresh(code, tmp_path)
    assert result.stdout.strip() == "True", result.stderr


def test_robustbench_installs_a_package_named_tests_upstream(fresh: Fresh, tmp_path: Path) -> None:
    result = fresh("import tests; print(tests.__file__)", tmp_path)
    distribution = metadata.distribution("robustbench")
    assert Path(result.stdout.strip()) == Path(str(distribution.locate_file("tests/__init__.py")))


@pytest.fixture
def evaluation() -> Any:
    compat.robustbench()
    import robustbench.eval

    return robustbench.eval


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("wrn-10-1", dataset="cifar10").eval()


@pytest.fixture(scope="module")
def labels(model: nn.Module) -> torch.Tensor:
    """The model's predictions, except for the last image: clean accuracy is 5/6."""
    with torch.no_grad():
        labels: torch.Tensor = model(IMAGES).argmax(dim=1)
    labels[-1] = (labels[-1] + 1) % 10
    return labels


@without_upstream_autoattack
def test_benchmark_with_pyautoattack_alone_fails_upstream(
    evaluation: Any, model: nn.Module, labels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyautoattack

    monkeypatch.setattr(evaluation, "AutoAttack", pyautoattack.AutoAttack)
    monkeypatch.setattr(evaluation, "load_clean_dataset", lambda *_: (IMAGES, labels))
    with pytest.raises(TypeError, match="log_path"):
        evaluation.benchmark(model, n_examples=6, eps=8 / 255)


def test_benchmark_takes_neither_images_nor_a_seed_upstream(evaluation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    assert not {"images", "x_test", "seed"} & set(inspect.signature(evaluation.benchmark).parameters)
    asked: list[dict[str, Any]] = []

    def offline(**options: Any) -> None:
        asked.append(options)
        raise RuntimeError("offline")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(RuntimeError, match="offline"):
        evaluation.benchmark(nn.Identity(), n_examples=6, eps=8 / 255)
    assert asked[0]["download"] is True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """AutoAttack with few iterations; the list of the suites that are created."""
    import pyautoattack

    suites: list[Any] = []

    class Quick(pyautoattack.AutoAttack):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 3
            self.square.n_queries = 5
            suites.append(self)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Quick)
    return suites


@pytest.mark.slow
def test_benchmark(
    model: nn.Module, labels: torch.Tensor, quick: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    clean, robust, correct = robustbench_benchmark.benchmark(model, IMAGES, labels, eps=1e-6, batch_size=4, seed=3)
    assert clean == robust == pytest.approx(5 / 6)
    assert correct.tolist() == [True] * 5 + [False]
    assert quick[0].seed == 3
    assert (quick[0].epsilon, quick[0].norm, quick[0].version) == (1e-6, "Linf", "standard")
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capsys.readouterr().out == ""
    model.eval()


def test_benchmark_of_a_random_network(model: nn.Module, labels: torch.Tensor, quick: list[Any]) -> None:
    """A random network at eps 0.3 has robust accuracy 0, and clean accuracy is not changed by that."""
    clean, robust, correct = robustbench_benchmark.benchmark(model, IMAGES, labels, eps=0.3, batch_size=6, seed=0)
    assert clean == pytest.approx(5 / 6)
    assert robust == 0
    assert not correct.any()


@pytest.mark.slow
def test_benchmark_restores_robustbench(
    evaluation: Any, model: nn.Module, labels: torch.Tensor, quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    before = (evaluation.AutoAttack, evaluation.load_clean_dataset)
    robustbench_benchmark.benchmark(model, IMAGES, labels, eps=1e-6, batch_size=6)
    with pytest.raises(DeatError, match="does not accept"):
        robustbench_benchmark.benchmark(model, IMAGES[:, :2], labels, eps=1e-6, batch_size=6)
    monkeypatch.setattr(evaluation, "benchmark", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        robustbench_benchmark.benchmark(model, IMAGES, labels, eps=1e-6, batch_size=6)
    assert (evaluation.AutoAttack, evaluation.load_clean_dataset) == before


@pytest.mark.slow
def test_benchmark_with_an_autoattack_that_the_user_has_set(
    evaluation: Any, model: nn.Module, labels: torch.Tensor, quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "AutoAttack", type("AutoAttack", (), {"__module__": "pyautoattack.autoattack"}))
    assert robustbench_benchmark.benchmark(model, IMAGES, labels, eps=1e-6, batch_size=6)[0] == pytest.approx(5 / 6)


@pytest.mark.parametrize("name", ["digits", "CIFAR", ""])
def test_benchmark_refuses_an_unknown_dataset(name: str, model: nn.Module, labels: torch.Tensor) -> None:
    with pytest.raises(DeatError, match=f"RobustBench has no dataset '{name}': (did you mean|choose one of cifar10)"):
        robustbench_benchmark.benchmark(model, IMAGES, labels, eps=0.1, batch_size=6, dataset=name)


def test_datasets_are_those_of_the_enum_upstream(evaluation: Any) -> None:
    from robustbench.utils import DATASET_CLASSES

    assert {dataset.value: classes for dataset, classes in DATASET_CLASSES.items()} == compat.DATASETS


def test_autoattack_has_upstreams_signature() -> None:
    """As in fra31/auto-attack, autoattack.py."""
    constructor = list(inspect.signature(compat.AutoAttack).parameters)
    assert constructor == ["model", "norm", "eps", "seed", "verbose", "attacks_to_run", "version", "is_tf_model",
                           "device", "log_path"]  # fmt: skip
    run = list(inspect.signature(compat.AutoAttack.run_standard_evaluation).parameters)
    assert run == ["self", "x_orig", "y_orig", "bs", "return_labels", "state_path"]


def test_autoattack_returns_images_and_labels_on_request(model: nn.Module, labels: torch.Tensor) -> None:
    attack = compat.AutoAttack(model, eps=0.3, seed=0, device="cpu", version="custom", attacks_to_run=["apgd-ce"])
    attack.suite.apgd.n_iter = 3
    adv, predicted = attack.run_standard_evaluation(IMAGES, labels, bs=6, return_labels=True)
    assert torch.equal(predicted, model(adv).argmax(dim=1))
    assert (adv - IMAGES).abs().max() <= 0.3 + 1e-6
    again = attack.run_standard_evaluation(IMAGES, labels, bs=6)
    assert isinstance(again, torch.Tensor)
    assert torch.equal(again, adv)


def linear(num_classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


def test_autoattack_with_fewer_than_ten_classes_fails_upstream() -> None:
    import pyautoattack

    attack = pyautoattack.AutoAttack(linear(5), eps=0.001, seed=0)
    with pytest.raises(IndexError, match="out of bounds"):
        attack.run_standard_evaluation(IMAGES, linear(5)(IMAGES).argmax(dim=1))


def test_autoattack_with_fewer_than_ten_classes(quick: list[Any]) -> None:
    model = linear(5)
    compat.AutoAttack(model, eps=0.001, seed=0, device="cpu").run_standard_evaluation(
        IMAGES, model(IMAGES).argmax(dim=1)
    )
    assert (quick[0].apgd_targeted.n_target_classes, quick[0].fab.n_target_classes) == (4, 4)


def test_autoattack_refuses_three_classes(quick: list[Any]) -> None:
    attack = compat.AutoAttack(linear(3), device="cpu")
    with pytest.raises(DeatError, match="need 4 or more classes, not 3"):
        attack.run_standard_evaluation(IMAGES, torch.zeros(6, dtype=torch.int64))


def test_autoattack_refuses_options_that_pyautoattack_lacks(tmp_path: Path) -> None:
    for options in ({"log_path": tmp_path / "log"}, {"is_tf_model": True}):
        with pytest.raises(DeatError, match="does not support is_tf_model"):
            compat.AutoAttack(linear(5), device="cpu", **options)
    with pytest.raises(DeatError, match="omit aa_state_path"):
        compat.AutoAttack(linear(5), device="cpu").run_standard_evaluation(
            IMAGES, torch.zeros(6), state_path=tmp_path / "state"
        )
    assert not list(tmp_path.iterdir())


def test_autoattack_state_files_crash_upstream(tmp_path: Path) -> None:
    """What `robustbench.benchmark(aa_state_path=...)` does when the attack is over; and resuming's comparison."""
    from pyautoattack.state import EvaluationState

    state = EvaluationState({"apgd-ce", "square"}, path=tmp_path / "state.json")
    state.robust_flags = torch.tensor([True, False])
    state.to_disk(force=True)
    loaded = EvaluationState.from_disk(tmp_path / "state.json")
    assert loaded.robust_flags is not None
    with pytest.raises(RuntimeError, match="mean"):
        loaded.robust_flags.mean()
    assert loaded.attacks_to_run != {"apgd-ce", "square"}


def test_add_to_zoo_does_not_replace_a_model() -> None:
    with pytest.raises(DeatError, match="RobustBench already has a model 'Wong2020Fast'"):
        register.add_to_zoo(
            [("New2024Model", "cifar10", "Linf", nn.Identity), ("Wong2020Fast", "cifar10", "Linf", nn.Identity)]
        )
    import robustbench

    zoo: ModuleType = robustbench.model_zoo.models
    assert "New2024Model" not in [
        name for linf in zoo.model_dicts.values() for models in linf.values() for name in models
    ]
