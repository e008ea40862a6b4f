"""State can be saved at any moment, in every way that torch offers, and training continues bit for bit."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optim import Gluon, GluonMVR1, GluonMVR2
from tests.helpers.optimizers import (
    DEFERRED,
    VARIANTS,
    Net,
    Script,
    all_classes,
    closure_of,
    make,
    momentum,
    same,
    same_path,
    train,
    variants,
    weights,
)

# ---- round trips ------------------------------------------------------------------------------------------------------------


def by_pickle(net, optimizer, variant):
    return pickle.loads(pickle.dumps((net, optimizer)))


def by_deepcopy(net, optimizer, variant):
    return copy.deepcopy((net, optimizer))


def by_state_dict(net, optimizer, variant, whole=False):
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.full_state_dict() if whole else optimizer.state_dict()), file)
    file.seek(0)
    model_state, state = torch.load(file, weights_only=True)
    other = Net()
    other.load_state_dict(model_state)
    fresh = make(variant, other, weight_decay=0.9)  # the loaded state has another
    fresh.load_state_dict(state)
    return other, fresh


def by_distributed_checkpoint(flat, net, optimizer, variant):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    other = Net()
    other.load_state_dict(net.state_dict())
    fresh = make(variant, other, weight_decay=0.9)
    set_optimizer_state_dict(other, fresh, state, options=options)
    return other, fresh


WAYS = {
    "pickle": by_pickle,
    "deepcopy": by_deepcopy,
    "state_dict": by_state_dict,
    "full_state_dict": partial(by_state_dict, whole=True),
    "dcp": partial(by_distributed_checkpoint, False),
    "dcp_flat": partial(by_distributed_checkpoint, True),
}


@pytest.mark.parametrize("done, bias_correction", [(0, True), (1, False), (3, True)])
@pytest.mark.parametrize("way", WAYS)
@variants
def test_round_trip_in_mid_run(variant, way, done, bias_correction):
    """The same trajectory bit for bit, from before and after the first step, also with a pending update."""
    net = Net()
    optimizer = make(variant, net, weight_decay=0.2, bias_correction=bias_correction)
    for k in range(done):
        optimizer.step(closure_of(net, k))
    other, loaded = WAYS[way](net, optimizer, variant)
    assert other is not net and loaded.updates == optimizer.updates
    expected = train(net, optimizer, range(done, 6))
    assert same_path(train(other, loaded, range(done, 6)), expected)
    assert loaded.updates == optimizer.updates == 6


@pytest.mark.parametrize("variant", DEFERRED)
def test_round_trip_after_a_flush(variant):
    net = Net()
    optimizer = make(variant, net)
    train(net, optimizer, range(2))
    other, loaded = by_state_dict(net, optimizer, variant)
    assert same_path(train(other, loaded, range(2, 4)), train(net, optimizer, range(2, 4)))


@all_classes
def test_the_initial_state_has_every_key(variant):
    """Otherwise torch.distributed.checkpoint would take a step with zero gradients."""
    net = Net()
    optimizer = make(variant, net)
    before = weights(net)
    first = copy.deepcopy(optimizer.state_dict())
    get_optimizer_state_dict(net, optimizer)
    assert optimizer.updates == 0 and same(before, weights(net))
    optimizer.step(closure_of(net, 0))
    later = optimizer.state_dict()

    def layout(state):
        return {
            i: {n: (v.shape, v.dtype) if isinstance(v, Tensor) else type(v) for n, v in s.items()}
            for i, s in state["state"].items()
        }

    assert layout(first) == layout(later)
    assert [set(g) for g in first["param_groups"]] == [set(g) for g in later["param_groups"]]
    assert all("momentum_buffer" in s for s in first["state"].values())


@all_classes
def test_loaded_state_does_not_alias_the_file(variant):
    net, other = Net(), Net()
    optimizer, loaded = make(variant, net), make(variant, other)
    optimizer.step(closure_of(net, 0))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    loaded.load_state_dict(state)
    train(other, loaded, range(1, 4))
    for i, s in kept["state"].items():
        assert all(torch.equal(v, state["state"][i][n]) for n, v in s.items() if isinstance(v, Tensor))
    assert state["param_groups"][0]["updates"] == kept["param_groups"][0]["updates"]
    assert all(torch.equal(v, optimizer.state_dict()["state"][i][n]) for i, s in kept["state"].items() for n, v in s.items()
               if isinstance(v, Tensor))  # fmt: skip


# ---- precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@variants
def test_low_precision_parameters_keep_float32_momentum(variant, dtype):
    def run(net):
        def closure():
            loss = (net(torch.ones(2, 4, dtype=dtype)) - 1).square().sum()
            loss.backward()
            return loss

        return closure

    torch.manual_seed(0)
    net = nn.Linear(4, 3).to(dtype)
    groups = [{"params": [net.weight]}, {"params": [net.bias], "norm": "adamw"}]
    optimizer = VARIANTS[variant](groups, lr=0.02)
    losses = [optimizer.step(run(net)).item() for _ in range(10)]
    assert losses[-1] < losses[0] and all(p.dtype == dtype for p in net.parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    rounded = [torch.equal(s["momentum_buffer"], s["momentum_buffer"].to(dtype).float()) for s in saved["state"].values()]
    assert not all(rounded), "the momentum is more precise than the parameter"
    other = copy.deepcopy(net)
    loaded = VARIANTS[variant]([{"params": [other.weight]}, {"params": [other.bias], "norm": "adamw"}], lr=0.02)
    loaded.load_state_dict(saved)
    for i, p in enumerate((other.weight, other.bias)):
        buffers = {name: value for name, value in saved["state"][i].items() if isinstance(value, Tensor)}
        assert len(buffers) == (2 if i or variant in ("mvr2", "mvr3") else 1)
        for name, value in buffers.items():
            assert loaded.state[p][name].dtype == torch.float32
            assert torch.equal(loaded.state[p][name], value)


@variants
def test_float64_parameters_have_float64_momentum(variant):
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    assert momentum(VARIANTS[variant]([p]), p).dtype == torch.float64


@variants
def test_a_low_precision_step_is_the_float32_one_rounded(variant):
    start, g = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[0.5, 1.0], [-2.0, 0.25]])
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(start.clone().to(dtype))
        optimizer = VARIANTS[variant]([p], lr=0.1)
        optimizer.step(Script([p], *[[g.to(dtype)]] * 2))
        optimizer.flush()
        moved.append(p.detach().float())
    assert torch.allclose(*moved, rtol=2**-8, atol=0)


# ---- state dicts of others --------------------------------------------------------------------------------------------------


def foreign(build, steps):
    p = nn.Parameter(torch.eye(2))
    optimizer = build([p])
    for _ in range(steps):
        p.grad = torch.ones(2, 2)
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "build", [torch.optim.Muon, torch.optim.AdamW, torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9)]
)
@all_classes
def test_a_state_of_another_optimizer(variant, build, steps):
    """It is refused when it is loaded, or it trains. It never causes a KeyError in a later step."""
    p = nn.Parameter(torch.eye(2))
    build_ours = partial(make, "muon_mvr", nn.ParameterList([p])) if variant == "muon_mvr" else partial(VARIANTS[variant], [p])
    optimizer = build_ours()
    state = foreign(build, steps)
    try:
        optimizer.load_state_dict(state)
        loaded = True
    except ValueError as error:
        assert "momentum_buffer" in str(error) or "last_grad" in str(error) or "estimate" in str(error)
        loaded = False
    has_momentum = steps and "momentum_buffer" in state["state"].get(0, {}) and state["state"][0]["momentum_buffer"] is not None
    assert loaded == bool(has_momentum and variant not in ("mvr2", "mvr3", "muon_mvr"))
    before = p.detach().clone()
    optimizer.step(Script([p], [torch.ones(2, 2)], [torch.ones(2, 2)]))
    optimizer.flush()
    assert not torch.equal(p, before) and p.isfinite().all()
    copy.deepcopy(build_ours()).load_state_dict(optimizer.state_dict())


@all_classes
def test_groups_that_lack_a_key(variant):
    """In an older file, say. The new optimizer keeps its own value for a missing key."""
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    state = optimizer.state_dict()
    for key in set().union(*state["param_groups"]) - {"params"}:
        part = copy.deepcopy(state)
        for group in part["param_groups"]:
            group.pop(key, None)
        other = Net()
        loaded = make(variant, other)
        loaded.load_state_dict(part)
        train(other, loaded, range(1, 3))
        assert all(p.isfinite().all() for p in other.parameters()), key


def test_shares_and_wrong_shapes_are_refused():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(2, 3\).*\(2, 2\)"):
        Gluon([p]).load_state_dict(Gluon([q]).state_dict())
    share = Gluon([p]).state_dict()
    del share["state"][0]["momentum_buffer"]
    with pytest.raises(ValueError, match="full_state_dict"):
        Gluon([p]).load_state_dict(share)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Gluon([p]).load_state_dict(Gluon([{"params": p}, {"params": q}]).state_dict())
    with pytest.raises(ValueError, match="estimate"):
        GluonMVR2([p]).load_state_dict(GluonMVR1([p]).state_dict())


def test_a_refused_state_changes_nothing():
    net, other = Net(), Net()
    optimizer, twin = make("mvr3", net), make("mvr3", other)
    optimizer.step(closure_of(net, 0))
    twin.step(closure_of(other, 0))
    with pytest.raises(ValueError, match="estimate"):
        optimizer.load_state_dict(make("mvr1", Net()).state_dict())
    assert same_path(train(net, optimizer, range(1, 3)), train(other, twin, range(1, 3)))


@all_classes
def test_files_are_plain(variant):
    """torch.load with weights_only reads them, without a warning."""
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
