"""A model prepared for evaluation (in eval mode, frozen, on the device), and its evaluation examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor, nn

from deat_rb.data.check import _check_labels, check_batch
from deat_rb.data.images import LabeledImages
from deat_rb.models.check import ADVICE, check_not_meta, check_weights_exist, trial_logits
from deat_rb.utils.devices import default_batch_size, full_float32, resolve_device
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state, require_autograd
from deat_rb.utils.safe_load import sha256_tensors

SIZES = f"{ADVICE}; RobustBench's architectures need 32x32 images"


class PreparedModel:
    """A model in eval mode with frozen parameters, and its evaluation examples.

    Attributes:
        model: The model, on ``device``.
        images: Images (N, C, H, W), on any device, or in files that are decoded batch by batch; copies of them are
            clamped to [0, 1].
        labels: Labels, (N,).
        batch_size: Number of examples per batch.
        device: Device of the model, to which batches are moved.
        num_classes: Number of classes, K.
        channels_last: Whether the convolutions use the channels_last memory format.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | LabeledImages,
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
        """Split the indices ``pool`` into batches, in order."""
        return torch.split(pool, self.batch_size) if len(pool) else ()

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the images and labels at the indices ``rows``, on the device."""
        return select_images(self.images, rows).to(self.device), self.labels[rows.to(self.labels.device)].to(
            self.device
        )

    def all_images(self) -> Tensor:
        """Return a copy of all images, (N, C, H, W) on the CPU."""
        return select_images(self.images, torch.arange(len(self))).cpu()

    @cached_property
    def is_independent(self) -> bool:
        """Whether an image's logits depend neither on the other images of its batch nor on random numbers.

        It is tried out with the first 16 images, in one batch and in two. Differences up to 1e-4 of the largest logit
        are taken for rounding: float32 sums of a deep network depend on the kernels that a GPU chooses by batch size.
        """
        images = self.take(torch.arange(min(16, len(self))))[0]
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), full_float32(self.device), torch.random.fork_rng(devices=cuda):
            before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
            try:
                whole = self.model(images)
                halves = [self.model(half) for half in images.split(-(-len(images) // 2))]
                torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
            except (AssertionError, ValueError, RuntimeError):  # as BatchNorm in train mode, which refuses one image
                return False
            after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
        return all(map(torch.equal, before, after))

    def predict(self, images: Tensor | LabeledImages | None = None, *, count: int | None = None) -> Tensor:
        """Return the classes of the first ``count`` images, by default of all examples, predicted in float32.

        They are on the CPU.
        """
        source = self.images if images is None else images
        count = len(source) if count is None else count
        with torch.no_grad(), full_float32(self.device):
            parts = [
                self.model(select_images(source, rows).to(self.device)).argmax(dim=1).cpu()
                for rows in self.batches(torch.arange(count))
            ]
        return torch.cat(parts)


@contextmanager
def prepared_for_eval(
    model: nn.Module,
    images: Tensor | LabeledImages,
    labels: Tensor | None = None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    channels_last: bool = False,
) -> Iterator[PreparedModel]:
    """Check the arguments, and within the context keep the model in eval mode, frozen, and on the device.

    With frozen parameters, FAB's ``backward()`` does not accumulate their gradients, and compiled models do not compute
    them.

    Args:
        model: Any module that returns logits (N, K).
        images: In [0, 1], (N, C, H, W).
        labels: (N,); None if only predictions are needed.
        batch_size: Number of examples per batch; by default 500 on a GPU, otherwise 128.
        device: Device to run on; by default the model's.
        channels_last: Whether to use the channels_last memory format on a CPU or GPU, if the model supports it.

    Raises:
        DeatError: The model, the images, the labels or the batch size are invalid.
    """
    check_weights_exist(model, "evaluation")
    check_not_meta(model)
    require_autograd("evaluation")
    invalid = isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1
    if batch_size is not None and invalid:
        raise DeatError(f"batch_size = {batch_size!r} is not positive; give a number of images such as 128")
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    _check_examples(images, labels)
    if isinstance(images, Tensor):
        images = images.detach()
    first = select_images(images, torch.arange(min(2, len(images))))
    tensors = (*model.parameters(), *model.buffers())
    home = tensors[0].device if tensors else first.device
    target = resolve_device(str(device)) if device is not None else home
    with preserve_state(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():  # ScriptModules have no requires_grad_()
            parameter.requires_grad_(False)
        if target != home:
            model.to(target)
        try:
            trial = first.to(target)
            with full_float32(target):
                logits = trial_logits(model, trial, advice=SIZES)
            num_classes = logits.shape[1]
            _check_examples(images, labels, num_classes)
            with _memory_format(
                model, trial, logits, wanted=channels_last and target.type in ("cpu", "cuda")
            ) as is_channels_last:
                yield PreparedModel(
                    model,
                    images,
                    labels,
                    batch_size=default_batch_size(target) if batch_size is None else int(batch_size),
                    device=target,
                    num_classes=num_classes,
                    channels_last=is_channels_last,
                )
        finally:
            if target != home:
                model.to(home)


def _check_examples(images: Tensor | LabeledImages, labels: Tensor, num_classes: int | None = None) -> None:
    if isinstance(images, LabeledImages):
        _check_labels(labels, len(images), num_classes)  # decoded images are in [0, 1]
        return
    check_batch(images, labels, num_classes)
    if images.dtype in (torch.float16, torch.bfloat16):
        raise DeatError(
            f"the images are {images.dtype}, in which a perturbation of eps is rounded to more than eps: give float32 "
            "images to a float32 model (precision='bf16' runs the attacks in bfloat16)"
        )


def select_images(images: Tensor | LabeledImages, rows: Tensor) -> Tensor:
    """Return a float copy of the images at the indices ``rows``, (n, C, H, W), decoding those in files.

    Pixels outside [0, 1], which `check_pixels` tolerates up to rounding, are clamped.
    """
    if not isinstance(images, Tensor):
        return images.select(rows).tensors()[0]
    if len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
        return images[int(rows[0]) : int(rows[-1]) + 1].clamp(0, 1)
    return images[rows.to(images.device)].clamp_(0, 1)


def sha256_examples(images: Tensor | LabeledImages, labels: Tensor) -> str:
    """Return the SHA-256 of images (as float) and labels; it is the same for images in memory and in files."""
    if isinstance(images, Tensor):
        return sha256_tensors({"images": images, "labels": labels})
    digest = hashlib.sha256(f"images\0torch.float32\0{(len(images), *images.shape)}\0".encode())
    for chunk, _ in images.chunks():
        digest.update(chunk.to(torch.float32).div_(255).contiguous().numpy().tobytes())
    values = labels.detach().cpu().contiguous()
    digest.update(f"labels\0{values.dtype}\0{tuple(values.shape)}\0".encode())
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _memory_format(model: nn.Module, images: Tensor, logits: Tensor, *, wanted: bool) -> Iterator[bool]:
    """Use the channels_last memory format for convolutions if the model supports it; yield whether it is used.

    A model does not support it if it fails, for instance because it calls ``view``, or if its ``logits`` in float32
    change.
    """
    own = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4]
    if not wanted or all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor, _ in own):
        yield False
        return
    try:
        for tensor, data in own:
            tensor.data = data.contiguous(memory_format=torch.channels_last)
        supported = True
        try:
            with full_float32(images.device):
                torch.testing.assert_close(trial_logits(model, images), logits)
        except (AssertionError, DeatError):
            supported = False
            for tensor, data in own:
                tensor.data = data
        yield supported
    finally:
        for tensor, data in own:
            tensor.data = data
