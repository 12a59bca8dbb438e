"""The leaderboard as a table: who stands where, and how that is written for terminals, programs and papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deat_rb.leaderboard.entry import Entry
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.text import printable
from deat_rb.utils.units import parse_fraction

if TYPE_CHECKING:
    pass


Part = Literal["full", "subset", "published"]

PARTS: dict[Part, str] = {
    "full": "whole test set",
    "subset": "part of the test set, not ranked",
    "published": "published figures, not measured here",
}


@dataclass(frozen=True)
class RankedEntry:
    """An entry in the table.

    Attributes:
        entry: The entry.
        rank: From 1 on, among the full evaluations of the same data set, threat model and eps; equals share one. None
            for others.
        part: ``full``; ``subset``, of a part of the test set; or ``published``, which nobody measured here.
    """

    entry: Entry
    rank: int | None
    part: Part

    @property
    def group(self) -> tuple[str, str, float]:
        """What it may be compared within: data set, threat model and eps."""
        return self.entry.dataset, self.entry.threat_model, parse_fraction(self.entry.eps)


def _descending(value: float | None) -> float:
    return 1.0 if value is None else -value


def _ascending(value: float | None) -> float:
    return float("inf") if value is None else value


SORTS: dict[str, Callable[[Entry], Any]] = {
    "rank": lambda entry: _descending(entry.robust),
    "autoattack": lambda entry: _descending(None if entry.autoattack_acc is None else float(entry.autoattack_acc)),
    "natural": lambda entry: _descending(None if entry.clean_acc is None else float(entry.clean_acc)),
    "fgsm": lambda entry: _descending(entry.percent("fgsm")),
    "pgd100": lambda entry: _descending(entry.percent("pgd-100")),
    "cw20": lambda entry: _descending(entry.percent("cw-20")),
    "cost": lambda entry: _ascending(entry.backward_passes),
    "seconds": lambda entry: _ascending(entry.train_seconds),
    "name": lambda entry: entry.model_name,
}
"""What a table may be sorted by, the best first."""


def rank(entries: Sequence[Entry], *, dataset: str | None = None, sort: str = "rank") -> tuple[RankedEntry, ...]:
    """Ranks entries by robust accuracy, the best known one or else AutoAttack's, as RobustBench does.

    Args:
        entries: Of a board.
        dataset: Only of this data set.
        sort: The order within a group, one of `SORTS`; a rank does not depend on it.

    Returns:
        By group; in each the full evaluations, then those of a part of the test set, then what was only published.

    Raises:
        DeatError: There is no such data set on the board, or no such order.
    """
    if sort not in SORTS:
        raise DeatError(f"there is no order '{printable(sort, 40)}': {did_you_mean(sort, SORTS)}")
    known = sorted({entry.dataset for entry in entries})
    if dataset is not None and dataset not in known:
        raise DeatError(f"the board has no entries of '{printable(dataset, 40)}': {did_you_mean(dataset, known)}")
    chosen = [entry for entry in entries if dataset in (None, entry.dataset)]
    full: dict[tuple[str, str, float], list[float]] = {}
    for entry in chosen:
        if _part(entry) == "full" and entry.robust is not None:
            full.setdefault(RankedEntry(entry, None, "full").group, []).append(entry.robust)
    standings = []
    for entry in chosen:
        standing = RankedEntry(entry, None, _part(entry))
        if standing.part == "full" and entry.robust is not None:
            place = 1 + sum(other > entry.robust for other in full[standing.group])
            standing = RankedEntry(entry, place, "full")
        standings.append(standing)
    order = list(PARTS)
    return tuple(
        sorted(
            standings, key=lambda each: (each.group, order.index(each.part), SORTS[sort](each.entry), each.entry.key)
        )
    )


def _part(entry: Entry) -> Part:
    if entry.kind == "published":
        return "published"
    return "subset" if entry.is_subset else "full"
