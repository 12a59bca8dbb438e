"""What a pickle would do, read from its opcodes without unpickling it."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deat_rb.errors import DeatError

MOST_SHARED = 32
"""How often a pickle may name a tuple again: a hash goes through each anew, up to 3 ** (32 / 3) of them in all."""
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_PUTS, _GETS = ({f"{size}{verb}" for size in ("", "BIN", "LONG_BIN")} for verb in ("PUT", "GET"))


def opcodes(pickle: bytes | BinaryIO, source: Path | str) -> Iterator[tuple[str, Any]]:
    """Reads one pickle's opcodes, each with its argument; a file is left behind the pickle's end.

    Args:
        pickle: It, or a file that is at its beginning.
        source: Where it comes from, for messages.

    Raises:
        DeatError: It has tuples that are there again and again: a kilobyte of them, in one another, takes years to
            hash, in torch's safe loader as well.
        ValueError: It is damaged.
    """
    tuples: set[Any] = set()
    on_top, again = False, 0
    for opcode, argument, _ in pickletools.genops(pickle):
        again += opcode.name in _GETS and argument in tuples
        if again > MOST_SHARED:
            raise DeatError(
                f"{source} has tuples in its pickle that are there again and again: in one another, they take years "
                "to hash; save only the weights, with torch.save(model.state_dict(), path)"
            )
        if opcode.name in _PUTS and on_top:
            tuples.add(argument)
        on_top = opcode.name in _TUPLES or (on_top and opcode.name in {"PROTO", *_PUTS})
        yield opcode.name, argument
