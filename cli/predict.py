"""``deat-rb predict``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=int, default=1, show_default=True, metavar="K", help="How many classes for each image.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
@click.option("--trust-code", is_flag=True,
              help="Let the run build its network by the package.module:factory that it names.")  # fmt: skip
def predict(run: Path, images: tuple[Path, ...], top: int, as_json: bool, device: str, trust_code: bool) -> None:
    """Say what a trained network takes images for.

    RUN is a run directory, or the .pt file of an export. The largest centred square of each image is resized to what
    the network takes. A confidence is the softmax's, and no probability of being right.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from deat_rb.inference import predict

    predictions = predict(run, images, top=top, device=device, trust_code=trust_code)
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
