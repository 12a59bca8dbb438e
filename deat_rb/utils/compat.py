"""Workarounds for RobustBench's bugs, all in this module, and checks of its installation.

As released, robustbench 1.1.1 with pyautoattack 0.2.0 imports a package ``autoattack`` that is not among its
dependencies, its `benchmark` raises a TypeError, and torchattacks' wheel may have overwritten its files.
``tests/utils/test_compat.py`` reproduces each bug next to its workaround, which can be removed once upstream is fixed.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
import sysconfig
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError, did_you_mean

ARCHITECTURES = "robustbench.model_zoo.architectures"

LIGHT = ("wide_resnet", "resnet")
"""Architecture modules that depend on torch only."""

DATASETS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""RobustBench's datasets and their numbers of classes."""


def robustbench() -> ModuleType:
    """Import robustbench and return it, with the modules loaded by `architectures` set as attributes of their package.

    Raises:
        DeatError: robustbench or one of its dependencies is missing, or its files were overwritten.
    """
    check_installation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module("robustbench")
    except ImportError as error:
        if error.name == "autoattack" and error.path:
            raise DeatError(
                f"{error.path} shadows the package autoattack, which robustbench imports: rename it"
            ) from error
        raise DeatError(f"robustbench cannot be imported ({error}): pip install robustbench pyautoattack "
                        "'setuptools<82' (robustbench needs its pkg_resources)") from error  # fmt: skip
    for name in LIGHT:
        setattr(sys.modules[ARCHITECTURES], name, importlib.import_module(f"{ARCHITECTURES}.{name}"))
    return package


def check_installation() -> None:
    """Check that robustbench's files are those of its release.

    The wheel of torchattacks 3.5.1 contains a copy of ``robustbench`` from 2022, and whichever is installed last
    overwrites the other. Files edited by the user and source checkouts are accepted.

    Raises:
        DeatError: robustbench is not installed, or its files were overwritten or removed.
    """
    folder = _package_folder().parent.resolve()
    own, foreign = (_distribution_in(folder, name) for name in ("robustbench", "torchattacks"))
    unwanted = _recorded_hashes(foreign)
    if own is None:
        if _hash_of(folder / "robustbench" / "eval.py") == unwanted.get("robustbench/eval.py", ""):
            raise DeatError(f"{folder / 'robustbench'} is a copy from 2022 that torchattacks contains; "
                            "RobustBench itself is not installed: pip install robustbench")  # fmt: skip
        return
    changed = [
        name
        for name, expected in _recorded_hashes(own).items()
        if (found := _hash_of(folder / name)) != expected and found in (None, unwanted.get(name))
    ]
    if changed:
        raise DeatError(f"robustbench {own.version} is damaged: {len(changed)} of its files, such as {changed[0]}, "
                        "were removed or overwritten by a copy from 2022 that torchattacks contains; "
                        f"repair it with {_reinstall_command(own, folder)}")  # fmt: skip


def _package_folder() -> Path:
    """Return the folder of the package robustbench, without importing it.

    Raises:
        DeatError: It is not installed, or shadowed by a module of that name.
    """
    spec = importlib.util.find_spec("robustbench")
    if spec is None or spec.origin is None:
        raise DeatError("robustbench is not installed: pip install robustbench")
    if not spec.submodule_search_locations:
        raise DeatError(f"{spec.origin} shadows the package robustbench: rename it")
    return Path(next(iter(spec.submodule_search_locations)))


def _distribution_in(folder: Path, name: str) -> metadata.Distribution | None:
    """Return the distribution called ``name`` in a folder of ``sys.path``, None if there is none."""
    return next(iter(metadata.distributions(name=name, path=[str(folder)])), None)


def _recorded_hashes(distribution: metadata.Distribution | None) -> dict[str, str]:
    """Return the SHA-256 hashes of robustbench's Python files as listed in a distribution's RECORD.

    `Distribution.files` leaves out files that are missing, since Python 3.12.
    """
    record = distribution.read_text("RECORD") if distribution else None
    rows = csv.reader((record or "").splitlines())
    return {
        row[0]: row[1].removeprefix("sha256=")
        for row in rows
        if len(row) > 1
        and row[0].startswith("robustbench/")
        and row[0].endswith(".py")
        and row[1].startswith("sha256=")
    }


def _hash_of(file: Path) -> str | None:
    """Return a file's SHA-256 in the encoding of RECORD, None if there is no such file."""
    if not file.is_file():
        return None
    return urlsafe_b64encode(sha256(file.read_bytes()).digest()).rstrip(b"=").decode()


def _reinstall_command(distribution: metadata.Distribution, folder: Path) -> str:
    """Return the command that reinstalls a distribution into its folder with the installer used before."""
    elsewhere = folder not in {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    by_uv = (distribution.read_text("INSTALLER") or "").strip() == "uv"
    pip = f"{sys.executable} -m pip install --force-reinstall"
    command = f"uv pip install --python {sys.executable} --reinstall" if by_uv else pip
    upgrade = "--upgrade " if elsewhere and not by_uv else ""  # without it, pip does not replace an existing folder
    target = f"--target {folder} " if elsewhere else ""
    return f"{command} --no-deps {upgrade}{target}robustbench=={distribution.version}"


def architectures() -> tuple[ModuleType, ModuleType]:
    """Load robustbench's modules ``wide_resnet`` and ``resnet`` without the rest of its model zoo.

    They depend on torch only, while their package imports timm, torchvision and pandas and takes two to three seconds.
    They are registered in ``sys.modules`` under their usual names, so that a later import of robustbench uses the same
    classes, and models can be unpickled in any process that has imported this package.

    Raises:
        DeatError: robustbench is damaged or not installed.
    """
    folder = _package_folder() / "model_zoo" / "architectures"
    wide_resnet, resnet = (_load_alone(f"{ARCHITECTURES}.{name}", folder / f"{name}.py") for name in LIGHT)
    return wide_resnet, resnet


def _load_alone(name: str, file: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            check_installation()
            raise DeatError(f"robustbench has no module {name}: install robustbench 1.1.1 or newer")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class AutoAttack:
    """pyautoattack's AutoAttack with the interface of the original package (Croce and Hein 2020).

    With fewer than ten classes K, targeted attacks use K - 1 target classes.

    Attributes:
        suite: The underlying `pyautoattack.AutoAttack`.
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
            raise DeatError(
                "pyautoattack does not support is_tf_model and log_path, and logs to 'auto-attack': omit them"
            )
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
        """Attack images (N, C, H, W) with labels (N,) in batches of ``bs``.

        Returns:
            The adversarial images; with ``return_labels`` also the model's predictions for them, (N,).

        Raises:
            DeatError: There are fewer than 4 classes, or ``state_path`` is given.
        """
        if state_path is not None:
            raise DeatError("AutoAttack cannot resume from a state file, and robustbench crashes at the end of an "
                            "evaluation with one: omit aa_state_path")  # fmt: skip
        with torch.no_grad():
            classes = self.suite.get_logits(x_orig[:1].to(self.suite.device)).shape[-1]
        if classes < 4:
            raise DeatError(f"AutoAttack's targeted losses need 4 or more classes, not {classes}: use "
                            "deat_rb.evaluate, which runs only the attacks that apply")  # fmt: skip
        for targeted in (self.suite.apgd_targeted, self.suite.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        x_adv, y_adv = self.suite.run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=None)
        return (x_adv, y_adv) if return_labels else x_adv


def check_dataset(dataset: str) -> None:
    """Check that a dataset is one of RobustBench's, whose list cannot be extended.

    Raises:
        DeatError: RobustBench has no such dataset.
    """
    if dataset not in DATASETS:
        raise DeatError(f"RobustBench has no dataset '{dataset}': {did_you_mean(dataset, DATASETS)}")
