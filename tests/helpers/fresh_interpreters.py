"""Interpreters without deat_rb and robustbench: forks of one that has imported torch, which takes longest."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def started() -> Iterator[Fresh]:
    """Start the interpreter that is forked, and yield what forks it."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        pipe_in: Any = server.stdin
        pipe_out: Any = server.stdout

        def run(code: str, folder: Path, *path: str) -> subprocess.CompletedProcess[str]:
            print(repr((code, str(folder), list(path))), file=pipe_in, flush=True)
            status = int(pipe_out.readline())
            printed = [(folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(code, status, *printed)

        try:
            yield run
        finally:
            server.kill()  # closing its stdin does not end it: processes forked meanwhile hold the pipe's other end
