"""Device placement, mixed precision, DistributedDataParallel and torch.compile for a training step."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from deat_rb.training.averaging import WeightAverage
from deat_rb.training.batch_counters import BatchCounters
from deat_rb.training.cuda_graphs import Graphs
from deat_rb.utils.device_copier import DeviceCopier
from deat_rb.utils.devices import Precision, check_sync_bn, preserved_float32_precision
from deat_rb.utils.distributed import World

# Turned off because `Engine.sync_buffers` averages the buffers; torch 2.15 renamed the argument.
_OWN_BUFFERS: dict[str, Any] = {
    name: False
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
}

if len(_OWN_BUFFERS) == 2:
    del _OWN_BUFFERS["broadcast_buffers"]

ATTACK_SCALE = 1024.0
"""Initial loss scale of attacks in fp16."""

_GRAPH_LIMITS = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
"""Names of torch's limit on the number of compiled graphs per function, in old and new versions."""


class Engine:
    """Device, precision and ranks of a training step.

    Args:
        device: Device to train on.
        precision: fp32, or bf16 or fp16 with autocast; fp16 also scales the loss.
        world: The ranks that train together; by default a single one.
        compiled: Whether the model is compiled with `torch.compile`.
        sync_bn: Whether BatchNorm computes its statistics over all ranks instead of per rank.
        deterministic: Whether to use deterministic algorithms only, so that a GPU repeats a run bit for bit.

    Attributes:
        loss_scale: Loss scale in deat-rb's own attacks, so that fp16 gradients do not underflow; a scalar on the device
            in fp16, where the attacks halve it after an overflow, otherwise 1.
        global_batch: Number of examples in the current batch over all ranks; None if all are on this rank.
        full_batch: Number of examples in a batch of the usual size over all ranks; None if unknown.
        graphs: The recorder of training steps; None to run them without CUDA graphs.

    Raises:
        DeatError: ``sync_bn`` is set on a CPU.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        *,
        world: World | None = None,
        compiled: bool = False,
        sync_bn: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.world = world or World()
        self.compiled = compiled
        self.sync_bn = sync_bn
        self.deterministic = deterministic
        check_sync_bn(sync_bn, self.device)
        self.global_batch: int | None = None
        self.full_batch: int | None = None
        self.graphs: Graphs | None = None
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.loss_scale = torch.tensor(ATTACK_SCALE, device=self.device) if precision == "fp16" else 1.0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._replica: nn.Module | None = None
        self._copier = DeviceCopier(self.device)
        self.counters = BatchCounters()

    @property
    def fixed_size(self) -> bool:
        """Whether attacks pass the whole batch to the model, since every batch size is compiled or recorded anew."""
        return self.compiled or self.graphs is not None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context for the precision."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, with its convolutions in channels_last memory format."""
        if self.sync_bn and self.world.size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(self.device).to(memory_format=torch.channels_last)

    @contextmanager
    def prepared(self, model: nn.Module) -> Iterator[None]:
        """Prepare a model for training: device, memory format, DistributedDataParallel and torch.compile.

        It stays on the device, but gets its own memory format back.
        """
        with ExitStack() as contexts:
            contexts.enter_context(_restored_memory_format(model))
            self.prepare(model)
            contexts.callback(setattr, self, "_replica", None)
            if self.world.size > 1:
                # Attacks call the model itself, because DDP expects a backward pass after each forward pass.
                self._replica = DistributedDataParallel(model, **_OWN_BUFFERS)
            contexts.enter_context(fast_gpu_math(self.device, autotune=not self.deterministic))
            if self.deterministic:
                contexts.enter_context(deterministic_algorithms())
            if self.compiled:
                contexts.enter_context(_unlimited_graphs())
                # Compile only forward, so that adding or removing hooks, such as the probe's, does not recompile.
                # Without torch.compile's own CUDA graphs: a forward pass would overwrite the outputs of the previous
                # one, which TRADES and MART still need.
                compiled = torch.compile(model.forward, dynamic=False)
                contexts.enter_context(_replace_forward(model, compiled))
            yield

    @contextmanager
    def training_batch(self, model: nn.Module, examples: int) -> Iterator[None]:
        """Run batches of unusual size, such as a short last one, without torch.compile and autotuning.

        Args:
            model: The model.
            examples: Number of examples in the global batch. A batch larger than all earlier ones sets the usual size.
        """
        self.full_batch = max(examples, self.full_batch or 0)
        usual = examples == self.full_batch
        # Otherwise the model would be recompiled for each value of the counters.
        counting = nullcontext() if self.compiled and usual else self.counters.counting(model)
        with nullcontext() if usual else self.eager(model), counting:
            yield

    @contextmanager
    def eager(self, model: nn.Module) -> Iterator[None]:
        """Run the model without `torch.compile` and cuDNN autotuning, for batches of varying size."""
        forward = type(model).forward.__get__(model) if self.compiled else None
        with _cudnn_benchmark(False), _replace_forward(model, forward):
            yield

    def ddp_model(self, model: nn.Module) -> nn.Module:
        """Return the module to call in a training step; its gradients are averaged over all ranks."""
        return self._replica or model

    def sync_buffers(self, model: nn.Module, average: WeightAverage | None = None, *, statistics: bool = True) -> None:
        """Average the buffers over all ranks.

        BatchNorm's running statistics are averages of each batch's, so it is enough to average them before they are
        read, unless it computes them over all ranks; the result differs only by rounding. Other buffers are averaged
        after each batch.

        Args:
            model: The model.
            average: The averaged weights, whose buffers count as statistics.
            statistics: Whether to average statistics; if False, only other buffers.
        """
        if self.world.size == 1:
            return
        is_averaged = statistics and not self.sync_bn
        buffers: list[Tensor] = []
        for module in model.modules():
            if is_averaged or not isinstance(module, nn.modules.batchnorm._BatchNorm):
                constant = getattr(module, "constant_buffers", ())
                buffers += [each for name, each in module.named_buffers(recurse=False) if name not in constant]
        if statistics and average is not None:
            buffers += average.buffers()
        self.world.average(buffers)

    def loss_divisor(self, count: int) -> float:
        """Return the divisor of the summed loss of this rank's ``count`` examples.

        The mean of the quotients over all ranks is the mean loss of the global batch.
        """
        return (count if self.global_batch is None else self.global_batch) / self.world.size

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of a batch on the device, the images in channels_last."""
        images, labels = self._copier(images.detach(), labels)
        moved = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        if moved.data_ptr() == images.data_ptr():  # a model or an attack may modify its input in place
            moved = moved.clone()
        return moved, labels.to(self.device, non_blocking=True)

    def rank_slice(self, count: int) -> slice:
        """Return the slice of the global batch that holds this rank's ``count`` examples."""
        return self.world.share(count if self.global_batch is None else self.global_batch)

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows (N, ...) of all ranks, in the order of the global batch."""
        if self.world.size == 1 or self.global_batch is None:
            return rows
        whole = rows.new_zeros((self.global_batch, *rows.shape[1:]))
        whole[self.rank_slice(len(rows))] = rows
        return self.world.sum(whole)

    def update(self, losses: Tensor, optimizer: Optimizer) -> None:
        """Run one backward pass and one optimizer step on the mean loss of the global batch.

        Args:
            losses: Loss per example, (N,).
            optimizer: The optimizer of the model's parameters.
        """
        optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        self.step(optimizer)

    def backward_and_step(self, losses: Tensor, optimizer: Optimizer, images: Tensor) -> tuple[Tensor, float | Tensor]:
        """Do the same as `update`, and return the gradient of the images from the same backward pass.

        Args:
            losses: Loss per example, (N,).
            optimizer: The optimizer of the model's parameters.
            images: The model's input, (N, C, H, W).

        Returns:
            The gradient with respect to ``images``, unscaled; zeros if ``images`` is not a leaf that requires grad.
            Multiplied by `loss_divisor`, it is the gradient of each example's loss. Also returns the number of examples
            whose gradients overflowed; see `finite`.
        """
        optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        found = self.unscaled(torch.zeros_like(images) if images.grad is None else images.grad)
        self.step(optimizer)
        return found

    def unscaled(self, gradient: Tensor) -> tuple[Tensor, float | Tensor]:
        """Return what `finite` does, of a gradient of `backward` divided by fp16's loss scale, before its `step`."""
        if not self.scaler.is_enabled():
            return gradient, 0.0
        # get_scale() synchronizes with the device; the tensor that it reads does not.
        scale = self.scaler._get_scale_async()
        assert scale is not None
        return self.finite(gradient / scale)

    def finite(self, gradient: Tensor) -> tuple[Tensor, float | Tensor]:
        """Return a gradient of N examples and 0, or in fp16 zeros and N if it overflowed.

        By design, a growing scale overflows now and then: the optimizer step is then skipped.
        """
        if not self.scaler.is_enabled():
            return gradient, 0.0
        finite = gradient.isfinite().all()
        return torch.where(finite, gradient, 0.0), ~finite * len(gradient)

    def backward(self, losses: Tensor) -> None:
        """Add the gradients of the mean loss of the global batch to those of the parameters, scaled in fp16.

        Args:
            losses: Loss per example, (N,).
        """
        loss = losses.sum() / self.loss_divisor(len(losses))
        scaled: Tensor = self.scaler.scale(loss)
        scaled.backward()

    def step(self, optimizer: Optimizer) -> None:
        """Run one optimizer step on the gradients of `backward`."""
        self.counters.write()
        for group in optimizer.param_groups:
            if group.get("fused"):
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                        parameter.grad = _laid_out_like(parameter, parameter.grad)
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scales of fp16 as JSON values; empty in other precisions."""
        state: dict[str, Any] = self.scaler.state_dict()
        return {**state, "attack_scale": float(self.loss_scale)} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; those of earlier versions lack the attacks' loss scale."""
        scales = dict(state)
        attack_scale = scales.pop("attack_scale", ATTACK_SCALE)
        self.scaler.load_state_dict(scales)
        if isinstance(self.loss_scale, Tensor):
            self.loss_scale.fill_(attack_scale)

    def reset_peak_memory(self) -> None:
        """Reset the peak memory statistics of a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Return the peak memory in bytes: on a GPU since `reset_peak_memory`, otherwise the peak RSS of the process.

        It is 0 where the operating system does not report the peak RSS (Windows).
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # POSIX only
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with the strides of its parameter, which torch's fused optimizers require.

    If they differ only in dimensions of size 1, as for a 1x1 convolution, nothing is copied.
    """
    pairs = zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    if all(length == 1 or mine == other for length, mine, other in pairs):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)


@contextmanager
def fast_gpu_math(device: torch.device, *, autotune: bool = True) -> Iterator[None]:
    """Enable TF32 matrix products and cuDNN autotuning on a GPU.

    Convolutions use TF32 by default. Autotuning pays off if all batches have the same size; see `Engine.eager`. Its
    choice depends on measured times, so that two runs may differ in rounding.
    """
    if device.type != "cuda":
        yield
        return
    with preserved_float32_precision(), _cudnn_benchmark(autotune):
        torch.set_float32_matmul_precision("high")
        yield


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Restrict torch to deterministic algorithms; an operation without one raises a RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS, and read at its first use
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def explain_nondeterminism(error: Exception) -> str | None:
    """Return the message for an error of torch's deterministic mode; None for other errors."""
    if "CUBLAS_WORKSPACE_CONFIG" in str(error):  # in older versions of torch
        return (
            "--deterministic needs the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8, which this version of "
            "torch reads in a process's first matrix product on a GPU: set it before Python starts"
        )
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    if found is None:
        return None
    return (
        f"--deterministic is impossible: {found[1]} has no deterministic implementation on this device; omit it, or "
        "use another model"
    )


@contextmanager
def _restored_memory_format(model: nn.Module) -> Iterator[None]:
    """Restore a model's memory format on exit: torchattacks' L2 attacks use `view`, which fails in channels_last."""
    own = {name: tensor.stride() for name, tensor in _four_dimensional(model) if tensor.is_contiguous()}
    try:
        yield
    finally:
        for name, tensor in _four_dimensional(model):
            if tensor.stride() != own.get(name, tensor.stride()):
                tensor.data = tensor.new_empty_strided(tensor.shape, own[name]).copy_(tensor.data)


def _four_dimensional(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of four dimensions, which have a memory format, with their names."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.ndim == 4:
            yield name, tensor


@contextmanager
def _unlimited_graphs() -> Iterator[None]:
    """Lift torch.compile's limit of 8 graphs per network class, beyond which it falls back to eager mode."""
    import torch._dynamo

    limits = {name: 10_000 for name in _GRAPH_LIMITS if hasattr(torch._dynamo.config, name)}
    with torch._dynamo.config.patch(limits):
        yield


@contextmanager
def _cudnn_benchmark(enabled: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _replace_forward(model: nn.Module, forward: Callable[..., Tensor] | None) -> Iterator[None]:
    """Replace a model's ``forward`` within the context, unless ``forward`` is None."""
    if forward is None:
        yield
        return
    before = model.__dict__.get("forward")
    object.__setattr__(model, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(model, "forward")
        if before is not None:
            object.__setattr__(model, "forward", before)
