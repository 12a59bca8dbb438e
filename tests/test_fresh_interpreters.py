"""The helper that runs code in fresh interpreters, with and without `os.fork`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_interpreters import Fresh, run_anew, started

CODE = """from __future__ import annotations
import here, sys
print(here.VALUE, 'deat_rb' in sys.modules)
print('beside', file=sys.stderr)
if here.VALUE == 2:
    raise ValueError('two')
"""


@pytest.mark.slow
@pytest.mark.parametrize("value", [1, 2])
def test_an_interpreter_that_is_started_anew_does_what_a_fork_does(
    value: int, tmp_path: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.py").write_text(f"VALUE = {value}\n")
    forked = fresh(CODE, tmp_path, str(tmp_path))
    monkeypatch.delattr("os.fork", raising=False)
    with started() as run:
        assert run is run_anew
        anew = run(CODE, tmp_path, str(tmp_path))
    for each in (forked, anew):
        assert (each.returncode, each.stdout) == (value - 1, f"{value} False\n")
        lines = each.stderr.splitlines()
        assert (lines[0], lines[-1]) == ("beside", "beside" if value == 1 else "ValueError: two")
