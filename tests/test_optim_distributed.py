"""Several ranks against one process: the same weights, bit for bit the same on every rank, and nobody waits forever."""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3

VARIANTS = {
    "gluon": (Gluon, {}),
    "mvr1": (GluonMVR1, {"gamma": 0.2}),
    "mvr2": (GluonMVR2, {"gamma": 0.3}),
    "nested": (GluonMVR2, {"inner": 0.4}),
    "mvr3": (GluonMVR3, {"gamma": 0.3}),
}
STEPS = 5


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return started(request.param)


@functools.cache
def started(world: int) -> Ranks:
    return Ranks(world)


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end():
    yield
    for world in (2, 4):
        started(world).stop()
    started.cache_clear()


class Net(nn.Module):
    """Every norm, shapes that are transposed to each other, and a branch that not every batch uses."""

    def __init__(self, branch: bool = False):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.gain = nn.Parameter(torch.ones(8))
        self.down = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 5)
        self.branch = nn.Linear(8, 8, bias=False) if branch else None
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
        return (self.head(torch.tanh(self.down(h))) - y).square().mean()


def groups(net: Net, decay: float) -> list[dict]:
    matrices = [net.up.weight, *(b.weight for b in net.blocks), net.down.weight]
    if net.branch is not None:
        matrices.append(net.branch.weight)
    return [
        {"params": matrices, "norm": "spectral", "weight_decay": decay, "radius": 2.0},
        {"params": [net.head.weight], "norm": "sign", "weight_decay": decay},
        {"params": [net.gain], "norm": "rms"},
        {"params": [net.up.bias, net.head.bias], "norm": "adamw", "weight_decay": decay},
    ]


def optimizer_of(variant: str, net: Net, decay: float = 0.1, **options) -> Gluon:
    kind, own = VARIANTS[variant]
    return kind(groups(net, decay), lr=0.02, momentum=0.8, **own, **options)


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + k)
    return torch.randn(16, 6, generator=generator).double(), torch.randn(16, 5, generator=generator).double()


def share(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """This rank's part of a batch."""
    if not dist.is_initialized():
        return list(tensors)
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def passes(net: nn.Module, k: int, micro: int = 1, make=batch):
    """(closure, previous) over this rank's part of batch k; only the closure's last backward reduces."""
    pieces = list(zip(*(t.chunk(micro) for t in share(make(k))), strict=True))

    def evaluate(reduces: bool):
        total = 0.0
        for i, (x, y) in enumerate(pieces):
            quiet = isinstance(net, DistributedDataParallel) and not (reduces and i == micro - 1)
            with net.no_sync() if quiet else contextlib.nullcontext():
                loss = net(x, y) / micro
                loss.backward()
            total += loss.detach()
        return total

    return lambda: evaluate(True), lambda: evaluate(False)


def momentum_bytes(optimizer: Gluon) -> int:
    return sum(b.nbytes for state in optimizer.state.values() for b in state.values() if isinstance(b, Tensor))


def run_ddp(variant, decay=0.1, micro=1, quiet=True, branch=False, make=batch, options=None, **ddp):
    """Train for a few steps; on ranks with DDP. All weights on the way, the momentum's bytes, reductions per step."""
    net = Net(branch)
    optimizer = optimizer_of(variant, net, decay, **(options or {}))
    model, reductions = net, 0

    def count(state, bucket):
        nonlocal reductions
        reductions += 1
        return allreduce_hook(state, bucket)

    if dist.is_initialized():
        model = DistributedDataParallel(net, **ddp)
        model.register_comm_hook(None, count)
    path, counts, losses = [weights(net)], [], []
    for k in range(STEPS):
        reductions = 0
        closure, previous = passes(model, k, micro, make)
        quietly = quiet and isinstance(optimizer, GluonMVR2)
        losses.append(optimizer.step(closure, previous if quietly else None))
        path.append(weights(net))
        counts.append(reductions)
    optimizer.flush()
    path.append(weights(net))
    assert optimizer.updates == STEPS
    return {"path": path, "bytes": momentum_bytes(optimizer), "reductions": counts, "losses": losses}


@functools.cache
def alone(*arguments, **options):
    return run_ddp(*arguments, **options)


def assert_same(answers: list[dict], expected: dict) -> None:
    for answer in answers:
        assert len(answer["path"]) == len(expected["path"])
        for step, (mine, first, right) in enumerate(zip(answer["path"], answers[0]["path"], expected["path"], strict=True)):
            for a, b, c in zip(mine, first, right, strict=True):
                assert torch.equal(a, b), f"the ranks differ after {step} steps"
                assert (a - c).norm() <= 1e-9 * c.norm(), f"not the one process's weights after {step} steps"


# DDP


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp(ranks, variant, micro, views):
    answers = ranks.run(functools.partial(run_ddp, variant, micro=micro, gradient_as_bucket_view=views))
    assert_same(answers, alone(variant))
    per_step = [2] * STEPS if variant == "mvr3" else [1] * STEPS
    assert all(a["reductions"] == per_step for a in answers), "MVR-2 reduces once a step, MVR-3 in both passes"
    assert sum(a["bytes"] for a in answers) == alone(variant)["bytes"], "each matrix's momentum has one owner"
    assert max(a["bytes"] for a in answers) < 0.8 * alone(variant)["bytes"]
    mean = [torch.stack(losses).mean() for losses in zip(*(a["losses"] for a in answers), strict=True)]
    torch.testing.assert_close(torch.stack(mean), torch.stack(alone(variant)["losses"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("variant", ["mvr2", "nested"])
def test_ddp_may_reduce_both_passes(ranks, variant, views):
    answers = ranks.run(functools.partial(run_ddp, variant, quiet=False, micro=2, gradient_as_bucket_view=views))
    assert_same(answers, alone(variant))
    assert all(a["reductions"] == [1, *[2] * (STEPS - 1)] for a in answers)


def branching(k: int) -> tuple[Tensor, Tensor]:
    """Nobody uses the branch in batch 0 and 2, in the others the last rank alone."""
    x, y = batch(k)
    if k not in (0, 2):
        x[-1, 0] = 11.0
    return x, y


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_with_unused_parameters(ranks, variant, decay):
    run = functools.partial(run_ddp, variant, decay, branch=True, make=branching)
    answers = ranks.run(functools.partial(run, find_unused_parameters=True))
    assert_same(answers, run())
    moved = [not torch.equal(a[-1], b[-1]) for a, b in zip(answers[0]["path"], answers[0]["path"][1:], strict=False)]
    assert not moved[0] and any(moved), "the branch stays while nobody uses it"
