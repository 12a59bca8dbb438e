"""Matching of a dataset's labels with a network's logits by class name."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deat_rb.models.check import first_line
from deat_rb.models.names import suggest
from deat_rb.utils.errors import DeatError


@dataclass(frozen=True)
class MatchedClasses:
    """Result of `match_classes`.

    Attributes:
        classes: Class names in the order of the logits.
        logit_of_class: Index of the logit of each class of the dataset; empty if labels are logit indices.
        note: Note to the user on how labels were matched; may be empty.
    """

    classes: tuple[str, ...]
    logit_of_class: tuple[int, ...] = ()
    note: str = ""


def match_classes(
    classes: Sequence[str],
    known: Sequence[str],
    num_logits: int,
    *,
    source: str,
    dataset: str,
    must_match: bool = True,
) -> MatchedClasses:
    """Match a dataset's labels with a network's logits, by name if the network's class names are known.

    Args:
        classes: The dataset's class names, in the order of its labels.
        known: The network's class names, in the order of its logits; empty if unknown.
        num_logits: Number of the network's logits.
        source: Name of the network, for messages.
        dataset: Name of the dataset, for messages.
        must_match: Whether to refuse a dataset with none of the network's classes; if False, names are then ignored.

    Raises:
        DeatError: The network lacks one of the dataset's classes, or has no class names and fewer logits than the
            dataset has classes (for a folder: a different number).
    """
    if known and must_match and len(known) != num_logits:
        raise DeatError(f"{source} has {num_logits} logits but {len(known)} class names: give one name per logit")
    classes, known = ([unicodedata.normalize("NFC", name) for name in names] for names in (classes, known))
    counts = Counter(known)
    if known and must_match and max(counts.values()) > 1:
        raise DeatError(f"{source} has the class '{counts.most_common(1)[0][0]}' twice: give unique class names")
    if known and (must_match or any(name in counts for name in classes)):
        for name in classes:
            if name not in counts:
                advice = "rename or remove the class" if dataset == "folder" else f"name the classes as {dataset} does"
                raise DeatError(
                    f"{dataset} has the class '{name}', which {source} lacks ({suggest(name, known)}): {advice}"
                )
            if counts[name] > 1:
                raise DeatError(f"{source} has {counts[name]} classes '{name}': give unique names with --classes FILE")
        logits = tuple(known.index(name) for name in classes)
        if logits == tuple(range(len(classes))):
            return MatchedClasses(tuple(known))
        part = f"{len(classes)} of {len(known)}" if len(classes) < len(known) else f"all {len(known)}"
        return MatchedClasses(tuple(known), logits, f"labels were matched to logits by class name ({part} classes)")
    more = num_logits > len(classes) and dataset != "folder"
    if num_logits != len(classes) and not more:
        few = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        raise DeatError(
            f"{source} has {num_logits} logits, but {dataset} has {len(classes)} classes ({few}): give the network's "
            "class names with --classes FILE, one per line in the order of the logits"
        )
    note = ""
    if known or more or dataset == "folder":
        order = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        which = f"the first {len(classes)} of {num_logits} logits" if more else "logits"
        note = f"{which} are assumed to be in this order of classes: {order}; --classes FILE matches them by name"
    return MatchedClasses(tuple(classes), (), note)


def read_class_names(file: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one per line in the order of a network's logits.

    Raises:
        DeatError: The file cannot be read, or has fewer than two names, an empty line or a duplicate name.
    """
    try:
        names = tuple(line.strip() for line in Path(file).read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DeatError(f"--classes {file} cannot be read ({first_line(error)}): give a text file with one class name "
                        "per line") from error  # fmt: skip
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or "" in names or twice:
        problem = "an empty line" if "" in names else f"'{twice[0]}' twice" if twice else f"{len(names)} names"
        raise DeatError(f"--classes {file} has {problem}: give two or more unique class names, one per line")
    return names
