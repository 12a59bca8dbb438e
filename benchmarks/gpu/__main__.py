"""The command ``python -m benchmarks.gpu STAGES``: run stages in order, writing every result to disk immediately."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import attacks, steps, table1
from benchmarks.gpu.session import Session

STAGES: dict[str, Callable[[Session], None]] = {
    "env": steps.env, "tests": steps.tests, "smoke": steps.smoke, "speed": steps.speed, "profile": steps.profile,
    "bench": steps.bench, "compiled": steps.compiled, "throughput": steps.throughput, "decode": table1.decode,
    "table1": table1.table1, "full": table1.full, "parity": table1.parity,
    "torchattacks": attacks.torchattacks, "graphs": attacks.graphs, "autoattack": attacks.autoattack,
}  # fmt: skip
IN_TABLE = ("speed", "profile", "bench", "overhead", "compiled", "table1", "table1-eval", "full-eval", "tests",
            "throughput", "parity", "torchattacks", "graphs", "autoattack")  # fmt: skip
NOT_IN_TABLE = {"stage", "at", "method", "l_x", "train_acc", "loss", "attack_seconds"}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stages", help=f"comma-separated stages among {', '.join(STAGES)}")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder for the results"
    )
    parser.add_argument(
        "--budget", type=float, default=600, help="time budget in seconds, after which the stage that runs is ended"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="preactresnet18")
    parser.add_argument("--data", default="/dev/shm/cifar10-jpeg", help="image folder")
    parser.add_argument(
        "--cache", type=Path, default=Path("/dev/shm/cifar10-jpeg.pt"), help="file for the decoded images of --data"
    )
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--val-size", type=int, default=1000)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--full-size", type=int, default=10_000)
    parser.add_argument("--parity-size", type=int, default=200)
    parser.add_argument("--autoattack-size", type=int, default=10_000)
    parser.add_argument("--graphs-size", type=int, default=500)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--eval-batch", type=int, default=500)
    parser.add_argument("--eval-batches", type=int, nargs="+", default=[128, 500, 1000])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--step-methods", help="methods of speed and bench; by default ten, and all")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="use torch.compile in table1 and bench")
    parser.add_argument("--ema", type=float, help="train with averaged weights in table1")
    parser.add_argument("--attacks", default="fgsm,pgd-100,cw-20")
    parser.add_argument("--methods", default="m-deat,u-fgsm,deat-3,free-4,pgd-7,deat-40%,free-8")
    options = parser.parse_args()
    unknown = [stage for stage in options.stages.split(",") if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage '{unknown[0]}': choose one of {', '.join(STAGES)}")
    return options


def main() -> None:
    """Run the stages and print a table of the results."""
    warnings.filterwarnings("ignore")
    session = Session(parse())
    session.out.mkdir(parents=True, exist_ok=True)
    for stage in session.options.stages.split(","):
        if session.seconds_left() < 8:
            session.record(stage, left_out=f"{session.seconds_left():.0f} s left")
            continue
        began = time.monotonic()
        with session.recording_failure(stage), session.within_budget(stage):
            STAGES[stage](session)
        print(f"-- {stage}: {time.monotonic() - began:.1f} s, {session.seconds_left():.0f} s left", flush=True)
    print("\nstage            method      values")
    for row in session.rows:
        if row["stage"] in IN_TABLE or "failed" in row:
            rest = {name: value for name, value in row.items() if name not in NOT_IN_TABLE}
            print(f"{row['stage']:<16} {row.get('method', ''):<11} {rest}"[:260])


if __name__ == "__main__":
    main()
