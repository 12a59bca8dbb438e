from __future__ import annotations

import torch

from deat_rb.utils.metering import Meter, Usage


def test_meter_subtracts_what_was_used_before() -> None:
    counter = iter([100.0, 107.5, 200.0, 201.0])
    meter = Meter(torch.device("cpu"), joules=lambda: next(counter))
    for expected in (7.5, 1.0):
        meter.start()
        assert meter.read() == Usage(joules=expected, memory=None)


def test_meter_measures_nothing_on_a_cpu() -> None:
    meter = Meter(torch.device("cpu"))
    meter.start()
    assert meter.read() == Usage(None, None)
