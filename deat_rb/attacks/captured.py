"""Forward passes of an evaluation, and the backward passes through them, repeated as CUDA graphs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deat_rb.attacks.functional import SMALLEST_BATCH, CountingModel
from deat_rb.utils.cuda_graphs import WARM_UPS, CudaRecorder, Recorder, unknown_module

Forward = Callable[[Tensor], Tensor]

FIRST_CALLS = 3
"""Number of passes of a size that are not recorded, because a few passes take less time than recording one."""

NO_GRAPHS = "forward passes were launched one operation at a time, because "


def padded_sizes(batch_size: int) -> tuple[int, ...]:
    """Return the batch sizes to which smaller batches are padded, the largest first.

    Each is about 4/5 of the one before, so that few graphs are recorded, but padding costs little.
    """
    sizes = [batch_size]
    while sizes[-1] > SMALLEST_BATCH:
        smaller = min(8 * math.ceil(sizes[-1] / 10), sizes[-1] - 8)
        sizes.append(max(SMALLEST_BATCH, smaller))
    return tuple(sizes)


class Captures:
    """Repeats the forward passes of a frozen model in eval mode, whose images do not affect each other's logits.

    The first graph of each size is compared with a pass that is not recorded. If the results differ, or a pass cannot
    be recorded, nothing is repeated from then on.

    Args:
        new_recorder: Returns a recorder, whose memory is freed with it.
        batch_size: Size of the largest batches to record.

    Attributes:
        failure: Why passes are no longer recorded; empty if they are.
        recordings: Number of graphs recorded.
        repeated: Number of forward passes repeated.
    """

    def __init__(self, new_recorder: Callable[[], Recorder], batch_size: int) -> None:
        self.new_recorder = new_recorder
        self.sizes = padded_sizes(batch_size)
        self.failure = ""
        self.recordings = self.repeated = 0

    @contextmanager
    def during(self, model: CountingModel, warnings: list[str]) -> Iterator[None]:
        """Repeat the passes of ``model`` inside the context, and free the graphs' memory on exit.

        Args:
            model: The model; `CountingModel.exact` is never repeated.
            warnings: List to which a sentence is appended when passes can no longer be recorded.
        """
        if self.failure:
            yield
            return
        model.replay = _Passes(self, model, warnings)
        try:
            yield
        finally:
            model.replay = None


def captures_for(model: nn.Module, device: torch.device, batch_size: int) -> Captures | None:
    """Return what repeats a model's forward passes on a CUDA GPU; None for other devices and unknown networks.

    Those of the user may do more than operations on tensors, and compiled ones have graphs of their own.
    """
    compiled = any(
        type(module).__module__.startswith(("torch._dynamo", "torch.jit"))
        or getattr(module, "_compiled_call_impl", None) is not None  # by module.compile()
        for module in model.modules()
    )
    if device.type != "cuda" or compiled or unknown_module(model) is not None:
        return None
    return Captures(partial(CudaRecorder, device, shared=True), batch_size)


class _Passes:
    """Forward passes of a stage: the first ones of each size as they are, later ones as graphs.

    Both are padded to the same sizes, so that logits do not depend on which passes came before.
    """

    def __init__(self, captures: Captures, model: CountingModel, warnings: list[str]) -> None:
        self._captures = captures
        self._forward = model.logits
        self._tolerance = 1e-3 if model.dtype is None else 2e-2
        self._warnings = warnings
        self._recorder = captures.new_recorder()
        self._graphs: dict[Any, _Graph] = {}
        self._calls: Counter[Any] = Counter()
        self._turn = 0

    def __call__(self, images: Tensor) -> Tensor:
        fitting = [size for size in self._captures.sizes if size >= len(images)]
        if self._captures.failure or not fitting or not len(images):
            return self._forward(images)
        size, gradients = fitting[-1], torch.is_grad_enabled() and images.requires_grad
        key = size, images.shape[1:], images.dtype
        graph = self._graphs.get(key)
        if graph is None or (gradients and not graph.gradients):
            self._calls[key, gradients] += 1
            if self._calls[key, gradients] <= FIRST_CALLS:
                return self._forward(_padded(images, size))[: len(images)]
            self._turn += 1  # the new graph is run, too
            graph = self._recorded(_padded(images.detach(), size), gradients)
            if graph is None:
                return self._forward(images)
            self._graphs[key] = graph
        self._captures.repeated += 1
        self._turn += 1
        if not gradients:
            return graph.forward(images)
        logits: Tensor = _Repeated.apply(images, graph, partial(self._check_turn, self._turn))
        return logits

    def _check_turn(self, turn: int) -> None:
        """Check that no other pass has overwritten the activations of a pass, which are freed by its backward pass."""
        if turn != self._turn:
            raise RuntimeError("a repeated forward pass allows one backward pass, before the next forward pass")
        self._turn += 1

    def _recorded(self, images: Tensor, gradients: bool) -> _Graph | None:
        """Return the graph of a pass on a padded batch; None if it fails or its results are not those of a pass."""
        try:
            with torch.set_grad_enabled(gradients):
                images.requires_grad_(gradients)
                logits = self._forward(images)
                weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device).expand_as(logits)
                expected = [logits.detach()]
                if gradients:
                    expected += torch.autograd.grad(logits, images, weights)
                del logits
            graph = _Graph(self._forward, images.detach(), gradients, self._recorder)
            found = [graph.forward(images.detach())]
            if gradients:
                found.append(graph.backward(weights))
            for tensor, wanted in zip(found, expected, strict=True):
                within = self._tolerance * float(wanted.abs().max())
                torch.testing.assert_close(tensor, wanted, rtol=self._tolerance, atol=within, equal_nan=True)
        except AssertionError:
            self._fail("a CUDA graph of one gave other results")
            return None
        except RuntimeError as error:
            self._fail(f"they cannot be recorded as CUDA graphs ({str(error).partition(chr(10))[0]})")
            return None
        self._captures.recordings += 1
        return graph

    def _fail(self, reason: str) -> None:
        self._captures.failure = NO_GRAPHS + reason
        if self._captures.failure not in self._warnings:  # as after resuming
            self._warnings.append(self._captures.failure)
        self._graphs.clear()


class _Graph:
    """Recorded forward pass on a batch, and the backward pass through it with ``gradients``."""

    def __init__(self, forward: Forward, images: Tensor, gradients: bool, recorder: Recorder) -> None:
        # Not the images themselves: what a pass on other images returns shows whether it reads its input.
        self._images = torch.full_like(images, 0.5, memory_format=torch.contiguous_format).requires_grad_(gradients)
        self.gradients = gradients
        with torch.set_grad_enabled(gradients):
            for _ in range(WARM_UPS):
                if not recorder.warm_up(partial(_pass, forward, self._images))[1]:
                    raise RuntimeError("a pass waits for the device")
            self._run_forward, logits = recorder.record(partial(forward, self._images))
            if gradients:
                self._weights = torch.zeros_like(logits)
                backward = partial(torch.autograd.grad, logits, self._images, self._weights)
                self._run_backward, (self._gradient,) = recorder.record(backward)
        self._logits = logits.detach()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return a copy of the logits (n, K) of at most as many images (n, C, H, W) as were recorded."""
        self._images[: len(images)].copy_(images)
        self._run_forward()
        return self._logits[: len(images)].clone()

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> Tensor:
        """Return a copy of the images' gradient, given that of the logits (n, K) of the last forward pass."""
        self._weights[: len(gradient)].copy_(gradient)
        self._weights[len(gradient) :].zero_()
        self._run_backward()
        return self._gradient[: len(gradient)].clone()


class _Repeated(torch.autograd.Function):
    """A repeated forward pass, through which one backward pass is possible."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, graph: _Graph, check_turn: Callable[[], None]) -> Tensor:
        ctx.graph, ctx.check_turn = graph, check_turn
        return graph.forward(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.check_turn()
        return ctx.graph.backward(gradient), None, None


def _pass(forward: Forward, images: Tensor) -> None:
    logits = forward(images)
    if images.requires_grad:
        torch.autograd.grad(logits, images, torch.zeros_like(logits))


def _padded(images: Tensor, size: int) -> Tensor:
    """Return the images (n, C, H, W), with the first one repeated up to ``size`` of them, as a new tensor."""
    return torch.cat([images, images[:1].detach().expand(size - len(images), *images.shape[1:])])
