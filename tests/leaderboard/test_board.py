"""The leaderboard: submitting, verifying, exporting, and the commands for it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from board_problems import (
    NAME,
    SHARES,
    FakeEvaluation,
    bare_state,
    claim,
    cli,
    digits,
    make_checkpoint,
    make_run,
    network,
    snapshot,
    submit,
)
from short_autoattack import shorten

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry, read_entry
from deat_rb.leaderboard.robustbench_export import export_board
from deat_rb.leaderboard.submission import training_command
from deat_rb.leaderboard.verify import verify
from deat_rb.models.spec import build_model
from deat_rb.models.weights import load_weights
from deat_rb.robustbench.register import register
from deat_rb.runs.config import RunConfig
from deat_rb.utils import compat, safe_load
from deat_rb.utils.errors import DeatError


def test_a_run_with_its_evaluation(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run"), sample=50, footnote="Mine.")
    assert read_entry(board.path / "entries/digits/Linf/Wang2021Gradient.json") == entry
    assert (entry.clean_acc, entry.autoattack_acc, entry.reported) == ("80.00", "40.00", "40.00")
    assert (entry.n_examples, entry.n_test, entry.is_subset) == (500, 500, False)
    assert (entry.steps, entry.epochs, entry.backward_passes, entry.train_seconds) == ((1, 2), 2, 30.0, 3.0)
    assert (entry.peak_memory, entry.method, entry.seed, entry.eps) == (2000, "m-deat", 0, "0.1")
    assert entry.authors == "Fu Wang, Yanghao Zhang, Yanbin Zheng, Wenjie Ruan"
    assert entry.footnote == "Mine."
    assert entry.figures["pgd-100"].n_correct == 250
    assert entry.remeasured["pgd-100"].n_examples == 50
    assert entry.metrics[1]["backwards"] == 20.0
    assert "stopped" not in entry.metrics[1]
    weights = board.path / "weights/digits/Linf/Wang2021Gradient.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == entry.weights_sha256
    model = build_model("wrn-10-1", dataset="digits")
    load_weights(model, safe_load.load_tensors(weights), source="the board")
    assert torch.equal(model.eval()(torch.zeros(1, 3, 32, 32)), network()(torch.zeros(1, 3, 32, 32)))
    assert not (board.path / ".staging").exists()


def test_the_sample_is_drawn_anew_and_from_the_claimed_examples(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    run = make_run(tmp_path / "run", n=400, evaluated=False)
    claim(run, n=400, shares={name: share * 500 / 400 for name, share in SHARES.items()})
    submit(board, run, sample=50)
    submit(board, run, sample=50, replace=True)
    one, other = (call["images"] for call in fake.calls)
    assert len(one) == len(other) == 50
    assert not torch.equal(one, other), "a submitter must not know which examples are measured"
    assert fake.calls[0]["seed"] != fake.calls[1]["seed"]
    assert fake.calls[0]["attacks"] == ("fgsm", "pgd-100", "cw-20", "autoattack")
    assert fake.calls[0]["eps"] == 0.1
    assert fake.calls[0]["checks"] == "quick"
    known = {image.numpy().tobytes() for image in digits().test.first(400).tensors()[0]}
    assert {image.numpy().tobytes() for image in one} <= known


def test_a_run_without_an_evaluation_is_evaluated(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run", evaluated=False), n_examples=100)
    assert fake.calls[0]["n"] == 100
    assert entry.is_subset
    assert entry.remeasured == {}
    claimed = make_run(tmp_path / "claimed")
    submit(board, claimed, "Wang2021Gradient_2", n_examples=50, evaluate_anew=True)
    assert fake.calls[1]["n"] == 50
    with pytest.raises(DeatError, match=r"--n-examples 50 is not what the eval.json of .* is of \(500\)"):
        submit(board, claimed, "Wang2021Gradient_3", n_examples=50)


def test_a_really_evaluated_run(tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=2, queries=2)
    run = make_run(tmp_path / "run", evaluated=False)
    entry = submit(board, run, n_examples=4)
    images, labels = digits().test.first(4).tensors()
    assert entry.figures["natural"].n_correct == int((network()(images).argmax(1) == labels).sum())
    assert {check.name for check in entry.checks} >= {"deterministic", "gradients present", "model unchanged"}
    assert entry.remeasured == {}


@pytest.mark.parametrize("shown", [0.4, 0.41])
def test_a_claim_within_the_interval_stands(tmp_path: Path, board: Board, fake: FakeEvaluation, shown: float) -> None:
    fake.shares["autoattack"] = shown
    assert submit(board, make_run(tmp_path / "run"), sample=100).autoattack_acc == "40.00"


def test_a_claim_is_refused_with_both_figures(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    """Wilson's 99.999 % interval of 100 of 500: z = 4.41717, centre (.2 + .0195114) / 1.0390228 = .21127, half
    4.41717 * sqrt(.00032 + .0000195114) / 1.0390228 = .07833."""
    fake.shares["autoattack"] = 0.2
    with pytest.raises(DeatError, match=r"claims 40.00 % under autoattack, and 20.00 % \(13.29 to 28.96\) of 500 exam"):
        submit(board, make_run(tmp_path / "run"), sample=500)
    assert not board.path.exists()


def test_a_claim_is_held_against_every_example(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    """30 of 500 too many, of which the interval of 99.9 % begins at .0335, where .03 are allowed.

    Centre (.06 + .0108274) / 1.0216548 = .06933, half 3.2905 * sqrt(.0001128 + .0000108274) / 1.0216548 = .03581.
    """
    run = make_run(tmp_path / "run", evaluated=False)
    claim(run, shares={**SHARES, "autoattack": 0.46})
    with pytest.raises(DeatError, match="says something else of 30 of 500 examples under autoattack than was measured"):
        submit(board, run, sample=500)
    claim(run, shares={**SHARES, "autoattack": 0.41})
    assert submit(board, run, sample=500).autoattack_acc == "41.00"


def test_foreign_checkpoint_in_robustbenchs_form(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    weights = make_checkpoint(tmp_path / "export")
    entry = submit(board, weights, "Wong2020Fast", data_dir=tmp_path)
    assert (entry.key, entry.eps, entry.authors) == ("cifar10/Linf/Wong2020Fast", "8/255", "Eric Wong, Leslie Rice")
    assert (entry.reported, entry.method, entry.steps, entry.backward_passes) == ("46.06", None, None, None)
    assert entry.model is not None
    assert entry.model.arch == "wrn-10-1"
    assert fake.calls[0]["n"] == 500
    assert (
        submit(board, tmp_path / "export", "Wong2020Fast_2", data_dir=tmp_path).weights_sha256 == entry.weights_sha256
    )


def test_a_checkpoint_with_its_json_elsewhere_and_wrapped(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    info = make_checkpoint(tmp_path / "export").parents[3] / "model_info/cifar10/Linf/Wong2020Fast.json"
    file = tmp_path / "epoch30.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in bare_state().items()}, "epoch": 30}, file)
    with pytest.raises(DeatError, match="give its model_info by --info"):
        submit(board, file, "Wong2020Fast")
    assert submit(board, file, "Wong2020Fast", info=info, data_dir=tmp_path).clean_acc == "80.00"


def test_names_are_taken_once(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    submit(board, run)
    before, calls = snapshot(board.path), len(fake.calls)
    with pytest.raises(DeatError, match="the board has digits/Linf/Wang2021Gradient already"):
        submit(board, run)
    with pytest.raises(DeatError, match="differs from Wang2021GRADIENT by small and capital letters only"):
        submit(board, run, "Wang2021GRADIENT")
    assert snapshot(board.path) == before
    assert len(fake.calls) == calls, "nothing is evaluated in vain"


def test_what_is_replaced_is_kept(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "one"))
    old = snapshot(board.path)
    submit(board, make_run(tmp_path / "two", seed=0, evaluated=False), replace=True, footnote="Second.")
    submit(board, make_run(tmp_path / "three"), replace=True, footnote="Third.", keep_weights=False)
    history = board.path / "history/digits/Linf/Wang2021Gradient"
    assert (history / "0001/Wang2021Gradient.json").read_bytes() == old["entries/digits/Linf/Wang2021Gradient.json"]
    weights = (history / "0001/Wang2021Gradient.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == entry.weights_sha256
    assert read_entry(history / "0002/Wang2021Gradient.json").footnote == "Second."
    assert board.entries()[0].footnote == "Third."
    assert not list(board.path.glob("weights/*/*/*")), "weights of an entry that the board no longer holds"
    assert verify(board.path, sample=0).problems == []


def test_data_of_one_name_are_the_same(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(board, make_run(tmp_path / "run"))
    path = board.path / "entries/digits/Linf/Wang2021Gradient.json"
    path.write_text(path.read_text().replace(digits().fingerprint, "c" * 64))
    with pytest.raises(DeatError, match=r"digits on this board is other data \(SHA-256 cccccccccccc..."):
        submit(board, make_run(tmp_path / "two"), "Wang2021Gradient_2")


def test_a_folder_has_a_name_of_its_own(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run", evaluated=False, dataset="folder", data_dir="/data/secret place")
    with pytest.raises(DeatError, match="Give a --dataset-name"):
        submit(board, run)
    note = "CIFAR-10 (JPEG), not CIFAR-10"
    entry = submit(board, run, data_dir=tmp_path / "CIFAR10 JPEG", dataset_note=note)
    assert (entry.dataset, entry.dataset_note) == ("cifar10-jpeg", note)
    assert "/data" not in entry.json_bytes().decode(), "where the images lay is nobody's business"
    for name in ("cifar10", "cifar100", "imagenet", "digits", "cifar-10"):
        with pytest.raises(DeatError, match="cifar10, cifar100, digits, folder, imagenet are taken"):
            submit(board, run, "Wang2021Gradient_2", data_dir=tmp_path, dataset_name=name)
    assert verify(board.path, sample=50).notes == [
        "cifar10-jpeg/Linf/Wang2021Gradient: not measured, as its images are not at hand; "
        "give --data-dir cifar10-jpeg=DIR"
    ]
    assert verify(board.path, sample=50, data_dirs={"cifar10-jpeg": tmp_path}).measured == 1


def test_what_is_said_of_the_data_stands(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run", evaluated=False, dataset="folder")
    metadata: dict[str, Any] = {"data_dir": tmp_path, "dataset_name": "cifar10-jpeg"}
    submit(board, run, dataset_note="JPEG", **metadata)
    assert submit(board, run, "Wang2021Gradient_2", **metadata).dataset_note == "JPEG"
    before, calls = snapshot(board.path), len(fake.calls)
    with pytest.raises(DeatError, match="the board says of cifar10-jpeg: JPEG; leave --dataset-note out"):
        submit(board, run, "Wang2021Gradient_3", dataset_note="This is CIFAR-10", **metadata)
    with pytest.raises(DeatError, match="for the images of a folder: digits has its own name"):
        submit(board, make_run(tmp_path / "digits"), dataset_note="easy")
    assert (snapshot(board.path), len(fake.calls)) == (before, calls)


def test_the_command_trains_the_same_again(tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(
        (make_run(tmp_path / "run", steps=3, early_stopping=False) / "config.json").read_text()
    )
    words = shlex.split(training_command(config))
    assert words[:4] == ["deat-rb", "train", "--method", "m-deat"]
    assert {"--steps", "--no-early-stopping", "--eps"} <= set(words)
    from cli.train import train

    context = train.make_context("train", words[2:])
    assert (context.params["eps"], context.params["steps"], context.params["early_stopping"]) == ("0.1", "3", False)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda entry, weights: weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1"), "other weights"),
        (lambda entry, weights: weights.unlink(), "cannot read"),
        (lambda entry, weights: entry.unlink(), r"weights/.* belongs to no entry"),
        (lambda entry, weights: entry.write_text(entry.read_text()[:100]), "is not valid JSON"),
        (lambda entry, weights: entry.write_text(entry.read_text().replace('"80.00"', '"90.00"')), "clean_acc 90.00"),
        (lambda entry, weights: entry.rename(entry.with_stem("Wang2021Other")), "lies in the wrong place"),
        (lambda entry, weights: entry.with_suffix(".txt").write_text("?"), "txt belongs to no entry"),
        (lambda entry, weights: entry.with_name("Wang2022Link.json").symlink_to(entry), "is a link"),
        (lambda entry, weights: weights.with_name("Wang2022Link.safetensors").symlink_to(entry), "is a link"),
    ],
)  # fmt: skip
def test_verify_says_what_is_wrong_and_where(
    tmp_path: Path, board: Board, fake: FakeEvaluation, spoil: Any, sentence: str
) -> None:
    submit(board, make_run(tmp_path / "run"))
    sound = verify(board.path, sample=50)
    assert (sound.problems, sound.notes, sound.entries, sound.measured) == ([], [], 1, 1)
    spoil(*(board.path / kind / f"digits/Linf/{NAME}{suffix}" for kind, suffix in
            (("entries", ".json"), ("weights", ".safetensors"))))  # fmt: skip
    problems = " ".join(verify(board.path, sample=50).problems)
    assert re.search(sentence, problems), problems
    assert NAME in problems or "Wang2022Link" in problems


def test_verify_measures_again(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    fake.shares["pgd-100"] = 0.1
    (problem,) = verify(board.path, sample=500).problems
    assert problem.startswith("digits/Linf/Wang2021Gradient: the entry claims 50.00 % under pgd-100, and 10.00 % (")
    fake.shares["pgd-100"] = 0.5
    fake.checks = (Check(name="deterministic", status="fail", figure=9.0, sentence="It draws."),)
    (problem,) = verify(board.path, sample=100).problems
    assert "the model fails the check 'deterministic': It draws." in problem


def test_verify_hashes_the_history(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "one"))
    submit(board, make_run(tmp_path / "two"), replace=True)
    kept = board.path / f"history/digits/Linf/{NAME}/0001/{NAME}.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\7")
    assert [problem for problem in verify(board.path, sample=0).problems if "0001" in problem and "SHA" in problem]


def test_only_the_weights_of_the_entry_are_exported(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    safe_load.save_tensors(board.path / f"weights/digits/Linf/{NAME}.safetensors", network(1).state_dict())
    with pytest.raises(DeatError, match=r"has the SHA-256 \w{12}\.\.\., and its entry says \w{12}"):
        export_board(board.path, tmp_path / "out", as_dataset="cifar10")
    assert not (tmp_path / "out").exists()


def test_export_is_what_robustbench_loads(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_checkpoint(tmp_path / "export"), "Wong2020Fast_Board", data_dir=tmp_path)
    submit(board, make_run(tmp_path / "run"), "Wang2021Gradient_Board")
    exported = export_board(board.path, tmp_path / "out")
    assert exported.names == ("cifar10/Wong2020Fast_Board",)
    assert exported.left_out[0].startswith("digits/Linf/Wang2021Gradient_Board: RobustBench has no data set digits")
    digits = export_board(board.path, tmp_path / "digits", dataset="digits", as_dataset="cifar10")
    assert (digits.names, digits.left_out) == (("cifar10/Wang2021Gradient_Board",), ())
    with pytest.raises(DeatError, match="has no data set 'digit': did you mean 'digits'"):
        export_board(board.path, tmp_path / "none", dataset="digit", as_dataset="cifar10")
    both = export_board(board.path, tmp_path / "both", as_dataset="cifar10")
    assert both.left_out == ()
    assert set(register(tmp_path / "both")) == {"Wong2020Fast_Board", "Wang2021Gradient_Board"}
    robustbench: Any = compat.robustbench()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name in ("Wong2020Fast_Board", "Wang2021Gradient_Board"):
        loaded = robustbench.load_model(
            name, model_dir=tmp_path / "both/models", dataset="cifar10", threat_model="Linf"
        )
        assert torch.equal(loaded(images), network()(images))
    info = json.loads((tmp_path / "both/model_info/cifar10/Linf/Wang2021Gradient_Board.json").read_text())
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("80.00", "40.00", "0.1")
    assert "not on CIFAR-10" in info["footnote"]
    with pytest.raises(DeatError, match="nothing on the board"):
        export_board(_only_digits(tmp_path, board), tmp_path / "none")


def _only_digits(tmp_path: Path, board: Board) -> Path:
    other = Board(tmp_path / "digits-only")
    entry = next(entry for entry in board.entries() if entry.dataset == "digits")
    other.commit(Entry.checked({**dict(entry), "weights_file": None}, "x"), None)
    return other.path


def test_the_command_line(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    done = cli("submit", run, "--board", board.path, "--model-name", NAME, "--paper", "https://example.org/1",
               "--footnote", "Mine.", "--sample", 50, "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith(f"written: {board.path}/entries/digits/Linf/Wang2021Gradient.json")
    assert board.entries()[0].link == "https://example.org/1"
    again = cli("submit", run, "--board", board.path, "--model-name", NAME)
    assert again.exit_code == 2
    assert "already: choose another model name, or replace it by --replace" in again.output
    table = cli("leaderboard", "--board", board.path)
    assert (table.exit_code, NAME in table.output) == (0, True)
    shown = json.loads(cli("leaderboard", "--board", board.path, "--json").output)
    assert [(each["rank"], each["model_name"]) for each in shown] == [(1, NAME)]
    assert cli("leaderboard", "--board", board.path, "--csv").output.startswith("dataset,threat,eps,part,rank,model")
    assert cli("leaderboard", "--board", board.path, "--markdown").output.startswith("**digits, Linf")
    assert cli("leaderboard", "--board", board.path, "--latex").output.startswith(r"\begin{table}")
    sound = cli("leaderboard", "--board", board.path, "verify", "--sample", 50, "--device", "cpu")
    assert (sound.exit_code, sound.output.splitlines()[-1]) == (0, "1 entries, 1 measured again, 0 problems")
    (board.path / f"entries/digits/Linf/{NAME}.json").write_text("{}")
    broken = cli("leaderboard", "verify", "--board", board.path, "--sample", 0)
    assert broken.exit_code == 1
    assert f"problem: {board.path}/entries/digits/Linf/{NAME}.json" in broken.output
    nowhere = cli("leaderboard", "--board", tmp_path / "nowhere")
    assert nowhere.exit_code == 2
    assert "there is no leaderboard at" in nowhere.output
    assert cli("leaderboard", "verify", "--board", board.path, "--data-dir", "x").exit_code == 2
    assert cli("leaderboard", "verify", "--board", board.path, "--sample", "-1").exit_code == 2
    assert cli("submit", run, "--model-name", NAME, "--sample", 0, "--board", tmp_path / "b").exit_code == 2


def test_the_command_line_exports(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    claim(tmp_path / "run")
    done = cli("leaderboard", "export", "--board", board.path, "--robustbench", tmp_path / "out",
               "--as-dataset", "cifar10")  # fmt: skip
    assert (done.exit_code, done.output) == (0, f"written: cifar10/{NAME}\n")
    assert (tmp_path / f"out/models/cifar10/Linf/{NAME}.pt").is_file()
