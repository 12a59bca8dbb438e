"""Which methods are the paper's own."""

from __future__ import annotations

import pytest

from deat_rb.methods.paper import PAPERS_OWN


@pytest.mark.parametrize("name", ["deat-3", "deat-40%", "m-deat", "m+pgd", "m+u-fgsm", "m+trades", "m+mart"])
def test_methods_that_the_paper_introduces(name: str) -> None:
    assert PAPERS_OWN.match(name)


@pytest.mark.parametrize(
    "name",
    ["pgd-7", "free-8", "fat-5", "f+mart", "n-fgsm", "m+n-fgsm", "m+mine", "m+trades-2", "m-deat-xl", "deat-ours"],
)
def test_methods_of_others_are_not_credited_to_the_paper(name: str) -> None:
    """The names of a user's own methods may begin like the paper's."""
    assert not PAPERS_OWN.match(name)
