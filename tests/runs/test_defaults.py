"""Defaults of the paper's settings and of the datasets."""

from __future__ import annotations

import pytest

from deat_rb.methods.build import configure
from deat_rb.methods.registry import known_methods, recipe
from deat_rb.runs.defaults import dataset_defaults, default_arch, setting_defaults
from deat_rb.runs.options import make_options, train_options
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError


@pytest.mark.parametrize(
    ("method", "epochs"),
    [("deat-3", 12), ("deat-40%", 11), ("m-deat", 11), ("u-fgsm", 15), ("m+u-fgsm", 15), ("free-8", 10),
     ("pgd-7", 10), ("m+trades", 10)],
)  # fmt: skip
def test_setting_defaults_fast_is_the_papers(method: str, epochs: int) -> None:
    settings = setting_defaults("fast", recipe(method)[1], "wrn-34-10")
    assert settings.pop("gamma", 1.01) == 1.01
    assert settings.pop("carry", None) is (True if method == "free-8" else None)
    assert settings == {"epochs": epochs, "lr": 0.1, "lr_schedule": "cyclic", "precision": "auto", "select": "last"}


@pytest.mark.parametrize("method", ["deat-3", "u-fgsm", "m+mart", "standard", "free-8"])
def test_setting_defaults_standard_is_the_papers(method: str) -> None:
    settings = setting_defaults("standard", recipe(method)[1], "preactresnet18")
    assert settings.pop("gamma", 1.01) == 1.01
    assert settings.pop("carry", None) is (False if method == "free-8" else None)
    assert settings == {"epochs": 50, "lr": 0.05, "lr_schedule": "multistep", "precision": "fp32", "select": "best"}


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        ("pgd-10", 100),
        ("u-fgsm", 100),
        ("trades", 100),
        ("free-4", 50),
        ("free-8", 25),
        ("free-300", 1),
        ("m-deat", 50),
    ],
)
def test_setting_defaults_fastat_is_the_benchmarks(method: str, epochs: int) -> None:
    """configs/cifar10 of fzjcdt/FastAT_Benchmark: free_at.yaml has 200 epochs for 4 replays, the others 100."""
    settings = setting_defaults("fastat", recipe(method)[1], "resnet18")
    assert settings.pop("gamma", 1.01) == 1.01
    assert settings.pop("carry", False) is False
    assert settings == {
        "epochs": epochs, "lr": 0.1, "lr_schedule": "onecycle", "precision": "fp32", "select": "best", "ema": 0.9995,
        "label_smoothing": 0.4,
    }  # fmt: skip
    assert "label_smoothing" not in setting_defaults("fastat", recipe("mart")[1], "resnet18")


@pytest.mark.parametrize(
    ("method", "steps", "same", "values"),
    [
        ("yopo-5-3", 2, "yopo-2-3", {"lr": 0.1, "epochs": 100}),
        ("free-4", 8, "free-8", {"lr": 0.1, "epochs": 25}),
        ("amata-2-10", 4, "amata-4-10", {"lr": 0.1, "epochs": 100}),
    ],
)
def test_steps_change_the_method_as_the_number_in_its_name(
    method: str, steps: int, same: str, values: dict[str, float]
) -> None:
    """In FastAT Benchmark's setting: FREE-R for 200/R epochs, YOPO with 0.2/m; Amata's steps add up to 20/255."""
    common = {"dataset": "cifar10", "setting": "fastat", "device": "cpu"}
    changed, named = (
        resolve(make_options({**common, **given})) for given in ({"method": method, "steps": steps}, {"method": same})
    )
    assert changed.flat() == {**named.flat(), "method": method, "steps": steps}
    assert {name: changed.flat()[name] for name in values} == values
    attacks = [
        configure(*recipe(each.attack.method), eps=8 / 255, **each.method_options()).recipe for each in (changed, named)
    ]
    assert attacks[0].steps == attacks[1].steps == steps
    assert attacks[0].alpha == attacks[1].alpha
    if "amata" in method:
        assert attacks[0].alpha * steps == pytest.approx(20 / 255)


def test_default_arch_of_fastat_is_resnet18_for_cifar() -> None:
    archs = [default_arch(dataset, "fastat") for dataset in ("cifar10", "cifar100", "folder", "digits")]
    assert archs == ["resnet18", "resnet18", "preactresnet18", "wrn-10-1"]
    assert default_arch("cifar10", "fast") == "preactresnet18"


def test_setting_defaults_carry_is_off_in_the_standard_setting() -> None:
    assert setting_defaults("standard", recipe("free-8")[1], "preactresnet18")["carry"] is False


def test_setting_defaults_gamma_depends_on_the_architecture_and_is_for_guided_methods_only() -> None:
    guided, plain = recipe("m-deat")[1], recipe("deat-3")[1]
    assert setting_defaults("fast", guided, "preactresnet18")["gamma"] == 1.0
    assert setting_defaults("fast", guided, "wrn-34-10")["gamma"] == 1.01
    assert "gamma" not in setting_defaults("fast", plain, "preactresnet18")


def test_dataset_defaults_are_the_papers_but_for_digits() -> None:
    for dataset in ("cifar10", "cifar100", "folder"):
        defaults = dataset_defaults(dataset)
        assert (defaults.arch, defaults.eps, defaults.batch_size) == ("preactresnet18", 8 / 255, 128)
        assert defaults.epoch_factor == 1
    with pytest.raises(DeatError, match="unknown dataset 'cifar': did you mean 'cifar10'"):
        dataset_defaults("cifar")


def test_gamma_is_documented_for_schedules_and_for_stopping_rules() -> None:
    gamma = next(each for each in train_options() if each.name == "gamma")
    stopping = {name: recipe(name)[1].stopping_options.get("gamma") for name in known_methods()}
    assert {name: value for name, value in stopping.items() if value} == {"m+u-fgsm": 1.5, "m+n-fgsm": 1.5}
    assert "; 1.5 m+u-fgsm and m+n-fgsm" in str(gamma.default)
    assert "stopping rule" in gamma.help
