"""Runs Python commands in processes forked from one that has imported torch, which saves each command's import time."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

# What the fork server of all tests imports.
PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._inductor", "train_gpt"]
# multiprocessing reads an exit code once, and loses it if two threads ask at the same time.
_LOCK = threading.Lock()


def context() -> BaseContext:
    """A multiprocessing context whose server imports torch once and forks, if the platform allows it."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    made = multiprocessing.get_context(method)
    if method == "forkserver":
        made.set_forkserver_preload(PRELOAD)
    return made


def redirect(log: Path) -> None:
    """Redirect this process's stdout and stderr into LOG.out and LOG.err."""
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


class Popen:
    """Like subprocess.Popen for `python SCRIPT ...` or `python -m MODULE ...`. The output is always kept, as text."""

    def __init__(self, command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, **_: Any) -> None:
        assert command[0] == sys.executable
        self.args, self.returncode = command, None
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        place = os.fspath(cwd or os.getcwd())
        arguments = ([os.fspath(word) for word in command[1:]], place, dict(env or os.environ), self._log)
        with _LOCK:
            self._process = context().Process(target=_command, args=arguments)
            self._process.start()

    def poll(self) -> int | None:
        with _LOCK:
            self.returncode = self._process.exitcode
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self._process.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        out, err = (Path(f"{self._log}.{name}") for name in ("out", "err"))
        return out.read_text(), err.read_text()

    def terminate(self) -> None:
        self._process.terminate()


def run(command: Sequence[str], timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run for such a command."""
    process = Popen(command, **options)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _command(words: list[str], place: str, environment: dict[str, str], log: Path) -> None:
    redirect(log)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    try:
        execute(words)
    finally:
        atexit._run_exitfuncs()  # as the interpreter's exit does


def execute(words: list[str]) -> None:
    """Do in this process what `python WORDS` would do."""
    import torch

    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
