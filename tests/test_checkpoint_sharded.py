"""Checkpoints go from one process to FSDP2 and back: the same weights to 1e-9 as without a stop."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks as Processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from train_gpt import build_optimizer
from training import checkpoint
from training.checkpoint import Checkpointer
from training.config import Config
from training.ranks import Ranks

VARIANTS = ["gluon", "mvr1", "mvr2", "mvr3", "adamw"]
CONFIG = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 30, "seq_len": 8, "block_radius": 10.0, "embed_radius": 10.0}


def steps(folder: str, variant: str, sharded: bool, first: int, last: int, load: bool) -> list[torch.Tensor]:
    """Steps first … last-1 of a small run, from a checkpoint or from the start, and then a checkpoint; the weights."""
    alone = not dist.is_initialized()
    store = None if alone else dist.distributed_c10d._get_default_store()
    ranks = Ranks(
        0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), torch.device("cpu"),
        None if alone else dist.group.WORLD, None, store,
    )  # fmt: skip
    torch.manual_seed(0)
    config = Config(optimizer=variant, lr=1e-3, weight_decay=0.1, gamma=0.3, **CONFIG)
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len)).double()
    if sharded:
        mesh = init_device_mesh("cpu", (ranks.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, config)
    if load:
        path, state = checkpoint.newest_state(Path(folder) / "checkpoints")
        checkpoint.load(path, state, model, optimizer)
        assert state["step"] == first
    for k in range(first, last):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.randint(30, (2, 4, 8), generator=generator)

        def closure(x=x, y=y):
            loss = model(x, y)  # every rank evaluates the whole batch, so that the mean over the ranks is its gradient
            loss.backward()
            return loss

        optimizer.step(closure)
    writer = Checkpointer(Path(folder), ranks, keep=5)
    position = {"evaluated": 0, "skipped": 0, "validated": 0, "seconds": 0.0, "metrics_bytes": 0, "config": config.to_dict()}
    writer.save(last, model, optimizer, position)
    writer.finish()
    if not alone:
        dist.barrier()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def processes():
    two = Processes(2)
    yield two
    two.stop()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_then_fsdp_then_one_process(tmp_path, processes, variant):
    uninterrupted = steps(str(tmp_path / "all"), variant, False, 0, 6, load=False)
    steps(str(tmp_path / "run"), variant, False, 0, 2, load=False)
    answers = processes.run(steps, str(tmp_path / "run"), variant, True, 2, 4, True)
    ended = steps(str(tmp_path / "run"), variant, False, 4, 6, load=True)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert not all(torch.allclose(a, b) for a, b in zip(answers[0], ended, strict=True))
    for a, b in zip(ended, uninterrupted, strict=True):
        assert (a - b).norm() < 1e-9 * b.norm()
