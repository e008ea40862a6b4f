"""benchmarks/gpu_day.py at toy size on the CPU, and its sections that fail or hang."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_day import SECTIONS, Lab, Section, run_section

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_section_passes_at_toy_size(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [result["section"] for result in results] == [section.run.__name__ for section in SECTIONS]
    assert all(result["checks"] for result in results if result["section"] not in ("environment", "throughput", "steps"))
    assert "FAIL" not in (tmp_path / "gpu_day.md").read_text()


def fails(lab: Lab) -> None:
    lab.check("a bound", 2.0, 1.0)
    raise RuntimeError("no such kernel")


def hangs(lab: Lab) -> None:
    lab.note("pid", subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)


def interrupts(lab: Lab) -> None:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def test_ctrl_c_ends_the_section():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_section(Section(interrupts, 1.0), "cpu", True, 20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_section_that_fails_keeps_what_it_found():
    result = run_section(Section(fails, 1.0), "cpu", True, 20)
    assert [check["passed"] for check in result["checks"]] == [False]
    assert result["failed"] == "RuntimeError: no such kernel"


def test_a_section_that_hangs_ends_at_its_deadline_with_its_subprocesses():
    result = run_section(Section(hangs, 1.0), "cpu", True, 0.5)
    assert result["failed"] == "not finished after 0 s" and result["seconds"] < 10
    deadline = time.monotonic() + 5
    while alive(result["notes"]["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
