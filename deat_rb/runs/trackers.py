"""Experiment trackers supported by Accelerate, such as Weights & Biases, in addition to ``metrics.jsonl``."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deat_rb.training.callbacks import Callback
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.files import read_json, write_json
from deat_rb.utils.text import printable

if TYPE_CHECKING:
    from deat_rb.runs.directory import RunDirectory
    from deat_rb.training.history import History
    from deat_rb.training.metrics import EpochStats

FILE = "trackers.json"
"""File in the run directory with each tracker's project and run identifier, which it needs to continue the run."""

PIP_NAMES = {"comet_ml": "comet-ml"}

HINTS = {
    "wandb": "log in with wandb login, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
    "comet_ml": "set COMET_API_KEY",
}
"""Hints for trackers that cannot be started."""


class TrackerError(DeatError):
    """A tracker could not be started, or failed to log values."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and are installed.

    Raises:
        DeatError: A tracker does not exist, or its package is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(each) for each in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise DeatError(f"--track {name} is unknown: {did_you_mean(name, list(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            package = PIP_NAMES.get(name, name)
            raise DeatError(
                f"--track {name} needs the package {package}, which is not installed: pip install {package}"
            )


class Trackers(Callback):
    """Log a run to experiment trackers: its options and tags, the metrics of each epoch, and the result.

    Args:
        names: Accelerate's names of the trackers, such as ``wandb``.
        run: The run, whose directory's name becomes the run's name; trackers store local files in the directory.
        project: Project that contains the run, for trackers that have projects.
        warn: Called with a sentence when a tracker fails, which is not used any more.
        kept_in: Name of the file that has the logged values, for that sentence.

    Raises:
        TrackerError: A tracker cannot be started.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: RunDirectory,
        project: str,
        warn: Callable[[str], None],
        *,
        kept_in: str = "metrics.jsonl",
    ) -> None:
        known = _known(run.path)
        self._trackers: dict[str, Any] = {}
        self._warn = warn
        self._kept_in = kept_in
        for name in names:
            if name in known and project not in ("", known[name]["project"]):
                raise TrackerError(f"--project {project} cannot be used: {run.path.name} is already logged to the "
                                   f"project {known[name]['project']} of {name}; omit it")  # fmt: skip
            recorded = known.get(name, {"project": project, "id": secrets.token_hex(4) if name == "wandb" else None})
            try:
                tracker = _start(name, run, **recorded)
                if name not in known:
                    tracker.store_init_configuration(_plain(run.config.flat()))
                    known[name] = {**recorded, "id": _identifier(name, tracker) or recorded["id"]}
            except Exception as error:  # any exception: third-party code
                self.close()
                hint = "install it again" if isinstance(error, ImportError) else HINTS.get(name, "omit it")
                raise TrackerError(f"--track {name} cannot be started ({_in_short(error)}): {hint}") from error
            self._trackers[name] = tracker
        write_json(run.path / FILE, known)

    def on_epoch_end(self, row: EpochStats) -> None:
        """Log the epoch's metrics; the step is the epoch number."""
        metrics = {key: value for key, value in asdict(row).items() if isinstance(value, int | float)}
        del metrics["epoch"]
        self.log(metrics, row.epoch)

    def on_fit_end(self, history: History) -> None:
        """Log the selected epoch and the run's total cost."""
        selected = next(row for row in history.rows if row.epoch == history.selected)
        result = {
            "result/epoch": selected.epoch,
            "result/val_acc": selected.val_acc,
            "result/val_robust_acc": selected.val_robust_acc,
            "result/backward_passes": history.backwards,
            "result/seconds": sum(row.seconds for row in history.rows),
        }
        self.log({name: value for name, value in result.items() if value is not None}, len(history.rows), of_run=True)

    def log(self, values: Mapping[str, int | float], step: int, *, of_run: bool = False) -> None:
        """Log values at an epoch.

        Args:
            values: The values by name.
            step: The epoch.
            of_run: Whether the values describe the whole run. They become W&B's summary, because W&B drops values that
                a continued run logs at an epoch it already has.
        """
        for name, tracker in list(self._trackers.items()):
            try:
                if of_run and name == "wandb":
                    tracker.tracker.summary.update(dict(values))
                else:
                    tracker.log(dict(values), step=step)
            except Exception as error:  # any exception: third-party code
                del self._trackers[name]
                self._failed(name, error)

    def close(self) -> None:
        """Flush and close all trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:  # any exception: third-party code
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self._warn(f"{name} failed and lacks values from here on ({_in_short(error)}); they are in {self._kept_in}")


def _in_short(error: Exception) -> str:
    first = printable(str(error).strip().partition("\n")[0], 200)
    return f"{type(error).__name__}: {first}"


def trackers_of(path: Path) -> tuple[str, ...]:
    """Return the trackers to which a run was logged during training.

    Raises:
        DeatError: There are none, or one of them is not installed.
    """
    names = tuple(_known(path))
    if not names:
        raise DeatError(f"{path} was not logged to a tracker during training: omit --track")
    check_trackers(names)
    return names


def log_evaluation(run: RunDirectory, values: Mapping[str, float]) -> tuple[str, ...]:
    """Log the accuracies of an evaluation to the trackers to which a run was logged during training.

    Args:
        run: The run.
        values: Accuracies in [0, 1] by attack, and ``n_examples``.

    Returns:
        Names of the trackers.

    Raises:
        DeatError: The run was trained without trackers, or one of them cannot be started or fails.
    """
    names = trackers_of(run.path)
    failures: list[str] = []
    trackers = Trackers(names, run, project="", warn=failures.append, kept_in="eval.json")
    trackers.log({f"eval/{name}": value for name, value in values.items()}, len(run.rows()), of_run=True)
    trackers.close()
    if failures:
        raise TrackerError(f"--track {failures[0]}")
    return names


def _known(path: Path) -> dict[str, dict[str, Any]]:
    file = path / FILE
    content = read_json(file) if file.is_file() else {}
    fields = {"project", "id"}
    if not isinstance(content, dict) or not all(
        isinstance(each, dict) and each.keys() == fields for each in content.values()
    ):
        raise DeatError(f"{file} does not have each tracker's project and id; restore or remove the file")
    return content


def _start(name: str, run: RunDirectory, project: str, id: str | None) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # Accelerate's trackers ask it for the rank
    title, tags = run.path.name, _tags(run)
    arguments: dict[str, tuple[str, dict[str, Any]]] = {
        "wandb": (project, {"name": title, "id": id, "resume": "allow", "tags": list(tags.values()),
                            "dir": str(run.path)}),
        "mlflow": (project, {"run_name": title, "run_id": id, "tags": tags}),
        "comet_ml": (project, {}),
        "swanlab": (project, {"experiment_name": title, "tags": list(tags.values())}),
        "trackio": (project, {"name": title}),
        "clearml": (title, {"project_name": project, "task_name": title, "tags": list(tags.values())}),
        "aim": (title, {"experiment": project}),
    }  # fmt: skip
    kind = LOGGER_TYPE_TO_CLASS[name]
    first, options = arguments.get(name, (title, {}))
    if kind.requires_logging_directory:
        options["logging_dir"] = run.path / name
    tracker = kind(first, **options)
    if hasattr(tracker, "start"):
        tracker.start()
    if name == "comet_ml":
        tracker.tracker.set_name(title)
        tracker.tracker.add_tags(list(tags.values()))
    return tracker


def _identifier(name: str, tracker: Any) -> str | None:
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return None


def _tags(run: RunDirectory) -> dict[str, str]:
    config = run.config
    return {
        "method": config.attack.method,
        "dataset": config.data.dataset,
        "arch": config.model.arch,
        "setting": config.attack.setting,
        "seed": f"seed {config.optim.seed}",
        "software": f"deat-rb {importlib.import_module('deat_rb').__version__}",
    }


def _plain(options: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return options as values that all trackers accept: lists as text, None left out."""
    return {name: value if isinstance(value, bool | int | float | str) else str(list(value))
            for name, value in options.items() if value not in (None, ())}  # fmt: skip
