"""Submissions: runs, exports and checkpoints as they are found, and declared metadata."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from board_problems import NAME, FakeEvaluation, bare_state, make_checkpoint, make_run, network, snapshot, submit
from torch import Tensor

from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import first_test_examples
from deat_rb.eval_target import open_target
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.datasets import load_board_dataset
from deat_rb.leaderboard.ranking import rank
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.leaderboard.untrusted_weights import as_safetensors
from deat_rb.leaderboard.verify import verify
from deat_rb.models.spec import build_model
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import load_tensors


def test_submit_reads_a_runs_training(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run"), hardware="one H100")
    assert (entry.steps, entry.epochs, entry.backward_passes, entry.train_seconds) == ((1, 2), 2, 30.0, 3.0)
    assert (entry.peak_memory, entry.method, entry.seed, entry.eps) == (2000, "m-deat", 0, "0.1")
    assert entry.authors == "Fu Wang, Yanghao Zhang, Yanbin Zheng, Wenjie Ruan"
    assert entry.metrics[1]["backwards"] == 20.0
    assert "stopped" not in entry.metrics[1]
    assert (entry.hardware, entry.versions) == ("one H100", {"torch": "2.14.1"})
    assert (entry.evaluated_on, entry.evaluated_with) == ("cpu", {"torch": "2"})


def test_submit_reads_a_checkpoint_in_robustbenchs_form(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    weights = make_checkpoint(tmp_path / "export")
    entry = submit(board, weights, "Wong2020Fast", data_dir=tmp_path)
    assert (entry.key, entry.eps, entry.authors) == ("cifar10/Linf/Wong2020Fast", "8/255", "Eric Wong, Leslie Rice")
    assert (entry.reported, entry.method, entry.steps, entry.backward_passes) == ("46.06", None, None, None)
    assert (entry.hardware, entry.versions, fake.calls[0]["n"]) == (None, {}, 500)
    assert entry.model is not None
    assert entry.model.arch == "wrn-10-1"
    exported = submit(board, tmp_path / "export", "Wong2020Fast_2", data_dir=tmp_path)
    assert exported.weights_sha256 == entry.weights_sha256


def test_submit_reads_a_wrapped_checkpoint_with_info(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    info = make_checkpoint(tmp_path / "export").parents[3] / "model_info/cifar10/Linf/Wong2020Fast.json"
    file = tmp_path / "epoch30.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in bare_state().items()}, "epoch": 30}, file)
    assert submit(board, file, "Wong2020Fast", info=info, data_dir=tmp_path).clean_acc == "80.00"


def test_submit_takes_flags_instead_of_a_model_info(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    file = tmp_path / "last.pt"
    torch.save(bare_state(), file)
    with pytest.raises(DeatError, match=r"without a model_info .*: give --arch, --dataset, --eps, such as --arch pre"):
        submit(board, file)
    with pytest.raises(DeatError, match=r"give --eps, such as"):
        submit(board, file, arch="wrn-10-1", dataset="digits")
    entry = submit(board, file, arch="wrn-10-1", dataset="digits", eps="0.1")
    assert (entry.key, entry.eps, entry.clean_acc) == (f"digits/Linf/{NAME}", "0.1", "80.00")
    weights = make_checkpoint(tmp_path / "export")
    with pytest.raises(DeatError, match="--eps is only for checkpoints without a model_info"):
        submit(board, weights, "Wong2020Fast", data_dir=tmp_path, eps=0.1)


def test_submit_takes_flags_in_the_norm_of_the_folder(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    flags = {"arch": "wrn-10-1", "dataset": "digits", "eps": "1.5"}
    for norm in ("L2", "Linf"):
        (tmp_path / norm).mkdir()
        torch.save(bare_state(), tmp_path / norm / "last.pt")
    entry = submit(board, tmp_path / "L2/last.pt", **flags)
    assert (entry.key, entry.eps) == (f"digits/L2/{NAME}", "1.5")
    assert len(fake.calls) == 2
    with pytest.raises(DeatError, match=r"last.pt is not valid: eps 1.5 is outside \(0, 1\], .*; only L2 radii may be"):
        submit(board, tmp_path / "Linf/last.pt", **flags)
    assert len(fake.calls) == 2


@pytest.mark.parametrize("flags", [{}, {"arch": "wrn-10-1", "dataset": "digits", "eps": "0.1"}])
def test_submit_of_a_file_of_a_run_names_the_run(tmp_path: Path, board: Board, flags: dict[str, str]) -> None:
    run = make_run(tmp_path / "run")
    message = rf"last\.safetensors is a file of the run {run}: submit that folder, which records how the network was"
    with pytest.raises(DeatError, match=message):
        submit(board, run / "last.safetensors", **flags)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in bare_state().items()}


def renamed(mean: str, std: str) -> dict[str, Tensor]:
    return {{"mu": mean, "sigma": std}.get(name, name): value for name, value in bare_state().items()}


@pytest.mark.parametrize(
    "state",
    [
        prefixed("model."),
        prefixed("module."),
        prefixed("module.model."),
        renamed("mean", "std"),
        network().state_dict(),
    ],
    ids=["model", "module", "both", "mean and std", "as in runs"],
)  # fmt: skip
def test_submit_reads_other_names_of_tensors(
    tmp_path: Path, board: Board, fake: FakeEvaluation, state: dict[str, Tensor]
) -> None:
    entry = submit(board, make_checkpoint(tmp_path / "x", NAME, state), data_dir=tmp_path)
    assert (board.path / entry.weights_place).read_bytes() == as_safetensors(network())
    assert entry.model is not None
    assert entry.model.mean == tuple(network().mu.flatten().tolist())


def test_submit_takes_a_checkpoint_without_normalization_as_it_is(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    state = {name: value for name, value in bare_state().items() if name not in ("mu", "sigma")}
    entry = submit(board, make_checkpoint(tmp_path / "x", NAME, state), data_dir=tmp_path)
    assert entry.model is not None
    assert (entry.model.mean, entry.model.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("spelled", ["WideResNet-10-1", "WRN-10-1", "Wide ResNet 10-1", "wideresnet_10-1"])
def test_submit_reads_spellings_of_architectures(
    tmp_path: Path, board: Board, fake: FakeEvaluation, spelled: str
) -> None:
    weights = make_checkpoint(tmp_path / "x", "Al-Dujaili2018Adversarial", architecture=spelled, eps=8 / 255)
    entry = submit(board, weights, "Al-Dujaili2018Adversarial", data_dir=tmp_path)
    assert (entry.architecture, entry.eps) == (spelled, "8/255")


@pytest.mark.slow
def test_submit_reads_preactresnet_under_its_other_name(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    model = build_model("preactresnet18", dataset="cifar10")
    state = {name.removeprefix("net."): value for name, value in model.state_dict().items()}
    entry = submit(board, make_checkpoint(tmp_path / "x", NAME, state, architecture="ResNet-18"), data_dir=tmp_path)
    assert entry.model is not None
    assert entry.model.arch == "preactresnet18"


def test_submit_takes_an_architecture_by_flag(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    weights = make_checkpoint(tmp_path / "x", NAME, architecture="a net of ours")
    with pytest.raises(DeatError, match="a net of ours"):
        submit(board, weights, data_dir=tmp_path)
    entry = submit(board, weights, data_dir=tmp_path, arch="wrn-10-1")
    assert entry.model is not None
    assert (entry.architecture, entry.model.arch) == ("a net of ours", "wrn-10-1")
    for arch in ("os:system", "wrn-16-1"):
        with pytest.raises(DeatError, match=r"submitted code is never run|another|differ"):
            submit(board, weights, "Other2021Name", data_dir=tmp_path, arch=arch)
    with pytest.raises(DeatError, match=r"--arch is only for checkpoints: omit it, since the run .* specifies it"):
        submit(board, make_run(tmp_path / "run"), "Other2021Name", arch="wrn-10-1")


@pytest.mark.parametrize(
    ("state", "message"),
    [({**bare_state(), "fc.weight": torch.tensor(1.0)}, "no classifier linear.weight or fc.weight"),
     ({**bare_state(), "mu": torch.tensor([])}, "mu"),
     ({**bare_state(), "sigma": torch.ones(3, dtype=torch.long)}, "sigma"),
     ({**bare_state(), "mu": torch.full((1, 3, 1, 1), torch.nan)}, "mean.0 = nan"),
     ({"w": torch.zeros(1)}, "no classifier")],
)  # fmt: skip
def test_submit_refuses_tensors_that_are_no_network(
    tmp_path: Path, board: Board, fake: FakeEvaluation, state: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(DeatError, match=message):
        submit(board, make_checkpoint(tmp_path / "x", NAME, state), data_dir=tmp_path)


def test_submit_refuses_a_run_with_another_normalization(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["network"]["mean"] = [0.5, 0.5, 0.5]
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(DeatError, match=r"contains the normalization .*, but \(0.5, .* is declared: submit the"):
        submit(board, run)


def test_submit_names_image_folders(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run", evaluated=False, dataset="folder", data_dir="/data/secret place")
    with pytest.raises(DeatError, match="--dataset-name is missing"):
        submit(board, run)
    note = "CIFAR-10 (JPEG), not CIFAR-10"
    entry = submit(board, run, data_dir=tmp_path / "CIFAR10 JPEG", dataset_note=note)
    assert (entry.dataset, entry.dataset_note) == ("cifar10-jpeg", note)
    assert "/data" not in entry.json_bytes().decode(), "paths of the submitter's machine are private"
    for name in ("cifar10", "cifar100", "imagenet", "digits", "cifar-10"):
        with pytest.raises(DeatError, match="cifar10, cifar100, digits, folder, imagenet are taken"):
            submit(board, run, "Wang2021Gradient_2", data_dir=tmp_path, dataset_name=name)


def test_submit_keeps_one_note_for_a_dataset(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run", evaluated=False, dataset="folder")
    metadata: dict[str, Any] = {"data_dir": tmp_path, "dataset_name": "cifar10-jpeg"}
    submit(board, run, dataset_note="JPEG", **metadata)
    assert submit(board, run, "Wang2021Gradient_2", **metadata).dataset_note == "JPEG"
    before, calls = snapshot(board.path), len(fake.calls)
    with pytest.raises(DeatError, match="--dataset-note differs from the board's note for cifar10-jpeg, "):
        submit(board, run, "Wang2021Gradient_3", dataset_note="This is CIFAR-10", **metadata)
    with pytest.raises(DeatError, match="are only for image folders: digits has its own name"):
        submit(board, make_run(tmp_path / "digits"), dataset_note="easy")
    assert (snapshot(board.path), len(fake.calls)) == (before, calls)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"footnote": "<script>"}, "footnote: has HTML"), ({"link": "ftp://x"}, "link: is not an https"),
     ({"external": float("nan")}, "external: is not an accuracy"), ({"external": -1.0}, "external: is not an accuracy"),
     ({"eps": "eight"}, "eps: is not a number"),
     ({"dataset_name": "../x"}, "dataset name .* is not valid"), ({"model_name": "x"}, "does not have the form"),
     ({"sample": 49}, "--sample 49 is too small")],
)  # fmt: skip
def test_submit_validates_metadata_before_opening_files(
    tmp_path: Path, board: Board, metadata: dict[str, Any], message: str
) -> None:
    options = {"sample": metadata.pop("sample")} if "sample" in metadata else {}
    with pytest.raises(DeatError, match=message):
        board.submit(tmp_path / "missing", SubmissionMetadata(**{"model_name": NAME, **metadata}), **options)


def test_submit_validates_a_runs_texts_before_evaluating(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text((run / "config.json").read_text().replace('"m-deat"', '"<b>mine</b>"'))
    with pytest.raises(DeatError, match="method: has HTML"):
        submit(board, run)
    assert fake.calls == []


@pytest.mark.parametrize(("size", "network_size"), [(100_000, 32), (10_000, 10_000)])
def test_submit_refuses_a_runs_huge_images_before_loading_any(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch, size: int, network_size: int
) -> None:
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["image_size"] = size
    config["network"]["image_size"] = network_size
    (run / "config.json").write_text(json.dumps(config))
    loaded: list[str] = []
    monkeypatch.setattr("deat_rb.leaderboard.submission.load_board_dataset", lambda name, **where: loaded.append(name))
    monkeypatch.setattr("deat_rb.leaderboard.submission.load_checked", lambda *_, **__: network())
    with pytest.raises(DeatError, match=f"has images of {size}x{size} and a network for {network_size}x{network_size}"):
        submit(board, run)
    assert loaded == []


@pytest.mark.parametrize(
    ("method", "declared", "expected"),
    [("m+pgd", {}, ("https://arxiv.org/abs/2103.03076", "arXiv, Mar 2021")),
     ("m+pgd", {"authors": "Jane Doe"}, (None, None)),
     ("m+pgd", {"link": "https://arxiv.org/abs/2601.00001"}, ("https://arxiv.org/abs/2601.00001", None)),
     ("pgd-7", {}, (None, None))],
)  # fmt: skip
def test_submit_does_not_mix_two_publications(
    tmp_path: Path, board: Board, fake: FakeEvaluation, method: str, declared: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    entry = submit(board, make_run(tmp_path / "run", method=method), **declared)
    assert (entry.link, entry.venue) == expected


# Checkpoints that do not say everything


@pytest.fixture
def really_loaded(fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch) -> FakeEvaluation:
    """The fake evaluation, with datasets that are really loaded."""
    monkeypatch.setattr("deat_rb.leaderboard.submission.load_board_dataset", load_board_dataset)
    monkeypatch.setattr("deat_rb.leaderboard.verify.load_board_dataset", load_board_dataset)
    monkeypatch.setattr("board_problems.places_of_digits", lambda: defaultdict(int))
    return fake


def four_classes(folder: Path, names: tuple[str, ...] = ("blue", "green", "grey", "red")) -> dict[str, Any]:
    """A checkpoint for the folder of colors, and what `submit` takes for it."""
    model = build_model("wrn-10-1", num_classes=len(names))
    torch.save({name.removeprefix("net."): value for name, value in model.state_dict().items()}, folder / "last.pt")
    return {"target": folder / "last.pt", "arch": "wrn-10-1", "dataset": "folder", "eps": "8/255",
            "dataset_name": "colors", "classes": names}  # fmt: skip


def test_submit_matches_labels_by_class_name(
    tmp_path: Path, board: Board, image_folder: Path, really_loaded: FakeEvaluation
) -> None:
    """Logits are in another order than the folder's classes, and there are more of them."""
    names = ("red", "white", "grey", "green", "blue")
    entry = submit(board, **four_classes(tmp_path, names), data_dir=image_folder)
    assert entry.classes == names
    data = load_board_dataset("folder", data_dir=image_folder, image_size=32)
    by_name = [names[label] for label in really_loaded.calls[0]["labels"]]
    assert by_name == [data.classes[label] for label in first_test_examples(data.test)[1]]
    verified = verify(board.path, data_dirs={"colors": image_folder}, sample=50)
    assert (verified.problems, verified.measured) == ([], 1)
    by_name = [names[label] for label in really_loaded.calls[-1]["labels"]]
    assert sorted(by_name) == sorted(data.classes[label] for label in first_test_examples(data.test)[1])


def test_open_target_of_an_entry_keeps_large_test_sets_in_their_files(
    tmp_path: Path, board: Board, image_folder: Path, really_loaded: FakeEvaluation
) -> None:
    submit(board, **four_classes(tmp_path), data_dir=image_folder)
    target = open_target(board.path / f"entries/colors/Linf/{NAME}.json", data_dir=image_folder, memory_limit=0)
    assert isinstance(target.test_images()[0], ImageFolder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"classes": ("red", "green", "blue", "black")}, "the class 'grey', which"),
     ({"dataset": "digits", "dataset_name": None, "data_dir": None}, "--classes is only for image folders: the logits"),
     ({"arch": "torchvision:resnet18"}, "accepts images of several sizes .*: give --image-size"),
     ({"image_size": 64, "data_dir": Path("missing")}, "takes 3x32x32 images, not 3x64x64"),
     ({"weights_key": "state_dict_ema"}, "state_dict_ema")],
)  # fmt: skip
def test_submit_refuses_checkpoints_that_do_not_say_enough(
    tmp_path: Path, board: Board, image_folder: Path, really_loaded: FakeEvaluation, changes: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(DeatError, match=message):
        submit(board, **{**four_classes(tmp_path), "data_dir": image_folder, **changes})


def test_submit_takes_a_normalization(
    tmp_path: Path, board: Board, image_folder: Path, really_loaded: FakeEvaluation
) -> None:
    options = four_classes(tmp_path)
    normalization = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    with pytest.raises(DeatError, match="already contains a mean and standard deviation: omit --mean"):
        submit(board, **options, data_dir=image_folder, normalization=normalization)
    state = {name: value for name, value in torch.load(options["target"]).items() if name not in ("mu", "sigma")}
    torch.save(state, options["target"])
    entry = submit(board, **options, data_dir=image_folder, normalization=normalization)
    assert entry.model is not None
    assert (entry.model.mean, entry.model.std) == normalization
    stored = load_tensors(board.path / entry.weights_place)
    assert stored["mu"].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_submit_refuses_to_choose_among_several_state_dicts(
    tmp_path: Path, board: Board, image_folder: Path, really_loaded: FakeEvaluation
) -> None:
    options = four_classes(tmp_path)
    state = torch.load(options["target"])
    averaged = {name: value * 0.5 if value.is_floating_point() and name != "sigma" else value
                for name, value in state.items()}  # fmt: skip
    torch.save({"state_dict": state, "state_dict_ema": averaged}, options["target"])
    with pytest.raises(DeatError, match=r"has several state dicts \('state_dict', 'state_dict_ema'\): choose one"):
        submit(board, **options, data_dir=image_folder)
    entry = submit(board, **options, data_dir=image_folder, weights_key="state_dict_ema")
    stored = load_tensors(board.path / entry.weights_place)
    assert torch.equal(stored["net.conv1.weight"], averaged["conv1.weight"])


def test_submit_decodes_only_test_images_within_the_limit(
    tmp_path: Path, board: Board, image_folder: Path, really_loaded: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []

    def spy(name: str, **options: Any) -> Dataset:
        loaded.append(options)
        return load_data(name, **options)

    monkeypatch.setattr("deat_rb.leaderboard.datasets.load_data", spy)
    submit(board, **four_classes(tmp_path), data_dir=image_folder, memory_limit=1000)
    verify(board.path, data_dirs={"colors": image_folder}, sample=50, memory_limit=1000)
    assert [(each["test_only"], each["memory_limit"]) for each in loaded] == [(True, 1000)] * 2


def test_submit_of_an_export_says_nothing_of_the_exports_own_evaluation(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    footnote = (
        "Trained with deat-rb, method standard. Trained and evaluated on v1.5 of my images, not on CIFAR-10. "
        "Accuracies on 60 test images. Evaluated at eps 0.1 instead of 8/255. "
        "AutoAttack was not run: its accuracy of 0.00 stands for unknown. Failed checks of the evaluation: eval mode. "
        "It is unknown whether additional training data were used: false stands for unknown. Our second try."
    )
    weights = make_checkpoint(tmp_path, clean_acc=..., autoattack_acc="0.00", unreliable=True, footnote=footnote)
    entry = submit(board, weights, "Wong2020Fast", dataset="digits")
    assert (entry.footnote, entry.unreliable, entry.method) == ("Our second try.", None, "standard")
    assert entry.additional_data is None
    assert [each.rank for each in rank([entry])] == [None], "a baseline"
    told = submit(board, weights, "Wong2020Fast_2", dataset="digits", additional_data=False, unreliable=True)
    assert (told.additional_data, told.unreliable) == (False, True)
