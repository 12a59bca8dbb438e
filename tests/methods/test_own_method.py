"""Third-party methods: entry points, and the example of docs/own_method.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from small_problems import Plane, plane_images
from torch import Tensor
from torch.optim import SGD
from training_problems import run_config

from deat_rb import create
from deat_rb.cli import main
from deat_rb.methods import registry
from deat_rb.methods.describe import describe
from deat_rb.methods.registry import known_methods, recipe
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import Interrupted

DOCUMENT = Path(__file__).parents[2] / "docs" / "own_method.md"


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def install(folder: Path, entries: str) -> None:
    """Write the metadata of an installed package with entry points."""
    info = folder / "nfgsm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nfgsm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[deat_rb.methods]\n{entries}\n")


def test_entry_point_names_are_case_insensitive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows.py").write_text("from deat_rb.methods import Recipe\nROW = Recipe(steps=3)\n")
    install(tmp_path, "Mine = my_rows:ROW")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "mine" in [name.lower() for name in known_methods()]
    assert create("mine", Plane()).steps == 3
    assert create("MINE", Plane()).attack == "mine"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def documented() -> ModuleType:
    """The document's Python code, executed."""
    module = ModuleType("nfgsm")
    for block in blocks("python"):
        exec(compile(block, str(DOCUMENT), "exec"), module.__dict__)
    return module


def noise_of(images: Tensor, bound: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.empty_like(images).uniform_(-bound, bound)


def test_own_method_doc_registers_its_methods(documented: ModuleType) -> None:
    assert known_methods()[-2:] == ["my-n-fgsm", "m+my-n-fgsm"]
    assert recipe("MY-N-FGSM")[1] is documented.N_FGSM
    assert describe("my-n-fgsm").cost == "2MT"
    assert recipe("m+my-n-fgsm")[1].guided


@pytest.mark.usefixtures("documented")
def test_own_method_doc_n_fgsm_by_hand() -> None:
    # On a plane the step is -alpha sign(w) for label 0 and +alpha sign(w) for label 1, wherever it begins.
    images, labels, _ = plane_images()
    direction = torch.where(labels == 0, -1.0, 1.0)[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    trainer = create("my-n-fgsm", Plane(), eps=0.1)
    assert trainer.alpha == pytest.approx(0.1)
    with torch.random.fork_rng(devices=[]):
        begun = (images + noise_of(images, 0.2, seed=3)).clamp(0, 1)
        torch.manual_seed(3)
        adv = trainer(images, labels)
    torch.testing.assert_close(adv, (begun + 0.1 * direction.view(8, 1, 2, 2)).clamp(0, 1), rtol=0, atol=1e-6)
    builtin = create("n-fgsm", Plane(), eps=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.testing.assert_close(builtin(images, labels), adv)
    assert 0.15 < float((adv - images).abs().max()) <= 0.3 + 1e-6


@pytest.mark.usefixtures("documented")
def test_own_method_doc_guided_n_fgsm_by_hand() -> None:
    images, labels, _ = plane_images()
    model = Plane()
    trainer = create("m+my-n-fgsm", model, eps=0.1)
    seen = []
    for _ in range(6):
        trainer.steps = trainer.schedule.steps
        assert trainer.alpha is not None
        seen.append((trainer.steps, round(trainer.alpha, 9)))
        trainer.schedule._rise()
    # alpha = eps/4; alpha* = max(alpha, eps / r); at most 4 steps.
    assert seen == [(1, 0.1), (2, 0.05), (3, 0.033333333), (4, 0.025), (4, 0.025), (4, 0.025)]

    trainer.steps = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        stats = trainer.training_step(images, labels, SGD(model.parameters(), lr=0.0))
        begun = (images + noise_of(images, 0.2, seed=4)).clamp(0, 1)
    # The L1 norm of each gradient is 10 sigmoid(-+m), where m = w.x + 1 at the noisy image.
    margins = begun.flatten(1) @ torch.tensor([1.0, -2.0, 3.0, -4.0]) + 1
    norms = 10 * torch.sigmoid(torch.where(labels == 0, -margins, margins))
    assert float(stats.l_x) == pytest.approx(float(norms.sum()), rel=1e-5)
    assert (float(stats.forwards), float(stats.backwards)) == (2, 2)


def test_own_method_doc_entry_points_reach_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = known_methods()
    (snippet,) = blocks("toml")
    entries: dict[str, str] = tomllib.loads(snippet)["project"]["entry-points"]["deat_rb.methods"]
    (tmp_path / "nfgsm.py").write_text(blocks("python")[0])
    install(tmp_path, "\n".join(f"{name} = {target}" for name, target in entries.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert known_methods() == [*paper, "my-n-fgsm", "m+my-n-fgsm"]
    table = CliRunner().invoke(main, ["methods"])
    assert table.exit_code == 0
    assert "m+my-n-fgsm" in table.output
    for name in entries:
        one = CliRunner().invoke(main, ["methods", name.upper()])
        assert one.exit_code == 0, one.output
        assert "noise of 2 eps" in one.output
    assert create("MY-N-FGSM", Plane()).attack == "my-n-fgsm"


def test_own_method_doc_time_limit_saves_a_checkpoint(
    documented: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (call,) = re.findall("``(.*)``", documented.TimeLimit.__doc__)
    with pytest.raises(Interrupted, match="keeps 0 of 20 epochs and 1 batch of the next; deat-rb train --resume"):
        eval(call.replace("TimeLimit(90)", "TimeLimit(0)"), documented.__dict__)
    assert list(tmp_path.glob("runs/*/checkpoints/*"))


def test_own_method_doc_replays_a_run(
    documented: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    for epoch, l_x in enumerate([1.0, 1.0, 2.0, 2.1, 9.0], start=1):
        run.append(EpochStats(epoch=epoch, l_x=l_x))
    documented.tried(str(run.path))
    steps, stop = capsys.readouterr().out.splitlines()
    assert steps == "[1, 2, 2, 3, 3]"
    assert "keep=3" in stop
