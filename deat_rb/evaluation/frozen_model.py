"""A model held still while it is evaluated, and the examples that every attack sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn

from deat_rb.data.check import check_batch
from deat_rb.models.check import ADVICE, trial_logits
from deat_rb.utils.devices import resolve_device
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state

SIZES = f"{ADVICE}; RobustBench's architectures are for 32x32"


class PreparedModel:
    """The model, its examples and where they meet.

    Attributes:
        model: In eval mode, its parameters frozen, on the device.
        images: In [0, 1], (N, C, H, W), wherever they are.
        labels: (N,).
        batch_size: How many examples are attacked together.
        device: Where the batches go.
        num_classes: K.
        channels_last: Whether the model's convolutions are laid out so.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        num_classes: int,
        channels_last: bool = False,
    ) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.device = device
        self.num_classes = num_classes
        self.channels_last = channels_last

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, pool: Tensor) -> tuple[Tensor, ...]:
        """Divides examples, of which ``pool`` has the numbers, into batches in their order."""
        return torch.split(pool, self.batch_size) if len(pool) else ()

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Gives images and labels of some examples, on the device."""
        if len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
            window = slice(int(rows[0]), int(rows[-1]) + 1)
            return self.images[window].to(self.device), self.labels[window].to(self.device)
        images, labels = self.images[rows.to(self.images.device)], self.labels[rows.to(self.labels.device)]
        return images.to(self.device), labels.to(self.device)


@contextmanager
def prepared_for_eval(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    device: torch.device | str | None,
    channels_last: bool = False,
) -> Iterator[PreparedModel]:
    """Checks the input and holds the model still: eval mode, on the device, parameters frozen; then gives it back.

    Frozen parameters keep FAB's ``backward()`` from their gradients, and compiled models from computing them.
    With ``channels_last``, on a CPU, convolutions are laid out so where the model takes it.

    Raises:
        DeatError: Something cannot be used.
    """
    if not isinstance(model, nn.Module):
        raise DeatError(f"the model is a {type(model).__name__}, where a torch.nn.Module is needed")
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise DeatError(f"batch_size = {batch_size!r} is not positive; give a number of images such as 128")
    check_batch(images, labels)
    images = images.detach()
    tensors = (*model.parameters(), *model.buffers())
    home = tensors[0].device if tensors else images.device
    target = resolve_device(str(device)) if device is not None else home
    with preserve_state(model):
        model.eval().requires_grad_(False)
        if target != home:
            model.to(target)
        try:
            trial = images[:2].to(target)
            logits = trial_logits(model, trial, advice=SIZES)
            num_classes = logits.shape[1]
            check_batch(images, labels, num_classes)
            with _laid_out(model, trial, logits, wanted=channels_last and target.type == "cpu") as laid_out:
                yield PreparedModel(
                    model,
                    images,
                    labels,
                    batch_size=int(batch_size),
                    device=target,
                    num_classes=num_classes,
                    channels_last=laid_out,
                )
        finally:
            if target != home:
                model.to(home)


@contextmanager
def _laid_out(model: nn.Module, images: Tensor, logits: Tensor, *, wanted: bool) -> Iterator[bool]:
    """Lays the weights of convolutions out in channels_last for a while; says whether they are.

    They stay as they are where the model then fails, as one does that flattens by ``view``, or gives others than its
    ``logits`` of the ``images``.
    """
    own = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4]
    if not wanted or all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor, _ in own):
        yield False
        return
    try:
        for tensor, data in own:
            tensor.data = data.contiguous(memory_format=torch.channels_last)
        takes_it = True
        try:
            torch.testing.assert_close(trial_logits(model, images), logits)
        except (AssertionError, DeatError):
            takes_it = False
            for tensor, data in own:
                tensor.data = data
        yield takes_it
    finally:
        for tensor, data in own:
            tensor.data = data
