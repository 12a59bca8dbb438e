"""Benchmark problem: a network, a batch, and a method's training step as in `deat_rb`."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.limit import Limit, Pass, observed
from benchmarks.published import PublishedLoop
from benchmarks.timing import Side
from deat_rb import __version__, build_model, create
from deat_rb.methods.trainers import ReplayTrainer
from deat_rb.training.cuda_graphs import choose_graphs
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import EpochAccumulator
from deat_rb.training.optimizers import build_optimizer
from deat_rb.training.options import OptimConfig
from deat_rb.training.schedule import Constant
from deat_rb.training.step_runner import StepRunner
from deat_rb.training.trainer import Trainer
from deat_rb.utils import seeding
from deat_rb.utils.devices import resolve_precision
from deat_rb.utils.errors import DeatError

LR = 0.01
REPLAYS = 4
"""Number of replays of methods whose schedule increases it."""


class Problem:
    """A network with initial weights and a batch of random images, half of which it classifies correctly.

    This is about the fraction during training; the cost of FAT's early stopping depends on it.

    Args:
        arch: Architecture, as for `deat_rb.build_model`, with CIFAR-10's image size and classes.
        batch_size: Images per batch.
        device: The device.

    Attributes:
        model: The network, contiguous (NCHW), in train mode.
        images: Images (N, C, H, W) in [0, 1], contiguous.
        labels: Labels (N,).

    Raises:
        DeatError: The architecture is unknown, or the batch is too small for BatchNorm.
    """

    def __init__(self, arch: str, batch_size: int, device: torch.device) -> None:
        if batch_size < 2:
            raise DeatError(f"--batch-size {batch_size} is too small for BatchNorm; give 2 or more")
        self.device = device
        with seeding.preserved():
            torch.manual_seed(0)
            self.model = build_model(arch, dataset="cifar10").to(device).eval()
            self.images = torch.rand(batch_size, 3, 32, 32).to(device)
        with torch.no_grad():
            logits = self.model(self.images)
        wrong = torch.arange(batch_size, device=device) % 2
        self.labels = (logits.argmax(dim=1) + wrong) % logits.shape[1]
        self.model.train()

    def copy(self) -> nn.Module:
        """Return a copy of the network."""
        return copy.deepcopy(self.model)


class Step:
    """A method's training step with a fixed number of attack steps; metrics are accumulated as in training.

    Use it as a context manager, inside which the network is prepared.

    Args:
        problem: The network and the batch.
        method: Name of the method.
        precision: fp32, bf16 or fp16.
        compiled: Whether to use `torch.compile` for the passes.
        cuda_graphs: Whether the step is recorded as a CUDA graph: ``auto``, as in training, or ``off``.
    """

    def __init__(
        self, problem: Problem, method: str, precision: str, *, compiled: bool = False, cuda_graphs: str = "auto"
    ) -> None:
        self.problem = problem
        self.trainer = create(method, problem.copy())
        fix_steps(self.trainer)
        self.engine = Engine(problem.device, resolve_precision(precision, problem.device), compiled=compiled)
        self.engine.graphs = choose_graphs(cuda_graphs, problem.device, 1)
        self.sums = EpochAccumulator()
        self._stack = ExitStack()

    def __enter__(self) -> Step:
        self._stack.enter_context(self.engine.prepared(self.trainer.model))
        self.trainer.set_device(self.problem.device)
        self.optimizer = build_optimizer(self.trainer.model, OptimConfig(lr=LR), self.engine.device)
        self.runner = StepRunner(self.trainer, self.engine, self.optimizer)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Run one step, as training does."""
        images, labels = self._batch()
        self.sums.add(self.runner(images, labels, len(labels)))

    def _batch(self) -> tuple[Tensor, Tensor]:
        set_rate(self.optimizer, LR)
        seeding.seed_global(0, "batch", 1, 0)
        return self.engine.to_device(self.problem.images, self.problem.labels)

    def passes(self) -> list[Pass]:
        """Return the passes of a step, which is not recorded as a CUDA graph."""
        restore(self.trainer.model, self.problem)
        images, labels = self._batch()
        with observed(self.trainer) as passes, self.engine.training_batch(self.trainer.model, len(labels)):
            self.trainer.training_step(images, labels, self.optimizer, self.engine)
        return passes

    def side(self) -> Side:
        """Return the side to time; it always starts from the same weights, and settles when the step is recorded."""
        return Side(self.run, lambda: restore(self.trainer.model, self.problem), lambda: self.runner.settled)


def fix_steps(trainer: Trainer) -> None:
    """Fix the number of steps of a schedule that increases it: four replays, or the schedule's maximum."""
    if isinstance(trainer.schedule, Constant):
        return
    bound = trainer.schedule.max_steps
    trainer.steps = REPLAYS if isinstance(trainer, ReplayTrainer) or bound is None else bound


def restore(model: nn.Module, problem: Problem) -> None:
    """Restore the initial weights of a copy of the network."""
    model.load_state_dict(problem.model.state_dict())


def published_side(problem: Problem, method: str, trainer: Trainer, steps: int | None = None) -> Side:
    """Return side (a): the published loop with a trainer's eps, step size and steps."""
    model = problem.copy()
    count = trainer.steps if steps is None else steps
    loop = PublishedLoop(method, model, eps=trainer.eps, alpha=trainer.alpha or trainer.eps, steps=count, lr=LR)

    def run() -> None:
        seeding.seed_global(0, "batch", 1, 0)
        loop(problem.images, problem.labels)

    return Side(run, lambda: restore(model, problem))


def limit_side(problem: Problem, passes: list[Pass], precision: str) -> Side:
    """Return side (b): the bare passes in channels_last; on a GPU captured in a CUDA graph, as the step is."""
    model = problem.copy().to(memory_format=torch.channels_last)
    limit = Limit(model, passes, precision)
    images = problem.images.contiguous(memory_format=torch.channels_last)
    run = captured(lambda: limit(images)) if problem.device.type == "cuda" else lambda: limit(images)
    return Side(run, lambda: restore(model, problem))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that replays ``run``; its first call captures it in a CUDA graph, after four to warm up."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            graphs.append(_capture(run))
        graphs[0].replay()

    return replay


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph


def full_pass_side(problem: Problem) -> Side:
    """Return a side with one forward and one backward pass with all gradients, in float32 and NCHW."""
    model = problem.copy()

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        images = problem.images.detach().requires_grad_()
        logits: Tensor = model(images)
        nn.functional.cross_entropy(logits, problem.labels).backward()

    return Side(run, lambda: restore(model, problem))


@dataclass(frozen=True)
class Environment:
    """Hardware and versions of a measurement.

    Attributes:
        processor: Name of the CPU or GPU.
        capability: Vector instructions used by torch, or the GPU's compute capability.
        threads: Number of torch threads.
        versions: Versions of Python and packages.
    """

    processor: str
    capability: str
    threads: int
    versions: dict[str, str]

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        """Describe this machine."""
        versions = {"python": platform.python_version(), "deat-rb": __version__}  # a checkout may not be installed
        versions |= {name: metadata.version(name) for name in ("torch", "torchattacks", "robustbench", "pyautoattack")}
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            return cls(torch.cuda.get_device_name(device), f"{major}.{minor}", torch.get_num_threads(), versions)
        return cls(_processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), versions)


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
