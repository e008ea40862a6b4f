"""Several ranks against one process: the same weights, bit for bit the same on every rank, and nobody waits forever."""

import contextlib
import copy
import functools
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, gluon
from optim.sharding import local

VARIANTS = {
    "gluon": (Gluon, {}),
    "mvr1": (GluonMVR1, {"gamma": 0.2}),
    "mvr2": (GluonMVR2, {"gamma": 0.3}),
    "nested": (GluonMVR2, {"inner": 0.4}),
    "mvr3": (GluonMVR3, {"gamma": 0.3}),
}
STEPS = 4


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return started(request.param)


class OneProcess:
    """This process, without a process group."""

    def run(self, function, *arguments):
        return [function(*arguments)]

    def stop(self) -> None:
        pass


@functools.cache
def started(world: int) -> Ranks | OneProcess:
    return Ranks(world) if world > 1 else OneProcess()


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end():
    yield
    for world in (2, 4):
        started(world).stop()
    started.cache_clear()


class Net(nn.Module):
    """Many norms; shapes that are transposed to each other, that no number of ranks divides, that have three rows; and a
    branch that not every batch uses."""

    def __init__(self, branch: bool = False):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.gain = nn.Parameter(torch.ones(8))
        self.down = nn.Linear(8, 6, bias=False)
        self.mix = nn.Parameter(torch.ones(3, 8))
        self.skip = nn.Parameter(torch.ones(5, 8))
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
        h = h + torch.sin(h @ self.mix.T) @ self.mix
        return (self.head(torch.tanh(self.down(h))) + torch.tanh(h) @ self.skip.T - y).square().mean()


def groups(net: Net, decay: float) -> list[dict]:
    matrices = [net.up.weight, *(b.weight for b in net.blocks), net.down.weight, net.mix]
    if net.branch is not None:
        matrices.append(net.branch.weight)
    return [
        {"params": matrices, "norm": "spectral", "weight_decay": decay, "radius": 2.0},
        {"params": [net.head.weight], "norm": "sign", "weight_decay": decay},
        {"params": [net.skip], "norm": "colnorm"},
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
    return [(p.full_tensor() if isinstance(p, DTensor) else p).clone() for p in map(Tensor.detach, net.parameters())]


def passes(net: nn.Module, k: int, micro: int = 1, make=batch):
    """(closure, previous) over this rank's part of batch k; only the closure's last backward reduces."""
    pieces = list(zip(*(t.chunk(micro) for t in share(make(k))), strict=True))

    def evaluate(reduces: bool):
        total = 0.0
        for i, (x, y) in enumerate(pieces):
            quiet = isinstance(net, DistributedDataParallel) and not (reduces and i == micro - 1)
            if isinstance(net, FSDPModule):
                net.set_requires_gradient_sync(i == micro - 1)
            with net.no_sync() if quiet else contextlib.nullcontext():
                loss = net(x, y) / micro
                loss.backward()
            total += loss.detach()
        return total

    return lambda: evaluate(True), lambda: evaluate(False)


def momentum_bytes(optimizer: Gluon) -> int:
    buffers = [b for state in optimizer.state.values() for b in state.values() if isinstance(b, Tensor)]
    return sum(local(b).nbytes for b in buffers)


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


@pytest.mark.parametrize("micro, views", [(1, False), (2, False), (2, True)])
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


# Gradients that the user reduces, and that are None somewhere


def run_with_none(variant, decay):
    """Gradients by hand; on each rank others of them are None."""
    net = Net()
    optimizer = optimizer_of(variant, net, decay)
    me, params = dist.get_rank(), list(net.parameters())
    path = [weights(net)]
    for k in range(STEPS):

        def closure(k=k):
            for i, (p, g) in enumerate(zip(params, torch.autograd.grad(net(*batch(k)), params), strict=True)):
                if (i + me + k) % 3:
                    p.grad = g if p.grad is None else p.grad.add_(g)

        optimizer.step(closure)
        path.append(weights(net))
    optimizer.flush()
    path.append(weights(net))
    owners = [optimizer._owners[p] for p in params]
    return {"path": path, "owners": owners}


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_none_on_one_rank(ranks, variant, decay):
    answers = ranks.run(run_with_none, variant, decay)
    for answer in answers:
        for mine, first in zip(answer["path"], answers[0]["path"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
    if variant in ("gluon", "mvr1"):  # what its owner sees decides whether a parameter moves
        for k, (before, after) in enumerate(zip(answers[0]["path"], answers[0]["path"][1:], strict=False)):
            for i, (a, b, owner) in enumerate(zip(before, after, answers[0]["owners"], strict=True)):
                if k < STEPS:
                    assert torch.equal(a, b) == ((i + owner + k) % 3 == 0), f"parameter {i} in step {k}"


def different_parameters(extra: int):
    net = Net()
    params = list(net.blocks.parameters())
    optimizer = Gluon(params[: 4 + (dist.get_rank() == 1) * extra], lr=0.1)
    net(*batch(0)).backward()
    with pytest.raises(RuntimeError, match="hold different parameters"):
        optimizer.step()


@pytest.mark.parametrize("extra", [1, -1])
def test_ranks_with_different_parameters_are_told(ranks, extra):
    ranks.run(different_parameters, extra)


def in_subgroups():
    """Two models, each on half of the ranks."""
    me, half = dist.get_rank(), dist.get_world_size() // 2
    halves = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    net = Net()
    if me >= half:  # another model, another group
        net.extra = nn.Parameter(torch.ones(3, 3).double())
    optimizer = optimizer_of("gluon", net, process_group=halves[me >= half])
    if me >= half:
        optimizer.add_param_group({"params": [net.extra]})
    for k in range(STEPS):
        (net(*batch(k)) + (net.extra.square().sum() if me >= half else 0)).backward()
        optimizer.step()
    return {"path": [weights(net)], "bytes": momentum_bytes(optimizer)}


def test_process_group():
    answers = started(4).run(in_subgroups)
    net = Net()
    optimizer = optimizer_of("gluon", net)
    for k in range(STEPS):
        net(*batch(k)).backward()
        optimizer.step()
    assert_same(answers[:2], {"path": [weights(net)]})
    assert sum(a["bytes"] for a in answers[:2]) == momentum_bytes(optimizer)
    assert sum(a["bytes"] for a in answers[2:]) == momentum_bytes(optimizer) + 9 * 8
    assert all(torch.equal(a, b) for a, b in zip(answers[2]["path"][0], answers[3]["path"][0], strict=True))


# State: whole, one rank's share, and torch.distributed.checkpoint


def train(net: Net, optimizer: Gluon, steps: range, sharded: bool = False) -> dict:
    """Train on (with DDP on ranks); the weights after every step, and after the last update."""
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    path = []
    for k in steps:
        closure, previous = passes(model, k)
        optimizer.step(closure, previous if isinstance(optimizer, GluonMVR2) else None)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "updates": optimizer.updates}


def whole_run(variant, first: int, last: int) -> dict:
    net = Net()
    return train(net, optimizer_of(variant, net), range(first, last))


def stop(variant, steps: int, whole: bool):
    """Train some steps; the weights and a state_dict of the optimizer."""
    net = Net()
    optimizer = optimizer_of(variant, net)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    for k in range(steps):
        optimizer.step(passes(model, k)[0])
    return net.state_dict(), optimizer.full_state_dict() if whole else optimizer.state_dict()


def go_on(variant, steps: int, saved: tuple) -> dict:
    net = Net()
    optimizer = optimizer_of(variant, net, decay=0.7)  # what is loaded has another
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return train(net, optimizer, range(steps, STEPS)) | {"bytes": momentum_bytes(optimizer)}


@functools.cache
def tail(variant, steps: int) -> dict:
    expected = whole_run(variant, 0, STEPS)
    return {"path": expected["path"][steps:]}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_full_state_dict_goes_anywhere(variant, steps):
    saved = started(2).run(stop, variant, steps, True)
    assert_same([go_on(variant, steps, saved[1])], tail(variant, steps))
    answers = started(4).run(go_on, variant, steps, saved[0])
    assert_same(answers, tail(variant, steps))
    assert sum(a["bytes"] for a in answers) == go_on(variant, steps, saved[0])["bytes"]
    alone_saved = stop(variant, steps, True)
    assert_same(started(2).run(go_on, variant, steps, alone_saved), tail(variant, steps))


def is_refused(variant, saved) -> bool:
    try:
        optimizer_of(variant, Net()).load_state_dict(saved[1])
    except ValueError as error:
        assert "momentum_buffer" in str(error) and "full_state_dict" in str(error)
        return True
    return False


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_ranks_share_is_refused(variant):
    for saved in started(2).run(stop, variant, 2, False):
        assert is_refused(variant, saved)
        assert any(started(4).run(is_refused, variant, saved))
    assert not is_refused(variant, started(2).run(stop, variant, 2, True)[0])


def parallel_net(kind: str) -> tuple[Net, nn.Module]:
    """The net, and what is called: under DDP, FSDP2, or (one process) the net itself."""
    if kind == "fsdp":
        net = sharded_net()
        return net, net
    net = Net()
    return net, DistributedDataParallel(net) if dist.is_initialized() else net


def save(kind: str, variant, steps: int, folder: str) -> None:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net)
    for k in range(steps):
        optimizer.step(passes(model, k)[0])
    weights_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights_state, "optim": state}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(kind: str, variant, steps: int, folder: str) -> dict:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net, decay=0.7)
    weights_state, state = get_state_dict(model, optimizer)
    state = {"model": weights_state, "optim": state}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    path = []
    for k in range(steps, STEPS):
        optimizer.step(passes(model, k)[0])
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "updates": optimizer.updates, "bytes": momentum_bytes(optimizer)}


@pytest.mark.parametrize("steps, saver, loaders", [(0, 2, (4,)), (1, 4, (1, 2)), (3, 2, (1, 2, 4)), (3, 1, (2,))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_distributed_checkpoint_goes_anywhere(variant, steps, saver, loaders, tmp_path):
    # Those of FSDP2 cost a second each.
    for kind in ("ddp", "fsdp") if saver == 4 or (steps, variant) == (0, "mvr2") else ("ddp",):
        folder = str(tmp_path / kind)
        started(saver).run(save, kind, variant, steps, folder)
        for loader in loaders:
            answers = started(loader).run(load, kind, variant, steps, folder)
            assert_same(answers, tail(variant, steps))
            assert {a["updates"] for a in answers} == {STEPS}
            assert sum(a["bytes"] for a in answers) == alone(variant)["bytes"]


def test_a_checkpoint_of_ddp_loads_under_fsdp_and_back(tmp_path):
    for kinds in (("ddp", "fsdp"), ("fsdp", "ddp")):
        folder = str(tmp_path / kinds[0])
        started(4).run(save, kinds[0], "mvr2", 2, folder)
        assert_same(started(2).run(load, kinds[1], "mvr2", 2, folder), tail("mvr2", 2))


# FSDP2


def sharded_net(mesh_shape: tuple[int, ...] | None = None) -> Net:
    """The net, sharded over the ranks (or (replicas, shards)); the same net where there is one process."""
    net = Net()
    if not dist.is_initialized():
        return net
    mesh_shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for block in net.blocks[:1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def run_fsdp(variant, micro=1, mesh_shape=None, options=None) -> dict:
    net = sharded_net(mesh_shape)
    optimizer = optimizer_of(variant, net, **(options or {}))
    path = [weights(net)]
    for k in range(STEPS):
        optimizer.step(passes(net, k, micro)[0])
        path.append(weights(net))
    optimizer.flush()
    for p, state in optimizer.state.items():
        for buffer in filter(lambda b: isinstance(b, Tensor), state.values()):
            assert (buffer.placements, buffer.shape, buffer.device_mesh) == (p.placements, p.shape, p.device_mesh)
            assert local(buffer).shape == local(p).shape
    return {"path": [*path, weights(net)], "bytes": momentum_bytes(optimizer)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp(ranks, variant):
    answers = ranks.run(run_fsdp, variant, 1 if ranks.world == 2 else 2)  # micro-batches
    assert_same(answers, alone(variant))
    assert sum(a["bytes"] for a in answers) == alone(variant)["bytes"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hybrid_sharding(variant):
    answers = started(4).run(run_fsdp, variant, 1, (2, 2))
    assert_same(answers, alone(variant))
    assert sum(a["bytes"] for a in answers) == 2 * alone(variant)["bytes"]


SHAPES_BY_HAND = [(6, 8), (8, 6), (6, 8), (5, 4, 3), (2, 9), (7,)]


def by_hand(variant, norm: str, dim: int) -> dict:
    """DTensors that no FSDP2 made, split along any dimension; gradients arrive in other placements, or not at all."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES_BY_HAND]
    params = [nn.Parameter(w.clone()) for w in whole]
    mesh = None
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        split = [Replicate() if w.ndim <= dim else Shard(dim) for w in whole]
        params = [nn.Parameter(distribute_tensor(w, mesh, [s])) for w, s in zip(whole, split, strict=True)]
    kind, own = VARIANTS[variant]
    optimizer = kind(params, lr=0.05, weight_decay=0.5, norm=norm, **own)
    path = [weights(nn.ParameterList(params))]
    for k in range(STEPS):

        def closure(k=k):
            generator = torch.Generator().manual_seed(k)
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                if (i + k) % 4 == 3:
                    continue
                if mesh is not None:
                    g = distribute_tensor(g, mesh, p.placements if i % 2 or isinstance(optimizer, GluonMVR2) else [Replicate()])
                p.grad = g if p.grad is None else p.grad.add_(g)

        optimizer.step(closure)
        path.append(weights(nn.ParameterList(params)))
    optimizer.flush()
    return {"path": [*path, weights(nn.ParameterList(params))]}


@pytest.mark.parametrize("norm, dim", [("auto", 0), ("auto", 1), ("frobenius", 1), ("sign", 1)])
def test_dtensors_split_along_any_dimension(ranks, norm, dim):
    for variant in VARIANTS:
        assert_same(ranks.run(by_hand, variant, norm, dim), by_hand(variant, norm, dim))


def two_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    w = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match="sharded along one mesh dimension at most"):
        Gluon([w], lr=0.1)
    optimizer = Gluon([w], lr=0.1, norm="sign")  # entry by entry
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert torch.equal(w.detach().full_tensor(), torch.full((4, 4), 1 - 0.1 / 4))


def test_parameters_split_twice_are_refused():
    started(4).run(two_dimensions)


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        assert function.__name__.split(".")[0] not in waits, function
        return function(*arguments, **(options or {}))


def step_without_reading(kind: str, variant) -> None:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net)
    for k in range(3):
        passes_ = passes(model, k)
        optimizer.step(*passes_[:1])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with NoReading():  # the parts of a step; passes are the user's
        optimizer._fold_gradients()
        optimizer._apply_update()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        torch.ones(1).item()  # it would be seen


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_step_never_waits_for_the_device(kind):
    for variant in VARIANTS:
        started(2).run(step_without_reading, kind, variant)
        step_without_reading(kind, variant)


def unreduced(variant, steps: int, which: str) -> None:
    """A step, one pass of which keeps its gradients to itself."""
    net = sharded_net()
    optimizer = optimizer_of(variant, net)
    for k in range(steps):
        optimizer.step(passes(net, k)[0])
    reduced, _ = passes(net, steps)

    def quiet():
        net.set_requires_gradient_sync(False)
        loss = net(*share(batch(steps)))
        loss.backward()
        return loss

    closure, previous = (reduced, quiet) if which == "previous" else (quiet, quiet if which == "both" else reduced)
    with pytest.raises(RuntimeError, match="set_requires_gradient_sync"):
        optimizer.step(closure, previous)


@pytest.mark.parametrize("which", ["previous", "closure", "both"])
@pytest.mark.parametrize("variant", ["mvr2", "nested", "mvr3"])
def test_fsdp_refuses_a_pass_that_does_not_reduce(ranks, variant, which):
    ranks.run(unreduced, variant, 2, which)
    if variant == "mvr3" or which != "previous":  # which MVR-2 does not call in its first step
        ranks.run(unreduced, variant, 0, which)


def peak_of_a_step(variant, bucket: int) -> tuple[int, int, int]:
    """Bytes of the momentum that this rank keeps, of the whole model's, and the most that a step holds beside it."""
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(32))).double()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = VARIANTS[variant][0](net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with (
        mock.patch.object(gluon, "BUCKET_ELEMENTS", bucket),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return momentum_bytes(optimizer), sum(p.numel() * 8 for p in net.parameters()), max(held)


@pytest.mark.parametrize("variant", ["gluon", "mvr1"])
def test_no_rank_ever_holds_the_whole_momentum(variant):
    for own, whole, peak in started(4).run(peak_of_a_step, variant, 4 * 32 * 32):
        assert own == whole / 4
        assert own + peak < 0.75 * whole
    assert all(own + peak > whole for own, whole, peak in started(4).run(peak_of_a_step, variant, 2**25))  # it counts


# overlap=True: the update travels while the pass at the previous weights runs


@pytest.mark.parametrize("variant", ["mvr2", "nested"])
def test_overlap_changes_no_bit(ranks, variant):
    for run in (run_ddp, run_fsdp) if variant == "mvr2" else (run_ddp,):
        plain = ranks.run(run, variant)
        for a, b in zip(plain, ranks.run(functools.partial(run, variant, options={"overlap": True})), strict=True):
            for before, after in zip(a["path"], b["path"], strict=True):
                assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert_same(plain, alone(variant))
    assert_same([run_ddp(variant, options={"overlap": True})], alone(variant))


class TracedWork:
    def __init__(self, work, log: list[str]):
        self._work, self._log = work, log

    def wait(self) -> None:
        self._log.append("waited")
        self._work.wait()


def trace_of_a_step(kind: str, variant, overlap: bool) -> list[str]:
    """What a step does, in order: messages of the optimizer sent and waited for, and its passes."""
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net, overlap=overlap)
    closure, previous = passes(model, 0)
    optimizer.step(closure)
    log: list[str] = []

    def logged(name, function):
        def call(*arguments, **options):
            log.append(name)
            result = function(*arguments, **options)
            return result if result is None or name != "sent" else TracedWork(result, log)

        return call

    with (
        mock.patch.object(dist, "broadcast", logged("sent", dist.broadcast)),
        mock.patch.object(dist, "all_to_all_single", logged("sent", dist.all_to_all_single)),
    ):
        optimizer.step(logged("closure", closure), logged("previous", closure if kind == "fsdp" else previous))
    return log


@pytest.mark.parametrize("variant", ["mvr2", "nested"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_overlap_sends_before_the_pass_and_waits_after_it(ranks, kind, variant):
    for log in ranks.run(trace_of_a_step, kind, variant, True):
        before, after = log[: log.index("previous")], log[log.index("previous") + 1 :]
        sent, gathered = before.count("sent"), before.count("waited")
        assert sent >= 4 and gathered == (sent // 2 if kind == "fsdp" else 0)  # momenta come first, where they are sharded
        assert after == ["waited"] * (sent - gathered) + ["closure"]
    for log in ranks.run(trace_of_a_step, kind, variant, False):
        assert log[0] == "previous" and log[-1] == "closure" and log.count("sent") == sent == log.count("waited")
        if kind == "ddp":  # and while one bucket travels, the next is computed
            assert log.index("waited") < len(log) - 1 - log[::-1].index("sent")


class Interrupted(Exception):
    pass


def run_interrupted(variant, overlap: bool, where: str, load: bool = False) -> dict:
    """In step 2 a pass fails, after its backward on odd ranks; the step is then repeated (after loading what was saved)."""
    net, model = parallel_net("ddp")
    optimizer = optimizer_of(variant, net, overlap=overlap)
    path = [weights(net)]
    for k in range(STEPS):
        closure, previous = passes(model, k)
        if k == 2:
            saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())

            def failing(previous=previous):
                previous()
                raise Interrupted

            with pytest.raises(Interrupted):
                optimizer.step(*((failing, previous) if where == "closure" else (closure, failing)))
            optimizer.zero_grad()
            if load:
                optimizer.load_state_dict(saved[0])
                net.load_state_dict(saved[1])
        optimizer.step(closure, previous)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "updates": optimizer.updates}


@pytest.mark.parametrize("variant", ["mvr2", "nested"])
def test_a_pass_may_fail(ranks, variant):
    for runner in (ranks, OneProcess()) if variant == "mvr2" else (OneProcess(),):
        for overlap in (False, True):
            assert_same(runner.run(run_interrupted, variant, overlap, "previous"), alone(variant))
            for where in ("previous", "closure"):
                assert_same(runner.run(run_interrupted, variant, overlap, where, True), alone(variant))
        plain, overlapped = (runner.run(run_interrupted, variant, overlap, "closure") for overlap in (False, True))
        assert_same(overlapped, plain[0])  # the update was applied: the step that follows corrects nothing
        assert {a["updates"] for a in overlapped} == {STEPS}


# correction_fraction


def fraction_passes(net: nn.Module, k: int, world: int, quiet: bool):
    """(closure, previous, rest) of the variants' step with the first two of four micro-batches of each rank shared."""
    if dist.is_initialized():
        pieces = list(zip(*(t.chunk(4) for t in share(batch(k))), strict=True))
    else:  # the same micro-batches as the ranks have together
        together = [t.reshape(world, 4, 4 // world, -1).transpose(0, 1).reshape(4, 4, -1) for t in batch(k)]
        pieces = list(zip(*together, strict=True))

    def evaluate(pieces, reduces: bool):
        total = 0.0
        for i, (x, y) in enumerate(pieces):
            last = reduces and i == len(pieces) - 1
            if isinstance(net, FSDPModule):
                net.set_requires_gradient_sync(last)
            with net.no_sync() if isinstance(net, DistributedDataParallel) and not last else contextlib.nullcontext():
                loss = net(x, y) / 4
                loss.backward()
            total += loss.detach()
        return total

    return (
        lambda: evaluate(pieces[:2], not quiet),
        lambda reduces=not quiet: evaluate(pieces[:2], reduces),
        lambda: evaluate(pieces[2:], True),
    )


def run_fraction(kind: str, variant, world: int, quiet: bool, **ddp) -> dict:
    if kind == "fsdp":
        net = model = sharded_net()
    else:
        net = Net()
        model = DistributedDataParallel(net, **ddp) if dist.is_initialized() else net
    optimizer = optimizer_of(variant, net, correction_fraction=0.5)
    path, losses = [weights(net)], []
    for k in range(STEPS):
        closure, previous, rest = fraction_passes(model, k, world, quiet)
        again = functools.partial(previous, True) if variant == "mvr3" else previous
        losses.append(optimizer.step(closure, again, rest))
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "losses": losses}


@pytest.mark.parametrize("kind, quiet, ddp", [
    ("ddp", True, {"gradient_as_bucket_view": True}), ("ddp", True, {}), ("ddp", False, {}),
    ("ddp", False, {"gradient_as_bucket_view": True}), ("fsdp", False, {}),
])  # fmt: skip
@pytest.mark.parametrize("variant", ["mvr2", "nested", "mvr3"])
def test_correction_fraction(ranks, variant, kind, quiet, ddp):
    expected = run_fraction(kind, variant, ranks.world, quiet)
    answers = ranks.run(functools.partial(run_fraction, kind, variant, ranks.world, quiet, **ddp))
    assert_same(answers, expected)
    mean = [torch.stack(losses).mean() for losses in zip(*(a["losses"] for a in answers), strict=True)]
    torch.testing.assert_close(torch.stack(mean), torch.stack(expected["losses"]), rtol=1e-9, atol=0)
