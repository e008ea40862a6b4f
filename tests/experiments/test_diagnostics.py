"""The diagnostics against plain computation on quadratics with known answers; and measuring changes nothing."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from data.shards import write_shard
from experiments import diagnostics as diag
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, PreviousBatchMVR, SingleBatchMVR

CLASSES = {
    "gluon": (Gluon, {}),
    "mvr1": (GluonMVR1, {"gamma": 0.4}),
    "mvr2": (GluonMVR2, {"q": 0.6}),
    "mvr3": (GluonMVR3, {"q": 0.6, "gamma": 0.4}),
    "single_batch": (SingleBatchMVR, {"gamma": 0.4}),
    "previous_batch": (PreviousBatchMVR, {"gamma": 0.4}),
}


def draws(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


class Quadratic(nn.Module):
    """f(X; ξ) = ½⟨X, H_ξ X⟩ - ⟨B_ξ, X⟩ with gradient H_ξ X - B_ξ, the mean over the batch."""

    def __init__(self, weights):
        super().__init__()
        self.p = nn.Parameter(weights.clone())

    def forward(self, h, b):
        return ((self.p * (h @ self.p)).sum((-2, -1)) / 2 - (b * self.p).sum((-2, -1))).mean()


def batches(count, size=4, seed=0):
    h = [(m + m.mT) / 2 for m in draws(count, size, 3, 3, seed=seed)]
    return list(zip(h, draws(count, size, 3, 5, seed=seed + 100), strict=True))


def grad(batch, x):
    return batch[0].mean(0) @ x - batch[1].mean(0)


# ---- estimators


def test_best_gamma_is_one_without_noise_and_small_with_much():
    (d,) = draws(1, 4, 3)
    assert diag.best_gamma([d], [d]) == pytest.approx(1)
    noise = draws(1, 4, 3, seed=1)[0]
    noise -= d * (noise * d).sum() / d.square().sum()  # ⟂ d
    for size in (0.5, 2.0):
        scaled = noise * size * d.norm() / noise.norm()
        # d ± noise: ⟨d₁, d₂⟩ = ‖d‖²(1 - size²), their mean is d
        assert diag.best_gamma([d + scaled], [d - scaled]) == pytest.approx(1 - size**2)


def test_best_gamma_minimises_the_expected_error():
    """Over many draws of d = Δ + noise, the ratio of γ*'s means is the γ that minimises E‖Δ - γ d‖²."""
    (delta,) = draws(1, 4, 4)
    pairs = [(delta + a, delta + b) for a, b in zip(draws(4000, 4, 4, seed=1), draws(4000, 4, 4, seed=2), strict=True)]
    top = sum(diag.inner([a], [b]) for a, b in pairs)
    bottom = sum(diag.inner([(a + b) / 2], [(a + b) / 2]) for a, b in pairs)
    squared = delta.square().sum().item()
    assert top / bottom == pytest.approx(squared / (squared + 16 / 2), rel=0.05)


def test_noise_and_tracking_error_are_unbiased():
    target, m = draws(2, 4, 4)
    halves = list(zip(draws(4000, 4, 4, seed=3), draws(4000, 4, 4, seed=4), strict=True))
    # The mean of two halves of unit noise has E‖·‖² = 16/2.
    assert np.mean([diag.noise(([a], [b])) ** 2 for a, b in halves]) == pytest.approx(8, rel=0.03)
    above = np.mean([diag.inner([m - target - a], [m - target - b]) for a, b in halves])
    assert above == pytest.approx((m - target).square().sum().item(), rel=0.05)
    exact = ([target], [target])
    wanted = (m - target).square().sum().item() / target.square().sum().item()
    assert diag.tracking_error([m], exact) == pytest.approx(wanted)
    assert diag.cosine([2 * target], exact) == pytest.approx(1)


def test_a_zero_denominator_gives_nan():
    zero = [torch.zeros(2)]
    assert math.isnan(diag.best_gamma(zero, zero))
    assert math.isnan(diag.relative_size(zero, zero))
    assert math.isnan(diag.cosine(zero, (zero, zero)))


# ---- a run


@pytest.mark.parametrize("variant", CLASSES)
def test_momenta_are_the_recursions(variant):
    """M_k of each variant against its definition, with snapshots of the weights as in `run`."""
    kind, options = CLASSES[variant]
    q, gamma, beta = options.get("q", 1.0), options.get("gamma", 0.0), 0.7
    model = Quadratic(draws(1, 3, 5)[0])
    params = [model.p]
    optimizer = kind(params, lr=0.1, momentum=beta, polar="svd", bias_correction=False, **options)
    evaluation = diag.Evaluation(model, params)
    d = m = old = last = None
    for batch in batches(6):
        held = diag.snapshot(params)
        optimizer.step(evaluation.closure(*batch))
        (x,) = diag.snapshot(params) if optimizer.deferred else held
        g = grad(batch, x)
        if m is None:
            d = m = g
        else:
            hat = {"single_batch": (old, last), "previous_batch": (old, x)}.get(variant, (batch, last))
            hat = grad(*hat)
            d = g + (1 - q) * (d - hat)
            m = beta * m + (1 - beta) * d + gamma * beta * (g - hat)
        at = [x] if variant == "single_batch" else diag.snapshot(params)
        found = diag.momentum_of(optimizer, params, lambda b=batch, at=at: diag.mean(evaluation.halves(b, at)))
        torch.testing.assert_close(found[0], m, rtol=1e-10, atol=1e-12)
        old, last = batch, x


def test_the_differences_match_their_names():
    model = Quadratic(draws(1, 3, 5)[0])
    params = [model.p]
    optimizer = GluonMVR2(params, lr=0.1)
    evaluation = diag.Evaluation(model, params)
    old, new, reference = batches(3)
    optimizer.step(evaluation.closure(*old))
    then = diag.snapshot(params)
    optimizer.step(evaluation.closure(*new))
    now = diag.snapshot(params)
    record = diag.measure(optimizer, evaluation, (then, now, now), (old, new), reference)
    g, (x,), (y,) = grad(new, now[0]), now, then
    for kind, hat in {"same": grad(new, y), "single_batch": grad(old, y), "previous_batch": grad(old, x)}.items():
        assert record["relative_difference"][kind] == pytest.approx(((g - hat).norm() / g.norm()).item())
    # A quadratic changes by its first-order term and ⟨Δ, H Δ⟩/2.
    move = x - y
    assert record["curvature"] == pytest.approx((move * (reference[0].mean(0) @ move)).sum().item() / 2)
    assert record["first_order"] == pytest.approx((grad(reference, y) * move).sum().item())
    one, two = (grad([part[rows] for part in reference], x) for rows in (slice(None, 2), slice(2, None)))
    d = optimizer.state[model.p]["estimate"].double()
    wanted = ((d - one) * (d - two)).sum() / (one * two).sum()
    assert record["estimate_error"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("variant", CLASSES)
def test_measuring_changes_no_bit(variant):
    """A run with dropout, measured at every step with a gradient in place, against the same run unmeasured."""
    kind, options = CLASSES[variant]

    def train(measured):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        params = list(net.parameters())
        optimizer, old = kind(params, lr=0.05, norm="auto", **options), diag.snapshot(params)
        for step in range(4):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

            def closure(x=x):
                loss = net(x).square().mean()
                loss.backward()
                return loss

            before = diag.snapshot(params)
            if measured:
                for p in params:
                    p.grad = torch.ones_like(p)
                once, again = diag.gradient(params, closure, old), diag.gradient(params, closure, old)
                assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)), "the same dropout masks"
                if step:
                    diag.momentum_of(optimizer, params, lambda once=once: once)
                assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params)
                assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
                optimizer.zero_grad()
            old = before
            optimizer.step(closure)
        return diag.snapshot(params)

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_a_failing_closure_changes_nothing():
    p = torch.eye(2).requires_grad_()
    p.grad = torch.full((2, 2), 3.0)

    def fails():
        p.grad = torch.zeros_like(p)
        raise KeyError("data")

    with pytest.raises(KeyError):
        diag.gradient([p], fails, [torch.zeros(2, 2)])
    assert torch.equal(p.detach(), torch.eye(2)) and (p.grad == 3).all()


@pytest.mark.parametrize("variant", ["gluon", "mvr3"])
def test_a_run_is_recorded_and_drawn(variant, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        write_shard(data / f"x_{split}_000001.bin", np.arange(2000, dtype=np.uint16) % 50)
    words = f"--run-name={variant} --optimizer={variant} --data-dir={data} --vocab-size=64 --n-layer=1 --n-head=1 --d-model=8 "
    words += f"--seq-len=8 --batch-size=4 --steps=5 --device=cpu --every=2 --reference=4 --folder={tmp_path}"
    diag.main(words.split())
    records = [json.loads(line) for line in (tmp_path / f"{variant}.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == [2, 4]
    assert (records[0]["estimate_error"] is None) == (variant == "gluon")
    assert (tmp_path / f"{variant}.png").stat().st_size > 10_000
    diag.draw({"no gain": [record | {"curvature": None, "first_order": 0.0} for record in records]}, tmp_path / "x.png")
    capsys.readouterr()


@pytest.mark.parametrize("text", ["zz", "[1]", '{"update": 1}', None])
def test_records_of_another_form(tmp_path, text):
    path = tmp_path / "x.jsonl"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match="takes files that this command wrote"):
        diag.main(["--draw", str(path), "--out", str(tmp_path / "x.png")])
