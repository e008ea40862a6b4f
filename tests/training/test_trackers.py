"""Trackers that work, block, fail or are missing: training continues and metrics.jsonl is complete."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

import training.trackers
from tests.helpers.train_runs import data, trainer  # noqa: F401
from tests.helpers.wandb_server import serve
from train_gpt import train
from training.config import load_config
from training.trackers import Tracker


class Stub:
    """A service that keeps its lines and calls `act` in the method `where`."""

    def __init__(self, where="", act=lambda: None):
        self.lines, self.ended, self._where, self._act = [], False, where, act

    def start(self):
        self._at("start")
        return self

    def log(self, values):
        self._at("log")
        self.lines.append(values)

    def finish(self):
        self._at("finish")
        self.ended = True

    def _at(self, where):
        if where == self._where:
            self._act()


def raises(error):
    def act():
        raise error

    return act


@pytest.fixture
def here(trainer, monkeypatch, capfd):  # noqa: F811
    """A function that runs the trainer in this process with a service in place of W&B. Returns metrics and stdout."""

    def run(name, service, options=""):
        if service is not None:
            monkeypatch.setattr(training.trackers, "_wandb", lambda *_: service.start())
        folder = train(load_config(trainer.words(name, f"--wandb {options}")))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return lines, capfd.readouterr().out

    return run


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_tracker_gets_every_line_in_order(here):
    service = Stub()
    lines, _ = here("works", service)
    assert service.lines == lines and service.ended and len(lines) == 11


@pytest.mark.parametrize("where", ["start", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no\nroute"), SystemExit(1)], ids=["error", "exit"])
def test_a_tracker_that_fails(here, where, error):
    name = f"{where}-{type(error).__name__}"
    lines, said = here(name, Stub(where, raises(error)))
    assert without_seconds(lines) == without_seconds(here(f"{name}-works", Stub())[0])
    reason = "no route" if isinstance(error, RuntimeError) else "1"
    assert said.count(f"Weights & Biases stopped ({reason}); training goes on without it") == 1


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_blocks(here, where, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(Tracker, "LINES", 4)
    monkeypatch.setattr(Tracker, "END_SECONDS", 0.2)
    service = Stub(where, let_go.wait)
    began = time.monotonic()
    lines, said = here(f"blocks-{where}", service)
    assert len(lines) == 11 and lines[-1]["update"] == 7
    assert time.monotonic() - began < 20 and not service.ended
    if where != "finish":
        assert said.count("Weights & Biases hangs or is slow: lines from update") == 1
    assert said.count("did not end within 0.2 seconds") == 1
    let_go.set()


def test_a_line_for_a_tracker_that_blocks_costs_microseconds():
    let_go = threading.Event()
    tracker = Tracker("stub", Stub("log", let_go.wait).start)
    began = time.perf_counter()
    for update in range(20_000):
        tracker.log({"update": update, "train_loss": 1.0})
    each = (time.perf_counter() - began) / 20_000
    assert each < 100e-6  # 1% of a step of 10 ms; about 1 µs where nothing else runs
    let_go.set()
    tracker.close()


@pytest.mark.parametrize("module, option", [("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard")])
def test_a_tracker_that_is_not_installed(trainer, monkeypatch, capfd, module, option):  # noqa: F811
    monkeypatch.setitem(sys.modules, module, None)
    folder = train(load_config(trainer.words(f"absent-{option}", f"--{option}")))
    said = capfd.readouterr().out
    assert said.count(f"it needs the package {option}: pip install {option}") == 1
    assert (folder / "metrics.jsonl").read_text().count("\n") == 11


def test_tensorboard_continues_after_a_resume(trainer):  # noqa: F811
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = "--tensorboard --checkpoint-every 2"
    first = train(load_config(trainer.words("board", f"{options} --steps 5")))
    for newer in (first / "checkpoints").glob("step_0000005"):  # as if it had died after step 4
        newer.rename(first / "gone")
    train(load_config(trainer.words("board", f"{options} --resume auto")))
    events = event_accumulator.EventAccumulator(str(first / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    for name in ("train_loss", "val_loss"):
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert seen == pytest.approx({line["update"]: line[name] for line in lines if name in line}, rel=1e-6)
    again = train(load_config(trainer.words("board", "--overwrite --steps 2")))
    assert not (again / "tensorboard").exists()


@pytest.mark.slow
def test_one_sync_makes_one_run_of_an_offline_run_that_was_resumed(trainer, tmp_path):  # noqa: F811
    """Each launch leaves a folder of its own. Synced in one command, as the page says, they become one run with every line."""
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    first = trainer.run("wandb", "--steps 2 --wandb", **environment).ok().metrics
    done = trainer.run("wandb", "--steps 4 --wandb --resume auto", **environment).ok()
    name = (done.folder / "wandb" / "id").read_text()
    parts = sorted((done.folder / "wandb").glob("offline-run-*"))
    assert [[path.name for path in part.glob("*.wandb")] for part in parts] == [[f"run-{name}.wandb"]] * 2
    with serve() as server:
        words = [sys.executable, "-m", "wandb", "sync", *map(str, reversed(parts))]
        account = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40, "WANDB_CONFIG_DIR": str(tmp_path)}
        synced = subprocess.run(words, env=os.environ | account, capture_output=True, text=True, timeout=120)
    assert synced.returncode == 0, synced.stderr[-2000:]
    rows = [{key: value for key, value in row.items() if not key.startswith("_") and key != "seconds"} for row in server.rows]
    # The end of the first launch, a validation after its checkpoint, is replaced in metrics.jsonl and stays at W&B.
    assert done.metrics[: len(first) - 1] == first[:-1] and "val_loss" in first[-1]
    assert server.names == [name] and rows == first + done.metrics[len(first) - 1 :]
    assert [row["_step"] for row in server.rows] == list(range(len(rows)))
