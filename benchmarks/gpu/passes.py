"""The command ``python -m benchmarks.gpu.passes``: times of a network's passes, eager, compiled and as CUDA graphs.

Prints the median in milliseconds per batch and in microseconds per image and pass. Without a GPU it runs on the CPU,
without graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.problem import Problem, Step, captured
from deat_rb import build_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Passes:
    """Measurements of one invocation of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.rows: list[dict[str, Any]] = []

    def record(self, name: str, batch: int, run: Callable[[], object], passes: float = 1.0, warm_up: int = 5) -> None:
        """Time a function; errors are printed, so that the next measurement can run."""
        try:
            ms = self._median_ms(run, warm_up)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return
        per_image = ms * 1e3 / batch / passes
        self.rows.append({"name": name, "batch_size": batch, "ms": ms, "us_per_image_and_pass": per_image})
        print(f"{name:52s} batch {batch:4d}  {ms:9.3f} ms  {per_image:8.2f} us per image and pass", flush=True)
        if self.options.json is not None:
            device = torch.cuda.get_device_name() if self.cuda else "cpu"
            content = {"device": device, "torch": torch.__version__, "arch": self.options.arch, "rows": self.rows}
            self.options.json.write_text(json.dumps(content, indent=1) + "\n")

    def _median_ms(self, run: Callable[[], object], warm_up: int) -> float:
        for _ in range(warm_up):
            run()
        times = []
        for _ in range(self.options.repeats):
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def network(self, batch: int, precision: str, layout: torch.memory_format, *, compiled: bool = False) -> None:
        """Time a full pass with an update, and an attack pass, which computes the gradient of the images only."""
        torch.manual_seed(0)
        model = build_model(self.options.arch, dataset="cifar10").to(self.device).train().to(memory_format=layout)
        forward = torch.compile(model, dynamic=False) if compiled else model
        images = torch.rand(batch, 3, 32, 32, device=self.device).to(memory_format=layout).requires_grad_()
        labels = torch.randint(0, 10, (batch,), device=self.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=self.cuda)
        dtype = DTYPES.get(precision)
        scale = 128.0 if precision == "fp16" else 1.0

        def loss() -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                return functional.cross_entropy(forward(images).float(), labels) * scale

        def full() -> None:
            optimizer.zero_grad(set_to_none=False)
            images.grad = None
            loss().backward()
            optimizer.step()

        def craft() -> None:
            model.requires_grad_(False)
            (gradient,) = torch.autograd.grad(loss(), images)
            with torch.no_grad():
                images.data.add_(gradient.sign(), alpha=0.0).clamp_(0, 1)
            model.requires_grad_(True)

        strides = "channels_last" if layout is torch.channels_last else "NCHW"
        name = f"{precision} {strides}{' compiled' if compiled else ''}"
        for kind, run in (("full pass and update", full), ("attack pass", craft)):
            if compiled:  # torch 2.11 would use the full pass's graph for frozen weights too, with their gradients
                torch.compiler.reset()
            self.record(f"{name}: {kind}", batch, run)
            if self.cuda:
                self.record(f"{name}, CUDA graph: {kind}", batch, captured(run))

    def method(self, name: str, batch: int) -> None:
        """Time a method's training step in bf16, and on a GPU also recorded as a CUDA graph, as it is in training."""
        problem = Problem(self.options.arch, batch, self.device)
        for graphs in ("off", "auto") if self.cuda else ("off",):
            with Step(problem, name, "bf16", cuda_graphs=graphs) as step:
                passes = len([each for each in step.passes() if each.kind != "forward"])
                title = (
                    f"training step of {name}{', CUDA graph' if graphs == 'auto' else ''} ({passes} backward passes)"
                )
                self.record(title, batch, step.run, passes, warm_up=4)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.passes", description=__doc__)
    parser.add_argument("--arch", default="preactresnet18")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--methods", nargs="*", default=["m-deat", "free-8", "pgd-7", "u-fgsm", "trades", "mart", "fat-5"]
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Time the passes, then the methods' training steps."""
    warnings.filterwarnings("ignore")
    options = parse()
    passes = Passes(options)
    if passes.cuda:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    first = options.batch[0]
    for batch in options.batch:
        passes.network(batch, "bf16", torch.channels_last)
    if passes.cuda:
        passes.network(first, "fp16", torch.channels_last)
    passes.network(first, "fp32", torch.contiguous_format)
    if not options.no_compile:
        passes.network(first, "bf16", torch.channels_last, compiled=True)
    for name in options.methods:
        passes.method(name, first)


if __name__ == "__main__":
    main()
