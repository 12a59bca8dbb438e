"""The paper's experiments, from experiments.toml: their runs at a scale, and the paper's values."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from deat_rb.leaderboard.pages.published import PAPER_TABLES
from deat_rb.reproduction.results import EPOCHS, MINUTES, PASSES
from deat_rb.reproduction.study import DEFAULT_ATTACKS, Evaluation, RunSpec, Study, expand
from deat_rb.reproduction.tables import Published
from deat_rb.runs.defaults import dataset_defaults
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.text import counted
from deat_rb.utils.units import format_fraction, parse_fraction

PAPER_NETWORKS = {"small": "PreActResNet-18", "wide": "WRN-34-10"}
PAPER_DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
PAPER_EPS = 8 / 255

EVERYWHERE = (
    "At every scale, validation images are held out of the training images, and evaluations count any misclassified "
    "iterate of an attack; docs/methods.md lists more."
)

FigureKind = Literal["accuracy", "collapse", "l_x", "trade-off", "passes", "robustness", "loss"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scale(_Table):
    """Datasets, networks and settings used in place of the paper's.

    Attributes:
        title: Description of the scale.
        seeds: Seeds, unless a target has its own.
        curve_test: Number of test images for the accuracy curves of Figure 7.
        n_examples: Number of test images of evaluations; None for all.
        datasets: Dataset used in place of each of the paper's.
        networks: Architectures used in place of PreActResNet-18 (``small``) and WRN-34-10 (``wide``).
        options: Options of all runs.
        settings: Further options by environment.
    """

    title: str
    seeds: list[int]
    curve_test: int
    n_examples: int | None = None
    datasets: dict[str, str]
    networks: dict[str, str]
    options: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}


class Environment(_Table):
    """Dataset, network and setting of a part of a target."""

    title: str
    dataset: str
    network: str
    curve_test: bool = False
    options: dict[str, Any] = {}


class Part(_Table):
    """Rows of a target: methods, perhaps with several step sizes and factors, in one environment."""

    environment: str
    methods: list[str]
    alpha: list[str] = []
    gamma: list[float] = []
    options: dict[str, Any] = {}


class Claim(_Table):
    """An ordering that the paper states: rows ``more`` are above rows ``less`` in a column.

    Attributes:
        text: The statement.
        column: The column.
        part: Number of the part that contains the rows.
        more: Labels of rows with the higher values.
        less: Labels of rows with the lower values.
    """

    text: str
    column: str
    part: int = 0
    more: list[str]
    less: list[str]


class Target(_Table):
    """A table or figure of the paper.

    Attributes:
        title: Its title.
        columns: Columns of a table other than the costs; empty for figures.
        attacks: Attacks of the evaluation.
        seeds: Its seeds in the paper, if not the scale's.
        parts: Its rows.
        claims: Orderings that the paper states.
        published: Values by column and method that are not in published.json.
        figure: Kind of the figure; None for tables.
        panels: Labels of rows by panel.
        note: A remark on the figure.
    """

    title: str
    columns: list[str] = []
    attacks: list[str] = list(DEFAULT_ATTACKS)
    seeds: list[int] = []
    parts: list[Part]
    claims: list[Claim] = []
    published: dict[str, dict[str, float]] = {}
    figure: FigureKind | None = None
    panels: list[list[str]] = []
    note: str = ""

    @property
    def evaluated(self) -> bool:
        """Whether it shows results of the evaluation, not only metrics of the training."""
        return bool(self.columns) or self.figure == "trade-off"


class Experiments(_Table):
    """The content of experiments.toml."""

    scales: dict[str, Scale]
    environments: dict[str, Environment]
    targets: dict[str, Target]
    stopping: dict[str, dict[str, list[tuple[float, float]]]]


@cache
def experiments() -> Experiments:
    """Return the paper's experiments."""
    text = files(__package__).joinpath("experiments.toml").read_text(encoding="utf-8")
    return Experiments.model_validate(tomllib.loads(text))


def chosen_targets(names: Sequence[str]) -> list[str]:
    """Return the named targets in the paper's order; ``all`` stands for all of them.

    Raises:
        DeatError: A target does not exist.
    """
    known = list(experiments().targets)
    for name in names:
        if name not in (*known, "all"):
            raise DeatError(f"there is no target '{name}': {did_you_mean(name, [*known, 'all'])}")
    return known if "all" in names else [name for name in known if name in names]


@dataclass(frozen=True)
class Setup:
    """How the paper's experiments are run here.

    Attributes:
        scale: Name of the scale.
        seeds: Seeds of all targets; by default the scale's or the target's.
        dataset: Dataset used instead of the scale's.
        data_dir: Its folder.
        arch: Architecture used instead of the scale's.
        autoattack: Number of test images for AutoAttack; 0 for all, None for no AutoAttack.
        n_examples: Number of test images used instead of the scale's.
        train_size: Number of training images used instead of the scale's.
        batch_size: Batch size used instead of the scale's.
        curve_test: Number of test images for Figure 7 used instead of the scale's.
    """

    scale: str = "digits"
    seeds: tuple[int, ...] = ()
    dataset: str | None = None
    data_dir: str | None = None
    arch: str | None = None
    autoattack: int | None = None
    n_examples: int | None = None
    train_size: int | None = None
    batch_size: int | None = None
    curve_test: int | None = None

    def __post_init__(self) -> None:
        scales = experiments().scales
        if self.scale not in scales:
            raise DeatError(f"--scale {self.scale} does not exist: {did_you_mean(self.scale, scales)}")

    @property
    def own(self) -> Scale:
        """The scale."""
        return experiments().scales[self.scale]

    def dataset_of(self, environment: Environment) -> str:
        """Return the dataset used in place of the paper's."""
        return self.dataset or self.own.datasets[environment.dataset]

    def arch_of(self, environment: Environment) -> str:
        """Return the architecture used in place of the paper's."""
        return self.arch or self.own.networks[environment.network]

    def seeds_of(self, target: Target) -> tuple[int, ...]:
        """Return the seeds of a target: its own, if any, at the scale ``paper``, otherwise the scale's."""
        own = target.seeds if target.seeds and self.scale == "paper" else self.own.seeds
        return self.seeds or tuple(own)

    def changes_of(self, part: Part) -> dict[str, Any]:
        """Return the options of a part's runs that differ from the paper's, besides dataset and network."""
        given = {"train_size": self.train_size, "batch_size": self.batch_size}
        changes = {**self.own.options, **self.own.settings.get(part.environment, {})}
        return changes | {name: value for name, value in given.items() if value is not None}

    def settings_of(self, part: Part) -> dict[str, Any]:
        """Return the options of a part's runs, except the method and its own parameters."""
        environment = experiments().environments[part.environment]
        options = {**environment.options, **self.changes_of(part)}
        options |= {"dataset": self.dataset_of(environment), "arch": self.arch_of(environment), **part.options}
        if self.data_dir is not None:
            options["data_dir"] = self.data_dir
        if environment.curve_test:
            options["curve_test"] = self.curve_test or self.own.curve_test
        return options


def part_runs(setup: Setup, target: Target, number: int) -> tuple[RunSpec, ...]:
    """Return the runs of a part of a target; labels are the method and the part's parameters.

    Raises:
        DeatError: An option is invalid.
    """
    part = target.parts[number]
    options = setup.settings_of(part)
    eps = parse_fraction(options.get("eps", dataset_defaults(options["dataset"]).eps))
    rows: list[dict[str, Any]] = []
    alphas: list[str | None] = [*part.alpha] or [None]
    gammas: list[float | None] = [*part.gamma] or [None]
    for method, alpha, gamma in product(part.methods, alphas, gammas):
        label, row = method, dict[str, Any](method=method)
        if alpha is not None:
            label += f", alpha {alpha}"
            row["alpha"] = alpha if eps == PAPER_EPS else format_fraction(parse_fraction(alpha) * eps / PAPER_EPS)
        if gamma is not None:
            label += f", gamma {gamma:g}"
            row["gamma"] = gamma
        rows.append({**row, "label": label})
    attacks = tuple(target.attacks)
    n_examples = setup.n_examples or setup.own.n_examples
    evaluation = Evaluation(attacks, n_examples, setup.autoattack if target.columns else None)
    return expand(options, {}, rows, setup.seeds_of(target), evaluation)


def target_study(name: str, setup: Setup) -> Study:
    """Return the runs of a target, without duplicates."""
    target = experiments().targets[name]
    runs = {run.name: run for number in range(len(target.parts)) for run in part_runs(setup, target, number)}
    return Study(name, target.title, tuple(runs.values()))


def differences(setup: Setup, name: str) -> str:
    """Return sentences on how a target's runs differ from the paper's."""
    target, paper = experiments().targets[name], experiments().scales["paper"]
    said: dict[str, None] = {}
    for part in target.parts:
        environment = experiments().environments[part.environment]
        dataset, arch = setup.dataset_of(environment), setup.arch_of(environment)
        if dataset != environment.dataset:
            where = "your images" if dataset == "folder" else dataset
            said[f"{where} in place of {PAPER_DATASETS[environment.dataset]}"] = None
        if arch != paper.networks[environment.network]:
            said[f"{arch} in place of {PAPER_NETWORKS[environment.network]}"] = None
        if changed := setup.changes_of(part):
            options = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in changed.items())
            said[f"{options} ({part.environment.removesuffix('-100').removesuffix('-wide')} setting)"] = None
    seeds, own = setup.seeds_of(target), target.seeds or paper.seeds
    if len(seeds) != len(own):
        said[f"{counted(len(seeds), 'seed')} instead of {len(own)}"] = None
    if target.figure == "robustness":
        drawn, usual = setup.curve_test or setup.own.curve_test, paper.curve_test
        if drawn != usual:
            said[f"the first {counted(drawn, 'test image')} instead of {usual:,}"] = None
    elif target.evaluated and (count := setup.n_examples or setup.own.n_examples):
        said[f"{counted(count, 'test image')} instead of all"] = None
    if setup.autoattack and target.columns:
        said[f"AutoAttack on {counted(setup.autoattack, 'test image')} instead of all"] = None
    return " ".join([*([f"Not the paper's setting: {'; '.join(said)}."] if said else []), EVERYWHERE])


def published(name: str, number: int) -> dict[str, dict[str, Published]]:
    """Return the paper's values for part ``number`` of a target such as ``table2``, by label and column."""
    target = experiments().targets[name]
    part = target.parts[number]
    environment = experiments().environments[part.environment]
    if part.alpha:
        return {
            f"{method}, alpha {alpha}": dict(zip(("natural", "pgd-100", EPOCHS, MINUTES),
                                                 (Published(*pair) for pair in experiments().stopping[method][alpha]),
                                                 strict=True))
            for method, alpha in product(part.methods, part.alpha)
        }  # fmt: skip
    arch = experiments().scales["paper"].networks[environment.network]
    values: dict[str, dict[str, Published]] = {}
    for table in PAPER_TABLES:
        place = (table.number, table.dataset, table.arch, table.setting)
        if place != (int(name.removeprefix("table")), environment.dataset, arch, environment.options["setting"]):
            continue
        for row in table.rows:
            by_column = {"natural": row.natural, "fgsm": row.fgsm, "pgd-100": row.pgd100, "cw-20": row.cw20,
                         MINUTES: row.minutes}  # fmt: skip
            values[row.method.lower()] = {
                key: Published(value) for key, value in by_column.items() if value is not None
            }
    for column, by_method in target.published.items():
        for method, value in by_method.items():
            values[method][column] = Published(value)
    return values


def columns_of(target: Target, autoattack: bool) -> tuple[str, ...]:
    """Return the columns of a table: its attacks (Figure 5 has one, too), AutoAttack if it was run, and the costs."""
    own = ["natural", *target.attacks] if target.figure == "trade-off" else target.columns
    attacks = [*own, *(["autoattack"] if autoattack else [])]
    return tuple(dict.fromkeys((*(each for each in attacks if each != EPOCHS), PASSES, EPOCHS, MINUTES)))
