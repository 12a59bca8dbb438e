"""Figures that others published: the paper's Tables 1 to 5, and rows of RobustBench's leaderboard.

Accuracies are in percent. Nothing here was measured by deat-rb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PAPER_LINK = "https://arxiv.org/abs/2103.03076"

PAPER_EPS = "8/255"

PAPER_HARDWARE = "one GeForce RTX 2080 Ti"

ROBUSTBENCH_LINK = "https://github.com/RobustBench/robustbench/tree/master/model_info"


class PaperRow(NamedTuple):
    """A row of one of the paper's tables.

    Attributes:
        method: As the table spells it.
        natural: Accuracy without an attack.
        fgsm: Accuracy under FGSM; None in Table 5, which has no such column.
        pgd100: Accuracy under PGD-100.
        cw20: Accuracy under CW-20.
        minutes: Training time on `PAPER_HARDWARE`.
    """

    method: str
    natural: float
    fgsm: float | None
    pgd100: float
    cw20: float
    minutes: float


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, or one of the four parts of Table 5.

    Attributes:
        number: Which table.
        dataset: ``cifar10`` or ``cifar100``.
        arch: As `deat_rb.models.names.canonical_arch` spells it.
        setting: ``fast`` (cyclic learning rate, half precision) or ``standard`` (50 epochs, multi-step).
        rows: In the paper's order.
    """

    number: int
    dataset: str
    arch: str
    setting: str
    rows: tuple[PaperRow, ...]

    @property
    def title(self) -> str:
        """Data set, architecture and setting."""
        dataset = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[self.dataset]
        arch = {"preactresnet18": "PreActResNet-18", "wrn-34-10": "WRN-34-10"}[self.arch]
        return f"{dataset}, {arch}, {self.setting} setting"


@dataclass(frozen=True)
class Reference:
    """A row of RobustBench's leaderboard, from its ``model_info/<dataset>/Linf/<model_name>.json``.

    Attributes are that file's fields, accuracies as numbers.
    """

    dataset: str
    model_name: str
    link: str
    name: str
    authors: str
    venue: str
    architecture: str
    clean_acc: float
    autoattack_acc: float
    reported: float
    additional_data: bool = False
    footnote: str | None = None
    threat_model: str = "Linf"
    eps: str = "8/255"


PAPER_TABLES = (
    PaperTable(1, "cifar10", "preactresnet18", "fast", (
        PaperRow("DEAT-3", 80.09, 49.75, 42.94, 42.26, 5.8),
        PaperRow("DEAT-40%", 79.52, 48.64, 42.81, 42.08, 5.6),
        PaperRow("M-DEAT", 79.88, 49.84, 43.38, 43.36, 6.0),
        PaperRow("FREE-4", 78.46, 49.52, 43.97, 43.16, 7.8),
        PaperRow("FREE-8", 74.56, 48.60, 44.11, 42.49, 15.7),
        PaperRow("PGD-7", 70.90, 46.37, 43.17, 41.01, 15.1),
    )),
    PaperTable(2, "cifar10", "wrn-34-10", "fast", (
        PaperRow("DEAT-3", 81.58, 50.53, 44.39, 44.43, 41.6),
        PaperRow("DEAT-40%", 81.49, 51.08, 45.03, 44.49, 38.9),
        PaperRow("M-DEAT", 81.59, 51.29, 45.27, 45.09, 43.1),
        PaperRow("FREE-4", 80.34, 51.72, 46.17, 45.62, 55.4),
        PaperRow("FREE-8", 77.69, 51.45, 46.99, 46.11, 110.8),
        PaperRow("PGD-7", 72.12, 47.39, 44.80, 42.18, 109.1),
    )),
    PaperTable(3, "cifar100", "wrn-34-10", "fast", (
        PaperRow("DEAT-3", 55.35, 27.24, 23.89, 22.86, 41.7),
        PaperRow("DEAT-20%", 54.42, 26.01, 22.29, 21.58, 33.4),
        PaperRow("M-DEAT", 53.57, 27.19, 24.33, 23.08, 52.9),
        PaperRow("FREE-4", 53.50, 27.46, 24.31, 23.24, 55.8),
        PaperRow("FREE-8", 50.79, 27.03, 24.83, 23.04, 110.6),
        PaperRow("PGD-7", 43.00, 23.71, 22.38, 20.01, 109.2),
    )),
    PaperTable(4, "cifar10", "preactresnet18", "standard", (
        PaperRow("FREE-4", 85.00, 54.47, 45.64, 46.55, 81.7),
        PaperRow("FREE-6", 82.49, 54.55, 48.16, 47.42, 122.4),
        PaperRow("FREE-8", 81.22, 54.05, 48.14, 47.12, 163.2),
        PaperRow("M-DEAT", 84.57, 55.56, 47.81, 47.58, 100.5),
        PaperRow("PGD-7", 80.07, 54.68, 49.03, 47.95, 158.8),
        PaperRow("FAT-5", 84.15, 53.99, 45.49, 46.09, 91.8),
        PaperRow("M+PGD", 80.82, 55.25, 49.12, 48.13, 144.1),
        PaperRow("TRADES", 79.39, 55.82, 51.48, 48.89, 456.2),
        PaperRow("F+TRADES", 81.61, 56.31, 50.55, 48.43, 233.9),
        PaperRow("M+TRADES", 80.26, 55.69, 51.19, 48.57, 336.1),
        PaperRow("MART", 75.59, 57.24, 54.23, 48.60, 147.7),
        PaperRow("F+MART", 83.62, 56.03, 48.88, 46.42, 234.4),
        PaperRow("M+MART", 83.64, 57.15, 48.98, 45.88, 52.1),
    )),
    PaperTable(5, "cifar10", "preactresnet18", "fast", (
        PaperRow("M-DEAT", 79.88, None, 43.38, 43.36, 6.0),
        PaperRow("U-FGSM", 78.45, None, 43.86, 43.04, 5.6),
    )),
    PaperTable(5, "cifar10", "wrn-34-10", "fast", (
        PaperRow("M-DEAT", 81.59, None, 45.27, 45.09, 43.1),
        PaperRow("U-FGSM", 80.89, None, 45.45, 44.91, 41.3),
    )),
    PaperTable(5, "cifar10", "preactresnet18", "standard", (
        PaperRow("M-DEAT", 84.57, None, 47.81, 47.58, 100.5),
        PaperRow("U-FGSM", 81.99, None, 45.77, 45.74, 40.3),
    )),
    PaperTable(5, "cifar100", "wrn-34-10", "fast", (
        PaperRow("M-DEAT", 53.57, None, 24.33, 23.08, 52.9),
        PaperRow("U-FGSM", 52.54, None, 24.17, 22.93, 41.6),
    )),
)  # fmt: skip

REFERENCES = (
    Reference(
        "cifar10",
        "Wang2020Improving",
        "https://openreview.net/forum?id=rklOg6EFwS",
        "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
        "Yisen Wang, Difan Zou, Jinfeng Yi, James Bailey, Xingjun Ma, Quanquan Gu",
        "ICLR 2020",
        "WideResNet-28-10",
        87.50,
        56.29,
        65.04,
        additional_data=True,
    ),
    Reference(
        "cifar10",
        "Zhang2020Attacks",
        "https://arxiv.org/abs/2002.11242",
        "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger",
        "Jingfeng Zhang, Xilie Xu, Bo Han, Gang Niu, Lizhen Cui, Masashi Sugiyama, Mohan Kankanhalli",
        "ICML 2020",
        "WideResNet-34-10",
        84.52,
        53.51,
        54.36,
    ),
    Reference(
        "cifar10",
        "Rice2020Overfitting",
        "https://arxiv.org/abs/2002.11569",
        "Overfitting in adversarially robust deep learning",
        "Leslie Rice, Eric Wong, J. Zico Kolter",
        "ICML 2020",
        "WideResNet-34-20",
        85.34,
        53.42,
        58.0,
    ),
    Reference(
        "cifar10",
        "Zhang2019Theoretically",
        "https://arxiv.org/abs/1901.08573",
        "Theoretically Principled Trade-off between Robustness and Accuracy",
        "Hongyang Zhang, Yaodong Yu, Jiantao Jiao, Eric P. Xing, Laurent El Ghaoui, Michael I. Jordan",
        "ICML 2019",
        "WideResNet-34-10",
        84.92,
        53.08,
        56.43,
        footnote="Evaluated at eps = 0.031, about 7.9/255, instead of 8/255.",
    ),
    Reference(
        "cifar10",
        "Madry2018Towards",
        "https://arxiv.org/abs/1706.06083",
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
        "ICLR 2018",
        "WideResNet-34-10",
        87.14,
        44.04,
        47.04,
    ),
    Reference(
        "cifar10",
        "Andriushchenko2020Understanding",
        "https://arxiv.org/abs/2007.02617",
        "Understanding and Improving Fast Adversarial Training",
        "Maksym Andriushchenko, Nicolas Flammarion",
        "NeurIPS 2020",
        "ResNet-18",
        79.84,
        43.93,
        44.54,
        footnote="Focuses on fast adversarial training.",
    ),
    Reference(
        "cifar10",
        "Wong2020Fast",
        "https://arxiv.org/abs/2001.03994",
        "Fast is better than free: Revisiting adversarial training",
        "Eric Wong, Leslie Rice, J. Zico Kolter",
        "ICLR 2020",
        "ResNet-18",
        83.34,
        43.21,
        46.06,
    ),
    Reference(
        "cifar10",
        "Shafahi2019Adversarial",
        "https://arxiv.org/abs/1904.12843",
        "Adversarial Training for Free!",
        "Ali Shafahi, Mahyar Najibi, Amin Ghiasi, Zheng Xu, John Dickerson, Christoph Studer, Larry S. Davis, "
        "Gavin Taylor, Tom Goldstein",
        "NeurIPS 2019",
        "WideResNet-34-10",
        86.11,
        41.47,
        46.19,
    ),
    Reference(
        "cifar100",
        "Rice2020Overfitting",
        "https://arxiv.org/abs/2002.11569",
        "Overfitting in adversarially robust deep learning",
        "Leslie Rice, Eric Wong, J. Zico Kolter",
        "ICML 2020",
        "Pre-activation ResNet 18",
        53.83,
        18.95,
        28.1,
    ),
)
