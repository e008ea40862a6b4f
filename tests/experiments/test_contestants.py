"""experiments/contestants.py: each optimizer against its formula, written out in float64."""

import pytest
import torch

from experiments.contestants import MuonAdamW, Transported, WarmNesterov
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


def test_muon_with_adamw_is_both_of_torch_and_resumes():
    def parts(p, q):
        options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        return torch.optim.Muon([p], **options), torch.optim.AdamW([q], 0.01, (0.9, 0.95), weight_decay=0.0)

    torch.manual_seed(0)
    start, gradients = torch.randn(2, 4, 3), torch.randn(6, 2, 4, 3)
    p, q, a, b = (torch.nn.Parameter(start[i % 2].clone()) for i in range(4))
    both, apart = MuonAdamW([{"params": [p]}, {"params": [q]}], 0.01, 0.9), parts(a, b)
    for k, (g, h) in enumerate(gradients):
        if k == 3:
            saved, both = both.state_dict(), MuonAdamW([{"params": [p]}, {"params": [q]}], 0.5, 0.1)
            both.load_state_dict(saved)
        p.grad, q.grad, a.grad, b.grad = (x.clone() for x in (g, h, g, h))
        both.step()
        [part.step() for part in apart]
        assert torch.equal(p, a) and torch.equal(q, b)
    assert not torch.equal(p, start[0]) and not torch.equal(q, start[1])
