"""What is handed in to a leaderboard: a run directory, an export, or a checkpoint with RobustBench's ``model_info``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deat_rb.data.datasets import DATASETS, Dataset, load_data
from deat_rb.data.images import interleave_classes
from deat_rb.evaluation.report import Report
from deat_rb.leaderboard.datasets import load_board_dataset, loader_of
from deat_rb.leaderboard.entry import (
    MAX_EPOCHS,
    MAX_IMAGE,
    Entry,
    RobustBenchInfo,
    check_dataset_name,
    check_model_name,
)
from deat_rb.leaderboard.untrusted import MAX_JSON, parse_json, read_limited, symlink_in_path
from deat_rb.leaderboard.untrusted_weights import copy_untrusted_weights, load_checked
from deat_rb.methods.paper import PAPER, PAPERS_OWN
from deat_rb.methods.registry import recipe
from deat_rb.models.names import check_trust
from deat_rb.models.spec import ModelSpec, NormalizedModel
from deat_rb.robustbench.format import ExportPaths, exported_spec, spelled_architecture
from deat_rb.runs.config import RunConfig
from deat_rb.runs.defaults import DEFAULT_TEXTS
from deat_rb.runs.directory import CONFIG, METRICS, RunDirectory
from deat_rb.runs.options import TrainOptions, train_options
from deat_rb.training.metrics import EpochStats
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import sha256_file
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import format_fraction, parse_fraction

EVALUATION = "eval.json"

VERDICTS = "eval-verdicts.safetensors"

MAX_VERDICTS = 64 * 2**20
"""Bytes; a verdict takes one."""

_TOLD = ("steps", "backwards", "seconds", "peak_memory")
"""Fields of a row of metrics that an entry sums up."""


@dataclass(frozen=True)
class SubmissionMetadata:
    """What a submitter says about a model; None is what the submission itself says.

    Attributes:
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``.
        dataset: The loader of the data that a checkpoint is evaluated on; a run knows its own.
        data_dir: Where the data are.
        image_size: Height and width that a checkpoint takes, of images of a folder.
        arch: Which network a checkpoint is of, where its ``model_info`` names none that is known.
        dataset_name: What the board calls the images of a folder.
        dataset_note: What a reader should know of them.
        info: The ``model_info`` file of a checkpoint that does not lie in an export.
        link: Of the paper.
        name: The paper's title.
        authors: The paper's.
        venue: The paper's.
        additional_data: Whether other training images were used, too.
        external: Best known robust accuracy, in percent.
        unreliable: Whether AutoAttack's figure is not to be relied on.
        footnote: For the table's reader.
        hardware: Where the model was trained.
    """

    model_name: str
    dataset: str | None = None
    data_dir: Path | None = None
    image_size: int | None = None
    arch: str | None = None
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
        """Looks at all that is said, before anything is loaded.

        Raises:
            DeatError: Something cannot stand on a board.
        """
        check_model_name(self.model_name)
        if self.dataset_name is not None:
            check_dataset_name(self.dataset_name)
        fields = {"model_name": self.model_name, "kind": "published", "dataset": "digits", "eps": "0.1"}
        Entry.checked({**fields, **self.declared_fields()}, "what is said of the model")

    def declared_fields(self) -> dict[str, Any]:
        """The fields of an entry that the submitter gives, without those that are left open."""
        names = ("link", "name", "authors", "venue", "additional_data", "unreliable", "footnote", "hardware",
                 "dataset_note")  # fmt: skip
        words = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return words if self.external is None else {**words, "external": f"{self.external:.2f}"}


@dataclass(frozen=True, eq=False)
class Submission:
    """A network that fits its data, and what is claimed about it.

    Attributes:
        source: What was handed in.
        model: In eval mode, on the CPU.
        spec: How it is built.
        data: What it is evaluated on.
        dataset_name: What the board calls that.
        eps: The radius, in [0, 1] pixel units.
        facts: Fields of an entry.
        claim: The evaluation that came with it.
        stated: By attack, what a ``model_info`` says, in percent.
        weights_sha256: Of the weights' file as handed in.
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
    stated: dict[str, float] = field(default_factory=dict)

    def examples(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The first test images, (N, C, H, W), and labels (N,), in the order of `EvalTarget.examples`."""
        test = interleave_classes(self.data.test)
        count = len(test) if count is None else count
        if not 1 <= count <= len(test):
            raise DeatError(f"{count} examples cannot be had of {len(test)} test images")
        return test.first(count).tensors()


def open_submission(target: Path, metadata: SubmissionMetadata, scratch: Path) -> Submission:
    """Opens what was handed in. Every file is copied to ``scratch`` first, and only the copies are read.

    Raises:
        DeatError: Something in it cannot be used, or is not what it says.
    """
    if not (target.exists() or target.is_symlink()):
        raise DeatError(f"{target} does not exist: hand in a run directory, an export or a checkpoint")
    is_run = (target / CONFIG).exists() or (target / CONFIG).is_symlink()
    handed_in = target if is_run or not target.is_dir() else _weights_in_export(target, metadata.model_name)
    return (_open_run if is_run else _open_checkpoint)(handed_in, metadata, scratch)


@contextmanager
def _speaking_of(originals: Mapping[Path, Path]) -> Iterator[None]:
    """Has refusals name what was handed in, and not the copies, of which nobody has heard."""
    try:
        yield
    except DeatError as error:
        message = str(error)
        for copy, original in originals.items():
            message = message.replace(str(copy), str(original))
        named = any(str(original) in message for original in originals.values())
        raise DeatError(message if named else f"{next(iter(originals.values()))}: {message}") from error


def _weights_in_export(folder: Path, model_name: str) -> Path:
    found = sorted(folder.glob("models/*/Linf/*.pt"))
    named = [path for path in found if path.stem == model_name] or found
    if len(named) != 1:
        raise DeatError(f"{folder} is no run directory, and {'more than' if named else 'not'} one export lies in it: "
                        "give a run, or the file models/<dataset>/Linf/<name>.pt")  # fmt: skip
    for path in (named[0], _description_of(named[0])):
        link = symlink_in_path(folder, path.absolute().relative_to(folder.absolute()))
        if link is not None:
            raise DeatError(f"{link} is a link, and leads to files of somebody else's: hand in the files themselves")
    return named[0]


def _open_run(target: Path, metadata: SubmissionMetadata, scratch: Path) -> Submission:
    if any(said is not None for said in (metadata.info, metadata.dataset, metadata.arch, metadata.image_size)):
        raise DeatError("--info, --dataset, --arch and --image-size are for checkpoints: "
                        f"the run {target} says itself what it is")  # fmt: skip
    copied = scratch / "run"
    copied.mkdir()
    with _speaking_of({copied: target}):
        return _opened_run(target, metadata, copied)


def _opened_run(target: Path, metadata: SubmissionMetadata, copied: Path) -> Submission:
    for name in (CONFIG, METRICS, EVALUATION):
        if name == CONFIG or (target / name).exists() or (target / name).is_symlink():
            (copied / name).write_bytes(read_limited(target / name, MAX_JSON))
    for name in (CONFIG, EVALUATION):
        if (copied / name).exists():
            parse_json((copied / name).read_bytes(), str(target / name))
    run = RunDirectory.open(copied)
    config, spec = run.config, run.model_spec
    dataset_name = _dataset_name(metadata, config.data.dataset)
    _check_arch(spec, target)
    handed_in = target / f"{config.optim.select}.safetensors"
    copy_untrusted_weights(handed_in, copied / handed_in.name)
    model = load_checked(copied / handed_in.name, spec, source=handed_in)
    data = load_board_dataset(config.data.dataset, data_dir=metadata.data_dir, image_size=config.data.image_size)
    if data.fingerprint != config.data_fingerprint:
        raise DeatError(f"{target} was trained on other data than {config.data.dataset} is here (SHA-256 "
                        f"{config.data_fingerprint[:12]}..., here {data.fingerprint[:12]}...)")  # fmt: skip
    _check_fits(spec, data, target)
    rows = _rows(copied, target / METRICS)
    facts = {**_trained(config, rows), "architecture": _architecture(spec), **metadata.declared_fields()}
    claim = _claim(target, copied) if (copied / EVALUATION).exists() else None
    return Submission(
        target, model, spec, data, dataset_name, config.attack.eps, facts, claim,
        sha256_file(run.selected_weights_path),
    )  # fmt: skip


def _claim(target: Path, copied: Path) -> Report:
    """The evaluation in a run, with the verdicts on every example if they are there."""
    if (target / VERDICTS).exists() or (target / VERDICTS).is_symlink():
        (copied / VERDICTS).write_bytes(read_limited(target / VERDICTS, MAX_VERDICTS))
        for attack, verdicts in load_tensors(copied / VERDICTS).items():
            if verdicts.dtype != torch.bool or verdicts.ndim != 1:
                raise DeatError(f"{target / VERDICTS} has no verdicts, one of each example, under {attack}")
    return Report.load(copied)


def _open_checkpoint(weights: Path, metadata: SubmissionMetadata, scratch: Path) -> Submission:
    source = metadata.info or _description_of(weights)
    if not (source.exists() or source.is_symlink()):
        raise DeatError(f"{weights} is a checkpoint without a description: give its model_info by --info FILE.json")
    info = RobustBenchInfo.parse(read_limited(source, MAX_JSON), str(source))
    loader = metadata.dataset or info.dataset
    if loader not in DATASETS:
        raise DeatError(f"{source} is of the data set {info.dataset}, which has no loader: say with --dataset and "
                        "--data-dir what to evaluate on")  # fmt: skip
    dataset_name = _dataset_name(metadata, loader)
    paths = ExportPaths.below(scratch / "export", info.dataset, metadata.model_name)
    for path in (paths.weights, paths.info):
        path.parent.mkdir(parents=True)
    paths.info.write_bytes(info.model_dump_json().encode())
    with _speaking_of({paths.weights: weights, paths.info: source}):
        copy_untrusted_weights(weights, paths.weights)
        spec = None if metadata.arch is not None else exported_spec(paths.weights)
    data = load_board_dataset(loader, data_dir=metadata.data_dir, image_size=metadata.image_size)
    with _speaking_of({paths.weights: weights, paths.info: source}):
        spec = spec or _spec_of_arch(paths.weights, str(metadata.arch), data)
        _check_arch(spec, weights)
        model = load_checked(paths.weights, spec, source=weights)
    _check_fits(spec, data, source)
    stated = {"natural": info.clean_acc, "autoattack": info.autoattack_acc}
    own = info.model_dump(exclude={"dataset", "eps", "clean_acc", "autoattack_acc"}, exclude_none=True)
    facts = {"architecture": _architecture(spec), **own, **metadata.declared_fields()}
    return Submission(
        weights, model, spec, data, dataset_name, parse_fraction(info.eps), facts, None,
        sha256_file(paths.weights), {attack: float(text) for attack, text in stated.items() if text is not None},
    )  # fmt: skip


def _description_of(weights: Path) -> Path:
    """In an export, its JSON; of another checkpoint the file of the same name beside it."""
    folder = weights.absolute().parent.parent
    in_export = ExportPaths.below(folder.parent.parent, folder.name, weights.stem).info
    return in_export if in_export.exists() else weights.with_suffix(".json")


def _spec_of_arch(weights: Path, arch: str, data: Dataset) -> ModelSpec:
    check_trust(arch, False, source="--arch")
    height = data.test.shape[-1]
    return exported_spec(weights, arch=arch, num_classes=len(data.classes), image_size=height)


def _check_arch(spec: ModelSpec, source: Path) -> None:
    try:
        check_trust(spec.arch, False, source=str(source))
    except DeatError:
        raise DeatError(
            f"{source} has its network built by '{spec.arch}', which runs that module's code, and a "
            "board runs nobody's: hand in a network of RobustBench's, torchvision's or timm's"
        ) from None
    if spec.image_size > MAX_IMAGE:
        raise DeatError(f"{source} takes images of {spec.image_size} pixels, and a board at most of {MAX_IMAGE}")


def _check_fits(spec: ModelSpec, data: Dataset, source: Path) -> None:
    takes, has = (spec.channels, spec.image_size, spec.image_size), tuple(data.test.shape)
    if takes != has or spec.num_classes != len(data.classes):
        raise DeatError(f"{source} is a network of {spec.num_classes} classes and images of {takes}, and {data.name} "
                        f"has {len(data.classes)} classes and images of {has}")  # fmt: skip


def _dataset_name(metadata: SubmissionMetadata, loader: str) -> str:
    """What the board calls the data; nothing but CIFAR-10 is called so, or nearly so."""
    if loader != "folder" and (metadata.dataset_name not in (None, loader) or metadata.dataset_note is not None):
        raise DeatError(f"--dataset-name and --dataset-note are for the images of a folder: {loader} has its own name")
    if loader != "folder":
        return loader
    name = metadata.dataset_name or re.sub(r"[^a-z0-9]+", "-", Path(metadata.data_dir or "").name.lower()).strip("-")
    taken = {*DATASETS, *compat.DATASETS}
    if name.replace("-", "") in ("", *taken):
        raise DeatError(f"what shall the board call the images of this folder? Give a --dataset-name, such as flowers; "
                        f"{', '.join(sorted(taken))} are taken")  # fmt: skip
    return check_dataset_name(name)


def _rows(copied: Path, source: Path) -> list[dict[str, int | float | None]]:
    """The epochs' figures: numbers and nothing else."""
    path = copied / METRICS
    if not path.exists():
        return []
    known = set(EpochStats.__dataclass_fields__) - {"stopped"}
    lines = path.read_bytes().splitlines()
    if len(lines) > MAX_EPOCHS:
        raise DeatError(f"{source} has {len(lines)} lines, and {MAX_EPOCHS} epochs are allowed")
    rows = []
    for number, line in enumerate(lines, 1):
        content = parse_json(line, f"{source}, line {number},")
        if not isinstance(content, dict):
            raise DeatError(f"{source}, line {number}, is no JSON object")
        row = {name: value for name, value in content.items() if name in known}
        for name, value in row.items():
            known_number = type(value) in (int, float) and abs(value) < 1e15
            if not known_number and (value is not None or name in _TOLD):
                raise DeatError(f"{source}, line {number}, has no number for {name}")
        rows.append(row)
    return rows


def _trained(config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    credit = PAPER if _is_the_papers(config.attack.method) else dict.fromkeys(PAPER)
    totals: dict[str, Any] = {}
    if rows:
        totals = {
            "steps": tuple(row.get("steps", 0) for row in rows),
            "epochs": len(rows),
            "backward_passes": float(sum(row.get("backwards", 0) for row in rows)),
            "train_seconds": float(sum(row.get("seconds", 0) for row in rows)),
            "peak_memory": max(row.get("peak_memory", 0) for row in rows) or None,
        }
    return {
        **credit,
        "additional_data": False,
        "number_forward_passes": 1,
        "method": config.attack.method,
        "setting": config.attack.setting,
        "seed": config.optim.seed,
        "hardware": None if config.runtime.device == "auto" else config.runtime.device,
        "command": training_command(config),
        "versions": dict(config.versions),
        "metrics": tuple(rows),
        **totals,
    }


def _is_the_papers(method: str) -> bool:
    try:
        recipe(method)
    except DeatError:
        return False
    return PAPERS_OWN.match(method) is not None


def training_command(config: RunConfig) -> str:
    """The `deat-rb train` that a configuration comes from; of folders and files only the names, wherever they lay."""
    values, defaults = config.flat(), TrainOptions().flat()
    left_out = {"method", "device", "save_every", "track", "memory_limit"}
    if config.data.dataset != "folder":
        left_out.add("image_size")
    words = ["deat-rb", "train", "--method", config.attack.method]
    for each in train_options():
        value = values[each.name]
        is_default = value == defaults[each.name] and each.name not in ("seed", *DEFAULT_TEXTS)
        if each.name in left_out or value is None or is_default:
            continue
        if each.kind in ("flag", "off"):
            words += [each.flag] if value is (each.kind == "flag") else []
            continue
        shown = format_fraction(value) if each.metavar == "FRACTION" else str(value)
        words += [each.flag, Path(shown).name if each.metavar == "PATH" else shown]
    return shlex.join(words)


def _architecture(spec: ModelSpec) -> str:
    return spec.arch if ":" in spec.arch else spelled_architecture(spec)


def load_board_data(entry: Entry, data_dir: Path | None) -> Dataset:
    """Loads the data set that an entry was measured on.

    Raises:
        DeatError: It is a folder, and nothing says where, or the data cannot be had.
    """
    loader = loader_of(entry)
    if loader == "folder" and data_dir is None:
        raise DeatError(f"where are the images of {entry.dataset}? Give their folder by --data-dir")
    return load_data(loader, data_dir=data_dir, image_size=None if entry.model is None else entry.model.image_size)
