"""The command ``deat-rb submit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import numbers, size, threads_option


@click.command("submit")
@click.argument("target", metavar="RUN|EXPORT|CHECKPOINT|hf:OWNER/NAME")
@click.option("--model-name", required=True, metavar="NAME", help="Name on the board, such as Wang2021Gradient_R18.")
@click.option("--board", type=click.Path(path_type=Path), default="leaderboard", show_default=True, metavar="DIR",
              help="The leaderboard's folder.")  # fmt: skip
@click.option("--info", type=click.Path(path_type=Path), metavar="FILE", help="RobustBench model_info of a checkpoint.")
@click.option("--arch", metavar="NAME", help="Architecture of a checkpoint, if its model_info has no known one.")
@click.option("--dataset", metavar="NAME", help="Dataset of a checkpoint.  [default: from its model_info]")
@click.option("--eps", metavar="EPS", help="Perturbation radius for a checkpoint without model_info, such as 8/255.")
@click.option("--norm", metavar="[Linf|L2]",
              help="Norm of a checkpoint's attacks.  [default: its folder's in an export, else Linf]")  # fmt: skip
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of the dataset; the digits need none.")  # fmt: skip
@click.option("--image-size", type=int, metavar="PIXELS",
              help="Height and width of a checkpoint's input, for an image folder.  [default: 32]")  # fmt: skip
@click.option("--classes", "class_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Class names, one per line in the order of a checkpoint's logits, for an image folder.")  # fmt: skip
@click.option("--mean", type=numbers, metavar="R,G,B",
              help="Mean of a checkpoint's normalization, for images in [0, 1], if its weights have none.")  # fmt: skip
@click.option("--std", type=numbers, metavar="R,G,B", help="Standard deviation of a checkpoint's normalization.")
@click.option("--normalize", metavar="NAME", help="Use --mean and --std of cifar10, cifar100, digits or imagenet.")
@click.option("--weights-key", metavar="KEY",
              help="State dict to load from a checkpoint that has several, such as state_dict_ema.")  # fmt: skip
@click.option("--memory-limit", type=size, metavar="SIZE",
              help="Decode a folder's test images batch by batch if all of them would take more memory than this, such "
              "as 8G.")  # fmt: skip
@click.option("--dataset-name", metavar="NAME", help="The board's name for an image folder, such as cifar10-jpeg.")
@click.option(
    "--dataset-note", metavar="TEXT", help="Description of an image folder; the board keeps the first one given."
)
@click.option(
    "--paper",
    "link",
    metavar="URL",
    help="Link to the paper.  [default: the DEAT paper for its methods, if no detail is given]",
)
@click.option("--title", "name", metavar="TITLE", help="Title of the paper.")
@click.option("--authors", metavar="A, B, ...", help="Authors of the paper.")
@click.option("--venue", metavar="VENUE", help="Venue and year of the paper.")
@click.option("--additional-data/--no-additional-data", default=None,
              help="Whether other training images were used; by default derived from the run.")  # fmt: skip
@click.option("--external", type=float, metavar="PERCENT", help="Best known robust accuracy; determines the rank.")
@click.option("--unreliable/--reliable", default=None, help="Whether AutoAttack's accuracy may be unreliable.")
@click.option("--footnote", metavar="TEXT", help="Footnote for the table.")
@click.option("--hardware", metavar="TEXT", help="Training hardware.")
@click.option("--n-examples", type=int, metavar="N", help="Number of test images to evaluate.  [default: all]")
@click.option("--sample", type=int, default=100, show_default=True, metavar="N",
              help="Number of examples to re-measure if there is an eval.json, 50 or more.")  # fmt: skip
@click.option(
    "--evaluate", "evaluate_anew", is_flag=True, help="Run the full evaluation even if the run has an eval.json."
)
@click.option("--replace", is_flag=True, help="Replace the entry of the same name; the old one is moved to history/.")
@click.option("--no-weights", "keep_weights", flag_value=False, default=True, help="Do not store the weights.")
@click.option("--batch-size", type=int, metavar="N", help="Images per batch.  [default: 500 on a GPU, otherwise 128]")
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Device: auto, cpu, cuda, cuda:1, mps, ..."
)
@threads_option
def submit(
    target: str,
    board: Path,
    n_examples: int | None,
    sample: int,
    evaluate_anew: bool,
    replace: bool,
    keep_weights: bool,
    batch_size: int | None,
    device: str,
    class_file: Path | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    normalize: str | None,
    memory_limit: int | None,
    **metadata: Any,
) -> None:
    """Submit a trained network to a leaderboard.

    A run's eval.json is accepted if re-measuring a random sample of its examples confirms it. Runs without one and
    checkpoints are fully evaluated with FGSM, PGD-100, CW-20 and AutoAttack. hf:OWNER/NAME is a run on the Hugging Face
    Hub. Submitted code is never run, and a rejected submission leaves the board unchanged.
    """
    from rich.console import Console

    from deat_rb.cli.evaluation_progress import EvaluationProgress
    from deat_rb.leaderboard.board import Board
    from deat_rb.leaderboard.ranking import rank
    from deat_rb.leaderboard.submission import SubmissionMetadata
    from deat_rb.leaderboard.tables import as_tables
    from deat_rb.models.class_names import read_class_names
    from deat_rb.models.normalization import parse_normalization
    from deat_rb.utils.devices import resolve_device
    from deat_rb.utils.text import printable

    where = resolve_device(device)
    more: dict[str, Any] = {
        "classes": None if class_file is None else read_class_names(class_file),
        "normalization": parse_normalization(mean, std, normalize),
        "memory_limit": memory_limit,
    }
    with EvaluationProgress() as progress:
        entry = Board(board).submit(
            target, SubmissionMetadata(**metadata, **more), n_examples=n_examples, sample=sample,
            evaluate_anew=evaluate_anew, replace=replace, keep_weights=keep_weights, batch_size=batch_size,
            device=str(where), progress=progress, notify=lambda note: click.echo(f"note: {printable(note)}", err=True),
        )  # fmt: skip
    console = Console()
    own = [each for each in rank(Board(board).entries(left_out=[])) if each.entry.key == entry.key]
    for table in as_tables(own, console.width):
        console.print(table)
    click.echo(f"written: {printable(str(board / 'entries' / entry.key))}.json")
