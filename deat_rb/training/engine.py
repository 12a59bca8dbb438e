"""Where and in which precision a training step runs: the few device branches there are."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from deat_rb.utils.devices import Precision, check_sync_bn
from deat_rb.utils.distributed import World

# Statistics are averaged by `Engine.sync_buffers`; torch 2.15 renamed the switch.
_OWN_BUFFERS: dict[str, Any] = {
    name: False
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
}

if len(_OWN_BUFFERS) == 2:
    del _OWN_BUFFERS["broadcast_buffers"]


class Engine:
    """Runs the passes of a training step.

    Args:
        device: Where.
        precision: fp32, or bf16 or fp16 by autocast; fp16 updates with a loss scale.
        world: The processes that train together; by default this one alone.
        compiled: Whether `torch.compile` makes the model's passes.
        sync_bn: Whether BatchNorm takes its statistics over all processes, where it otherwise takes each one's own.

    Attributes:
        loss_scale: The fixed scale under which our own attacks craft, so that fp16 gradients do not vanish.
        global_batch: How many examples the batch under way has over all processes; None: as many as there are here.

    Raises:
        DeatError: If ``sync_bn`` is asked for on a CPU.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        *,
        world: World | None = None,
        compiled: bool = False,
        sync_bn: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.world = world or World()
        self.compiled = compiled
        self.sync_bn = sync_bn
        check_sync_bn(sync_bn, self.device)
        self.global_batch: int | None = None
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.loss_scale = 1024.0 if precision == "fp16" else 1.0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._replica: nn.Module | None = None

    def sgd(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> SGD:
        """Makes the optimiser of parameters that are on the device; on a GPU the fused one.

        That takes the loss scale along without waiting for the device. Its momentum is there from the beginning, as
        zeros: a first step that the loss scale skips on overflow would leave it uninitialised.
        """
        learning = list(parameters)
        fused = self.device.type == "cuda"
        optimizer = SGD(learning, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
        if momentum:
            for parameter in learning:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the model is forwarded."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Moves a model here, convolutions in channels_last."""
        if self.sync_bn and self.world.size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(self.device).to(memory_format=torch.channels_last)

    @contextmanager
    def prepared(self, model: nn.Module) -> Iterator[None]:
        """Has a model here, its passes as they were asked for, for as long as it is trained."""
        self.prepare(model)
        if self.world.size > 1:
            # Crafting goes past the replica, which expects a backward per forward.
            self._replica = DistributedDataParallel(model, **_OWN_BUFFERS)
        # The forward alone: hooks on the model, such as the probe's, come and go without compiling it anew.
        fast = torch.compile(model.forward) if self.compiled else None
        try:
            with fast_gpu_math(self.device), _forwarding_by(model, fast):
                yield
        finally:
            self._replica = None

    @contextmanager
    def eager(self, model: nn.Module) -> Iterator[None]:
        """The model for batches of ever other sizes: without `torch.compile`, and without cuDNN's trials for each."""
        with _cudnn_tries(False), _forwarding_by(model, type(model).forward.__get__(model) if self.compiled else None):
            yield

    def ddp_model(self, model: nn.Module) -> nn.Module:
        """What an update forwards in place of ``model``: gradients through it are summed over all processes."""
        return self._replica or model

    def sync_buffers(self, model: nn.Module) -> None:
        """Makes what a batch left different in each process, BatchNorm's running statistics, the same in all."""
        if not self.sync_bn:
            self.world.average(model.buffers())

    def averaged_over(self, count: int) -> float:
        """By what the losses of ``count`` examples here are divided; the processes' gradients are averaged then."""
        return (count if self.global_batch is None else self.global_batch) / self.world.size

    def receive(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Moves a batch here, the images in channels_last."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def part(self, count: int) -> slice:
        """Which examples of the global batch the ``count`` here are."""
        return self.world.share(count if self.global_batch is None else self.global_batch)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows (N, ...) of all processes, in the order of the global batch."""
        if self.world.size == 1 or self.global_batch is None:
            return rows
        whole = rows.new_zeros((self.global_batch, *rows.shape[1:]))
        whole[self.part(len(rows))] = rows
        return self.world.sum(whole)

    def backward_and_step(self, losses: Tensor, optimizer: Optimizer, images: Tensor) -> Tensor:
        """One backward pass and one update, on the mean loss of the global batch.

        Args:
            losses: Per example, (N,).
            optimizer: Of the model's parameters.
            images: What was forwarded, (N, C, H, W).

        Returns:
            The gradient at ``images`` from the same pass, before the update and without the loss scale; zeros where
            ``images`` is not a leaf that requires one. Times `averaged_over` it is that of each example's own loss.
        """
        loss = losses.sum() / self.averaged_over(len(losses))
        optimizer.zero_grad(set_to_none=True)
        scaled = self.scaler.scale(loss)
        scaled.backward()
        gradient = torch.zeros_like(images) if images.grad is None else images.grad
        if self.scaler.is_enabled():
            # get_scale() would wait for the device; the tensor behind it does not.
            scale = self.scaler._get_scale_async()
            assert scale is not None
            gradient = gradient / scale
            # A scale that grows overflows now and then, by design; the update is skipped, and so is the gradient.
            gradient = torch.where(gradient.isfinite().all(), gradient, torch.zeros_like(gradient))
        self.scaler.step(optimizer)
        self.scaler.update()
        return gradient

    def reset_peak_memory(self) -> None:
        """Begins to measure peak memory anew, where that can be: on GPUs."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Return the peak memory in bytes: allocated on the GPU since `reset_peak_memory`, or the process's peak RSS.

        It is 0 on a CPU where the operating system does not report it (Windows).
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # POSIX only
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def fast_gpu_math(device: torch.device) -> Iterator[None]:
    """Has a GPU multiply float32 matrices in TF32, where it can, and cuDNN try out which convolution is fastest.

    Convolutions have TF32 by torch's own default. Trying out pays where batches have one size; see `Engine.eager`.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with _cudnn_tries(True):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _cudnn_tries(tries: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = tries
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _forwarding_by(model: nn.Module, forward: Callable[..., Tensor] | None) -> Iterator[None]:
    """A model with another forward of its own in between; None leaves it as it is."""
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
