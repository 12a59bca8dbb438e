"""Plans of a study's runs, with the data that several runs have in common loaded once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deat_rb.attacks.names import PREFIX, parse_torchattack
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.extra_data import load_extra_data
from deat_rb.reproduction.folder import StudyFolder
from deat_rb.reproduction.study import RunSpec
from deat_rb.runs.config import RunConfig
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import DataConfig, TrainOptions
from deat_rb.runs.plan import TrainingPlan, plan
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError


class Planner:
    """Plans runs one after the other; the dataset of the most recent one is kept in memory.

    Args:
        dry: Whether the plans are only displayed, see `plan`.
    """

    def __init__(self, *, dry: bool = False) -> None:
        self._dry = dry
        self._loaded: tuple[tuple[object, ...], Dataset] | None = None

    def plan(self, options: TrainOptions) -> TrainingPlan:
        """Return the plan of a run.

        Raises:
            DeatError: An option or the data are invalid, or options conflict.
        """
        data = resolve(options).data
        key = (data.dataset, data.data_dir, data.image_size, data.memory_limit)
        if self._loaded is not None and self._loaded[0] != key:
            self._loaded = None  # so that two datasets are never in memory
        planned = plan(options, dry=self._dry, data=None if self._loaded is None else self._loaded[1])
        self._loaded = (key, planned.data)
        return planned


def check_evaluation(run: RunSpec, planned: TrainingPlan) -> None:
    """Check that a run's evaluation is in the run's norm, and that the dataset has as many test images as it needs.

    Raises:
        DeatError: An attack is in another norm, or there are fewer images.
    """
    check_attacks(run.evaluation.attacks, planned.config.attack.norm)
    asked = {"n_examples": run.evaluation.n_examples, "autoattack": run.evaluation.autoattack}
    for name, count in asked.items():
        if count is not None and count > len(planned.data.test):
            raise DeatError(f"{name} = {count} is more than the {len(planned.data.test)} test images of "
                            f"{planned.data.name}: give at most that many")  # fmt: skip


def check_attacks(attacks: Iterable[str], norm: str) -> None:
    """Check that attacks are in a norm.

    Raises:
        DeatError: One is in another norm.
    """
    for attack in attacks:
        if attack.startswith(PREFIX):
            parse_torchattack(attack).check_norm(norm)


def begun_runs(folder: StudyFolder, runs: Iterable[RunSpec]) -> list[tuple[RunSpec, RunConfig]]:
    """Return the runs that were begun in a folder, with their configurations."""
    return [(run, RunDirectory.open(folder.run_path(run)).config) for run in runs if folder.run_path(run).is_dir()]


def check_not_extended(folder: StudyFolder, run: RunSpec) -> None:
    """Check that a run, if it was begun, has the epochs that the study describes.

    Raises:
        DeatError: It was extended, so that its weights are not those of the study, or no longer those evaluated.
    """
    path = folder.run_path(run)
    if path.is_dir() and (there := RunDirectory.open(path)).is_extended:
        raise DeatError(
            f"{path} was extended to {there.config.optim.epochs} epochs by --resume, which the study does not "
            f"describe: move it elsewhere and remove its record in {folder.path / 'state'}, so that it is trained "
            "again, or choose another --output"
        )


def check_one_dataset(folder: StudyFolder, runs: Iterable[tuple[RunSpec, RunConfig]]) -> None:
    """Check that runs for which the study names the same data and initial weights had the same ones.

    They may be averaged then.

    Raises:
        DeatError: The images or weights were changed between two runs.
    """
    seen: dict[tuple[object, ...], tuple[RunSpec, str | None]] = {}
    for run, config in runs:
        data, model = run.options.data, run.options.model
        sources = [("images", data.data_dir or data.dataset, config.data_fingerprint),
                   ("images", data.extra_data, config.extra_fingerprint)]  # fmt: skip
        if config.init_sha256 is not None:  # unknown of runs of earlier versions
            named = (model.init_from or model.weights or model.arch, model.weights_key)
            sources.append(("initial weights", " ".join(filter(None, named)), config.init_sha256))
        for what, source, fingerprint in sources:
            key = (what, data.dataset, source, config.network.image_size)
            other, known = seen.setdefault(key, (run, fingerprint))
            if known != fingerprint:
                raise DeatError(
                    f"{folder.run_path(other)} and {folder.run_path(run)} have different {what} of {source}, which "
                    "were changed in between: restore them and remove the run with others, and its record in "
                    f"{folder.path / 'state'}, or choose another --output"
                )


def check_one_precision(folder: StudyFolder, runs: Iterable[tuple[RunSpec, RunConfig]]) -> None:
    """Check that runs that differ only in the seed have one precision, which ``auto`` leaves to each machine.

    Raises:
        DeatError: Two runs differ in precision.
    """
    seen: dict[str, tuple[RunSpec, str]] = {}
    for run, config in runs:
        other, known = seen.setdefault(run.setting, (run, config.runtime.precision))
        if known != config.runtime.precision:
            raise DeatError(
                f"{folder.run_path(other)} and {folder.run_path(run)} differ only in the seed, but one is in {known} "
                f"and one in {config.runtime.precision}, as their machines chose: train both on machines of one kind "
                f"(remove a finished run with its record in {folder.path / 'state'}), or give the study a precision"
            )


def check_same_data(folder: StudyFolder, runs: Iterable[RunSpec]) -> None:
    """Check that the runs in a folder were trained on the data that the study names.

    The name of a run identifies its data only by their last path component. Data are read only if their path is not
    the recorded one, and exists: tables can be written where the data are not.

    Raises:
        DeatError: A run was trained on other data, or the data cannot be loaded.
    """
    known: dict[tuple[object, ...], str] = {}
    for run in runs:
        given, path = _paths(run.options.data), folder.run_path(run)
        if not given or not path.is_dir():
            continue
        config = RunDirectory.open(path).config
        recorded = _paths(config.data)
        fingerprints = {"data_dir": config.data_fingerprint, "extra_data": config.extra_fingerprint}
        for name in given.keys() & recorded.keys():
            if given[name] == recorded[name] or not Path(given[name]).exists():
                continue
            key = (name, given[name], config.network.channels, config.network.image_size)
            if key not in known:
                known[key] = _fingerprint(config, name, given[name])
            if known[key] != fingerprints[name]:
                raise DeatError(
                    f"{path} was trained with --{name.replace('_', '-')} {recorded[name]}, whose images are not those "
                    f"of {given[name]}; choose another --output"
                )


def _paths(data: DataConfig) -> dict[str, str]:
    """Return the absolute paths of images that only the user has, by option."""
    paths = {"data_dir": data.data_dir if data.dataset == "folder" else None, "extra_data": data.extra_data}
    return {name: str(Path(path).expanduser().resolve()) for name, path in paths.items() if path is not None}


def _fingerprint(config: RunConfig, name: str, path: str) -> str:
    data, network = config.data, config.network
    if name == "data_dir":
        return load_data(data.dataset, data_dir=path, image_size=data.image_size, memory_limit=data.memory_limit,
                         test_only=True).fingerprint  # fmt: skip
    shape = (network.channels, network.image_size, network.image_size)
    return load_extra_data(path, shape=shape, num_classes=network.num_classes).fingerprint
