"""Shared by the tests on several ranks: a small model, every optimizer, and a step under DDP and FSDP2."""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, MuonMVR, PreviousBatchMVR, SingleBatchMVR
from tests.helpers.ranks import Ranks

LAYERWISE = {
    "gluon": (Gluon, {}),
    "mvr1": (GluonMVR1, {"gamma": 0.7}),
    "mvr2": (GluonMVR2, {"q": 0.4}),
    "mvr3": (GluonMVR3, {"q": 0.4, "gamma": 0.7}),
    "single_batch": (SingleBatchMVR, {"gamma": 0.2}),
    "previous_batch": (PreviousBatchMVR, {"gamma": 0.3}),
}
MUON = {
    "muon_approximate": (MuonMVR, {"is_approx": True, "gamma": 0.1}),
    "muon_previous_batch": (MuonMVR, {"gamma": 0.1}),
}
VARIANTS = LAYERWISE | MUON
BUFFERS = ("momentum_buffer", "estimate", "exp_avg_sq", "last_grad")
STEPS = 4
ROWS = 24  # of a batch; divisible among up to 4 ranks with two micro-batches each
WIDE = 20_000  # 8 × 20,000 in float64 is 1.22 MiB: more than DDP's first bucket


class OneProcess:
    """This process, without a process group."""

    world = 1

    def run(self, function, *arguments):
        return [function(*arguments)]

    def stop(self) -> None:
        pass


@functools.cache
def started(world: int) -> Ranks | OneProcess:
    return Ranks(world) if world > 1 else OneProcess()


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end():
    """A test file that imports this stops its ranks at its end."""
    yield
    for world in (2, 3, 4):
        started(world).stop()
    started.cache_clear()


class Net(nn.Module):
    """Parameters for many norms, among them transposed shapes, shapes that no number of ranks divides, and one with three
    rows. On request also parameters beyond DDP's first bucket, and a branch that not every batch uses."""

    def __init__(self, wide: bool = False, branch: bool = False):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.gain = nn.Parameter(torch.ones(8))
        self.down = nn.Linear(8, 6, bias=False)
        self.mix = nn.Parameter(torch.ones(3, 8))
        self.skip = nn.Parameter(torch.ones(5, 8))
        self.experts = nn.Parameter(torch.ones(5, 3, 8))  # a stack of matrices
        self.head = nn.Linear(6, 5)
        self.branch = nn.Linear(8, 8, bias=False) if branch else None
        self.wide = nn.ParameterList([torch.ones(WIDE, 8), torch.ones(8, WIDE), torch.ones(WIDE, 8)] if wide else [])
        generator = torch.Generator().manual_seed(1)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.up(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h)) * self.gain
        if self.branch is not None and (x[:, 0] > 10).any():
            used = x[:, 0] > 10
            h = torch.cat([h[~used], h[used] + self.branch(h[used])])
            y = torch.cat([y[~used], y[used]])
        h = h + torch.sin(h @ self.mix.T) @ self.mix
        h = h + torch.einsum("beo,eoi->bi", torch.tanh(torch.einsum("bi,eoi->beo", h, self.experts)), self.experts) / 10
        if len(self.wide):
            there, back, table = self.wide
            h = h + torch.tanh(h @ there.T) @ back.T / 100
            h = h + torch.tanh(h @ table.T) @ table / 100
        return (self.head(torch.tanh(self.down(h))) + torch.tanh(h) @ self.skip.T - y).square().mean()


def groups(net: Net, decay: float) -> list[dict]:
    matrices = [net.up.weight, *(b.weight for b in net.blocks), net.down.weight, net.mix, *net.wide[:2]]
    if net.branch is not None:
        matrices.append(net.branch.weight)
    return [
        {"params": matrices, "norm": "spectral", "weight_decay": decay, "radius": 2.0},
        {"params": [net.head.weight, *net.wide[2:]], "norm": "sign", "weight_decay": decay},
        {"params": [net.skip], "norm": "colnorm"},
        {"params": [net.experts], "norm": "spectral", "view": "stack", "weight_decay": decay},
        {"params": [net.gain], "norm": "rms"},
        {"params": [net.up.bias, net.head.bias], "norm": "adamw", "weight_decay": decay},
    ]


def optimizer_of(variant: str, net: Net, decay: float = 0.1, **options):
    kind, own = VARIANTS[variant]
    params = net.parameters() if kind is MuonMVR else groups(net, decay)
    return kind(params, lr=0.02, momentum=0.8, **({"weight_decay": decay} if kind is MuonMVR else {}), **own, **options)


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + k)
    return torch.randn(ROWS, 6, generator=generator).double(), torch.randn(ROWS, 5, generator=generator).double()


def branching(k: int) -> tuple[Tensor, Tensor]:
    """No rank uses the branch in batches 0 and 2; in the others only the last rank does."""
    x, y = batch(k)
    if k not in (0, 2):
        x[-1, 0] = 11.0
    return x, y


def share(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """This rank's part of a batch."""
    if not dist.is_initialized():
        return list(tensors)
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def weights(net: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).clone() for p in map(Tensor.detach, net.parameters())]


def closure_of(model: nn.Module, k: int, micro: int = 1, make=batch):
    """A usual closure for this rank's part of batch k: zero the gradients, backward, return the loss.

    Gradients are reduced at the last micro-batch.
    """
    pieces = list(zip(*(t.chunk(micro) for t in share(make(k))), strict=True))

    def closure():
        model.zero_grad()
        total = 0.0
        for i, (x, y) in enumerate(pieces):
            last = i == len(pieces) - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            quiet = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if quiet else contextlib.nullcontext():
                loss = model(x, y) / len(pieces)
                loss.backward()
            total += loss.detach()
        return total

    return closure


def take_step(optimizer, model: nn.Module, k: int, micro: int = 1, make=batch):
    """Take one step on batch k. Returns the loss."""
    closure = closure_of(model, k, micro, make)
    if not isinstance(optimizer, MuonMVR):
        return optimizer.step(closure)
    if k > 0 and not optimizer.param_groups[0]["is_approx"]:
        closure_of(model, k - 1, micro, make)()
        optimizer.update_last_grad()
    loss = closure()
    optimizer.step()
    return loss


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def buffer_bytes(optimizer) -> int:
    """Bytes of the momenta and estimates that this rank keeps."""
    return sum(local(s[name]).nbytes for s in optimizer.state.values() for name in BUFFERS if s.get(name) is not None)


def run_ddp(variant, decay=0.1, micro=1, wide=False, branch=False, make=batch, **ddp):
    """Train for a few steps, on several ranks under DDP. Returns the weights after each step and more."""
    net = Net(wide, branch)
    optimizer = optimizer_of(variant, net, decay)
    model, reductions = net, 0

    def count(state, bucket):
        nonlocal reductions
        reductions += bucket.is_last()
        return allreduce_hook(state, bucket)

    if dist.is_initialized():
        model = DistributedDataParallel(net, **ddp)
        model.register_comm_hook(None, count)
    path, counts, losses = [weights(net)], [], []
    for k in range(STEPS):
        reductions = 0
        losses.append(take_step(optimizer, model, k, micro, make))
        path.append(weights(net))
        counts.append(reductions)
        assert all(p.grad is None for p in net.parameters())
    optimizer.flush()
    path.append(weights(net))
    assert optimizer.updates == STEPS
    rebuilt = dist.is_initialized() and bool(model._get_ddp_logging_data().get("has_rebuilt_buckets"))
    return {
        "path": path, "bytes": buffer_bytes(optimizer), "reductions": counts, "losses": losses, "rebuilt": rebuilt,
        "updates": optimizer.updates,
    }  # fmt: skip


def sharded_net(mesh_shape: tuple[int, ...] | None = None, wide: bool = False) -> Net:
    """The net, sharded over the ranks (or over (replicas, shards)); in one process the plain net."""
    net = Net(wide)
    if not dist.is_initialized():
        return net
    mesh_shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for block in net.blocks[:1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def parallel_net(kind: str) -> tuple[Net, nn.Module]:
    """The net and the module to call: under DDP, with FSDP2, or (in one process) the net itself."""
    if kind == "fsdp":
        net = sharded_net()
        return net, net
    net = Net()
    return net, DistributedDataParallel(net) if dist.is_initialized() else net


@functools.cache
def alone(*arguments, **options):
    """The same run in this process."""
    return run_ddp(*arguments, **options)


def assert_same(answers: list[dict], expected: dict) -> None:
    """Every rank's weights equal the first rank's bit for bit, and those of one process up to rounding."""
    for answer in answers:
        assert len(answer["path"]) == len(expected["path"])
        for step, (mine, first, right) in enumerate(zip(answer["path"], answers[0]["path"], expected["path"], strict=True)):
            for a, b, c in zip(mine, first, right, strict=True):
                assert torch.equal(a, b), f"the ranks differ after {step} steps"
                assert (a - c).norm() <= 1e-9 * c.norm(), f"not the weights of one process after {step} steps"
