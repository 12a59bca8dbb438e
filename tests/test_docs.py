"""What README and docs say is run, or compared with what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from deat_rb.methods import known_methods, recipe

ROOT = Path(__file__).parents[1]


def test_the_readme_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert len(names["history"].rows) == 2  # type: ignore[attr-defined]  # whatever the example calls history
    assert set(names["report"].results) == {"natural", "fgsm", "pgd-20"}  # type: ignore[attr-defined]  # likewise


def test_the_notes_of_the_methods_stand_in_the_docs() -> None:
    text = " ".join((ROOT / "docs" / "methods.md").read_text().split())
    for name in known_methods():
        for note in recipe(name)[1].notes:
            assert f"- {note}" in text
