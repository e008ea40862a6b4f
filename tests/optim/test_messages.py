"""What one step of GPT-124M sends among 8 and 64 ranks: torch's fake process group counts messages and bytes exactly."""

import importlib
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from optim import Gluon, GluonMVR2, SingleBatchMVR
from optim.polar import has_bfloat16_units
from tests.optim.test_memory import Census

SQUARE, TALL, EMBEDDING = 768 * 768, 3072 * 768, 50304 * 768
SQUARES, TALLS = 48, 24  # and one embedding


class Messages(TorchDispatchMode):
    """The collectives that are called, as (name, bytes sent by this rank, bytes received)."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            sizes = [a.nbytes for a in arguments if isinstance(a, Tensor)]
            self.seen.append((function.__name__.split(".")[0].strip("_"), min(sizes, default=0), max(sizes, default=0)))
        return function(*arguments, **(options or {}))


@contextmanager
def rank_of(rank: int, world: int):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def weights():
    """The embedding and the matrices of the blocks."""
    with torch.no_grad():
        net = GPT(GPTConfig())
    blocks = list(net.blocks.parameters())
    assert [sum(p.numel() == n for p in blocks) for n in (SQUARE, TALL)] == [SQUARES, TALLS] and len(blocks) == SQUARES + TALLS
    return {"embedding": [net.embedding.weight], "blocks": blocks}


def groups(weights) -> list[dict]:
    return [{"params": weights["blocks"], "norm": "spectral"}, {"params": weights["embedding"], "norm": "sign"}]


def buffer_bytes(optimizer, params: list[nn.Parameter], name: str) -> int:
    return sum(optimizer.state[p][name].nbytes for p in params if optimizer.state[p].get(name) is not None)


@pytest.mark.parametrize("world", [8, 64])
def test_a_step_is_three_padded_all_gathers(weights, world):
    """One per bucket, each as long as the largest rank's part, with a flag per piece; the embedding's signs as bytes."""
    size = 2 if has_bfloat16_units(torch.device("cpu")) else 4
    expected = sorted(
        (
            math.ceil(SQUARES / world) * (SQUARE + 1) * size,
            math.ceil(TALLS / world) * (TALL + 1) * size,
            math.ceil(50304 / world) * 768 + 1,
        )
    )
    # Without the polar factor's iterations the same messages travel.
    with rank_of(world - 1, world), mock.patch.object(importlib.import_module("optim.polar"), "_STEPS", 0):
        optimizer = Gluon(groups(weights), lr=0.0)
        for step in range(2):
            for p in weights["blocks"] + weights["embedding"]:
                p.grad = torch.ones(()).expand_as(p)
            with Messages() as messages:
                optimizer.step()
            if step:  # the first one also compares what the ranks hold
                assert sorted(sent for _, sent, _ in messages.seen) == expected
                assert all(name == "allgather_base" and got == world * sent for name, sent, got in messages.seen)


@pytest.mark.parametrize("world", [8, 64])
def test_momentum_is_spread_evenly(weights, world):
    kept = {"embedding": [], "blocks": [], "estimate": []}
    for rank in range(world):
        with rank_of(rank, world):
            optimizer = GluonMVR2(groups(weights), lr=0.0)
            kept["embedding"].append(buffer_bytes(optimizer, weights["embedding"], "momentum_buffer"))
            kept["blocks"].append(buffer_bytes(optimizer, weights["blocks"], "momentum_buffer"))
            kept["estimate"].append(buffer_bytes(optimizer, weights["blocks"] + weights["embedding"], "estimate"))
    assert kept["embedding"] == [EMBEDDING // world * 4] * world, "each rank keeps its rows"
    assert sum(kept["blocks"]) == (SQUARES * SQUARE + TALLS * TALL) * 4
    assert kept["estimate"] == [a + b for a, b in zip(kept["embedding"], kept["blocks"], strict=True)]
    # No rank owns more than its even share of the matrices of one shape, rounded up: on 64 ranks one of each.
    assert max(kept["blocks"]) == (math.ceil(SQUARES / world) * SQUARE + math.ceil(TALLS / world) * TALL) * 4


@pytest.mark.parametrize("world", [8, 64])
def test_a_step_with_fsdp2_is_an_all_to_all_each_way(weights, world):
    """Only for matrices: the momenta's pieces go to the owners and the directions' pieces back, with a flag per piece."""
    size = 2 if has_bfloat16_units(torch.device("cpu")) else 4
    me = 0  # this rank owns matrices of each shape (the fake group refuses an empty message)
    with rank_of(me, world), mock.patch.object(importlib.import_module("optim.polar"), "_STEPS", 0):
        mesh = init_device_mesh("cpu", (world,))
        sharded = {}
        for name, params in weights.items():
            pieces = [p.detach().chunk(world)[me] for p in params]
            sharded[name] = [nn.Parameter(DTensor.from_local(piece, mesh, [Shard(0)])) for piece in pieces]
        optimizer = Gluon(groups(sharded), lr=0.0)
        for p in sharded["blocks"] + sharded["embedding"]:
            p.grad = torch.zeros_like(p)
        with Messages() as messages:
            optimizer.step()
        sent, got = [], []
        for members in ([p for p in sharded["blocks"] if p.numel() == n] for n in (SQUARE, TALL)):
            owned = [p for p in members if optimizer._shares.owner(p) == me]
            assert len(owned) in (len(members) // world, math.ceil(len(members) / world)), "an even share of the work"
            pieces, whole = sum(p.numel() // world for p in members), sum(p.numel() for p in owned)
            sent += [pieces * 4, (whole + world * len(owned)) * size]
            got += [whole * 4, (pieces + len(members)) * size]
    assert [name for name, *_ in messages.seen] == ["alltoall_base"] * 4
    expected = sorted((min(pair), max(pair)) for pair in zip(sent, got, strict=True))
    assert sorted((low, high) for _, low, high in messages.seen) == expected


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_only_messages_wait(how):
    """While a message travels, a bucket holds what it sends and what it will get, and no inputs or directions."""
    world, shape, count = 2, (64, 96), 4
    with rank_of(0, world):
        params = [nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for _ in range(count)]
        if how == "sharded":
            mesh = init_device_mesh("cpu", (world,))
            params = [nn.Parameter(DTensor.from_local(p.detach().chunk(world)[0], mesh, [Shard(0)])) for p in params]
        optimizer = SingleBatchMVR(params, gamma=0.5, lr=0.0)  # its LMO's inputs are new tensors
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer._fold_gradients()
        (task,) = optimizer._tasks()
        one, size = math.prod(shape), 2 if has_bfloat16_units(torch.device("cpu")) else 4
        mine = count // world  # matrices that this rank computes, and of each of the others it has a share
        buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
        held = [t.to_local() if isinstance(t, DTensor) else t for t in (*params, *(p.grad for p in params), *buffers)]
        with torch.no_grad(), Census(held) as census:
            before = census.now()
            if how == "sharded":
                assert next(task, "done") is None
                assert census.now() - before == 2 * count * one // world * 4, "the momenta's pieces, sent and received"
                assert next(task, "done") is None
                assert census.now() - before == (mine * one + world * mine + count * one // world + count) * size
            else:
                assert next(task, "done") is None
                assert census.now() - before == (1 + world) * mine * (one + 1) * size
            assert next(task, "done") == "done"
            del task
            assert census.now() == before
