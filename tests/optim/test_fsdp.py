"""With FSDP2 and other DTensors: the weights of one process, for any sharding."""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from optim import Gluon, buckets
from tests.helpers.parallel import (
    LAYERWISE,
    STEPS,
    alone,
    assert_same,
    batch,
    buffer_bytes,
    closure_of,
    local,
    optimizer_of,
    sharded_net,
    share,
    started,
    stopped_at_the_end,  # noqa: F401
    take_step,
    weights,
)

pytestmark = pytest.mark.slow


def run_fsdp(variant, micro=1, mesh_shape=None, wide=False) -> dict:
    net = sharded_net(mesh_shape, wide)
    optimizer = optimizer_of(variant, net)
    path = [weights(net)]
    for k in range(STEPS):
        take_step(optimizer, net, k, micro)
        path.append(weights(net))
    optimizer.flush()
    for p, state in optimizer.state.items():
        for buffer in filter(lambda b: isinstance(b, Tensor) and b.ndim > 0, state.values()):
            assert (buffer.placements, buffer.shape, buffer.device_mesh) == (p.placements, p.shape, p.device_mesh)
            assert local(buffer).shape == local(p).shape
    return {"path": [*path, weights(net)], "bytes": buffer_bytes(optimizer)}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("variant", LAYERWISE)
def test_fsdp(world, variant):
    """On 3 and 4 ranks shards are uneven, and some are empty."""
    answers = started(world).run(run_fsdp, variant, 1 if world == 2 else 2, None, world == 2)
    expected = alone(variant, wide=world == 2)
    assert_same(answers, expected)
    assert sum(a["bytes"] for a in answers) == expected["bytes"]


@pytest.mark.parametrize("variant", LAYERWISE)
def test_hybrid_sharding(variant):
    answers = started(4).run(run_fsdp, variant, 1, (2, 2))
    assert_same(answers, alone(variant))
    assert sum(a["bytes"] for a in answers) == 2 * alone(variant)["bytes"]


SHAPES_BY_HAND = [(6, 8), (8, 6), (6, 8), (5, 4, 3), (2, 9), (7,)]


def by_hand(variant, norm: str, dim: int, view: str) -> dict:
    """DTensors made without FSDP2, split along any dimension. Some gradients have other placements, some are missing."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES_BY_HAND]
    params = [nn.Parameter(w.clone()) for w in whole]
    mesh = None
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        split = [Replicate() if w.ndim <= dim else Shard(dim) for w in whole]
        params = [nn.Parameter(distribute_tensor(w, mesh, [s])) for w, s in zip(whole, split, strict=True)]
    kind, own = LAYERWISE[variant]
    optimizer = kind(params, lr=0.05, weight_decay=0.5, norm=norm, view=view, **own)
    path = [weights(nn.ParameterList(params))]
    for k in range(STEPS):
        calls = 0

        def closure(k=k):
            nonlocal calls
            calls += 1  # each pass has different gradients
            generator = torch.Generator().manual_seed(10 * k + calls)
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.grad = None
                if (i + k) % 4 == 3 or (i + k + calls) % 5 == 4:  # in both passes, or in one
                    continue
                if mesh is not None:
                    g = distribute_tensor(g, mesh, p.placements if i % 2 else [Replicate()])
                p.grad = g

        optimizer.step(closure)
        path.append(weights(nn.ParameterList(params)))
    optimizer.flush()
    return {"path": [*path, weights(nn.ParameterList(params))]}


SPLITS = [
    ("auto", 0, "convolution"), ("auto", 1, "convolution"), ("auto", 0, "stack"), ("auto", 2, "stack"),
    ("frobenius", 1, "stack"), ("sign", 1, "convolution"), ("adamw", 0, None),
]  # fmt: skip


@pytest.mark.parametrize("norm, dim, view", SPLITS)
@pytest.mark.parametrize("world", [2, 4])
def test_dtensors_split_along_any_dimension(world, norm, dim, view):
    """A stack of matrices that is split between its matrices needs no message."""
    for variant in LAYERWISE:
        assert_same(started(world).run(by_hand, variant, norm, dim, view), by_hand(variant, norm, dim, view))


NEVER = (2, 4)  # skip, and up.weight, which decays while it moves


def with_none_on_one_rank(variant) -> dict:
    """FSDP2's parameters. Each rank removes the gradients of other parameters."""
    net = sharded_net()
    optimizer = optimizer_of(variant, net)
    path = [weights(net)]
    for k in range(STEPS):

        def closure(k=k):
            loss = closure_of(net, k)()
            for i, p in enumerate(net.parameters()):
                if (i + k + dist.get_rank()) % 4 == 0 or i in NEVER:
                    p.grad = None
            return loss

        optimizer.step(closure)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)]}


@pytest.mark.parametrize("variant", LAYERWISE)
def test_none_on_one_rank(variant):
    answers = started(2).run(with_none_on_one_rank, variant)
    assert all(
        torch.equal(a, b) for steps in zip(*(a["path"] for a in answers), strict=True) for a, b in zip(*steps, strict=True)
    )
    for i, (a, b) in enumerate(zip(answers[0]["path"][0], answers[0]["path"][-1], strict=True)):
        assert torch.equal(a, b) == (i in NEVER), "only parameters that ever have a gradient move"


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


def unreduced(variant, steps: int, which: set[int]) -> None:
    """A step in which the passes `which` do not reduce their gradients."""
    net = sharded_net()
    optimizer = optimizer_of(variant, net)
    for k in range(steps):
        take_step(optimizer, net, k)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        net.zero_grad()
        net.set_requires_gradient_sync(calls not in which)
        loss = net(*share(batch(steps)))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="set_requires_gradient_sync"):
        optimizer.step(closure)


@pytest.mark.parametrize("which", [{1}, {2}, {1, 2}])
@pytest.mark.parametrize("variant", ["mvr1", "mvr2", "mvr3", "previous_batch"])
def test_a_pass_that_does_not_reduce_is_refused(variant, which):
    started(2).run(unreduced, variant, 2, which)
    if variant == "previous_batch" or 1 in which:  # the first step of the others has one pass
        started(2).run(unreduced, variant, 0, which)


def peak_of_a_step(variant, bucket: int) -> tuple[int, int, int]:
    """Bytes of this rank's momentum, of the full model's, and the most that a step holds in addition."""
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(32))).double()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = LAYERWISE[variant][0](net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with (
        mock.patch.object(buckets, "BUCKET_ELEMENTS", bucket),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return buffer_bytes(optimizer), sum(p.numel() * 8 for p in net.parameters()), max(held)


@pytest.mark.parametrize("variant", ["gluon", "single_batch"])
def test_no_rank_ever_holds_the_full_momentum(variant):
    for own, whole, peak in started(4).run(peak_of_a_step, variant, 4 * 32 * 32):
        assert own == whole / 4
        assert own + peak < 0.75 * whole
    assert all(own + peak > whole for own, whole, peak in started(4).run(peak_of_a_step, variant, 2**25))  # the count works
