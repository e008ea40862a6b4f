"""The benchmarks run end to end (their numbers are not tested), and the scaling model counts bytes correctly."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import scaling
from benchmarks.measure import main
from common.errors import UserError
from model import GPT, GPTConfig
from optim import Gluon, buckets
from optim.polar import work_dtype

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"), [("optimizers", "torch.optim.Muon"), ("training_step", "plain loop, AdamW, bfloat16")]
)
def test_a_quick_run_writes_its_page_and_numbers(tmp_path, name, other):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seconds = json.loads((tmp_path / f"{name}_cpu.json").read_text())["sets"]["tiny"]["seconds"]
    assert {"Gluon", "MVR-1", "MVR-2", "MVR-3", other} <= seconds.keys()
    assert all(len(values) == 3 for values in seconds.values())
    page = (tmp_path / f"{name}_cpu.md").read_text()
    assert f"| {other} |" in page and "| Gluon |" in page


@pytest.mark.parametrize("words", ["--device mps", "--sets none", "--threads 0", "--rounds -1", "--bogus 1"])
def test_a_wrong_option_is_one_line(tmp_path, words):
    with pytest.raises(UserError) as caught:
        main([*words.split(), "--out", str(tmp_path / "out")], "x", {"tiny": None}, {"cpu": "tiny", "cuda": "tiny"}, "x")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


class Sent(TorchDispatchMode):
    """The bytes that this rank sends, for each collective."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            self.sent.append(min((a.nbytes for a in arguments if isinstance(a, torch.Tensor)), default=0))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("world", "bucket"), [*itertools.product((2, 8, 64), (2**26, 3 * 64 * 256, 1)), (1000, 2**26)])
def test_the_scaling_model_agrees_with_the_fake_group(world, bucket, monkeypatch):
    """Byte for byte, with matrices in one bucket, in several, and each in its own."""
    monkeypatch.setattr(buckets, "BUCKET_ELEMENTS", bucket)
    config = GPTConfig(vocab_size=1003, n_layer=5, n_head=1, d_model=64, seq_len=8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        net = GPT(config)
        groups = [
            {"params": list(net.blocks.parameters()), "norm": "spectral"},
            {"params": [net.embedding.weight], "norm": "sign"},
        ]
        optimizer = Gluon(groups, lr=0.0)
        for _ in range(2):  # the first step also compares the ranks' parameters
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            with Sent() as watch:
                optimizer.step()
    finally:
        dist.destroy_process_group()
    size = work_dtype(net.blocks[0].attention.q.weight, "polar_express").itemsize
    assert sorted(watch.sent) == sorted(scaling.messages(config, world, size))


def test_the_performance_page_has_the_scaling_models_tables():
    page = (ROOT / "results" / "performance.md").read_text(encoding="utf-8")
    for table in scaling.tables():
        assert table in page
