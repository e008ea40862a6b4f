"""Checkpoints go from one process to DDP, to FSDP2 and back: the same weights to 1e-9 as without a stop."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, MuonMVR, PreviousBatchMVR, SingleBatchMVR
from tests.helpers.ranks import Ranks as Processes
from training import checkpoint
from training.checkpoint import Position
from training.ranks import Ranks
from training.saver import Saver

pytestmark = pytest.mark.slow
VARIANTS = {
    "gluon": (Gluon, {}),
    "mvr1": (GluonMVR1, {"gamma": 0.3}),
    "mvr2": (GluonMVR2, {"q": 0.4}),
    "mvr3": (GluonMVR3, {"q": 0.4, "gamma": 0.3}),
    "single_batch": (SingleBatchMVR, {"gamma": 0.3}),
    "previous_batch": (PreviousBatchMVR, {"gamma": 0.3}),
    "muon": (MuonMVR, {"is_approx": True}),
    "adamw": (Gluon, {}),
}


def optimizer_of(variant: str, model: GPT) -> torch.optim.Optimizer:
    kind, own = VARIANTS[variant]
    if variant == "muon":
        groups = [
            {"params": model.blocks.parameters(), "use_muon": True},
            {"params": [model.embedding.weight], "use_muon": False},
        ]
    else:
        norms = ("adamw", "adamw") if variant == "adamw" else ("spectral", "sign")
        groups = [
            {"params": model.blocks.parameters(), "norm": norms[0], "radius": 10.0},
            {"params": [model.embedding.weight], "norm": norms[1], "radius": 10.0},
        ]
    return kind(groups, lr=1e-3, weight_decay=0.1, **own)


def steps(folder: str, variant: str, sharded: bool, first: int, last: int, load: bool) -> list[torch.Tensor]:
    """Take steps first … last-1 of a small run, from a checkpoint or from the start, and save. Returns the weights."""
    alone = not dist.is_initialized()
    store = None if alone else dist.distributed_c10d._get_default_store()
    ranks = Ranks(
        0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), torch.device("cpu"),
        None if alone else dist.group.WORLD, None, store,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, n_layer=2, n_head=2, d_model=16, seq_len=8)).double()
    if sharded:
        mesh = init_device_mesh("cpu", (ranks.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(variant, model)
    if load:
        path, state = checkpoint.newest_state(Path(folder) / "checkpoints")
        checkpoint.load(path, state, model, optimizer)
        assert state["step"] == first
    for k in range(first, last):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.randint(31, (2, 4, 8), generator=generator)

        def closure(x=x, y=y):
            model.zero_grad()
            loss = model(x, y)  # every rank evaluates the whole batch, so that the mean over the ranks is its gradient
            loss.backward()
            return loss

        optimizer.step(closure)
    writer = Saver(Path(folder), ranks, keep=5)
    writer.save(model, optimizer, Position(step=last), config={})
    writer.finish()
    if not alone:
        dist.barrier()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def processes():
    by_world = {2: Processes(2), 3: Processes(3)}
    yield by_world
    for ranks in by_world.values():
        ranks.stop()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_then_ddp_then_fsdp_then_one_process(tmp_path, processes, variant):
    """First the ranks hold replicas with equal gradients, as under DDP, then shards."""
    uninterrupted = steps(str(tmp_path / "all"), variant, False, 0, 8, load=False)
    run = str(tmp_path / "run")
    steps(run, variant, False, 0, 2, load=False)
    three = processes[3].run(steps, run, variant, False, 2, 4, True)
    two = processes[2].run(steps, run, variant, variant != "muon", 4, 6, True)
    ended = steps(run, variant, False, 6, 8, load=True)
    for answers in (three, two):
        for answer in answers:
            assert all(map(torch.equal, answer, answers[0]))
        assert not any(torch.allclose(a, b) for a, b in zip(answers[0], ended, strict=True))
    for a, b in zip(ended, uninterrupted, strict=True):
        assert (a - b).norm() < 1e-9 * b.norm()
