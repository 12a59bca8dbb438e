"""The command ``deat-rb predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .network_options import description, import_from_current_folder, network_options


@click.command("predict")
@click.argument("target", metavar="RUN|CHECKPOINT|NAME")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=int, default=1, show_default=True, metavar="K", help="Number of classes per image.")
@click.option("--json", "as_json", is_flag=True, help="Output as JSON.")
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Device: auto, cpu, cuda, cuda:1, mps, ..."
)
@network_options
def predict(target: str, images: tuple[Path, ...], top: int, as_json: bool, device: str, **options: Any) -> None:
    """Classify images with a trained network.

    The network is given as a run directory, the .pt file of an export, a checkpoint described with --arch, or a name as
    for eval. The largest centered square of each image is resized to the network's input size. Confidences are
    uncalibrated softmax probabilities.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from deat_rb.inference import predict

    import_from_current_folder(target)
    predictions = predict(target, images, top=top, device=device, **description(**options),
                          notify=lambda note: click.echo(f"note: {note}", err=True))  # fmt: skip
    if as_json:
        click.echo(json.dumps([prediction.model_dump(mode="json") for prediction in predictions], indent=2))
        return
    table = Table("image", "class", box=None, pad_edge=False)
    table.add_column("confidence", justify="right")
    for prediction in predictions:
        for place, guess in enumerate(prediction.guesses):
            table.add_row(
                "" if place else escape(prediction.image), escape(guess.name), f"{100 * guess.confidence:.2f} %"
            )
    Console().print(table)
