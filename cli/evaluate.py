"""``deat-rb eval``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import fraction, json_file, names


@click.command("eval")
@click.argument("targets", metavar="RUN|CHECKPOINT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--attacks", type=names, default="fgsm,pgd-100,cw-20", show_default=True, metavar="A,B,...",
              help="natural, fgsm, pgd-N, cw-N, autoattack.")  # fmt: skip
@click.option("--autoattack", is_flag=True, help="AutoAttack's standard version as well.")
@click.option("--n-examples", type=int, metavar="N", help="How many test images; by default all.")
@click.option("--batch-size", type=int, default=128, show_default=True, metavar="N")
@click.option(
    "--eps", type=fraction, metavar="SIZE", help="Linf radius; by default the run's own, 8/255 for a checkpoint."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random starts.")
@click.option("--json", "json_path", type=json_file, metavar="FILE", help="Write the report here, too.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
@click.option("--arch", metavar="NAME", help="A checkpoint's network, as for train.")
@click.option("--dataset", metavar="NAME", help="A checkpoint's data: digits, cifar10, cifar100 or folder.")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where the data are.")
@click.option("--image-size", type=int, metavar="N", help="To which a folder's images are resized.")
@click.option("--num-classes", type=int, metavar="N", help="A checkpoint's logits, if more than the data's classes.")
def evaluate(
    targets: tuple[Path, ...],
    attacks: tuple[str, ...],
    autoattack: bool,
    n_examples: int | None,
    batch_size: int,
    eps: float | None,
    seed: int,
    json_path: Path | None,
    device: str,
    arch: str | None,
    dataset: str | None,
    data_dir: Path | None,
    image_size: int | None,
    num_classes: int | None,
) -> None:
    """Attack a trained network and report its robust accuracy.

    A run knows its network, its data and its eps, and keeps the report as eval.json. A checkpoint is any state dict;
    say with --arch and --dataset what it is. One without mean and std takes images in [0, 1] as they are. Of several
    runs, such as one method's seeds, the mean and the standard deviation are reported as well.
    """
    from rich.console import Console

    from deat_rb.engine import resolve_device
    from deat_rb.errors import DeatError
    from deat_rb.evaluate import evaluate, parse_attacks
    from deat_rb.progress import EvaluationProgress
    from deat_rb.report import means
    from deat_rb.subject import open_subject
    from deat_rb.threat import check_eps

    chosen = parse_attacks((*attacks, "autoattack") if autoattack else attacks)
    if eps is not None:
        check_eps(eps, "--eps")
    where = resolve_device(device)
    if json_path is not None and len(targets) > 1:
        raise DeatError(
            f"--json {json_path} holds one report, and {len(targets)} are asked for; each run keeps its own"
        )
    subjects = [
        open_subject(
            target, arch=arch, dataset=dataset, data_dir=data_dir, image_size=image_size, num_classes=num_classes
        )
        for target in targets
    ]
    console = Console()
    reports = []
    for subject in subjects:
        images, labels = subject.examples(n_examples)
        with EvaluationProgress(len(labels)) as progress:
            report = evaluate(subject.model, images, labels, attacks=chosen, eps=eps or subject.eps,
                              batch_size=batch_size, seed=seed, device=where, progress=progress)  # fmt: skip
        report = report.model_copy(update={"provenance": subject.provenance})
        reports.append(report)
        console.print(report.table())
        if "note" in subject.provenance:
            console.print(f"note: {subject.provenance['note']}", highlight=False, soft_wrap=True)
        for result in report.results.values():
            for note in result.notes:
                console.print(f"{result.name}: {note}", highlight=False, soft_wrap=True)
        for place in (subject.run, json_path):
            if place is not None:
                console.print(f"written: {report.save(place)}", highlight=False, soft_wrap=True)
    if len(reports) > 1:
        console.print(means(reports))
