"""Under DDP: the weights of one process, bit for bit the same on every rank, and no deadlocks."""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from optim import Gluon
from tests.helpers.parallel import (
    LAYERWISE,
    STEPS,
    VARIANTS,
    Net,
    alone,
    assert_same,
    batch,
    branching,
    buffer_bytes,
    closure_of,
    optimizer_of,
    parallel_net,
    run_ddp,
    started,
    stopped_at_the_end,  # noqa: F401
    take_step,
    weights,
)

pytestmark = pytest.mark.slow
REDUCTIONS = {
    variant: [1] * STEPS if kind.passes == 1 else [1, *[2] * (STEPS - 1)] if kind.deferred else [2] * STEPS
    for variant, (kind, _) in LAYERWISE.items()
} | {"muon_approximate": [1] * STEPS, "muon_previous_batch": [1, *[2] * (STEPS - 1)]}


@pytest.mark.parametrize("micro, views", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_beyond_ddps_first_bucket(variant, micro, views):
    expected = alone(variant, wide=True)
    answers = started(2).run(functools.partial(run_ddp, variant, micro=micro, wide=True, gradient_as_bucket_view=views))
    assert all(a["rebuilt"] for a in answers), "the test needs buckets that DDP has rebuilt"
    assert_same(answers, expected)
    assert all(a["reductions"] == REDUCTIONS[variant] for a in answers), "every pass reduces once"
    assert sum(a["bytes"] for a in answers) == expected["bytes"], "each momentum is kept once"
    assert max(a["bytes"] for a in answers) < 0.7 * expected["bytes"]
    mean = [torch.stack(losses).mean() for losses in zip(*(a["losses"] for a in answers), strict=True)]
    torch.testing.assert_close(torch.stack(mean), torch.stack(expected["losses"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_ranks(variant):
    for options in ({"wide": True}, {"micro": 2, "gradient_as_bucket_view": True}):
        answers = started(4).run(functools.partial(run_ddp, variant, **options))
        expected = alone(variant, wide="wide" in options)
        assert_same(answers, expected)
        assert sum(a["bytes"] for a in answers) == expected["bytes"]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_that_a_batch_does_not_use(variant, decay):
    run = functools.partial(run_ddp, variant, decay, branch=True, make=branching)
    answers = started(2).run(functools.partial(run, find_unused_parameters=True))
    assert_same(answers, run())
    path = [step[branch_index()] for step in answers[0]["path"]]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(path)]
    assert not moved[0] and any(moved), "the branch does not move while no rank uses it"


def branch_index() -> int:
    return [name for name, _ in Net(branch=True).named_parameters()].index("branch.weight")


# Gradients that the user reduces, and that are None somewhere


def run_with_none(variant, decay) -> dict:
    """Gradients set by hand. Each rank has None for other parameters, and every sixth parameter has None on all ranks."""
    net = Net(wide=True)
    optimizer = optimizer_of(variant, net, decay)
    me, params = dist.get_rank(), list(net.parameters())
    path = [weights(net)]
    for k in range(STEPS):

        def closure(k=k):
            for i, (p, g) in enumerate(zip(params, torch.autograd.grad(net(*batch(k)), params), strict=True)):
                p.grad = g if (i + me + k) % 3 and i % 6 else None

        if "muon" in variant:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)]}


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_none_on_one_rank(variant, decay):
    answers = started(2).run(run_with_none, variant, decay)
    for answer in answers:
        for mine, first in zip(answer["path"], answers[0]["path"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
    first, last = answers[0]["path"][0], answers[0]["path"][-1]
    for i, (a, b) in enumerate(zip(first, last, strict=True)):
        assert torch.equal(a, b) == (i % 6 == 0), "only parameters that ever have a gradient move"


def different_parameters(extra: int):
    params = list(Net().blocks.parameters())
    optimizer = Gluon(params[: 4 + (dist.get_rank() == 1) * extra], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="hold different parameters"):
        optimizer.step()


@pytest.mark.parametrize("extra", [1, -1])
def test_ranks_with_different_parameters_are_refused(extra):
    started(2).run(different_parameters, extra)


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
    return {"path": [weights(net)], "bytes": buffer_bytes(optimizer)}


def test_process_group():
    answers = started(4).run(in_subgroups)
    net = Net()
    optimizer = optimizer_of("gluon", net)
    for k in range(STEPS):
        net(*batch(k)).backward()
        optimizer.step()
    assert_same(answers[:2], {"path": [weights(net)]})
    assert sum(a["bytes"] for a in answers[:2]) == buffer_bytes(optimizer)
    assert sum(a["bytes"] for a in answers[2:]) == buffer_bytes(optimizer) + 9 * 8
    assert all(torch.equal(a, b) for a, b in zip(answers[2]["path"][0], answers[3]["path"][0], strict=True))


# A pass that fails


class Interrupted(Exception):
    pass


def run_interrupted(variant, failing_pass: int, load: bool) -> dict:
    """In step 2 a pass fails after its backward. The step is then repeated, after loading the state from before if `load`."""
    net, model = parallel_net("ddp")
    optimizer = optimizer_of(variant, net)
    path = [weights(net)]
    for k in range(STEPS):
        if k == 2:
            saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
            closure, calls = closure_of(model, k), 0

            def failing(closure=closure):
                nonlocal calls
                calls += 1
                loss = closure()
                if calls == failing_pass:
                    raise Interrupted
                return loss

            with pytest.raises(Interrupted):
                optimizer.step(failing)
            if load:
                net.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[0])
        optimizer.step(closure_of(model, k))
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "updates": optimizer.updates}


@pytest.mark.parametrize("variant", LAYERWISE)
def test_a_pass_may_fail(variant):
    for runner in (started(2), started(1)):
        assert_same(runner.run(run_interrupted, variant, 1, False), alone(variant))
        for failing_pass in range(1, max(REDUCTIONS[variant]) + 1):
            assert_same(runner.run(run_interrupted, variant, failing_pass, True), alone(variant))
    if max(REDUCTIONS[variant]) == 2:
        assert_same(started(2).run(run_interrupted, variant, 2, False), run_interrupted(variant, 2, False))


# The device


class NoReading(TorchDispatchMode):
    """Fails on operations that make the host wait for the device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        assert function.__name__.split(".")[0] not in waits, function
        return function(*arguments, **(options or {}))


def steps_without_reading(kind: str, variant) -> None:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net)
    for k in range(2):
        take_step(optimizer, model, k)
    closure = closure_of(model, 2)

    def unwatched():  # the user's closure may wait
        with _disable_current_modes():
            return closure()

    with NoReading():
        if "muon" in variant:
            unwatched()
            optimizer.update_last_grad()
            unwatched()
            optimizer.step()
        else:
            optimizer.step(unwatched)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        torch.ones(1).item()  # NoReading detects it


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_never_waits_for_the_device(variant):
    started(2).run(steps_without_reading, "ddp", variant)
    steps_without_reading("ddp", variant)
    if variant in LAYERWISE:
        started(2).run(steps_without_reading, "fsdp", variant)
