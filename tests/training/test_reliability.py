"""Failures of a cluster: processes that die at any moment, damaged files, full disks, numbers that are not finite."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import training.checkpoint
from common.errors import Diverged, UserError
from data.loader import BatchLoader, TokenStream
from model import GPT, GPTConfig
from tests.helpers.kill_test import kill_runs
from tests.helpers.train_runs import ROOT, Trainer, data, trainer  # noqa: F401
from training.checkpoint import Position, list_checkpoints, newest_state, read_state
from training.config import Config, load_config
from training.finite import FiniteGuard
from training.optimizers import build_optimizer
from training.ranks import Ranks
from training.saver import Saver

MVR2 = "--optimizer mvr2 --q 0.6"
MVR3 = "--optimizer mvr3 --momentum 0.2"
ALONE = Ranks(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(trainer):  # noqa: F811
    """Undisturbed runs, each made once."""
    made = {}

    def run(options: str, ranks: int = 1):
        if (options, ranks) not in made:
            made[options, ranks] = trainer.run(f"undisturbed-{len(made)}", options, ranks=ranks).ok()
        return made[options, ranks]

    return run


def at_step(step: int, act) -> None:
    """Call `act` once, when the batch of this step is requested."""
    batch = BatchLoader.batch

    def patched(self: BatchLoader, wanted: int):
        if wanted == step:
            BatchLoader.batch = batch
            act()
        return batch(self, wanted)

    BatchLoader.batch = patched


def on_rank(rank: int) -> bool:
    return os.environ.get("RANK", "0") == str(rank)


# ---- SIGKILL


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_kills(trainer, ranks):  # noqa: F811
    survived, made, _ = kill_runs(trainer, "mvr2", kills=2, ranks=ranks, seed=1)
    assert (survived, made) == (2, 2)


# ---- checkpoints


@pytest.fixture
def checkpoints(trainer, tmp_path):  # noqa: F811
    """A copy of the checkpoints of steps 3 and 6 of a run."""
    done = Path(trainer.results) / "to-be-damaged"
    if not done.exists():
        trainer.run("to-be-damaged", f"{MVR2} --checkpoint-every 3 --steps 6").ok()
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_state(**changes):
    def edit(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changes))

    return edit


DAMAGES = {
    "a bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "a bit of the momentum": lambda folder: flip(folder / "optimizer-00000.safetensors"),
    "truncated weights": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no momentum": lambda folder: (folder / "optimizer-00000.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "an empty state": lambda folder: (folder / "state.json").write_text(""),
    "half a state": lambda folder: os.truncate(folder / "state.json", 300),
    "bytes for a state": lambda folder: (folder / "state.json").write_bytes(bytes(range(256))),
    "a list for a state": lambda folder: (folder / "state.json").write_text("[1, 2]"),
    "nested brackets": lambda folder: (folder / "state.json").write_text("[" * 100_000),
    "another format": edit_state(format=3),
    "an older format": edit_state(format=1),
    "a step in words": edit_state(step="six"),
    "no files": edit_state(files={}),
    "files of another type": edit_state(files=3),
    "a folder for a file": lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()),
    "nothing in it": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file for a folder": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(checkpoints, capsys, damage):
    DAMAGES[damage](checkpoints / "step_0000006")
    path, state = newest_state(checkpoints)
    assert path.name == "step_0000003" and state["step"] == 3
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step_0000006" in said and "trying the checkpoint before it" in said


def test_resume_after_damage_is_exact(trainer, undisturbed, checkpoints):  # noqa: F811
    flip(checkpoints / "step_0000006" / "model.safetensors")
    shutil.copytree(checkpoints.parent, trainer.results / "damaged")
    done = trainer.run("damaged", f"{MVR2} --resume auto").ok()
    assert "is damaged: its checksum" in done.out and "steps 3 to 7" in done.out
    done.same_as(undisturbed(MVR2))


def test_if_all_checkpoints_are_damaged_nothing_is_removed(trainer, checkpoints):  # noqa: F811
    for step in (3, 6):
        flip(checkpoints / f"step_000000{step}" / "model.safetensors")
    folder = trainer.results / "all-damaged"
    shutil.copytree(checkpoints.parent, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = trainer.run("all-damaged", f"{MVR2} --resume auto").refusal()
    assert "can be used (" in message and "is damaged: its checksum" in message
    assert message.endswith("; --overwrite starts the run again")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk_for_a_while() -> None:
    """From step 2 to step 5 no file can be larger than 600 bytes; checkpoints are due in that time."""
    at_step(5, functools.partial(limit_file_size, resource.RLIM_INFINITY))
    at_step(2, functools.partial(limit_file_size, 600))


def full_disk_to_the_end() -> None:
    at_step(3, functools.partial(limit_file_size, 700))


def test_a_full_disk_keeps_the_run_alive(trainer, undisturbed):  # noqa: F811
    done = trainer.run("full", f"{MVR2} --checkpoint-every 1", patch=full_disk_for_a_while).ok()
    assert "checkpoint not written: File too large" in done.out or "metrics.jsonl can't be written" in done.out
    done.same_as(undisturbed(MVR2))
    newest = list_checkpoints(done.folder / "checkpoints")
    assert [read_state(path)["step"] for path in newest] == [7, 6]
    assert not [path for path in (done.folder / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_disk_that_stays_full_leaves_the_old_checkpoints_intact(trainer, undisturbed):  # noqa: F811
    done = trainer.run("stays-full", f"{MVR2} --checkpoint-every 1", patch=full_disk_to_the_end)
    assert "the last checkpoint could not be written" in done.refusal()
    steps = [read_state(path)["step"] for path in list_checkpoints(done.folder / "checkpoints")]
    assert steps in ([3, 2], [2, 1])  # the checkpoint of step 3 may still have been in progress
    trainer.run("stays-full", f"{MVR2} --resume auto").ok().same_as(undisturbed(MVR2))


def rank_1_cannot_write_once() -> None:
    write = training.checkpoint.write_tensors

    def failing(path: Path, tensors: dict) -> str:
        if on_rank(1) and "step_0000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, tensors)

    training.checkpoint.write_tensors = failing


def test_a_write_that_fails_on_another_rank_is_reported(trainer):  # noqa: F811
    done = trainer.run("rank-1-full", "--checkpoint-every 2 --keep-checkpoints 9", ranks=2, patch=rank_1_cannot_write_once)
    assert "checkpoint not written: No space left on device (rank 1)" in done.ok().out
    assert [path.name[-1] for path in list_checkpoints(done.folder / "checkpoints")] == ["7", "6", "4"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    (tmp_path / "checkpoints").mkdir()
    write = training.checkpoint.write_tensors
    monkeypatch.setattr(training.checkpoint, "write_tensors", lambda *a: (time.sleep(0.5), write(*a))[1])
    saver = Saver(tmp_path, ALONE, keep=2)
    before = model.weight.detach().clone()
    started = time.monotonic()
    saver.save(model, optimizer, Position(step=1, sequences=1), {})
    assert time.monotonic() - started < 0.4
    with torch.no_grad():
        model.weight.zero_()
    assert not list_checkpoints(tmp_path / "checkpoints")
    saver.finish()
    saved = training.checkpoint.load_file(tmp_path / "checkpoints" / "step_0000001" / "model.safetensors")
    assert torch.equal(saved["weight"], before)


# ---- numbers


def poison(step: int, kind: str, rank: int = 0, passes: tuple[int, ...] = (1, 2), last: int | None = None) -> None:
    """On one rank, in steps `step` to `last`: a loss or gradient that is not finite."""
    state = {"step": -1, "pass": 0}
    guarded, look, forward = FiniteGuard.step, FiniteGuard.look, GPT.forward

    def stepping(self, number):
        state.update(step=number, **{"pass": 1})
        return guarded(self, number)

    def looking(self, loss):
        if in_pass() and kind == "gradient":
            dict(self._model.named_parameters())["blocks.1.mlp.fc.weight"].grad[0, 0] = torch.inf
        state["pass"] += 1
        look(self, loss)

    def in_pass() -> bool:
        return on_rank(rank) and step <= state["step"] <= (last or step) and state["pass"] in passes

    def forwarding(self, idx, targets=None):
        out = forward(self, idx, targets)
        return out * torch.nan if in_pass() and kind == "loss" else out

    FiniteGuard.step, FiniteGuard.look, GPT.forward = stepping, looking, forwarding


@pytest.mark.parametrize(
    "kind, ranks, says",
    [
        ("loss", 1, "step 4: the loss is not finite (batch 4: sequences 32 to 39)"),
        ("loss", 2, "step 4: the loss is not finite on rank 1 (batch 4: sequences 32 to 39)"),
        ("gradient", 1, "step 4: the gradient of blocks.1.mlp.fc.weight is not finite (batch 4: sequences 32 to 39)"),
        ("gradient", 2, "step 4: the gradient of blocks.1.mlp.fc.weight is not finite (batch 4: sequences 32 to 39)"),
    ],
)
def test_a_number_that_is_not_finite_stops_all_ranks(trainer, undisturbed, kind, ranks, says):  # noqa: F811
    name = f"poisoned-{kind}-{ranks}"
    patch = functools.partial(poison, 4, kind, rank=ranks - 1)
    done = trainer.run(name, f"{MVR2} --checkpoint-every 2", ranks=ranks, patch=patch)
    assert (
        done.refusal()
        == f"train_gpt: {says}; continue from the last checkpoint with --resume auto, and a lower --lr or --on-nan skip"
    )
    path, state = newest_state(done.folder / "checkpoints")
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in training.checkpoint.load_file(path / "model.safetensors").values())
    trainer.run(name, f"{MVR2} --resume auto", ranks=ranks).ok().same_as(undisturbed(MVR2, ranks))


def drop_batch_4() -> None:
    batch = BatchLoader.batch
    BatchLoader.batch = lambda self, step: batch(self, step if step < 4 else step + 1)


@pytest.mark.parametrize(
    "options, ranks",
    [
        ("--optimizer gluon", 1),
        ("--optimizer adamw", 1),
        (MVR2, 1),
        (MVR2, 2),
        (MVR3, 1),
        ("--optimizer muon_mvr --lr 1e-2 --compare-with previous_weights", 1),
        ("--optimizer torch.optim:AdamW --weight-decay 0", 1),
    ],
)
def test_a_skipped_step_leaves_no_trace(trainer, options, ranks):  # noqa: F811
    """The run is the same as without that batch: for MVR-2 the pending update stays pending."""
    name = f"skips-{options.split()[1]}-{ranks}"
    patch = functools.partial(poison, 4, "loss", rank=ranks - 1)
    skipping = trainer.run(name, f"{options} --on-nan skip --val-every 1", ranks=ranks, patch=patch).ok()
    without = trainer.run(f"{name}-without", f"{options} --val-every 1 --steps 6", ranks=ranks, patch=drop_batch_4).ok()
    assert skipping.out.count("skipped, 1 in all") == 1
    assert {line.get("skipped") for line in skipping.metrics} == {None, 1}
    assert skipping.metrics[-1]["skipped"] == 1 and skipping.metrics[-1]["update"] == 6
    mine, theirs = ([{key: line[key] for key in line if key.endswith("loss") or key == "update"} for line in run.metrics]
                    for run in (skipping, without))  # fmt: skip
    assert mine == theirs
    assert all(np.array_equal(value, without.weights[name]) for name, value in skipping.weights.items())


def fresh_optimizer(trainer, options: str, start: Path, steps) -> dict[str, torch.Tensor]:  # noqa: F811
    """The weights after training on these batches from a run's last weights, with a new optimizer."""
    config = load_config(trainer.words("fresh", options))
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len)).double()
    model.load_state_dict(training.checkpoint.load_file(start / "model.safetensors"))
    optimizer = build_optimizer(model, config)
    loader = BatchLoader(TokenStream(trainer.data, "train"), batch_size=8, seq_len=16, shuffle_seed=0)

    def closure(batch):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        return loss

    for step in steps:
        optimizer.step(functools.partial(closure, loader.batch(step)))
    optimizer.flush()
    loader.close()
    return model.state_dict()


def assert_close(weights: dict[str, np.ndarray], right: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == right.keys()
    for name, value in right.items():
        assert abs(weights[name] - value.numpy()).max() <= 1e-10 * value.abs().max(), name


@pytest.mark.parametrize("options, ranks", [(MVR2, 1), (MVR3, 2)])
def test_a_skipped_second_pass_restarts_the_momentum(trainer, options, ranks):  # noqa: F811
    """By then the update of the step before is applied. The next gradient starts a new momentum."""
    name = f"second-pass-{options.split()[1]}-{ranks}"
    patch = functools.partial(poison, 4, "loss", passes=(2,), rank=ranks - 1)
    whole = trainer.run(name, f"{options} --on-nan skip", ranks=ranks, patch=patch).ok()
    losses = {line["update"]: line for line in whole.metrics if "train_loss" in line}
    # Step 4 applies the update of step 3 and logs nothing. Step 5 is at X_4, with one pass, and step 6 at X_5.
    assert list(losses) == [0, 1, 2, 3, 4, 5]
    assert [line["passes"] for line in losses.values()] == [1, 3, 5, 7, 10, 12]
    assert whole.metrics[-1]["update"] == 6 and whole.metrics[-1]["skipped"] == 1
    four = trainer.run(f"{name}-four", f"{options} --steps 4", ranks=ranks).ok()
    assert_close(whole.weights, fresh_optimizer(trainer, options, four.folder, steps=(5, 6)))
    trainer.run(f"{name}-5", f"{options} --on-nan skip --steps 5", ranks=ranks, patch=patch).ok()
    trainer.run(f"{name}-5", f"{options} --on-nan skip --resume auto", ranks=ranks).ok().same_as(whole)


def test_a_run_that_can_only_skip_ends(trainer):  # noqa: F811
    patch = functools.partial(poison, 2, "loss", last=99)
    message = trainer.run("only-skips", "--on-nan skip --steps 40", patch=patch).refusal()
    assert "step 22: " in message and "as in the 20 steps before" in message


class Arrived:
    """In place of a CUDA event."""

    def synchronize(self) -> None:
        pass


def test_on_cuda_flags_are_read_a_step_later_but_before_anything_is_written(monkeypatch):
    """Tests the order of events on a CPU, with a stub for the copy to the host."""

    def send(self: FiniteGuard) -> None:
        self._in_flight = self._step, self._flags.clone(), Arrived()

    monkeypatch.setattr(FiniteGuard, "_send", send)
    model = torch.nn.Linear(2, 2)

    def guard() -> FiniteGuard:
        made = FiniteGuard(model, torch.optim.SGD(model.parameters()), ALONE, Config(batch_size=8))
        made._later = True
        return made

    def one_step(watching: FiniteGuard, number: int, value: float) -> None:
        with watching.step(number):
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            watching.look(torch.tensor(1.0))

    watching = guard()
    one_step(watching, 0, 1.0)
    one_step(watching, 1, torch.nan)  # not read yet
    with pytest.raises(Diverged, match="step 1: the gradient of bias is not finite"):
        one_step(watching, 2, 1.0)
    for write in (FiniteGuard.check, FiniteGuard.check_state):
        watching = guard()
        one_step(watching, 0, torch.inf)
        with pytest.raises(Diverged, match="step 0: the gradient of bias is not finite"):
            write(watching)


# ---- ranks that die, hang or fail


def stop_rank_1() -> None:
    if on_rank(1):
        at_step(3, functools.partial(os.kill, os.getpid(), signal.SIGSTOP))


def test_a_rank_that_hangs_is_named(trainer):  # noqa: F811
    running = trainer.start("hangs", "--rank-timeout 3", ranks=2, patch=stop_rank_1)
    running.processes[0].join(30)
    running.processes[1].kill()
    done = running.done()
    assert done.codes == [1, -9]
    assert "train_gpt: rank 1 died or hangs" in done.err and "--resume auto" in done.err and "Traceback" not in done.err


def test_a_rank_that_dies_does_not_leave_the_others_hanging(trainer, undisturbed):  # noqa: F811
    def dead() -> bool:
        metrics = running.folder / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") > 3

    options = f"{MVR2} --steps 150 --checkpoint-every 2"
    running = trainer.start("dies", options, ranks=2)
    running.wait_for(dead)
    running.signal(signal.SIGKILL, rank=1)
    done = running.done(timeout=30)
    assert done.codes == [1, -9] and "died or hangs" in done.err and "Traceback" not in done.err


def rank_1_refuses() -> None:
    def refuse() -> None:
        raise UserError("this node's disk is empty")

    if on_rank(1):
        at_step(3, refuse)


def test_an_error_on_one_other_rank_is_printed_once(trainer):  # noqa: F811
    done = trainer.run("rank-1-refuses", "", ranks=2, patch=rank_1_refuses)
    assert done.codes[1] == 2 and done.codes[0] == 1
    lines = [line for line in done.err.splitlines() if line.startswith("train_gpt")]
    assert lines == ["train_gpt: this node's disk is empty (rank 1)"] and "Traceback" not in done.err


# ---- torchrun and Slurm

CRASH_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
sys.argv[0] = "train_gpt.py"
import functools, train_gpt
from tests.training.test_reliability import at_step
from training.config import load_config
from common.errors import leave, one_line_errors
def die():
    open({flag!r}, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1" and not os.path.exists({flag!r}):
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
    script.write_text(CRASH_ONCE.format(root=str(ROOT), flag=str(flag)))
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
