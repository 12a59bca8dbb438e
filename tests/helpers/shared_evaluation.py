"""An evaluation that ranks share."""

from __future__ import annotations

from pathlib import Path

from small_problems import batch_for, small_network

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Report
from deat_rb.utils.distributed import World, world
from deat_rb.utils.errors import DeatError

ATTACKS = "noise-uniform,fgsm,pgd-4x2"


def shared(ranks: World | None, folder: Path, *, fails: bool = False, resume: bool | None = None) -> Report:
    """Evaluate a small network in batches of 10; with ``fails``, the report cannot be saved."""
    network = small_network()

    def finish(report: Report) -> None:
        if fails:
            raise DeatError("the report cannot be saved")

    return evaluate(
        network, *batch_for(network), attacks=ATTACKS, eps="2/255,0.04", batch_size=10, seed=3, ranks=ranks,
        state=folder / "state", resume=resume, finish=finish, checks="quick",
    )  # fmt: skip


def resume_on_ranks(folder: Path) -> None:
    """Fail to save a first report, resume, and write the second one on rank 0."""
    ranks = world(cpu=True)
    try:
        shared(ranks, folder, fails=True)
    except DeatError as error:
        (folder / f"failed-{ranks.rank}").write_text(str(error))
    ranks.on_main(lambda: (folder / "stored").write_text(str(len(list((folder / "state").glob("*.safetensors"))))))
    report = shared(ranks, folder, resume=True)
    (folder / f"robust-{ranks.rank}").write_text(str(report.worst_case.n_correct))
    if ranks.is_main:
        report.save(folder)
