"""`deat_rb.sharing` and models on the Hub, with huggingface_hub's own client and a local server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import torch
from board_problems import make_run, network
from click.testing import CliRunner, Result
from hub_server import TOKEN, Hub, Repository
from huggingface_hub import RepoCard
from noise_folder import make_folder

import deat_rb
from deat_rb.cli import main
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import plan
from deat_rb.runs.resolution import resolve
from deat_rb.sharing import _command_without_folders, push
from deat_rb.utils.errors import DeatError
from deat_rb.utils.hub import HubAddress, is_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local Hub, with an empty cache and a token that may write there."""
    with hub_server.running() as server:
        hub_server.use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of M-DEAT on the digits with made-up metrics and evaluation."""
    return make_run(tmp_path / "my-run")


def cli(*arguments: object) -> Result:
    done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="deat-rb")
    assert TOKEN not in done.output
    return done


def refusal(*arguments: object) -> str:
    done = cli(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr.splitlines()[-1].removeprefix("Error: ")


@pytest.mark.slow
def test_compare_and_export_take_runs_on_the_hub(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "hf:me/net")
    compared = cli("compare", run, "hf:me/net")
    assert compared.exit_code == 0, compared.output
    assert "hf:me/net" in compared.output
    options = ["--model-name", "Wang2021Gradient", "--as-dataset", "cifar10", "--output"]
    assert cli("export", run, *options, tmp_path / "a").exit_code == 0
    exported = cli("export", "hf:me/net", *options, tmp_path / "b")
    assert exported.exit_code == 0, exported.output
    files = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
             for root in (tmp_path / "a", tmp_path / "b")]  # fmt: skip
    assert files[0] == files[1] != {}
    weights = next(name for name in hub.repositories["me/net"].commits[hub.repositories["me/net"].head]
                   if name.endswith(".safetensors") and "verdicts" not in name)  # fmt: skip
    said = refusal("export", f"hf:me/net/{weights}", *options, tmp_path / "c")
    assert "is a file of weights, but RobustBench's format needs a run with its evaluation" in said
    assert "--group-by needs run directories, not hf:me/net" in refusal(
        "compare", run, "hf:me/net", "--group-by", "arch"
    )
    (run / "eval.json").unlink()
    push(run, "hf:me/bare")
    said = refusal("compare", "hf:me/bare", "hf:me/net")
    assert "has no evaluation: run deat-rb eval hf:me/bare --json FILE.json, and compare that file" in said
    said = refusal("export", "hf:me/bare", *options, tmp_path / "d")
    assert said.endswith("evaluate the run with deat-rb eval --autoattack where it was trained, push it again, then "
                         "export it")  # fmt: skip
    hub.status = 503
    exported = cli("export", "hf:me/net", *options, tmp_path / "e")
    assert "hf:me/net is used as last downloaded" in exported.stderr


def test_the_data_path_of_a_run_on_the_hub_is_not_read(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "hf:me/net")
    repository = hub.repositories["me/net"]
    files = repository.commits[repository.head]
    config = json.loads(files["config.json"])
    assert config["data"]["data_dir"] is None
    config["data"] |= {"dataset": "folder", "data_dir": str(make_folder(tmp_path / "images"))}
    files["config.json"] = json.dumps(config).encode()
    assert refusal("eval", "hf:me/net").endswith("the network was trained on images of its author: give your own with "
                                                 "--data-dir")  # fmt: skip


def test_the_card_of_a_network_of_ones_own_says_that_its_module_is_needed(hub: Hub, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model"]["arch"] = "tiny_networks:Mean"
    (run / "config.json").write_text(json.dumps(config))
    pushed = push(run, "hf:me/net", folder=tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    for text in ('deat_rb.load_model("hf:me/net", trust_code=True)', "deat-rb predict hf:me/net photo.jpg --trust-code",
                 "`tiny_networks:Mean` builds the network: its module must be importable"):  # fmt: skip
        assert text in card
    assert "runs no code" not in card
    assert any("the network is built by tiny_networks:Mean, which is not uploaded" in note for note in pushed.notes)
    assert cli("push", run, "hf:me/net").stdout.endswith(f"@{hub.repositories['me/net'].head} --trust-code\n")


# Addresses


@pytest.mark.parametrize(
    ("text", "repository", "file", "revision"),
    [("hf:me/net", "me/net", "", "main"), ("hf:me/net@v1.0", "me/net", "", "v1.0"),
     ("hf:me/net/a/b.pt@main", "me/net", "a/b.pt", "main")],
)  # fmt: skip
def test_parse_splits_an_address(text: str, repository: str, file: str, revision: str) -> None:
    assert is_hub(text)
    assert HubAddress.parse(text) == HubAddress(repository, file, revision)


@pytest.mark.parametrize("text", ["hf:", "hf:net", "hf:me/..", "hf:me/net/../../x", "hf:me/net@", "hf:me/net/.x",
                                  "hf:/me/net", "hf:me/net\n", "hf:me/net@a b", "hf:me/n?t"])  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(
        DeatError, match="is not a model on the Hub: give hf:owner/name, optionally with /file or @revision"
    ):
        HubAddress.parse(text)


# Push


def test_push_uploads_the_run_and_load_model_takes_it(hub: Hub, run: Path) -> None:
    done = cli("push", run, "hf:me/net", "--license", "mit", "--private")
    assert done.exit_code == 0, done.output
    repository = hub.repositories["me/net"]
    assert repository.private
    files = repository.commits[repository.head]
    assert files.keys() == {".gitattributes", "README.md", "config.json", "metrics.jsonl", "last.safetensors",
                            "eval.json", "eval-verdicts.safetensors"}  # fmt: skip
    assert files["last.safetensors"] == (run / "last.safetensors").read_bytes()
    assert f"written: hf:me/net@{repository.head}\n" in done.stdout

    images = torch.rand(2, 3, 32, 32)
    model = deat_rb.load_model("hf:me/net")
    assert torch.equal(model(images), network()(images))
    assert model.classes == ()
    hub.server_close()
    hub.shutdown()
    assert torch.equal(deat_rb.load_model("hf:me/net")(images), network()(images))  # from the cache
    pinned = deat_rb.load_model(f"hf:me/net@{repository.head}")
    assert torch.equal(pinned(images), network()(images))


def test_push_writes_a_card_with_the_tables_row(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = cli("push", run, "hf:me/net", "--dry-run", "--output", tmp_path / "out", "--license", "cc-by-4.0")
    assert done.exit_code == 0, done.output
    assert not hub.requests
    card = RepoCard.load(tmp_path / "out" / "README.md")
    metadata, text = card.data.to_dict(), card.text
    assert (metadata["license"], metadata["library_name"], metadata["pipeline_tag"]) == (
        "cc-by-4.0", "deat-rb", "image-classification"
    )  # fmt: skip
    report = json.loads((run / "eval.json").read_text())
    measured = {each["name"]: each["value"] for each in metadata["model-index"][0]["results"][0]["metrics"]}
    assert measured["accuracy"] == report["results"]["natural"]["accuracy"]
    assert len(measured) == len(report["results"])
    header, row = (line for line in text.splitlines() if line.startswith(("| method | arch", "| m-deat |")))
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["natural"] == f"{100 * report['results']['natural']['accuracy']:.2f} %"
    assert (cells["epochs"], cells["backward passes"]) == ("2", "30")  # 10 and 20
    assert "deat-rb train --method m-deat" in text
    assert 'deat_rb.load_model("hf:me/net")' in text


def test_pushed_files_have_no_folders_of_this_machine(hub: Hub, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {
        "dataset": "folder",
        "data_dir": "/home/me/secret/photos",
        "extra_data": "/home/me/secret/1m.npz",
    }
    config["model"] |= {"init_from": "/home/me/secret/first.pt", "weights": "/home/me/secret/timm.pth"}
    config["attack"] |= {"norm": "L2"}
    (run / "config.json").write_text(json.dumps(config))
    report = json.loads((run / "eval.json").read_text())
    command = (
        "deat-rb eval '/home/me/secret room/my run' --data-dir=~/secret/b --json ../secret/c.json "
        "--eps 8/255,16/255 --attacks 'torchattacks.PGD(alpha=2/255)' --init-from hf:me/net"
    )
    report["provenance"] |= {"command": command, "note": "see https://example.org/a/b"}
    (run / "eval.json").write_text(json.dumps(report))
    push(run, "hf:me/net", folder=tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"secret" not in file.read_bytes(), file
    provenance = json.loads((tmp_path / "out" / "eval.json").read_text())["provenance"]
    assert provenance["command"] == (
        "deat-rb eval 'my run' --data-dir=b --json c.json --eps 8/255,16/255 "
        "--attacks 'torchattacks.PGD(alpha=2/255)' --init-from hf:me/net"
    )
    assert _command_without_folders("deat-rb eval '/home/me/open") == "deat-rb eval 'open"
    assert provenance["note"] == "see https://example.org/a/b"
    pushed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (pushed["model"]["init_from"], pushed["model"]["weights"]) == ("first.pt", "timm.pth")
    assert pushed["data"]["extra_data"] == "1m.npz"
    assert "against L2 perturbations of eps = " in (tmp_path / "out" / "README.md").read_text()


def test_push_again_removes_files_that_the_run_no_longer_has(hub: Hub, run: Path) -> None:
    push(run, "hf:me/net")
    first = hub.repositories["me/net"].head
    for name in ("eval.json", "eval-verdicts.safetensors"):
        (run / name).unlink()
    done = cli("push", run, "hf:me/net")
    assert "note: there is no evaluation, so the card has no accuracies" in done.stdout
    repository = hub.repositories["me/net"]
    assert "eval.json" in repository.commits[first]
    assert not {"eval.json", "eval-verdicts.safetensors"} & repository.commits[repository.head].keys()


def test_push_refuses(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["me/other"] = Repository()
    hub.repositories["me/other"].commit({"pytorch_model.bin": b"", ".gitattributes": b""})
    assert refusal("push", run, "hf:me/other") == (
        "hf:me/other has files that deat-rb push did not write (pytorch_model.bin): push to a new repository"
    )
    assert "names a file or revision" in refusal("push", run, "hf:me/net@v1")
    assert "is not spelled as on the Hub" in refusal("push", run, "hf:me/net", "--license", "MIT: yes")
    assert refusal("push", tmp_path, "hf:me/net").endswith("is not a run directory: it has no config.json")
    (tmp_path / "thesis.tex").touch()
    assert "has files that deat-rb push did not write" in refusal(
        "push", run, "hf:me/net", "--dry-run", "--output", tmp_path
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal("push", run, "hf:me/net").startswith("the Hub does not permit writing to me/net (status 401): ")
    (run / "last.safetensors").write_bytes((run / "last.safetensors").read_bytes()[:-4] + b"abcd")
    assert "was computed for weights other than the run's" in refusal("push", run, "hf:me/net")
    assert "me/net" not in hub.repositories


# Models on the Hub as targets


def test_eval_of_a_run_on_the_hub_records_the_commit(hub: Hub, run: Path, tmp_path: Path) -> None:
    pushed = push(run, "hf:me/net")
    done = cli("eval", "hf:me/net", "--attacks", "fgsm", "--n-examples", 8, "--checks", "none", "--json",
               tmp_path / "r.json", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["provenance"]["model"] == pushed.address
    assert "run" not in report["provenance"]
    assert report["eps"] == pytest.approx(0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"my-run", "cache", "r.json", "r.html",
                                                          "r-verdicts.safetensors"}  # fmt: skip
    assert "is only for checkpoints" in refusal("eval", "hf:me/net", "--dataset", "digits")


def test_submit_of_a_run_on_the_hub(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from board_problems import without_evaluating

    push(run, "hf:me/net")
    without_evaluating(monkeypatch)
    done = cli("submit", "hf:me/net", "--model-name", "Wang2021Gradient", "--board", tmp_path / "board")
    assert done.exit_code == 0, done.output
    entry = json.loads((tmp_path / "board" / "entries" / "digits" / "Linf" / "Wang2021Gradient.json").read_text())
    assert entry["backward_passes"] == 30
    with pytest.raises(DeatError, match=r"since the run hf:me/net@\w{40} specifies it"):
        raise DeatError(refusal("submit", "hf:me/net", "--model-name", "Wang2021Gradient", "--arch", "wrn-10-1"))


def test_train_from_weights_on_the_hub_records_the_commit(hub: Hub, run: Path) -> None:
    pushed = push(run, "hf:me/net")
    options = make_options({"method": "pgd-1", "dataset": "digits", "arch": "wrn-10-1", "init_from": "hf:me/net"})
    assert resolve(options).model.init_from == pushed.address
    planned = plan(options)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(planned.trainer.model.eval()(images), network()(images))
    before = len(hub.requests)
    resolve(planned.config)  # a pinned address needs no request
    assert len(hub.requests) == before


def test_file_on_the_hub_is_a_checkpoint(hub: Hub, run: Path) -> None:
    repository = hub.repositories["them/zoo"] = Repository()
    repository.commit({"nets/a.safetensors": (run / "last.safetensors").read_bytes()})
    from deat_rb.eval_target import open_target

    opened = open_target("hf:them/zoo/nets/a.safetensors", arch="wrn-10-1", dataset="digits")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(opened.model(images), network()(images))
    assert opened.provenance["model"] == f"hf:them/zoo/nets/a.safetensors@{repository.head}"
    assert refusal("eval", "hf:them/zoo/nets/a.safetensors") == (
        f"hf:them/zoo/nets/a.safetensors@{repository.head} does not specify its network and data: give --arch and "
        "--dataset"
    )


def test_untrusted_files_on_the_hub_are_refused(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "hf:me/net")
    repository = hub.repositories["me/net"]
    files = repository.commits[repository.head]
    config = json.loads(files["config.json"])
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef build(num_classes): ...\n")

    def pushed(**changed: bytes) -> str:
        repository.commit({**files, **{name.replace("_", "."): data for name, data in changed.items()}})
        return refusal("eval", "hf:me/net")

    foreign = {**config, "network": {**config["network"], "arch": "evil:build"},
               "model": {**config["model"], "arch": "evil:build"}}  # fmt: skip
    address = f"hf:me/net@{repository.head}"
    assert pushed(config_json=json.dumps(foreign).encode()).startswith(
        f"the run hf:me/net@{repository.head} builds its network with 'evil:build', which runs that module's code"
    )
    assert not (tmp_path / "ran").exists()
    assert "is not a run of deat-rb" in pushed(config_json=b'{"model_type": "bert"}')
    assert "too large" in pushed(config_json=b" " * (4 * 2**20 + 1))
    assert "is truncated or not a safetensors file" in pushed(last_safetensors=files["last.safetensors"][:5000])
    assert address != f"hf:me/net@{repository.head}"


# Refusals of the Hub


def test_refusals_of_the_hub_are_sentences(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(run, "hf:me/net", private=True)
    assert refusal("eval", "hf:me/nothing") == (
        "the Hub has no model me/nothing, or it is private: check the name, or log in with hf auth login"
    )
    assert refusal("eval", "hf:me/net@v9") == "hf:me/net has no revision 'v9'"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "or it is private" in refusal("eval", "hf:me/net")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["me/net"].gated = True
    assert refusal("eval", "hf:me/net").startswith("hf:me/net@")
    assert "is gated: ask for access at http://127.0.0.1" in refusal("eval", "hf:me/net")
    hub.repositories["me/bare"] = Repository()
    head = hub.repositories["me/bare"].commit({"model.safetensors": b""})
    assert refusal("eval", "hf:me/bare") == (
        f"hf:me/bare@{head} has no file config.json, so it was not uploaded by deat-rb push: give a file of weights as "
        "hf:me/bare/FILE and describe its network with --arch"
    )
    hub.status = 500
    assert refusal("eval", "hf:me/net") == (
        "the Hub cannot be reached (the server answered with status 500), and hf:me/net is not in its local cache: "
        "connect to the internet, or "
        "copy the model here"
    )


def test_offline_models_come_from_the_cache_and_say_so(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "hf:me/net")
    head = hub.repositories["me/net"].head
    deat_rb.load_model("hf:me/net")
    hub.status = 503
    done = cli("eval", "hf:me/net", "--attacks", "fgsm", "--n-examples", 8, "--checks", "none", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert f"hf:me/net is used as last downloaded, {head[:12]}" in done.stdout
