"""Interpreters without deat_rb and robustbench: forks of one that has imported torch, which takes longest.

Without `os.fork`, as on Windows, each is started anew.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

SERVER = """
import os, sys, traceback
import scipy.integrate, torch, torch._dynamo  # what robustbench and deat_rb import besides

def work(code, folder, path):
    os.chdir(folder)
    sys.path[:0] = path
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)

for line in sys.stdin:
    asked = eval(line)
    child = os.fork()
    if child == 0:
        work(*asked)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Fresh(Protocol):
    """Runs code in a fresh interpreter."""

    def __call__(self, code: str, folder: Path, *path: str) -> subprocess.CompletedProcess[str]:
        """Run code in this folder, with ``path`` before `sys.path`; it leaves the files stdout and stderr there."""
        ...


COMMAND = [sys.executable, "-P", "-W", "ignore", "-c"]


def _result(code: str, folder: Path, status: int) -> subprocess.CompletedProcess[str]:
    printed = [(folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(code, status, *printed)


def run_anew(code: str, folder: Path, *path: str) -> subprocess.CompletedProcess[str]:
    """Run code as `Fresh` does, in an interpreter that imports everything itself."""
    program = f"import sys; sys.path[:0] = {list(path)!r}; exec({code!r}, {{'__name__': '__main__'}})"
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as errors:
        status = subprocess.call([*COMMAND, program], cwd=folder, stdout=out, stderr=errors)
    return _result(code, folder, status)


@contextlib.contextmanager
def started() -> Iterator[Fresh]:
    """Start the interpreter that is forked, and yield what forks it."""
    if not hasattr(os, "fork"):
        yield run_anew
        return
    with subprocess.Popen([*COMMAND, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        pipe_in: Any = server.stdin
        pipe_out: Any = server.stdout

        def run(code: str, folder: Path, *path: str) -> subprocess.CompletedProcess[str]:
            print(repr((code, str(folder), list(path))), file=pipe_in, flush=True)
            return _result(code, folder, int(pipe_out.readline()))

        try:
            yield run
        finally:
            server.kill()  # closing its stdin does not end it: processes forked meanwhile hold the pipe's other end
