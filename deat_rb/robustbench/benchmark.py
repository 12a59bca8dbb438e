"""`robustbench.benchmark` on given images."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.utils import seeding
from deat_rb.utils.compat import AutoAttack, check_dataset, robustbench
from deat_rb.utils.module_state import preserve_state
from deat_rb.utils.units import check_eps


def benchmark(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    batch_size: int,
    dataset: str = "cifar10",
    seed: int | None = None,
) -> tuple[float, float, Tensor]:
    """Runs `robustbench.benchmark` on given images: it always downloads its own, and takes no seed.

    The model is in eval mode meanwhile and afterwards as it was; torch's random state is left alone.

    Args:
        model: Takes images in [0, 1].
        images: (N, C, H, W), in [0, 1].
        labels: (N,).
        eps: Linf radius, in [0, 1] pixel units.
        batch_size: How many images are attacked together; some of AutoAttack's verdicts depend on it.
        dataset: What robustbench is told that the images are; it knows cifar10, cifar100 and imagenet.
        seed: Of AutoAttack; without one, it takes the clock.

    Returns:
        Clean accuracy, accuracy under AutoAttack, both in [0, 1], and (N,) bool: who is still classified correctly.

    Raises:
        DeatError: The data set is not one of robustbench's, or eps is not in (0, 1].
    """
    check_dataset(dataset)
    check_eps(eps)
    robustbench()
    evaluation: Any = importlib.import_module("robustbench.eval")
    own_alias = evaluation.AutoAttack.__module__.startswith("pyautoattack")  # sys.modules["autoattack"] = pyautoattack
    attack: Any = AutoAttack if own_alias else evaluation.AutoAttack
    crafted: list[Tensor] = []

    class Recorded:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.attack = attack(*args, seed=seed, **options)

        def run_standard_evaluation(self, *args: Any, **options: Any) -> Tensor:
            adversarial: Tensor = self.attack.run_standard_evaluation(*args, **options)
            crafted.append(adversarial)
            return adversarial

    def given_images(*_: object) -> tuple[Tensor, Tensor]:
        return images, labels

    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    with (
        preserve_state(model),
        seeding.preserved(),
        _replaced(evaluation, AutoAttack=Recorded, load_clean_dataset=given_images),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        model.eval()
        clean, robust = evaluation.benchmark(
            model, n_examples=len(images), dataset=dataset, threat_model="Linf", eps=eps, batch_size=batch_size,
            device=device, preprocessing=given_images,
        )  # fmt: skip
        with torch.no_grad():
            batches = torch.split(crafted[0], batch_size)
            predictions = [model(batch.to(device)).argmax(dim=1).cpu() for batch in batches]
    return clean, robust, torch.cat(predictions) == labels.cpu()


@contextmanager
def _replaced(module: ModuleType, **stand_ins: object) -> Iterator[None]:
    before = {name: getattr(module, name) for name in stand_ins}
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        vars(module).update(before)
