"""Summary of a run's training for reports: key values and a plot."""

from __future__ import annotations

from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.plots import draw_curves
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import duration


def summary(run: RunDirectory) -> tuple[dict[str, str], bytes]:
    """Return key values of a run's training by name, and a PNG of its curves; both are empty without valid metrics."""
    config = run.config
    try:
        rows, chosen, trained = run.rows(), run.selected_epoch, run.unfinished
    except DeatError:  # damaged metrics must not prevent a report
        return {}, b""
    if not rows:
        return {}, b""
    method, setting = config.attack.method, config.attack.setting
    steps = [row.steps for row in rows]
    facts = {
        "method": f"{method}, setting {setting}, seed {config.optim.seed}",
        "epochs": (trained or f"{len(rows)}")
        + ("" if chosen is None else f"; the weights of epoch {chosen} are evaluated"),
        "attack steps": ", ".join(map(str, steps)) if len(set(steps)) > 1 else f"{steps[0]} in every epoch",
        "backward passes": f"{sum(row.backwards for row in rows):,.0f} (mini-batches of {config.data.batch_size})",
        "forward passes": f"{sum(row.forwards for row in rows):,.0f}",
        "training time": duration(sum(row.seconds for row in rows)),
        "validation time": duration(sum(row.val_seconds for row in rows)),
        "peak memory": f"{max(row.peak_memory for row in rows) / 1e9:.1f} GB",
    }
    return facts, draw_curves(rows, title=run.title, chosen=chosen)
