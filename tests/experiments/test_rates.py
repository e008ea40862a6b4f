"""experiments/rates.py: the recursion against a plain loop, special cases, the slopes' statistics, a quick run end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import rates
from experiments.rates_page import fit
from experiments.rates_recursion import METHODS, PAPERS, PROBLEMS, Arm, arms_of, schedule, simulate

BY_NAME = {m.name: m for m in METHODS}
CAUCHY, SKEWED, LOGCOSH, QUARTIC = PROBLEMS
GLUON, MVR1, MVR2, MVR3 = (BY_NAME[name] for name in ("Gluon", "MVR-1", "MVR-2", "MVR-3"))


def record(problem, arms, horizons, seeds):
    """The momenta and weights of a simulation, step by step."""
    seen = []
    result = simulate(problem, arms, horizons, seeds, watch=lambda k, X, M: seen.append((X.clone(), M.clone())))
    return result, seen


def plain_loop(problem, arm, K, seed):
    """One run, written from the formulas and with full histories. Returns all X_k (X_K included) and all M_k."""
    alpha, q, gamma, t, b = schedule(arm, K, problem.radius)
    beta = 1 - alpha
    draws = torch.from_numpy(np.random.default_rng([seed, K]).standard_normal((K, 2, 4, 4)))
    X, d, M = [problem.initial(seed)], [], []
    for k in range(K):
        g = problem.grad(X[k], draws[k])
        if k == 0:
            d.append(g)
            M.append(g)
        else:
            g_hat = {
                "same": lambda k: problem.grad(X[k - 1], draws[k]),
                "single_batch": lambda k: problem.grad(X[k - 1], draws[k - 1]),
                "previous_batch": lambda k: problem.grad(X[k], draws[k - 1]),
            }[arm.method.compares](k)
            d.append(g + (1 - q) * (d[-1] - g_hat))
            M.append(beta * M[-1] + (1 - beta) * d[-1] + gamma * beta * (g - g_hat))
        U, _, Vh = np.linalg.svd(M[-1].numpy())
        X.append((1 - b) * X[-1] - t * torch.from_numpy(U @ Vh))
    return X, M


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_batched_recursion_agrees_with_the_plain_loop(problem):
    """Every method, two horizons and two seeds at once equal one run at a time."""
    arms = [Arm(m, 0.5 + 0.5 * i, 1.0) for i, m in enumerate(METHODS)]
    result, seen = record(problem, arms, [32, 16], [3, 5])
    for h, K in enumerate([32, 16]):
        for a, arm in enumerate(arms):
            for s, seed in enumerate([3, 5]):
                X, M = plain_loop(problem, arm, K, seed)
                for k in range(K):
                    torch.testing.assert_close(seen[k][0][h, a, s], X[k], rtol=0, atol=1e-9)
                    torch.testing.assert_close(seen[k][1][h, a, s], M[k], rtol=0, atol=1e-9)
                gap = problem.h(X[K] - problem.target).sum()
                dual = sum(torch.linalg.matrix_norm(problem.dh(x - problem.target), "nuc") for x in X[:K]) / K
                torch.testing.assert_close(result["gap"][h, a, s], gap, rtol=0, atol=1e-8)
                torch.testing.assert_close(result["dual_norm"][h, a, s], dual, rtol=0, atol=1e-8)


@pytest.mark.parametrize("compares", ["single_batch", "previous_batch"])
def test_gamma_zero_is_gluon(compares):
    """Bit for bit, for any ĝ."""
    arms = [Arm(m, 1.0, 1.0) for m in (GLUON, replace(GLUON, compares=compares))]
    _, seen = record(CAUCHY, arms, [64], [0, 1])
    for X, M in seen:
        assert torch.equal(X[:, 0], X[:, 1])
        assert torch.equal(M[:, 0], M[:, 1])


def test_without_noise_mvr1_and_mvr3_have_the_exact_gradient():
    """M_k = ∇f(X_k) for γ = 1 and any β and q; plain momentum lags behind, and so does MVR-2's over its exact d."""
    problem = replace(CAUCHY, sigma=0.0)
    arms = [Arm(MVR1, 1.0, 4.0), Arm(MVR3, 1.0, 4.0), Arm(GLUON, 1.0, 4.0), Arm(MVR2, 0.1, 4.0)]
    _, seen = record(problem, arms, [64], [0])
    for X, M in seen:
        torch.testing.assert_close(M[:, :2], problem.grad(X[:, :2]), rtol=0, atol=1e-12)
    X, M = seen[32]
    for late in (2, 3):
        assert (M[:, late] - problem.grad(X[:, late])).abs().max() > 0.05


def test_nesterov_is_the_extrapolated_average():
    """single_batch with γ = 1-β: M = (1-γ) E + γ g with E the plain average."""
    arm = Arm(BY_NAME["single_batch, γ=1-β"], 2.0, 1.0)
    alpha, _, gamma, _, _ = schedule(arm, 64, 0.0)
    assert gamma == alpha
    X, M = plain_loop(CAUCHY, arm, 64, 0)
    draws = torch.from_numpy(np.random.default_rng([0, 64]).standard_normal((64, 2, 4, 4)))
    E = None
    for k in range(64):
        g = CAUCHY.grad(X[k], draws[k])
        E = g if E is None else (1 - alpha) * E + alpha * g
        torch.testing.assert_close(M[k], (1 - gamma) * E + gamma * g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_problems_match_their_descriptions(problem):
    """h' is h's derivative, the noise is unbiased and of variance σ²(1 + cos²u), the minimum is at W with f* = 0."""
    u = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    (du,) = torch.autograd.grad(problem.h(u).sum(), u)
    torch.testing.assert_close(problem.dh(u.detach()), du, rtol=1e-9, atol=1e-9)
    assert problem.gap(problem.target) == 0
    assert (problem.h(u.detach()) >= 0).all()

    X = problem.initial(1)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 200_000, 4, 4)))
    error = problem.grad(X, noise) - problem.grad(X)
    assert error.mean(0).abs().max() < 0.02
    wanted = problem.sigma**2 * (1 + (X - problem.target).cos() ** 2)
    torch.testing.assert_close(error.var(0), wanted, rtol=0.05, atol=0)
    assert ((error**3).mean(0).min() > 1.0) == problem.skewed


@pytest.mark.parametrize("problem", [LOGCOSH, QUARTIC], ids=lambda p: p.name)
def test_star_convex_problems_satisfy_the_theorem(problem):
    """Star-convexity along the segment to W, the radius, α ≥ b for every arm and horizon, and iterates inside the ball."""
    Z = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 4, 4)))
    for c in (0.1, 0.5, 0.9):
        inside = problem.gap(c * problem.target + (1 - c) * Z)
        assert (inside <= (1 - c) * problem.gap(Z) + 1e-12).all()
    largest = max(torch.linalg.matrix_norm(M, 2) for M in (problem.target, problem.initial(0)))
    assert problem.radius >= largest
    arms = [arm for m in METHODS for arm in arms_of(m, problem.radius)]
    for K in (2**6, 2**11, 2**16):
        for arm in arms:
            alpha, q, _, t, b = schedule(arm, K, problem.radius)
            assert b <= min(alpha, q) <= alpha < 1
            assert t == b * problem.radius
    _, seen = record(problem, arms[:3], [64], [0])
    assert max(torch.linalg.matrix_norm(X, 2).max() for X, _ in seen) <= problem.radius


def test_schedules_have_the_theorys_powers():
    powers = {
        GLUON: (-1 / 2, 0, -3 / 4),
        MVR1: (-2 / 3, 0, -2 / 3),
        MVR2: (-1 / 3, -2 / 3, -2 / 3),
        MVR3: (-1 / 3, -2 / 3, -2 / 3),
    }
    for method, (power_alpha, power_q, power_t) in powers.items():
        (a, q, g, t, b), (a2, q2, g2, t2, _) = (schedule(Arm(method, 0.5, 3.0), K, 0.0) for K in (64, 4096))
        assert math.isclose(a2 / a, 64**power_alpha)
        assert math.isclose(q2 / q, 64**power_q)
        assert math.isclose(t2 / t, 64**power_t)
        assert b == 0
        assert g == g2 == (1.0 if method in (MVR1, MVR3) else 0.0)
        assert (q == 1) == (method in (GLUON, MVR1))
    b = math.log(4096) / 4096
    for method, alpha in ((GLUON, 2 * b ** (2 / 3)), (MVR1, 2 * b), (MVR2, math.sqrt(2 * b))):
        assert schedule(Arm(method, 2.0, 1.0), 4096, 3.0)[0] == pytest.approx(alpha)
    assert len({len(arms_of(m, r)) for m in METHODS for r in (0.0,)}) == 1
    assert len({len(arms_of(m, r)) for m in METHODS for r in (3.0,)}) == 1


def test_a_known_power_law_is_recovered_and_the_interval_covers_it():
    """For y = K^-0.3 times log-normal scatter the slope is found, and 95% intervals cover it about 95% of the time."""
    horizons = [2**e for e in range(6, 17)]
    exact = np.array(horizons, dtype=float) ** -0.3
    one = fit(horizons, np.tile(exact[None, :, None], (1, 1, 4)), resamples=10)
    assert one["slope"][0] == pytest.approx(-0.3, abs=1e-12)
    assert one["upper"][0] == pytest.approx(-0.3, abs=1e-12)
    rng = np.random.default_rng(1)
    scatter = np.exp(0.3 * rng.standard_normal((200, len(horizons), 16)) - 0.045)
    f = fit(horizons, exact[None, :, None] * scatter, resamples=400)
    low, high = np.quantile(f["slope_boot"], (0.025, 0.975), axis=0)
    assert 0.85 < np.mean((low < -0.3) & (high > -0.3)) < 0.99
    assert abs(f["slope"].mean() + 0.3) < 0.005


def test_differences_are_paired():
    """If two methods differ only by a factor, the difference of their slopes has no scatter."""
    horizons = [2**e for e in range(6, 12)]
    y = np.exp(np.random.default_rng(0).standard_normal((1, 6, 8)))
    f = fit(horizons, np.concatenate([y, 3 * y]), resamples=50)
    assert np.ptp(f["slope_boot"][:, 0]) > 0.01
    np.testing.assert_allclose(f["slope_boot"][:, 0], f["slope_boot"][:, 1], atol=1e-12)


def test_a_run_does_not_depend_on_the_others():
    """The same (seed, K) gives the same run alone and among others."""
    arms = [Arm(MVR3, 1.0, 4.0)]
    together = simulate(CAUCHY, arms, [128, 64], [0, 1, 2])["gap"]
    alone = simulate(CAUCHY, arms, [64], [1])["gap"]
    torch.testing.assert_close(together[1, 0, 1], alone[0, 0, 0], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_quick_run_end_to_end(tmp_path, capsys):
    """Runs, writes, is reproducible and can be drawn again; every MVR ends below Gluon on the noisy non-convex problem."""
    threads = torch.get_num_threads()
    try:
        report = rates.main(["--quick", "--seeds", "4", "--out", str(tmp_path)])
        for name in ("rates.json", "table.md", "rates.png"):
            assert (tmp_path / name).stat().st_size > 1000
        held = json.loads((tmp_path / "rates.json").read_text())
        assert held["machine"]["torch"] == torch.__version__
        assert held["command"].startswith("python -m experiments.rates --quick")
        assert not set(held["seeds"]) & set(held["tuning_seeds"])
        cauchy = held["results"]["cauchy"]
        assert {len(v) for v in cauchy["values"].values()} == {len(held["horizons"])}
        for name in PAPERS:
            assert cauchy["fits"][name]["last"] < cauchy["fits"]["Gluon"]["last"]
        low, high = cauchy["fits"]["Gluon"]["slope_95"]
        assert low <= cauchy["fits"]["Gluon"]["slope"] <= high
        table = (tmp_path / "table.md").read_text()
        again = rates.main(["--replot", "--out", str(tmp_path)])
        assert (tmp_path / "table.md").read_text() == table
        assert again["results"]["quartic"]["values"] == report["results"]["quartic"]["values"]
        capsys.readouterr()
    finally:
        torch.set_num_threads(threads)
