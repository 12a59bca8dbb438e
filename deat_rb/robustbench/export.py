"""Export of a run in RobustBench's format."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from deat_rb.evaluation.report import Report
from deat_rb.methods.paper import publication
from deat_rb.models.spec import ModelSpec
from deat_rb.models.weights import load_weights
from deat_rb.robustbench.format import (
    NAME,
    NOTES,
    SPELLED,
    UNKNOWN_DATA,
    ExportPaths,
    check_export_dataset,
    eps_note,
    model_source,
    robustbench_weights,
    spelled_architecture,
)
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.hub_run import open_hub
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import write_all
from deat_rb.utils.hub import is_hub
from deat_rb.utils.safe_load import load_tensors
from deat_rb.utils.units import format_fraction

UNKNOWN_ACCURACY = "0.00"
"""AutoAttack accuracy if it was not run: RobustBench sorts by its ``float``, and "nan" would break the order."""

FULL_TEST_SET = 10_000
"""Number of CIFAR test images; the footnote mentions an evaluation on fewer."""


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
    additional_data: bool | None = None,
    reported: float | None = None,
    external: float | None = None,
    unreliable: bool | None = None,
    footnote: str | None = None,
    overwrite: bool = False,
) -> ExportPaths:
    """Write a run's selected network in RobustBench's format: all files or none.

    Accuracies are taken from the run's ``eval.json``, which must have been computed with these weights on the run's
    own test images at the run's eps. RobustBench ranks by AutoAttack accuracy and has no value for an unknown one: if
    AutoAttack was not run, it is written as 0.00, which ranks last, marked as unreliable and explained in the footnote.
    If none of link, name, authors and venue is given, they are the paper's for its methods; what is missing is empty.

    Args:
        run: The run directory, or a run on the Hugging Face Hub, ``hf:OWNER/NAME``.
        model_name: ``<FirstAuthor><Year><FirstWordOfTitle>[_suffix]``, such as ``Wang2021Gradient_R18``.
        output: Folder for the files.
        as_dataset: RobustBench dataset to export the run under, if RobustBench does not have the run's own.
        link: URL of the paper.
        name: Title of the paper.
        authors: Authors of the paper, separated by commas.
        venue: Venue of the paper, with the year.
        additional_data: Whether additional training images were used; by default, whether the run had
            extra data or pretrained weights.
        reported: Robust accuracy reported by the authors, in percent; by default the lowest measured.
        external: Best known robust accuracy, in percent, which determines the rank in RobustBench.
        unreliable: Whether AutoAttack's accuracy is unreliable; by default true if a check of the evaluation failed.
        footnote: Text appended to the automatic footnote.
        overwrite: Whether to replace an existing export of the same name.

    Raises:
        DeatError: RobustBench has no such dataset or architecture, the name is malformed or taken, the evaluation is
            missing or was computed for different weights or data, or the files cannot be written.
    """
    if NAME.fullmatch(model_name) is None:
        raise DeatError(f"model name '{model_name}' does not have RobustBench's form <FirstAuthor><Year><Word>, "
                        "with a suffix after _ for variants, such as Wang2021Gradient_R18")  # fmt: skip
    hub = open_hub(str(run)) if is_hub(run) else None
    if hub is not None and hub.path.is_file():
        raise DeatError(f"{hub.address} is a file of weights, but RobustBench's format needs a run with its "
                        "evaluation: give hf:OWNER/NAME")  # fmt: skip
    with nullcontext() if hub is None else hub.named():
        opened = RunDirectory.open(Path(run) if hub is None else hub.path)
        spec, config = opened.model_spec, opened.config
        dataset = _dataset(config.data.dataset, as_dataset, spec)
        architecture = spelled_architecture(spec)  # refuses one of the run's own module before it is imported
        model = spec.build()
        load_weights(model, load_tensors(opened.selected_weights_path), source=str(opened.selected_weights_path))
        report = _evaluation(opened, evaluation_advice(run))
    failed = [check.name for check in report.checks if check.status == "fail"]
    unknown = "autoattack" not in report.results
    unreliable = True if unreliable is None and (failed or unknown) else unreliable
    if additional_data is None:
        additional_data = config.additional_data
    given = {"link": link, "name": name, "authors": authors, "venue": venue}
    info: dict[str, Any] = {
        **{field: text or "" for field, text in publication(config.attack.method, given).items()},
        "additional_data": additional_data or False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "architecture": architecture,
        "eps": format_fraction(config.attack.eps),
        **_accuracies(report),
        **({} if reported is None else {"reported": _percent(reported)}),
        **({} if external is None else {"external": _percent(external)}),
        **({} if unreliable is None else {"unreliable": unreliable}),
    }
    notes = (
        NOTES["method"].format(method=config.attack.method),
        f"Training had not ended: {opened.unfinished}." if opened.unfinished else "",
        _stand_in_note(config, dataset),
        NOTES["subset"].format(count=report.n_examples) if report.n_examples < FULL_TEST_SET else "",
        eps_note(info["eps"], config.attack.norm),
        NOTES["autoattack"].format(accuracy=UNKNOWN_ACCURACY) if unknown else "",
        NOTES["checks"].format(checks=", ".join(failed)) if failed else "",
        UNKNOWN_DATA if additional_data is None else "",
        footnote,
    )
    info["footnote"] = " ".join(note for note in notes if note)
    paths = ExportPaths.below(Path(output), dataset, model_name, config.attack.norm)
    contents = {
        paths.weights: robustbench_weights(model),
        paths.source: model_source(model_name, dataset, spec, config.attack.norm).encode(),
        paths.info: json.dumps(info, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    for path in contents:
        if path.exists() and not overwrite:
            raise DeatError(f"{path} exists: choose another model name, or use --overwrite (overwrite=True)")
    try:
        for path in contents:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot write to {output}: {error.strerror or error}") from error
    write_all(contents)
    return replace(paths, unknown=("autoattack_acc",) if unknown else (), notes=() if hub is None else hub.notes)


def evaluation_advice(run: str | Path) -> str:
    """Return how to export a run with another evaluation; that of a run on the Hub changes only with another push."""
    if is_hub(run):
        return "evaluate the run with deat-rb eval --autoattack where it was trained, push it again, then export it"
    return f"run deat-rb eval {run} --autoattack, then export again"


def _dataset(trained_on: str, as_dataset: str | None, spec: ModelSpec) -> str:
    if as_dataset is None and trained_on not in compat.DATASETS:
        raise DeatError(f"RobustBench has no dataset '{trained_on}': give the one to export it under "
                        f"({', '.join(compat.DATASETS)}) with --as-dataset (as_dataset)")  # fmt: skip
    dataset = check_export_dataset(as_dataset or trained_on)
    if spec.num_classes != compat.DATASETS[dataset]:
        raise DeatError(f"a network with {spec.num_classes} classes cannot be exported as {dataset}, which has "
                        f"{compat.DATASETS[dataset]}: choose another --as-dataset")  # fmt: skip
    return dataset


def _stand_in_note(config: Any, dataset: str) -> str:
    data = config.data
    if data.dataset == dataset:
        return ""
    folder = f" named {Path(data.data_dir).name}" if data.dataset == "folder" and data.data_dir else ""
    return NOTES["data"].format(own=SPELLED.get(data.dataset, data.dataset) + folder, dataset=SPELLED[dataset])


def _evaluation(run: RunDirectory, advice: str) -> Report:
    """Return the run's evaluation, after checking that it used the run's weights, data and eps."""
    file, config = run.path / "eval.json", run.config
    if not file.exists():
        raise DeatError(f"{run.path} has no evaluation (eval.json), so its accuracies are unknown: {advice}")
    report = Report.load(file)
    run.check_evaluation(report.provenance, advice)
    if (report.norm, report.precision) != (config.attack.norm, "fp32"):
        raise DeatError(f"{file} was computed with {report.norm} and {report.precision}, not {config.attack.norm} "
                        f"and fp32: {advice}")  # fmt: skip
    if format_fraction(report.eps) != format_fraction(config.attack.eps):
        raise DeatError(f"{file} was computed at eps {format_fraction(report.eps)}, but the run was trained for "
                        f"{format_fraction(config.attack.eps)}: {advice}")  # fmt: skip
    if len(report.results) < 2:
        raise DeatError(f"{file} has no robust accuracy: {advice}")
    return report


def _accuracies(report: Report) -> dict[str, str]:
    """Return the accuracies as RobustBench writes them; the reported one is the lowest under attack."""
    accuracies = {attack: 100 * result.accuracy for attack, result in report.results.items()}
    clean = accuracies.pop("natural")
    autoattack = _percent(accuracies["autoattack"]) if "autoattack" in accuracies else UNKNOWN_ACCURACY
    return {"clean_acc": _percent(clean), "reported": _percent(min(accuracies.values())), "autoattack_acc": autoattack}


def _percent(accuracy: float) -> str:
    if not 0 <= accuracy <= 100:
        raise DeatError(f"accuracy {accuracy:g} is not a percentage from 0 to 100")
    return f"{accuracy:.2f}"
