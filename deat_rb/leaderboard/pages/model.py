"""Content of a model's page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from deat_rb.evaluation.html_report import BAR, MARKS
from deat_rb.evaluation.report import SKIPPED
from deat_rb.leaderboard.entry import Accuracy, Entry
from deat_rb.leaderboard.pages.charts import curves
from deat_rb.leaderboard.pages.format import (
    MISSING,
    count,
    dataset_title,
    duration,
    local_link,
    memory,
    percent,
    web_link,
)

HOME = "../../.."
"""The board's folder, seen from a model's page."""


def page_of(entry: Entry) -> PurePosixPath:
    """Return the path of a model's page, relative to the board."""
    return PurePosixPath("models", entry.dataset, entry.threat_model, f"{entry.model_name}.html")


def link_of(entry: Entry) -> str:
    """Return the URL of a model's page, relative to the board."""
    return local_link(*page_of(entry).parts)


def model_content(entry: Entry) -> dict[str, Any]:
    """Return the variables of ``board_model.html.j2``."""
    return {
        "title": entry.model_name,
        "published": entry.kind == "published",
        "subtitle": f"{dataset_title(entry.dataset)}, {entry.threat_model} at eps {entry.eps}{_extent(entry)}",
        "home": f"{HOME}/index.html",
        "cards": _cards(entry),
        "notes": [note for note in (entry.dataset_note, entry.footnote) if note],
        "figures": [_accuracy_row(name, each, entry.remeasured) for name, each in entry.figures.items()],
        "remeasured": bool(entry.remeasured),
        "curves": curves(entry.metrics),
        "checks": [check for status in ("fail", "warn") for check in entry.checks if check.status == status],
        "passed": [check for check in entry.checks if check.status == "pass"],
        "marks": MARKS,
        "load": _load(entry),
        "command": entry.command,
        "facts": [fact for fact in _facts(entry) if fact[1] not in (None, "", MISSING)],
    }


def _extent(entry: Entry) -> str:
    if entry.n_examples is None or entry.n_test is None:
        return ""
    part = f"{entry.n_examples:,} of {entry.n_test:,}" if entry.is_subset else f"all {entry.n_test:,}"
    return f", {part} test images"


def _cards(entry: Entry) -> list[dict[str, str]]:
    attack = "AutoAttack" if entry.external is None else "best known attack"
    cards = [
        ("natural accuracy", _with_unit(entry.clean_acc), ""),
        ("robust accuracy", _with_unit(entry.robust), attack),
        ("backward passes", count(entry.backward_passes), "mini-batches" if entry.backward_passes is not None else ""),
        ("training", duration(entry.train_seconds), entry.hardware or ""),
    ]
    if entry.checks:
        counts = count_checks(entry)
        passed = f"{counts['pass']} of {counts.total()}"
        cards.append(("checks passed", passed, f"{counts['fail']} fail, {counts['warn']} warn"))
    return [{"name": name, "value": value, "note": note} for name, value, note in cards]


def count_checks(entry: Entry) -> Counter[str]:
    """Count the checks by status, without the record of skipped checks."""
    return Counter(check.status for check in entry.checks if check.name != SKIPPED)


def _with_unit(accuracy: str | float | None) -> str:
    return MISSING if accuracy is None else f"{percent(accuracy)} %"


def _accuracy_row(name: str, accuracy: Accuracy, remeasured: Mapping[Any, Accuracy]) -> dict[str, Any]:
    again, (low, high) = remeasured.get(name), accuracy.interval
    return {
        "name": name,
        "natural": name == "natural",
        "accuracy": f"{accuracy.percent} %",
        "interval": f"{100 * low:.2f} to {100 * high:.2f}",
        "correct": f"{accuracy.n_correct:,} / {accuracy.n_examples:,}",
        "remeasured": f"{again.n_correct:,} / {again.n_examples:,}" if again else MISSING,
        "width": round(BAR * accuracy.accuracy, 1),
        "low": round(BAR * low, 1),
        "high": round(BAR * high, 1),
    }


def _load(entry: Entry) -> str | None:
    """Return three lines of Python that load the network, to be run in the board's folder."""
    if entry.weights_file is None:
        return None
    return (
        "import deat_rb  # run this in the board's folder\n"
        f"model = deat_rb.load_model({f'entries/{entry.key}.json'!r})\n"
        "logits = model(images)  # float in [0, 1], (N, C, H, W)"
    )


def _facts(entry: Entry) -> list[tuple[str, str | None, str | None]]:
    """Return the rows of the table of provenance: names, values and links."""
    facts = {
        "authors": entry.authors,
        "venue": entry.venue,
        "architecture": entry.architecture,
        "method": entry.method,
        "setting": entry.setting,
        "steps per epoch": ", ".join(map(str, entry.steps or ())),
        "epochs": _text(entry.epochs),
        "additional data": _text(entry.additional_data),
        "forward passes per prediction": _text(entry.number_forward_passes),
        "reported robust accuracy": _with_unit(entry.reported),
        "AutoAttack potentially unreliable": _text(entry.unreliable),
        "peak memory": memory(entry.peak_memory),
        "trained on": entry.hardware,
        "seed": _text(entry.seed),
        "classes": ", ".join(entry.classes or ()),
        "submitted": entry.submitted,
        "SHA-256 of the weights": entry.weights_sha256,
        "SHA-256 of the data": entry.data_sha256,
        "trained with": _text(entry.versions),
        "evaluated with": _text(entry.evaluated_with),
        "evaluated on": entry.evaluated_on,
    }
    paper = ("paper", entry.name or entry.link, web_link(entry.link))
    own = [f"entries/{entry.key}.json", *([entry.weights_file] if entry.weights_file else [])]
    files = [(name, place, f"{HOME}/{local_link(*PurePosixPath(place).parts)}")
             for name, place in zip(("entry", "weights"), own, strict=False)]  # fmt: skip
    return [paper, *((name, value, None) for name, value in facts.items()), *files]


def _text(value: bool | int | Mapping[str, str] | None) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return None if value is None else str(value)
