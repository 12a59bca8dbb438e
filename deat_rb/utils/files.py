"""Atomic writing of files, and reading of files and JSON with error messages for the user."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from deat_rb.utils.errors import DeatError, UnwritableError


def atomic_write(path: Path | str, data: bytes) -> None:
    """Write a file atomically: even after a power failure, either the old or the new version exists.

    Raises:
        UnwritableError: The disk is full, or the folder is missing or read-only. No temporary file is left.
    """
    write_all({Path(path): data})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files as `atomic_write` does; none is replaced before the contents of all are on the disk.

    Raises:
        UnwritableError: The contents of a file cannot be written; then no file is replaced.
    """
    staged = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in contents}
    path = Path()
    try:
        for path, data in contents.items():
            _write_synced(staged[path], data)
        for path, complete in staged.items():
            os.replace(complete, path)
        for folder in {path.parent for path in contents}:
            _sync_folder(folder)
    except OSError as error:
        raise UnwritableError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        for incomplete in staged.values():
            with contextlib.suppress(OSError):
                incomplete.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened on Windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, content: Any) -> None:
    """Write indented JSON in UTF-8, atomically.

    Raises:
        DeatError: The file cannot be written, or the content has NaN, infinity or invalid Unicode.
    """
    try:
        data = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        name = next(line for line in error.object.splitlines() if not _is_unicode(line))
        readable = name.strip(" ,").encode("utf-8", "backslashreplace").decode()
        raise DeatError(f"cannot write {path}: {readable} is not UTF-8; rename the file or folder") from error
    except ValueError as error:
        raise DeatError(f"cannot write {path}: JSON does not support NaN and infinity ({error})") from error
    atomic_write(path, data + b"\n")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        DeatError: The file is missing, is not UTF-8 or not valid JSON, or contains NaN or infinity.
    """
    try:
        return json.loads(read_bytes(path).decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DeatError):
            raise
        raise DeatError(f"{path} is not valid JSON: {error}; restore or replace the file") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_bytes(path: Path | str) -> bytes:
    """Read a whole file.

    Raises:
        DeatError: The file is missing, is a folder, or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise DeatError(f"{path} is a folder; give a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise DeatError(f"{path} does not exist") from None
    except OSError as error:
        raise DeatError(f"cannot read {path}: {error.strerror or error}") from error


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def cache_folder(name: str) -> Path:
    """Return the user's cache folder for ``name`` according to the XDG base directory specification."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "deat-rb" / name
