"""Readers for untrusted files and text: size limits, no symlinks, strict JSON, plain text."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import FORMULA, is_invisible, printable

MAX_JSON = 4 * 2**20
"""Largest JSON file in bytes; the metrics of a thousand epochs take half a megabyte."""

_BLANK = set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters, marks and symbols (by their Unicode category) that are rendered as blank space."""

_MATH = {"ell", "infty", "epsilon", "varepsilon", "approx", "times", "leq", "geq", "pm", "alpha", "beta", "gamma",
         "lambda", "mu", "sigma", "tau"}  # fmt: skip
"""TeX commands that RobustBench's footnotes and titles contain."""


def plain(text: str) -> str:
    """Return a line of text that is plain text to browsers, terminals, spreadsheets, Markdown and TeX alike.

    Raises:
        ValueError: The text has invisible characters, HTML, Markdown, a formula or a TeX command.
    """
    invisible = next((char for char in text if char in _BLANK or is_invisible(char)), None)
    if invisible is not None:
        raise ValueError(f"has the invisible character U+{ord(invisible):04X}")
    if text != text.strip():
        raise ValueError("begins or ends with a space")
    if re.search(r"<[A-Za-z/!?]|&#|&\w+;", text):
        raise ValueError("has HTML in it; only plain text is allowed")
    if re.search(r"\]\s*\(|`|\|", text):
        raise ValueError("has Markdown in it (a link, a backtick or |); only plain text is allowed")
    if formula := re.search(FORMULA, text):
        where = f"has {text[formula.end()]} after {formula[1]}" if formula[1] else f"begins with {text[formula.end()]}"
        raise ValueError(f"{where}, which spreadsheets read as a formula")
    commands = [name for name in re.findall(r"\\([A-Za-z@]+|$)", text) if name not in _MATH]
    if commands or "^^" in text:
        raise ValueError(f"has the TeX command \\{commands[0] if commands else '^^'}; only plain text is allowed")
    return text


def visible(text: str) -> str:
    """Return free-form text (a check's sentence), which may have TeX or Markdown but no invisible characters or HTML.

    Raises:
        ValueError: The text has invisible characters or HTML.
    """
    if any(map(is_invisible, text)) or re.search(r"<[A-Za-z/!?]", text):
        raise ValueError("has invisible characters or HTML")
    return text


def read_limited(path: Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        DeatError: The file is missing, a symlink, not a regular file, or too large.
    """
    # O_NONBLOCK: opening a pipe must not wait for a writer. Windows has neither flag, nor pipes in folders.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            raise DeatError(f"{path} is a symlink; submit the file itself")
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DeatError(f"{path} is not a regular file")
            data = file.read(limit + 1) if status.st_size <= limit else b""
            if status.st_size > limit or len(data) > limit:
                raise DeatError(f"{path} is too large: {status.st_size} bytes (at most {limit})")
            return data
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise DeatError(f"{path} is not a regular file") from None
        raise DeatError(f"cannot read {path}: {error.strerror or error}") from None


def symlink_in_path(folder: Path, place: str | Path) -> Path | None:
    """Return the first symlink or ``..`` in a path relative to a folder, or None."""
    path = folder
    for part in Path(place).parts:
        path = path / part
        if path.is_symlink() or part == "..":
            return path
    return None


def parse_json(data: bytes, source: str) -> Any:
    """Parse strict JSON.

    Raises:
        DeatError: The data are not UTF-8 or not JSON, repeat a key, or contain NaN or infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise DeatError(f"{source} has the key '{printable(repeated, 60)}' twice in one object")
        return dict(pairs)

    def refuse(name: str) -> NoReturn:
        raise DeatError(f"{source} has the number {printable(name, 40)}, which is not finite")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits)

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DeatError):
            raise
        raise DeatError(f"{source} is not valid JSON: {printable(str(error), 120)}") from None


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """Parse strict JSON that is an object; see `parse_json`."""
    content = parse_json(data, source)
    if not isinstance(content, dict):
        raise DeatError(f"{source} is not a JSON object")
    return content
