"""experiments/contestants.py: each optimizer against its formula, written out in float64."""

import pytest
import torch

from experiments.contestants import Transported, WarmNesterov
from optim import Gluon
from optim.norms import get_norm

LR, SHAPE = 0.1, (4, 3)


def problem(seed=0):
    """A quadratic with noise: the gradient of a batch at X, and the first weights."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    h = h @ h.T
    noise = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(9)]
    start = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return (lambda x, k, scale=1.0: h @ x + scale * noise[k]), start


def trained(kind, gradient, start, steps=6, **options):
    """The weights after each step, with a closure that zeroes gradients first."""
    p = torch.nn.Parameter(start.clone())
    optimizer = kind([p], lr=LR, polar="svd", **options)
    path = []
    for k in range(steps):

        def closure(k=k):
            optimizer.zero_grad()
            p.grad = gradient(p.detach(), k)
            return torch.tensor(float(k))

        assert optimizer.step(closure) == k
        path.append(p.detach().clone())
    return path


def lmo(m):
    return get_norm("spectral", torch.Size(SHAPE), "scion", "svd").lmo(m)


def test_transported_follows_its_formula():
    gradient, start = problem()
    beta, x, last, m = 0.8, start, start, None
    found = trained(Transported, gradient, start, momentum=beta, bias_correction=False)
    for k in range(6):
        g = gradient(x + beta / (1 - beta) * (x - last), k)
        m = g if m is None else beta * m + (1 - beta) * g
        last, x = x, x + LR * lmo(m)
        torch.testing.assert_close(found[k], x, rtol=1e-9, atol=1e-9)


def test_without_noise_transport_is_gluon_without_momentum_on_a_quadratic():
    noisy, start = problem()

    def gradient(x, k):
        return noisy(x, k, 0.0)

    found = trained(Transported, gradient, start, momentum=0.9, bias_correction=False)
    torch.testing.assert_close(found, trained(Gluon, gradient, start, momentum=0.0), rtol=1e-9, atol=1e-9)
    kept = trained(Gluon, gradient, start, momentum=0.9, bias_correction=False)
    assert (found[-1] - kept[-1]).abs().max() > 1e-3


def test_transported_resumes_from_its_state():
    gradient, start = problem()
    whole = trained(Transported, gradient, start, steps=6)
    p = torch.nn.Parameter(start.clone())
    optimizer = Transported([p], lr=LR, polar="svd")
    for k in range(6):
        if k == 3:
            saved, p = optimizer.state_dict(), torch.nn.Parameter(p.detach().clone())
            optimizer = Transported([p], lr=LR, polar="svd")
            optimizer.load_state_dict(saved)

        def closure(k=k, p=p):
            p.grad = gradient(p.detach(), k)
            return torch.zeros(())

        optimizer.step(closure)
    torch.testing.assert_close(p.detach(), whole[-1], rtol=0, atol=0)


@pytest.mark.parametrize("beta", (0.95, 0.5))
def test_nesterov_with_a_warm_up_follows_its_formula(beta):
    gradient, start = problem()
    x, m = start, None
    found = trained(WarmNesterov, gradient, start, momentum=beta, bias_correction=False)
    for k in range(6):
        b = 0.85 + (beta - 0.85) * k / 300 if beta > 0.85 else beta
        g = gradient(x, k)
        m = g if m is None else b * m + (1 - b) * g
        x = x + LR * lmo(b * m + (1 - b) * g)
        torch.testing.assert_close(found[k], x, rtol=1e-9, atol=1e-9)
    assert WarmNesterov._beta({"momentum": 0.95, "updates": 900}) == pytest.approx(0.95)
