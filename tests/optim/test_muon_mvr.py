"""MuonMVR against a plain float64 reference, and the four training loops that its README describes."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from optim import MuonMVR
from tests.helpers.optimizers import MUON_OPTIONS, standard_loop, weights
from tests.helpers.optimizers import MuonNet as Net
from tests.helpers.optimizers import make_muon as make
from tests.helpers.optimizers import muon_batches as batches
from tests.helpers.reference import muon_mvr_trajectory


def gradient(at: list[Tensor], micro_batches) -> list[Tensor]:
    """The mean gradient of the micro-batches at the weights `at`."""
    net = Net()
    with torch.no_grad():
        for p, w in zip(net.parameters(), at, strict=True):
            p.copy_(w)
    loss = sum(net(x, y) for x, y in micro_batches) / len(micro_batches)
    return [g.clone() for g in torch.autograd.grad(loss, list(net.parameters()))]


def constant(k):
    return {name: MUON_OPTIONS[name] for name in ("lr", "momentum", "gamma", "weight_decay")}


def moving(k):
    return {"lr": 0.1 / (k + 1) ** 0.5, "momentum": 1 - (k + 2) ** -0.5, "gamma": 0.1 + k / 50, "weight_decay": 0.01 * k}


def reference(steps, last_of, settings=constant):
    betas, eps = MUON_OPTIONS["adamw_betas"], MUON_OPTIONS["eps"]
    return muon_mvr_trajectory(weights(Net()), gradient, steps, last_of, settings, betas, eps)


def assert_path(path, expected):
    assert len(path) == len(expected)
    for k, (ours, theirs) in enumerate(zip(path, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() < 1e-10 * b.norm(), f"after step {k}"


def assert_other_path(path, expected):
    assert any((a - b).norm() > 1e-4 * b.norm() for a, b in zip(path[-1], expected[-1], strict=True))


# ---- the loops of the README ----------------------------------------------------------------------------------------------


def accumulation_loop(net, optimizer, data, accum_steps):
    """Loop 2 as its text describes it: both losses over `accum_steps`, a step once all micro-batches are accumulated."""
    path, previous, current = [], [], []
    for batch in data:
        current.append(batch)
        if len(current) < accum_steps:
            continue
        if previous:
            for micro_batch in previous:
                (net(*micro_batch) / accum_steps).backward()
            optimizer.update_last_grad()
            optimizer.zero_grad()
        for micro_batch in current:
            (net(*micro_batch) / accum_steps).backward()
        optimizer.step()
        previous, current = current, []
        path.append(weights(net))
    return path


def printed_accumulation_loop(net, optimizer, data, accum_steps):
    """Loop 2 in the order of its README's code, which trains nothing."""
    previous = None
    for i, batch in enumerate(data):
        (net(*batch) / accum_steps).backward()
        if previous is not None:
            (net(*previous) / accum_steps).backward()
            optimizer.update_last_grad()
            optimizer.zero_grad(set_to_none=True)
        if (i + 1) % accum_steps == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            previous = None
        else:
            previous = batch


def snapshot_loop(net, optimizer, data):
    """Loop 3 (MVR-2): first this batch at the previous weights."""
    path, old = [], {}
    for batch in data:
        current = {name: value.clone() for name, value in net.state_dict().items()}
        if old:
            net.load_state_dict(old)
            optimizer.zero_grad()
            net(*batch).backward()
            optimizer.update_last_grad()
        net.load_state_dict(current)
        old = current
        optimizer.zero_grad()
        net(*batch).backward()
        optimizer.step()
        path.append(weights(net))
    return path


def approximate(k, x, x_old, g_old):
    return g_old


@pytest.mark.parametrize("in_place", [False, True])
def test_standard_loop(in_place):
    """Zeroing in place must not change the recorded gradient, which is a copy."""
    data, net = list(batches(50)), Net()
    expected = reference([[b] for b in data], lambda k, x, *_: gradient(x, [data[k - 1]]) if k else None)
    assert_path(standard_loop(net, make(net), data, in_place), expected)
    assert_other_path(reference([[b] for b in data], lambda *_: None), expected)


@pytest.mark.parametrize("accum_steps", [1, 4])
def test_accumulation_loop(accum_steps):
    data, net = list(batches(10 * accum_steps)), Net()
    steps = [data[i : i + accum_steps] for i in range(0, len(data), accum_steps)]
    expected = reference(steps, lambda k, x, *_: gradient(x, steps[k - 1]) if k else None)
    assert_path(accumulation_loop(net, make(net), data, accum_steps), expected)


def test_the_printed_accumulation_loop_never_trains():
    net = Net()
    before = weights(net)
    printed_accumulation_loop(net, make(net), batches(16), 4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


def test_snapshot_loop():
    data, net = list(batches(50)), Net()
    expected = reference([[b] for b in data], lambda k, x, x_old, _: gradient(x_old, [data[k]]) if k else None)
    assert_path(snapshot_loop(net, make(net), data), expected)


@pytest.mark.parametrize("calls_update", [False, True])
def test_approximate_loop(calls_update):
    """MVR-1 compares with the previous step's gradient, even in the loop of MVR-3."""
    data, net = list(batches(50)), Net()
    optimizer = make(net, is_approx=True)
    if calls_update:
        path = standard_loop(net, optimizer, data)
    else:
        path = []
        for batch in data:
            net(*batch).backward()
            optimizer.step()
            path.append(weights(net))
    assert_path(path, reference([[b] for b in data], approximate))


@pytest.mark.parametrize("is_approx", [False, True])
def test_schedules(is_approx):
    data, net = list(batches(50)), Net()
    optimizer, path = make(net, is_approx=is_approx), []
    for k, batch in enumerate(data):
        for group in optimizer.param_groups:
            group.update(moving(k))
        if k and not is_approx:
            net(*data[k - 1]).backward()
            optimizer.update_last_grad()
            optimizer.zero_grad()
        net(*batch).backward()
        optimizer.step()
        path.append(weights(net))
    previous = approximate if is_approx else lambda k, x, *_: gradient(x, [data[k - 1]]) if k else None
    assert_path(path, reference([[b] for b in data], previous, moving))


def test_the_loops_train():
    for loop in (standard_loop, snapshot_loop):
        net = Net()
        before = float(net(*next(batches(1, seed=9))))
        loop(net, MuonMVR(net.parameters(), lr=0.03), batches(60))
        assert float(net(*next(batches(1, seed=9)))) < 0.9 * before


# ---- details --------------------------------------------------------------------------------------------------------------


def test_defaults():
    net = Net()
    optimizer = MuonMVR(net.parameters())
    muon, adamw = optimizer.param_groups
    chosen = {name: muon[name] for name in ("lr", "momentum", "gamma", "is_approx", "weight_decay", "ns_steps", "polar")}
    assert chosen == {
        "lr": 3e-3, "momentum": 0.95, "gamma": 0.025, "is_approx": False, "weight_decay": 0.0, "ns_steps": 5,
        "polar": "newton_schulz",
    }  # fmt: skip
    assert adamw["betas"] == (0.95, 0.99) and adamw["eps"] == 1e-8
    assert muon["params"] == [net.first.weight, net.second.weight] and muon["use_muon"]
    assert adamw["params"] == [net.gain, net.first.bias] and not adamw["use_muon"]
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_without_a_recorded_gradient_there_is_no_correction():
    data = list(batches(5))
    expected = reference([[b] for b in data], lambda *_: None)
    net = Net()
    optimizer, path = make(net), []
    for batch in data:
        net(*batch).backward()
        optimizer.step()
        path.append(weights(net))
    assert_path(path, expected)


def test_gamma_zero_has_no_correction():
    data, net = list(batches(8)), Net()
    assert_path(standard_loop(net, make(net, gamma=0.0), data), reference([[b] for b in data], lambda *_: None))


def matrix(*entries):
    return torch.tensor(entries, dtype=torch.float64).reshape(1, -1)


def test_values_and_clipping_by_hand():
    p = nn.Parameter(matrix(0.0, 0.0))
    optimizer = MuonMVR([p], momentum=0.5, gamma=0.25)
    p.grad = matrix(0.3, 0.4)  # inside the unit ball: not clipped; momentum starts from zero
    optimizer.step()
    m = 0.5 * matrix(0.3, 0.4)
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], m, rtol=1e-15)
    p.grad = matrix(0.1, 0.2)
    optimizer.update_last_grad()
    p.grad = matrix(0.3, 0.2)
    optimizer.step()
    m = 0.5 * m + 0.5 * (matrix(0.3, 0.2) + 0.25 * matrix(0.2, 0.0))
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], m, rtol=1e-15)
    p.grad = matrix(0.0, 0.0)
    optimizer.update_last_grad()
    p.grad = matrix(3.0, 4.0)  # C = 1.25 · g, of norm 6.25
    optimizer.step()
    m = 0.5 * m + 0.5 * matrix(0.6, 0.8)
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], m, rtol=1e-15)


def test_a_recorded_gradient_stays_until_the_next():
    p = nn.Parameter(matrix(0.0, 0.0))
    optimizer = MuonMVR([p], momentum=0.5, gamma=0.5)
    p.grad = matrix(0.1, 0.0)
    optimizer.update_last_grad()
    m = torch.zeros_like(p)
    for _ in range(2):
        p.grad = matrix(0.2, 0.0)
        optimizer.step()
        m = 0.5 * m + 0.5 * (matrix(0.2, 0.0) + 0.5 * matrix(0.1, 0.0))
        assert torch.allclose(optimizer.state[p]["momentum_buffer"], m, rtol=1e-15)
    optimizer.update_last_grad()  # .grad is None now: nothing is recorded
    p.grad = matrix(0.2, 0.0)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], 0.5 * m + 0.5 * matrix(0.2, 0.0), rtol=1e-15)


@pytest.mark.parametrize("is_approx", [False, True])
def test_no_gradient_changes_nothing(is_approx):
    net = Net()
    optimizer = make(net, is_approx=is_approx)
    standard_loop(net, optimizer, batches(2))
    before, state = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    for i, s in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state[i][n]) for n, v in s.items() if isinstance(v, Tensor))


@pytest.mark.parametrize("is_approx", [False, True])
def test_records_are_copies_and_gradients_are_not_modified(is_approx):
    net = Net()
    optimizer = make(net, is_approx=is_approx)
    for batch in batches(3):
        net(*batch).backward()
        held = [p.grad for p in net.parameters()]
        kept = [g.clone() for g in held]
        optimizer.update_last_grad()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
        records = [s["last_grad"].clone() for s in optimizer.state.values() if "last_grad" in s]
        assert len(records) == 2 and all(r.any() for r in records)
        for g in held:
            g.zero_()
        assert all(torch.equal(a, s["last_grad"]) for a, s in zip(records, list(optimizer.state.values())[:2], strict=True))


def test_zero_gradients():
    net = Net()
    before = weights(net)
    optimizer = MuonMVR(net.parameters(), gamma=1.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


@pytest.mark.parametrize("is_approx", [False, True])
def test_no_host_synchronisation(is_approx):
    """Meta tensors have no values, so code that reads one, such as `if norm > 1`, would raise."""
    net = Net().to("meta")
    optimizer = MuonMVR(net.parameters(), is_approx=is_approx)
    data = [(x.to("meta"), y.to("meta")) for x, y in batches(3)]
    standard_loop(net, optimizer, data)
    assert optimizer.updates == 3
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones((), device="meta") > 1)


def test_newton_schulz_and_its_steps():
    """The default polar factor against this iteration, written out."""
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    g = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for steps in (1, 3, 5, 7):
        q = nn.Parameter(p.detach().clone())
        q.grad = g.clone()
        MuonMVR([q], lr=1.0, ns_steps=steps).step()
        x = g / g.norm()
        for _ in range(steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        assert torch.allclose(q, -0.2 * math.sqrt(6) * x, rtol=0, atol=1e-13)


def test_one_batched_product_for_matrices_of_one_shape(monkeypatch):
    """A matrix and a transposed one count as one shape."""
    params = [nn.Parameter(torch.ones(s)) for s in [(3, 5), (5, 3), (3, 5), (4, 4)]]
    sizes = []
    original = torch.bmm

    def counted(a, b, **options):
        sizes.append(len(a))
        return original(a, b, **options)

    monkeypatch.setattr(torch, "bmm", counted)
    for p in params:
        p.grad = torch.ones_like(p)
    MuonMVR(params).step()
    assert sizes == [3] * 5 + [1] * 5
