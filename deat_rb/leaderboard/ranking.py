"""Ranking of a leaderboard's entries by robust accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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


class Images(NamedTuple):
    """The test images of an entry; two boards that were merged may have different ones under one dataset name."""

    data_sha256: str | None
    n_test: int | None
    note: str | None


def images_of(entry: Entry) -> Images:
    """Return the test images of an entry."""
    return Images(entry.data_sha256, entry.n_test, entry.dataset_note)


class Group(NamedTuple):
    """What the entries of one table share; only they are compared with each other.

    Attributes:
        dataset: Name of the dataset.
        threat_model: Norm of the attacks.
        eps: Radius of the attacks.
        images: The test images, if the board measured on several under this dataset name; else, and for published
            results, None.
        subset: Number of evaluated images, if only part of the test set was evaluated.
    """

    dataset: str
    threat_model: str
    eps: str
    images: Images | None
    subset: int | None

    @property
    def conditions(self) -> str:
        """Everything but the dataset's name, for a heading."""
        images = self.images and f", data {(self.images.data_sha256 or '')[:12]} of {self.images.n_test:,} images"
        subset = f", {self.subset:,} test images" if self.subset else ""
        return f"{self.threat_model}, eps {self.eps}{images or ''}{subset}"


@dataclass(frozen=True)
class RankedEntry:
    """An entry with its rank.

    Attributes:
        entry: The entry.
        rank: Rank, from 1, among full evaluations of the same group; ties share a rank. None for other entries, for
            baselines (trained without adversarial examples) and without a robust accuracy.
        part: ``full``; ``subset`` (of the test set); or ``published`` (not measured by this board).
        group: The group within which the entry is compared.
    """

    entry: Entry
    rank: int | None
    part: Part
    group: Group


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
    images = defaultdict(set)
    for entry in entries:
        if entry.kind == "measured":
            images[entry.dataset].add(images_of(entry))
    several = {name for name, found in images.items() if len(found) > 1}
    chosen = [(entry, _group(entry, several)) for entry in entries if dataset in (None, entry.dataset)]
    ranked = []
    for entry, group in chosen:
        place, part, robust = None, _part(entry), entry.robust
        if part == "full" and robust is not None and not is_baseline(entry):
            rivals = (other for other, others in chosen
                      if _part(other) == "full" and others == group and not is_baseline(other))  # fmt: skip
            place = 1 + sum((other.robust or 0) > robust for other in rivals)
        ranked.append(RankedEntry(entry, place, part, group))
    return tuple(sorted(ranked, key=lambda each: (*_order(each), SORTS[sort](each.entry), each.entry.key)))


def _group(entry: Entry, several: Container[str]) -> Group:
    images = images_of(entry) if entry.kind == "measured" and entry.dataset in several else None
    return Group(entry.dataset, entry.threat_model, entry.eps, images, entry.n_examples if entry.is_subset else None)


def _order(ranked: RankedEntry) -> tuple[Any, ...]:
    group = ranked.group
    return (group.dataset, group.threat_model, parse_fraction(group.eps), str(group.images),
            list(PARTS).index(ranked.part), group.subset or 0)  # fmt: skip


def is_baseline(entry: Entry) -> bool:
    """Return whether an entry's network was trained without adversarial examples."""
    return entry.method == "standard"


def _part(entry: Entry) -> Part:
    if entry.kind == "published":
        return "published"
    return "subset" if entry.is_subset else "full"
