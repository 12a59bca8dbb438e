"""Small studies on a part of the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small_runs import SMALL

from deat_rb.reproduction.folder import StudyFolder
from deat_rb.reproduction.outputs import write_table
from deat_rb.reproduction.results import collect
from deat_rb.reproduction.study import Evaluation, Study, expand
from deat_rb.reproduction.tables import ResultTable
from deat_rb.reproduction.work import Worker

EVALUATION = Evaluation(("fgsm", "pgd-2"), 16)

TIMES = ("times", "minutes", "hardware")


def small_study(*rows: dict[str, Any], seeds: tuple[int, ...] = (0,), evaluation: Evaluation = EVALUATION) -> Study:
    options = {name: value for name, value in SMALL.items() if name != "method"}
    return Study("study", "A study", expand(options, {}, rows or ({"method": "pgd-1"},), seeds, evaluation))


def work(study: Study, path: Path) -> StudyFolder:
    folder = StudyFolder(path)
    Worker(study, folder).work()
    return folder


def table_json(study: Study, folder: StudyFolder) -> bytes:
    """Write the table and return the bytes of its JSON file, without times."""
    write_table(ResultTable.of(collect(folder, study.runs), name="table1", title=study.title), folder.path)
    content = json.loads((folder.path / "table1.json").read_bytes())
    return json.dumps(without_times(content)).encode()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value
