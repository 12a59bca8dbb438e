"""`robustbench.benchmark` on given images with a given seed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from deat_rb.evaluation.frozen_model import prepared_for_eval
from deat_rb.utils import seeding
from deat_rb.utils.compat import AutoAttack, check_dataset, robustbench
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
    """Run `robustbench.benchmark` on given images with a given seed, which it does not accept as arguments.

    The model is evaluated in eval mode; its state and torch's random state are restored afterwards.

    Args:
        model: Classifier of images in [0, 1].
        images: Test images (N, C, H, W), in [0, 1].
        labels: Labels (N,).
        eps: Linf radius, in [0, 1] pixel units.
        batch_size: Number of images attacked at a time; some of AutoAttack's results depend on it.
        dataset: Dataset name passed to robustbench: cifar10, cifar100 or imagenet.
        seed: Random seed of AutoAttack; by default the current time.

    Returns:
        Clean accuracy and robust accuracy under AutoAttack, both in [0, 1], and a bool tensor (N,) that marks the
        examples still classified correctly.

    Raises:
        DeatError: RobustBench has no such dataset, eps is not in (0, 1], or the model does not accept the images.
    """
    check_dataset(dataset)
    check_eps(eps)
    robustbench()
    evaluation: Any = importlib.import_module("robustbench.eval")
    own_alias = evaluation.AutoAttack.__module__.startswith("pyautoattack")  # sys.modules["autoattack"] = pyautoattack
    attack: Any = AutoAttack if own_alias else evaluation.AutoAttack
    adversarial: list[Tensor] = []

    class Recorded:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.attack = attack(*args, seed=seed, **options)

        def run_standard_evaluation(self, *args: Any, **options: Any) -> Tensor:
            result: Tensor = self.attack.run_standard_evaluation(*args, **options)
            adversarial.append(result)
            return result

    def given_images(*_: object) -> tuple[Tensor, Tensor]:
        return images, labels

    with (
        prepared_for_eval(model, images, labels, batch_size=batch_size) as prepared,
        seeding.preserved(),
        _replaced(evaluation, AutoAttack=Recorded, load_clean_dataset=given_images),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        clean, robust = evaluation.benchmark(
            model, n_examples=len(images), dataset=dataset, threat_model="Linf", eps=eps, batch_size=batch_size,
            device=prepared.device, preprocessing=given_images,
        )  # fmt: skip
        predictions = prepared.predict(adversarial[0])
    return clean, robust, predictions == labels.cpu()


@contextmanager
def _replaced(module: ModuleType, **stand_ins: object) -> Iterator[None]:
    before = {name: getattr(module, name) for name in stand_ins}
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        vars(module).update(before)
