"""The commands of the documentation, executed with fewer images and epochs.

Those of the pages that a reader follows step by step are executed in order. Those that need a network, a GPU, a cluster
or the reader's own files are only parsed: tests/test_docs_commands.py.
"""

from __future__ import annotations

import contextlib
import csv
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from docs_commands import commands_of
from docs_examples import replaced
from PIL import Image
from short_autoattack import shorten

from deat_rb.cli import main
from deat_rb.reproduction import estimate
from deat_rb.reproduction.estimate import Times
from deat_rb.runs.plots import draw_curves
from deat_rb.training.metrics import EpochStats

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

CHEAP = {
    "train": ["--epochs", "1", "--train-size", "40", "--val-size", "4", "--batch-size", "20"],
    "eval": ["--n-examples", "8"],
    "reproduce": ["--dry-run"],
}
"""Options that are added to a command; the last value of an option counts."""

PLAIN = {"--resume", "--status", "--list", "--schema"}
"""Options beside which none of these are added."""


def execute(arguments: list[str], folder: Path, *options: str) -> str:
    """Run a command in a folder as the page has it, except for these options, else `CHEAP`; return what it prints."""
    added = list(options) if options or PLAIN & set(arguments) else CHEAP.get(arguments[0], [])
    with contextlib.chdir(folder):
        done = CliRunner().invoke(main, [*arguments, *added], prog_name="deat-rb")
    assert done.exit_code == 0, f"deat-rb {shlex.join([*arguments, *added])}\n{done.output}\n{done.exception!r}"
    return done.output


def page(name: str) -> list[list[str]]:
    return list(commands_of((ROOT / name).read_text(encoding="utf-8")))


@pytest.fixture(scope="module", autouse=True)
def one_picture() -> Iterator[None]:
    """Draw the curves of the first run only, for all: drawing takes longer than most commands here."""
    pictures: list[bytes] = []

    def draw(rows: Sequence[EpochStats], **options: Any) -> bytes:
        if not pictures:
            pictures.append(draw_curves(rows, **options))
        return pictures[0]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("plots", "summary"):
            patch.setattr(f"deat_rb.runs.{module}.draw_curves", draw)
        yield


@pytest.fixture(scope="module", autouse=True)
def few_passes() -> Iterator[None]:
    """Let AutoAttack take few iterations, and an estimate time one batch, and each kind of method only once."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, iterations=5, queries=50)
        patch.setattr("deat_rb.runs.estimate.BATCHES", 1)
        times: dict[str, Times] = {}
        measure = estimate._measure
        patch.setattr(
            estimate, "_measure", lambda plan, kind: times.get(kind) or times.setdefault(kind, measure(plan, kind))
        )
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's folder, with ``photos/<class>/``: 30 noisy images of one color for each of four classes."""
    root = tmp_path_factory.mktemp("reader")
    noise = torch.Generator().manual_seed(0)
    for number, name in enumerate(("cat", "dog", "horse", "ship")):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(30):
            pixels = torch.randint(40 * number, 40 * number + 90, (32, 32, 3), generator=noise).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "photos" / name / f"{index}.png")
    return root


def trained(folder: Path, name: str = "digits") -> None:
    """Train a run of that name, unless `test_first_run` has."""
    if not (folder / "runs" / name).exists():
        execute(["train", "--name", name], folder)


def test_first_run(folder: Path) -> None:
    shown = page("docs/first_run.md")
    assert [arguments[0] for arguments in shown[:2]] == ["train", "eval"]
    printed = {shlex.join(arguments): execute(arguments, folder) for arguments in shown
               if "cifar10" not in arguments and len(arguments) > 1}  # fmt: skip
    assert len(printed) >= 8
    assert (folder / "runs/digits/report.html").is_file()
    assert len(list((folder / "runs").iterdir())) == 5  # digits, plain, and three seeds
    assert "plain" in printed["compare runs/digits runs/plain"]


def test_photos(folder: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    shown = page("docs/guides/photos.md")
    assert [arguments[0] for arguments in shown] == ["data", "data", "train", "eval", "predict", "export"]
    for arguments in shown:
        execute(arguments, folder)
        if arguments[:2] == ["data", "split"]:
            assert len(list((folder / "photos-split/test").rglob("*.png"))) == 4 * 6
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 6  # a fifth of 30 images of each of four classes
    assert not any(row["error"] for row in rows)
    assert (folder / "photos.onnx").is_file()
    assert len(list((folder / "photos").rglob("*.png"))) == 120


def test_sharing_and_export(folder: Path) -> None:
    """Follows `test_first_run`, whose run it takes as NAME."""
    trained(folder)
    pushes = [each for each in page("docs/sharing.md") if each[0] == "push" and "--dry-run" in each]
    exports = [each for each in page("docs/deployment.md") if each[0] == "export" and "torch-export" in each]
    plans = [each for each in page("README.md") if each[0] == "train" and "--dry-run" in each]
    assert (len(pushes), len(exports), len(plans)) == (1, 1, 1)
    for arguments in (*pushes, *exports, *plans):
        execute([each.replace("runs/NAME", "runs/digits") for each in arguments], folder)
    assert "robust" in (folder / "runs/digits/hub/README.md").read_text(encoding="utf-8")
    assert (folder / "digits.pt2").is_file()


def test_long_runs(folder: Path) -> None:
    trained(folder)
    resume, seeds, evaluation, *_ = page("docs/guides/long_runs.md")
    assert (resume[:2], seeds[0], evaluation[0]) == (["train", "--resume"], "train", "eval")
    execute(["runs/digits" if each == "runs/NAME" else each for each in resume], folder)
    execute(seeds, folder)
    assert "m-deat" in execute(evaluation, folder)


def test_study(folder: Path) -> None:
    text = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    (study,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    cheap = {
        "seeds = [0, 1, 2]": "seeds = [0]",
        'alpha = ["12/255", "16/255"]': 'alpha = ["12/255"]',
        'dataset = "folder"': 'dataset = "digits"',
        'data_dir = "cifar10-jpeg"': "epochs = 1\ntrain_size = 40\nval_size = 4\nbatch_size = 20",
        '"fgsm,pgd-100,cw-20"': '"fgsm,pgd-2,cw-2"',
        "n_examples = 1000": "n_examples = 8",
        "autoattack = 200": "autoattack = 4",
    }
    (folder / "study.toml").write_text(replaced(study, cheap), encoding="utf-8")
    commands = [["sweep", "study.toml", *flags] for flags in (["--dry-run"], ["--print"], [], ["--status"])]
    assert all(each in page("docs/studies.md") for each in commands)
    printed = [execute(each, folder) for each in commands]
    assert "baseline" in printed[-1]


NOT_HERE = [
    "cifar10", "imagenet", "my-", "photos", "photo.jpg", "data/", "weights.pt", "last.pt", "models/", "runs/r50",
    "hf:", "robustbench:", "--pretrained", "--gpus", "--slurm", "--jobs", "wandb", "mlflow", "wrn-34-10",
    "m+trades-wrn",
]  # fmt: skip
"""Parts of commands that need the reader's own files, a network, several GPUs, a cluster or hours."""

ELSEWHERE = {"submit", "leaderboard", "sweep", "push", "export"}
"""Commands that other tests of this file execute."""

MENTIONED = [["data", "info"], ["eval", "--track"]]
"""Commands that a sentence names, without their argument."""

EXPANDED = {"runs/*": ["runs/digits", "runs/averaged"]}
"""What a shell makes of an argument: without ``plain``, which differs from ``digits`` in its name only."""

PLACES = {
    "runs/A": "runs/digits",
    "runs/B": "runs/plain",
    "runs/OTHER": "runs/plain",
    "RUN": "runs/digits",
    "RUN/config.json": "runs/digits/config.json",
    "runs/NAME/last-raw.safetensors": "runs/averaged/last-raw.safetensors",
    "NAME": "m+trades",
    "ARCH": "wrn-10-1",
    "DATASET": "digits",
    "TARGET": "table1",
}
"""What a page leaves to the reader, and what the test takes."""

WALKED = {
    "docs/first_run.md", "docs/guides/photos.md", "docs/guides/long_runs.md", "docs/studies.md", "docs/leaderboard.md"
}  # fmt: skip
"""Pages with a test of their own in this file."""


def others(name: str) -> list[list[str]]:
    """Return the commands of a page that a test can execute; one word alone names a command and is none."""
    found = [each for each in page(name) if len(each) > 1 and each[0] not in ELSEWHERE and each not in MENTIONED]
    return [each for each in found if not any(part in shlex.join(each) for part in NOT_HERE)]


PAGES = [
    name for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (name := str(path.relative_to(ROOT))) not in WALKED and "lab" not in path.parts and others(name)
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """A folder with the evaluated runs ``digits``, ``plain`` and ``averaged``, and images in ``FOLDER``."""
    shutil.copytree(folder / "photos", folder / "others" / "FOLDER")
    for name, options in {"digits": [], "plain": [], "averaged": ["--ema", "0.9"]}.items():
        execute(["train", "--name", name, *options], folder / "others")
        execute(["eval", f"runs/{name}", "--attacks", "fgsm", "--checks", "none"], folder / "others")
    return folder / "others"


@pytest.mark.parametrize("name", PAGES)
def test_other_pages(name: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    trained_last = "digits"
    for number, shown in enumerate(others(name)):
        places = PLACES | {"runs/NAME": f"runs/{trained_last}"}
        arguments = [path for each in shown for path in EXPANDED.get(each, [places.get(each, each)])]
        if shown[0] == "train" and not {"--resume", "--dry-run", "--seeds"} & set(shown):
            if "--name" not in arguments:
                arguments += ["--name", f"command-{number}"]
            trained_last = arguments[arguments.index("--name") + 1]
            shutil.rmtree(tmp_path / "runs" / trained_last, ignore_errors=True)
        execute(arguments, tmp_path)


def test_most_commands_are_executed() -> None:
    assert sum(len(others(name)) for name in PAGES) >= 40
    assert {"README.md", "docs/reproduction.md", "docs/guides/evaluation.md"} <= set(PAGES)


def test_board(folder: Path) -> None:
    small = ["--epochs", "3", "--train-size", "400", "--batch-size", "32", "--val-size", "10", "--validate-every", "3"]
    execute(["train", "--method", "standard", "--name", "board"], folder, *small)

    def run(part: str, *added: str, **places: str) -> str:
        """Execute the command of the page that has this part."""
        (shown,) = {tuple(each) for each in page("docs/leaderboard.md") if part in shlex.join(each)}
        arguments = [places.get(each, each) for each in shown]
        return execute(arguments, folder, *added)

    places = {"runs/NAME": "runs/board"}
    entry = "leaderboard/entries/digits/Linf/Wang2021Gradient_R18.json"
    evaluation, *_ = page("docs/leaderboard.md")
    execute([places.get(each, each) for each in evaluation], folder, "--n-examples", "50")
    run("--board leaderboard", "--sample", "50", **places)
    assert (folder / entry).is_file()
    run("leaderboard build")
    assert "Wang2021Gradient_R18" in (folder / "leaderboard/index.html").read_text(encoding="utf-8")
    assert "Wang2021Gradient_R18" in run("--sort cost")
    assert "1 re-measured, 0 problems" in execute(["leaderboard", "verify"], folder)
    run("--checks full", **{"leaderboard/entries/digits/Linf/NAME.json": entry})
    run("--as-dataset", **{"cifar10-jpeg": "digits"})
    assert list((folder / "DIR").rglob("*.json"))
