"""Runs of the trainer in real processes, forked from one that has imported torch, so that a run takes a second, not ten."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data.loader import BatchLoader
from data.shards import write_shard
from tests.helpers.forked import context, redirect

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "--device": "cpu", "--dtype": "float64", "--vocab-size": "61", "--n-layer": "2", "--n-head": "2", "--d-model": "16",
    "--seq-len": "16", "--batch-size": "8", "--micro-batch-size": "2", "--shuffle": "true",
    "--lr": "1e-3", "--block-radius": "20", "--embed-radius": "100", "--steps": "7", "--val-every": "3",
    "--val-tokens": "512", "--log-every": "1", "--checkpoint-every": "0",
}  # fmt: skip


@dataclass
class Done:
    """A run that has ended."""

    codes: list[int]
    out: str
    err: str
    folder: Path

    def ok(self) -> "Done":
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n{self.out[-2000:]}\n{self.err[-3000:]}"
        return self

    def refusal(self) -> str:
        """The one line of stderr of a run that was refused."""
        assert set(self.codes) == {2}, f"exit codes {self.codes}\n{self.out[-2000:]}\n{self.err[-3000:]}"
        assert self.err.count("\n") == 1 and self.err.startswith("train_gpt: "), self.err
        return self.err.strip()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without their seconds."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "model.safetensors")

    def same_as(self, other: "Done") -> None:
        """Assert the same metrics, and weights bit for bit."""
        assert self.metrics == other.metrics
        mine, theirs = self.weights, other.weights
        assert mine.keys() == theirs.keys()
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


class Running:
    """A run under way: one process per rank."""

    def __init__(self, folder: Path, words: list[str], ranks: int, patch: Callable[[], None] | None, env: dict) -> None:
        self.folder = folder
        self._logs = folder.parent / f"{folder.name}.log-{time.monotonic_ns()}"
        self._logs.mkdir(parents=True)
        places: list[dict] = [{}]
        if ranks > 1:
            common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            places = [{"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(ranks), **common} for r in range(ranks)]
        self.processes = [
            context().Process(target=_train, args=(words, place | env, self._logs / str(i), patch))
            for i, place in enumerate(places)
        ]
        for process in self.processes:
            process.start()

    def text(self, name: str = "out") -> str:
        return "".join(path.read_text() for path in sorted(self._logs.glob(f"*.{name}")))

    def wait_for(self, ready: Callable[[], bool], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            assert self.alive() and time.monotonic() < deadline, self.text() + self.text("err")
            time.sleep(0.01)

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait_for_death(self, timeout: float) -> None:
        """Wait until a process has ended, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while all(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.002)

    def kill(self) -> bool:
        """Kill all ranks. Returns whether SIGKILL ended any of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)

    def done(self, timeout: float = 60) -> Done:
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, "still running:\n" + self.text() + self.text("err")
        return Done([process.exitcode for process in self.processes], self.text(), self.text("err"), self.folder)


class Trainer:
    """Starts runs with the tiny options; given options override them."""

    def __init__(self, results: Path, data: Path) -> None:
        self.results, self.data = results, data

    def start(
        self, name: str, options: str = "", ranks: int = 1, patch: Callable[[], None] | None = None, **environment: str
    ) -> Running:
        """Start a run with these options, in ranks that call `patch` first."""
        return Running(self.results / name, self.words(name, options), ranks, patch, environment)

    def words(self, name: str, options: str) -> list[str]:
        """The command line: the given options, and the tiny ones that they do not set."""
        given = options.split()
        places = {"--run-name": name, "--results-dir": str(self.results), "--data-dir": str(self.data)}
        defaults = {flag: value for flag, value in (places | TINY).items() if flag not in given}
        return [word for pair in defaults.items() for word in pair] + given

    def run(self, name: str, options: str = "", **rest: Any) -> Done:
        return self.start(name, options, **rest).done()


def _train(words: list[str], environment: dict[str, str], log: Path, patch: Callable[[], None] | None) -> None:
    import torch

    redirect(log)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)

    import train_gpt
    from common.errors import one_line_errors
    from training.config import load_config

    if patch is not None:
        patch()
    with one_line_errors("train_gpt"):
        train_gpt.train(load_config(words))


def free_port() -> int:
    """A port below the range that connections take theirs from, so that none takes it before the ranks meet there."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no free port")


def files_below(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def write_data(folder: Path, vocab: int = 61, tokens: int = 20_000) -> Path:
    """A seeded text in which each token depends on the one before, as two train shards and a val shard."""
    generator = np.random.default_rng(7)
    noise = generator.integers(0, 5, tokens)
    stream = np.cumsum(noise) % vocab
    folder.mkdir(parents=True, exist_ok=True)
    half = tokens // 2 + 13
    write_shard(folder / "tiny_train_000001.bin", stream[:half])
    write_shard(folder / "tiny_train_000002.bin", stream[half:])
    write_shard(folder / "tiny_val_000000.bin", np.cumsum(noise[:3000][::-1]) % vocab)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, data) -> Trainer:
    """One trainer per test file, so that tests can share runs."""
    return Trainer(tmp_path_factory.mktemp("results"), data)


@pytest.fixture(scope="module")
def undisturbed(trainer) -> Callable[..., Done]:
    """A function that gives the undisturbed run with these options, made once."""
    made = {}

    def run(options: str, ranks: int = 1):
        if (options, ranks) not in made:
            made[options, ranks] = trainer.run(f"undisturbed-{len(made)}", options, ranks=ranks).ok()
        return made[options, ranks]

    return run


def at_step(step: int, act: Callable[[], None]) -> None:
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
