"""The place of a batch in the training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The place of a batch in the training, for `TrainerBase.begin_batch`.

    Attributes:
        epoch: The epoch, numbered from 1.
        epochs: Number of epochs, T; `deat_rb.utils.options.OPEN` for an open-ended run.
        batch: Number of the batch in the epoch, from 0.
        size: Number of examples in the global batch.
        num_classes: Number of outputs of the model.
        positions: Positions of the global batch's images among the training images, (size,) int64, if the trainer
            `needs_positions`.
        number_of_images: Number of training images, if the trainer `needs_positions`.
    """

    epoch: int
    epochs: int
    batch: int
    size: int
    num_classes: int
    positions: Tensor | None = None
    number_of_images: int = 0
