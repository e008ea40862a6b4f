"""Whole runs of the trainer on the device with `--deterministic`: twice, stopped and resumed, always with the same weights."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt
from data.loader import BatchLoader
from data.shards import write_shard
from tests.helpers.device import BATCH, CUDA, DEVICE, RANKS, limit, only_cuda
from training.config import load_config

pytestmark = [limit, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SIZES = "--n-layer 4 --n-head 6 --d-model 384 --seq-len 256" if CUDA else "--n-layer 2 --n-head 2 --d-model 32 --seq-len 32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs are, and their data."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    noise = np.random.default_rng(0).integers(0, 257, 2**17)
    for split in ("train_000001", "val_000000"):
        write_shard(folder / "data" / f"noise_{split}.bin", noise)
    return folder


def words(folder: Path, name: str, more: str) -> list[str]:
    return (
        f"--run-name {name} --results-dir {folder} --data-dir {folder}/data --device {DEVICE.type} --deterministic {SIZES} "
        f"--vocab-size 512 --batch-size {BATCH} --micro-batch-size 3 --val-tokens 2048 --optimizer mvr3 "
        f"--compile {'on' if CUDA else 'off'} {more}"
    ).split()


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(folder: Path, name: str, more: str) -> None:
    torch._dynamo.reset()  # many models compiled in one process would reach its limit, and then run eagerly
    train_gpt.train(load_config(words(folder, name, more)))


def test_a_resumed_run_has_the_same_weights_bit_for_bit(folder):
    train(folder, "whole", "--steps 8")
    train(folder, "again", "--steps 8")
    train(folder, "resumed", "--steps 3")
    early = weights(folder, "resumed")
    train(folder, "resumed", "--steps 8 --resume auto")
    assert same(weights(folder, "again"), weights(folder, "whole"))
    assert same(weights(folder, "resumed"), weights(folder, "whole"))
    assert not same(early, weights(folder, "whole"))


def launch(folder: Path, name: str, more: str) -> subprocess.Popen:
    """A run under torchrun, on all cards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen([*command, "train_gpt.py", *words(folder, name, more)], cwd=ROOT, stdout=log, stderr=log)


def finish(folder: Path, *names_and_options: tuple[str, str]) -> None:
    """Run these at the same time. No process outlives this call."""
    started = {name: launch(folder, name, more) for name, more in names_and_options}
    try:
        codes = {name: process.wait() for name, process in started.items()}
    finally:
        for process in started.values():
            process.terminate()
            process.wait()
    for name, code in codes.items():
        assert code == 0, (folder / f"{name}.log").read_text()[-4000:]


def test_torchrun_on_all_cards_resumes_bit_for_bit(folder):
    """In new processes. On one card also equal to the run without torchrun."""
    finish(folder, ("ranks", "--steps 8"), ("ranks_resumed", "--steps 3"))
    finish(folder, ("ranks_resumed", "--steps 8 --resume auto"))
    assert same(weights(folder, "ranks_resumed"), weights(folder, "ranks"))
    if RANKS == 1:
        train(folder, "one", "--steps 8")
        assert same(weights(folder, "ranks"), weights(folder, "one"))


@only_cuda
def test_the_loop_never_waits_for_the_device(folder, monkeypatch):
    """Between steps 3 and 7 of a run, with no loss to print and nothing to save."""
    batch = BatchLoader.batch

    def watched(self, step):
        torch.cuda.set_sync_debug_mode("error" if 3 <= step < 7 else "default")
        return batch(self, step)

    monkeypatch.setattr(BatchLoader, "batch", watched)
    try:
        train(folder, "watched", "--steps 9 --val-every 100 --log-every 100 --checkpoint-every 0")
    finally:
        torch.cuda.set_sync_debug_mode("default")
