"""The command ``deat-rb eval``."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deat_rb.utils.errors import DeatError, Interrupted

from .network_options import description, import_from_current_folder, network_options
from .options import attack_names, fraction_list, json_file, size, threads_option

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from deat_rb.eval_target import EvalTarget
    from deat_rb.evaluation.report import Report
    from deat_rb.evaluation.store import StoredReport


def _print_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from deat_rb.evaluation.report import json_schema

        click.echo(json_schema(), nl=False)
        context.exit()


@click.command("eval")
@click.argument("targets", metavar="RUN|CHECKPOINT|NAME...", nargs=-1, required=True)
@click.option("--attacks", type=attack_names, default="fgsm,pgd-100,cw-20", show_default=True, metavar="A,B,...",
              help="Attacks: natural, noise-gaussian, noise-uniform, fgsm, pgd-N, cw-N, pgd-NxR (R restarts), "
              "autoattack, autoattack-rand, autoattack-plus, square, torchattacks.NAME(key=value, ...).")  # fmt: skip
@click.option("--autoattack", is_flag=True, help="Also run AutoAttack's standard version.")
@click.option(
    "--norm", metavar="[Linf|L2]", help="Norm of the threat model; by default the run's own, Linf without a run."
)
@click.option("--eps", type=fraction_list, metavar="SIZE[,SIZE...]",
              help="Perturbation radius; by default the run's own, 8/255 without a run, 0.5 for L2. Several radii are "
              "evaluated as a sweep with the plot eval-eps.png; the report then uses the default radius, or the last "
              "one if the default is not among them.")  # fmt: skip
@click.option("--n-examples", type=int, metavar="N", help="Number of test images to evaluate; by default all.")
@click.option("--batch-size", type=int, metavar="N", help="Images per batch.  [default: 500 on a GPU, otherwise 128]")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed.")
@click.option("--precision", default="fp32", show_default=True, metavar="[fp32|bf16]",
              help="Precision of the attacks; bf16 is faster, but its robust accuracies are upper bounds.")  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="Device: auto, cpu, cuda, cuda:1, mps, ..."
)
@threads_option
@click.option("--checks", default="quick", show_default=True, metavar="[none|quick|full]",
              help="Level of sanity checks.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with status 1 if a check warns or fails.")
@click.option("--json", "json_path", type=json_file, metavar="FILE", help="Also write the report to this file.")
@click.option("--page/--no-page", default=True, help="Write report.html next to the report.")
@click.option("--track", is_flag=True,
              help="Also log the accuracies, if they become the run's eval.json, to the experiment trackers to which "
              "the run was logged in training.")  # fmt: skip
@click.option("--overwrite", is_flag=True,
              help="Replace the run's eval.json even if it has more attacks, images or checks than this evaluation."
              )  # fmt: skip
@click.option("--resume/--no-resume", default=None,
              help="Resume an interrupted evaluation, or discard it. By default it is resumed; if its settings differ, "
              "that is an error.")  # fmt: skip
@click.option(
    "--dataset",
    metavar="NAME",
    help="Evaluation dataset: digits, cifar10, cifar100 or folder; by default the run's.",
)
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the dataset.")
@click.option("--memory-limit", type=size, metavar="SIZE",
              help="Decode a folder's test images batch by batch if all of them would take more memory than this, such "
              "as 8G.  [default: the run's]")  # fmt: skip
@network_options
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON schema of eval.json.")  # fmt: skip
def evaluate(
    targets: tuple[str, ...],
    attacks: tuple[str, ...],
    autoattack: bool,
    norm: str | None,
    eps: tuple[float, ...] | None,
    n_examples: int | None,
    batch_size: int | None,
    seed: int,
    precision: str,
    device: str,
    checks: str,
    strict: bool,
    json_path: Path | None,
    page: bool,
    track: bool,
    overwrite: bool,
    resume: bool | None,
    dataset: str | None,
    data_dir: Path | None,
    memory_limit: int | None,
    **options: Any,
) -> None:
    """Attack a trained network and report its robust accuracy.

    A run directory determines network, dataset and eps, and the report is stored there as eval.json. A checkpoint is
    any state dict; describe it with --arch and --dataset. Images are not normalized unless the checkpoint has mean and
    std or they are given. Other networks are given by name: hf:OWNER/NAME (a run on the Hugging Face Hub),
    robustbench:NAME, torchvision:NAME, timm:NAME or package.module:function. For several runs, mean and standard
    deviation are reported over those that differ only in the seed.

    The most complete evaluation of a run is its eval.json; others are stored in its folder evaluations.

    An interrupted evaluation of a run or with --json is resumed by the same command; until it has
    finished, other settings require --no-resume. Started with torchrun, several GPUs share the batches of one
    evaluation.
    """
    from rich.console import Console

    from deat_rb.attacks.names import parse_attacks
    from deat_rb.attacks.threat_models import check_norm, check_radius
    from deat_rb.cli.evaluation_progress import EvaluationProgress
    from deat_rb.eval_target import open_target
    from deat_rb.evaluation.evaluate import check_options, evaluate
    from deat_rb.evaluation.resume import is_unfinished
    from deat_rb.runs.trackers import trackers_of
    from deat_rb.utils.devices import resolve_device
    from deat_rb.utils.distributed import world

    chosen = parse_attacks((*attacks, "autoattack") if autoattack else attacks)
    norm = None if norm is None else check_norm(norm)
    check_options(precision=precision, checks=checks)
    if strict and checks == "none":
        raise DeatError("--strict needs checks: omit --checks none")
    where = resolve_device(device)
    if json_path is not None and len(targets) > 1:
        raise DeatError(
            f"--json {json_path} can store only one report, not {len(targets)}: omit it; each run stores its own"
        )
    places = [os.path.realpath(name) for name in targets]
    if twice := [name for name, place in zip(targets, places, strict=True) if places.count(place) > 1]:
        raise DeatError(f"{twice[0]} is given twice: give each network once")
    for name in targets:
        import_from_current_folder(name)
    network = description(**options)
    data: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "memory_limit": memory_limit}
    ranks = world(cpu=where.type == "cpu")
    opened = [
        ranks.local_main_first(partial(open_target, target, norm=norm or "Linf", **data, **network))
        for target in targets
    ]
    norms = [norm or target.norm for target in opened]
    radii = [None if eps is None else tuple(check_radius(radius, "--eps", norm=each) for radius in eps)
             for each in norms]  # fmt: skip
    for target, own_norm, chosen_radii in zip(opened, norms, radii, strict=True):
        has_own_data = _has_own_data(target)
        if overwrite and not has_own_data:
            raise DeatError("--overwrite is only for evaluations of a run on its own dataset: omit it")
        has_own_eps = chosen_radii is None or any(
            math.isclose(radius, target.eps, abs_tol=1e-9) for radius in chosen_radii
        )
        if track and not (has_own_data and own_norm == target.norm and has_own_eps):
            raise DeatError(
                "--track is only for evaluations of a run on its own dataset, with its norm and eps: omit it"
            )
        if track and target.run is not None:
            trackers_of(target.run)
    if resume and len(opened) > 1:
        folders = filter(None, (_state(target, json_path) for target in opened))
        if not any(map(is_unfinished, folders)):
            raise DeatError("there is no unfinished evaluation of any of these networks: omit --resume")
        resume = None  # those that have finished have nothing to resume
    console = Console()
    command = {"command": shlex.join(("deat-rb", *sys.argv[1:]))}
    reports: list[Report] = []
    for target, own_norm, chosen_radii in zip(opened, norms, radii, strict=True):
        images, labels = target.test_images(n_examples)
        own = target.radius(own_norm)
        written: list[StoredReport] = []
        finish = partial(_write, target, json_path, page, overwrite, where, written, images=images, labels=labels)
        with (
            _naming_finished(targets[: len(reports)]),
            EvaluationProgress() if ranks.is_main else nullcontext() as progress,
        ):
            report = evaluate(
                target.model, images, labels, attacks=chosen, eps=chosen_radii or (own,), main_eps=own, norm=own_norm,
                batch_size=batch_size, seed=seed, device=where, precision=precision, checks=checks,
                state=_state(target, json_path), resume=resume, progress=progress,
                provenance=target.provenance | command, finish=finish, ranks=ranks,
            )  # fmt: skip
        reports.append(report)
        if not ranks.is_main:
            continue
        _print(report, console)
        for sentence in written[0].sentences:
            click.echo(sentence)
        if track:
            _log(target, report, written[0])
    if len(reports) > 1 and ranks.is_main:
        _print_means(reports, opened, console)
    if strict and any(check.status != "pass" for report in reports for check in report.checks):
        raise click.exceptions.Exit(1)


@contextmanager
def _naming_finished(finished: Sequence[str]) -> Iterator[None]:
    """Add to the message about an interruption which of several networks need not be evaluated again."""
    try:
        yield
    except Interrupted as interrupt:
        done = f"omit {', '.join(finished)}, done already" if finished else ""
        raise Interrupted("; ".join(filter(None, (interrupt.kept, done)))) from None


def _log(target: EvalTarget, report: Report, stored: StoredReport) -> None:
    """Log the accuracies to the run's trackers if they are now those of its eval.json."""
    from deat_rb.runs.directory import RunDirectory
    from deat_rb.runs.trackers import log_evaluation

    assert target.run is not None
    if stored.files[0] != target.run / "eval.json":
        click.echo("not logged, because it is not the run's eval.json")
        return
    accuracies = {each.name: each.accuracy for each in (*report.results.values(), report.worst_case)}
    names = log_evaluation(RunDirectory.open(target.run), accuracies | {"n_examples": report.n_examples})
    click.echo(f"logged to {', '.join(names)}")


def _state(target: EvalTarget, json_path: Path | None) -> Path | None:
    """Return the folder in which an unfinished evaluation is stored."""
    if target.run is not None:
        return target.run / "eval-state"
    return None if json_path is None else json_path.with_name(f"{json_path.stem}-state")


def _print(report: Report, console: Console) -> None:
    from deat_rb.evaluation.report import SKIPPED
    from deat_rb.evaluation.tables import sweep_table

    console.print(report.table())
    if report.curve:
        console.print(sweep_table(report))

    if "note" in report.provenance:
        click.echo(f"note: {report.provenance['note']}")
    for note in report.notes:
        click.echo(f"note: {note}")
    for result in report.results.values():
        for note in result.notes:
            click.echo(f"{result.name}: {note}")
    for check in report.checks:
        if check.status != "pass":
            click.echo(f"{check.status}: {check.name}: {check.sentence}")
    done = [check for check in report.checks if check.name != SKIPPED]
    if done:
        skipped = "".join(f", {check.figure:.0f} skipped" for check in report.checks if check.name == SKIPPED)
        click.echo(f"checks: {sum(check.status == 'pass' for check in done)} of {len(done)} pass{skipped}")


def _print_means(reports: Sequence[Report], targets: Sequence[EvalTarget], console: Console) -> None:
    """Print mean and standard deviation of each group of evaluations that differ only in the seed."""
    from deat_rb.evaluation.tables import are_comparable, group, means

    groups = {title: [reports[position] for position in positions]
              for title, positions in group([_options(target) for target in targets]).items()}  # fmt: skip
    unlike = [title for title, members in groups.items() if not are_comparable(members)]
    for title in unlike:
        differ = "because the evaluations differ in images, norm, eps or precision"
        click.echo(f"note: no mean is reported for {title}, {differ}")
    groups = {title: members for title, members in groups.items() if title not in unlike}
    if any(len(members) > 1 for members in groups.values()):
        console.print(means(groups, width=console.width))


def _options(target: EvalTarget) -> dict[str, Any]:
    """Return the keys for grouping evaluations: a run's options without the seed, or source and hash of weights."""
    from deat_rb.reproduction.grouping import key_of_run
    from deat_rb.runs.directory import RunDirectory

    if target.run is None:
        facts = target.provenance
        source = next((facts[name] for name in ("model", "entry", "weights") if name in facts), "network")
        return {"method": source, "SHA-256": facts.get("weights_sha256", "")[:8]}
    return key_of_run(RunDirectory.open(target.run))


def _has_own_data(target: EvalTarget) -> bool:
    """Return whether a target is a run that is evaluated on its own dataset."""
    from deat_rb.runs.directory import RunDirectory

    if target.run is None:
        return False
    return target.provenance["data_sha256"] == RunDirectory.open(target.run).config.data_fingerprint


def _write(
    target: EvalTarget,
    json_path: Path | None,
    page: bool,
    overwrite: bool,
    device: torch.device,
    written: list[StoredReport],
    report: Report,
    **examples: Any,
) -> None:
    """Write report, plot and page to the run and to ``json_path``."""
    from deat_rb.evaluation.store import store_report
    from deat_rb.runs.directory import RunDirectory
    from deat_rb.runs.summary import summary

    run: dict[str, Any] = {}
    if target.run is not None:
        opened = RunDirectory.open(target.run)
        own = opened.config.attack
        run = {"run": target.run, "own_data": _has_own_data(target), "own_eps": own.eps, "own_norm": own.norm}
        if page:
            run["training"] = summary(opened)
    stored = store_report(report, model=target.model, classes=target.classes, device=device, json_path=json_path,
                          page=page, overwrite=overwrite, **run, **examples)  # fmt: skip
    written.append(stored)
