"""Ranking of a leaderboard's entries by robust accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deat_rb.leaderboard.entry import Entry
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.text import printable
from deat_rb.utils.units import parse_fraction

Part = Literal["full", "subset", "published"]

PARTS: dict[Part, str] = {
    "full": "whole test set",
    "subset": "part of the test set, not ranked",
    "published": "published results, not measured here",
}


@dataclass(frozen=True)
class RankedEntry:
    """An entry with its rank.

    Attributes:
        entry: The entry.
        rank: Rank, from 1, among full evaluations with the same dataset, threat model and eps; ties share a rank. None
            for other entries, for baselines (trained without adversarial examples) and without a robust accuracy.
        part: ``full``; ``subset`` (of the test set); or ``published`` (not measured by this board).
    """

    entry: Entry
    rank: int | None
    part: Part

    @property
    def group(self) -> tuple[str, str, float]:
        """Dataset, threat model and eps, within which entries are compared."""
        return _group(self.entry)


def _group(entry: Entry) -> tuple[str, str, float]:
    return entry.dataset, entry.threat_model, parse_fraction(entry.eps)


def _descending(value: str | float | None) -> float:
    return 1.0 if value is None else -float(value)


def _ascending(value: float | None) -> float:
    return float("inf") if value is None else value


SORTS: dict[str, Callable[[Entry], Any]] = {
    "rank": lambda entry: _descending(entry.robust),
    "autoattack": lambda entry: _descending(entry.autoattack_acc),
    "natural": lambda entry: _descending(entry.clean_acc),
    "fgsm": lambda entry: _descending(entry.percent("fgsm")),
    "pgd100": lambda entry: _descending(entry.percent("pgd-100")),
    "cw20": lambda entry: _descending(entry.percent("cw-20")),
    "cost": lambda entry: _ascending(entry.backward_passes),
    "seconds": lambda entry: _ascending(entry.train_seconds),
    "name": lambda entry: entry.model_name,
}
"""Sort keys of the table, best first; unknown values come last."""


def rank(entries: Sequence[Entry], *, dataset: str | None = None, sort: str = "rank") -> tuple[RankedEntry, ...]:
    """Rank entries by robust accuracy, the best known one or else AutoAttack's, as RobustBench does.

    Args:
        entries: A board's entries.
        dataset: Dataset to which the entries are restricted; by default all.
        sort: Order within a group, one of `SORTS`; ranks do not depend on it.

    Returns:
        The entries by group: full evaluations, then evaluations on part of the test set, then published results.

    Raises:
        DeatError: The dataset or the order is unknown.
    """
    if sort not in SORTS:
        raise DeatError(f"--sort {printable(sort, 40)} is unknown: {did_you_mean(sort, SORTS)}")
    known = sorted({entry.dataset for entry in entries})
    if dataset is not None and dataset not in known:
        raise DeatError(f"the board has no dataset '{printable(dataset, 40)}': {did_you_mean(dataset, known)}")
    chosen = [entry for entry in entries if dataset in (None, entry.dataset)]
    ranked = []
    for entry in chosen:
        place, part, robust = None, _part(entry), entry.robust
        if part == "full" and robust is not None and not is_baseline(entry):
            rivals = (other for other in chosen
                      if _part(other) == "full" and _group(other) == _group(entry) and not is_baseline(other)
                      )  # fmt: skip
            place = 1 + sum((other.robust or 0) > robust for other in rivals)
        ranked.append(RankedEntry(entry, place, part))
    order = list(PARTS)
    return tuple(
        sorted(ranked, key=lambda each: (each.group, order.index(each.part), SORTS[sort](each.entry), each.entry.key))
    )


def is_baseline(entry: Entry) -> bool:
    """Return whether an entry's network was trained without adversarial examples."""
    return entry.method == "standard"


def _part(entry: Entry) -> Part:
    if entry.kind == "published":
        return "published"
    return "subset" if entry.is_subset else "full"
