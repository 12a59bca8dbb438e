"""Files that strangers hand in, read as such: of bounded size, no links, no code, no second meaning."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import is_invisible, printable

MAX_JSON = 4 * 2**20
"""Bytes of a JSON file; the metrics of a thousand epochs take half a megabyte."""

MAX_DEPTH = 32

MAX_KEYS = 1000
"""Of one JSON object."""

_BLANK = set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""What is drawn as nothing although Unicode calls it a letter, a mark or a symbol."""

_SELECTORS = {chr(code) for code in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))}
"""How the symbol before them is drawn; nothing by themselves."""

MOST_MARKS = 2
"""Combining marks that a letter of a real name carries; with more they grow over the lines above and below."""

FORMULA = r"(^|[;\t\r\n])(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])"
"""Where a spreadsheet may see a formula begin: full-width signs count, and ; separates cells in half of Europe."""

_MATHS = {"ell", "infty", "epsilon", "varepsilon", "approx", "times", "leq", "geq", "pm", "alpha", "beta", "gamma",
          "lambda", "mu", "sigma", "tau"}  # fmt: skip
"""What RobustBench's footnotes and titles write in TeX."""


def plain(text: str) -> str:
    """Gives back one line of text that nothing which prints it would take for more than text.

    What is refused here would be escaped by the board's own pages and tables; others read the files as well.

    Raises:
        ValueError: It has unseen characters, or would be markup, a formula, or a command in HTML, Markdown, TeX or CSV.
    """
    unseen = next((char for char in text if is_invisible(char)), None)
    if unseen is not None:
        raise ValueError(f"has the character U+{ord(unseen):04X}, which is not seen when it is printed")
    if text != text.strip():
        raise ValueError("begins or ends with a space")
    _check_drawn(text)
    if re.search(r"<[A-Za-z/!?]|&#|&\w+;", text):
        raise ValueError("has HTML in it, and plain text is wanted")
    if re.search(r"\]\s*\(|`|\|", text):
        raise ValueError("has Markdown in it (a link, a backtick or |), and plain text is wanted")
    formula = re.search(FORMULA, text)
    if formula is not None:
        where = f"has {text[formula.end()]} after {formula[1]}" if formula[1] else f"begins with {text[formula.end()]}"
        raise ValueError(f"{where}, which spreadsheets take for a formula")
    commands = [name for name in re.findall(r"\\([A-Za-z@]+|$)", text) if name not in _MATHS]
    if commands or re.search(r"\^\^", text):
        raise ValueError(f"has the TeX command \\{commands[0] if commands else '^^'}, and plain text is wanted")
    return text


def _check_drawn(text: str) -> None:
    marks = 0
    for before, char in zip(" " + text, text, strict=False):
        marks = marks + 1 if unicodedata.category(char).startswith("M") else 0
        if char in _BLANK or (char in _SELECTORS and unicodedata.category(before) != "So"):
            raise ValueError(f"has the character U+{ord(char):04X}, of which nothing is seen")
        if marks > MOST_MARKS:
            raise ValueError(f"has more than {MOST_MARKS} marks on one letter")


def seen(text: str) -> str:
    """Gives back text without unseen characters and HTML, which may otherwise hold what it likes.

    Raises:
        ValueError: It has some.
    """
    if any(is_invisible(char) for char in text) or re.search(r"<[A-Za-z/!?]", text):
        raise ValueError("has characters that are not seen when it is printed, or HTML")
    return text


def read_limited(path: Path, limit: int) -> bytes:
    """Reads a regular file that has no more than ``limit`` bytes.

    Raises:
        DeatError: It is missing, a link, no regular file or too large. Nothing of a file that is too large is read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise DeatError(f"{path} is a link: hand in the file itself") from None
        raise DeatError(f"cannot read {path}: {error.strerror or error}") from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
        os.close(descriptor)
        if stat.S_ISREG(facts.st_mode):
            raise DeatError(f"{path} is too large: it has {facts.st_size} bytes, and {limit} are allowed")
        raise DeatError(f"{path} is no regular file: hand in files")
    try:
        with open(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DeatError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise DeatError(f"{path} grows while it is read, past the {limit} bytes that are allowed")
    return data


def symlink_in_path(folder: Path, place: str | Path) -> Path | None:
    """The first link, or step back, on the way from a folder to a place below it; None where there is none."""
    path = folder
    for part in Path(place).parts:
        path = path / part
        if path.is_symlink() or part == "..":
            return path
    return None


def parse_json(data: bytes, source: str, *, depth: int = MAX_DEPTH) -> Any:
    """Reads JSON that means the same to everyone.

    Raises:
        DeatError: It is not UTF-8, not JSON, nested deeper than ``depth``, names a key twice, or holds NaN.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > MAX_KEYS:
            raise DeatError(f"{source} has an object with {len(pairs)} keys, and {MAX_KEYS} are allowed")
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise DeatError(f"{source} has the key '{printable(name, 60)}' twice in one object")
            found[name] = value
        return found

    def refuse(name: str) -> NoReturn:
        raise DeatError(f"{source} has the number {printable(name, 40)}, which is not finite")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits)

    try:
        text = data.decode()
        if _depth(text) > depth:
            raise DeatError(f"{source} is nested deeper than {depth} levels")
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
    except DeatError:
        raise
    except (ValueError, RecursionError) as error:
        raise DeatError(f"{source} is not valid JSON: {printable(str(error), 120)}") from None


def _depth(text: str) -> int:
    """How deep brackets are nested outside of strings, in one pass: a string without an end goes to the end."""
    deepest = now = 0
    for bracket in re.finditer(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', text, re.DOTALL):
        char = bracket[0]
        if char in "[{":
            now += 1
            deepest = max(deepest, now)
        elif char in "]}":
            now -= 1
    return deepest


def read_strict_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Reads a stranger's JSON file; see `read_limited` and `parse_json`."""
    return parse_json(read_limited(path, limit), str(path))
