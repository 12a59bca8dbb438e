"""Commands that a study records for its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import small_study

from deat_rb.reproduction.provenance import eval_command


@pytest.mark.parametrize(("arch", "flag"), [("mynet:build", " --trust-code"), ("wrn-10-1", "")])
def test_eval_command_trusts_the_network_of_the_study(arch: str, flag: str) -> None:
    (run,) = small_study({"method": "pgd-1", "arch": arch}).runs
    command = eval_command(run, Path("out/runs"), ["fgsm", "pgd-2"], 16)
    assert command == f"deat-rb eval out/runs/{run.name} --attacks fgsm,pgd-2 --n-examples 16{flag}"
