"""Bibliographic data of the paper."""

from __future__ import annotations

import re
from collections.abc import Mapping

PAPER = {
    "link": "https://arxiv.org/abs/2103.03076",
    "name": "Gradient-Guided Dynamic Efficient Adversarial Training",
    "authors": "Fu Wang, Yanghao Zhang, Yanbin Zheng, Wenjie Ruan",
    "venue": "arXiv, Mar 2021",
}

PAPERS_OWN = re.compile(r"(m\+(pgd|u-fgsm|trades?|mart)|m-deat|deat-\d+%?)\Z")
"""Names of the methods that the paper introduces."""


def publication(method: str, given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return link, name, authors and venue of a trained network's publication.

    Args:
        method: Name of the training method.
        given: Those that the author of the network gives. If there is none, they are the paper's for its own methods.
    """
    fields = {field: given.get(field) for field in PAPER}
    own = any(text is not None for text in fields.values()) or PAPERS_OWN.match(method) is None
    return fields if own else dict(PAPER)
