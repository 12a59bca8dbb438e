"""Loading of a board's stored weights, verified by SHA-256 and without executing code."""

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
        DeatError: The entry is invalid or misplaced, or its weights are not on the board or do not match its hash.
    """
    entry = read_entry(file)
    check_place(Path(file), entry)
    return entry, load_network(entry, Path(file).absolute().parents[3])


def load_network(entry: Entry, board: Path) -> NormalizedModel:
    """Load an entry's network in eval mode on the CPU.

    Raises:
        DeatError: The board does not store its weights, or the file does not match the entry's hash or architecture.
    """
    if entry.weights_file is None or entry.model is None:
        raise DeatError(f"the board does not store the weights of {entry.key}")
    weights = board / entry.weights_file
    check_hash(weights, entry)
    return load_checked(weights, entry.model, source=weights)


def check_hash(weights: Path, entry: Entry) -> None:
    """Check that a weights file has the SHA-256 in its entry.

    Raises:
        DeatError: The file cannot be read or has a different SHA-256.
    """
    digest = hashlib.sha256(read_limited(weights, MAX_WEIGHTS)).hexdigest()
    if digest != entry.weights_sha256:
        raise DeatError(f"{weights} has the SHA-256 {digest[:12]}..., but its entry has "
                        f"{str(entry.weights_sha256)[:12]}...: restore the file or resubmit the model")  # fmt: skip
