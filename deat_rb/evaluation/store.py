"""Storage of a report with its page and plot, in a run directory or next to a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.records import Placement, place
from deat_rb.evaluation.report import Report, page_file


@dataclass(frozen=True)
class StoredReport:
    """Where a report was written.

    Attributes:
        files: The JSON files.
        sentences: Sentences to print: the files written, and notes.
    """

    files: tuple[Path, ...]
    sentences: tuple[str, ...]


def store_report(
    report: Report,
    *,
    model: nn.Module,
    images: Tensor | LabeledImages,
    labels: Tensor,
    device: torch.device,
    classes: Sequence[str] = (),
    run: Path | None = None,
    own_data: bool = True,
    own_eps: float = 8 / 255,
    own_norm: str = "Linf",
    json_path: Path | None = None,
    page: bool = True,
    overwrite: bool = False,
    training: tuple[dict[str, str], bytes] = ({}, b""),
) -> StoredReport:
    """Write a report, its page and the plot of a sweep; in each place, all files are written or none.

    Args:
        report: The report.
        model: The evaluated model, whose predictions the page shows.
        images: The evaluated images, in [0, 1], (N, C, H, W).
        labels: Their labels, (N,).
        device: The device on which the model is run.
        classes: Class names in the order of the logits.
        run: A run directory in which `place` chooses the file.
        own_data: Whether the images are of the dataset that the run was trained on.
        own_eps: The radius with which the run was trained.
        own_norm: The norm with which it was trained.
        json_path: A further file to write.
        page: Whether to write the page.
        overwrite: Whether an evaluation on the run's own data replaces a more comprehensive ``eval.json``.
        training: Facts about the model's training by name, and a PNG of its curves, for the page.

    Returns:
        The files and sentences for the user.

    Raises:
        DeatError: A file cannot be written.
    """
    placements = [] if json_path is None else [Placement(json_path)]
    if run is not None:
        own = place(run, report, own_data=own_data, own_eps=own_eps, own_norm=own_norm, overwrite=overwrite)
        placements.insert(0, own)
    html = b""
    if page and placements:
        from deat_rb.evaluation.html_report import predictions_of, render_page

        predictions = predictions_of(model, report, images, batch_size=report.batch_size, device=device)
        facts, curves = training
        html = render_page(report, classes=classes, predictions=predictions, images=images, labels=labels,
                           training=facts, curves=curves)  # fmt: skip
    written = []
    for placed in placements:
        file = placed.file
        plot = file.with_name(f"{file.stem}-eps.png")
        beside = {page_file(file): html} if page else {}
        if report.curve:
            from deat_rb.evaluation.plots import draw_sweep

            title = run.name if run is not None and file.name == "eval.json" else file.stem
            beside[plot] = draw_sweep(report, title=title)
        report.save(file, beside | placed.archived)
        written += [f"written: {path}" for path in (*beside, file)]
        if placed.sentence:
            written.append(f"note: {placed.sentence}")
        for stale in {page_file(file), plot} - beside.keys() if run is not None and file.name == "eval.json" else ():
            stale.unlink(missing_ok=True)  # files of the previous evaluation
    return StoredReport(tuple(placed.file for placed in placements), tuple(written))
