"""Every optimizer against the plain float64 formulas with a copy of the previous weights: the same weights after each of 50
steps, for all norms at once."""

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

from tests.helpers.optimizers import CLASSES, DEFERRED, variants
from tests.helpers.reference import trajectory

STEPS, RADIUS = 50, 1.5
SHAPES = {
    "spectral": [(4, 4), (4, 4), (8, 4), (4, 8), (3, 5)],
    "colnorm": [(4, 6)],
    "rownorm": [(4, 6)],
    "sign": [(5, 4), (3,)],
    "frobenius": [(4, 3), (6,)],
    "rms": [(5,), (2, 3)],
}
NORM_OF = [norm for norm, shapes in SHAPES.items() for _ in shapes]
NAMES = [f"{norm} {shape}" for norm, shapes in SHAPES.items() for shape in shapes]
FLUSHES = (0, 12, 13, 40)


def data() -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for shapes in SHAPES.values() for s in shapes]
    means = torch.cat([torch.full((w.numel(),), 1 / w.numel(), dtype=torch.float64) for w in start])
    return start, torch.randn(STEPS, len(means), generator=generator, dtype=torch.float64), means


START, TARGETS, MEANS = data()


def missing(k: int, i: int, old: bool) -> bool:
    """Whether parameter i has no gradient in a pass over batch k: the first always has one, the second from batch 10 on."""
    if i == 1 and k < 10:
        return True
    return i > 0 and ((5 * k + i) % 4 == 0 if old else (7 * k + 3 * i) % 5 == 0)


def loss_of(x: list[Tensor], k: int, old: bool, scenario: str) -> Tensor:
    """A non-convex function of the weights and batch k. With dropout, the mask comes from the default generator."""
    if scenario == "missing":
        x = [w.detach() if missing(k, i, old) else w for i, w in enumerate(x)]
    w, target = torch.cat([w.flatten() for w in x]), TARGETS[k]
    seen = dropout(w, 0.3) if scenario == "dropout" else w
    return torch.log(torch.cosh(seen - 0.7 * target)).sum() + (seen * target).sin().sum() + (w * MEANS).sum().tanh()


def gradient(scenario: str, x: list[Tensor], k: int, old: bool = False) -> list[Tensor | None]:
    torch.manual_seed(k)
    x = [w.detach().clone().requires_grad_() for w in x]
    return list(torch.autograd.grad(loss_of(x, k, old, scenario), x, allow_unused=True))


def constant(value):
    return lambda k: value


SCHEDULES = {
    "constant": {"lr": constant(0.05), "beta": constant(0.8), "gamma": constant(0.3), "q": constant(0.4)},
    "paper": {"lr": constant(0.02), "beta": constant(0.6), "gamma": constant(1.0), "q": constant(0.5)},
    "moving": {
        "lr": lambda k: 0.1 / (k + 1) ** 0.75,
        "beta": lambda k: 1 - (k + 2) ** -0.5,
        "gamma": lambda k: 0.1 + 0.9 * k / STEPS,
        "q": lambda k: 0.9 - 0.6 * k / STEPS,
    },
}


@functools.cache
def expected(variant, schedule, decay, bias_correction, scenario="plain"):
    return trajectory(
        variant, START, functools.partial(gradient, scenario), range(STEPS), NORM_OF, [RADIUS] * len(START),
        **SCHEDULES[schedule], decay=decay, bias_correction=bias_correction, flushes=FLUSHES if scenario == "flush" else (),
    )  # fmt: skip


def zero_to_none(optimizer):
    optimizer.zero_grad(set_to_none=True)


def zero_in_place(optimizer):
    optimizer.zero_grad(set_to_none=False)


def zero_some(optimizer):
    for p in optimizer.param_groups[0]["params"][::2]:
        p.grad = None


ZEROING = (zero_to_none, zero_in_place, zero_some)


def run(variant, schedule, decay, bias_correction, scenario="plain", zeroes=False):
    """X_0 … X_K of the optimizer; X_k is read when `updates` is k."""
    params = [w.clone().requires_grad_() for w in START]
    groups = [{"params": [p for p, n in zip(params, NORM_OF, strict=True) if n == norm], "norm": norm} for norm in SHAPES]
    moving = {"momentum" if name == "beta" else name: value for name, value in SCHEDULES[schedule].items()}
    optimizer = CLASSES[variant](groups, weight_decay=decay, radius=RADIUS, polar="svd", bias_correction=bias_correction)
    own = [name for name in moving if name in optimizer.defaults]
    path = {0: [p.detach().clone() for p in params]}
    fresh = True  # there are no previous weights
    for k in range(STEPS):
        for group in optimizer.param_groups:
            group.update({name: moving[name](k) for name in own})
        calls = 0

        def closure(k=k, fresh=fresh):
            nonlocal calls
            calls += 1
            old = (calls == 1 and not fresh) if variant in DEFERRED else calls == 2
            if zeroes:
                ZEROING[k % 3](optimizer)
            value = loss_of(params, k, old, scenario)
            value.backward()
            return value.detach()

        before = [p.detach().clone() for p in params]
        torch.manual_seed(k)
        value = optimizer.step(closure)
        generator = torch.get_rng_state()
        torch.manual_seed(k)
        at = params if variant in DEFERRED else before
        assert torch.equal(value, loss_of(at, k, False, scenario)), "step returns the loss at the current weights"
        assert torch.equal(generator, torch.get_rng_state()), "a step draws as many random numbers as one pass"
        assert all(p.grad is None for p in params), "step leaves no gradient behind"
        path[optimizer.updates] = [p.detach().clone() for p in params]
        fresh = scenario == "flush" and k in FLUSHES
        if fresh:
            optimizer.flush()
            path[optimizer.updates] = [p.detach().clone() for p in params]
    optimizer.flush()
    path[optimizer.updates] = [p.detach().clone() for p in params]
    assert sorted(path) == list(range(STEPS + 1))
    return [path[k] for k in range(STEPS + 1)]


def assert_path(path, reference):
    for k, (x, y) in enumerate(zip(path, reference, strict=True)):
        wrong = {
            name: float((a - b).norm() / b.norm())
            for name, a, b in zip(NAMES, x, y, strict=True)
            if not (a - b).norm() < 1e-10 * b.norm()
        }
        assert not wrong, f"X_{k} differs: {wrong}"


@pytest.mark.parametrize(
    "schedule, decay, bias_correction",
    [
        ("constant", 0.0, True), ("constant", 0.7, False), ("paper", 0.7, True), ("moving", 0.0, False), ("moving", 0.7, True),
    ],
)  # fmt: skip
@variants
def test_fifty_steps_equal_the_formulas(variant, schedule, decay, bias_correction):
    setting = (variant, schedule, decay, bias_correction)
    assert_path(run(*setting), expected(*setting))


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("scenario", ["flush", "missing", "dropout"])
@variants
def test_flushes_missing_gradients_and_dropout(variant, scenario, bias_correction):
    setting = (variant, "moving", 0.1, bias_correction, scenario)
    assert_path(run(*setting), expected(*setting))


@variants
def test_closures_may_zero_gradients(variant):
    """The optimizer empties `.grad` before each pass, so a missing gradient stays missing and does not become zero."""
    setting = (variant, "moving", 0.1, True, "missing")
    assert_path(run(*setting, zeroes=True), expected(*setting))


def test_the_settings_distinguish_the_variants():
    """Otherwise a wrong class or swapped options could pass the tests above."""
    ends = {
        (variant, schedule, bias, scenario): expected(variant, schedule, 0.1, bias, scenario)[-1]
        for variant in CLASSES
        for schedule, bias, scenario in [("moving", True, "plain"), ("moving", False, "plain"), ("moving", True, "dropout")]
    }
    for scenario in ("flush", "missing"):
        ends |= {
            (v, "moving", True, scenario): expected(v, "moving", 0.1, True, scenario)[-1] for v in ("mvr1", "mvr2", "mvr3")
        }
    for (a, x), (b, y) in itertools.combinations(ends.items(), 2):
        assert max(float((p - r).norm() / r.norm()) for p, r in zip(x, y, strict=True)) > 1e-3, (a, b)
