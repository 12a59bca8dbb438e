"""Studies: the runs that a file describes by a grid, a list and seeds, and how they are evaluated."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from deat_rb.attacks.names import parse_attacks
from deat_rb.runs.options import GROUP_OF, MAY_CHANGE, TrainOptions, make_options
from deat_rb.runs.resolution import default_name
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.files import read_bytes, read_json
from deat_rb.utils.options import OPEN

AUTOATTACK = "autoattack"

DEFAULT_ATTACKS = ("fgsm", "pgd-100", "cw-20")


@dataclass(frozen=True)
class Evaluation:
    """How the runs of a study are evaluated.

    Attributes:
        attacks: Names of attacks, as for `deat_rb.evaluate`, without AutoAttack.
        n_examples: Number of test images; None for all.
        autoattack: Number of test images for AutoAttack's standard version; 0 for all, None for no AutoAttack.
    """

    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    n_examples: int | None = None
    autoattack: int | None = None

    def parts(self) -> tuple[tuple[tuple[str, ...], int | None], ...]:
        """Return the evaluations to run: attacks and number of test images (None for all) of each."""
        main = ((self.attacks, self.n_examples),) if self.attacks else ()
        return main if self.autoattack is None else (*main, ((AUTOATTACK,), self.autoattack or None))

    def merged(self, other: Evaluation) -> Evaluation:
        """Return an evaluation that covers both; numbers of images are taken from ``self`` if it has them."""
        attacks = tuple(dict.fromkeys((*self.attacks, *other.attacks)))
        return replace(
            self, attacks=attacks, autoattack=other.autoattack if self.autoattack is None else self.autoattack
        )


@dataclass(frozen=True)
class RunSpec:
    """A run of a study.

    Attributes:
        options: The options of `deat-rb train` that are set, including the seed.
        evaluation: How the run is evaluated.
        label: Name of its row in a table: the same for runs that differ only in the seed.
    """

    options: TrainOptions
    evaluation: Evaluation
    label: str

    @property
    def name(self) -> str:
        """Name of the run directory, derived from the options: equal options give the same name in every study.

        Options that do not affect the result are ignored. The data folder and the file of extra data are identified by
        their last path component.
        """
        decisive = {name: value for name, value in self.options.explicit().items() if name not in MAY_CHANGE}
        for name in ("data_dir", "extra_data"):
            path = getattr(self.options.data, name)
            if path is not None:
                decisive[name] = Path(path).name
        digest = sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        return f"{default_name(self.options)}-{digest}"

    @cached_property
    def setting(self) -> str:
        """The options without the seed, as text: equal for runs that differ in nothing else, unlike ``label``."""
        return json.dumps({**self.options.explicit(), "seed": None}, sort_keys=True)

    @property
    def seed(self) -> int:
        """The random seed."""
        return self.options.optim.seed


@dataclass(frozen=True)
class Study:
    """A named list of runs.

    Attributes:
        name: Name of the study and of its table's files.
        title: Title of the table.
        runs: The runs, in the order of the table; no two have the same name.
    """

    name: str
    title: str
    runs: tuple[RunSpec, ...]

    def run(self, name: str) -> RunSpec:
        """Return the run with a name.

        Raises:
            DeatError: There is no such run.
        """
        for each in self.runs:
            if each.name == name:
                return each
        raise DeatError(f"{self.name} has no run named {name}; --print lists the commands of its runs")


class _EvaluationTable(BaseModel):
    model_config = ConfigDict(extra="forbid")

    attacks: str | list[str] = list(DEFAULT_ATTACKS)
    n_examples: int | None = Field(default=None, ge=1)
    autoattack: StrictBool | Annotated[StrictInt, Field(ge=1)] | None = None

    def evaluation(self) -> Evaluation:
        names = [name for name in parse_attacks(self.attacks) if name != "natural"]
        autoattack = self.autoattack
        if isinstance(autoattack, bool):
            autoattack = (self.n_examples or 0) if autoattack else None
        elif AUTOATTACK in names and autoattack is None:
            autoattack = self.n_examples or 0
        attacks = tuple(name for name in names if name != AUTOATTACK)
        if not attacks and autoattack is None:
            attacks = ("natural",)  # which the evaluation under an attack includes
        return Evaluation(attacks, self.n_examples, autoattack)


class _StudyFile(BaseModel):
    """The content of a study's file."""

    model_config = ConfigDict(extra="forbid")

    title: str = ""
    seeds: list[int] = [0]
    options: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    runs: list[dict[str, Any]] = []
    evaluation: _EvaluationTable = _EvaluationTable()


def read_study(path: str | Path) -> Study:
    """Read a study from a TOML or JSON file; docs/studies.md describes its tables.

    Raises:
        DeatError: The file is missing or invalid, or an option of a run is invalid.
    """
    path = Path(path)
    if path.suffix == ".json":
        content = read_json(path)
    elif path.suffix == ".toml":
        try:
            content = tomllib.loads(read_bytes(path).decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DeatError(f"{path} is not valid TOML: {error}") from None
    else:
        raise DeatError(f"{path} is neither a .toml nor a .json file; give a study's file")
    try:
        file = _StudyFile.model_validate(content)
    except ValidationError as error:
        raise DeatError(f"{path}: {_describe(error)}") from None
    if not file.grid and not file.runs:
        raise DeatError(f"{path} describes no runs: give a [grid] of options, or a list of [[runs]]")
    try:
        runs = expand(file.options, file.grid, file.runs, file.seeds, file.evaluation.evaluation())
    except DeatError as error:
        raise DeatError(f"{path}: {error}") from None
    return Study(path.stem, file.title or path.stem, runs)


FORMS = {
    "title": "text",
    "seeds": "a list of whole numbers such as [0, 1, 2]",
    "options": "a table [options] of options and their values",
    "grid": "a table [grid] with a list of values for each option, such as method = ['pgd-7', 'm-deat']",
    "runs": "a list of tables [[runs]] of options and their values",
    "evaluation": "a table [evaluation] with attacks, n_examples or autoattack",
    "attacks": "text such as 'fgsm,pgd-20', or a list of names",
    "n_examples": "a positive whole number",
    "autoattack": "true, false, or a positive whole number",
}
"""Form of each value of a study's file."""


def _describe(error: ValidationError) -> str:
    """Return one sentence about the first value of a study's file that is not as it should be."""
    first = error.errors()[0]
    names = [part for part in first["loc"] if isinstance(part, str)]
    if not names:
        return f"a study is a table of {', '.join(_StudyFile.model_fields)}; docs/studies.md describes them"
    if first["type"] == "extra_forbidden":
        where, model = ("[evaluation]", _EvaluationTable) if len(names) > 1 else ("a study", _StudyFile)
        hint = did_you_mean(names[-1], model.model_fields)
        if names[-1] in GROUP_OF:
            hint = "options of runs belong into [options], [grid] or [[runs]]"
        return f"{where} has no {names[-1]}: {hint}"
    name = [part for part in names[:2] if part in FORMS][-1]
    option = f" of {names[1]}" if name == "grid" and len(names) > 1 else ""
    value = "" if isinstance(first["input"], dict | list) else f" = {first['input']!r}"
    return f"{name}{option}{value} cannot be used: it should be {FORMS[name]}"


def expand(
    options: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    listed: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    evaluation: Evaluation,
) -> tuple[RunSpec, ...]:
    """Return all combinations of the grid, then the listed runs, each with every seed.

    Args:
        options: Options of all runs; a grid or a listed run overrides them.
        grid: Lists of values by option.
        listed: Options of single runs; ``label``, if given, names the run's row.
        seeds: The seeds.
        evaluation: How all runs are evaluated.

    Raises:
        DeatError: An option is invalid, or two runs are the same.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise DeatError(f"seeds = {list(seeds)} is not a list of different seeds; give a list such as [0, 1, 2]")
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise DeatError(f"the grid has no value for {empty[0]}; give one or more")
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())] if grid else []
    rows = [*points, *(dict(each) for each in listed)]
    own_labels = [str(row.pop("label", "")) for row in rows]
    chosen = [{**options, **row} for row in rows]
    for each in chosen:
        if "seed" in each:
            raise DeatError(f"seed = {each['seed']} cannot be an option of a study; give the list seeds instead")
    validated = [make_options(each, "") for each in chosen]
    for found in validated:
        if found.optim.epochs == OPEN and found.optim.patience is None:
            raise DeatError(
                "epochs = open never ends without patience, so that no other run would start; give patience"
            )
    automatic = iter(_labels([row for row, own in zip(chosen, own_labels, strict=True) if not own]))
    labels = [own or next(automatic) for own in own_labels]
    runs = [
        RunSpec(each.but(seed=seed), evaluation, label)
        for each, label in zip(validated, labels, strict=True)
        for seed in seeds
    ]
    by_name: dict[str, RunSpec] = {}
    for run in runs:
        other = by_name.setdefault(run.name, run)
        if other is run:
            continue
        data, twin = run.options.data, other.options.data
        for path, namesake in ((data.data_dir, twin.data_dir), (data.extra_data, twin.extra_data)):
            if path != namesake:
                raise DeatError(f"runs are named by the last part of a path, which {namesake} and {path} share; "
                                "rename one of them")  # fmt: skip
        raise DeatError(f"two runs have the same options ({run.label}, seed {run.seed}); remove one of them")
    for label in labels:
        if labels.count(label) > 1:
            raise DeatError(f"two rows have the label '{label}', but runs of one label are averaged, as those of "
                            "several seeds; give each row a label of its own, or remove one")  # fmt: skip
    return tuple(runs)


def merge(studies: Iterable[Study], name: str, title: str) -> Study:
    """Return one study with the runs of several; runs with the same options are trained once.

    Each is evaluated under the attacks of all studies that need it.
    """
    runs: dict[str, RunSpec] = {}
    for study in studies:
        for run in study.runs:
            known = runs.get(run.name)
            runs[run.name] = (
                run if known is None else replace(known, evaluation=known.evaluation.merged(run.evaluation))
            )
    return Study(name, title, tuple(runs.values()))


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each row by its method and the options in which the rows differ."""
    names = dict.fromkeys(name for row in rows for name in row if name != "method")
    differing = [name for name in names if len({repr(row.get(name)) for row in rows}) > 1]
    labels = []
    for row in rows:
        parts = [str(row.get("method", "m+trades")).lower()]
        parts += [f"{name.replace('_', ' ')} {row[name]}" for name in differing if name in row]
        labels.append(", ".join(parts))
    return labels
