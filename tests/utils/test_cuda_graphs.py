"""What the recorder of CUDA graphs does with warnings; the graphs themselves need a GPU."""

from __future__ import annotations

import warnings

import pytest

from deat_rb.utils.cuda_graphs import _has_waited

PROTOTYPE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations "
    "(Triggered internally at Module.cpp:1003.)"
)
"""What torch 2.11 says when the check is turned on for the first time."""


@pytest.mark.parametrize(
    ("messages", "waited"),
    [([], False), ([PROTOTYPE], False), ([PROTOTYPE, "called a synchronizing CUDA operation"], True)],
)
def test_has_waited_passes_on_what_is_not_about_the_check(messages: list[str], waited: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for message in [*messages, "of a network"]:
            warnings.warn(message, stacklevel=1)
    with pytest.warns(UserWarning, match="of a network") as shown:
        assert _has_waited(caught) is waited
    assert [str(each.message) for each in shown] == ["of a network"]
