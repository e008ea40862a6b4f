"""Nothing forks after CUDA was asked: a child of such a fork can't use CUDA.

These tests need no GPU. A process is poisoned if it was forked by this one, which has asked.
"""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from experiments import run_jobs
from tests.helpers import forked
from tests.helpers.device import FORKS, limit

pytestmark = limit

ROOT = Path(__file__).resolve().parents[2]
POISON = "FORKED_AFTER_CUDA_WAS_ASKED"
os.register_at_fork(after_in_child=lambda: os.environ.update({POISON: str(os.getppid())}))


def report(answers) -> None:
    parent = os.environ.get(POISON)  # a fork server that was started before these tests has neither variable
    answers.send(parent is not None and parent == os.environ.get("ASKED_IN"))


def poisoned(context: BaseContext) -> bool:
    """Whether a child that this context starts was forked by this process."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(theirs,))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setenv("ASKED_IN", str(os.getpid()))


def test_a_fork_is_seen():
    assert poisoned(multiprocessing.get_context("fork"))
    assert len(FORKS) == 1 and "test_a_fork_is_seen" in FORKS.pop()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_ways_to_start_a_process_do_not_fork_this_one(method):
    assert not poisoned(multiprocessing.get_context(method))


def test_the_tests_start_their_processes_in_such_a_way():
    assert forked.context().get_start_method() in ("forkserver", "spawn")


@pytest.mark.slow
def test_the_pool_of_the_studies_starts_its_processes_in_such_a_way():
    with run_jobs.processes(2) as pool:
        assert [pool.submit(os.getenv, POISON).result() for _ in range(4)] == [None] * 4


ASK = """
import importlib, sys, torch
asked = []
for name in ("is_available", "device_count", "_lazy_init", "init", "get_device_capability", "mem_get_info"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
for module in sys.argv[1:]:
    importlib.import_module(module)
sys.exit(", ".join(asked) + " was asked on import" if asked else 0)
"""


@pytest.mark.slow
def test_what_the_fork_servers_import_asks_nothing():
    modules = [*forked.PRELOAD, "torch._dynamo", "experiments.run_jobs", "experiments.why"]
    run = subprocess.run([sys.executable, "-c", ASK, *modules], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_question_on_import_is_seen(tmp_path):
    (tmp_path / "asks.py").write_text("import torch\ntorch.cuda.is_available()")
    run = subprocess.run([sys.executable, "-c", ASK, "asks"], cwd=tmp_path, capture_output=True, text=True)
    assert "is_available was asked on import" in run.stderr
