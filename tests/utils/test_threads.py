"""The number of CPU threads, and the environment variables that the command sets before torch is loaded."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner

from cli.options import threads_option
from deat_rb.utils import threads
from deat_rb.utils.threads import BUSY, CHOSEN, QUIET, cpu_threads, processors, share_cpu, thread_count


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment in which torch is not loaded, on a machine with eight idle processors."""
    empty: dict[str, str] = {}
    monkeypatch.setattr(threads, "os", SimpleNamespace(environ=empty, cpu_count=lambda: 8))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "_affinity", lambda: 8)
    monkeypatch.setattr(threads, "_quota", lambda: math.inf)
    monkeypatch.setattr(threads, "running_elsewhere", lambda: 0.0)
    return empty


@pytest.mark.parametrize(
    ("cpus", "usable", "others", "chosen"),
    [(8, 8, 0.0, QUIET), (8, 8, 0.7, QUIET), (8, 8, 1.0, BUSY), (2, 2, 0.4, QUIET), (2, 2, 0.6, BUSY),
     (8, 4, 4.0, QUIET), (8, 4, 5.0, BUSY)],
)  # fmt: skip
def test_share_cpu_shortens_spinning(
    cpus: int, usable: int, others: float, chosen: dict[str, str], environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(threads, "os", SimpleNamespace(environ=environment, cpu_count=lambda: cpus))
    monkeypatch.setattr(threads, "_affinity", lambda: usable)
    monkeypatch.setattr(threads, "running_elsewhere", lambda: others)
    assert share_cpu() == chosen
    assert environment == chosen | {CHOSEN: " ".join(f"{name}={value}" for name, value in chosen.items())}


def test_share_cpu_in_a_child_process_chooses_anew(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share_cpu() == QUIET
    environment["KMP_BLOCKTIME"] = "5"  # set by the user for the child
    assert share_cpu() == {}
    assert environment == {"KMP_BLOCKTIME": "5"}
    del environment["KMP_BLOCKTIME"]
    assert share_cpu() == QUIET
    monkeypatch.setattr(threads, "running_elsewhere", lambda: 9.0)
    assert share_cpu() == BUSY
    assert {name for name in environment if name != CHOSEN} == set(BUSY)


def test_running_elsewhere_leaves_out_this_process(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  1 2 3\nprocs_running 5\nprocs_blocked 1\n")
    assert threads.running_elsewhere(tmp_path / "stat", samples=2) == 4


def test_running_elsewhere_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 2.5, 3.5))
    assert threads.running_elsewhere(tmp_path / "stat") == 1.5


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "200"}])
def test_share_cpu_keeps_what_the_user_set(given: dict[str, str], environment: dict[str, str]) -> None:
    environment.update(given)
    assert share_cpu() == {}
    assert environment == given


def test_share_cpu_does_nothing_once_torch_is_loaded(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert share_cpu() == environment == {}


def test_share_cpu_limits_threads_to_a_quota(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_quota", lambda: 1.5)
    assert share_cpu()["OMP_NUM_THREADS"] == "2"


def test_share_cpu_keeps_a_number_of_threads_above_a_quota(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_quota", lambda: 1.5)
    environment["OMP_NUM_THREADS"] = "4"
    assert "OMP_NUM_THREADS" not in share_cpu()


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000\n", math.inf), ("150000 100000\n", 1.5), ("garbage", math.inf)]
)
def test_quota_is_read_from_the_control_group(content: str, quota: float, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert threads._quota(tmp_path) == quota


def test_quota_without_control_groups(tmp_path: Path) -> None:
    assert threads._quota(tmp_path) == math.inf
    assert 1 <= processors() <= (os.cpu_count() or 1)


def test_the_command_sets_the_variables_before_it_loads_torch() -> None:
    program = (
        "import os, sys, deat_rb.cli as cli; assert 'torch' not in sys.modules; "
        "cli.main.get_command(None, 'train'); print(sorted({'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & os.environ.keys()))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in threads.POLICIES}
    ran = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True, check=True)
    assert ran.stdout in ("['OMP_WAIT_POLICY']\n", "['GOMP_SPINCOUNT']\n")


def test_cpu_threads_is_capped_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 3)
    before = torch.get_num_threads()
    with cpu_threads(64):
        assert torch.get_num_threads() == thread_count(64) == 3
    assert torch.get_num_threads() == before


def test_cpu_threads_sets_nothing_if_the_number_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(count: int) -> None:
        raise AssertionError(f"set to {count}")

    monkeypatch.setattr(torch, "set_num_threads", fail)
    for threads_ in (None, torch.get_num_threads()):
        with cpu_threads(threads_):
            pass


def test_threads_option_applies_while_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 3)
    before = torch.get_num_threads()

    @click.command()
    @threads_option
    def command() -> None:
        click.echo(torch.get_num_threads())

    assert CliRunner().invoke(command, ["--threads", "2"]).output == "2\n"
    assert torch.get_num_threads() == before
    refused = CliRunner().invoke(command, ["--threads", "0"])
    assert refused.exit_code == 2
    assert "0 is not in the range x>=1" in refused.output
