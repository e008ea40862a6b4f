"""Follows docs/tutorial.md: runs its commands in a copy of the checkout, with fewer steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
PARTS = ("common", "configs", "data", "model.py", "optim", "reading", "scripts", "train_gpt.py", "training")


@pytest.mark.slow
def test_the_commands_of_the_tutorial(tmp_path):
    for name in PARTS:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    lines = [f"Line {n} of my text says that {n} and {n + 1} are {2 * n + 1}. Voilà.\n" for n in range(7000)]
    (tmp_path / "mine.txt").write_text("".join(lines), encoding="utf-8")

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "STEPS": "4", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    bash, python = (re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) for language in ("bash", "python"))
    assert len(bash) == 6 and len(python) == 1
    said = ""
    for command in [["bash", "-e", "-c", block] for block in bash] + [["python", "-c", block] for block in python]:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said += done.stdout

    for run, steps in (("mine_gluon", 4), ("mine_mvr2", 4), ("from_python", 20)):
        last = json.loads((tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["update"] == steps and last["val_loss"] < 6
    for made in ("runs/mine.png", "runs/mine.html", "exported/mine/config.json", "exported/mine/model.safetensors"):
        assert (tmp_path / made).stat().st_size > 0, made
    assert "runs/from_python/model.safetensors" in said
