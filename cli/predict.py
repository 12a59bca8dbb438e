"""The command ``deat-rb predict``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.text import counted, csv_text

from .network_options import description, import_from_current_folder, network_options
from .options import threads_option
from .progress import ImageProgress

if TYPE_CHECKING:
    from deat_rb.inference import Prediction


STDOUT = Path("-")
"""Stands for standard output."""


def _file(suffix: str) -> Callable[[str], Path]:
    """Return a parser of file names that end in ``suffix``; ``-`` is `STDOUT`."""

    def parsed(text: str) -> Path:
        path = Path(text)
        if path == STDOUT:
            return path
        if path.suffix != suffix:
            raise click.BadParameter(f"'{text}' does not end in {suffix}; give a file name that does, or - for stdout")
        if path.is_dir() or not path.parent.is_dir():
            raise click.BadParameter(f"'{text}' is a folder, or is in a folder that does not exist; give a file")
        return path

    return parsed


@click.command("predict")
@click.argument("target", metavar="RUN|CHECKPOINT|NAME")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--top-k", type=int, default=1, show_default=True, metavar="K", help="Number of classes per image.")
@click.option("--csv", "csv_path", type=_file(".csv"), is_flag=False, flag_value="-", metavar="[FILE]",
              help="Write a CSV file with a row per image; to stdout without FILE or with -.")  # fmt: skip
@click.option("--json", "json_path", type=_file(".json"), is_flag=False, flag_value="-", metavar="[FILE]",
              help="Write a JSON file; to stdout without FILE or with -.")  # fmt: skip
@click.option("--batch-size", type=int, default=64, show_default=True, metavar="N", help="Images per forward pass.")
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Device: auto, cpu, cuda, cuda:1, mps, ..."
)
@threads_option
@network_options
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    target: str,
    paths: tuple[str, ...],
    top_k: int,
    csv_path: Path | None,
    json_path: Path | None,
    batch_size: int,
    device: str,
    **options: Any,
) -> None:
    """Classify images with a trained network.

    The network is given as a run directory, the .pt file of an export, a checkpoint described with --arch, or a name as
    for eval. PATH is an image file, a folder, which is searched with its subfolders, or a quoted pattern such as
    'photos/**/*.jpg'. The EXIF orientation is applied, and the largest centered square of each image is resized to the
    network's input size. Confidences are uncalibrated softmax probabilities.

    A file that cannot be read gets a row with the reason; the exit status is then 1.
    """
    from deat_rb.data.image_files import describe_left_out, find_images
    from deat_rb.inference import iter_predictions

    if csv_path is not None and json_path is not None:
        raise DeatError("--csv and --json are mutually exclusive: give only one")
    import_from_current_folder(target)
    files, left_out, problems = find_images(paths)
    for note in filter(None, (describe_left_out(left_out), *map(str, problems))):
        click.echo(f"note: {note}", err=True)
    if not files:
        raise DeatError(f"there are no images in {', '.join(paths)}: give other paths")
    predictions = iter_predictions(target, files, top_k=top_k, batch_size=batch_size, device=device,
                                   notify=lambda note: click.echo(f"note: {note}", err=True),
                                   **description(**options))  # fmt: skip
    done = failed = 0
    chosen = csv_path or json_path or STDOUT
    file = None if chosen == STDOUT else chosen
    with (
        _writer(file, _Csv if csv_path else _Json if json_path else _Writer, files, top_k) as write,
        ImageProgress("classified", bar=file is not None or not sys.stdout.isatty()) as progress,
    ):
        try:
            for done, prediction in enumerate(predictions, 1):
                write(prediction)
                failed += prediction.error is not None
                progress(done, len(files))
        except KeyboardInterrupt:
            kept = f"{file} has the first {done:,} of {counted(len(files), 'image')}" if file is not None else ""
            raise Interrupted(kept) from None
    if file is not None:
        click.echo(f"{file}: {counted(len(files), 'image')}", err=True)
    if failed or problems:
        unread, total = failed + len(problems), len(files) + len(problems)
        click.echo(f"{unread:,} of {counted(total, 'path')} could not be read", err=True)
        ctx.exit(1)


class _Writer:
    """Writes a prediction in one of the forms; the base class prints aligned lines."""

    def __init__(self, file: TextIO, files: list[str], top_k: int) -> None:
        self.file = file
        self.width = min(max(map(len, files)), 60)
        self.top_k = top_k

    def __call__(self, prediction: Prediction) -> None:
        """Write a prediction."""
        from deat_rb.utils.text import printable

        name = f"{printable(prediction.image, 4000):<{self.width}}"
        if prediction.error is not None:
            click.echo(f"{name}  error: {printable(prediction.error, 4000)}", file=self.file)
        for place, guess in enumerate(prediction.guesses):
            shown = name if place == 0 else " " * self.width
            click.echo(f"{shown}  {100 * guess.confidence:6.2f} %  {printable(guess.name)}", file=self.file)

    def end(self) -> None:
        """Finish the output after the last prediction."""


class _Json(_Writer):
    """Writes a JSON array."""

    separator = "[\n"

    def __call__(self, prediction: Prediction) -> None:
        """Write an element of the array."""
        content = json.dumps(prediction.model_dump(mode="json", exclude_none=True))
        click.echo(f"{self.separator}  {content}", nl=False, file=self.file)
        self.separator = ",\n"

    def end(self) -> None:
        """Close the array."""
        click.echo("[]" if self.separator == "[\n" else "\n]", file=self.file)


class _Csv(_Writer):
    """Writes a CSV file with a header."""

    def __init__(self, file: TextIO, files: list[str], top_k: int) -> None:
        super().__init__(file, files, top_k)
        self._rows = csv.writer(file)
        numbered = [column for place in range(2, top_k + 1) for column in (f"class_{place}", f"confidence_{place}")]
        self._rows.writerow(["image", "class", "confidence", *numbered, "error"])

    def __call__(self, prediction: Prediction) -> None:
        """Write a row; missing classes are empty."""
        cells = [cell for guess in prediction.guesses for cell in (csv_text(guess.name), f"{guess.confidence:.6f}")]
        cells += [""] * (2 * self.top_k - len(cells))
        self._rows.writerow([csv_text(prediction.image), *cells, csv_text(prediction.error or "")])
        self.file.flush()


@contextmanager
def _writer(path: Path | None, form: type[_Writer], files: list[str], top_k: int) -> Iterator[_Writer]:
    """Yield a writer to a file or, if ``path`` is None, to stdout; its output is complete also after an error."""
    with ExitStack() as stack:
        file: TextIO = sys.stdout
        if path is not None:
            file = stack.enter_context(path.open("w", newline="", encoding="utf-8", errors="backslashreplace"))
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        writer = form(file, files, top_k)
        stack.callback(writer.end)
        yield writer
