"""MuonMVR's groups, state and arguments."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optim import MuonMVR
from tests.helpers.optimizers import MuonNet as Net
from tests.helpers.optimizers import make_muon as make
from tests.helpers.optimizers import muon_batches as batches
from tests.helpers.optimizers import standard_loop, weights

# ---- groups ---------------------------------------------------------------------------------------------------------------


def test_groups_with_use_muon():
    net = Net()
    conv, table = nn.Parameter(torch.ones(4, 2, 3)), nn.Parameter(torch.ones(9, 2))
    optimizer = MuonMVR(
        [
            {"params": [net.first.weight, conv], "view": "convolution", "use_muon": True, "momentum": 0.8, "ns_steps": 6},
            {"params": [table, net.gain], "use_muon": False, "lr": 0.5, "adamw_betas": (0.5, 0.6)},
            {"params": [net.second.weight, net.first.bias], "lr": 0.25},
        ],
    )
    assert [g["use_muon"] for g in optimizer.param_groups] == [True, False, True, False]
    assert [g["lr"] for g in optimizer.param_groups] == [3e-3, 0.5, 0.25, 0.25]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6) and optimizer.param_groups[1]["params"][0] is table
    assert "last_grad" in optimizer.state[conv] and "exp_avg_sq" in optimizer.state[table]
    before = table.detach().clone()
    table.grad, conv.grad = torch.ones_like(table), torch.ones_like(conv)
    optimizer.step()
    assert torch.allclose(table, before - 0.5), "AdamW's first step is lr·sign"
    assert torch.linalg.matrix_norm((conv - 1).flatten(1), 2) > 0


def test_adamw_side_equals_torch():
    ours, theirs = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3).double())
    optimizer = MuonMVR([ours], lr=0.1, weight_decay=0.2, adamw_betas=(0.7, 0.8), eps=1e-3)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.7, 0.8), eps=1e-3)
    for k in range(10):
        ours.grad = torch.tensor([1.0, -k, math.sin(k)], dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        optimizer.update_last_grad()
        optimizer.step()
        other.step()
    assert torch.allclose(ours, theirs, rtol=1e-14, atol=0)


def test_one_tensor_and_named_parameters():
    assert len(MuonMVR([{"params": nn.Parameter(torch.ones(2, 2))}]).param_groups) == 1
    optimizer = MuonMVR(Net().named_parameters())
    assert [g["param_names"] for g in optimizer.param_groups] == [["first.weight", "second.weight"], ["gain", "first.bias"]]


def test_a_scheduler():
    data, net = list(batches(4)), Net()
    optimizer = make(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k else 1.0)
    net(*data[0]).backward()
    optimizer.step()
    scheduler.step()
    before = weights(net)
    standard_loop(net, optimizer, data)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


# ---- state ----------------------------------------------------------------------------------------------------------------


def by_pickle(net, optimizer, **options):
    return pickle.loads(pickle.dumps((net, optimizer)))


def by_deepcopy(net, optimizer, **options):
    return copy.deepcopy((net, optimizer))


def by_state_dict(net, optimizer, **options):
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights_state, state = torch.load(file, weights_only=True)
    other = Net()
    other.load_state_dict(weights_state)
    fresh = make(other, lr=1.0, **options)
    fresh.load_state_dict(state)
    return other, fresh


def by_distributed_checkpoint(net, optimizer, **options):
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    other = Net()
    other.load_state_dict(net.state_dict())
    fresh = make(other, lr=1.0, **options)
    set_optimizer_state_dict(other, fresh, state)
    return other, fresh


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("is_approx", [False, True])
@pytest.mark.parametrize("way", [by_pickle, by_deepcopy, by_state_dict, by_distributed_checkpoint])
def test_round_trip_in_mid_run(way, is_approx, done, recorded):
    """The same trajectory bit for bit, also from between `update_last_grad` and `step`."""
    data, net = list(batches(6)), Net()
    optimizer = make(net, is_approx=is_approx)
    standard_loop(net, optimizer, data[:done])
    if recorded:
        net(*data[0]).backward()
        optimizer.update_last_grad()
        optimizer.zero_grad()
    other, loaded = way(net, optimizer, is_approx=is_approx)
    expected = standard_loop(net, optimizer, data[done:])
    path = standard_loop(other, loaded, data[done:])
    assert all(torch.equal(a, b) for x, y in zip(path, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert loaded.updates == optimizer.updates == 6


def test_bfloat16_parameters_keep_float32_state():
    net = Net().to(torch.bfloat16)
    optimizer = MuonMVR(net.parameters(), lr=0.01)
    standard_loop(net, optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in batches(3)])
    other = MuonMVR(Net().to(torch.bfloat16).parameters())
    state = optimizer.state_dict()
    other.load_state_dict(state)
    for mine, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        for name, value in theirs.items():
            if isinstance(value, Tensor):
                assert mine[name].dtype == torch.float32 and torch.equal(mine[name], value)
                assert mine[name].data_ptr() != value.data_ptr()
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in net.parameters())


# ---- arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        *[("lr", v, "≥ 0") for v in (-1, math.nan, "1", True)],
        *[("momentum", v, r"\[0, 1\)") for v in (-0.1, 1.0, None)],
        *[("gamma", v, "≥ 0") for v in (-0.1, math.inf, "1", True)],
        *[("is_approx", v, "True or False") for v in (1, None, "yes")],
        *[("weight_decay", v, "≥ 0") for v in (-0.1, math.nan)],
        *[("ns_steps", v, "an integer ≥ 1") for v in (0, -1, 2.5, True, None)],
        *[("adamw_betas", v, r"two numbers in \[0, 1\)") for v in ((0.9,), (0.9, 1.0), 0.9, None, ("a", "b"))],
        *[("eps", v, "≥ 0") for v in (-1e-8, None)],
        *[("polar", v, "polar_express, newton_schulz, svd") for v in ("ns", None)],
    ],
)
def test_bad_arguments(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{allowed}") as error:
        MuonMVR([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], **{name: value})
    assert repr(value) in str(error.value)


def test_bad_groups():
    vector, square = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"use_muon=True needs .*2 dimensions.*\(3,\)"):
        MuonMVR([{"params": [vector], "use_muon": True}])
    with pytest.raises(ValueError, match="use_muon must be True or False, got 'yes'"):
        MuonMVR([{"params": [square], "use_muon": "yes"}])
    with pytest.raises(ValueError, match="params must name every parameter once"):
        MuonMVR([square, vector, square])
    with pytest.raises(TypeError):
        MuonMVR([square], nesterov=True)
    with pytest.raises(ValueError, match="empty"):
        MuonMVR([])
