"""What robustbench needs before it can be imported and driven, and the only place for it.

As released (robustbench 1.1.1 with pyautoattack 0.2.0), ``import robustbench`` fails, and where it does not,
`robustbench.benchmark` raises a TypeError. Each work-around here has a test in ``tests/test_compat.py`` that also shows
the problem, so that it can go once upstream is fixed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError, did_you_mean

ARCHITECTURES = "robustbench.model_zoo.architectures"

LIGHT = ("wide_resnet", "resnet")

DATASETS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""The data sets of robustbench's closed enum, with their number of classes."""


def robustbench() -> ModuleType:
    """Imports robustbench and returns it.

    Once this module has been imported, ``import robustbench`` works as well. What it lacks then is that the package
    ``robustbench.model_zoo.architectures`` knows the modules that `architectures` has loaded before it.

    Raises:
        DeatError: Something it needs is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module("robustbench")
    except ImportError as error:
        raise DeatError(f"robustbench cannot be imported ({error}): pip install robustbench pyautoattack "
                        "'setuptools<82', whose pkg_resources it needs") from error  # fmt: skip
    for name in LIGHT:
        setattr(sys.modules[ARCHITECTURES], name, importlib.import_module(f"{ARCHITECTURES}.{name}"))
    return package


def architectures() -> tuple[ModuleType, ModuleType]:
    """Loads robustbench's modules ``wide_resnet`` and ``resnet`` without the rest of its zoo.

    They need nothing but torch, while importing their package brings timm, torchvision and pandas and takes two to
    three seconds. They stand under their own names in ``sys.modules``, so that a later import of robustbench finds
    these very classes, and a pickled model is found from any process that has imported this package.
    """
    spec = importlib.util.find_spec("robustbench")
    if spec is None or not spec.submodule_search_locations:
        raise DeatError("robustbench is not installed: pip install robustbench")
    folder = Path(spec.submodule_search_locations[0], "model_zoo", "architectures")
    wide_resnet, resnet = (_load_alone(f"{ARCHITECTURES}.{name}", folder / f"{name}.py") for name in LIGHT)
    return wide_resnet, resnet


def _load_alone(name: str, file: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise DeatError(f"robustbench has no module {name}: reinstall it")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class AutoAttack:
    """pyautoattack's AutoAttack with the signature and the return value of upstream's (Croce and Hein 2020).

    Targeted attacks take K - 1 targets where there are fewer than ten classes.

    Attributes:
        suite: pyautoattack's own object.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str = "cuda",
        log_path: str | Path | None = None,
    ) -> None:
        import pyautoattack

        if is_tf_model or log_path is not None:
            raise DeatError("is_tf_model and log_path do not exist in pyautoattack, which logs to 'auto-attack'")
        self.suite: Any = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=seed, attacks=list(attacks_to_run) or None, version=version, device=device
        )
        self.suite.verbose = verbose

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attacks images (N, C, H, W) with labels (N,) in batches of ``bs``.

        Returns:
            The adversarial images, and with ``return_labels`` what the model takes them for, (N,).

        Raises:
            DeatError: There are fewer than 4 classes, or a state file is asked for.
        """
        if state_path is not None:
            raise DeatError("AutoAttack's state files cannot be resumed, and robustbench crashes over them at the end "
                            "of an evaluation: leave out aa_state_path")  # fmt: skip
        with torch.no_grad():
            classes = self.suite.get_logits(x_orig[:1].to(self.suite.device)).shape[-1]
        if classes < 4:
            raise DeatError(f"AutoAttack's targeted losses need 4 or more classes, not {classes}: deat_rb.evaluate "
                            "runs the parts that exist")  # fmt: skip
        for targeted in (self.suite.apgd_targeted, self.suite.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        x_adv, y_adv = self.suite.run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=None)
        return (x_adv, y_adv) if return_labels else x_adv


def check_dataset(dataset: str) -> None:
    """Refuses a data set that robustbench's closed enum does not have.

    Raises:
        DeatError: It has no such data set.
    """
    if dataset not in DATASETS:
        raise DeatError(f"RobustBench has no data set '{dataset}': {did_you_mean(dataset, DATASETS)}")


def _offer_autoattack() -> None:
    """Lets ``import autoattack``, which robustbench does, find `AutoAttack`, unless upstream's is installed.

    It stays, as pickling a model, too, imports the package of the network's class.
    """
    if "autoattack" in sys.modules or importlib.util.find_spec("autoattack") is not None:
        return
    module: Any = importlib.util.module_from_spec(ModuleSpec("autoattack", None))
    module.AutoAttack = AutoAttack
    module.state = importlib.import_module("pyautoattack.state")
    sys.modules.update({"autoattack": module, "autoattack.state": module.state})


_offer_autoattack()
