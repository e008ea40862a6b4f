"""Steps in special cases: zeros, missing gradients, first gradients, AdamW groups, pending updates."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import Tensor, nn

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3
from tests.helpers.optimizers import (
    ALL,
    BETA,
    CLASSES,
    DEFERRED,
    GAMMA,
    NORMS,
    VARIANTS,
    Net,
    Q,
    Script,
    all_classes,
    closure_of,
    deferred,
    distance,
    gaussian,
    make,
    momentum,
    one_pass,
    parameter,
    rms_move,
    same,
    train,
    variants,
    vector,
    weights,
)

# ---- signatures and defaults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CLASSES)
def test_defaults(variant):
    cls = CLASSES[variant]
    group = cls([nn.Parameter(torch.eye(2))]).param_groups[0]
    expected = {
        "norm": "spectral", "radius": 1.0, "momentum": 0.9, "weight_decay": 0.0, "scale": "scion", "polar": "polar_express",
        "bias_correction": True,
    }  # fmt: skip
    if variant in ("mvr1", "mvr3"):
        expected["gamma"] = 1.0
    if variant in ("single_batch", "previous_batch"):
        expected["gamma"] = 0.1
    if variant in ("mvr2", "mvr3"):
        expected["q"] = 0.5
    assert expected.items() <= group.items()
    assert {"gamma", "q"} & group.keys() == {"gamma", "q"} & expected.keys()
    assert isinstance(cls([parameter(1.0)], norm="rms"), torch.optim.Optimizer)
    assert list(inspect.signature(cls.step).parameters) == ["self", "closure"]


@one_pass
def test_gradients_in_place_or_from_a_closure(variant):
    by_closure, in_place = Net(), Net()
    optimizer = make(variant, in_place)
    for k in range(3):
        closure_of(in_place, k)()
        assert optimizer.step() is None
        assert all(p.grad is None for p in in_place.parameters())
    assert same(train(by_closure, make(variant, by_closure), range(3))[-1], weights(in_place))


# ---- zeros ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("polar", ["polar_express", "newton_schulz", "svd"])
@pytest.mark.parametrize("norm", NORMS)
@variants
def test_zero_gradients(variant, norm, polar):
    """LMO(0) = 0, so the weights only decay, and later gradients work as usual."""
    p = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
    start = p.detach().clone()
    optimizer = VARIANTS[variant]([p], lr=0.1, weight_decay=0.5, norm=norm, polar=polar)
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    optimizer.step(Script([p], [zero], [zero]))
    optimizer.flush()
    assert torch.equal(p, start * (1 - 0.1 * 0.5))
    for _ in range(3):
        optimizer.step(Script([p], [one], [one]))
    optimizer.flush()
    assert p.isfinite().all() and (p < start * (1 - 0.1 * 0.5) ** 4).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (0, 2, 3)])
@all_classes
def test_empty_parameters(variant, shape):
    """They are accepted next to other parameters and in a group of their own."""
    p, empty, lone = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    optimizers = [VARIANTS[variant]([p, lone], norm="auto", view="stack")] if variant != "muon_mvr" else []
    if variant != "muon_mvr":
        optimizers[0].add_param_group({"params": [empty], "norm": "adamw"})
    else:
        optimizers = [make(variant, nn.ParameterList([p, empty, lone]))]
    for optimizer in optimizers:
        for _ in range(3):
            optimizer.step(lambda: (p.sum() + empty.sum() + lone.sum()).backward())
        optimizer.flush()
        assert optimizer.updates == 3 and (p < 1).all()
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_matrix_in_every_norm(norm):
    p = nn.Parameter(torch.ones(0, 4))
    optimizer = Gluon([p], norm=norm)
    for _ in range(2):
        p.grad = torch.zeros(0, 4)
        optimizer.step()
    assert optimizer.updates == 2


# ---- steps without previous weights ---------------------------------------------------------------------------------------

# The weight of the past in the k-th average with bias correction.
CORRECTED = [BETA * (1 - BETA**k) / (1 - BETA ** (k + 1)) for k in range(4)]


def test_after_a_flush_the_next_step_is_gluons():
    p = parameter(1.0, 2.0)
    a, b, hat, c = vector(1.0, 0.0), vector(2.0, 1.0), vector(9.0, 9.0), vector(0.0, 3.0)
    optimizer = GluonMVR1([p], lr=0.1, momentum=BETA, gamma=GAMMA, norm="rms")
    script = Script([p], [a], [b], [hat], [c])
    optimizer.step(script)
    optimizer.flush()
    assert optimizer.updates == 1
    at = p.detach().clone()
    optimizer.flush()
    assert optimizer.updates == 1 and torch.equal(p, at), "a second flush does nothing"
    optimizer.step(script)
    assert script.calls == 2, "no extra pass"
    m = CORRECTED[1] * a + (1 - CORRECTED[1]) * b
    assert torch.allclose(momentum(optimizer, p), m, rtol=1e-14)
    optimizer.step(script)
    assert script.calls == 4
    m = CORRECTED[2] * m + (1 - CORRECTED[2]) * c + GAMMA * CORRECTED[2] * (c - hat)
    assert torch.allclose(momentum(optimizer, p), m, rtol=1e-14)


@pytest.mark.parametrize("variant", [v for v in ALL if v not in DEFERRED])
def test_flush_does_nothing_elsewhere(variant):
    net = Net()
    optimizer = make(variant, net)
    optimizer.step(closure_of(net, 0))
    before = weights(net)
    optimizer.flush()
    assert optimizer.updates == 1 and same(before, weights(net))


@all_classes
def test_flush_before_the_first_step(variant):
    net = Net()
    before = weights(net)
    optimizer = make(variant, net)
    optimizer.flush()
    assert optimizer.updates == 0 and same(before, weights(net))


def late(variant, b, hat, c):
    """The LMO's input for a parameter whose first gradient is b and whose second is c, compared with hat."""
    beta, rest = CORRECTED[1], (1 - Q) / (2 - Q)
    plain = beta * b + (1 - beta) * c
    d = c + rest * (b - hat)
    return {
        "gluon": plain,
        "mvr1": plain + GAMMA * beta * (c - hat),
        "mvr2": beta * b + (1 - beta) * d,
        "mvr3": beta * b + (1 - beta) * d + GAMMA * beta * (c - hat),
        "single_batch": (1 - GAMMA) * plain + GAMMA * c,
        "previous_batch": plain + GAMMA * beta * (c - hat),
    }[variant]


@variants
def test_a_group_added_later(variant):
    """The new group's first gradient at the old weights does not count. All groups have the same number of updates."""
    p, q = parameter(1.0, 2.0), parameter(3.0, 4.0)
    a, b, c = (gaussian(2, seed=k) for k in range(3))
    wrong, hat = vector(9.0, -9.0), vector(-5.0, 6.0)
    optimizer = VARIANTS[variant]([p], lr=0.1, momentum=BETA, norm="rms")
    optimizer.step(Script([p], [a], [a]))
    optimizer.add_param_group({"params": [q], "norm": "rms", "radius": 3.0})
    start = q.detach().clone()
    passes = {"gluon": ([b], [c]), "single_batch": ([b], [c]), "previous_batch": ([b, hat], [c, a])}
    second, third = passes.get(variant, ([wrong, b], [hat, c]))
    optimizer.step(Script([p, q], *[[row, row] for row in second]))
    assert {group["updates"] for group in optimizer.param_groups} == {optimizer.updates}
    optimizer.step(Script([p, q], *[[row, row] for row in third]))
    optimizer.flush()
    assert {group["updates"] for group in optimizer.param_groups} == {3} and optimizer.updates == 3
    assert torch.allclose(q, start + rms_move(b, 0.3) + rms_move(late(variant, b, hat, c), 0.3), rtol=0, atol=1e-13)


@variants
def test_a_first_gradient_that_comes_later(variant):
    """A parameter that was unused so far also takes its first gradient at full weight, and its average starts there."""
    p, q, one = parameter(1.0, 2.0), parameter(3.0, 4.0), vector(1.0, 1.0)
    b, c, wrong, hat = vector(2.0, 5.0), vector(-1.0, 1.0), vector(9.0, 9.0), vector(0.5, -3.0)
    optimizer = VARIANTS[variant]([p, q], lr=0.1, momentum=BETA, norm="rms")
    before = q.detach().clone()
    # In the first step q has a gradient only in the comparing pass, which does not count as a first gradient.
    optimizer.step(Script([p, q], [one, None], [one, wrong]))
    assert torch.equal(q, before) and not momentum(optimizer, q).any()
    passes = {"gluon": ([b], [c]), "single_batch": ([b], [c]), "previous_batch": ([b, hat], [c, None])}
    second, third = passes.get(variant, ([wrong, b], [hat, c]))
    optimizer.step(Script([p, q], *[[one, g] for g in second]))
    optimizer.step(Script([p, q], *[[one, g] for g in third]))
    optimizer.flush()
    expected = before + rms_move(b, 0.1) + rms_move(late(variant, b, hat, c), 0.1)
    assert torch.allclose(q, expected, rtol=0, atol=1e-13)


# ---- None -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "adamw"])
@variants
def test_none_in_both_passes_changes_nothing(variant, norm):
    p, q, one = parameter(1.0, 2.0), parameter(3.0, 4.0), vector(1.0, 3.0)
    optimizer = VARIANTS[variant]([p, q], lr=0.1, weight_decay=0.5, norm=norm)
    optimizer.step(Script([p, q], [one, one], [one, None]))
    optimizer.flush()
    before, state = q.detach().clone(), copy.deepcopy(optimizer.state[q])
    for _ in range(3):
        optimizer.step(Script([p, q], *[[one, None]] * 2))
    optimizer.flush()
    assert torch.equal(q, before), "neither direction nor decay"
    assert optimizer.state[q].keys() == state.keys()
    for name, value in state.items():
        now = optimizer.state[q][name]
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, name
    assert optimizer.updates == 4


@pytest.mark.parametrize("g, hat", list(itertools.product([None, vector(2.0, -1.0)], [None, vector(5.0, 3.0)])))
@pytest.mark.parametrize("variant", ["mvr1", "mvr2", "mvr3", "previous_batch"])
def test_none_in_one_pass_is_zero(variant, g, hat):
    p, other, one = parameter(1.0, 2.0), parameter(0.0, 1.0), vector(3.0, 4.0)
    a, zero = vector(1.0, 1.0), vector(0.0, 0.0)
    optimizer = VARIANTS[variant]([p, other], lr=0.1, momentum=BETA, norm="rms")
    rows = [[a, one], [hat, one], [g, one], [None, one]]
    script = Script([p, other], *rows)
    optimizer.step(script)
    optimizer.step(script)
    optimizer.flush()
    expected = vector(1.0, 2.0) + rms_move(a, 0.1)
    if g is not None or hat is not None:
        g, hat = (zero if t is None else t for t in (g, hat))
        expected += rms_move(late(variant, a, hat, g), 0.1)
    assert torch.allclose(p, expected, rtol=0, atol=1e-14)


@all_classes
def test_a_step_without_gradients_in_place_changes_nothing(variant):
    """As in torch. Variants with two passes need a closure."""
    net = Net()
    optimizer = make(variant, net, weight_decay=0.5)
    optimizer.step(closure_of(net, 0))
    optimizer.flush()
    before, state = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    if variant in ("gluon", "single_batch", "muon_mvr"):
        optimizer.step()
    else:
        with pytest.raises(TypeError, match="closure"):
            optimizer.step()
    assert same(before, weights(net))
    for i, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state[i][n]) for n, v in values.items() if isinstance(v, Tensor))


# ---- AdamW in the same optimizer ------------------------------------------------------------------------------------------


@variants
def test_adamw_groups_equal_torch(variant):
    """Also if the pass at other weights is dropped, the update is deferred, lr moves, and a parameter is sometimes unused."""
    start = [gaussian(*s, seed=i) for i, s in enumerate([(3, 4), (5,), ()])]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    matrix = nn.Parameter(torch.eye(3, dtype=torch.float64))
    options = {"weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}
    optimizer = VARIANTS[variant]([{"params": [matrix]}, {"params": ours, "norm": "adamw"} | options], lr=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.1, **options)

    def loss(params, k):
        used = [p for i, p in enumerate(params) if i or k % 3]
        return sum((p - 0.1 * k).square().sum() for p in used) + sum((k * p).sin().sum() for p in used)

    for k in range(20):
        for group in optimizer.param_groups + reference.param_groups:
            group["lr"] = 0.1 / (k + 1)
        for group in (optimizer.param_groups[1], reference.param_groups[0]):
            group["betas"] = (0.8 + 0.005 * k, 0.9)

        def closure(k=k):
            (loss(ours, k) + matrix.square().sum()).backward()

        optimizer.step(closure)
        reference.zero_grad()
        loss(theirs, k).backward()
        reference.step()
    optimizer.flush()
    assert distance(map(Tensor.detach, ours), map(Tensor.detach, theirs)) <= 1e-14


def test_adamw_learning_rate_has_the_radius():
    p, q = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = Gluon([p], lr=0.1, radius=0.5, norm="adamw", betas=(0.9, 0.95))
    reference = torch.optim.AdamW([q], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        p.grad, q.grad = vector(1.0, -2.0), vector(1.0, -2.0)
        optimizer.step()
        reference.step()
    assert torch.allclose(p, q, rtol=1e-15)


# ---- pending updates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "adamw"])
@deferred
def test_a_pending_update_keeps_the_options_of_its_step(variant, norm):
    results = []
    for change in (False, True):
        p = parameter(1.0, 2.0)
        optimizer = VARIANTS[variant]([p], lr=0.1, weight_decay=0.5, radius=2.0, norm=norm)
        optimizer.step(Script([p], [vector(1.0, 3.0)]))
        if change:
            optimizer.param_groups[0].update(lr=7.0, weight_decay=0.1, radius=11.0)
            if norm == "adamw":
                optimizer.param_groups[0]["betas"] = (0.1, 0.2)
        optimizer.flush()
        results.append(p.detach().clone())
    assert torch.equal(*results)
    if norm == "rms":
        expected = vector(1.0, 2.0) * (1 - 0.1 * 0.5) + rms_move(vector(1.0, 3.0), 0.2)
        assert torch.allclose(results[0], expected, rtol=1e-15)


@deferred
def test_a_learning_rate_that_is_a_tensor_is_read_when_the_step_is_made(variant):
    """Schedulers fill it in place while the update is pending."""
    paths = []
    for lr in (0.25, torch.tensor(0.25)):
        net = Net()
        optimizer = make(variant, net, lr=lr)
        for k in range(3):
            optimizer.step(closure_of(net, k))
            if isinstance(lr, Tensor):
                for value in {id(group["lr"]): group["lr"] for group in optimizer.param_groups}.values():
                    value.mul_(0.5)
            else:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        optimizer.flush()
        paths.append(weights(net))
    assert same(*paths)


@pytest.mark.parametrize("cls", [GluonMVR1, GluonMVR2, GluonMVR3])
def test_nothing_is_pending_after_a_flush(cls):
    p = parameter(1.0, 2.0)
    optimizer = cls([p], norm="rms")
    assert not optimizer.param_groups[0]["pending"]
    optimizer.step(Script([p], [vector(1.0, 1.0)]))
    assert optimizer.param_groups[0]["pending"] and optimizer.updates == 0
    optimizer.flush()
    assert not optimizer.param_groups[0]["pending"] and optimizer.updates == 1


@pytest.mark.parametrize("norm", ["spectral", "sign", "colnorm", "rownorm", "frobenius", "rms"])
@variants
def test_a_stack_moves_like_its_matrices(variant, norm):
    """The weights of experts, (experts, d_out, d_in): each has its own polar factor and the factor of its own shape."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    targets = [torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(5)]
    stack, matrices = nn.Parameter(start.clone()), [nn.Parameter(m.clone()) for m in start]
    options = {"lr": 0.1, "weight_decay": 0.3, "norm": norm}
    together, apart = VARIANTS[variant]([stack], view="stack", **options), VARIANTS[variant](matrices, **options)
    for target in targets:
        together.step(lambda target=target: (stack - target).pow(4).sum().backward())
        apart.step(lambda target=target: (torch.stack(list(matrices)) - target).pow(4).sum().backward())
        assert distance([stack.detach()], [torch.stack(matrices).detach()]) < 1e-12


def test_new_parameters_in_a_group_get_their_state():
    """Frameworks replace the parameters of a group after construction, as accelerate does for FSDP2."""
    for variant in ALL:
        net, other = Net(), Net()
        optimizer = make(variant, net)
        optimizer.step(closure_of(net, 0))
        new = dict(zip(net.parameters(), other.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [new[p] for p in group["params"]]
        fresh, twin = make(variant, third := Net()), third
        optimizer.flush()
        for k in range(3):
            optimizer.step(closure_of(other, k))
            fresh.step(closure_of(twin, k))
        assert set(optimizer.state) == set(other.parameters()), "nothing is left of the old ones"
        assert distance(weights(other), weights(twin)) < 1e-12
