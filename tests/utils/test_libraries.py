"""Imports of libraries that warn."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from deat_rb.utils.libraries import import_timm

TIMM = """
import warnings
warnings.warn("`torch.jit.interface` is deprecated. Please use `torch.compile` instead.", FutureWarning)
warnings.warn("the weights are of another version", FutureWarning)
warnings.warn("something else")
"""


def test_import_timm_hides_only_torchs_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text(TIMM)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = import_timm()
    assert module.__file__ == str(tmp_path / "timm.py")
    assert [str(each.message) for each in seen] == ["the weights are of another version", "something else"]
    del sys.modules["timm"]
