"""An evaluation that several ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import shared_evaluation
import torch
from ranks import on_two_ranks

from deat_rb.evaluation.report import Report
from deat_rb.utils.distributed import World


@pytest.mark.slow
def test_two_ranks_report_what_one_does(tmp_path: Path) -> None:
    alone = shared_evaluation.shared(World(), tmp_path / "alone")
    (tmp_path / "shared").mkdir()
    on_two_ranks(lambda: shared_evaluation.resume_on_ranks(tmp_path / "shared"), tmp_path / "log")
    report = Report.load(tmp_path / "shared")
    assert report.verdicts.keys() == alone.verdicts.keys()
    for name, verdict in alone.verdicts.items():
        assert torch.equal(report.verdicts[name], verdict), name
        ours, theirs = report.results[name], alone.results[name]
        assert (ours.forwards, ours.backwards, ours.parts) == (theirs.forwards, theirs.backwards, theirs.parts)
    assert report.curve == alone.curve
    assert [check.status for check in report.checks] == [check.status for check in alone.checks]
    assert 0 < alone.worst_case.n_correct < alone.results["natural"].n_correct
    for rank in range(2):
        assert (tmp_path / "shared" / f"robust-{rank}").read_text() == str(alone.worst_case.n_correct)
        message = (tmp_path / "shared" / f"failed-{rank}").read_text()
        assert message.startswith("the report cannot be saved; "), message
    assert int((tmp_path / "shared" / "stored").read_text()) > 20  # 5 clean batches, then 4 stages at 2 radii
    assert not (tmp_path / "shared" / "state").exists()
