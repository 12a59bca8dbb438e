"""``deat-rb submit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("submit")
@click.argument("target", metavar="RUN|EXPORT|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--model-name", required=True, metavar="NAME", help="Such as Wang2021Gradient_R18.")
@click.option("--board", type=click.Path(path_type=Path), default="leaderboard", show_default=True, metavar="DIR")
@click.option("--info", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint's model_info JSON.")
@click.option("--dataset", metavar="NAME", help="What a checkpoint is evaluated on; by default what its JSON says.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where the data are; digits need none."
)
@click.option(
    "--image-size",
    type=int,
    metavar="PIXELS",
    help="Height and width of a folder's images, for a checkpoint; by default 32.",
)
@click.option("--arch", metavar="NAME", help="A checkpoint's network, where its JSON names none that is known.")
@click.option("--dataset-name", metavar="NAME", help="What the board calls the images of a folder: cifar10-jpeg.")
@click.option("--dataset-note", metavar="TEXT", help="What a reader should know of them; the first one said stands.")
@click.option("--paper", "link", metavar="URL", help="Like what follows, the paper's own for its own methods.")
@click.option("--title", "name", metavar="TITLE", help="Of the paper.")
@click.option("--authors", metavar="A, B, ...", help="Of the paper.")
@click.option("--venue", metavar="VENUE", help="Of the paper, with the year.")
@click.option("--additional-data", is_flag=True, default=None, help="Other training images were used, too.")
@click.option("--external", type=float, metavar="PERCENT", help="Best known robust accuracy; it decides the rank.")
@click.option("--unreliable/--reliable", default=None, help="Whether AutoAttack's figure is not to be relied on.")
@click.option("--footnote", metavar="TEXT", help="For the table's reader.")
@click.option("--hardware", metavar="TEXT", help="Where it was trained.")
@click.option("--n-examples", type=int, metavar="N", help="Evaluate on so many test images; by default on all.")
@click.option("--sample", type=int, default=100, show_default=True, metavar="N",
              help="Measure what an eval.json claims again on so many examples, 50 or more.")  # fmt: skip
@click.option("--evaluate", "evaluate_anew", is_flag=True, help="Evaluate although the run has an eval.json.")
@click.option("--replace", is_flag=True, help="Replace the entry of that name; it is kept under history/.")
@click.option("--no-weights", "keep_weights", flag_value=False, default=True, help="Keep the weights off the board.")
@click.option("--batch-size", type=int, default=128, show_default=True, metavar="N")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
def submit(
    target: Path,
    board: Path,
    n_examples: int | None,
    sample: int,
    evaluate_anew: bool,
    replace: bool,
    keep_weights: bool,
    batch_size: int,
    device: str,
    **said: Any,
) -> None:
    """Put a trained network on a leaderboard.

    A run's eval.json is believed as far as some of its examples, which the board draws and measures itself, bear it
    out. Without one, and of checkpoints, all is measured: FGSM, PGD-100, CW-20 and AutoAttack. Nothing that is handed
    in is executed, and what is refused leaves the board as it was.
    """
    from rich.console import Console

    from deat_rb.cli.evaluation_progress import EvaluationProgress
    from deat_rb.leaderboard.board import Board
    from deat_rb.leaderboard.ranking import rank
    from deat_rb.leaderboard.submission import SubmissionMetadata
    from deat_rb.leaderboard.tables import as_tables
    from deat_rb.utils.devices import resolve_device

    where = resolve_device(device)
    with EvaluationProgress(n_examples or sample) as progress:
        entry = Board(board).submit(
            target, SubmissionMetadata(**said), n_examples=n_examples, sample=sample, evaluate_anew=evaluate_anew,
            replace=replace, keep_weights=keep_weights, batch_size=batch_size, device=str(where), progress=progress,
        )  # fmt: skip
    console = Console()
    own = [each for each in rank(Board(board).entries(left_out=[])) if each.entry.key == entry.key]
    for table in as_tables(own, console.width):
        console.print(table)
    console.print(f"written: {board / 'entries' / entry.key}.json", highlight=False, soft_wrap=True, markup=False)
