"""The diagnostics against plain computation on quadratics where the answers are known, and that measuring changes nothing."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.shards import write_shard
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3
from optim import diagnostics as diag
from optim.norms import get_norm
from training.config import Config

CLASSES = {"gluon": Gluon, "mvr1": GluonMVR1, "mvr2": GluonMVR2, "mvr3": GluonMVR3}


def draws(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


class Quadratic:
    """f(X; ξ) = ½⟨X, H_ξ X⟩ - ⟨B_ξ, X⟩ with gradient H_ξ X - B_ξ."""

    def __init__(self, weights):
        self.p = weights.clone().requires_grad_()

    def closure(self, h, b):
        def evaluate():
            loss = (self.p * (h @ self.p)).sum() / 2 - (b * self.p).sum()
            loss.backward()
            return loss

        return evaluate


def symmetric(matrix):
    return (matrix + matrix.mT) / 2


# ---- γ* ---------------------------------------------------------------------------------------------------------------


def test_best_gamma_is_one_without_noise_and_small_with_much():
    (d,) = draws(1, 4, 3)
    assert diag.best_gamma(d, d) == pytest.approx(1)
    noise = draws(1, 4, 3, seed=1)[0]
    noise -= d * (noise * d).sum() / d.square().sum()  # ⟂ d
    for size in (0.5, 2.0):
        scaled = noise * size * d.norm() / noise.norm()
        # d ± noise: ⟨d₁, d₂⟩ = ‖d‖²(1 - size²), their mean is d
        assert diag.best_gamma(d + scaled, d - scaled) == pytest.approx(1 - size**2)


def test_best_gamma_minimises_the_expected_error():
    """Micro-batches with H ± S, each sign by a fair coin: the expectations are sums over four outcomes."""
    h, s, b = (symmetric(m) for m in draws(3, 5, 5))
    x, y = draws(2, 5, 5, seed=1)
    problem = Quadratic(x)
    pairs = []
    for signs in itertools.product((1, -1), repeat=2):
        pairs.append([diag.difference([problem.p], problem.closure(h + sign * s, b), [x], [y])[1] for sign in signs])
    numerators = [diag.inner(d1, d2) for d1, d2 in pairs]
    means = [[(p + q) / 2 for p, q in zip(d1, d2, strict=True)] for d1, d2 in pairs]
    denominators = [diag.inner(m, m) for m in means]
    for (d1, d2), n, m in zip(pairs, numerators, denominators, strict=True):
        assert diag.best_gamma(d1, d2) == pytest.approx(n / m)
    best = sum(numerators) / sum(denominators)
    true_change = h @ (x - y)

    def expected_error(gamma):
        return sum((true_change - gamma * m[0]).square().sum().item() for m in means)

    grid = [best + step for step in (-0.01, 0, 0.01)]
    assert min(grid, key=expected_error) == best
    s_change = s @ (x - y)
    known = true_change.square().sum() / (true_change.square().sum() + s_change.square().sum() / 2)
    assert best == pytest.approx(known.item())


def test_best_gamma_with_memory_is_the_nearest():
    m, g, d, target = ([t] for t in draws(4, 3, 4))
    gamma, beta = diag.best_gamma_with_memory(m, g, d, target, 0.8), 0.8

    def distance(gamma):
        return (beta * m[0] + (1 - beta) * g[0] + gamma * beta * d[0] - target[0]).norm()

    assert distance(gamma) < min(distance(gamma - 1e-3), distance(gamma + 1e-3))


def test_nothing_to_divide_by():
    zero = torch.zeros(2, 2)
    assert math.isnan(diag.best_gamma(zero, zero))
    assert math.isnan(diag.relative_size(zero, zero))
    assert math.isnan(diag.rounding_noise(zero, zero))


# ---- gradients at other weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", diag.KINDS)
def test_difference(kind):
    (h1, h2), (b1, b2), (x, y) = draws(2, 4, 4), draws(2, 4, 3, seed=1), draws(2, 4, 3, seed=2)
    h1, h2 = symmetric(h1), symmetric(h2)
    problem = Quadratic(y)
    g, d = diag.difference([problem.p], problem.closure(h1, b1), [x], [y], kind, problem.closure(h2, b2))
    hat = {"mvr1": h2 @ y - b2, "mvr2": h1 @ y - b1, "mvr3": h2 @ x - b2}[kind]
    torch.testing.assert_close(g[0], h1 @ x - b1)
    torch.testing.assert_close(d[0], h1 @ x - b1 - hat)


def test_bad_kinds_are_refused():
    problem = Quadratic(torch.eye(2))
    closure = problem.closure(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="kind must be one of mvr1, mvr2, mvr3, got 'mvr4'"):
        diag.difference([problem.p], closure, [problem.p], [problem.p], "mvr4")
    with pytest.raises(ValueError, match="previous_closure must be the last batch's closure"):
        diag.difference([problem.p], closure, [problem.p], [problem.p], "mvr3")


@pytest.mark.parametrize("variant", CLASSES)
def test_measuring_changes_no_bit(variant):
    """A run with dropout, measured at every step with a gradient in place, against the same run unmeasured."""

    def train(measured):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        options = {} if variant == "gluon" else {"gamma": 0.3}
        optimizer = CLASSES[variant](net.parameters(), lr=0.05, norm="auto", **options)
        params, old = diag.parameters(optimizer), diag.snapshot(net.parameters())
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
                diag.difference(params, closure, before, old)
                diag.momenta(optimizer, once)
                assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params)
                assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
                optimizer.zero_grad()
            old = before
            optimizer.step(closure)
        return [p.detach() for p in params]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_a_closure_that_fails_leaves_everything():
    problem = Quadratic(torch.eye(2))
    problem.p.grad = torch.full((2, 2), 3.0)

    def fails():
        problem.p.grad = torch.zeros_like(problem.p)
        raise KeyError("data")

    with pytest.raises(KeyError):
        diag.gradient([problem.p], fails, [torch.zeros(2, 2)])
    assert torch.equal(problem.p.detach(), torch.eye(2)) and (problem.p.grad == 3).all()


# ---- momenta, dual norms, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CLASSES)
def test_momenta_are_the_recursions(variant):
    """M_k of each variant by the definition, with a snapshot of the weights."""
    beta, gamma = 0.7, 0.4
    problem = Quadratic(draws(1, 3, 4)[0])
    batches = [(symmetric(h), b) for h, b in zip(draws(5, 3, 3, seed=1), draws(5, 3, 4, seed=2), strict=True)]
    options = {} if variant == "gluon" else {"gamma": gamma}
    optimizer = CLASSES[variant]([problem.p], lr=0.1, momentum=beta, polar="svd", **options)
    m = before = None
    for k, (h, b) in enumerate(batches):
        closure = problem.closure(h, b)
        held = problem.p.detach().clone()
        optimizer.step(closure)
        x = problem.p.detach().clone() if variant == "mvr2" else held  # X_k
        if k == 0:
            m = h @ x - b
        else:
            old_h, old_b = batches[k - 1]
            g = h @ x - b
            hat = {"gluon": g, "mvr1": old_h @ before - old_b, "mvr2": h @ before - b, "mvr3": old_h @ x - old_b}[variant]
            m = beta * m + (1 - beta) * g + gamma * beta * (g - hat)
        before = x
        extra = {"mvr1": [h @ x - b], "mvr3": diag.gradient([problem.p], closure)}.get(variant)
        torch.testing.assert_close(diag.momenta(optimizer, extra)[0], m, rtol=1e-12, atol=1e-12)
    if variant in ("mvr1", "mvr3"):
        with pytest.raises(TypeError, match="need the last batch's gradients"):
            diag.momenta(optimizer)


def test_dual_norms_by_their_formulas():
    shapes = {"spectral": (6, 4), "sign": (6, 4), "colnorm": (6, 4), "frobenius": (6, 4), "rms": (5,), "adamw": (5,)}
    params = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in shapes.values()]
    optimizer = Gluon([{"params": [p], "norm": name} for p, name in zip(params, shapes, strict=True)])
    m = [draws(1, *s, seed=i)[0] for i, s in enumerate(shapes.values())]
    expected = [
        torch.linalg.svdvals(m[0]).sum() * math.sqrt(6 / 4),
        m[1].abs().sum() / 4,
        m[2].norm(dim=0).sum() * math.sqrt(6),
        m[3].norm(),
        m[4].norm() * math.sqrt(5),
    ]
    found = diag.dual_norms(optimizer, m)
    assert found[:5] == pytest.approx([e.item() for e in expected]) and found[5] is None


def test_tracking_error_is_unbiased():
    """Targets t ± n, over both signs of each: the mean of numerator and denominator are ‖M - t‖² and ‖t‖²."""
    m, t, n1, n2 = draws(4, 4, 4)
    pairs = [(t + a * n1, t + b * n2) for a, b in itertools.product((1, -1), repeat=2)]
    above = sum(diag.inner(m - p, m - q) for p, q in pairs) / 4
    below = sum(diag.inner(p, q) for p, q in pairs) / 4
    assert above / below == pytest.approx(((m - t).square().sum() / t.square().sum()).item())
    p, q = pairs[1]
    assert diag.tracking_error([m], [p], [q]) == pytest.approx(diag.inner(m - p, m - q) / diag.inner(p, q))


def test_rounding_noise_of_bfloat16():
    """The noise of g - ĝ grows as the step shrinks, since that of g and ĝ does not."""
    layer = nn.Linear(32, 32, bias=False)
    x = draws(1, 64, 32)[0].float()

    def closure(low):
        def evaluate():
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = layer(x).float().square().mean()
            loss.backward()

        return evaluate

    params = list(layer.parameters())
    now = diag.snapshot(params)
    noises = []
    for step in (1e-1, 1e-3):
        then = [now[0] + step * draws(1, 32, 32, seed=3)[0].float()]
        exact, low = (diag.difference(params, closure(low), now, then)[1] for low in (False, True))
        assert diag.rounding_noise(exact, low) == pytest.approx(((low[0] - exact[0]).norm() / exact[0].norm()).item(), rel=1e-5)
        noises.append(diag.rounding_noise(exact, low))
    assert 0 < noises[0] < 0.1 and noises[1] > 20 * noises[0]


def test_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = GluonMVR2(reversed(list(net.parameters())), norm="auto")
    params = diag.parameters(optimizer)
    g, d, low = ([[torch.randn_like(p) for p in params] for _ in range(2)] for _ in range(3))
    rows = diag.layers(optimizer, net.named_parameters(), diag.momenta(optimizer), g, d, low)
    assert [row.name for row in rows] == ["1.bias", "1.weight", "0.bias", "0.weight"]
    for i, row in enumerate(rows):
        mean = [(a[i] + b[i]) / 2 for a, b in (g, d, low)]
        assert row.momentum_dual_norm == 0 and row.gradient_dual_norm > 0
        assert row.relative_difference == pytest.approx((mean[1].norm() / mean[0].norm()).item(), rel=1e-5)
        assert row.best_gamma == pytest.approx(diag.best_gamma(d[0][i], d[1][i]))
        assert row.rounding_noise == pytest.approx(((mean[2] - mean[1]).norm() / mean[1].norm()).item(), rel=1e-5)
        assert row.rounding_ratio == pytest.approx((mean[2].norm() / mean[1].norm()).item(), rel=1e-5)
    assert all(row.rounding_noise is None for row in diag.layers(optimizer, [], diag.momenta(optimizer), g, d))


# ---- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parent.parent / "scripts" / "diagnose.py"
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("diagnose_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    write_shard(data / "x_train_000000.bin", np.random.default_rng(0).integers(0, 40, 4000) // 2)
    return {
        "data_dir": str(data), "batch_size": 4, "seq_len": 16, "vocab_size": 20, "n_layer": 1, "n_head": 2, "d_model": 16,
        "lr": 0.01, "block_radius": 5.0, "embed_radius": 20.0, "gamma": 0.4, "momentum": 0.8, "steps": 5, "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("variant", CLASSES)
def test_script_measures_what_it_says(script, config, variant, tmp_path, monkeypatch):
    """The momenta that it hands to `measure` obey the recursion, and they made the moves between its weights."""
    config = Config(**config, optimizer=variant, polar="svd")
    seen, measure = [], script.measure

    def spy(optimizer, model, evaluation, history, batches, reference, momentum, kind):
        k = max(history)
        params = diag.parameters(optimizer)
        now, old = (evaluation.closure(*b) for b in batches)
        g, d = diag.difference(params, now, history[k], history[k - 1], kind, old)
        move = [a - b for a, b in zip(history[k], history[k - 1], strict=True)]
        seen.append((k, momentum, g, d, move, optimizer.param_groups))
        return measure(optimizer, model, evaluation, history, batches, reference, momentum, kind)

    monkeypatch.setattr(script, "measure", spy)
    records = script.run(config, 1, 4, tmp_path / "all.jsonl")
    assert [k for k, *_ in seen] == [r["update"] for r in records] == list(range(1, config.steps))
    gamma = 0.0 if variant == "gluon" else 0.4
    for (_, m0, g, d, move, groups), (_, m1, *_) in itertools.pairwise(seen):
        for i in range(len(m0)):
            torch.testing.assert_close(m1[i], 0.8 * m0[i] + 0.2 * g[i] + gamma * 0.8 * d[i], rtol=1e-3, atol=1e-6)
        assert groups[-1]["norm"] == "sign"
        assert torch.allclose(move[-1], 0.01 * 20.0 * get_norm("sign", m0[-1].shape).lmo(m0[-1]), atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert lines == records
    # Measuring more rarely leaves the same run.
    monkeypatch.setattr(script, "measure", measure)
    fewer = script.run(config, 2, 4, tmp_path / "fewer.jsonl")
    assert [r["reference_loss"] for r in fewer] == [r["reference_loss"] for r in records if r["update"] % 2 == 0]
    for before, after in itertools.pairwise(records):
        change = after["reference_loss"] - before["reference_loss"]
        assert after["first_order"] + after["curvature"] == pytest.approx(change)


def test_script_draws(script, config, tmp_path):
    pytest.importorskip("matplotlib")
    config = Config(**config, optimizer="mvr2", run_name="tiny_mvr2")
    records = script.run(config, 2, 4, tmp_path / "tiny_mvr2.jsonl")
    assert records[0]["turn"] is not None and len(records[0]["layers"]) == 7
    script.main(["--draw", str(tmp_path / "tiny_mvr2.jsonl"), "--out", str(tmp_path / "new" / "picture.png")])
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
