"""The command ``python -m benchmarks``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deat_rb.utils.errors import DeatError

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 200
"""Width of tables when the output is not a terminal."""

QUICK = {"arch": "wrn-10-1", "batch_size": 8, "repeats": 1, "images": 8}


class UserError(click.ClickException):
    """Error printed as ``Error: <sentence>`` on stderr."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """Options of the command; see ``--help``."""

    arch: str
    batch_size: int
    precisions: tuple[str, ...]
    methods: tuple[str, ...]
    repeats: int
    device: str
    compiled: bool
    images: int
    run: Path | None
    autoattack: bool
    quick: bool


@dataclass
class Results:
    """Measurements as written to the JSON file."""

    environment: dict[str, Any]
    options: dict[str, Any]
    speed: list[dict[str, Any]] = field(default_factory=list)
    faithful: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    overhead: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    busy: list[dict[str, Any]] = field(default_factory=list)
    fill: list[dict[str, Any]] = field(default_factory=list)


class Progress:
    """Shows the running measurement on stderr: a single updated line on a terminal, otherwise a line per part."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._part = ""

    def __call__(self, text: str) -> None:
        """Show the next measurement, given as ``method: side``."""
        seconds = time.monotonic() - self._began
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{seconds:6.0f} s  {text}", nl=False, err=True)
        elif (part := text.partition(":")[0]) != self._part:
            self._part = part
            click.echo(f"{seconds:6.0f} s  {part}", err=True)

    def done(self) -> None:
        """Clear the line."""
        if sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)


def _names(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--arch", default="preactresnet18", show_default=True, help="Architecture, as for deat-rb train.")
@click.option("--batch-size", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--precision", "precisions", callback=_names, default="bf16,fp32", show_default=True, metavar="A,B")
@click.option("--methods", callback=_names, metavar="A,B", help="Methods to measure; by default all.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Number of rounds after the warm-up."
)
@click.option("--threads", type=click.IntRange(min=1), help="Number of torch threads; by default chosen by torch.")
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 or mps."
)
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile for our passes.")
@click.option("--no-speed", is_flag=True, help="Do not time training steps.")
@click.option("--memory", is_flag=True, help="Also measure peak memory.")
@click.option("--overhead", is_flag=True, help="Also measure the overhead of shuffling, augmentation and metrics.")
@click.option(
    "--eval",
    "evaluation",
    is_flag=True,
    help="Also time PGD-100 against torchattacks and AutoAttack against RobustBench.",
)
@click.option(
    "--busy", is_flag=True, help="Also time training and evaluation beside busy loops, with settings of OpenMP."
)
@click.option(
    "--fill", is_flag=True, help="Also count how full the batches of PGD and AutoAttack are in an evaluation."
)
@click.option("--run", type=click.Path(path_type=Path), help="Run to evaluate; by default a network is trained for it.")
@click.option(
    "--images", type=click.IntRange(min=1), default=500, show_default=True, help="Number of images to evaluate."
)
@click.option("--no-autoattack", is_flag=True, help="Omit AutoAttack from --eval and --fill.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all measurements to this file."
)
@click.option("--quick", is_flag=True, help="Smoke test: WRN-10-1, batches of 8, one round; its times are meaningless.")
@click.pass_context
def main(
    context: click.Context,
    /,
    threads: int | None,
    no_speed: bool,
    memory: bool,
    overhead: bool,
    evaluation: bool,
    busy: bool,
    fill: bool,
    no_autoattack: bool,
    json_path: Path | None,
    quick: bool,
    **given: Any,
) -> None:
    """Time every method's training step against (a) a plain loop as published by its authors and (b) its bare passes.

    The sides of a method alternate in this process, and ratios are medians over the rounds. A missed target is
    reported but is not an error.
    """
    if quick:
        commandline = click.core.ParameterSource.COMMANDLINE
        given |= {name: value for name, value in QUICK.items() if context.get_parameter_source(name) != commandline}
    options = Options(**given, autoattack=not no_autoattack, quick=quick)
    try:
        if json_path is not None and not json_path.parent.is_dir():
            raise DeatError(f"--json {json_path} cannot be written: create the folder {json_path.parent} first")
        parts = {"speed": not no_speed, "memory": memory, "overhead": overhead, "evaluation": evaluation, "busy": busy,
                 "fill": fill}  # fmt: skip
        if not any(parts.values()):
            raise DeatError("--no-speed leaves nothing to measure: add --memory, --overhead, --eval, --busy or --fill")
        results = measure(options, threads, [name for name, asked in parts.items() if asked])
    except DeatError as error:
        raise UserError(str(error)) from None
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(results), indent=2, default=str) + "\n", encoding="utf-8")
    if any(each["equal"] and each["differing"] for each in results.fill):
        raise click.ClickException("PGD's verdicts depend on how its batches are attacked")
    if any(each["equal"] and each["differing"] for each in results.evaluation):
        raise click.ClickException("AutoAttack's verdicts differ from RobustBench's")


def measure(options: Options, threads: int | None, parts: list[str]) -> Results:
    """Measure and print the requested parts.

    Raises:
        DeatError: The name of a method, precision or device is unknown.
    """
    import torch
    from rich.console import Console

    from benchmarks.problem import Environment
    from deat_rb.utils.devices import resolve_device, resolve_precision

    if threads is not None:
        torch.set_num_threads(threads)
    device = resolve_device(options.device)
    for precision in options.precisions:
        resolve_precision(precision, device)
    environment = Environment.of(device)
    results = Results(asdict(environment), asdict(options))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(f"{environment.processor} ({environment.capability}), {environment.threads} threads, {device}")
    console.print(", ".join(f"{name} {version}" for name, version in environment.versions.items()))
    console.print(f"{options.arch}, batches of {options.batch_size}, {options.repeats} rounds\n")
    progress = Progress()
    for part in parts:
        PARTS[part](options, device, results, console, progress)
    return results


def _speed(options: Options, device: Any, results: Results, console: Console, progress: Progress) -> None:
    from benchmarks import speed
    from benchmarks.problem import Problem
    from benchmarks.tables import faithful_table, speed_table

    problem = Problem(options.arch, options.batch_size, device)
    rows, faithful = [], []
    for of_method, found in speed.measure(
        problem,
        speed.check_methods(options.methods),
        options.precisions,
        options.repeats,
        with_targets=speed.targets_apply(options.arch, problem),
        compiled=options.compiled,
        notify=progress,
    ):
        rows += of_method
        faithful += [found] if found else []
    progress.done()
    for precision in options.precisions:
        console.print(speed_table([row for row in rows if row.precision == precision], precision))
    if faithful:
        console.print(faithful_table(faithful))
    derived = ("milliseconds_per_image", "passes_per_second", "speedup", "of_limit")
    results.speed = [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows]
    results.faithful = [asdict(each) | {"deviation": each.deviation} for each in faithful]


def _memory(options: Options, device: Any, results: Results, console: Console, progress: Progress) -> None:
    from benchmarks import memory
    from benchmarks.problem import Problem
    from benchmarks.speed import alike, check_methods
    from benchmarks.tables import memory_table

    found = []
    problem = Problem(options.arch, options.batch_size, device)
    for names in alike(problem, check_methods(options.methods)):
        for precision in options.precisions:
            progress(f"{names[0]}: memory in {precision}")
            found.append(
                memory.measure(options.arch, options.batch_size, device, names, precision, compiled=options.compiled)
            )
    progress.done()
    console.print(memory_table(found))
    derived = ("of_limit", "growth_of_limit")
    results.memory = [asdict(each) | {name: getattr(each, name) for name in derived} for each in found]


def _overhead(options: Options, device: Any, results: Results, console: Console, progress: Progress) -> None:
    from benchmarks import overhead
    from benchmarks.problem import Problem
    from benchmarks.speed import check_methods
    from benchmarks.tables import overhead_table

    problem = Problem(options.arch, options.batch_size, device)
    found = [
        each
        for of_method in overhead.measure(
            problem,
            check_methods(options.methods),
            options.precisions,
            options.repeats,
            compiled=options.compiled,
            notify=progress,
        )
        for each in of_method
    ]
    progress.done()
    console.print(overhead_table(found))
    results.overhead = [asdict(each) | {"share": each.share} for each in found]


def _evaluation(options: Options, device: Any, results: Results, console: Console, progress: Progress) -> None:
    from benchmarks import evaluation
    from benchmarks.tables import evaluation_table

    epochs = 1 if options.quick else evaluation.EPOCHS
    target = evaluation.make_target(options.run, options.images, str(device), epochs=epochs, notify=progress)
    found = [
        evaluation.against_torchattacks(
            target,
            batch_size=options.batch_size,
            repeats=options.repeats,
            notify=lambda side: progress(f"PGD: {side}"),
        )
    ]
    if options.autoattack:
        found.append(
            evaluation.against_robustbench(
                target, batch_size=options.batch_size, notify=lambda side: progress(f"AutoAttack: {side}")
            )
        )
    progress.done()
    console.print(f"Evaluated: {target.source}")
    console.print(evaluation_table(found))
    results.evaluation = [asdict(each) | {"speedup": each.speedup} for each in found]


def _busy(options: Options, device: Any, results: Results, console: Console, progress: Progress) -> None:
    from benchmarks import busy
    from benchmarks.tables import busy_table

    found = list(busy.measure(options.repeats, notify=progress))
    progress.done()
    console.print(busy_table(found))
    results.busy = [asdict(each) | {"quotient": each.quotient} for each in found]


def _fill(options: Options, device: Any, results: Results, console: Console, progress: Progress) -> None:
    from benchmarks import evaluation, fill
    from benchmarks.tables import fill_table

    epochs = 1 if options.quick else evaluation.EPOCHS
    target = evaluation.make_target(options.run, options.images, str(device), epochs=epochs, notify=progress)
    found = fill.measure(
        target,
        batch_size=options.batch_size,
        repeats=options.repeats,
        autoattack=options.autoattack,
        notify=progress,
    )
    progress.done()
    console.print(f"Evaluated: {len(target.images)} images, eps {target.eps:.4g}, {target.source}")
    console.print(fill_table(found))
    results.fill = [asdict(each) | {"fill": each.fill} for each in found]


PARTS = {"speed": _speed, "memory": _memory, "overhead": _overhead, "evaluation": _evaluation, "busy": _busy,
         "fill": _fill}  # fmt: skip


if __name__ == "__main__":
    main()
