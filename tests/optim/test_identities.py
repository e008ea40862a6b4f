"""Identities between the algorithms and with published ones, and mistakes that other code has made."""

import copy
import itertools

import pytest
import torch
from torch import nn

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, MuonMVR, PreviousBatchMVR, SingleBatchMVR
from tests.helpers.optimizers import (
    BETA,
    GAMMA,
    VARIANTS,
    Net,
    Q,
    Script,
    batch,
    closure_of,
    deferred,
    distance,
    gaussian,
    make,
    momentum,
    parameter,
    rms_move,
    same_path,
    train,
    variants,
    vector,
    weights,
)

corrections = pytest.mark.parametrize("bias_correction", [True, False], ids=["corrected", "whole"])
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": BETA}


def path_of(cls, steps=8, schedule=None, flush=None, one_batch=False, **options):
    """The weights after every update of a small model with layers of every kind."""
    net = Net()
    optimizer = cls(net.groups(), **SETTINGS | options)
    path = {0: weights(net)}
    for k in range(steps):
        for group in optimizer.param_groups:
            group.update(schedule(k) if schedule else {})
        optimizer.step(closure_of(net, 0 if one_batch else k))
        path[optimizer.updates] = weights(net)
        if k == flush:
            optimizer.flush()
            path[optimizer.updates] = weights(net)
    optimizer.flush()
    path[optimizer.updates] = weights(net)
    return [path[k] for k in range(steps + 1)]


def path_distance(a, b):
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


def moving(k):
    return {"lr": 0.05 / (k + 1) ** 0.5, "momentum": 1 - (k + 2) ** -0.5}


# ---- the identities of the family -----------------------------------------------------------------------------------------


@corrections
@pytest.mark.parametrize("schedule", [None, moving])
@pytest.mark.parametrize(
    "cls, options",
    [
        (GluonMVR1, {"gamma": 0.0}),
        (GluonMVR2, {"q": 1.0}),
        (GluonMVR3, {"gamma": 0.0, "q": 1.0}),
        (SingleBatchMVR, {"gamma": 0.0}),
        (PreviousBatchMVR, {"gamma": 0.0}),
    ],
)
def test_without_a_correction_every_variant_is_gluon_bit_for_bit(cls, options, schedule, bias_correction):
    gluon = path_of(Gluon, schedule=schedule, bias_correction=bias_correction)
    assert same_path(path_of(cls, schedule=schedule, bias_correction=bias_correction, **options), gluon)


@pytest.mark.parametrize(
    "cls, options",
    [
        (GluonMVR1, {"gamma": 0.0}),
        (GluonMVR2, {"q": 1.0}),
        (GluonMVR3, {"gamma": 0.0, "q": 1.0}),
        (PreviousBatchMVR, {"gamma": 0.0}),
    ],
)
def test_without_a_correction_there_is_no_second_pass(cls, options):
    p = parameter(1.0, 2.0)
    script = Script([p], *[[vector(1.0, k)] for k in range(4)])
    optimizer = cls([p], norm="rms", **options)
    for _ in range(4):
        optimizer.step(script)
    assert script.calls == 4


@corrections
@pytest.mark.parametrize("flush", [None, 3])
def test_mvr3_with_q_one_is_mvr1_and_with_gamma_zero_mvr2(flush, bias_correction):
    options = {"flush": flush, "bias_correction": bias_correction}
    assert path_distance(path_of(GluonMVR3, gamma=0.7, q=1.0, **options), path_of(GluonMVR1, gamma=0.7, **options)) < 1e-12
    assert path_distance(path_of(GluonMVR3, gamma=0.0, q=Q, **options), path_of(GluonMVR2, q=Q, **options)) < 1e-12


@corrections
@pytest.mark.parametrize("flush", [None, 3])
def test_with_beta_zero_mvr2_and_mvr3_are_mvr1_with_beta_one_minus_q(flush, bias_correction):
    options = {"flush": flush, "bias_correction": bias_correction}
    expected = path_of(GluonMVR1, gamma=1.0, momentum=1 - Q, **options)
    assert path_distance(path_of(GluonMVR2, momentum=0.0, q=Q, **options), expected) < 1e-12
    for gamma in (1.0, GAMMA):
        assert path_distance(path_of(GluonMVR3, momentum=0.0, q=Q, gamma=gamma, **options), expected) < 1e-12


@corrections
@pytest.mark.parametrize("cls", [GluonMVR1, GluonMVR3])
def test_on_exact_gradients_a_full_correction_removes_all_momentum(cls, bias_correction):
    """If every batch is the same, MVR-1 and MVR-3 with γ = 1 are Gluon with β = 0, whatever β and q are."""
    same = {"one_batch": True, "bias_correction": bias_correction}
    plain = path_of(Gluon, momentum=0.0, **same)
    options = {"gamma": 1.0} | ({"q": Q} if cls is GluonMVR3 else {})
    assert path_distance(path_of(cls, **options, **same), plain) < 1e-9
    assert path_distance(path_of(Gluon, **same), plain) > 1e-3


def test_beta_and_one_minus_q_can_be_swapped_in_mvr3():
    """Only without bias correction and at γ = 1; not with bias correction, and not in MVR-2."""
    settings = {"momentum": BETA, "q": Q}, {"momentum": 1 - Q, "q": 1 - BETA}
    whole = [path_of(GluonMVR3, gamma=1.0, bias_correction=False, **s) for s in settings]
    assert path_distance(*whole) < 1e-12
    assert path_distance(*[path_of(GluonMVR3, gamma=1.0, **s) for s in settings]) > 1e-4
    assert path_distance(*[path_of(GluonMVR2, bias_correction=False, **s) for s in settings]) > 1e-4


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_single_batch_is_momentum_that_compares_with_the_last_gradient(gamma):
    """M = (1-γ)E + γg is M ← βM + (1-β)g + γβ(g - last g), the form in which it is published."""
    p, lr = parameter(1.0, 2.0, 3.0), 0.1
    optimizer = SingleBatchMVR([p], lr=lr, momentum=BETA, gamma=gamma, norm="rms", bias_correction=False)
    x, m, last = p.detach().clone(), None, None
    for k in range(20):
        g = gaussian(3, seed=k)
        p.grad = g.clone()
        optimizer.step()
        m = g if m is None else BETA * m + (1 - BETA) * g + gamma * BETA * (g - last)
        last = g
        x += rms_move(m, lr)
        assert torch.allclose(p, x, rtol=0, atol=1e-13)


# ---- other people's optimizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, rule", [("muon", "original"), ("moonlight", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_muon_from_the_first_step_on(nesterov, scale, rule):
    """The tolerance is 2% because torch multiplies in bfloat16. SingleBatchMVR with γ = 1-β is Nesterov momentum, here without
    bias correction because torch has none."""
    start = [gaussian(*s, dtype=torch.float32) for s in [(16, 16), (32, 16), (16, 48)]]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    settings = {"scale": scale, "polar": "newton_schulz"}
    if nesterov:
        optimizer = SingleBatchMVR(ours, gamma=0.05, bias_correction=False, **options, **settings)
    else:
        optimizer = Gluon(ours, **options, **settings)
    reference = torch.optim.Muon(theirs, nesterov=nesterov, adjust_lr_fn=rule, **options)
    for k in range(12):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            g = gaussian(*p.shape, seed=100 * k + i, dtype=torch.float32)
            if nesterov and k == 0:  # so that the averages agree: ours starts at g_0, torch's at zero
                g.zero_()
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        reference.step()
        for p, q, w in zip(ours, theirs, start, strict=True):
            assert (p - q).norm() <= 0.02 * (q - w).norm(), f"after step {k}"


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("schedule", [lambda k: BETA, lambda k: 1 - (k + 2) ** -0.5], ids=["constant", "moving"])
def test_bias_correction_is_an_average_that_starts_from_zero(schedule, norm):
    p, q = nn.Parameter(gaussian(4, 4)), gaussian(4, 4)
    optimizer = Gluon([p], lr=0.1, norm=norm, polar="svd")
    average, total = torch.zeros_like(q), 0.0
    for k in range(20):
        beta, g = schedule(k), gaussian(4, 4, seed=k)
        optimizer.param_groups[0]["momentum"] = beta
        p.grad = g.clone()
        optimizer.step()
        average, total = beta * average + (1 - beta) * g, beta * total + 1 - beta
        u, _, vh = torch.linalg.svd(average)
        q -= 0.1 * (u @ vh if norm == "spectral" else average / average.norm())
        assert (p - q).norm() < 1e-10 * q.norm()
        assert torch.allclose(momentum(optimizer, p), average / total, rtol=1e-12, atol=1e-14)


@variants
def test_bias_correction_makes_the_momentum_unbiased(variant):
    """Equal gradients give M = g from the first step on, without bias correction too, because M starts at g_0."""
    for bias_correction in (True, False):
        p, g = parameter(1.0, 2.0), vector(3.0, -4.0)
        optimizer = VARIANTS[variant]([p], momentum=BETA, norm="rms", bias_correction=bias_correction)
        for _ in range(5):
            optimizer.step(Script([p], [g], [g]))
            share = 1 - GAMMA if variant == "previous_batch" else 1.0  # it has already folded the next step's correction
            assert torch.allclose(momentum(optimizer, p), share * g, rtol=1e-14)


def test_bias_correction_changes_the_trajectory():
    for variant in VARIANTS:
        nets = Net(), Net()
        ends = [train(n, make(variant, n, bias_correction=b), range(4))[-1] for n, b in zip(nets, (True, False), strict=True)]
        assert distance(*ends) > 1e-4, variant


# ---- by hand --------------------------------------------------------------------------------------------------------------


@corrections
@variants
def test_values_of_a_second_step(variant, bias_correction):
    """These values detect swapped β, γ and q, and an overwritten gradient."""
    beta, gamma, q, lr = 0.9, 0.25, 0.4, 0.1
    p = parameter(5.0, 7.0)
    g0, hat, g1 = vector(1.0, 0.5), vector(0.25, 2.0), vector(-0.5, 3.0)
    b = beta / (1 + beta) if bias_correction else beta
    r = (1 - q) / (2 - q) if bias_correction else 1 - q
    plain = b * g0 + (1 - b) * g1
    d = g1 + r * (g0 - hat)
    expected = {
        "gluon": plain,
        "mvr1": plain + gamma * b * (g1 - hat),
        "mvr2": b * g0 + (1 - b) * d,
        "mvr3": b * g0 + (1 - b) * d + gamma * b * (g1 - hat),
        "single_batch": (1 - gamma) * plain + gamma * g1,
        "previous_batch": plain + gamma * b * (g1 - hat),
    }[variant]
    options = {name: {"gamma": gamma, "q": q}[name] for name in VARIANTS[variant].keywords}
    optimizer = VARIANTS[variant].func([p], lr=lr, momentum=beta, norm="rms", bias_correction=bias_correction, **options)
    rows = [[g0], [g1]] if variant in ("gluon", "single_batch") else [[g0], [hat], [g1], [hat]]
    script = Script([p], *rows)
    optimizer.step(script)
    optimizer.step(script)
    optimizer.flush()
    assert torch.allclose(p, vector(5.0, 7.0) + rms_move(g0, lr) + rms_move(expected, lr), rtol=0, atol=1e-14)


@corrections
@variants
def test_the_first_gradient_has_full_weight(variant, bias_correction):
    """M_0 is g, not (1-β) g, and is not corrected against zeros."""
    p, g, hat = parameter(1.0, 2.0, 3.0), vector(3.0, -4.0, 1.0), vector(0.5, 0.5, 9.0)
    optimizer = VARIANTS[variant]([p], lr=0.1, momentum=BETA, norm="rms", bias_correction=bias_correction)
    before = p.detach().clone()
    optimizer.step(Script([p], [g], [hat]))
    expected = g - GAMMA * hat if variant == "previous_batch" else g
    assert torch.allclose(momentum(optimizer, p), expected, rtol=1e-15)
    if variant in ("mvr2", "mvr3"):
        assert torch.allclose(optimizer.state[p]["estimate"], g, rtol=1e-15)
    optimizer.flush()
    assert torch.allclose(p, before + rms_move(g, 0.1), rtol=1e-15)


# ---- traps that other variance-reduced optimizers fell into ---------------------------------------------------------------


@variants
def test_momentum_does_not_alias_a_gradient(variant):
    p = parameter(1.0, 2.0)
    optimizer = VARIANTS[variant]([p], momentum=BETA, norm="rms")
    held = []

    def closure():
        (p * vector(3.0, 4.0)).sum().backward()
        held.append(p.grad)

    for _ in range(2):
        optimizer.step(closure)
    kept = {name: t.clone() for name, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
    for g in held:
        g.zero_()
    assert all(torch.equal(t, optimizer.state[p][name]) for name, t in kept.items())


@variants
def test_gradients_are_not_written_to(variant):
    """Other code may hold them."""
    net, held, kept = Net(), [], []
    optimizer = make(variant, net)

    def closure():
        net(batch(len(held))).backward()
        held.append([p.grad for p in net.parameters()])
        kept.append([p.grad.clone() for p in net.parameters()])

    for _ in range(3):
        optimizer.step(closure)
    assert same_path(held, kept)


@pytest.mark.parametrize("polar", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("variant", [*VARIANTS, "muon_mvr"])
def test_no_step_waits_for_the_device(variant, polar):
    """Meta tensors have no values, so code that reads one, such as `if norm > 1`, raises."""
    net = Net().to("meta")
    optimizer = make(variant, net, polar=polar)
    for _ in range(3):

        def closure():
            net(torch.zeros(4, 5, dtype=torch.int64, device="meta")).backward()

        optimizer.step(closure)
    optimizer.flush()
    assert optimizer.updates == 3
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones((), device="meta") > 1)


def estimation_error(cls, lr, **options):
    """The mean distance between M and the true gradient from step 100 on, on a quadratic with noisy curvature."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(20, dtype=torch.float64, generator=generator))
    optimizer = cls([p], lr=lr, momentum=0.97, norm="rms", **options)
    errors, at = [], torch.empty(20, dtype=torch.float64)
    for k in range(300):
        noise = torch.randn(2, 20, dtype=torch.float64, generator=generator)

        def closure(noise=noise):
            at.copy_(p.detach())
            (0.5 * ((1 + 3 * noise[0]) * p.square()).sum() + (noise[1] * p).sum()).backward()

        optimizer.step(closure)
        if k >= 100:
            errors.append(float((momentum(optimizer, p) - at).norm()))
    return sum(errors) / len(errors)


def test_a_full_correction_pays_only_at_small_steps():
    """With γ = 1 and a large β, the noise of g - ĝ grows with the step and lasts 1/(1-β) steps. This is not a bug."""
    assert estimation_error(GluonMVR1, 0.01, gamma=1.0) < 0.7 * estimation_error(Gluon, 0.01)
    assert estimation_error(GluonMVR1, 0.3, gamma=1.0) > 1.3 * estimation_error(GluonMVR1, 0.3, gamma=0.1)


# ---- classes --------------------------------------------------------------------------------------------------------------


def test_passes_and_deferred_of_the_classes():
    """The trainer uses these, never the class's name."""
    facts = {cls: (cls.deferred, cls.passes) for cls in (Gluon, SingleBatchMVR, PreviousBatchMVR, MuonMVR)}
    assert facts == {Gluon: (False, 1), SingleBatchMVR: (False, 1), PreviousBatchMVR: (False, 2), MuonMVR: (False, 1)}
    assert {(cls.deferred, cls.passes) for cls in (GluonMVR1, GluonMVR2, GluonMVR3)} == {(True, 2)}


@deferred
def test_copies_are_independent(variant):
    """A copy in mid-run has its own pending update."""
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    other, copied = copy.deepcopy((net, optimizer))
    before = weights(net)
    copied.flush()
    assert copied.updates == 1 and optimizer.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    optimizer.flush()
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(net), strict=True))


@pytest.mark.parametrize("pair", list(itertools.combinations(VARIANTS, 2)), ids="-".join)
def test_variants_differ(pair):
    nets = Net(), Net()
    ends = [train(net, make(variant, net), range(4))[-1] for net, variant in zip(nets, pair, strict=True)]
    assert distance(*ends) > 1e-4
