"""The networks that a leaderboard holds: hashed, looked through and built without executing anything of theirs."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import cast

from deat_rb.leaderboard.entry import Entry, read_entry
from deat_rb.leaderboard.untrusted import read_limited
from deat_rb.leaderboard.untrusted_weights import MAX_WEIGHTS, copy_untrusted_weights, load_checked
from deat_rb.models.spec import ModelSpec, NormalizedModel
from deat_rb.utils.errors import DeatError


def open_entry(file: str | Path) -> tuple[Entry, NormalizedModel]:
    """Reads an entry where it lies in its board, and loads its network.

    Args:
        file: ``BOARD/entries/<dataset>/<threat>/<model_name>.json``.

    Returns:
        The entry, and the network in eval mode on the CPU.

    Raises:
        DeatError: It is no entry or lies elsewhere, or the board does not hold its weights or holds others.
    """
    entry = read_entry(file)
    path = Path(file).absolute()
    if path.parts[-4:] != ("entries", *entry.key.split("/")[:-1], f"{entry.model_name}.json"):
        raise DeatError(f"{file} is the entry of {entry.key}, and lies in the wrong place: its weights are looked for "
                        f"beside a board's entries/{entry.key}.json")  # fmt: skip
    board = path.parents[3]
    return entry, load_network(entry, board)


def load_network(entry: Entry, board: Path) -> NormalizedModel:
    """Loads an entry's network, in eval mode on the CPU.

    Raises:
        DeatError: The board does not hold it, or the file is another than the entry says, is not to be trusted or does
            not fit.
    """
    weights = stored_weights(entry, board)
    with tempfile.TemporaryDirectory(prefix="deat-rb-") as scratch:
        copy = Path(scratch, weights.name)
        copy_untrusted_weights(weights, copy)
        _check_digest(copy.read_bytes(), weights, entry)
        return load_checked(copy, cast(ModelSpec, entry.model), source=weights)


def check_hash(weights: Path, entry: Entry) -> None:
    """Holds a file of weights against the SHA-256 that an entry states.

    Raises:
        DeatError: It is not to be had, or is another.
    """
    _check_digest(read_limited(weights, MAX_WEIGHTS), weights, entry)


def _check_digest(data: bytes, weights: Path, entry: Entry) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != entry.weights_sha256:
        raise DeatError(f"{weights} has the SHA-256 {actual[:12]}..., and its entry says "
                        f"{str(entry.weights_sha256)[:12]}...: these are other weights")  # fmt: skip


def stored_weights(entry: Entry, board: Path) -> Path:
    """Where an entry's weights are.

    Raises:
        DeatError: The board does not hold them.
    """
    if entry.weights_file is None or entry.model is None:
        raise DeatError(f"the board does not hold the weights of {entry.key}")
    return board / entry.weights_file
