"""What the page of one model of the leaderboard shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from deat_rb.evaluation.html_report import BAR, MARKS
from deat_rb.evaluation.report import SKIPPED
from deat_rb.leaderboard.entry import Accuracy, Entry
from deat_rb.leaderboard.pages.charts import curves
from deat_rb.leaderboard.pages.format import MISSING, count, duration, local_link, memory, percent, web_link
from deat_rb.robustbench.format import SPELLED


def page_of(entry: Entry) -> PurePosixPath:
    """Where a model's page lies in the board."""
    return PurePosixPath("models", entry.dataset, entry.threat_model, f"{entry.model_name}.html")


def link_of(entry: Entry) -> str:
    """The relative address of a model's page, from the board's folder."""
    return local_link(*page_of(entry).parts)


def spelled(dataset: str) -> str:
    """A data set's name as people write it."""
    return {"digits": "Digits"}.get(dataset, SPELLED.get(dataset, dataset))


def model_content(entry: Entry) -> dict[str, Any]:
    """All that a model's page shows.

    Args:
        entry: The model's.
    """
    return {
        "title": entry.model_name,
        "published": entry.kind == "published",
        "subtitle": f"{spelled(entry.dataset)}, {entry.threat_model} at eps {entry.eps}{_extent(entry)}",
        "home": "../../../index.html",
        "cards": _cards(entry),
        "notes": [note for note in (entry.dataset_note, entry.footnote) if note],
        "figures": [_figure_row(name, figure, entry.remeasured) for name, figure in entry.figures.items()],
        "remeasured": bool(entry.remeasured),
        "curves": curves(entry.metrics),
        "checks": sorted(entry.checks, key=lambda check: ("fail", "warn", "pass").index(check.status)),
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
    decisive = "AutoAttack" if entry.external is None else "best known attack"
    cards = [
        ("natural accuracy", _with_unit(entry.clean_acc), ""),
        ("robust accuracy", _with_unit(entry.robust), decisive),
        ("backward passes", count(entry.backward_passes), "mini-batches" if entry.backward_passes is not None else ""),
        ("training", duration(entry.train_seconds), entry.hardware or ""),
    ]
    if entry.checks:
        counts = count_checks(entry)
        passed = f"{counts['pass']} of {counts.total()}"
        cards.append(("checks passed", passed, f"{counts['fail']} fail, {counts['warn']} warn"))
    return [{"name": name, "value": value, "note": note} for name, value, note in cards]


def count_checks(entry: Entry) -> Counter[str]:
    """How many checks passed, failed or warned; the last, which says what was left out, is none."""
    return Counter(check.status for check in entry.checks if check.name != SKIPPED)


def _with_unit(figure: str | float | None) -> str:
    return MISSING if figure is None else f"{percent(figure)} %"


def _figure_row(name: str, figure: Accuracy, remeasured: Mapping[Any, Accuracy]) -> dict[str, Any]:
    again = remeasured.get(name)
    return {
        "name": name,
        "natural": name == "natural",
        "accuracy": f"{100 * figure.accuracy:.2f} %",
        "interval": f"{100 * figure.low:.2f} to {100 * figure.high:.2f}",
        "correct": f"{figure.n_correct:,} / {figure.n_examples:,}",
        "remeasured": f"{again.n_correct:,} / {again.n_examples:,}" if again else MISSING,
        "width": round(BAR * figure.accuracy, 1),
        "low": round(BAR * figure.low, 1),
        "high": round(BAR * figure.high, 1),
    }


def _load(entry: Entry) -> str | None:
    """Three lines that load the network, run in the board's folder."""
    if entry.weights_file is None:
        return None
    return (
        "import deat_rb  # run this in the board's folder\n"
        f"model = deat_rb.load_model({f'entries/{entry.key}.json'!r})\n"
        "logits = model(images)  # float in [0, 1], (N, C, H, W)"
    )


def _facts(entry: Entry) -> list[tuple[str, str | None, str | None]]:
    """Name, value and link."""
    steps = ", ".join(f"{step:g}" for step in entry.steps) if entry.steps else None
    facts = {
        "authors": entry.authors,
        "venue": entry.venue,
        "architecture": entry.architecture,
        "method": entry.method,
        "setting": entry.setting,
        "steps per epoch": steps,
        "epochs": _text(entry.epochs),
        "additional data": _yes_or_no(entry.additional_data),
        "forward passes per prediction": _text(entry.number_forward_passes),
        "reported robust accuracy": _with_unit(entry.reported),
        "AutoAttack perhaps unreliable": _yes_or_no(entry.unreliable),
        "peak memory": memory(entry.peak_memory),
        "trained on": entry.hardware,
        "seed": _text(entry.seed),
        "classes": ", ".join(entry.classes) if entry.classes else None,
        "submitted": entry.submitted,
        "SHA-256 of the weights": entry.weights_sha256,
        "SHA-256 of the data": entry.data_sha256,
        "trained with": _versions(entry.versions),
        "evaluated with": _versions(entry.evaluated_with),
        "evaluated on": entry.evaluated_on,
    }
    paper = ("paper", entry.name or entry.link, web_link(entry.link))
    return [paper, *((name, value, None) for name, value in facts.items())]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


def _yes_or_no(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"
