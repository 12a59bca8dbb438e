"""The weights that a board stores: read, compared with their SHA-256, and loaded without executing code."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deat_rb.leaderboard.entry import Entry, check_place, read_entry
from deat_rb.leaderboard.untrusted import read_limited
from deat_rb.leaderboard.untrusted_weights import MAX_WEIGHTS, load_checked
from deat_rb.models.spec import NormalizedModel
from deat_rb.utils.errors import DeatError


def open_entry(file: str | Path) -> tuple[Entry, NormalizedModel]:
    """Read an entry from its place in a board and load its network.

    Args:
        file: ``BOARD/entries/<dataset>/<threat>/<model_name>.json``.

    Returns:
        The entry, and the network in eval mode on the CPU.

    Raises:
        DeatError: It is not a valid entry or in the wrong place, or the board has no weights or other weights for it.
    """
    entry = read_entry(file)
    check_place(Path(file), entry)
    return entry, load_network(entry, Path(file).absolute().parents[3])


def load_network(entry: Entry, board: Path) -> NormalizedModel:
    """Load an entry's network in eval mode on the CPU.

    Raises:
        DeatError: The board does not store its weights, or the file is another than the entry says or does not fit.
    """
    if entry.weights_file is None or entry.model is None:
        raise DeatError(f"the board does not store the weights of {entry.key}")
    weights = board / entry.weights_file
    check_hash(weights, entry)
    return load_checked(weights, entry.model, source=weights)


def check_hash(weights: Path, entry: Entry) -> None:
    """Compare a file of weights with the SHA-256 of its entry.

    Raises:
        DeatError: It cannot be read or differs.
    """
    digest = hashlib.sha256(read_limited(weights, MAX_WEIGHTS)).hexdigest()
    if digest != entry.weights_sha256:
        raise DeatError(f"{weights} has the SHA-256 {digest[:12]}..., but its entry says "
                        f"{str(entry.weights_sha256)[:12]}...: these are other weights")  # fmt: skip
