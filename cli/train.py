"""The command ``deat-rb train``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from deat_rb.runs.options import train_options
from deat_rb.utils.errors import DeatError

from .network_options import import_from_current_folder
from .options import GroupedCommand, GroupedOption, config_options, seed_list
from .progress import ImageProgress

output_option = partial(click.option, cls=GroupedOption, group="Output")


@click.command(cls=GroupedCommand)
@config_options(train_options())
@output_option("--name", help="Name of the run.  [default: METHOD-DATASET-ARCH-sSEED]")
@output_option(
    "--output", default="runs", show_default=True, metavar="PATH", help="Parent folder of the run directory."
)
@output_option(
    "--config", type=click.Path(path_type=Path), help="Read options from a run's config.json; flags override them, "
    "except those on which the defaults of others depend, such as --method.",
)  # fmt: skip
@output_option("--seeds", type=seed_list, metavar="0,1,2",
               help="Train one run per seed and report mean and standard deviation.")  # fmt: skip
@output_option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Resume an interrupted run.")
@output_option(
    "--trust-code", is_flag=True, help="Allow --resume and --config to call the package.module:factory that they name."
)
@output_option(
    "--budget", metavar="BUDGET", help="Choose the method, its epochs and options from measured results, for this many "
    "passes over the training images, such as 40, or this time, such as 30m; flags override them.",
)  # fmt: skip
@output_option("--dry-run", is_flag=True, help="Print the plan and its cost, time and memory without training.")
def train(
    name: str | None,
    output: str,
    config: Path | None,
    seeds: tuple[int, ...] | None,
    resume: Path | None,
    trust_code: bool,
    budget: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train a network with one of the methods.

    By default, trains with M+TRADES on the bundled digits, which takes a few minutes on a laptop. Images are in [0, 1];
    --eps and --alpha use the same unit. Configuration, metrics, weights and plots are stored in the run directory.
    """
    from rich.console import Console

    from deat_rb.cli.training_progress import (
        TrainingProgress,
        print_estimate,
        print_plan,
        print_result,
        print_seeds,
    )
    from deat_rb.runs.directory import check_free, check_name
    from deat_rb.runs.options import make_options
    from deat_rb.runs.plan import plan
    from deat_rb.runs.resolution import default_name
    from deat_rb.runs.train import resume as resume_training
    from deat_rb.runs.train import train as run_training
    from deat_rb.runs.train import train_seeds
    from deat_rb.utils.distributed import is_main

    if name is not None:
        check_name(name)
    if budget is not None and (config is not None or resume is not None):
        raise DeatError(
            f"--budget cannot be combined with {'--config' if config is not None else '--resume'}, which holds all "
            "options: omit one of them"
        )
    explicit = {key: value for key, value in flags.items() if value not in (None, ())}
    if seeds and "seed" in explicit:
        raise DeatError(
            f"--seed {explicit['seed']} and --seeds {','.join(map(str, seeds))} are mutually exclusive; give only one"
        )
    if "threads" in explicit and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeatError(
            f"--threads {explicit['threads']} is for a single rank; for several, set the environment variable "
            "OMP_NUM_THREADS instead"
        )
    if resume is not None:
        if config is not None or name is not None or seeds or dry_run:
            raise DeatError("--resume cannot be combined with --config, --name, --seeds or --dry-run: omit those")
        with TrainingProgress() as progress:
            run, history = resume_training(resume, explicit, callbacks=[progress], trust_code=trust_code)
        if is_main():
            print_result(run, history)
        return
    recorded = _recorded(config, explicit, trust_code) if config is not None else {}
    if "arch" in explicit:
        import_from_current_folder(explicit["arch"])
    if budget is not None:
        explicit = _chosen(budget, explicit)
    options = make_options({**recorded, **explicit})
    if not (dry_run or seeds or "WORLD_SIZE" in os.environ):
        check_free(Path(output) / (name or default_name(options)))
    with ImageProgress("decoded", console=Console(stderr=True, quiet=not is_main())) as decoding:
        planned = plan(options, dry=dry_run, progress=decoding)
    if is_main():
        print_plan(planned, seeds or ())
    if dry_run:
        if is_main():
            print_estimate(planned, seeds or ())
        return
    with TrainingProgress(seeds=seeds or ()) as progress:
        where: dict[str, Any] = {"output": output, "name": name, "callbacks": [progress]}
        if seeds:
            results = train_seeds(options, seeds, data=planned.data, extra=planned.extra, **where)
        else:
            results = [run_training(planned, **where)]
    if not is_main():
        return
    for run, history in results:
        print_result(run, history)
    if seeds:
        print_seeds(results)


def _recorded(config: Path, explicit: dict[str, Any], trust_code: bool) -> dict[str, Any]:
    """Return the options of a run's config.json.

    Raises:
        DeatError: The file is damaged or names a network of its own that is not trusted, or a given option, on which
            the defaults of others depend, is another one.
    """
    from deat_rb.methods.registry import recipe
    from deat_rb.models.names import canonical_arch, check_trust
    from deat_rb.runs.options import make_options, read_options
    from deat_rb.runs.resolution import method_defaults

    recorded = read_options(config)
    if "arch" not in explicit and "arch" in recorded:
        check_trust(recorded["arch"], trust_code, source=str(config))
    canonical: dict[str, Callable[[str], str]] = {"arch": canonical_arch, "method": lambda method: recipe(method)[0]}
    for option in ("method", "setting", "optimizer", "norm", "dataset", "arch", "pretrained"):
        if option not in explicit or option not in recorded:
            continue
        both = explicit[option], recorded[option]
        if len({*map(canonical.get(option, str), both)}) == 2:
            given, held = f"--{option} {explicit[option]}", recorded[option]
            if option == "pretrained":
                given, held = "--pretrained", "a network without it"
            raise DeatError(
                f"{given} conflicts with --config, as {config} holds the options of {held}: omit --config and give "
                "the options you want to keep"
            )
    for option in sorted(explicit.keys() & {"steps", "epochs"}):
        held = {name: value for name, value in explicit.items() if name != option} | recorded
        both = held, held | {option: explicit[option]}
        before, now = (method_defaults(make_options(each))[1] for each in both)
        kept = [name for name in recorded.keys() - explicit.keys() if before.get(name) != now.get(name)]
        if kept:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(kept))
            raise DeatError(
                f"--{option} {explicit[option]} changes the default of {flags}, which {config} holds: "
                f"give {'it' if len(kept) == 1 else 'them'}, too, or omit --config"
            )
    return recorded


def _chosen(budget: str, explicit: dict[str, Any]) -> dict[str, Any]:
    """Return the options chosen for a budget, with the given ones, and print why.

    Raises:
        DeatError: The budget is invalid or too small.
    """
    from deat_rb.reproduction.budget import choose, parse_budget
    from deat_rb.utils.distributed import is_main

    limit = parse_budget(budget)
    if limit.unit == "seconds" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeatError(f"--budget {budget} measures the time of a single rank; for several, give passes such as 40")
    choice = choose(limit, explicit, notify=partial(click.echo, err=True))
    if is_main():
        for reason in choice.reasons:
            click.echo(f"{'budget':<10} {reason}")
    return choice.options
