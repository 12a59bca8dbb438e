"""A run in RobustBench's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deat_rb.evaluation.report import Report
from deat_rb.methods.paper import PAPER, PAPERS_OWN
from deat_rb.models.spec import ModelSpec
from deat_rb.models.weights import load_weights
from deat_rb.robustbench.format import (
    NAME,
    SPELLED,
    UNKNOWN,
    ExportPaths,
    model_source,
    robustbench_weights,
    spelled_architecture,
)
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import sha256_file, write_all
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import format_fraction

FULL_TEST_SET = 10_000


def export(
    run: str | Path,
    *,
    model_name: str,
    output: str | Path,
    as_dataset: str | None = None,
    link: str | None = None,
    name: str | None = None,
    authors: str | None = None,
    venue: str | None = None,
    additional_data: bool = False,
    reported: float | None = None,
    external: float | None = None,
    unreliable: bool | None = None,
    footnote: str | None = None,
    overwrite: bool = False,
) -> ExportPaths:
    """Writes a run's selected network in RobustBench's form. Either all files are written or none.

    Accuracies come from the run's ``eval.json``; those it does not have are "nan". ``reported`` is the lowest of its
    robust accuracies unless given. Of methods that the paper introduces, link, name, authors and venue are the paper's;
    of others they are empty unless given.

    Args:
        run: The run directory.
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>``, with a suffix for variants: ``Wang2021Gradient_R18``.
        output: The folder below which the files go.
        as_dataset: Which of RobustBench's data sets the run's data stand for, if they are not one.
        link: Of the paper.
        name: The paper's title.
        authors: The paper's, with commas.
        venue: The paper's, with the year.
        additional_data: Whether other training images were used, too.
        reported: Robust accuracy that the authors report, in percent.
        external: Best known robust accuracy, in percent, which decides RobustBench's ranking.
        unreliable: Whether AutoAttack's figure is not to be relied on.
        footnote: Added to what the export says by itself.
        overwrite: Whether an export of that name may be replaced.

    Raises:
        DeatError: RobustBench has no such data set or architecture, the name is malformed or taken, the evaluation is
            of other weights, or the files cannot be written.
    """
    if NAME.fullmatch(model_name) is None:
        raise DeatError(f"model name '{model_name}' does not have RobustBench's form <FirstAuthor><Year><Word>, "
                        "with a suffix after _ for variants: Wang2021Gradient_R18")  # fmt: skip
    opened = RunDirectory.open(Path(run))
    spec, config = opened.model_spec, opened.config
    dataset = _dataset(config.data.dataset, as_dataset, spec)
    model = spec.build()
    load_weights(model, load_tensors(opened.selected_weights_path), source=str(opened.selected_weights_path))
    figures, n_examples = _figures(opened)
    credit = PAPER if PAPERS_OWN.match(config.attack.method) else dict.fromkeys(PAPER, "")
    given = {"link": link, "name": name, "authors": authors, "venue": venue}
    info: dict[str, Any] = {
        **{field: credit[field] if text is None else text for field, text in given.items()},
        "additional_data": additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "architecture": spelled_architecture(spec),
        "eps": format_fraction(config.attack.eps),
        **figures,
        **({} if reported is None else {"reported": _percent(reported)}),
        **({} if external is None else {"external": _percent(external)}),
        **({} if unreliable is None else {"unreliable": unreliable}),
    }
    notes = (
        f"Trained with deat-rb, method {config.attack.method}.",
        _stand_in_note(config, dataset),
        f"Accuracies on {n_examples} test images." if 0 < n_examples < FULL_TEST_SET else "",
        footnote,
    )
    info["footnote"] = " ".join(note for note in notes if note)
    unknown = tuple(field for field, value in info.items() if value == UNKNOWN)
    paths = ExportPaths.below(Path(output), dataset, model_name, unknown)
    contents = {
        paths.weights: robustbench_weights(model),
        paths.source: model_source(model_name, dataset, spec).encode(),
        paths.info: json.dumps(info, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    for path in contents:
        if path.exists() and not overwrite:
            raise DeatError(f"{path} exists: choose another model name or allow it to be overwritten")
    try:
        for path in contents:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot write below {output}: {error.strerror or error}") from error
    write_all(contents)
    return paths


def _dataset(trained_on: str, as_dataset: str | None, spec: ModelSpec) -> str:
    if as_dataset is None and trained_on not in compat.DATASETS:
        raise DeatError(f"RobustBench has no dataset '{trained_on}': say with as_dataset which of "
                        f"{', '.join(compat.DATASETS)} it stands for")  # fmt: skip
    dataset = as_dataset or trained_on
    compat.check_dataset(dataset)
    if dataset == "imagenet":
        raise DeatError("dataset imagenet has 224x224 images in RobustBench, and what can be exported takes 32x32: "
                        "export as cifar10 or cifar100")  # fmt: skip
    if spec.num_classes != compat.DATASETS[dataset]:
        raise DeatError(f"a network of {spec.num_classes} classes cannot stand for {dataset}, which has "
                        f"{compat.DATASETS[dataset]}")  # fmt: skip
    return dataset


def _stand_in_note(config: Any, dataset: str) -> str:
    data = config.data
    if data.dataset == dataset:
        return ""
    folder = f" named {Path(data.data_dir).name}" if data.dataset == "folder" and data.data_dir else ""
    return f"Trained and evaluated on {SPELLED.get(data.dataset, data.dataset)}{folder}, not on {SPELLED[dataset]}."


def _figures(run: RunDirectory) -> tuple[dict[str, str], int]:
    """Reads the evaluation: the accuracies as RobustBench writes them, and on how many images (0 without one)."""
    figures = dict.fromkeys(("clean_acc", "reported", "autoattack_acc"), UNKNOWN)
    file = run.path / "eval.json"
    if not file.exists():
        return figures, 0
    report = Report.load(file)
    weights = report.provenance.get("weights_sha256")
    if weights not in (None, sha256_file(run.selected_weights_path)):
        raise DeatError(f"{file} is an evaluation of other weights than the run has selected: evaluate again")
    accuracies = {attack: 100 * result.accuracy for attack, result in report.results.items()}
    figures["clean_acc"] = _percent(accuracies.pop("natural"))
    of_linf = report.norm == "Linf" and report.precision == "fp32"
    if accuracies and of_linf and format_fraction(report.eps) == format_fraction(run.config.attack.eps):
        figures["reported"] = _percent(min(accuracies.values()))
        if "autoattack" in accuracies:
            figures["autoattack_acc"] = _percent(accuracies["autoattack"])
    return figures, report.n_examples


def _percent(accuracy: float) -> str:
    if not 0 <= accuracy <= 100:
        raise DeatError(f"accuracy {accuracy:g} is not in percent, from 0 to 100")
    return f"{accuracy:.2f}"
