"""Upload of a run to the Hugging Face Hub: weights, configuration, metrics, evaluation and a model card."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deat_rb.evaluation.report import Report, verdict_file
from deat_rb.leaderboard.training_record import training_command
from deat_rb.methods.describe import describe
from deat_rb.methods.paper import PAPER, PAPERS_OWN
from deat_rb.models.names import runs_code, trust_flag
from deat_rb.robustbench.format import SPELLED
from deat_rb.runs.config import RunConfig
from deat_rb.runs.directory import CONFIG, METRICS, RunDirectory
from deat_rb.runs.hub_run import CARD, OPTIONAL_FILES
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.downloads import http_status, why_failed
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_bytes, write_all
from deat_rb.utils.hub import HubAddress, is_hub, refusals
from deat_rb.utils.text import printable, replace_invisible
from deat_rb.utils.units import format_fraction

OWN_FILES = {CONFIG, CARD, *OPTIONAL_FILES, *(f"{which}.{end}" for which in ("best", "last")
             for end in ("safetensors", "json"))}  # fmt: skip
"""Names of all files that a push may write."""

_FOLDERS = re.compile(r"(?<![\w/.:])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\",;:]+[\\/])+|~/(?:[^/\s'\",;:]+/)*")


def _command_without_folders(command: str) -> str:
    """Return a command line in which only the last part of each path is left."""
    try:
        parts = shlex.split(command)
    except ValueError:  # not a command line, such as an edited one with an open quote
        return _FOLDERS.sub("", command)
    words = []
    for word in parts:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        path = not (is_hub(value) or "://" in value or "(" in value or re.fullmatch(r"[\d.,/]+", value))
        words.append(option + equals + (re.split(r"[\\/]", value.rstrip("\\/"))[-1] if path else value))
    return shlex.join(words)


@dataclass(frozen=True)
class Pushed:
    """An upload.

    Attributes:
        address: ``hf:owner/name`` with the commit's hash, or the local folder of a dry run.
        files: Sizes of the files in bytes by name.
        notes: Notes for the user.
    """

    address: str
    files: dict[str, int]
    notes: tuple[str, ...]


def push(
    run: str | Path, target: str, *, private: bool = False, license: str | None = None, folder: str | Path | None = None
) -> Pushed:
    """Upload a run's selected weights to the Hugging Face Hub, in one commit.

    Uploaded are ``config.json``, ``metrics.jsonl``, the selected weights as safetensors, the evaluation if there is
    one, and a model card made from them. Folders in paths are removed. The client of huggingface_hub finds the login
    (``hf auth login`` or ``HF_TOKEN``); this function neither reads nor prints a token.

    Args:
        run: The run directory.
        target: ``hf:owner/name``; the repository is created if it does not exist.
        private: Whether to create a private repository.
        license: License of the weights, as the Hub spells it, such as ``mit`` or ``cc-by-4.0``.
        folder: Write the files to this folder instead of uploading them.

    Raises:
        DeatError: The run has no weights yet, its evaluation belongs to different weights, the address is malformed,
            the repository contains other files, or the upload fails.
    """
    address = HubAddress.parse(target)
    if address.file or address.revision != "main":
        raise DeatError(f"{target} names a file or revision, but a run is pushed to a repository: give "
                        f"hf:{address.repository}")  # fmt: skip
    if license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license) is None:
        raise DeatError(f"--license {printable(license, 80)} is not spelled as on the Hub, such as mit or cc-by-4.0")
    contents, notes = shared_files(RunDirectory.open(Path(run)), address, license)
    sizes = {name: len(data) for name, data in contents.items()}
    if folder is None:
        return Pushed(_upload(contents, address, private), sizes, notes)
    path = Path(folder)
    others = sorted({each.name for each in path.iterdir()} - OWN_FILES) if path.is_dir() else []
    if others:
        raise DeatError(
            f"{path} has files that deat-rb push did not write ({printable(others[0], 80)}): choose another --output"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot write to {path} ({error.strerror or error}); choose another --output") from error
    write_all({path / name: data for name, data in contents.items()})
    for name in OWN_FILES - contents.keys():
        (path / name).unlink(missing_ok=True)
    return Pushed(str(path), sizes, notes)


def shared_files(
    run: RunDirectory, address: HubAddress, license: str | None
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the files to upload (contents by name) and notes for the user.

    Raises:
        DeatError: The weights are missing, or the evaluation belongs to different weights or data.
    """
    weights = run.selected_weights_path
    report = _evaluation(run)
    contents = {weights.name: read_bytes(weights)}
    facts = weights.with_suffix(".json")
    if facts.is_file():
        contents[facts.name] = read_bytes(facts)
    if (run.path / METRICS).is_file():
        contents[METRICS] = read_bytes(run.path / METRICS)
    contents[CONFIG] = _json(_without_folders(run.config))
    if report is not None:
        content = report.model_dump(mode="json")
        content["provenance"] = {
            name: _command_without_folders(text) if name == "command" else _FOLDERS.sub("", text)
            for name, text in report.provenance.items()
        }
        contents["eval.json"] = _json(content)
        verdicts = verdict_file(run.path / "eval.json")
        if verdicts.is_file():
            contents[verdicts.name] = read_bytes(verdicts)
    contents[CARD] = model_card(run, report, address, license).encode()
    notes = []
    if report is None:
        notes.append(f"there is no evaluation, so the card has no accuracies: run {run.command('eval')} first")
    elif "autoattack" not in report.results:
        notes.append(f"AutoAttack was not run, but readers expect its accuracy: run {run.command('eval --autoattack')}")
    if run.unfinished:
        notes.append(f"training has not ended, and the card says so: the run has {run.unfinished}")
    if runs_code(run.config.model.arch):
        notes.append(f"the network is built by {run.config.model.arch}, which is not uploaded: others need that module "
                     "on Python's path, and --trust-code")  # fmt: skip
    if license is None:
        notes.append("no --license is given, so others may not use the weights; give for instance --license mit")
    return contents, tuple(notes)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _without_folders(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON values, without the folders of this machine."""
    content = config.model_dump(mode="json")
    content["data"]["data_dir"] = None
    for group, name in (("data", "extra_data"), ("model", "init_from"), ("model", "weights")):
        path = content[group][name]
        if path is not None and not is_hub(path):
            content[group][name] = Path(path).name
    return content


def _evaluation(run: RunDirectory) -> Report | None:
    file = run.path / "eval.json"
    if not file.is_file():
        return None
    report = Report.load(file)
    run.check_evaluation(report.provenance, f"run {run.command('eval')}, then push again")
    return report


def _upload(contents: Mapping[str, bytes], address: HubAddress, private: bool) -> str:
    import huggingface_hub as hub
    from huggingface_hub import errors

    api, repository = hub.HfApi(), address.repository
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        with refusals(address):
            present = {str(each.rfilename) for each in api.model_info(repository).siblings or ()}
            others = sorted(present - OWN_FILES - {".gitattributes"})
            if others:
                raise DeatError(
                    f"{address} has files that deat-rb push did not write ({printable(others[0], 80)}): "
                    "push to a new repository"
                )
            operations: list[Any] = [hub.CommitOperationAdd(name, data) for name, data in contents.items()]
            stale = sorted((present & OWN_FILES) - contents.keys())
            operations += [hub.CommitOperationDelete(name) for name in stale]
            done = api.create_commit(repository, operations, commit_message="Upload a run of deat-rb")
    except DeatError:
        raise
    except errors.LocalTokenNotFoundError:
        raise DeatError("pushing needs a login: run hf auth login, or set HF_TOKEN") from None
    except Exception as error:  # any exception: the HTTP library and the Hub raise many types
        status = http_status(error)
        if status in (401, 403):
            raise DeatError(f"the Hub does not permit writing to {repository} (status {status}): run hf auth login "
                            "with a token that may write there") from None  # fmt: skip
        raise DeatError(f"{address} cannot be written ({why_failed(error)}): try again later") from None
    return str(HubAddress(repository, "", str(done.oid)))


def model_card(run: RunDirectory, report: Report | None, address: HubAddress, license: str | None) -> str:
    """Return the model card: metadata for the Hub, results, usage, method, training command and classes."""
    config, rows = run.config, run.rows()
    row = describe(config.attack.method, eps=config.attack.eps, **config.method_options())
    dataset = SPELLED.get(config.data.dataset, config.data.dataset)
    columns = _columns(run, report, rows)
    accuracy = "No evaluation was uploaded.\n" if report is None else _measured(report)
    cite = f"Method: {PAPER['authors']}, *{PAPER['name']}*, {PAPER['link']}.\n" if PAPERS_OWN.match(row.name) else ""
    side = config.network.image_size
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    data_dir = " --data-dir FOLDER" if config.data.dataset != "digits" else ""
    own = runs_code(config.model.arch)
    call = ", trust_code=True" if own else ""
    flag = "".join(f" {each}" for each in trust_flag(config.model.arch))
    code = "Weights are stored as safetensors, and loading them runs no code."
    if own:
        code = (f"Weights are stored as safetensors. `{_plain(config.model.arch, code=True)}` builds the network: its "
                "module must be importable\nand is not uploaded here, and `trust_code=True` (`--trust-code`) lets its "
                "code run.")  # fmt: skip
    return f"""---
{_metadata(config, report, address, license)}
---

# {_plain(address.repository.partition("/")[2])}

{_plain(config.model.arch)} trained by `{row.name}` on {_plain(dataset)} against {_adversary(config)}, with
deat-rb. The network takes RGB images of {side}x{side} pixels in [0, 1]; the
normalization is inside.

| {" | ".join(columns)} |
|{"---|" * len(columns)}
| {" | ".join(columns.values())} |

{accuracy}
## Use

```python
import deat_rb

model = deat_rb.load_model("{address}"{call})  # add @REVISION to pin a commit
model.classes
```

```bash
deat-rb predict {address} photo.jpg{flag}
deat-rb eval {address}{data_dir} --autoattack{flag}
```

{code}

## Method

| | |
|---|---|
| attack in training | {_plain(row.attack)} |
| loss | {_plain(row.loss)} |
| schedule of the steps | {_plain(row.schedule)} |
| stopping rule | {_plain(row.stop)} |
| source | {_plain(row.paper)} |
| epoch | {_plain(str(config.optim.select))} |

{cite}
## Training

```bash
{_plain(training_command(config), code=True)}
```

`config.json` has all options (`deat-rb train --config config.json`), `metrics.jsonl` every epoch. Trained with
{_plain(versions) or "unknown versions"}.

Classes in the order of the logits: {_plain(", ".join(config.classes)) or "unknown"}.
"""


def _adversary(config: RunConfig) -> str:
    if config.attack.method == "standard":
        return "no adversary"
    return f"{config.attack.norm} perturbations of eps = {format_fraction(config.attack.eps)}"


def _columns(run: RunDirectory, report: Report | None, rows: list[EpochStats]) -> dict[str, str]:
    config, unfinished = run.config, run.unfinished
    columns = {"method": config.attack.method, "architecture": _plain(config.model.arch)}
    if report is not None:
        shown = [*report.results.values(), *([report.worst_case] if len(report.results) > 2 else [])]
        columns |= {_plain(each.name): f"{100 * each.accuracy:.2f} %" for each in shown}
    if rows:
        columns |= {
            "epochs": unfinished or str(len(rows)),
            "backward passes": f"{sum(each.backwards for each in rows):,.0f}",
            "minutes": f"{sum(each.seconds for each in rows) / 60:,.1f}",
        }
    return columns


def _measured(report: Report) -> str:
    problems = [f"{_plain(check.name)} ({check.status}): {_plain(check.sentence)}" for check in report.checks
                if check.status != "pass"]  # fmt: skip
    bounds = ", upper bounds" if report.precision != "fp32" else ""
    adversary = f"{report.norm}, eps = {format_fraction(report.eps)}{bounds}"
    lines = [f"Measured on {report.n_examples:,} test images, {adversary}; `eval.json` has intervals, costs and all "
             "checks."]  # fmt: skip
    if problems:
        lines += ["", "Checks that did not pass:", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def _metadata(config: RunConfig, report: Report | None, address: HubAddress, license: str | None) -> str:
    """Return the card's YAML for the Hub."""
    import huggingface_hub as hub

    dataset = config.data.dataset
    results = []
    if report is not None:
        adversary = f"({report.norm}, eps {format_fraction(report.eps)})"
        for each in report.results.values():
            name = "accuracy" if each.name == "natural" else f"accuracy under {each.name} {adversary}"
            results.append(hub.EvalResult(
                task_type="image-classification", dataset_type=dataset, dataset_name=SPELLED.get(dataset, dataset),
                metric_type="accuracy", metric_name=name, metric_value=round(each.accuracy, 4),
            ))  # fmt: skip
    return hub.ModelCardData(
        library_name="deat-rb", pipeline_tag="image-classification", license=license,
        datasets=dataset if dataset in ("cifar10", "cifar100") else None,
        tags=["adversarial-robustness", "adversarial-training", config.attack.method],
        model_name=address.repository.partition("/")[2] if results else None, eval_results=results or None,
    ).to_yaml()  # fmt: skip


def _plain(text: str, *, code: bool = False) -> str:
    """Escape text so that Markdown shows it unchanged, or, with ``code``, so that it fits into a code block."""
    line = replace_invisible(text).replace("\n", " ")
    return line.replace("```", "'''") if code else re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", line)
