"""Training record of a submitted run: metrics, totals, and the command to reproduce it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deat_rb.leaderboard.entry import MAX_EPOCHS
from deat_rb.leaderboard.fields import Row
from deat_rb.leaderboard.untrusted import parse_json_object
from deat_rb.runs.config import RunConfig
from deat_rb.runs.defaults import DEFAULT_TEXTS
from deat_rb.runs.options import TrainOptions, train_options
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError
from deat_rb.utils.hub import is_hub
from deat_rb.utils.records import describe_validation_error

_METRICS_ROW = TypeAdapter(Row, config=ConfigDict(strict=True))


def metrics_rows(path: Path, source: Path) -> list[dict[str, int | float | None]]:
    """Read the metrics of each epoch, accepting only numbers."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    if len(lines) > MAX_EPOCHS:
        raise DeatError(f"{source} has {len(lines)} lines (at most {MAX_EPOCHS} epochs)")
    known = set(EpochStats.__dataclass_fields__) - {"stopped", "val_class_acc", "val_class_robust_acc"}
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse_json_object(line, f"{source}, line {number}")
        try:
            rows.append(_METRICS_ROW.validate_python({name: row[name] for name in row if name in known}))
        except ValidationError as error:
            raise DeatError(f"{source}, line {number}: {describe_validation_error(error)}") from None
    return rows


def training_facts(config: RunConfig, rows: list[dict[str, int | float | None]]) -> dict[str, Any]:
    """Return the entry fields that are taken from a run's configuration and metrics."""
    totals: dict[str, Any] = {}
    if rows:
        totals = {
            "steps": tuple(row.get("steps") or 0 for row in rows),
            "epochs": len(rows),
            "backward_passes": float(sum(row.get("backwards") or 0 for row in rows)),
            "train_seconds": float(sum(row.get("seconds") or 0 for row in rows)),
            "peak_memory": max(row.get("peak_memory") or 0 for row in rows) or None,
        }
    return {
        "additional_data": config.additional_data,
        "number_forward_passes": 1,
        "method": config.attack.method,
        "setting": config.attack.setting,
        "seed": config.optim.seed,
        "hardware": None if config.runtime.device == "auto" else config.runtime.device,
        "command": training_command(config),
        "versions": dict(config.versions),
        "metrics": tuple(rows),
        **totals,
    }


def training_command(config: RunConfig) -> str:
    """Return the `deat-rb train` command of a configuration, with only the last component of paths."""
    values, defaults = config.flat(), TrainOptions().flat()
    skipped = {"method", "device", "threads", "cuda_graphs", "save_every", "track", "memory_limit"}
    if config.data.dataset != "folder":
        skipped.add("image_size")
    words = ["deat-rb", "train", "--method", config.attack.method]
    for each in train_options():
        value = values[each.name]
        is_default = value == defaults[each.name] and each.name not in ("seed", *DEFAULT_TEXTS)
        if each.name in skipped or value is None or is_default:
            continue
        words += each.words(Path(value).name if each.metavar == "PATH" and not is_hub(value) else value)
    return shlex.join(words)
