"""What the optimizers promise beside their recursion: one process, one promise a test."""

import copy
import inspect
import io
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3

NORMS = ["spectral", "sign", "colnorm", "rownorm", "frobenius", "rms", "auto", "adamw"]
VARIANTS = {
    "gluon": Gluon,
    "mvr1": partial(GluonMVR1, gamma=0.3),
    "mvr2": partial(GluonMVR2, gamma=0.3),
    "mvr3": partial(GluonMVR3, gamma=0.3),
    "nested": partial(GluonMVR2, inner=0.5),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
two_passes = pytest.mark.parametrize("variant", ["mvr2", "mvr3", "nested"])
BETA, GAMMA = 0.8, 0.3


class Script:
    """A closure whose n-th call leaves the gradients of the n-th row, one for each parameter; None where there is none."""

    def __init__(self, params, *rows):
        self.params, self.rows, self.calls = params, list(rows), 0

    def __call__(self):
        row = self.rows[self.calls]
        self.calls += 1
        terms = [(p * g).sum() for p, g in zip(self.params, row, strict=True) if g is not None]
        if terms:
            sum(terms).backward()
        return self.calls


class Net(nn.Module):
    """Layers of every kind, float64, in the groups that `groups` makes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.conv = nn.Conv1d(1, 4, 3)
        self.gain = nn.Parameter(torch.ones(6))
        self.double()

    def forward(self, batch):
        x = self.embedding(batch) * self.gain
        x = x + self.second(torch.tanh(self.first(x)))
        y = self.conv(x.mean(1)[:, None]).mean((1, 2))
        return (x @ self.embedding.weight.T).flatten(0, 1).logsumexp(-1).mean() + y.square().mean() - x[:, :, 0].sin().mean()

    def groups(self):
        return [
            {"params": [self.first.weight, self.second.weight, self.conv.weight]},
            {"params": [self.embedding.weight], "norm": "sign", "radius": 2.0},
            {"params": [self.gain], "norm": "rms", "weight_decay": 0.1},
            {"params": [self.first.bias, self.second.bias, self.conv.bias], "norm": "adamw"},
        ]


def batch(k: int) -> Tensor:
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(k))


def closure_of(net, k):
    def closure():
        loss = net(batch(k))
        loss.backward()
        return loss

    return closure


def make(variant, net, **options):
    return VARIANTS[variant](net.groups(), lr=0.02, momentum=BETA, **options)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def train(net, optimizer, steps, schedule=None):
    path = []
    for k in steps:
        optimizer.step(closure_of(net, k))
        if schedule is not None:
            schedule.step()
        path.append(weights(net))
    optimizer.flush()
    return [*path, weights(net)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_path(a, b):
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def vector(*entries, dtype=torch.float64):
    return torch.tensor(entries, dtype=dtype)


def parameter(*entries, dtype=torch.float64):
    return nn.Parameter(vector(*entries, dtype=dtype))


def momentum(optimizer, p):
    return optimizer.state[p]["momentum_buffer"]


def rms_move(m: Tensor, lr: float) -> Tensor:
    """lr · LMO(m) in the rms norm."""
    return -lr * m / m.square().mean().sqrt()


# ---- signatures and defaults ----------------------------------------------------------------------------------------------


def test_defaults():
    p = parameter(1.0)
    for cls in (Gluon, GluonMVR1, GluonMVR2, GluonMVR3):
        matrix = nn.Parameter(torch.eye(2))
        group = cls([matrix]).param_groups[0]
        chosen = {name: group[name] for name in ("norm", "radius", "momentum", "weight_decay")}
        assert chosen == {"norm": "spectral", "radius": 1.0, "momentum": 0.9, "weight_decay": 0.0}
        assert group["scale"] == "scion" and group["polar"] == "polar_express"
        assert cls is Gluon or group["gamma"] == 0.1
        assert isinstance(cls([p], norm="rms"), torch.optim.Optimizer)
        assert list(inspect.signature(cls.step).parameters)[:3] == ["self", "closure", "previous"]


def test_gradients_in_place_or_from_a_closure():
    for variant in ("gluon", "mvr1"):
        by_closure, in_place = Net(), Net()
        optimizer = make(variant, in_place)
        for k in range(3):
            closure_of(in_place, k)()
            assert optimizer.step() is None
        assert same(train(by_closure, make(variant, by_closure), range(3))[-1], weights(in_place))


@two_passes
def test_a_closure_is_needed(variant):
    with pytest.raises(TypeError, match="needs a closure"):
        make(variant, Net()).step()


@pytest.mark.parametrize("variant, passes", [("gluon", 6), ("mvr1", 6), ("mvr2", 11), ("nested", 11), ("mvr3", 12)])
def test_passes_previous_and_loss(variant, passes):
    """K updates of MVR-2 cost 2K - 1 passes; `previous` is called for ĝ; the loss is that of g."""
    net = Net()
    optimizer = make(variant, net)
    called = []
    for k in range(6):

        def closure(name, k=k):
            called.append(name)
            loss = net(batch(k))
            loss.backward()
            return name, loss.detach()

        name, loss = optimizer.step(partial(closure, "now"), partial(closure, "previous"))
        assert name == "now"
        if variant in ("mvr2", "nested"):
            assert torch.equal(loss, net(batch(k))), "the second pass is at the weights that the model holds"
        assert optimizer.updates == (k if variant in ("mvr2", "nested") else k + 1)
    assert len(called) == passes and called.count("now") == 6
    if variant == "mvr2":
        assert called[:5] == ["now", "previous", "now", "previous", "now"]
    if variant == "mvr3":
        assert called[:4] == ["now", "previous", "now", "previous"]
    optimizer.flush()
    assert optimizer.updates == 6


@pytest.mark.parametrize("cls", [GluonMVR2, GluonMVR3])
def test_gamma_zero_skips_the_extra_pass(cls):
    p = parameter(1.0, 2.0)
    script = Script([p], *[[vector(1.0, k)] for k in range(4)])
    optimizer = cls([p], norm="rms", gamma=0.0)
    for _ in range(4):
        optimizer.step(script)
    assert script.calls == 4


def test_nested_recursion_is_not_confused_with_gamma():
    """`inner` chooses the nested form whatever γ is."""
    paths = []
    for gamma in (0.0, 0.7):
        net = Net()
        paths.append(train(net, GluonMVR2(net.groups(), lr=0.02, gamma=gamma, inner=0.5), range(4)))
    assert same_path(*paths)


# ---- the first gradient, zeros --------------------------------------------------------------------------------------------


@variants
def test_first_gradient_is_taken_whole(variant):
    """Not (1-β) g, and not inflated by a correction against zeros."""
    p, g, hat = parameter(1.0, 2.0, 3.0), vector(3.0, -4.0, 1.0), vector(0.5, 0.5, 9.0)
    optimizer = VARIANTS[variant]([p], lr=0.1, momentum=BETA, norm="rms")
    before = p.detach().clone()
    optimizer.step(Script([p], [g], [hat]))
    expected = g - GAMMA * hat if variant == "mvr3" else g
    assert torch.allclose(momentum(optimizer, p), expected, rtol=1e-15)
    optimizer.flush()
    assert torch.allclose(p, before + rms_move(g, 0.1), rtol=1e-15)


@pytest.mark.parametrize("polar", ["polar_express", "newton_schulz", "svd"])
@pytest.mark.parametrize("norm", NORMS)
@variants
def test_zero_gradients(variant, norm, polar):
    """LMO(0) = 0: the weights only decay; and the next gradient finds a sound state."""
    p = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
    start = p.detach().clone()
    optimizer = VARIANTS[variant]([p], lr=0.1, weight_decay=0.5, norm=norm, polar=polar)
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    script = Script([p], *[[zero]] * (2 if variant == "mvr3" else 1), *[[one]] * 9)
    optimizer.step(script)
    optimizer.flush()
    assert torch.equal(p, start * (1 - 0.1 * 0.5))
    for _ in range(3):
        optimizer.step(script)
    optimizer.flush()
    assert p.isfinite().all() and (p < start * (1 - 0.1 * 0.5) ** 4).all()


@variants
def test_steps_leave_no_gradient(variant):
    net = Net()
    optimizer = make(variant, net)
    for k in range(3):
        optimizer.step(closure_of(net, k))
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", ["gluon", "mvr1"])
def test_gradients_in_place_are_not_modified(variant, norm):
    p = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = VARIANTS[variant]([p], norm=norm)
    for k in range(3):
        g = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
        p.grad = g
        kept = g.clone()
        optimizer.step()
        assert torch.equal(g, kept)
        assert momentum(optimizer, p).data_ptr() != g.data_ptr(), "an alias would change under in-place zeroing"


@variants
def test_momentum_is_no_alias_of_a_gradient_that_is_zeroed_later(variant):
    p = parameter(1.0, 2.0)
    optimizer = VARIANTS[variant]([p], momentum=BETA, norm="rms")
    held = []

    def closure():
        (p * vector(3.0, 4.0)).sum().backward()
        held.append(p.grad)

    optimizer.step(closure)
    kept = momentum(optimizer, p).clone()
    for g in held:
        g.zero_()
    assert torch.equal(momentum(optimizer, p), kept)


# ---- values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gluon", "mvr1", "mvr2", "mvr3"])
def test_values_of_beta_and_gamma(variant):
    """By hand, so that β and γ swapped, or an overwritten gradient, cannot pass."""
    beta, gamma, lr = 0.9, 0.25, 0.1
    p = parameter(5.0, 7.0)
    g0, hat, g1 = vector(1.0, 0.0), vector(0.0, 2.0), vector(0.0, 3.0)
    expected = {
        "gluon": vector(0.9, 0.3),  # β g0 + (1-β) g1
        "mvr1": vector(0.9 - 0.225, 0.3 + 0.225 * 3),  # + γβ (g1 - g0)
        "mvr2": vector(0.9, 0.3 + 0.225),  # + γβ (g1 - hat)
        "mvr3": vector(0.9, 0.3 + 0.225),
    }[variant]
    options = {} if variant == "gluon" else {"gamma": gamma}
    cls = {"gluon": Gluon, "mvr1": GluonMVR1, "mvr2": GluonMVR2, "mvr3": GluonMVR3}[variant]
    optimizer = cls([p], lr=lr, momentum=beta, norm="rms", **options)
    rows = {"mvr2": [[g0], [hat], [g1]], "mvr3": [[g0], [hat], [g1], [hat]]}.get(variant, [[g0], [g1]])
    script = Script([p], *rows)
    optimizer.step(script)
    optimizer.step(script)
    optimizer.flush()
    assert torch.allclose(p, vector(5.0, 7.0) + rms_move(g0, lr) + rms_move(expected, lr), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale, rule", [("muon", "original"), ("moonlight", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_muon_after_a_zero_first_gradient(nesterov, scale, rule):
    """γ = 1-β in MVR-1 is Nesterov momentum; torch's product is in bfloat16, which is what the 2% are for."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in [(16, 16), (32, 16), (16, 48)]]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    settings = {"scale": scale, "polar": "newton_schulz"}
    optimizer = GluonMVR1(ours, gamma=0.05, **options, **settings) if nesterov else Gluon(ours, **options, **settings)
    reference = torch.optim.Muon(theirs, nesterov=nesterov, adjust_lr_fn=rule, **options)
    for k in range(12):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape, generator=generator) if k else torch.zeros(p.shape)
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        reference.step()
    for p, q, w in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.02 * (q - w).norm()


def test_gamma_one_minus_beta_is_nesterov():
    """M_k = β C_k + (1-β) g_k of the average C_k = β C_{k-1} + (1-β) g_k."""
    p, lr = parameter(1.0, 2.0, 3.0), 0.1
    optimizer = GluonMVR1([p], lr=lr, momentum=BETA, gamma=1 - BETA, norm="rms")
    x, average = p.detach().clone(), None
    for k in range(20):
        g = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        p.grad = g.clone()
        optimizer.step()
        average = g if average is None else BETA * average + (1 - BETA) * g
        x += rms_move(BETA * average + (1 - BETA) * g, lr)
        assert torch.allclose(p, x, rtol=0, atol=1e-13)


# ---- where there are no previous weights ----------------------------------------------------------------------------------


def test_after_flush_the_next_step_is_gluons():
    p = parameter(1.0, 2.0)
    a, b, hat, c = vector(1.0, 0.0), vector(2.0, 1.0), vector(9.0, 9.0), vector(0.0, 3.0)
    optimizer = GluonMVR2([p], lr=0.1, momentum=BETA, gamma=GAMMA, norm="rms")
    script = Script([p], [a], [b], [hat], [c])
    optimizer.step(script)
    optimizer.flush()
    assert optimizer.updates == 1
    at = p.detach().clone()
    optimizer.flush()
    assert optimizer.updates == 1 and torch.equal(p, at), "a second flush does nothing"
    optimizer.step(script)
    assert script.calls == 2, "no extra pass"
    m = BETA * a + (1 - BETA) * b
    assert torch.allclose(momentum(optimizer, p), m, rtol=1e-15)
    optimizer.step(script)
    assert script.calls == 4
    assert torch.allclose(momentum(optimizer, p), BETA * m + (1 - BETA) * c + GAMMA * BETA * (c - hat), rtol=1e-14)


@pytest.mark.parametrize("variant", ["gluon", "mvr1", "mvr3"])
def test_flush_does_nothing_elsewhere(variant):
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    before = weights(net)
    optimizer.flush()
    assert optimizer.updates == 1 and same(before, weights(net))


def test_flush_before_the_first_step():
    net = Net()
    before = weights(net)
    optimizer = make("mvr2", net)
    optimizer.flush()
    assert optimizer.updates == 0 and same(before, weights(net))


@variants
def test_a_group_added_later(variant):
    """Its first pass at the old weights does not count; the index of the weights is one for all groups."""
    p, q = parameter(1.0, 2.0), parameter(3.0, 4.0)
    a, b, c = (torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3))
    hat_b, hat_c = vector(9.0, -9.0), vector(-5.0, 6.0)
    optimizer = VARIANTS[variant]([p], lr=0.1, momentum=BETA, norm="rms")
    optimizer.step(Script([p], [a], [a]))
    optimizer.add_param_group({"params": [q], "norm": "rms", "radius": 3.0})
    start = q.detach().clone()
    second = {"mvr2": [hat_b, b], "nested": [hat_b, b], "mvr3": [b, hat_c]}.get(variant, [b])
    optimizer.step(Script([p, q], *[[row, row] for row in second]))
    assert {group["updates"] for group in optimizer.param_groups} == {optimizer.updates}
    expected = b - GAMMA * hat_c if variant == "mvr3" else b
    assert torch.allclose(momentum(optimizer, q), expected, rtol=1e-15)
    third = {"mvr2": [hat_c, c], "nested": [hat_c, c], "mvr3": [c, a]}.get(variant, [c])
    optimizer.step(Script([p, q], *[[row, row] for row in third]))
    optimizer.flush()
    assert {group["updates"] for group in optimizer.param_groups} == {3} and optimizer.updates == 3
    m = BETA * b + (1 - BETA) * c
    if variant in ("mvr2", "mvr3"):
        m += GAMMA * BETA * (c - hat_c)
    elif variant == "mvr1":
        m += GAMMA * BETA * (c - b)
    elif variant == "nested":
        m = BETA * b + (1 - BETA) * (c + 0.5 * (b - hat_c))
    assert torch.allclose(q, start + rms_move(b, 0.3) + rms_move(m, 0.3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_a_first_gradient_that_comes_later(variant):
    """A parameter of the group that was not used before takes its first gradient whole, too."""
    p, q, one = parameter(1.0, 2.0), parameter(3.0, 4.0), vector(1.0, 1.0)
    b, hat = vector(2.0, 5.0), vector(9.0, 9.0)
    optimizer = VARIANTS[variant]([p, q], lr=0.1, momentum=BETA, norm="rms")
    before = q.detach().clone()
    optimizer.step(Script([p, q], [one, None], [one, hat if variant == "mvr3" else None]))
    assert torch.equal(q, before) and not momentum(optimizer, q).any()
    optimizer.step(Script([p, q], *([[one, hat], [one, b]] if variant == "mvr2" else [[one, b], [one, None]])))
    assert torch.equal(momentum(optimizer, q), b)


# ---- None -----------------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("norm", ["rms", "adamw"])
def test_none_in_both_passes_leaves_everything(variant, norm):
    p, q, one = parameter(1.0, 2.0), parameter(3.0, 4.0), vector(1.0, 3.0)
    optimizer = VARIANTS[variant]([p, q], lr=0.1, weight_decay=0.5, norm=norm)
    optimizer.step(Script([p, q], [one, one], [one, None]))
    optimizer.flush()
    before = q.detach().clone()
    state = copy.deepcopy(optimizer.state[q])
    for _ in range(3):
        optimizer.step(Script([p, q], *[[one, None]] * 2))
    optimizer.flush()
    assert torch.equal(q, before), "neither direction nor decay"
    assert optimizer.state[q].keys() == state.keys()
    assert all(bool((optimizer.state[q][name] == value).all()) for name, value in state.items() if isinstance(value, Tensor))
    assert optimizer.state[q]["steps"] == state["steps"]
    assert optimizer.updates == 4


@pytest.mark.parametrize("g, hat", list(itertools.product([None, vector(2.0, -1.0)], [None, vector(5.0, 3.0)])))
@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_none_in_one_pass_is_zero(variant, g, hat):
    p, a, x = parameter(1.0, 2.0), vector(1.0, 1.0), vector(3.0, 4.0)
    other = parameter(0.0, 1.0)
    optimizer = VARIANTS[variant]([p, other], lr=0.1, momentum=BETA, norm="rms")
    rows = [[a, x], [hat, x], [g, x], [None, x]]
    script = Script([p, other], *rows)
    optimizer.step(script)
    optimizer.flush() if variant == "mvr3" else None
    before = p.detach().clone()
    optimizer.step(script)
    zero = torch.zeros(2, dtype=torch.float64)
    moves = g is not None or hat is not None
    g, hat = (zero if t is None else t for t in (g, hat))
    m = BETA * a + (1 - BETA) * g + GAMMA * BETA * (g - hat) if moves else a
    assert torch.allclose(momentum(optimizer, p), m, rtol=1e-14, atol=1e-15)
    if variant == "mvr2":  # the update of the first step was still pending
        before += rms_move(a, 0.1)
        optimizer.flush()
    assert torch.allclose(p, before + rms_move(m, 0.1) if moves else before, rtol=0, atol=1e-14)


# ---- AdamW in the same optimizer ------------------------------------------------------------------------------------------


@variants
def test_adamw_groups_equal_torch(variant):
    """Pass 1 is dropped, the update deferred; lr and betas move; a parameter is unused now and then."""
    start = [torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for s in [(3, 4), (5,), ()]]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    matrix = nn.Parameter(torch.eye(3, dtype=torch.float64))
    options = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}
    optimizer = VARIANTS[variant]([{"params": [matrix]}, {"params": ours, "norm": "adamw"}], **options)
    reference = torch.optim.AdamW(theirs, **options)

    def loss(params, k):
        used = [p for i, p in enumerate(params) if i or k % 3]
        return sum((p - 0.1 * k).square().sum() for p in used) + sum((k * p).sin().sum() for p in used)

    for k in range(20):
        for group in optimizer.param_groups + reference.param_groups:
            group["lr"], group["betas"] = 0.1 / (k + 1), (0.8 + 0.005 * k, 0.9)

        def closure(k=k):
            (loss(ours, k) + matrix.square().sum()).backward()

        optimizer.step(closure)
        reference.zero_grad()
        loss(theirs, k).backward()
        reference.step()
    optimizer.flush()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() <= 1e-14 * q.norm()


def test_adamw_learning_rate_has_the_radius():
    p, q = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = Gluon([p], lr=0.1, radius=0.5, norm="adamw", betas=(0.9, 0.95))
    reference = torch.optim.AdamW([q], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        p.grad, q.grad = vector(1.0, -2.0), vector(1.0, -2.0)
        optimizer.step()
        reference.step()
    assert torch.allclose(p, q, rtol=1e-15)


# ---- schedules ------------------------------------------------------------------------------------------------------------


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("cls", [GluonMVR2, GluonMVR3])
def test_schedulers(cls, scheduler):
    """The deferred update of MVR-2 is as Gluon's: γ = 0 is Gluon bit for bit under any scheduler, AdamW groups included."""
    gluon, other = Net(), Net()
    first, second = Gluon(gluon.groups(), weight_decay=0.1), cls(other.groups(), weight_decay=0.1, gamma=0.0)
    path = train(gluon, first, range(6), SCHEDULERS[scheduler](first))
    assert same(train(other, second, range(6), SCHEDULERS[scheduler](second))[-1], path[-1])
    assert not same(path[0], path[1])


@pytest.mark.parametrize("norm", ["rms", "adamw"])
def test_pending_update_keeps_its_lr_decay_and_radius(norm):
    results = []
    for change in (False, True):
        p = parameter(1.0, 2.0)
        optimizer = GluonMVR2([p], lr=0.1, weight_decay=0.5, radius=2.0, norm=norm)
        optimizer.step(Script([p], [vector(1.0, 3.0)]))
        if change:
            optimizer.param_groups[0].update(lr=7.0, weight_decay=0.1, radius=11.0, betas=(0.1, 0.2))
        optimizer.flush()
        results.append(p.detach().clone())
    assert torch.equal(*results)
    if norm == "rms":
        expected = vector(1.0, 2.0) * (1 - 0.1 * 0.5) + rms_move(vector(1.0, 3.0), 0.2)
        assert torch.allclose(results[0], expected, rtol=1e-15)


def test_tensor_learning_rate():
    paths = []
    for lr in (0.25, torch.tensor(0.25)):
        net = Net()
        paths.append(train(net, GluonMVR2(net.groups(), lr=lr), range(3)))
    assert same_path(*paths)


# ---- state ----------------------------------------------------------------------------------------------------------------


def by_pickle(net, optimizer, variant):
    return pickle.loads(pickle.dumps((net, optimizer)))


def by_deepcopy(net, optimizer, variant):
    return copy.deepcopy((net, optimizer))


def by_state_dict(net, optimizer, variant):
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    model_state, state = torch.load(file, weights_only=True)
    other = Net()
    other.load_state_dict(model_state)
    fresh = make(variant, other, weight_decay=0.9)  # what is loaded has another
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
    "dcp": partial(by_distributed_checkpoint, False),
    "dcp_flat": partial(by_distributed_checkpoint, True),
}


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
@variants
def test_round_trip_in_mid_run(variant, way, done):
    """Before and after the first step, a pending update included: the same trajectory, bit for bit."""
    net = Net()
    optimizer = make(variant, net, weight_decay=0.2)
    for k in range(done):
        optimizer.step(closure_of(net, k))
    other, loaded = WAYS[way](net, optimizer, variant)
    assert other is not net and loaded.updates == optimizer.updates
    expected = train(net, optimizer, range(done, 6))
    assert same_path(train(other, loaded, range(done, 6)), expected)
    assert loaded.updates == optimizer.updates == 6


@variants
def test_the_first_state_has_everything(variant):
    """Where it did not, torch.distributed.checkpoint would take a step with zero gradients."""
    net = Net()
    optimizer = make(variant, net)
    before = weights(net)
    first = optimizer.state_dict()
    get_optimizer_state_dict(net, optimizer)
    assert optimizer.updates == 0 and same(before, weights(net))
    shapes = {i: {n: v.shape for n, v in s.items() if isinstance(v, Tensor)} for i, s in first["state"].items()}
    optimizer.step(closure_of(net, 0))
    later = optimizer.state_dict()
    assert {i: set(s) for i, s in first["state"].items()} == {i: set(s) for i, s in later["state"].items()}
    assert shapes == {i: {n: v.shape for n, v in s.items() if isinstance(v, Tensor)} for i, s in later["state"].items()}
    assert all("momentum_buffer" in s for s in shapes.values())


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
    assert not all(rounded), "the momentum is finer than the parameter"
    other = copy.deepcopy(net)
    loaded = VARIANTS[variant]([{"params": [other.weight]}, {"params": [other.bias], "norm": "adamw"}], lr=0.02)
    loaded.load_state_dict(saved)
    for p, i in ((other.weight, 0), (other.bias, 1)):
        for name in ("momentum_buffer", "exp_avg_sq")[: 1 + i]:
            assert loaded.state[p][name].dtype == torch.float32
            assert torch.equal(loaded.state[p][name], saved["state"][i][name])


def test_float64_parameters_have_float64_momentum():
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    assert momentum(Gluon([p]), p).dtype == torch.float64


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


@variants
def test_loaded_state_is_no_alias(variant):
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


def test_a_state_of_another_optimizer_is_refused():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    adamw = torch.optim.AdamW([q])
    with pytest.raises(ValueError, match="momentum_buffer"):
        Gluon([p]).load_state_dict(adamw.state_dict())


# ---- guards ---------------------------------------------------------------------------------------------------------------


@two_passes
@pytest.mark.parametrize("steps", [0, 1])
def test_stale_gradients_are_refused(variant, steps):
    net = Net()
    optimizer = make(variant, net)
    for k in range(steps):
        optimizer.step(closure_of(net, k))
    net.first.bias.grad = torch.zeros_like(net.first.bias)
    before = weights(net)
    with pytest.raises(RuntimeError, match="gradients of an earlier pass"):
        optimizer.step(closure_of(net, 1))
    optimizer.zero_grad()
    assert same(before, weights(net))
    optimizer.step(closure_of(net, 1))


def zero_by_none(net):
    for p in net.parameters():
        p.grad = None


ZEROING = {
    "model": lambda net: net.zero_grad(),
    "none": zero_by_none,
    "model_in_place": lambda net: net.zero_grad(set_to_none=False),
    "one_in_place": lambda net: net.first.weight.grad is not None and net.first.weight.grad.zero_(),
    "one_replaced": lambda net: setattr(net.first.weight, "grad", torch.zeros_like(net.first.weight)),
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("way", ZEROING)
@pytest.mark.parametrize("variant", ["mvr2", "nested"])
def test_a_closure_that_zeroes_in_the_second_pass_is_refused(variant, way, micro_batches):
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    calls = []

    def closure():
        calls.append(0)
        if len(calls) == 2:
            ZEROING[way](net)
        for i in range(micro_batches):
            closure_of(net, i)()

    with pytest.raises(RuntimeError, match="between the two passes"):
        optimizer.step(closure)


@pytest.mark.parametrize("set_to_none", [True, False])
@variants
def test_the_optimizers_own_zero_grad_is_ignored_in_the_second_pass(variant, set_to_none):
    nets, paths = (Net(), Net()), []
    for net, zeroes in zip(nets, (False, True), strict=True):
        optimizer = make(variant, net)
        for k in range(4):

            def closure(net=net, zeroes=zeroes, optimizer=optimizer, k=k):
                if zeroes:
                    optimizer.zero_grad(set_to_none=set_to_none)
                loss = net(batch(k))
                loss.backward()
                return loss

            optimizer.step(closure)
        optimizer.flush()
        paths.append(weights(net))
    assert same(*paths)


@pytest.mark.parametrize("variant", ["mvr3"])
def test_zero_grad_after_backward_in_the_second_pass_is_ignored(variant):
    nets, results = (Net(), Net()), []
    for net, zeroes in zip(nets, (False, True), strict=True):
        optimizer = make(variant, net)

        def previous(net=net, zeroes=zeroes, optimizer=optimizer):
            closure_of(net, 0)()
            if zeroes:
                optimizer.zero_grad()

        for _ in range(3):
            optimizer.step(closure_of(net, 0), previous)
        results.append(weights(net))
    assert same(*results)


@variants
def test_zero_grad_works_outside_and_after_an_error(variant):
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    for fail_at in (1, 2):
        calls = []

        def closure(calls=calls, fail_at=fail_at):
            calls.append(0)
            closure_of(net, 1)()
            if len(calls) == fail_at:
                raise KeyError("the user's")

        if fail_at == 1 or variant in ("mvr2", "mvr3", "nested"):
            with pytest.raises(KeyError):
                optimizer.step(closure)
        else:
            closure_of(net, 1)()
        assert any(p.grad is not None for p in net.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        assert not any(p._backward_hooks for p in net.parameters())


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        Gluon(embedding.parameters()).step()


# ---- the passes -----------------------------------------------------------------------------------------------------------


@two_passes
def test_both_passes_see_the_same_random_numbers(variant):
    """And afterwards the generator is where one pass leaves it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = VARIANTS[variant](net.parameters(), norm="auto", lr=0.1)
    for _ in range(3):
        drawn = []

        def closure(drawn=drawn):
            hidden = net[1](torch.ones_like(net[0](torch.ones(3, 6))))
            drawn.append((hidden == 0, torch.rand(3)))
            net[2](hidden * net[0](torch.ones(3, 6))).sum().backward()

        state = torch.get_rng_state()
        optimizer.step(closure)
        after = torch.get_rng_state()
        if len(drawn) == 2:
            assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
        torch.set_rng_state(state)
        closure()
        net.zero_grad()
        assert torch.equal(after, torch.get_rng_state()) and not torch.equal(after, state)
    assert len(drawn) == 3


@two_passes
def test_random_numbers_of_previous_do_not_count(variant):
    """Where `previous` draws otherwise, the generator still goes on from where the closure leaves it."""
    p = parameter(1.0, 2.0)
    optimizer = VARIANTS[variant]([p], norm="rms")
    for k in range(3):

        def closure(draws=2):
            torch.rand(draws)
            (p * vector(3.0, 1.0)).sum().backward()

        torch.manual_seed(k)
        optimizer.step(closure, partial(closure, 5))
        after = torch.get_rng_state()
        torch.manual_seed(k)
        torch.rand(2)
        assert torch.equal(after, torch.get_rng_state())


@variants
def test_accumulation_by_several_backwards(variant):
    whole, parts = Net(), Net()
    first, second = make(variant, whole), make(variant, parts)
    for k in range(5):

        def closure(k=k):
            return sum((parts(batch(k)[i : i + 1]) / 4).backward() or 1 for i in range(4))

        def at_once(k=k):
            sum(whole(batch(k)[i : i + 1]) / 4 for i in range(4)).backward()

        first.step(at_once)
        assert second.step(closure) == 4
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (p - q).norm() < 1e-10 * q.norm()


@variants
def test_steps_inside_no_grad(variant):
    nets, paths = (Net(), Net()), []
    for net, mode in zip(nets, (torch.enable_grad, torch.no_grad), strict=True):
        with mode():
            paths.append(train(net, make(variant, net), range(3)))
    assert same_path(*paths)


@two_passes
def test_a_compiled_closure(variant):
    nets, paths = (Net(), Net()), []
    for net, compiled in zip(nets, (False, True), strict=True):
        forward = torch.compile(net, backend="aot_eager") if compiled else net
        optimizer = make(variant, net)
        for k in range(4):

            def closure(forward=forward, k=k):
                loss = forward(batch(k))
                loss.backward()
                return loss

            optimizer.step(closure)
        paths.append(weights(net))
    for p, q in zip(*paths, strict=True):
        assert (p - q).norm() < 1e-10 * q.norm()


# ---- memory ---------------------------------------------------------------------------------------------------------------


class Census(TorchDispatchMode):
    """The most bytes that were alive at once among `tensors` and what is computed inside."""

    def __init__(self, tensors):
        super().__init__()
        self.peak, self._alive = 0, {}
        self._count(tensors)

    def _count(self, tensors):
        for t in tensors:
            storage = t.untyped_storage()
            reference = StorageWeakRef(storage)
            self._alive[reference.cdata] = (reference, storage.nbytes())
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._count(t for t in tree_iter(result) if isinstance(t, Tensor))
        return result


def memory(variant, norm, shape):
    """Peak and resting memory of a step, in parameter-sized tensors (of all weights)."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(*shape[:: (-1) ** i], bias=False) for i in range(6)])
    cls = VARIANTS[variant]
    optimizer = cls(net.parameters(), norm=norm)

    def closure():
        x = torch.ones(1, shape[0])
        for layer in net:
            x = layer(x)
        x.sum().backward()

    for _ in range(2):
        optimizer.step(closure)
    unit = sum(p.nbytes for p in net.parameters())
    held = [*net.parameters(), *(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))]
    with Census(held) as census:
        optimizer.step(closure)
    rest = sum(t.untyped_storage().nbytes() for t in held)
    return census.peak / unit, rest / unit


@pytest.mark.parametrize("shape", [(64, 64), (64, 192)])
@pytest.mark.parametrize("norm", ["spectral", "sign", "colnorm", "frobenius", "adamw"])
def test_no_variant_needs_more_memory_than_gluon(norm, shape):
    peak, rest = memory("gluon", norm, shape)
    assert rest == (3 if norm == "adamw" else 2), "weights and one momentum (AdamW: two)"
    for variant in ("mvr1", "mvr2", "mvr3"):
        other_peak, other_rest = memory(variant, norm, shape)
        assert other_rest == rest, variant
        assert other_peak <= peak + 0.01, variant  # some activations
    nested_peak, nested_rest = memory("nested", norm, shape)
    more = 0 if norm == "adamw" else 1
    assert nested_rest == rest + more and nested_peak <= peak + more + 0.01


# ---- arguments ------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD = [
    *[("lr", v, "≥ 0") for v in (-1, -1e-9, NAN, INF, -INF, "0.1", None, True, [0.1], torch.ones(2), 1j)],
    *[("momentum", v, r"\[0, 1\)") for v in (-0.1, 1, 1.0, 2, NAN, INF, "0.9", None, False)],
    *[("weight_decay", v, "≥ 0") for v in (-0.1, NAN, INF, "0", None, True)],
    *[("radius", v, "> 0") for v in (0, -1, NAN, INF, "1", None, True)],
    *[("eps", v, "≥ 0") for v in (-1e-8, NAN, INF, "0", None, True)],
    *[("betas", v, r"two numbers in \[0, 1\)") for v in (0.9, (0.9,), (0.9, 1), (-0.1, 0.9), ("a", 0), None, (0.9, NAN), "ab")],
    *[("norm", v, "one of spectral, sign") for v in ("Spectral", "l2", "", None, 2, ["sign"])],
    *[("scale", v, "one of scion, muon, moonlight, none") for v in ("spectral", None, 1.0, "Muon")],
    *[("polar", v, "one of polar_express, newton_schulz, svd") for v in ("ns", None, 5, "SVD")],
]  # fmt: skip


def assert_names(error, name, value, allowed):
    assert error.match(rf"^{name}.* must be .*{allowed}")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name, value, allowed", BAD, ids=lambda v: repr(v)[:20])
def test_bad_arguments(name, value, allowed):
    with pytest.raises(ValueError) as error:
        Gluon([nn.Parameter(torch.ones(2, 2))], **{name: value})
    assert_names(error, name, value, allowed)
    optimizer = GluonMVR2([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], name: value})
    assert_names(error, name, value, allowed)
    assert len(optimizer.param_groups) == 1, "a refused group is not added"


@pytest.mark.parametrize("value", [-0.1, NAN, INF, "0.1", None, True])
@pytest.mark.parametrize("cls", [GluonMVR1, GluonMVR2, GluonMVR3])
def test_bad_gamma(cls, value):
    with pytest.raises(ValueError) as error:
        cls([nn.Parameter(torch.ones(2, 2))], gamma=value)
    assert_names(error, "gamma", value, "≥ 0")


@pytest.mark.parametrize("value", [0, -0.1, 1.1, NAN, "0.5", True])
def test_bad_inner(value):
    with pytest.raises(ValueError) as error:
        GluonMVR2([nn.Parameter(torch.ones(2, 2))], inner=value)
    assert_names(error, "inner", value, r"\(0, 1\]")


@pytest.mark.parametrize("cls, option", [(Gluon, "gamma"), (Gluon, "nesterov"), (GluonMVR1, "inner"), (GluonMVR3, "inner")])
def test_unknown_options(cls, option):
    with pytest.raises(TypeError, match=option):
        cls([nn.Parameter(torch.ones(2, 2))], **{option: 0.5})


@pytest.mark.parametrize("norm", ["spectral", "colnorm", "rownorm"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_in_a_matrix_norm(norm, shape):
    with pytest.raises(ValueError, match=rf"norm='{norm}' needs .*2 dimensions.*shape \({', '.join(map(str, shape))}"):
        Gluon([nn.Parameter(torch.ones(shape))], norm=norm)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_parameters_that_are_not_real(dtype):
    with pytest.raises(ValueError, match=rf"params must be real floating-point tensors.*{dtype}"):
        Gluon([torch.ones(2, 2, dtype=dtype)])


def test_parameters_that_are_no_leaves_or_no_tensors():
    with pytest.raises(ValueError, match="leaf"):
        Gluon([nn.Parameter(torch.ones(2, 2)) * 2])
    with pytest.raises(TypeError):
        Gluon([1.0])
    with pytest.raises(ValueError, match="empty"):
        Gluon([])


def test_a_parameter_twice():
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"params must name every parameter once.*\(2, 3\)"):
        Gluon([p, q, p])
    with pytest.raises(ValueError, match=r"params must name every parameter once.*\(2, 3\)"):
        Gluon([{"params": [p, q]}, {"params": [p]}])
    optimizer = Gluon([p])
    with pytest.raises(ValueError, match="params must name every parameter once"):
        optimizer.add_param_group({"params": p})
    assert len(optimizer.param_groups) == 1


def test_named_parameters():
    net = Net()
    optimizer = Gluon(net.named_parameters(), norm="auto")
    assert optimizer.param_groups[0]["param_names"][0] == "gain"
    train(net, optimizer, range(2))
