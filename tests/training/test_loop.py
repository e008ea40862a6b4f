"""The training loop: no step waits for the device, the speed is since the last line, and a rank that waits can be ended."""

import math
import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from model import GPT, GPTConfig
from tests.helpers.optimizers import ALL, Net, batch, make
from tests.helpers.train_runs import TINY, at_step, data, on_rank, trainer  # noqa: F401
from training import numerics
from training.checkpoint import Position
from training.config import Config, load_config
from training.finite import FiniteGuard
from training.metrics import Progress, peak_flops
from training.ranks import Ranks
from training.stop import StopSignal

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)


class Reads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in READS
        return function(*arguments, **(options or {}))


def closure_of(net, tokens, look=None):
    def closure():
        loss = net(tokens)
        loss.backward()
        if look is not None:
            look(loss.detach())
        return loss

    return closure


@pytest.mark.parametrize("variant", ALL)
def test_a_step_never_reads_from_the_device(variant):
    net = Net()
    optimizer = make(variant, net)
    for k in range(3):
        with Reads() as reads:
            optimizer.step(closure_of(net, batch(k)))
        assert reads.count == 0


def test_a_pass_of_the_model_never_reads_from_the_device():
    model, tokens = GPT(GPTConfig(61, 1, 1, 16, 8)), torch.zeros(2, 8, dtype=torch.int64)
    with Reads() as reads, torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).backward()
    assert reads.count == 0


def test_the_count_sees_a_read():
    with Reads() as reads:
        float(torch.ones(()).item())
        bool(torch.ones(1).any())
    assert reads.count == 2


@pytest.mark.parametrize(("on_nan", "device", "expected"), [("stop", "cpu", 1), ("skip", "cpu", 1), ("stop", "cuda", 0)])
def test_the_finite_guard_reads_once_a_pass_except_on_cuda(on_nan, device, expected):
    """On a CPU reading costs nothing. On CUDA a run that stops anyway reads the flags a step later."""
    net = Net()
    guard = FiniteGuard(net, make("gluon", net), Ranks(0, 1, torch.device(device)), Config(on_nan=on_nan))
    with Reads() as reads:
        closure_of(net, batch(0), guard.look)()
    assert reads.count == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("variant", ALL)
def test_a_step_never_waits_for_a_gpu(variant):
    net = Net().cuda()
    optimizer = make(variant, net)
    for k in range(3):
        tokens = batch(k).cuda()
        torch.cuda.set_sync_debug_mode("error" if k else "default")
        try:
            optimizer.step(closure_of(net, tokens))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_speed_is_that_since_the_last_line(capsys):
    progress = Progress(Config(seq_len=10, run_name="speed"), Ranks(0, 1, torch.device("cpu")), Position(), 1)
    progress.show(0, 0, 0.0, val_loss=3.0)
    progress.show(1, 8, 40.0, train_loss=2.9)  # the first step is slow
    progress.show(1, 8, 40.0, val_loss=2.8)
    progress.show(2, 16, 41.0, train_loss=2.7)
    progress.show(3, 24, 42.0, val_loss=2.6)
    progress.show(4, 32, 43.0, val_loss=2.5)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert "train_loss 2.7000" in lines[2] and "train_loss" not in lines[3]  # there is none since the last line
    assert "tokens/s" not in lines[0] and "tokens/s 2 " in lines[1] and "tokens/s 80 " in lines[2]


def test_the_peak_is_that_of_the_exact_card():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA H200 NVL"]
    assert [peak_flops(name) / 1e12 for name in names] == pytest.approx([989, 835, 756, 989, 835])
    # FLOP a clock and unit, units, GHz
    parts = {"210": (1024, 104, 1.7), "250X": (1024, 110, 1.7), "300X": (2048, 304, 2.1), "325X": (2048, 304, 2.1)}
    parts |= {"350X": (4096, 256, 2.2), "355X": (4096, 256, 2.4)}
    for name, factors in parts.items():
        assert peak_flops(f"AMD Instinct MI{name}") / 1e9 == pytest.approx(math.prod(factors), rel=1e-3)
    unknown = ["", "a card", "NVIDIA RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    unknown.append("AMD Instinct MI250X / MI250")
    assert not any(map(peak_flops, unknown))


@pytest.mark.slow
def test_the_warm_up_compiles_the_graph_of_training(data, tmp_path, monkeypatch):  # noqa: F811
    """Otherwise a run would compile its model twice, the second time while its clock runs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(numerics, "compiled", lambda model, *_: torch.compile(model, dynamic=False, backend=backend))
    words = [word for pair in TINY.items() for word in pair]
    train_gpt.train(load_config([*words, f"--data-dir={data}", f"--results-dir={tmp_path}", "--run-name=graphs"]))
    assert len(graphs) == 2  # training's, and validation's


def test_a_runs_switches_are_put_back():
    def switches():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        )

    before = switches()
    with ExitStack() as at_end:
        numerics.set_switches(Config(deterministic=True), at_end)
        assert switches() == (True, False, False)
    assert switches() == before


def test_auto_is_bfloat16_where_there_are_units(monkeypatch):
    for units, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(numerics, "has_bfloat16_units", lambda device, units=units: units)
        assert numerics.choose_dtype(Config(), torch.device("cpu")) == expected
        assert numerics.choose_dtype(Config(dtype="float64"), torch.device("cpu")) == "float64"


def rank_1_hangs() -> None:
    StopSignal.LEAST_WAIT = 1.0
    if on_rank(1):
        at_step(5, partial(os.kill, os.getpid(), signal.SIGSTOP))


@pytest.mark.slow
def test_a_signal_ends_a_rank_that_waits_for_a_hung_one(trainer):  # noqa: F811
    """The main thread of rank 0 is inside torch then, for up to --rank-timeout. The checkpoint stays complete."""
    options = "--optimizer mvr2 --checkpoint-every 2"
    expected = trainer.run("never-hung", options, ranks=2).ok()
    running = trainer.start("hung", options, ranks=2, patch=rank_1_hangs)
    state = Path(f"/proc/{running.processes[1].pid}/stat")
    running.wait_for(lambda: state.read_text().split()[2] == "T")
    running.signal(signal.SIGTERM)
    running.processes[0].join(20)
    assert running.processes[0].exitcode == 1
    running.processes[1].kill()
    done = running.done()
    assert "after SIGTERM" in done.err and done.err.count("\n") == 1
    trainer.run("hung", f"{options} --resume auto", ranks=2).ok().same_as(expected)


@pytest.mark.slow
def test_a_killed_rank_and_a_signal_end_the_other_at_once(trainer):  # noqa: F811
    options = "--optimizer mvr2 --checkpoint-every 2 --steps 150"
    running = trainer.start("killed", options, ranks=2)
    running.wait_for(lambda: (running.folder / "metrics.jsonl").exists())
    running.wait_for(lambda: (running.folder / "metrics.jsonl").read_text().count("\n") > 4)
    running.signal(signal.SIGKILL, rank=1)
    running.signal(signal.SIGTERM)
    done = running.done(timeout=20)
    assert done.codes == [1, -9] and "Traceback" not in done.err


def second_validation_is_slow() -> None:
    """It takes three seconds, in which this rank gets SIGTERM."""
    StopSignal.LEAST_WAIT = 0.2
    validate, calls = train_gpt.Net.validate, []

    def slow(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        return validate(*arguments)

    train_gpt.Net.validate = slow


@pytest.mark.slow
def test_a_signal_in_a_long_validation_waits_for_it(trainer):  # noqa: F811
    done = trainer.run("patient", ranks=2, patch=second_validation_is_slow)
    assert done.codes == [0, 0], done.err
    assert "stopped after step 3 of 7" in done.out
