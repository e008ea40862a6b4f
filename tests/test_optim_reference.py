"""Every optimizer is held to the plain float64 recursion with a snapshot: the same weights after every step."""

import itertools

import pytest
import torch
from reference import trajectory
from torch import Tensor

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3

CLASSES = {"gluon": Gluon, "mvr1": GluonMVR1, "mvr2": GluonMVR2, "mvr3": GluonMVR3}
SHAPES = {
    "spectral": [(4, 4), (4, 4), (8, 4), (4, 8), (3, 5)],
    "colnorm": [(4, 6)],
    "rownorm": [(4, 6)],
    "sign": [(5, 4), (3,)],
    "frobenius": [(4, 3), (6,)],
    "rms": [(5,), (2, 3)],
}


def problem(norm: str, seed: int = 0):
    """A non-convex function of the weights and a batch: the same for all, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES[norm]]
    batches = [[torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights] for _ in range(50)]

    def loss(x: list[Tensor], batch: list[Tensor]) -> Tensor:
        coupling = torch.stack([w.mean() for w in x]).sum().tanh()
        return (
            sum(torch.log(torch.cosh(w - 0.7 * b)).sum() + (w * b).sin().sum() for w, b in zip(x, batch, strict=True))
            + coupling
        )

    def gradient(x: list[Tensor], batch: list[Tensor]) -> list[Tensor]:
        x = [w.detach().clone().requires_grad_() for w in x]
        return list(torch.autograd.grad(loss(x, batch), x))

    return weights, batches, loss, gradient


def run(variant, norm, lr, beta, gamma, decay, inner=None, flush=True):
    weights, batches, loss, _ = problem(norm)
    params = [w.clone().requires_grad_() for w in weights]
    options = {"weight_decay": decay, "norm": norm, "radius": 1.5, "polar": "svd"}
    if variant != "gluon":
        options["gamma"] = gamma(0)
    if inner is not None:
        options["inner"] = inner
    optimizer = CLASSES[variant](params, lr=lr(0), momentum=beta(0), **options)
    path = {0: [p.detach().clone() for p in params]}
    for k, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = lr(k), beta(k)
            if variant != "gluon":
                group["gamma"] = gamma(k)

        def closure(batch=batch):
            value = loss(params, batch)
            value.backward()
            return value

        before = [p.detach().clone() for p in params]
        value = optimizer.step(closure)
        at = params if variant == "mvr2" else before
        assert torch.equal(value, loss(at, batch)), "step returns the loss at the current weights"
        assert all(p.grad is None for p in params), "step leaves no gradient behind"
        path[optimizer.updates] = [p.detach().clone() for p in params]
    if flush:
        optimizer.flush()
        path[optimizer.updates] = [p.detach().clone() for p in params]
    assert optimizer.updates == len(batches)
    return path


def constant(value):
    return lambda k: value


SCHEDULES = {
    "constant": (constant(0.05), constant(0.9), constant(0.3)),
    "moving": (lambda k: 0.1 / (k + 1) ** 0.75, lambda k: 1 - (k + 2) ** -0.5, lambda k: 0.1 + 0.9 * k / 50),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.parametrize("variant", CLASSES)
def test_fifty_steps_equal_the_plain_recursion(variant, norm, decay, schedule):
    weights, batches, _, gradient = problem(norm)
    lr, beta, gamma = SCHEDULES[schedule]
    count = len(weights)
    expected = trajectory(variant, weights, gradient, batches, [norm] * count, [1.5] * count, lr, beta, gamma, decay)
    path = run(variant, norm, lr, beta, gamma, decay)
    assert sorted(path) == list(range(51))
    for k, x in path.items():
        for w, reference in zip(x, expected[k], strict=True):
            assert (w - reference).norm() < 1e-10 * reference.norm(), f"X_{k} of shape {tuple(w.shape)}"


@pytest.mark.parametrize("beta, gamma", list(itertools.product([0.0, 0.5, 0.95], [0.05, 1.0, 2.0])))
@pytest.mark.parametrize("variant", ["mvr1", "mvr2", "mvr3"])
def test_every_beta_and_gamma(variant, beta, gamma):
    weights, batches, _, gradient = problem("spectral")
    schedules = (constant(0.02), constant(beta), constant(gamma))
    count = len(weights)
    expected = trajectory(variant, weights, gradient, batches, ["spectral"] * count, [1.5] * count, *schedules, 0.1)
    path = run(variant, "spectral", *schedules, 0.1)
    for w, reference in zip(path[50], expected[50], strict=True):
        assert (w - reference).norm() < 1e-10 * reference.norm()


@pytest.mark.parametrize("inner", [0.3, 0.5, 1.0])
def test_nested_form(inner):
    weights, batches, _, gradient = problem("spectral")
    schedules = (constant(0.02), constant(0.8), constant(0.0))
    count = len(weights)
    expected = trajectory("mvr2", weights, gradient, batches, ["spectral"] * count, [1.5] * count, *schedules, 0.1, inner)
    path = run("mvr2", "spectral", *schedules, 0.1, inner)
    for w, reference in zip(path[50], expected[50], strict=True):
        assert (w - reference).norm() < 1e-10 * reference.norm()


@pytest.mark.parametrize("variant", ["mvr1", "mvr2", "mvr3"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gamma_zero_is_gluon_bit_for_bit(variant, schedule):
    lr, beta, _ = SCHEDULES[schedule]
    gluon = run("gluon", "spectral", lr, beta, constant(0.0), 0.1)
    path = run(variant, "spectral", lr, beta, constant(0.0), 0.1)
    for k in gluon:
        assert all(torch.equal(a, b) for a, b in zip(gluon[k], path[k], strict=True)), k
