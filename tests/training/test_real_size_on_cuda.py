"""Whole runs of GPT-124M on a GPU that is not there, from its configs: every optimizer, in the sizes that users train.

The pretended GPU (tests/helpers/pretended.py) keeps no values here, so a run takes two seconds. A tensor on the wrong device
is an error, and in the loop the host may read nothing from the device but the flags of the step before, after their event.

What this can't show: numbers, kernels, streams and the order of their work, memory, compiled code, several ranks, loading a
checkpoint, and what torch's C++ code does for CUDA tensors alone (it takes these for tensors on the CPU). Fake tensors that
C++ takes for CUDA's have no backward pass on a machine without a driver.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt
from data.shards import write_shard
from model import GPT
from optim import BY_NAME
from tests.helpers.pretended import OnDevice, pretended
from training import checkpoint, saver
from training.config import CONFIGS, load_config
from training.finite import FiniteGuard, NotFiniteError
from training.metrics import Clock, Progress

PARAMETERS = 123_568_128
# Two micro-batches a step. Losses are logged and validated before the first step and after the last.
OPTIONS = "--compile off --batch-size 64 --steps 3 --val-every 3 --val-tokens 40960 --log-every 3 --checkpoint-every 0"


@dataclass
class Run:
    """`waits`: where the host waited for the device, step by step. `saved`: what went into each file of tensors."""

    waits: list[list[str]] = field(default_factory=list)
    saved: list[dict[str, Tensor]] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "noise_train_000001.bin", np.random.default_rng(0).integers(0, 50304, 4 * 64 * 1024))
    write_shard(folder / "noise_val_000000.bin", np.arange(50000))
    return folder


@pytest.fixture
def start(monkeypatch, tmp_path, data):
    """A function that trains GPT-124M with this config on a card of 24 GiB with bfloat16 units."""

    def start(config: str, more: str = "") -> Run:
        run = Run()
        gradients, step, begin = train_gpt.Net.gradients, Progress.step, Clock.start

        def on_the_device(sizes):
            with torch.device("cuda"):  # its random numbers cost nothing there
                return GPT(sizes)

        def in_two(net, batch):
            assert net.rows == 2 * net.micro == 64 and all(type(part) is OnDevice for part in batch)
            return gradients(net, batch)

        def watched(progress):
            run.waits.append(list(device.waits))
            device.waits.clear()
            step(progress)

        def save(tensors):
            run.saved.append(tensors)
            return b""  # not half a gigabyte of zeros

        def cleared(clock):
            begin(clock)
            device.waits.clear()

        with pretended("cuda", values=False) as device, monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
            patch.setattr(torch.cuda, "mem_get_info", lambda *_: (24 * 2**30, 24 * 2**30))
            patch.setattr(train_gpt, "GPT", on_the_device)
            patch.setattr(train_gpt.Net, "gradients", in_two)
            patch.setattr(Clock, "start", cleared)
            patch.setattr(Progress, "step", watched)
            for module in (checkpoint, saver):
                patch.setattr(module, "save", save)
            words = f"--config {CONFIGS / config} --results-dir {tmp_path} --data-dir {data} {OPTIONS} {more}"
            folder = train_gpt.train(load_config(words.split()))
        run.lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return run

    return start


@pytest.mark.parametrize("optimizer", [*BY_NAME, "adamw"])
def test_a_run_of_every_optimizer(start, optimizer):
    run = start(f"{optimizer}_b512.py")
    logged, quiet, late = run.waits
    assert [wait.partition(" at ")[0] for wait in logged] == ["aten._local_scalar_dense", "event"] and not quiet
    assert len(late) == 1 and late[0].startswith("event at ") and "finite.py" in late[0]
    assert [line["update"] for line in run.lines if "val_loss" in line] == [0, 3]
    buffers, *weights = run.saved  # the last checkpoint, and model.safetensors
    assert [sum(value.numel() for value in part.values()) for part in weights] == [PARAMETERS] * 2
    assert all(type(value) is Tensor for part in run.saved for value in part.values())
    shapes = {name: value.shape for name, value in weights[0].items()}
    assert {name.rpartition("/")[0] for name in buffers} == shapes.keys()
    assert all(value.shape == shapes[name.rpartition("/")[0]] for name, value in buffers.items())


def test_a_skipped_step_of_a_deferred_update(start, monkeypatch):
    look = FiniteGuard.look

    def bad(guard, loss):
        look(guard, loss)
        if guard._step == 1:
            raise NotFiniteError

    monkeypatch.setattr(FiniteGuard, "look", bad)
    run = start("mvr1_b512.py", "--on-nan skip")
    assert all("finite.py" in wait for wait in run.waits[2])
    assert run.lines[-1]["update"] == 2 and run.lines[-1]["skipped"] == 1
