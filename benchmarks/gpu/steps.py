"""Stages that measure training steps and passes, and run the tests and the benchmark."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from statistics import median

import torch

from benchmarks.gpu.session import Session
from benchmarks.limit import Pass
from benchmarks.overhead import measure as measure_overhead
from benchmarks.problem import Problem, Step, limit_side
from benchmarks.speed import check_methods
from benchmarks.speed import measure as measure_speed
from deat_rb.utils.devices import resolve_precision

GPU_TESTS = ("tests/training", "tests/attacks", "tests/evaluation")
"""Folders of the tests marked ``gpu``; collecting all others takes longer than these."""

FIRST = ("pgd-7", "trades")
"""Methods of the stage ``bench`` whose speedup has a target."""

PROFILED = (("pgd-7", "bf16"), ("m-deat", "bf16"), ("u-fgsm", "bf16"), ("pgd-7", "fp32"))
"""Methods and precisions of the stage ``profile``."""

METHODS = ("standard", "u-fgsm", "m-deat", "free-4", "pgd-7", "trades", "mart", "fat-5", "f+trades", "f+mart")


def env(session: Session) -> None:
    """Record versions, GPU memory bandwidth and the host's time per small operation."""
    import deat_rb
    from deat_rb.utils import compat

    compat.robustbench()
    values = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "deat_rb": deat_rb.__version__,
        "cpus": os.cpu_count(),
    }
    if session.cuda:
        values |= {"gpu": torch.cuda.get_device_name(), "copy TB/s": round(_copy_bandwidth(session) / 1e12, 2)}
    small = torch.zeros(1, device=session.device)
    session.wait()
    began = time.perf_counter()
    for _ in range(3000):
        small.add_(1)
    values["host us per small operation"] = round((time.perf_counter() - began) / 3000 * 1e6, 2)
    session.record("env", **values)


def _copy_bandwidth(session: Session) -> float:
    """Return the bytes read and written per second when copying a tensor of 1 GiB."""
    source = torch.rand(2**28, device=session.device)
    target = torch.empty_like(source)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        target.copy_(source)
    begin.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    session.wait()
    seconds: float = begin.elapsed_time(end) / 1e3
    return 10 * 2 * source.numel() * 4 / seconds


def tests(session: Session) -> None:
    """Run the tests marked ``gpu`` in several processes; each result is printed when its test ends."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal", *GPU_TESTS]
    began = time.monotonic()
    limit = min(150, session.seconds_left() - 5)
    file = session.out / "pytest-gpu.txt"
    status: int | None = None
    with file.open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False)
        status = done.returncode  # None if the time was over
    lines = file.read_text().strip().splitlines()
    failed = [line for line in lines if re.match(r"\[gw\d+\] \[ *\d+%\] (FAILED|ERROR) ", line)]
    seconds = round(time.monotonic() - began, 1)
    session.record("tests", status=status, seconds=seconds, last=lines[-1:], failed=failed[:60])


def _step(session: Session, method: str, precision: str, *, compiled: bool = False, cuda_graphs: str = "auto") -> Step:
    problem = Problem(session.options.arch, session.options.batch_size, session.device)
    return Step(problem, method, precision, compiled=compiled, cuda_graphs=cuda_graphs)


def smoke(session: Session) -> None:
    """Run two steps of every method in every precision, checking for errors, NaN and waits for the device."""
    for precision in ("bf16", "fp32", "fp16") if session.cuda else ("bf16", "fp32"):
        for method in METHODS:
            with (
                session.recording_failure("smoke", method=method, precision=precision),
                _step(session, method, precision, cuda_graphs="off") as step,
            ):
                step.run()
                session.wait()
                if session.cuda:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    step.run()
                finally:
                    if session.cuda:
                        torch.cuda.set_sync_debug_mode("default")
                sums = step.sums.read()
                gradients = [(each.grad, each) for each in step.trainer.model.parameters() if each.grad is not None]
                session.record(
                    "smoke",
                    method=method,
                    precision=precision,
                    finite=all(map(math.isfinite, sums.values())),
                    l_x=round(sums["l_x"], 2),
                    loss=round(sums["loss"], 3),
                    gradients_have_the_weights_strides=all(g.stride() == each.stride() for g, each in gradients),
                )


def _asked(session: Session) -> list[str]:
    """Return the methods of ``--step-methods``."""
    names: str | None = session.options.step_methods
    return names.split(",") if names else []


def speed(
    session: Session,
    stage: str = "speed",
    methods: Sequence[str] | None = None,
    precisions: Sequence[str] = ("bf16", "fp32"),
    *,
    compiled: bool = False,
) -> None:
    """Record milliseconds per step, with steps queued back to back as in training, and the host's part of them.

    On a GPU, steps that are not compiled are measured with and without CUDA graphs; the bare passes, which are never
    compiled, are captured in a graph.
    """
    repeats = session.options.repeats
    methods = methods or _asked(session) or METHODS
    settings = ("off",) if not session.cuda else ("auto",) if compiled else ("auto", "off")
    for precision, method, graphs in product(precisions, methods, settings):
        with session.recording_failure(stage, method=method, precision=precision, cuda_graphs=graphs):
            began = time.monotonic()
            with _step(session, method, precision, compiled=compiled, cuda_graphs=graphs) as step:
                for _ in range(4):
                    step.run()
                session.wait()
                start = time.monotonic() - began
                timer = time.perf_counter()
                for _ in range(repeats):
                    step.run()
                queued = time.perf_counter() - timer
                session.wait()
                done = time.perf_counter() - timer
                passes = step.passes()
                bare = None if graphs == "off" else _bare_ms(session, step.problem, passes, step.engine.precision)
                session.record(
                    stage,
                    method=method,
                    precision=precision,
                    cuda_graphs=graphs,
                    recordings=step.runner.recordings,
                    bare_ms=bare,
                    arch=session.options.arch,
                    ms=round(1e3 * done / repeats, 3),
                    host_ms=round(1e3 * queued / repeats, 3),
                    steps=step.trainer.steps,
                    passes=len(passes),
                    images_per_s=round(session.options.batch_size * repeats / done),
                    start_s=round(start, 1),
                    peak_MiB=round(step.engine.peak_memory() / 2**20),
                )


def _bare_ms(session: Session, problem: Problem, passes: list[Pass], precision: str) -> float:
    """Return the milliseconds of a step's bare passes."""
    side = limit_side(problem, passes, precision)
    side.run()
    session.wait()
    began = time.perf_counter()
    for _ in range(session.options.repeats):
        side.run()
    session.wait()
    seconds = time.perf_counter() - began
    return round(1e3 * seconds / int(session.options.repeats), 3)


def compiled(session: Session) -> None:
    """Time recorded steps with `torch.compile`; each method takes about a minute to compile."""
    speed(session, "compiled", ("pgd-7", "m-deat"), ("bf16",), compiled=True)


def profile(session: Session) -> None:
    """Record the number of kernels per step, and the fraction of time in which the GPU is busy."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if session.cuda else [])]
    for method, precision in PROFILED:
        with _step(session, method, precision) as step:
            for _ in range(3):
                step.run()
            session.wait()
            began = time.perf_counter()
            for _ in range(5):
                step.run()
            session.wait()
            wall_ms = (time.perf_counter() - began) / 5 * 1e3
            with profiler(activities=activities) as profiled:
                step.run()
                session.wait()
        kernels = [event for event in profiled.events() or () if str(event.device_type).endswith("CUDA")]
        gpu_ms = sum(event.device_time for event in kernels) / 1e3
        order = "self_cuda_time_total" if session.cuda else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70)
        (session.out / f"profile-{method}-{precision}.txt").write_text(table)
        session.record(
            "profile",
            method=method,
            precision=precision,
            kernels=len(kernels),
            gpu_ms=round(gpu_ms, 3),
            wall_ms=round(wall_ms, 3),
            busy=round(gpu_ms / wall_ms, 3),
        )


def bench(session: Session) -> None:
    """Time each method's step beside its published loop and its bare passes; then the work beside the steps."""
    problem = Problem(session.options.arch, session.options.batch_size, session.device)
    precision = resolve_precision("auto", session.device)
    methods = sorted(check_methods(_asked(session)), key=lambda name: name not in FIRST)
    for rows, _ in measure_speed(problem, methods, (precision,), 5, compiled=session.options.compile):
        for row in rows:
            session.record(
                "bench",
                method=row.method,
                precision=precision,
                compiled=session.options.compile,
                published_ms=round(1e3 * median(row.published), 2),
                ms=round(1e3 * median(row.ours), 2),
                bare_ms=round(1e3 * median(row.limit), 2),
                speedup=round(row.speedup, 2),
                of_bare=round(row.of_limit, 3),
            )
    for found in measure_overhead(problem, FIRST, (precision,), 3):
        for each in found:
            session.record("overhead", method=each.method, precision=precision, share=round(each.share, 4))


def throughput(session: Session) -> None:
    """Measure evaluation throughput by batch size and memory layout: PGD-20 without misclassified examples."""
    from deat_rb.attacks.functional import pgd
    from deat_rb.attacks.losses import cross_entropy
    from deat_rb.attacks.threat_models import Linf

    for size in session.options.eval_batches:
        for layout in (torch.contiguous_format, torch.channels_last):
            problem = Problem(session.options.arch, size, session.device)
            model = problem.model.eval().requires_grad_(False).to(memory_format=layout)
            labels = model(problem.images).argmax(dim=1)
            times = []
            for _ in range(3):
                session.wait()
                began = time.perf_counter()
                pgd(model, problem.images, labels, start=problem.images, threat=Linf(1e-9), alpha=1e-10, steps=20,
                    loss=cross_entropy)  # fmt: skip
                session.wait()
                times.append(time.perf_counter() - began)
            session.record(
                "throughput",
                batch_size=size,
                layout=str(layout),
                ms_per_step=round(1e3 * min(times) / 21, 2),
                images_per_s=round(21 * size / min(times)),
            )
