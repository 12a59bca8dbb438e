"""Process that runs workloads under one setting of the OpenMP runtime, which is read when torch is loaded.

It prints a line when it is ready, then reads the name of a workload per line from stdin and prints its seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from benchmarks.problem import Problem, Step
from deat_rb import evaluate

CPU = torch.device("cpu")

SIZES = {"wrn-10-1": (200, 4, 64), "preactresnet18": (8, 1, 8)}
"""Images and PGD steps of an evaluation and images of a training step, by architecture: about half a second each."""


def _evaluation(arch: str) -> Callable[[], object]:
    images, steps, _ = SIZES[arch]
    problem = Problem(arch, images, CPU)
    with torch.no_grad():
        labels = problem.model.eval()(problem.images).argmax(dim=1)  # all correct, so that all are attacked
    return lambda: evaluate(problem.model, problem.images, labels, attacks=f"pgd-{steps}", eps=1e-6)


def _training(arch: str) -> Callable[[], object]:
    return Step(Problem(arch, SIZES[arch][2], CPU), "pgd-7", "fp32").__enter__().run


def main() -> None:
    """Answer requests until stdin ends."""
    workloads: dict[str, Callable[[], object]] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        kind, arch = name.split()
        if name not in workloads:
            workloads[name] = {"evaluation": _evaluation, "training": _training}[kind](arch)
        began = time.perf_counter()
        workloads[name]()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
