"""How steps call closures: how often, at which weights, with which random numbers and gradients, and after failures."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.helpers.optimizers import (
    BETA,
    DEFERRED,
    GAMMA,
    TWO_PASSES,
    VARIANTS,
    Net,
    Script,
    batch,
    closure_of,
    deferred,
    distance,
    make,
    momentum,
    parameter,
    rms_move,
    same,
    same_path,
    train,
    two_passes,
    variants,
    vector,
    weights,
)

# ---- how often, and where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, passes",
    [("gluon", 6), ("single_batch", 6), ("mvr1", 11), ("mvr2", 11), ("mvr3", 11), ("previous_batch", 12), ("muon_mvr", 6)],
)
def test_the_passes_of_six_updates(variant, passes):
    """2K - 1 for MVR-1, -2, -3, because the first step has no previous weights. `step` returns the loss of the pass for g."""
    net = Net()
    optimizer = make(variant, net)
    at = []  # the weights of each pass
    for k in range(6):
        before = weights(net)
        first = len(at)

        def closure(k=k):
            at.append(weights(net))
            loss = net(batch(k))
            loss.backward()
            return len(at), loss.detach()

        number, loss = optimizer.step(closure)
        assert optimizer.updates == (k if variant in DEFERRED else k + 1)
        calls = len(at) - first
        assert calls == (2 if variant == "previous_batch" or (variant in DEFERRED and k) else 1)
        if variant in DEFERRED:
            assert number == len(at), "the loss is that of the second pass"
            assert torch.equal(loss, net(batch(k))), "it is at the model's present weights"
            assert same(at[first], before) and same(at[-1], weights(net))
        else:
            assert number == first + 1, "the loss is that of the first pass"
            assert same(at[first], before) and (calls == 1 or same(at[-1], weights(net)))
    assert len(at) == passes
    optimizer.flush()
    assert optimizer.updates == 6 and len(at) == passes


@two_passes
def test_a_closure_is_needed(variant):
    net = Net()
    closure_of(net, 0)()
    with pytest.raises(TypeError, match=f"{VARIANTS[variant].func.__name__}.*closure"):
        make(variant, net).step()


@variants
def test_a_closure_without_gradients_is_an_error(variant):
    """FSDP2 without gradient sync leaves none."""
    net = Net()
    optimizer = make(variant, net)
    before = weights(net)
    with pytest.raises(RuntimeError, match=r"no gradient.*backward"):
        optimizer.step(lambda: net(batch(0)))
    assert same(before, weights(net)) and optimizer.updates == 0
    optimizer.step(closure_of(net, 0))


# ---- gradients in .grad ------------------------------------------------------------------------------------------------------


@variants
def test_gradients_from_before_are_dropped(variant):
    """For example those of an evaluation before the first step or between steps."""
    clean, other = Net(), Net()
    first, second = make(variant, clean), make(variant, other)
    for k in range(3):
        closure_of(other, 77)()
        first.step(closure_of(clean, k))
        second.step(closure_of(other, k))
    first.flush()
    second.flush()
    assert same(weights(clean), weights(other))


def zero_after_backward(net, optimizer):
    def closure():
        closure_of(net, 0)()
        gradients = [p.grad for p in net.parameters()]
        net.zero_grad()
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.grad = g.clone()

    return closure


@two_passes
def test_a_closure_may_replace_gradients(variant):
    """For example to clip or unscale into new tensors."""
    nets, paths = (Net(), Net()), []
    for net, closure in zip(nets, (closure_of(nets[0], 0), zero_after_backward(nets[1], None)), strict=True):
        optimizer = make(variant, net)
        for _ in range(3):
            optimizer.step(closure)
        optimizer.flush()
        paths.append(weights(net))
    assert same(*paths)


@variants
def test_accumulation_by_several_backwards(variant):
    whole, parts = Net(), Net()
    first, second = make(variant, whole), make(variant, parts)
    for k in range(5):

        def closure(k=k):
            second.zero_grad()
            for i in range(4):
                (parts(batch(k)[i : i + 1]) / 4).backward()
            return 4

        def at_once(k=k):
            sum(whole(batch(k)[i : i + 1]) / 4 for i in range(4)).backward()

        first.step(at_once)
        assert second.step(closure) == 4
    assert distance(weights(whole), weights(parts)) < 1e-10


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    for variant in VARIANTS:
        with pytest.raises(RuntimeError, match="sparse=False"):
            VARIANTS[variant](embedding.parameters()).step(lambda: embedding(torch.tensor([1, 2])).sum().backward())


# ---- random numbers and modes -----------------------------------------------------------------------------------------------


@two_passes
def test_both_passes_see_the_same_random_numbers(variant):
    """Afterwards the generator's state is that after one pass."""
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
def test_the_random_state_is_that_after_the_pass_for_g(variant):
    """If the passes draw different amounts (a branch on the weights), the generator continues from the state after g's pass."""
    p = parameter(1.0, 2.0)
    optimizer = VARIANTS[variant]([p], norm="rms")
    for k in range(3):
        calls = []

        def closure(calls=calls, last=1 if k == 0 or variant == "previous_batch" else 2):
            calls.append(0)
            torch.rand(2 if len(calls) == last else 5)
            (p * vector(3.0, 1.0)).sum().backward()

        torch.manual_seed(k)
        optimizer.step(closure)
        after = torch.get_rng_state()
        torch.manual_seed(k)
        torch.rand(2)
        assert torch.equal(after, torch.get_rng_state())


@variants
def test_steps_inside_no_grad(variant):
    nets, paths = (Net(), Net()), []
    for net, mode in zip(nets, (torch.enable_grad, torch.no_grad), strict=True):
        with mode():
            paths.append(train(net, make(variant, net), range(3)))
    assert same_path(*paths)


@two_passes
def test_training_and_evaluation_between_steps(variant):
    """Validation uses the model's present weights and does not change the run."""
    nets, paths = (Net(), Net()), []
    for net, validates in zip(nets, (False, True), strict=True):
        optimizer = make(variant, net)
        for k in range(4):
            optimizer.step(closure_of(net, k))
            if validates:
                with torch.no_grad():
                    net.eval()(batch(50))
                    net.train()
        optimizer.flush()
        paths.append(weights(net))
    assert same(*paths)


# ---- closures that fail -----------------------------------------------------------------------------------------------------


def failing(net, k, at):
    """Raises in its call number `at`, after backward."""
    calls = []

    def closure():
        calls.append(0)
        closure_of(net, k)()
        if len(calls) == at:
            raise KeyError("the user's")

    return closure


@variants
def test_a_failure_in_the_first_pass_changes_nothing(variant):
    """The step can be repeated as if nothing had happened."""
    nets, ends = (Net(), Net()), []
    for net, fails in zip(nets, (False, True), strict=True):
        optimizer = make(variant, net)
        for k in range(3):
            if fails:
                before = weights(net)
                with pytest.raises(KeyError):
                    optimizer.step(failing(net, k, 1))
                assert same(before, weights(net))
            optimizer.step(closure_of(net, k))
        optimizer.flush()
        ends.append(weights(net))
    assert same(*ends)


def fail_in_the_second_pass(optimizer, p, g):
    script = Script([p], [g], [g])

    def closure():
        script()
        if script.calls == 2:
            raise KeyError("the user's")

    with pytest.raises(KeyError):
        optimizer.step(closure)


@deferred
def test_a_failure_in_the_second_pass_restarts_the_momentum(variant):
    """The pending update is applied and counted; half of a correction must not stay in the momentum."""
    p, other = parameter(1.0, 2.0), parameter(1.0, 2.0)
    a, b, c, hat = vector(1.0, 0.0), vector(2.0, 1.0), vector(-3.0, 4.0), vector(5.0, 5.0)
    optimizer = VARIANTS[variant]([p], lr=0.1, momentum=BETA, norm="rms")
    optimizer.step(Script([p], [a]))
    fail_in_the_second_pass(optimizer, p, b)
    assert optimizer.updates == 1
    before = p.detach().clone()
    assert torch.allclose(before, vector(1.0, 2.0) + rms_move(a, 0.1))
    optimizer.flush()
    assert optimizer.updates == 1 and torch.equal(p, before), "no update of an unfinished momentum is pending"
    script = Script([p], [c], [hat])
    optimizer.step(script)
    assert script.calls == 1 and torch.allclose(momentum(optimizer, p), c, rtol=1e-14)
    # From here on it is a run that starts at these weights.
    fresh = VARIANTS[variant]([other], lr=0.1, momentum=BETA, norm="rms")
    with torch.no_grad():
        other.copy_(before)
    fresh.step(Script([other], [c]))
    for _ in range(2):
        optimizer.step(Script([p], [a], [b]))
        fresh.step(Script([other], [a], [b]))
    optimizer.flush()
    fresh.flush()
    assert torch.allclose(p, other, rtol=1e-13)


def test_a_failure_in_the_second_pass_of_previous_batch():
    """The first pass and the update are complete. The next step has nothing to compare with, so it is Gluon's."""
    p = parameter(1.0, 2.0)
    a, b, c, hat = vector(1.0, 0.0), vector(2.0, 1.0), vector(-3.0, 4.0), vector(0.5, 3.0)
    optimizer = VARIANTS["previous_batch"]([p], lr=0.1, momentum=BETA, norm="rms", bias_correction=False)
    optimizer.step(Script([p], [a], [hat]))
    fail_in_the_second_pass(optimizer, p, b)
    m = BETA * a + (1 - BETA) * b + GAMMA * BETA * (b - hat)
    assert optimizer.updates == 2 and torch.allclose(momentum(optimizer, p), m, rtol=1e-14)
    expected = vector(1.0, 2.0) + rms_move(a, 0.1) + rms_move(m, 0.1)
    optimizer.step(Script([p], [c], [hat]))
    m = BETA * m + (1 - BETA) * c
    assert torch.allclose(p, expected + rms_move(m, 0.1), rtol=1e-14)
    assert torch.allclose(momentum(optimizer, p), m - GAMMA * hat, rtol=1e-14)


@pytest.mark.parametrize("variant", [*TWO_PASSES, "muon_mvr"])
def test_gradients_of_a_failed_pass_do_not_count(variant):
    net, twin = Net(), Net()
    optimizer, expected = make(variant, net), make(variant, twin)
    with pytest.raises(KeyError):
        optimizer.step(failing(net, 33, 1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    assert same_path(train(net, optimizer, range(3)), train(twin, expected, range(3)))


# ---- compiled code ----------------------------------------------------------------------------------------------------------


@two_passes
def test_a_compiled_model(variant):
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
    assert distance(*paths) < 1e-10


@pytest.mark.parametrize("whole", [False, True], ids=["step", "caller"])
@pytest.mark.parametrize("variant", [*VARIANTS, "muon_mvr"])
def test_a_compiled_step(variant, whole):
    """torch.compile of optimizer.step, or of a function that calls it, leaves the step itself uncompiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    nets, paths = (Net(), Net()), []
    for net, compiled in zip(nets, (False, True), strict=True):
        optimizer = make(variant, net)
        step = optimizer.step
        if compiled and whole:
            step = torch.compile(partial(lambda o, closure: o.step(closure), optimizer), backend=counter)
        elif compiled:
            step = torch.compile(optimizer.step, backend=counter)
        for k in range(3):
            step(closure_of(net, k))
        optimizer.flush()
        paths.append(weights(net))
    assert same(*paths)
    assert counter.frame_count == 0
