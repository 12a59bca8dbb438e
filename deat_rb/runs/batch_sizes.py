"""Check of the number of images in the batches of a run."""

from __future__ import annotations

from deat_rb.runs.config import RunConfig
from deat_rb.utils.errors import DeatError


def check_batches(images: int, config: RunConfig, ranks: int) -> None:
    """Check that every batch has enough images for BatchNorm; with extra images, all batches are whole.

    Args:
        images: Number of training images.
        config: The run's configuration.
        ranks: Number of ranks that share each batch.

    Raises:
        DeatError: There are fewer images than a batch has, or too few in a batch.
    """
    batch_size = config.data.batch_size
    if images < batch_size:
        raise DeatError(f"{images} training images are fewer than a batch of {batch_size}; reduce --batch-size")
    rest = 0 if config.data.extra_data is not None else images % batch_size
    if rest == 1 and ":" in config.model.arch:
        raise DeatError(
            f"the last batch would have only 1 of the {images} training images (--batch-size {batch_size}), and "
            "BatchNorm needs 2 or more; change --batch-size or --train-size"
        )
    for size in {batch_size, rest or batch_size} if ranks > 1 else ():
        if size < 2 * ranks:
            raise DeatError(
                f"a batch would have only {size} of the {images} training images (--batch-size {batch_size}), and "
                f"{ranks} ranks need {2 * ranks} or more, 2 for each; change --batch-size or --train-size"
            )
