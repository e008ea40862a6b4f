"""Runs under the real torchrun, and under scripts/slurm.sh with stubs for Slurm's commands."""

import os
import stat
import subprocess
import sys

import pytest

from tests.helpers import forked
from tests.helpers.train_runs import ROOT, TINY, data, trainer, undisturbed  # noqa: F401
from training.checkpoint import list_checkpoints

MVR2 = "--optimizer mvr2 --q 0.6"
pytestmark = pytest.mark.slow

CRASH_ONCE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
sys.argv[0] = "train_gpt.py"
from pathlib import Path
import train_gpt
from tests.helpers.train_runs import at_step
from training.config import load_config
from common.errors import leave, one_line_errors
def die():
    while not Path({checkpoint!r}).exists():  # it is written in the background
        time.sleep(0.01)
    Path({flag!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1" and not Path({flag!r}).exists():
    at_step(5, die)
with one_line_errors("train_gpt"):
    train_gpt.train(load_config(sys.argv[1:]))
leave()
"""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """The real torchrun with two ranks, which must exit with 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_ranks_of_torchrun_end_cleanly(trainer, undisturbed):  # noqa: F811
    """No thread of gloo is alive in the interpreter's shutdown, where it could abort the process."""
    expected = undisturbed(MVR2, 2)
    done = torchrun(str(ROOT / "tests/helpers/shutdown.py"), str(ROOT / "train_gpt.py"), *trainer.words("clean", MVR2))
    type(expected)([0], done.stdout, done.stderr, trainer.results / "clean").same_as(expected)


def test_torchrun_restarts_a_killed_rank(trainer, undisturbed, tmp_path):  # noqa: F811
    expected = undisturbed(MVR2, 2)
    script, flag = tmp_path / "crash_once.py", tmp_path / "crashed"
    checkpoint = trainer.results / "restarted" / "checkpoints" / "step_0000004"
    script.write_text(CRASH_ONCE.format(root=str(ROOT), flag=str(flag), checkpoint=str(checkpoint)))
    words = trainer.words("restarted", f"{MVR2} --checkpoint-every 2 --resume auto")
    done = torchrun("--max-restarts=1", str(script), *words)
    assert flag.exists(), done.stderr[-3000:]
    assert "steps 4 to 7" in done.stdout
    type(expected)([0], done.stdout, done.stderr, trainer.results / "restarted").same_as(expected)


@pytest.fixture
def slurm(tmp_path, trainer):  # noqa: F811
    """A function that runs scripts/slurm.sh with stubs for srun and scontrol, which record their calls."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    calls = tmp_path / "calls"

    def run(srun: str, *words: str, host: str = "node7", **environment: str):
        calls.write_text("")
        texts = {"srun": srun, "scontrol": 'if [ "$1" = show ]; then printf "HOST\\nnode8\\n"; fi'.replace("HOST", host)}
        for name, text in texts.items():
            (stubs / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}\n{text}\n')
            (stubs / name).chmod(stat.S_IRWXU)
        slurm_gives = {
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
        }
        done = subprocess.run(
            ["bash", "scripts/slurm.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env=os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT)}
            | slurm_gives | environment,
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return run


def test_slurm_requeues_only_on_the_marker(slurm, tmp_path):
    marker = tmp_path / "results" / "quickstart_mvr2" / "requeue"
    marker.parent.mkdir(parents=True)
    words = ("--config", "configs/quickstart_mvr2.py", "--results-dir", str(tmp_path / "results"), "--steps", "5")

    for code in (0, 1):  # torchrun ends with 1 after a signal
        done, calls = slurm(f"touch {marker}; exit {code}", *words)
        assert done.returncode == 0 and calls[-1] == "scontrol requeue 41", done.stderr
    call = next(call for call in calls if call.startswith("srun"))
    for part in ("--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node7:20041", "--max-restarts=3"):
        assert part in call
    assert call.endswith(" ".join(("train_gpt.py", *words, "--resume auto")))

    for code in (0, 1):  # the marker of an earlier job must not requeue this one
        marker.touch()
        done, calls = slurm(f"exit {code}", *words)
        assert (
            done.returncode == code and not any(call.startswith("scontrol requeue") for call in calls) and not marker.exists()
        )

    done, calls = slurm("exit 0", *words, "--stepps", "3")
    assert done.returncode == 2 and calls == [] and done.stderr.count("\n") == 1 and "--steps" in done.stderr


def test_the_warning_of_slurm_reaches_the_ranks_through_torchrun(slurm, trainer, undisturbed):  # noqa: F811
    """The real torchrun with two ranks, which a stub for srun signals as Slurm would."""
    name, options = "warned", f"{MVR2} --steps 150 --val-every 100"
    folder = trainer.results / name
    srun = f"""shift
    "$@" & child=$!
    for i in $(seq 600); do
      [ "$(grep -c train_loss {folder}/metrics.jsonl 2>&1)" -gt 3 ] 2>/dev/null && break
      sleep 0.1
    done
    kill -TERM $child; wait $child"""
    words = trainer.words(name, options)
    gives = {"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NUM_NODES": "1", "OMP_NUM_THREADS": "1"}
    environment = gives | {"SLURM_JOB_ID": str(os.getpid())}
    done, calls = slurm(srun, *words, host="localhost", **environment)
    assert calls[-1].startswith("scontrol requeue"), done.stdout[-2000:] + done.stderr[-3000:]
    assert "--resume auto continues from there" in done.stdout and done.returncode == 0
    assert len(list_checkpoints(folder / "checkpoints")) == 1


def test_torchrun_with_two_ranks(tmp_path, data):  # noqa: F811
    """Our error line comes once, in addition to what torchrun itself prints about failed ranks."""
    tiny = [word for pair in TINY.items() if pair[0] not in ("--batch-size",) for word in pair]
    cases = {
        "unknown option '--lrr'": ["--lrr", "1"],
        "a batch of 5 sequences cannot be divided among 2 ranks": ["--batch-size", "5", "--data-dir", str(data), *tiny],
    }
    started = {
        says: forked.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_gpt.py",
             "--results-dir", str(tmp_path), *words], cwd=ROOT,
        )
        for says, words in cases.items()
    }  # fmt: skip
    for says, process in started.items():
        _, err = process.communicate(timeout=90)
        ours = [line for line in err.splitlines() if line.startswith("train_gpt: ")]
        assert process.returncode == 1 and len(ours) == 1 and says in ours[0], err
    assert not list(tmp_path.iterdir())
