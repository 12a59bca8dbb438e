"""Bibliographic data of the paper."""

from __future__ import annotations

import re

PAPER = {
    "link": "https://arxiv.org/abs/2103.03076",
    "name": "Gradient-Guided Dynamic Efficient Adversarial Training",
    "authors": "Fu Wang, Yanghao Zhang, Yanbin Zheng, Wenjie Ruan",
    "venue": "arXiv, Mar 2021",
}

PAPERS_OWN = re.compile(r"(m\+(pgd|u-fgsm|trades?|mart)|m-deat|deat-\d+%?)\Z")
"""Names of the methods that the paper introduces."""
