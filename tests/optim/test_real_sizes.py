"""At real sizes, two ranks under DDP agree with one process: GPT-124M, and the trainer beyond DDP's first bucket."""

import importlib
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from optim import Gluon, GluonMVR2, GluonMVR3
from tests.helpers.ranks import Ranks
from tests.helpers.train_runs import data, trainer  # noqa: F401

pytestmark = pytest.mark.slow
STEPS, TOKENS = 3, 8
# MVR-3 has the most messages and all 12 layers. Three layers fill several of DDP's buckets too.
VARIANTS = {
    "gluon": (Gluon, {}, 3), "mvr2": (GluonMVR2, {"q": 0.5}, 3), "mvr3": (GluonMVR3, {"momentum": 0.2, "q": 0.5}, 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    two = Ranks(2, timeout=240)
    yield two
    two.stop()


@contextmanager
def one_core_and_no_iterations():
    """Without the polar factor's iterations, which are tested elsewhere, the messages are the same and the test is three times
    as fast. One thread sums in the same order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.object(importlib.import_module("optim.polar"), "_STEPS", 0):
        yield
    torch.set_num_threads(threads)


def run(variant: str, file: str) -> dict:
    """Train on one sequence per rank, or on both in one process, which saves its weights. The ranks compare with them."""
    with one_core_and_no_iterations():
        torch.manual_seed(0)
        kind, own, layers = VARIANTS[variant]
        net = GPT(GPTConfig(n_layer=layers))
        start = [p.detach().clone() for p in net.parameters()]
        groups = [
            {"params": list(net.blocks.parameters()), "norm": "spectral", "radius": 50.0},
            {"params": [net.embedding.weight], "norm": "sign", "radius": 3000.0},
        ]
        optimizer = kind(groups, lr=3.6e-4, **own)
        several = dist.is_initialized()
        model = DistributedDataParallel(net, gradient_as_bucket_view=True) if several else net
        losses = []
        for k in range(STEPS):
            x, y = torch.randint(50304, (2, 2, TOKENS), generator=torch.Generator().manual_seed(k))
            mine = [dist.get_rank()] if several else [0, 1]

            def closure(x=x, y=y, mine=mine):
                model.zero_grad()
                total = 0.0
                for i in mine:
                    loss = model(x[i : i + 1], y[i : i + 1]) / len(mine)
                    loss.backward()
                    total += loss.item()
                return total

            losses.append(optimizer.step(closure))
        optimizer.flush()
    if not several:
        torch.save(list(net.parameters()), file)
        return {"losses": losses, "updates": optimizer.updates}
    assert model._get_ddp_logging_data()["has_rebuilt_buckets"]
    furthest, same = 0.0, True
    for p, first, right in zip(net.parameters(), start, torch.load(file, mmap=True), strict=True):
        furthest = max(furthest, ((p - right).norm() / (right - first).norm()).item())
        firsts = p.detach().clone()
        dist.broadcast(firsts, 0)
        same = same and torch.equal(p, firsts)
    return {"losses": losses, "updates": optimizer.updates, "furthest": furthest, "same": same}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_process(ranks, variant, tmp_path):
    file = str(tmp_path / "weights.pt")
    alone = run(variant, file)
    answers = ranks.run(run, variant, file)
    assert all(a["same"] for a in answers), "the ranks differ"
    assert {a["updates"] for a in answers} == {alone["updates"]} == {STEPS}
    mean = [sum(losses) / 2 for losses in zip(*(a["losses"] for a in answers), strict=True)]
    assert mean == pytest.approx(alone["losses"], rel=1e-6)
    # Relative to the distance that each parameter has moved. Both sums have two terms, so float32 gives the same.
    assert max(a["furthest"] for a in answers) < 1e-6


@pytest.mark.parametrize("variant", ["mvr2", "previous_batch", "experiments.contestants:Transported"])
def test_the_trainer_beyond_ddps_first_bucket(trainer, variant):  # noqa: F811
    """Three of its parameters are larger than the first bucket's 1 MiB, so DDP rebuilds its buckets after a step."""
    options = f"--optimizer {variant} --vocab-size 1000 --d-model 256 --n-layer 1 --steps 4"
    alone = trainer.run(f"{variant}-1", options).ok()
    two = trainer.run(f"{variant}-2", options, ranks=2).ok()
    for name, right in alone.weights.items():
        assert np.linalg.norm(two.weights[name] - right) <= 1e-9 * np.linalg.norm(right), name
