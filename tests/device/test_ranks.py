"""DDP and FSDP2 on the device, against one process.

NCCL joins the cards, one rank on each. One card is shared by two gloo ranks for DDP, and has one NCCL rank for FSDP2. Without
a card two gloo ranks run on the CPU.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model import GPTConfig
from tests.helpers.device import BATCH, CARDS, CUDA, DEVICE, RANKS, distance, filled, gradients, groups, limit, tokens
from tests.helpers.optimizers import CLASSES, OPTIONS, variants
from tests.helpers.ranks import Ranks

pytestmark = [limit, pytest.mark.slow]

CONFIG = GPTConfig(8192, 2, 2, 32, 32)  # the embedding has 2 MiB in float64, more than DDP's first bucket
KINDS = {"ddp": (max(2, RANKS), "nccl" if CARDS > 1 else "gloo"), "fsdp": (RANKS, "nccl" if CUDA else "gloo")}


@functools.cache
def ranks(world: int, backend: str) -> Ranks:
    return Ranks(world, timeout=300 if CUDA else 150, backend=backend, start="spawn")


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end():
    yield
    for world, backend in set(KINDS.values()):
        ranks(world, backend).stop()


def walk(variant: str, kind: str = "alone") -> list[Tensor]:
    """The weights after three steps and a flush, in float64."""
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else DEVICE
    net = filled(CONFIG, device, torch.float64)
    model, share = net, slice(None)
    if kind != "alone":
        rank, world = dist.get_rank(), dist.get_world_size()
        share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    if kind == "ddp":
        model = DistributedDataParallel(net)
    elif kind == "fsdp":
        mesh = init_device_mesh(device.type, (world,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = CLASSES[variant](groups(net), lr=0.02, momentum=0.8, weight_decay=0.1, **OPTIONS[variant])
    for k in range(3):
        batch = tokens(CONFIG, BATCH, k, device)[share]
        optimizer.step(lambda batch=batch: gradients(model, batch))
    optimizer.flush()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in map(Tensor.detach, net.parameters())]
    return [p.cpu() for p in whole]


@functools.cache
def alone(variant: str) -> list[Tensor]:
    return walk(variant)


@pytest.mark.parametrize("kind", KINDS)
@variants
def test_all_ranks_together_take_the_steps_of_one(variant, kind):
    answers = ranks(*KINDS[kind]).run(walk, variant, kind)
    right = alone(variant)
    for answer in answers:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[0], strict=True)), "the ranks differ"
        assert max(map(distance, answer, right)) <= 1e-9
