"""Failures of a cluster: processes that die or hang at any moment, damaged files, full disks."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

import training.checkpoint
from common.errors import UserError
from tests.helpers.kill_test import kill_runs
from tests.helpers.train_runs import at_step, data, on_rank, trainer, undisturbed  # noqa: F401
from training.checkpoint import Position, list_checkpoints, newest_state, read_state
from training.ranks import Ranks
from training.saver import Saver

MVR2 = "--optimizer mvr2 --q 0.6"
ALONE = Ranks(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.slow


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
    "another format": edit_state(format=4),
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
    write = training.checkpoint.write

    def failing(path: Path, content: bytes) -> str:
        if on_rank(1) and "step_0000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    training.checkpoint.write = failing


def test_a_write_that_fails_on_another_rank_is_reported(trainer):  # noqa: F811
    done = trainer.run("rank-1-full", "--checkpoint-every 2 --keep-checkpoints 9", ranks=2, patch=rank_1_cannot_write_once)
    assert "checkpoint not written: No space left on device (rank 1)" in done.ok().out
    assert [path.name[-1] for path in list_checkpoints(done.folder / "checkpoints")] == ["7", "6", "4"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    (tmp_path / "checkpoints").mkdir()
    write, let_go = training.checkpoint.write, threading.Event()
    monkeypatch.setattr(training.checkpoint, "write", lambda *a: (let_go.wait(30), write(*a))[1])
    saver = Saver(tmp_path, ALONE, keep=2)
    before = model.weight.detach().clone()
    saver.save(model, optimizer, Position(step=1, sequences=1), {})
    assert not list_checkpoints(tmp_path / "checkpoints")
    with torch.no_grad():
        model.weight.zero_()
    let_go.set()
    saver.finish()
    saved = training.checkpoint.load_file(tmp_path / "checkpoints" / "step_0000001" / "model.safetensors")
    assert torch.equal(saved["weight"], before)


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
