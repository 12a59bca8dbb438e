"""Prediction of the times of a study's runs from ten timed batches of each network and kind of method."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from deat_rb.methods.registry import recipe
from deat_rb.methods.trainers import AttackTrainer
from deat_rb.reproduction.folder import Record, StudyFolder
from deat_rb.reproduction.planning import Planner, check_evaluation
from deat_rb.reproduction.study import RunSpec
from deat_rb.runs.estimate import estimated_epochs, time_batches, time_pass, training_seconds
from deat_rb.runs.plan import TrainingPlan
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_json
from deat_rb.utils.options import OPEN

ESTIMATE = "state/estimate.json"

ROBUST = 0.6
"""Fraction of an attack's passes that are actually run, since misclassified images are not attacked further."""

PASSES = {
    "natural": 0,
    "fgsm": 1,
    "noise-gaussian": 1,
    "noise-uniform": 1,
    "autoattack": 3600,
    "autoattack-rand": 4000,
    "square": 1700,
}
"""Passes of attacks per robust image; a forward pass alone counts a third.

Square has 5,000 forward passes, AutoAttack besides 100 + 2 x 900 with gradients, and its version rand 2 x 100 x 20.
"""


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a run; of an open-ended run, that of one epoch.

    Attributes:
        run: The run.
        epochs: Its epochs.
        passes: Expected number of backward passes, in mini-batches; 0 if it is trained.
        exact: Whether that number is known in advance.
        training: Seconds of training and validation; 0 if it is trained.
        evaluation: Seconds of evaluation, without the attacks in ``unknown``.
        unknown: Attacks whose number of passes is not known.
        threads: CPU threads; None on a GPU.
    """

    run: RunSpec
    epochs: int
    passes: float
    exact: bool
    training: float
    evaluation: float
    unknown: tuple[str, ...]
    threads: int | None

    @property
    def seconds(self) -> float:
        """Seconds of training and evaluation."""
        return self.training + self.evaluation

    @property
    def is_trained(self) -> bool:
        """Whether only evaluation is left."""
        return self.passes == 0

    @property
    def is_open(self) -> bool:
        """Whether the run is open-ended and not trained yet."""
        return self.epochs >= OPEN and not self.is_trained

    def passes_text(self) -> str:
        """Return the number of backward passes as text."""
        return f"{'' if self.exact else 'about '}{self.passes:,.0f}{' per epoch' if self.is_open else ''}"


def read_estimate(folder: StudyFolder) -> dict[str, float]:
    """Return the predicted seconds of each run, by name, of an earlier `estimate`; empty if there was none."""
    path = folder.path / ESTIMATE
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, int | float) for value in content.values()):
        raise DeatError(f"{path} is damaged; remove it")
    return {str(name): float(value) for name, value in content.items()}


def estimate(folder: StudyFolder, runs: Sequence[RunSpec], *, notify: Callable[[str], None]) -> list[Prediction]:
    """Predict the time of the runs that are left on this machine, and store that of whole runs for `--status`.

    The times of an attack step and of an update are measured in ten batches of each network and loss. A number of
    steps that is not known in advance is taken from finished runs of other seeds, or else is the mean of its minimum
    and maximum. The time of open-ended runs, and of those that are trained, is not stored.

    Args:
        folder: The folder of the study.
        runs: The runs; those that are done or have failed are only looked at.
        notify: Called with a sentence before each measurement.

    Raises:
        DeatError: An option of a run or its data are invalid.
    """
    clock = Clock(notify)
    done = [run for run in runs if folder.status(run) == "done"]
    left = [run for run in runs if not folder.is_settled(run)]
    predicted = [_predict(run, clock, folder.record(run), _passes_of_others(folder, run, done)) for run in left]
    folder.create()
    seconds = {each.run.name: each.seconds for each in predicted if not (each.is_open or each.is_trained)}
    write_json(folder.path / ESTIMATE, {**read_estimate(folder), **seconds})
    return [_left(each, len(folder.rows(each.run))) for each in predicted]


def _left(predicted: Prediction, epochs: int) -> Prediction:
    """Return the part of a prediction that is left after a number of epochs."""
    if not epochs or predicted.is_open or predicted.is_trained:
        return predicted
    share = 1 - epochs / predicted.epochs
    return replace(predicted, passes=share * predicted.passes, exact=False, training=share * predicted.training)


@dataclass(frozen=True)
class Times:
    """Seconds per mini-batch of a network.

    Attributes:
        update: An update.
        step: An attack step, forward and backward.
        evaluation: A forward and backward pass in an evaluation, in fp32.
    """

    update: float
    step: float
    evaluation: float


class Clock:
    """Measures `Times`, once for each network, batch size, precision and kind of trainer.

    Attributes:
        plan: Returns the plan of a run, as for ``--dry-run``.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._times: dict[tuple[object, ...], Times] = {}
        self.plan = Planner(dry=True).plan

    def times(self, planned: TrainingPlan) -> Times:
        """Return the times of a run's network and method."""
        config = planned.config
        kind = _kind(planned)
        key = (config.network, config.data.batch_size, config.runtime.precision, config.runtime.device, kind)
        if key not in self._times:
            self._notify(f"timing {kind} with {config.model.arch}, batches of {config.data.batch_size}")
            self._times[key] = _measure(planned, kind)
        return self._times[key]


def _kind(planned: TrainingPlan) -> str:
    """Return a method with the same cost per step and update; methods of other packages represent only themselves."""
    _, row = recipe(planned.config.attack.method)
    if row.replays:
        return "free-2"
    if row.uses_pgd and row.loss in ("ce", "trades", "mart") and type(planned.trainer) is AttackTrainer:
        return {"ce": "pgd-1"}.get(str(row.loss), str(row.loss))
    return planned.config.attack.method


def _measure(planned: TrainingPlan, kind: str) -> Times:
    # Batches first: `fit` prepares cuBLAS for deterministic training, which older versions of torch ask only once.
    if kind == "free-2":  # a replay is both step and update
        update, step = 0.0, time_batches(planned, [2], kind).seconds[2] / 2
    else:
        times = time_batches(planned, [1, 3] if planned.trainer.most_steps is None else [1], kind)
        update, step = max(times.update, 0.0), max(times.step, 0.0)
    return Times(update, step, time_pass(planned))


def _passes_of_others(folder: StudyFolder, run: RunSpec, done: Sequence[RunSpec]) -> float | None:
    """Return the mean backward passes of finished runs that differ in the seed only; None if there are none."""
    alike = [other for other in done if other.setting == run.setting]
    return fmean(sum(row.backwards for row in folder.rows(other)) for other in alike) if alike else None


def _predict(run: RunSpec, clock: Clock, record: Record | None, known: float | None) -> Prediction:
    planned = clock.plan(run.options)
    check_evaluation(run, planned)
    config, times, epochs = planned.config, clock.times(planned), estimated_epochs(planned)
    is_open = config.optim.epochs == OPEN
    counted = replace(planned, config=config.but(epochs=epochs)) if is_open else planned
    passes, exact = _passes(counted, None if is_open else known)
    training = seconds_of(planned, times, passes)
    if record is not None:
        passes, exact, training = 0, True, 0.0
    per_image = times.evaluation / config.data.batch_size
    parts = run.evaluation.parts() if record is None else record.missing(run.evaluation)
    tested = [(attacks, asked or len(planned.data.test)) for attacks, asked in parts]
    each = {name: (count, _attack_passes(name)) for attacks, count in tested for name in attacks}
    evaluation = ROBUST * per_image * sum(count * spent for count, spent in each.values() if spent is not None)
    unknown = tuple(name for name, (_, spent) in each.items() if spent is None)
    return Prediction(run, config.optim.epochs, passes, exact, training, evaluation, unknown, config.runtime.threads)


def _passes(planned: TrainingPlan, known: float | None) -> tuple[float, bool]:
    """Return the expected backward passes of a run, in mini-batches, and whether they are known in advance.

    Args:
        planned: The plan, with a number of epochs.
        known: The mean of finished runs of other seeds, if there are any.
    """
    if (costs := planned.costs()) is not None:
        return costs.backwards, True
    if known is not None:
        return known, False
    if (bounds := planned.cost_bounds()) is not None:
        return fmean(each.backwards for each in bounds), False
    return float(planned.config.optim.epochs * planned.batches * (1 + planned.trainer.steps)), False


def seconds_of(planned: TrainingPlan, times: Times, passes: float) -> float:
    """Return the seconds that training and validation take; of an open-ended run, those of one epoch.

    Args:
        planned: The plan of the run.
        times: Seconds per mini-batch.
        passes: Backward passes of these epochs, in mini-batches.
    """
    of_update = 0 if planned.trainer.shares_passes else 1 + planned.trainer.penalty_passes[1]
    steps = passes / planned.batches - of_update * estimated_epochs(planned)
    return training_seconds(planned, times.update, times.step, steps, times.evaluation)


def _attack_passes(attack: str) -> int | None:
    """Return the approximate number of passes that an attack spends on an image it does not fool; None if unknown."""
    number = re.fullmatch(r"(?:pgd|cw)-(\d+)(?:x(\d+))?", attack)
    return int(number[1]) * int(number[2] or 1) if number else PASSES.get(attack)
