"""The command ``deat-rb sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .network_options import import_from_current_folder
from .study_options import WorkOptions, study_options, work


@click.command("sweep")
@click.argument("study", metavar="STUDY", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), metavar="PATH",
              help="Folder of the runs and tables.  [default: the file's name without suffix]")  # fmt: skip
@click.option("--trust-code", is_flag=True,
              help="Allow the study to call the package.module:factory that builds its networks.")  # fmt: skip
@study_options
def sweep(study: Path, output: Path | None, trust_code: bool, **options: Any) -> None:
    """Train and evaluate all runs of a study.

    The result is a table of means over seeds. STUDY is a TOML or JSON file: options of all runs in [options],
    combinations in [grid], single runs in [[runs]], seeds, and attacks in [evaluation]; the options are those of
    deat-rb train. See docs/studies.md.

    To share the work, start the same command in several shells, or on several machines with a shared disk: each
    process claims the runs it works on. The command may be killed at any time and repeated: it skips finished runs and
    resumes the others. A run that fails is listed with the reason, and the others continue.
    """
    from rich.console import Console

    from deat_rb.models.names import check_trust
    from deat_rb.reproduction.folder import StudyFolder
    from deat_rb.reproduction.outputs import write_table
    from deat_rb.reproduction.results import collect
    from deat_rb.reproduction.study import read_study
    from deat_rb.reproduction.tables import ResultTable, as_rich, images_text, unfinished_lines
    from deat_rb.utils.errors import DeatError

    described = read_study(study)
    for run in described.runs:
        check_trust(run.options.model.arch, trust_code, source=f"the study {study}")
        import_from_current_folder(run.options.model.arch)
    folder = StudyFolder(output or Path(study.stem))
    if (folder.path / f"{described.name}.json").resolve() == study.resolve():
        raise DeatError(
            f"the results would overwrite the study {study}: give another folder by --output, or move the study"
        )

    def write() -> None:
        results = collect(folder, described.runs)
        measured = images_text(results)
        table = ResultTable.of(
            results, name=described.name, title=described.title, notes=[measured] if measured else []
        )
        written = write_table(table, folder.path)
        Console().print(as_rich(table))
        for line in (*table.notes, *unfinished_lines(table)):
            click.echo(line)
        click.echo(f"written: {', '.join(map(str, written))}")

    arguments = ["sweep", str(study), "--output", str(folder.path), *(["--trust-code"] if trust_code else [])]
    work(described, folder, WorkOptions(**options), arguments, write)
