"""Submissions: a run directory, an export, or a checkpoint, read as untrusted input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deat_rb.attacks.threat_models import THREATS, check_norm
from deat_rb.data.datasets import DATASETS, Dataset
from deat_rb.data.normalization import Normalization
from deat_rb.evaluation.report import Report
from deat_rb.leaderboard.datasets import load_board_dataset
from deat_rb.leaderboard.entry import (
    Entry,
    RobustBenchInfo,
    check_dataset_name,
    check_model_name,
)
from deat_rb.leaderboard.training_record import metrics_rows, training_facts
from deat_rb.leaderboard.untrusted import MAX_JSON, parse_json_object, read_limited, symlink_in_path
from deat_rb.leaderboard.untrusted_weights import copy_untrusted_weights, load_checked
from deat_rb.methods.paper import publication
from deat_rb.models.class_names import MatchedClasses, match_classes
from deat_rb.models.names import PRETRAINED
from deat_rb.models.spec import ModelSpec, NormalizedModel, check_image_size
from deat_rb.models.weights import strip_wrappers
from deat_rb.robustbench.format import (
    UNKNOWN_DATA,
    ExportPaths,
    exported_spec,
    known_architecture,
    spelled_architecture,
    split_footnote,
)
from deat_rb.runs.directory import CONFIG, METRICS, RunDirectory
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.text import printable
from deat_rb.utils.units import parse_fraction

EVALUATION = "eval.json"

VERDICTS = "eval-verdicts.safetensors"

MAX_VERDICTS = 64 * 2**20
"""Largest file of verdicts in bytes; each verdict takes one byte."""

MAX_WRN = 2 * 94 * 16**2
"""Limit on a WRN's depth times squared width, proportional to its size; RobustBench's largest is a WRN-94-16."""


MAX_IMAGE_SIZE = 1024
"""Largest height and width of a submitted run's images, to which the board's own are resized."""


@dataclass(frozen=True)
class SubmissionMetadata:
    """Metadata declared by the submitter; values that are None are taken from the submitted files.

    Attributes:
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``.
        dataset: `load_data` name of the dataset to evaluate a checkpoint on; runs specify their own.
        data_dir: Folder of the dataset.
        image_size: Height and width of a checkpoint's input, for an image folder.
        arch: Architecture of a checkpoint, if its ``model_info`` names no known one.
        eps: Perturbation radius for a checkpoint without a ``model_info``, in [0, 1] pixel units, such as ``8/255``.
        norm: Norm of the attacks on a checkpoint; by default that of its folder in an export, else ``Linf``.
        memory_limit: Bytes that the decoded test images may take, as for `load_data`.
        classes: Class names in the order of a checkpoint's logits, for an image folder.
        normalization: Mean and standard deviation for a checkpoint that does not contain them.
        weights_key: Key of the state dict in a checkpoint with several.
        dataset_name: The board's name for an image folder.
        dataset_note: A description of that dataset.
        info: Path of the ``model_info`` file of a checkpoint outside an export.
        link: Link to the paper.
        name: Title of the paper.
        authors: Authors of the paper.
        venue: Venue of the paper.
        additional_data: Whether other training images were used.
        external: Best known robust accuracy, in percent.
        unreliable: Whether AutoAttack's accuracy may be unreliable.
        footnote: A footnote for the table.
        hardware: Training hardware.
    """

    model_name: str
    dataset: str | None = None
    data_dir: Path | None = None
    image_size: int | None = None
    arch: str | None = None
    eps: str | float | None = None
    norm: str | None = None
    memory_limit: int | None = None
    classes: tuple[str, ...] | None = None
    normalization: Normalization | None = None
    weights_key: str | None = None
    dataset_name: str | None = None
    dataset_note: str | None = None
    info: Path | None = None
    link: str | None = None
    name: str | None = None
    authors: str | None = None
    venue: str | None = None
    additional_data: bool | None = None
    external: float | None = None
    unreliable: bool | None = None
    footnote: str | None = None
    hardware: str | None = None

    def check(self) -> None:
        """Validate the metadata before anything is loaded.

        Raises:
            DeatError: A value is invalid.
        """
        check_model_name(self.model_name)
        if self.dataset_name is not None:
            check_dataset_name(self.dataset_name)
        if self.norm is not None:
            check_norm(self.norm)
        # In L2, where any radius is allowed: the norm is that of the submitted files, in which the entry checks it.
        fields = {"model_name": self.model_name, "kind": "published", "dataset": "digits", "eps": self.eps or "0.1",
                  "threat_model": "L2"}  # fmt: skip
        Entry.create({**fields, **self.declared_fields()}, "the declared metadata")

    def declared_fields(self) -> dict[str, Any]:
        """Return the entry's fields that only the submitter knows, such as authors and link."""
        names = ("link", "name", "authors", "venue", "additional_data", "unreliable", "footnote", "hardware",
                 "dataset_note")  # fmt: skip
        fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return fields if self.external is None else {**fields, "external": f"{self.external:.2f}"}


@dataclass(frozen=True, eq=False)
class Submission:
    """A submitted network that fits its dataset, and the claims about it.

    Attributes:
        source: The submitted path.
        model: The network, in eval mode and on the CPU.
        spec: Architecture of the network.
        data: Dataset of the evaluation.
        dataset_name: The board's name for the dataset.
        eps: Radius of the attacks, in [0, 1] pixel units.
        facts: Fields of the entry.
        claim: Evaluation submitted with a run.
        weights_sha256: SHA-256 of the submitted weights file.
        claimed: Accuracy in percent by attack, from a ``model_info``.
        classes: Class names in the order of the logits.
        logit_of_class: See `deat_rb.models.class_names.match_classes`.
        norm: Norm of the attacks, ``Linf`` or ``L2``: a run's own, or that of an export's folder.
    """

    source: Path
    model: NormalizedModel
    spec: ModelSpec
    data: Dataset
    dataset_name: str
    eps: float
    facts: dict[str, Any]
    claim: Report | None
    weights_sha256: str
    claimed: dict[str, float] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    logit_of_class: tuple[int, ...] = ()
    norm: str = "Linf"


def open_submission(target: Path, metadata: SubmissionMetadata, scratch: Path) -> Submission:
    """Open a submission. Every file is copied to ``scratch`` first, and only the copies are parsed.

    Raises:
        DeatError: A file is missing or invalid, or contradicts another.
    """
    if not (target.exists() or target.is_symlink()):
        raise DeatError(f"{target} does not exist: submit a run directory, an export or a checkpoint")
    if _exists(target / CONFIG):
        return _open_run(target, metadata, scratch)
    if target.name in ("best.safetensors", "last.safetensors") and _exists(target.parent / CONFIG):
        raise DeatError(f"{target} is a file of the run {target.parent}: submit that folder, which records how the "
                        "network was trained")  # fmt: skip
    weights = target if not target.is_dir() else _weights_in_export(target, metadata.model_name)
    return _open_checkpoint(weights, metadata, scratch)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


@contextmanager
def _named_as_submitted(originals: Mapping[Path, Path]) -> Iterator[None]:
    """Make error messages name the submitted files instead of their copies."""
    try:
        yield
    except DeatError as error:
        message = str(error)
        for copy, original in originals.items():
            message = message.replace(str(copy), str(original))
        named = any(str(original) in message for original in originals.values())
        raise DeatError(message if named else f"{next(iter(originals.values()))}: {message}") from error


def _weights_in_export(folder: Path, model_name: str) -> Path:
    files = sorted(file for norm in THREATS for file in folder.glob(f"models/*/{norm}/*.pt"))
    named = [path for path in files if path.stem == model_name] or files
    if len(named) != 1:
        raise DeatError(f"{folder} is neither a run directory nor an export of one model ({len(named)} models found): "
                        "give a run, or the file models/<dataset>/<norm>/<name>.pt")  # fmt: skip
    for path in (named[0], _info_beside(named[0])):
        link = symlink_in_path(folder, path.absolute().relative_to(folder.absolute()))
        if link is not None:
            raise DeatError(f"{link} is a symlink; submit the files themselves")
    return named[0]


def _open_run(target: Path, metadata: SubmissionMetadata, scratch: Path) -> Submission:
    for name in ("info", "dataset", "arch", "image_size", "eps", "norm", "classes", "normalization", "weights_key"):
        if getattr(metadata, name) is not None:
            flag = "--mean, --std or --normalize" if name == "normalization" else f"--{name.replace('_', '-')}"
            raise DeatError(f"{flag} is only for checkpoints: omit it, since the run {target} specifies it")
    copied = scratch / "run"
    copied.mkdir()
    for name in (CONFIG, METRICS, EVALUATION):
        if name == CONFIG or _exists(target / name):
            content = read_limited(target / name, MAX_JSON)
            (copied / name).write_bytes(content)
            if name != METRICS:
                parse_json_object(content, str(target / name))
    with _named_as_submitted({copied: target}):
        run = RunDirectory.open(copied)
        config, spec = run.config, run.model_spec
        dataset_name = _dataset_name(metadata, config.data.dataset)
        _check_arch(spec.arch, target)
        weights = f"{config.optim.select}.safetensors"
        digest = copy_untrusted_weights(target / weights, copied / weights)
        model = load_checked(copied / weights, spec, source=target / weights)
        if (size := config.data.image_size) != spec.image_size or size > MAX_IMAGE_SIZE:
            raise DeatError(f"{target} has images of {size}x{size} and a network for {spec.image_size}x"
                            f"{spec.image_size}: they must be equal and at most {MAX_IMAGE_SIZE}")  # fmt: skip
        limit = config.data.memory_limit if metadata.memory_limit is None else metadata.memory_limit
        data = load_board_dataset(config.data.dataset, data_dir=metadata.data_dir, image_size=config.data.image_size,
                                  memory_limit=limit)  # fmt: skip
        if data.fingerprint != config.data_fingerprint:
            raise DeatError(f"the data here (SHA-256 {data.fingerprint[:12]}...) differ from those that {target} "
                            f"was trained on ({config.data_fingerprint[:12]}...): give their folder with "
                            "--data-dir")  # fmt: skip
        _check_fits(spec, data, target, num_classes=len(data.classes))
        rows = metrics_rows(copied / METRICS, target / METRICS)
        declared = metadata.declared_fields()
        facts = {**training_facts(config, rows), "architecture": _architecture(spec), **declared,
                 **publication(config.attack.method, declared)}  # fmt: skip
        claim = _claim(target, copied) if (copied / EVALUATION).exists() else None
    return Submission(target, model, spec, data, dataset_name, config.attack.eps, facts, claim, digest,
                      classes=data.classes, norm=config.attack.norm)  # fmt: skip


def _claim(target: Path, copied: Path) -> Report:
    """Load a run's evaluation, with the results on each example if they are stored."""
    if _exists(target / VERDICTS):
        (copied / VERDICTS).write_bytes(read_limited(target / VERDICTS, MAX_VERDICTS))
        for attack, verdicts in load_tensors(copied / VERDICTS).items():
            if verdicts.dtype != torch.bool or verdicts.ndim != 1:
                raise DeatError(
                    f"{target / VERDICTS} must have one boolean per example for {attack}: run deat-rb eval again"
                )
    return Report.load(copied)


def _open_checkpoint(weights: Path, metadata: SubmissionMetadata, scratch: Path) -> Submission:
    info, source = _checkpoint_info(weights, metadata)
    loader = metadata.dataset or info.dataset
    if loader not in DATASETS:
        raise DeatError(f"{source} names the dataset {info.dataset}, which deat-rb cannot load: give the data to "
                        "evaluate on with --dataset and --data-dir")  # fmt: skip
    dataset_name = _dataset_name(metadata, loader)
    arch = metadata.arch or known_architecture(info.architecture or "")
    if arch is None:
        raise DeatError(f"{source} names the unknown architecture '{printable(str(info.architecture), 80)}': give "
                        "--arch, such as preactresnet18 or wrn-34-10")  # fmt: skip
    _check_arch(arch, weights)
    if loader != "folder" and metadata.classes is not None:
        raise DeatError(f"--classes is only for image folders: the logits of a network for {loader} must be in the "
                        "dataset's order of classes, as on RobustBench; reorder the last layer")  # fmt: skip
    check_image_size(arch, metadata.image_size, source=str(weights), required=loader == "folder")
    copied = scratch / "weights.safetensors"
    with _named_as_submitted({copied: weights}):
        digest = copy_untrusted_weights(weights, copied, weights_key=metadata.weights_key)
        data = load_board_dataset(loader, data_dir=metadata.data_dir, image_size=metadata.image_size,
                                  memory_limit=metadata.memory_limit)  # fmt: skip
        num_classes = None if metadata.arch is None else len(metadata.classes or data.classes)
        spec = exported_spec(copied, arch=arch, num_classes=num_classes, image_size=data.test.shape[-1])
        if metadata.normalization is not None:
            if "mu" in strip_wrappers(load_tensors(copied)):
                raise DeatError(f"{weights} already contains a mean and standard deviation: omit --mean, --std and "
                                "--normalize")  # fmt: skip
            mean, std = metadata.normalization
            spec = spec.model_copy(update={"mean": mean, "std": std})
        model = load_checked(copied, spec, source=weights)
        matched = MatchedClasses(data.classes)
        if metadata.classes is not None:
            matched = match_classes(data.classes, metadata.classes, spec.num_classes, source=str(weights),
                                    dataset=data.name)  # fmt: skip
        _check_fits(spec, data, source, num_classes=len(matched.classes))
    claimed = {"natural": info.clean_acc, "autoattack": info.autoattack_acc}
    unknown = {"dataset", "eps", "clean_acc", "autoattack_acc"}  # until the board has measured them
    if info.unreliable and float(info.autoattack_acc or 0) == 0:  # not run, as deat-rb export writes it
        claimed["autoattack"] = None
        unknown.add("unreliable")
    if UNKNOWN_DATA in (info.footnote or ""):
        unknown.add("additional_data")
    # What an export says of its own evaluation does not hold for the board's.
    method, footnote = split_footnote(info.footnote or "")
    facts = {"architecture": _architecture(spec), **info.model_dump(exclude=unknown, exclude_none=True),
             "method": method, "footnote": footnote or None, **metadata.declared_fields()}  # fmt: skip
    return Submission(
        weights, model, spec, data, dataset_name, parse_fraction(info.eps), facts, None, digest,
        {attack: float(text) for attack, text in claimed.items() if text is not None}, matched.classes,
        matched.logit_of_class, _norm_of(weights, source, metadata.norm),
    )  # fmt: skip


def _checkpoint_info(weights: Path, metadata: SubmissionMetadata) -> tuple[RobustBenchInfo, Path]:
    """Read a checkpoint's ``model_info``, or create one from the metadata; return it with its origin."""
    source = metadata.info or _info_beside(weights)
    if _exists(source):
        if metadata.eps is not None:
            raise DeatError(f"--eps is only for checkpoints without a model_info: omit it, since {source} has one")
        return RobustBenchInfo.parse(read_limited(source, MAX_JSON), str(source)), source
    needed = {"--arch": metadata.arch, "--dataset": metadata.dataset, "--eps": metadata.eps}
    missing = [flag for flag, value in needed.items() if value is None]
    if missing or metadata.info is not None:
        raise DeatError(f"{weights} is a checkpoint without a model_info ({source} does not exist): give "
                        f"{', '.join(missing or needed)}, such as --arch preactresnet18 --dataset cifar10 --eps 8/255, "
                        "or a model_info with --info FILE.json")  # fmt: skip
    content = {"dataset": metadata.dataset, "eps": metadata.eps, "number_forward_passes": 1}
    return RobustBenchInfo.parse(json.dumps(content).encode(), str(weights)), weights


def _norm_of(weights: Path, info: Path, given: str | None) -> str:
    """Return the norm given, or that which the folder of the weights or of the ``model_info`` is named after, or Linf.

    Raises:
        DeatError: The two folders are named after different norms, or after another one than the norm given.
    """
    norms = {path: path.absolute().parent.name for path in (info, weights)}
    named = {path: norm for path, norm in norms.items() if norm in THREATS}
    if len(set(named.values())) > 1:
        raise DeatError(f"{info} is in the folder {norms[info]}, but {weights} in {norms[weights]}: give the "
                        "model_info of these weights with --info")  # fmt: skip
    norm = None if given is None else check_norm(given)
    for path, folder in named.items():
        if norm not in (None, folder):
            raise DeatError(f"--norm {norm} contradicts {path}, which is in an export's folder {folder}: omit --norm, "
                            "or copy the file elsewhere")  # fmt: skip
    return norm or next(iter(named.values()), "Linf")


def _info_beside(weights: Path) -> Path:
    """Return the path of an exported checkpoint's ``model_info``, or else of the ``.json`` next to the weights."""
    in_export = ExportPaths.beside(weights).info
    return in_export if in_export.exists() else weights.with_suffix(".json")


def _check_arch(arch: str, source: Path) -> None:
    """Refuse an architecture that is built by submitted code, or much larger than any known one."""
    kind, colon, _ = arch.partition(":")
    if colon and kind not in PRETRAINED:
        raise DeatError(f"{source} builds its network with '{printable(arch, 80)}', but submitted code is never run: "
                        "submit an architecture from RobustBench, torchvision or timm")  # fmt: skip
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", arch.lower())
    if wide is not None and int(wide[1]) * int(wide[2]) ** 2 > MAX_WRN:
        raise DeatError(
            f"{source} has the architecture {arch}, which is too large: at most twice the size of WRN-94-16 is allowed"
        )


def _check_fits(spec: ModelSpec, data: Dataset, source: Path, *, num_classes: int) -> None:
    takes, has = (spec.channels, spec.image_size, spec.image_size), tuple(data.test.shape)
    if takes != has or spec.num_classes != num_classes:
        raise DeatError(f"{source} is a network with {spec.num_classes} classes for images of shape {takes}, but "
                        f"{data.name} has {len(data.classes)} classes and images of shape {has}")  # fmt: skip


def _dataset_name(metadata: SubmissionMetadata, loader: str) -> str:
    """Return the board's name for the dataset; image folders cannot take the name of a known dataset."""
    if loader != "folder":
        if metadata.dataset_name not in (None, loader) or metadata.dataset_note is not None:
            raise DeatError(f"--dataset-name and --dataset-note are only for image folders: {loader} has its own name")
        return loader
    name = metadata.dataset_name or re.sub(r"[^a-z0-9]+", "-", Path(metadata.data_dir or "").name.lower()).strip("-")
    taken = {*DATASETS, *compat.DATASETS}
    if name.replace("-", "") in ("", *taken):
        raise DeatError(f"--dataset-name is missing: give the board's name for this image folder, such as flowers "
                        f"({', '.join(sorted(taken))} are taken)")  # fmt: skip
    return check_dataset_name(name)


def _architecture(spec: ModelSpec) -> str:
    return spec.arch if ":" in spec.arch else spelled_architecture(spec)
