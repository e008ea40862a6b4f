"""`correction_fraction`: the correction from some of the micro-batches, held to the plain recursion with a snapshot."""

import pytest
import torch
from reference import lmo
from torch import Tensor

from optim import GluonMVR2, GluonMVR3

SHAPES = [(4, 6), (6, 4), (5, 5)]
MICRO = 4


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def batch_of(k: int) -> list[list[Tensor]]:
    """Four micro-batches."""
    generator = torch.Generator().manual_seed(1 + k)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in range(MICRO)]


def loss_of(x: list[Tensor], micro: list[Tensor]) -> Tensor:
    return sum(torch.log(torch.cosh(w - b)).sum() + (w * b).sin().sum() for w, b in zip(x, micro, strict=True))


def mean_gradient(x: list[Tensor], micros: list[list[Tensor]]) -> list[Tensor]:
    x = [w.detach().clone().requires_grad_() for w in x]
    return list(torch.autograd.grad(sum(loss_of(x, m) for m in micros) / len(micros), x))


def plain_recursion(variant, steps: int, lr, beta, gamma, shared) -> list[list[Tensor]]:
    """X_0 … X_K; `shared(k)` micro-batches of batch k are evaluated twice. `gamma(k)` is q in the nested form."""
    x = start()
    path, m, d, old = [x], [], [], x
    for k in range(steps):
        g = mean_gradient(x, batch_of(k))
        if k == 0:
            m = d = g
        else:
            ours = mean_gradient(x, batch_of(k)[: shared(k)])
            if variant == "mvr3":
                hat, c = mean_gradient(x, batch_of(k - 1)[: shared(k - 1)]), gamma(k - 1) * beta(k)
            else:
                hat, c = mean_gradient(old, batch_of(k)[: shared(k)]), gamma(k) * beta(k)
            if variant == "nested":
                q = gamma(k)
                d = [(1 - q) * e + q * a + (1 - q) * (b - h) for e, a, b, h in zip(d, g, ours, hat, strict=True)]
                m = [beta(k) * e + (1 - beta(k)) * a for e, a in zip(m, d, strict=True)]
            else:
                m = [beta(k) * e + (1 - beta(k)) * a + c * (b - h) for e, a, b, h in zip(m, g, ours, hat, strict=True)]
        old, x = x, [(1 - 0.1 * lr(k)) * w + lr(k) * lmo(e, "spectral") for w, e in zip(x, m, strict=True)]
        path.append(x)
    return path


class Loop:
    """An optimizer, and the passes of its step over shared and other micro-batches, which count what they evaluate."""

    def __init__(self, variant, lr: float, beta: float, gamma: float, fraction: float):
        self.params = [w.requires_grad_() for w in start()]
        kind = GluonMVR3 if variant == "mvr3" else GluonMVR2
        own = {"inner": gamma} if variant == "nested" else {"gamma": gamma}
        options = {"momentum": beta, "weight_decay": 0.1, "polar": "svd", "correction_fraction": fraction}
        self.optimizer = kind(self.params, lr=lr, **own, **options)
        self.evaluated = 0

    def closure(self, micros: list[list[Tensor]]):
        def evaluate():
            total = 0.0
            for micro in micros:
                loss = loss_of(self.params, micro) / MICRO
                loss.backward()
                self.evaluated += 1
                total += loss.detach()
            return total

        return evaluate

    def step(self, batch: list[list[Tensor]], shared: int) -> Tensor:
        rest = self.closure(batch[shared:]) if shared < MICRO else None
        return self.optimizer.step(self.closure(batch[:shared]), rest=rest)

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def constant(value):
    return lambda k: value


SCHEDULES = {
    "constant": (constant(0.05), constant(0.9), constant(0.3), constant(1)),
    "half": (constant(0.05), constant(0.5), constant(0.8), constant(2)),
    "all": (constant(0.05), constant(0.9), constant(0.3), constant(4)),
    "moving": (lambda k: 0.1 / (k + 1), lambda k: 1 - (k + 2) ** -0.5, lambda k: 0.1 + k / 30, lambda k: 1 + k % MICRO),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ["mvr2", "nested", "mvr3"])
def test_equals_the_plain_recursion(variant, schedule):
    steps = 20
    lr, beta, gamma, shared = SCHEDULES[schedule]
    loop = Loop(variant, lr(0), beta(0), gamma(0), shared(0) / MICRO)
    path = {0: loop.weights()}
    for k in range(steps):
        for group in loop.optimizer.param_groups:
            group["lr"], group["momentum"], group["correction_fraction"] = lr(k), beta(k), shared(k) / MICRO
            group["inner" if variant == "nested" else "gamma"] = gamma(k)
        before = loop.weights()
        loop.evaluated = 0
        loss = loop.step(batch_of(k), shared(k))
        again = shared(k) if variant == "mvr3" or k else 0
        assert loop.evaluated == MICRO + again, "1 + f gradients a step"
        at = before if variant == "mvr3" else loop.weights()
        torch.testing.assert_close(loss, sum(loss_of(at, m) for m in batch_of(k)) / MICRO, rtol=1e-12, atol=0)
        path[loop.optimizer.updates] = loop.weights()
    loop.optimizer.flush()
    path[loop.optimizer.updates] = loop.weights()
    expected = plain_recursion(variant, steps, lr, beta, gamma, shared)
    assert sorted(path) == list(range(steps + 1))
    for k, x in path.items():
        for w, reference in zip(x, expected[k], strict=True):
            assert (w - reference).norm() < 1e-10 * reference.norm(), f"X_{k} of shape {tuple(w.shape)}"


def total_variance(samples: list[list[Tensor]]) -> float:
    return sum(torch.stack(parts).var(dim=0).sum().item() for parts in zip(*samples, strict=True))


def corrections(lr: float, fraction: float) -> tuple[float, float]:
    """Variance over batches of γβ (g_S - ĝ_S) as the step takes it, and of γβ (g - ĝ_S), which it does not take."""
    beta, gamma, shared = 0.9, 0.5, round(fraction * MICRO)
    taken, not_taken = [], []
    for k in range(1, 25):
        loop = Loop("mvr2", lr, beta, gamma, fraction)
        loop.step(batch_of(0), shared)
        old, before = loop.weights(), [loop.optimizer.state[p]["momentum_buffer"].clone() for p in loop.params]
        loop.step(batch_of(k), shared)
        after = [loop.optimizer.state[p]["momentum_buffer"] for p in loop.params]
        g = mean_gradient(loop.weights(), batch_of(k))
        hat = mean_gradient(old, batch_of(k)[:shared])
        taken.append([a - beta * b - (1 - beta) * c for a, b, c in zip(after, before, g, strict=True)])
        not_taken.append([gamma * beta * (a - b) for a, b in zip(g, hat, strict=True)])
    return total_variance(taken), total_variance(not_taken)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_corrections_variance_vanishes_with_the_step(fraction):
    (large, large_biased), (small, small_biased) = corrections(1e-2, fraction), corrections(1e-4, fraction)
    assert 0.5e4 < large / small < 2e4, "the variance of g_S - ĝ_S goes with the square of the step"
    assert large_biased / small_biased < 2, "that of g - ĝ_S would stay"
    assert large < 1e-2 * large_biased


def test_the_corrections_variance_goes_as_one_over_f():
    """What a cheaper correction costs."""
    assert 2 < corrections(1e-3, 0.25)[0] / corrections(1e-3, 1.0)[0] < 8


@pytest.mark.parametrize("kind", [GluonMVR2, GluonMVR3])
def test_wrong_use(kind):
    def parameter():
        return torch.ones(2, 2, dtype=torch.float64, requires_grad=True)

    def never():
        raise AssertionError("not to be called")

    for wrong in (0, 0.0, -0.5, 1.5, True, "half", float("nan")):
        with pytest.raises(ValueError, match="correction_fraction must be a number in"):
            kind([parameter()], correction_fraction=wrong)
        with pytest.raises(ValueError, match="correction_fraction must be a number in"):
            kind([{"params": [parameter()], "correction_fraction": wrong}])
    with pytest.raises(TypeError, match=r"correction_fraction=0.5 needs step\(closure, previous, rest\)"):
        kind([parameter()], correction_fraction=0.5).step(never)
    with pytest.raises(TypeError, match="rest has no micro-batches to evaluate with correction_fraction=1"):
        kind([parameter()]).step(never, rest=never)
    with pytest.raises(TypeError, match="needs a closure"):
        kind([parameter()], correction_fraction=0.5).step(None, rest=never)
    unequal = kind([{"params": [parameter()], "correction_fraction": 0.5}, {"params": [parameter()]}])
    with pytest.raises(ValueError, match=r"same in all groups, got \[0.5, 1.0\]"):
        unequal.step(never, rest=never)


@pytest.mark.parametrize("variant", ["mvr2", "nested", "mvr3"])
def test_rest_may_not_drop_what_closure_left(variant):
    for drop, refused in (("optimizer", False), ("by hand", True)):
        loop, honest = Loop(variant, 0.05, 0.9, 0.3, 0.5), Loop(variant, 0.05, 0.9, 0.3, 0.5)

        def rest(loop=loop, drop=drop):
            if drop == "optimizer":
                loop.optimizer.zero_grad()
            else:
                for p in loop.params:
                    p.grad = None
            return loop.closure(batch_of(0)[2:])()

        if refused:
            with pytest.raises(RuntimeError, match="between the two passes"):
                loop.optimizer.step(loop.closure(batch_of(0)[:2]), rest=rest)
        else:
            loop.optimizer.step(loop.closure(batch_of(0)[:2]), rest=rest)
            honest.step(batch_of(0), 2)
            loop.optimizer.flush()
            honest.optimizer.flush()
            assert all(torch.equal(a, b) for a, b in zip(loop.params, honest.params, strict=True))


@pytest.mark.parametrize("variant", ["mvr2", "nested", "mvr3"])
def test_both_passes_over_the_shared_part_draw_the_same(variant):
    loop = Loop(variant, 0.05, 0.9, 0.3, 0.5)
    drawn: list[tuple[str, float]] = []

    def drawing(name, micros):
        evaluate = loop.closure(micros)

        def call():
            drawn.append((name, torch.rand(()).item()))
            return evaluate()

        return call

    for k in range(3):
        drawn.clear()
        batch = batch_of(k)
        loop.optimizer.step(drawing("closure", batch[:2]), drawing("previous", batch[:2]), drawing("rest", batch[2:]))
    order = [name for name, _ in drawn]
    values = dict(drawn)
    assert order == (["closure", "rest", "previous"] if variant == "mvr3" else ["previous", "closure", "rest"])
    assert values["closure"] == values["previous"] != values["rest"]
    assert torch.rand(()).item() not in values.values(), "the generator goes on after the step"


@pytest.mark.parametrize("variant", ["mvr2", "nested", "mvr3"])
def test_gradients_that_are_none_in_some_passes(variant):
    """What a pass does not reach counts as zero there."""
    loop, honest = Loop(variant, 0.05, 0.9, 0.3, 0.5), Loop(variant, 0.05, 0.9, 0.3, 0.5)

    def partial(loop, micros, used, zeros):
        def evaluate():
            for micro in micros:
                for w, b, use in zip(loop.params, micro, used, strict=True):
                    if use:
                        (torch.log(torch.cosh(w - b)).sum() / MICRO).backward()
                    elif zeros:
                        (w.sum() * 0).backward()

        return evaluate

    for k in range(4):
        for it, zeros in ((loop, False), (honest, True)):
            batch = batch_of(k)
            it.optimizer.step(
                partial(it, batch[:2], (True, False, k != 2), zeros),
                partial(it, batch[:2], (k != 1, True, False), zeros),
                partial(it, batch[2:], (False, True, True), zeros),
            )
    for a, b in zip(loop.params, honest.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
