"""Both benchmarks run end to end; what they measure is not tested here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["optimizers", "training_step"])
def test_a_quick_run_writes_its_page_and_numbers(tmp_path, name):
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / f"{name}_cpu.json").read_text())
    found = numbers["sets"]["tiny"]["contestants"]
    assert {"Gluon", "MVR-1", "MVR-2", "MVR-3"} <= found.keys()
    assert found["Gluon"]["over_gluon"] == 1
    page = (tmp_path / f"{name}_cpu.md").read_text()
    assert "| MVR-2 |" in page and "| goal |" in page
