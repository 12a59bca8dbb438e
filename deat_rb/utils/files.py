"""Reading and writing files: whole or not at all, and never executing what was read."""

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
    """Writes a file so that at any moment, a power cut included, it is either the old one or the new one.

    Raises:
        UnwritableError: The disk is full, the folder is missing or read-only. Nothing is left behind.
    """
    write_all({Path(path): data})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Writes several files like `atomic_write`, none before all of them are complete on the disk.

    Raises:
        UnwritableError: One cannot be written. None has been then.
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
    if os.name == "nt":  # Windows cannot open a folder, and does not need it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, content: Any) -> None:
    """Writes JSON, indented and in UTF-8, atomically.

    Raises:
        DeatError: It cannot be written, or holds NaN or infinity, which JSON has no word for.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise DeatError(f"cannot write {path}: JSON has no NaN or infinity ({error})") from error
    atomic_write(path, text.encode() + b"\n")


def read_json(path: Path | str) -> Any:
    """Reads a JSON file.

    Raises:
        DeatError: It is missing, not UTF-8, not JSON, or holds NaN or infinity.
    """
    try:
        return json.loads(read_bytes(path).decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DeatError):
            raise
        raise DeatError(f"{path} is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_bytes(path: Path | str) -> bytes:
    """Reads a file whole.

    Raises:
        DeatError: It is missing, a folder, or not readable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise DeatError(f"{path} is a folder where a file is needed")
        return path.read_bytes()
    except FileNotFoundError:
        raise DeatError(f"{path} does not exist") from None
    except OSError as error:
        raise DeatError(f"cannot read {path}: {error.strerror or error}") from error


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(read_bytes(path)).hexdigest()
