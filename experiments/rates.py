"""How fast do Gluon and its momentum-variance-reduced variants converge? The theory's rates, measured on matrix problems.

    python -m experiments.rates            # 6 to 8 minutes on one thread; writes results/rates/
    python -m experiments.rates --quick    # seconds; writes results/rates-quick/
    python -m experiments.rates --replot   # the table and the picture again, from results/rates/rates.json

Qian, Rammal, Kovalev and Richtárik, "Muon is Provably Faster with Momentum Variance Reduction" (abstract, theorem 1),
bound the mean dual norm of the gradient by O(K^-1/4) for Gluon and O(K^-1/3) for MVR in the non-convex case, and
f - f* by Õ(K^-1/3) for Muon and Õ(K^-1/2) for Muon-MVR in the star-convex case. This script runs every method at
horizons K = 2^6 ... 2^16, each with the step sizes that the theory prescribes *for that K*, and fits the slope of the
error against K on log-log axes. It is a reference implementation: the recursion in `simulate` is the formula, in
float64 with the exact polar factor, and shares no code with the optimizers in `optim`.

**Notation.** alpha = 1 - beta weighs the new gradient, gamma scales the correction, t is the step, b the weight decay:

    d_k     = g_k + (1 - q) (d_{k-1} - ghat_k)                                    d_0 = g_0
    M_k     = beta M_{k-1} + (1 - beta) d_k + gamma beta (g_k - ghat_k)           M_0 = g_0
    X_{k+1} = (1 - b) X_k - t polar(M_k)

    ghat_k  = grad f(X_{k-1}; xi_k)        the same draw at the previous weights; two gradients a step

    Gluon: q = 1, gamma = 0     MVR-1: q = 1, gamma = 1     MVR-2: q < 1, gamma = 0     MVR-3: q < 1, gamma = 1

MVR-1 with weight decay is Muon-MVR of theorem 1. Two corrections of MUON-MVR (Chang et al.) run too, with q = 1:
`single_batch` takes ghat_k = grad f(X_{k-1}; xi_{k-1}), which needs one gradient a step, and `previous_batch` takes
ghat_k = grad f(X_k; xi_{k-1}).

**Schedules** are constant over a run; the theory leaves the multipliers c_alpha and c_t free. The powers of K are those of
the paper's rates. Of the paper's proofs only theorem 1 is used; the balances below are the standard ones.

*Non-convex* (b = 0). The descent lemma of an LMO step gives mean ||grad f||_* <= D/(tK) + 2 E||M - grad f||_* + Lt/2.
  - Gluon's momentum error is sqrt(alpha) sigma + L t/alpha + sigma/(alpha K), so alpha = c_alpha K^-1/2 and
    t = c_t K^-3/4 balance everything at K^-1/4 (the constant form of 1 - beta_k = (k+1)^-1/2, t_k ~ (k+1)^-3/4).
  - MVR-1's is sqrt(alpha) sigma + L t/sqrt(alpha) + sigma/(alpha K), because g_k - ghat_k moves the momentum with X:
    alpha = c_alpha K^-2/3 and t = c_t K^-2/3 balance everything at K^-1/3 (the constant form of
    1 - beta_k ~ t_k ~ (k+1)^-2/3).
  - MVR-2's and MVR-3's estimator d has that error with q in place of alpha: q = c_alpha K^-2/3, t = c_t K^-2/3. Momentum over
    d adds a lag of L t/alpha to MVR-2, and a noise of L t/sqrt(alpha) to MVR-3. With alpha = sqrt(q) neither is larger than
    the error of d, so both keep K^-1/3 and have no more free constants than the others.

*Star-convex* (theorem 1: its beta is our b, its eta our t, its alpha our alpha; it asks alpha >= b and
t >= b max(||X_0||, ||X*||)). With t = bR the step is a Frank-Wolfe step in a ball of radius R, and
f(X_K) - f* <= (1 - b)^K D + 2R E||M - grad f||_* + O(L R^2 b). b = c_t log K / K makes the first term K^-c_t, and
  - Muon's error sqrt(alpha) sigma + L t/alpha needs alpha = c_alpha b^(2/3): in total (log K / K)^(1/3);
  - Muon-MVR's sqrt(alpha) sigma + L t/sqrt(alpha) needs alpha = c_alpha b, c_alpha >= 1: in total (log K / K)^(1/2).
    MVR-2 and MVR-3 take q = c_alpha b and alpha = sqrt(q); the paper states no rate for them here.
Here R = 3 and max(||X_0||, ||X*||) = 2. The logarithm makes both bounds flatter on a finite range, so the table gives the
bound's fitted slope next to the exponent.

**Methods.** Gluon and MVR-1, -2, -3 on their schedules. As controls: single_batch with gamma = 1 - beta (Nesterov's momentum)
on Gluon's schedule; single_batch and previous_batch with gamma = 1 on MVR-1's schedule; and Gluon on MVR-1's schedule, to
show what the schedule does without the correction.

**Problems.** X is 4 x 4, U = X - W, f(X) = sum_ij h(U_ij), and a draw xi = (A, B) of random matrices gives

    f(X; xi) = f(X) + sigma <A, U> + sigma <B, sin U>        grad f(X; xi) = h'(U) + sigma (A + B cos U)

so f, its gradient and f* are exact; the noise is unbiased, of bounded variance and mean-square Lipschitz in X (without B
g_k - ghat_k would have no noise). The polar factor couples the entries. A and B are standard Gaussian.
  - `cauchy` (non-convex): h(u) = log(1 + u^2), started where the entries of U are about 2, so h'' < 0. (u^2/(1+u^2) has
    plateaus: a run that diverges along one ends with a small gradient and looks good.)
  - `cauchy-skew`: the same with skewed noise, A = (chi^2_1 - 1)/sqrt(2). A symmetric noise cancels in the mean of
    polar(gradient + noise) even if the momentum does not average it at all; the theory does not assume symmetry.
  - `logcosh` (star-convex, being convex): h(u) = log cosh u. At its quadratic minimum f - f* is of the order of
    ||grad f||^2 while the bound is of the order R ||grad f||, so slopes of up to twice the bound's are expected.
  - `quartic` (the same, flat minimum): h(u) = sqrt(1 + u^4) - 1; f - f* ~ ||grad f||^(4/3), so slopes of up to 4/3 of it.
sigma = 1 throughout, fixed beforehand. The noise of one gradient has a dual norm of about 8 at the start and more at the
minimum. The exact gradient has 6 at the start of `cauchy`, and a mean of about 2 or less at K >= 2^11.

**Constants.** For each problem and method a grid of pairs (c_alpha, c_t), of the same size for every method, is run on 8
seeds that are used for nothing else. The pair with the smallest mean error at the single horizon K = 2^11, the middle of
the range, is kept for all K. Slopes play no part in the choice. The grids keep alpha < 1 at every K and, in the star-convex
problems, c_t >= 1/2 and alpha >= b as the theory demands. In the non-convex ones t is at most a quarter of ||X_0 - W||:
larger steps at small K throw X so far out that h' vanishes, and a small dual norm would look like success. A choice at an
end of the grid is marked.
The same runs give the *envelope*: the best pair of the grid for each K <= 2^11 separately, without a re-test. It shows
whether a gap in slope comes from the prescribed powers of K alone. The range of the slopes of all pairs whose error at
2^11 is within 25% of the best shows how much the slope depends on the constants.

**Statistics.** 16 seeds (the start and the noise; the noise is shared between the methods, independent between
horizons). Least-squares slope of log(mean over seeds) against log K; 95% percentile interval from 10,000 bootstrap
resamples of the seeds, joint over horizons and methods, so that differences are paired. The interval covers
only the scatter between seeds, not the curvature of the line or the choice of problem and constants. So the table also has
the slope of the upper half (K >= 2^11), and the picture has the local slopes. The mean dual norm is over all steps, or over
1024 evenly spaced ones if K is larger.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import Parser, UserError, as_written, one_line_errors, positive
from common.files import write_text
from common.machine import cpu_name
from common.pictures import pyplot
from common.tables import markdown

N = 4  # X is N x N
MEASUREMENTS = 1024  # of the dual norm, in a run
CURVES = ("dual_norm", "gap")


# ---------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """f(X) = sum h(X - W) with noisy gradients; `radius` > 0 makes it a problem with weight decay in a ball."""

    name: str
    title: str
    h: Callable[[Tensor], Tensor]
    dh: Callable[[Tensor], Tensor]
    metric: str  # which of CURVES the theory bounds
    start: float  # ||X_0 - W|| (no decay) or ||X_0|| (decay)
    radius: float = 0.0
    sigma: float = 1.0
    skewed: bool = False

    @property
    def target(self) -> Tensor:
        """W, the minimiser: spectral norm 2, unequal singular values."""
        return torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.5], dtype=torch.float64))

    def grad(self, X: Tensor, noise: Tensor | None = None) -> Tensor:
        """The gradient at X for the draw `noise` = (A, B), or the exact one."""
        U = X - self.target
        if noise is None:
            return self.dh(U)
        A, B = noise
        if self.skewed:
            A = (A * A - 1) / math.sqrt(2)
        return self.dh(U) + self.sigma * (A + B * U.cos())

    def gap(self, X: Tensor) -> Tensor:
        """f(X) - f*, exactly."""
        return self.h(X - self.target).sum((-2, -1))

    def initial(self, seed: int) -> Tensor:
        """A random rotation at the prescribed distance (from W, or with decay from 0)."""
        Z = torch.from_numpy(np.random.default_rng([seed, 0]).standard_normal((N, N)))
        return self.start * polar(Z) + (0.0 if self.radius else self.target)


CAUCHY = Problem(
    "cauchy",
    "non-convex: log(1+u²), mean dual norm",
    lambda u: torch.log1p(u * u),
    lambda u: 2 * u / (1 + u * u),
    metric="dual_norm",
    start=4.0,
)
PROBLEMS = (
    CAUCHY,
    replace(CAUCHY, name="cauchy-skew", title="the same, skewed noise, mean dual norm", skewed=True),
    Problem(
        "logcosh",
        "star-convex: log cosh u, f(X_K) - f*",
        lambda u: u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2),
        torch.tanh,
        metric="gap",
        start=2.0,
        radius=3.0,
    ),
    Problem(
        "quartic",
        "star-convex, flat: √(1+u⁴)-1, f(X_K) - f*",
        lambda u: (1 + u**4).sqrt() - 1,
        lambda u: 2 * u**3 / (1 + u**4).sqrt(),
        metric="gap",
        start=2.0,
        radius=3.0,
    ),
)


# ----------------------------------------------------------------------------------------------- methods, schedules


@dataclass(frozen=True)
class Method:
    """What the correction compares with ("same": this draw at the previous weights), the rule for gamma, and the schedule."""

    name: str
    compares: str  # "same", "single_batch" or "previous_batch"
    gamma: str  # "0", "1" or "alpha"
    schedule: str  # "gluon", "mvr" or "estimator" (MVR's, with q in place of alpha)
    passes: int  # gradient evaluations per step
    exponent: float | None = None  # of K in the paper's bound, non-convex
    exponent_decay: float | None = None  # of log K / K, star-convex


METHODS = (
    Method("Gluon", "same", "0", "gluon", 1, -1 / 4, 1 / 3),
    Method("MVR-1", "same", "1", "mvr", 2, -1 / 3, 1 / 2),
    Method("MVR-2", "same", "0", "estimator", 2, -1 / 3),
    Method("MVR-3", "same", "1", "estimator", 2, -1 / 3),
    Method("single_batch, γ=1-β", "single_batch", "alpha", "gluon", 1),
    Method("single_batch, γ=1", "single_batch", "1", "mvr", 1),
    Method("previous_batch, γ=1", "previous_batch", "1", "mvr", 2),
    Method("Gluon, MVR's schedule", "same", "0", "mvr", 1),
)
PAPERS = ("MVR-1", "MVR-2", "MVR-3")


@dataclass(frozen=True)
class Arm:
    """A method with its two free constants."""

    method: Method
    c_alpha: float
    c_t: float


def schedule(arm: Arm, K: int, radius: float) -> tuple[float, float, float, float, float]:
    """(alpha, q, gamma, t, b) that the theory prescribes for the horizon K; see the head of this file."""
    gluon = arm.method.schedule == "gluon"
    if radius:
        b = arm.c_t * math.log(K) / K
        weight = arm.c_alpha * (b ** (2 / 3) if gluon else b)
        t = b * radius
    else:
        b = 0.0
        weight = arm.c_alpha * K ** (-1 / 2 if gluon else -2 / 3)
        t = arm.c_t * K ** (-3 / 4 if gluon else -2 / 3)
    weight = min(weight, 1.0)
    alpha, q = (math.sqrt(weight), weight) if arm.method.schedule == "estimator" else (weight, 1.0)
    return alpha, q, {"0": 0.0, "1": 1.0, "alpha": alpha}[arm.method.gamma], t, b


def bound(method: Method, K: float, radius: float) -> float | None:
    """The paper's rate, up to a constant; None if it states none."""
    if radius:
        return None if method.exponent_decay is None else (math.log(K) / K) ** method.exponent_decay
    return None if method.exponent is None else K**method.exponent


def arms_of(method: Method, radius: float) -> list[Arm]:
    """The tuning grid: the same number of pairs for every method, within what the theory allows."""
    if radius:
        alphas = (0.6, 1.0, 1.5, 2.0, 3.0) if method.schedule == "gluon" else (1.0, 2.0, 3.0, 4.0, 6.0)
        steps = (0.5, 0.75, 1.0, 1.5, 2.0)
    else:
        alphas = (0.5, 1.0, 2.0, 4.0, 6.0) if method.schedule == "gluon" else (0.5, 1.0, 2.0, 4.0, 8.0)
        steps = (1.0, 2.0, 4.0, 8.0, 16.0)
    return [Arm(method, a, t) for a in alphas for t in steps]


# ------------------------------------------------------------------------------------------------------ the recursion


def polar(M: Tensor) -> Tensor:
    """The orthogonal factor U Vᵀ of M = U S Vᵀ, exactly; -polar(M) is the LMO of the spectral ball."""
    U, _, Vh = torch.linalg.svd(M)
    return U @ Vh


def nuclear(G: Tensor) -> Tensor:
    """The dual of the spectral norm."""
    return torch.linalg.svdvals(G).sum(-1)


def noise_stream(horizons: Sequence[int], seeds: Sequence[int]) -> Callable[[int], Tensor]:
    """A function noise(k), k = 0, 1, ... -> (2, horizons that still run, 1, seeds, N, N), standard Gaussian.

    Each (seed, K) has its own generator, so that a run can be repeated alone.
    """
    sources = {(K, s): np.random.default_rng([s, K]) for K in horizons for s in seeds}
    block = math.gcd(*horizons)
    held: list[Tensor] = [torch.empty(0)]

    def noise(k: int) -> Tensor:
        if k % block == 0:
            running = [K for K in horizons if k < K]
            draws = [[sources[K, s].standard_normal((block, 2, N, N)) for s in seeds] for K in running]
            held[0] = torch.from_numpy(np.array(draws)).permute(2, 3, 0, 1, 4, 5).unsqueeze(3).contiguous()
        return held[0][k % block]

    return noise


def simulate(
    problem: Problem,
    arms: Sequence[Arm],
    horizons: Sequence[int],
    seeds: Sequence[int],
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Run all arms at all horizons (descending) and seeds at once. Returns each of CURVES as (horizons, arms, seeds).

    X is (horizons, arms, seeds, N, N). A finished horizon is cut off at the end of the first axis.
    """
    horizons = list(horizons)
    assert horizons == sorted(horizons, reverse=True)
    rules = [[schedule(arm, K, problem.radius) for arm in arms] for K in horizons]
    rules = torch.tensor(rules, dtype=torch.float64)[:, :, :, None, None, None]  # (H, P, 5, 1, 1, 1)
    alpha, q, gamma, t, b = rules.unbind(2)
    beta = 1 - alpha
    compares = [arm.method.compares for arm in arms]
    at_these_weights = torch.tensor([c == "previous_batch" for c in compares])[:, None, None, None]
    of_previous_draw = torch.tensor([c != "same" for c in compares])[:, None, None, None]

    noise = noise_stream(horizons, seeds)
    X = torch.stack([problem.initial(s) for s in seeds]).expand(len(horizons), len(arms), -1, -1, -1).clone()
    d = M = X_last = xi_last = None
    result = {curve: torch.zeros(X.shape[:3], dtype=torch.float64) for curve in CURVES}

    for k in range(horizons[0]):
        H = sum(k < K for K in horizons)
        if len(X) > H:  # drop the horizons that are done
            result["gap"][H : len(X)] = problem.gap(X[H:])
            X, d, M, X_last, xi_last = X[:H], d[:H], M[:H], X_last[:H], xi_last[:, :H]
            alpha, beta, q, gamma, t, b = alpha[:H], beta[:H], q[:H], gamma[:H], t[:H], b[:H]
        for i, K in enumerate(horizons[:H]):
            if k % max(1, K // MEASUREMENTS) == 0:
                result["dual_norm"][i] += nuclear(problem.grad(X[i])) / min(K, MEASUREMENTS)

        xi = noise(k)
        g = problem.grad(X, xi)
        if k == 0:
            d = M = g
        else:
            X_hat = torch.where(at_these_weights, X, X_last)
            g_hat = problem.grad(X_hat, torch.where(of_previous_draw, xi_last, xi))
            d = g + (1 - q) * (d - g_hat)
            M = beta * M + alpha * d + gamma * beta * (g - g_hat)
        if watch is not None:
            watch(k, X, M)
        X_last, xi_last = X, xi
        X = (1 - b) * X - t * polar(M)

    result["gap"][: len(X)] = problem.gap(X)
    return result


# --------------------------------------------------------------------------------------------------------- statistics


def slope(log_k: np.ndarray, log_y: np.ndarray) -> np.ndarray:
    """Least-squares slope along the last axis."""
    x = log_k - log_k.mean()
    return (log_y * x).sum(-1) / (x * x).sum()


def interval(samples: np.ndarray) -> list[float]:
    """The central 95% of the samples."""
    return [float(v) for v in np.quantile(samples, (0.025, 0.975))]


def fit(horizons: Sequence[int], values: np.ndarray, resamples: int = 10_000) -> dict[str, np.ndarray]:
    """Slopes of the mean over seeds of `values` (methods, horizons, seeds), all K and upper half, with bootstraps.

    The same resampled seeds serve all methods and horizons, so differences between methods are paired.
    """
    log_k = np.log(np.asarray(horizons, dtype=float))
    half = slice(len(horizons) // 2, None)
    n = values.shape[-1]
    weight = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    log_mean = np.log(values.mean(-1))
    log_boot = np.log(np.einsum("mks,rs->rmk", values, weight))
    return {
        "slope": slope(log_k, log_mean),
        "slope_boot": slope(log_k, log_boot),
        "upper": slope(log_k[half], log_mean[:, half]),
        "upper_boot": slope(log_k[half], log_boot[..., half]),
        "log_boot": log_boot,
    }


# ---------------------------------------------------------------------------------------------------- the experiments


def tune(problem: Problem, horizons: Sequence[int], seeds: Sequence[int]) -> dict:
    """Each method's best constants at the last of `horizons`, and the envelope: the best at each."""
    arms = [arm for method in METHODS for arm in arms_of(method, problem.radius)]
    error = simulate(problem, arms, horizons[::-1], seeds)[problem.metric].mean(-1).flip(0).numpy()
    log_k = np.log(np.array(horizons, dtype=float))
    chosen = {}
    for method in METHODS:
        mine = [i for i, arm in enumerate(arms) if arm.method is method]
        best = [min(mine, key=lambda i: row[i]) for row in error]
        grid = [arms[i] for i in mine]
        edges = {name: {min(getattr(a, name) for a in grid), max(getattr(a, name) for a in grid)}
                 for name in ("c_alpha", "c_t")}  # fmt: skip
        pick = arms[best[-1]]
        near = [i for i in mine if error[-1, i] <= 1.25 * error[-1, best[-1]]]
        near = slope(log_k, np.log(error[:, near]).T)
        envelope = np.array([row[i] for row, i in zip(error, best, strict=True)])
        chosen[method.name] = {
            "c_alpha": pick.c_alpha,
            "c_t": pick.c_t,
            "on_edge_of_grid": [name for name in edges if getattr(pick, name) in edges[name]],
            "envelope": envelope.tolist(),
            "envelope_constants": [(arms[i].c_alpha, arms[i].c_t) for i in best],
            "envelope_slope": float(slope(log_k, np.log(envelope))),
            "near_best": len(near),
            "near_best_slopes": [float(near.min()), float(near.max())],
        }
    return chosen


def noise_ratio(problem: Problem, seeds: Sequence[int]) -> dict[str, float]:
    """Mean dual norms at the start: of one gradient's noise, and of the exact gradient."""
    X = torch.stack([problem.initial(s) for s in seeds])
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1000, len(seeds), N, N)))
    noise = nuclear(problem.grad(X, draws) - problem.grad(X)).mean().item()
    return {"noise": noise, "gradient_at_start": nuclear(problem.grad(X)).mean().item()}


def run(horizons: Sequence[int], seeds: Sequence[int], tune_to: int, tune_seeds: Sequence[int]) -> dict:
    """Tune every problem on its own seeds, then measure. Returns the results for rates.json."""
    assert not set(seeds) & set(tune_seeds)
    results = {}
    for problem in PROBLEMS:
        began = time.perf_counter()
        chosen = tune(problem, [K for K in horizons if tune_to >= K], tune_seeds)
        tuned = time.perf_counter()
        arms = [Arm(m, chosen[m.name]["c_alpha"], chosen[m.name]["c_t"]) for m in METHODS]
        values = simulate(problem, arms, horizons[::-1], seeds)[problem.metric].flip(0).permute(1, 0, 2)
        done = time.perf_counter()
        print(f"{problem.name}: tuning {tuned - began:.0f} s, runs {done - tuned:.0f} s", flush=True)
        results[problem.name] = {
            "title": problem.title,
            "metric": problem.metric,
            "sigma": problem.sigma,
            "radius": problem.radius,
            "scales": noise_ratio(problem, seeds),
            "tuning": chosen,
            "seconds": {"tuning": tuned - began, "runs": done - tuned},
            "values": {m.name: [[float(f"{v:.6g}") for v in row] for row in values[i].tolist()]
                       for i, m in enumerate(METHODS)},
        }  # fmt: skip
    return results


def analyse(horizons: Sequence[int], results: dict) -> None:
    """Add slopes, intervals, differences and ratios to `results`, in place."""
    names = [m.name for m in METHODS]
    gluon = names.index("Gluon")
    log_k = np.log(np.array(horizons, dtype=float))
    half = len(horizons) // 2
    for record in results.values():
        f = fit(horizons, np.array([record["values"][name] for name in names]))
        log_boot = f["log_boot"]
        log_mean = np.log([np.mean(record["values"][name], axis=-1) for name in names])
        record["fits"], record["minus_gluon"], record["over_gluon"] = {}, {}, {}
        for i, method in enumerate(METHODS):
            rate = [bound(method, K, record["radius"]) for K in horizons]
            log_bound = None if rate[0] is None else np.log(rate)
            record["fits"][method.name] = {
                "slope": float(f["slope"][i]),
                "slope_95": interval(f["slope_boot"][:, i]),
                "upper_half": float(f["upper"][i]),
                "upper_half_95": interval(f["upper_boot"][:, i]),
                "bound": None if log_bound is None else float(slope(log_k, log_bound)),
                "bound_upper_half": None if log_bound is None else float(slope(log_k[half:], log_bound[half:])),
                "local_slopes": (np.diff(log_mean[i]) / np.diff(log_k)).tolist(),
                "last": float(np.exp(log_mean[i, -1])),
                "last_95": interval(np.exp(log_boot[:, i, -1])),
            }
        for name in PAPERS:
            mvr = names.index(name)
            difference = {
                "slope": (f["slope"][mvr] - f["slope"][gluon], f["slope_boot"][:, mvr] - f["slope_boot"][:, gluon]),
                "upper_half": (f["upper"][mvr] - f["upper"][gluon], f["upper_boot"][:, mvr] - f["upper_boot"][:, gluon]),
            }
            record["minus_gluon"][name] = {k: {"value": float(v), "ci95": interval(s)} for k, (v, s) in difference.items()}
            record["over_gluon"][name] = {
                "equal_updates": [
                    {"K": K, "ratio": float(np.exp(log_mean[mvr, j] - log_mean[gluon, j])),
                     "ci95": interval(np.exp(log_boot[:, mvr, j] - log_boot[:, gluon, j]))}
                    for j, K in enumerate(horizons)
                ],
                "equal_gradients": [
                    {"gradients": K, "ratio": float(np.exp(log_mean[mvr, j - 1] - log_mean[gluon, j])),
                     "ci95": interval(np.exp(log_boot[:, mvr, j - 1] - log_boot[:, gluon, j]))}
                    for j, K in enumerate(horizons) if j
                ],
            }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- output


def show(value: float, ci95: Sequence[float], digits: int = 3) -> str:
    """`value [low, high]`."""
    return f"{value:.{digits}f} [{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]"


def table(report: dict) -> str:
    """The report as Markdown."""
    horizons = report["horizons"]
    low, mid, high = (round(math.log2(horizons[i])) for i in (0, len(horizons) // 2, -1))
    top = report["tuning_horizons"][-1]
    out = [
        "# Rates: slopes of the error against the horizon K",
        "",
        f"Made by `{report['command']}`: {len(report['seeds'])} seeds, K = 2^{low} … 2^{high}, "
        f"{report['wall_seconds']:.0f} s on one thread of {report['machine']['cpu']}, "
        f"torch {report['machine']['torch']}. Brackets are 95% bootstrap intervals over seeds. c_α, c_t: the constants "
        f'tuned at K = {report["tuning_horizons"][-1]} on {len(report["tuning_seeds"])} other seeds; "at end": the best '
        f"value was an end of the grid (in the star-convex problems c_t = 0.5 and c_α = 1 on MVR's schedules are the least "
        f"that the theory allows). Envelope: slope of the best constants for each K apart. Near-best: the slopes of "
        f"the pairs within 25% of the best error at that K (and how many they are).",
    ]
    for name, record in report["results"].items():
        out += [
            "",
            f"## `{name}`: {record['title']}",
            "",
        ]
        rows = [
            [
                "method",
                "bound",
                "measured slope",
                f"its upper half, K ≥ 2^{mid}",
                f"error at 2^{high}",
                "c_α, c_t",
                f"envelope, K ≤ {top}",
                f"near-best constants, K ≤ {top}",
            ]
        ]
        for m in METHODS:
            f, tuning = record["fits"][m.name], record["tuning"][m.name]
            ends = ", ".join({"c_alpha": "c_α"}.get(end, end) for end in tuning["on_edge_of_grid"])
            ends = f" ({ends} at end)" if ends else ""
            near = tuning["near_best_slopes"]
            exponent = "–" if f["bound"] is None else f"{f['bound']:.3f}"
            if f["bound"] is not None and record["radius"]:
                exponent = ("-1/2" if m.passes == 2 else "-1/3") + f"; with log {exponent}"
            rows.append(
                [
                    m.name,
                    exponent,
                    show(f["slope"], f["slope_95"]),
                    show(f["upper_half"], f["upper_half_95"]),
                    f"{f['last']:.3g}",
                    f"{tuning['c_alpha']:g}, {tuning['c_t']:g}{ends}",
                    f"{tuning['envelope_slope']:.3f}",
                    f"{near[0]:.2f} … {near[1]:.2f} ({tuning['near_best']})",
                ]
            )
        out.append(markdown(rows))
        rows = [
            [
                "minus Gluon",
                "slope",
                "upper half",
                f"error over Gluon's, 2^{high} updates each",
                f"2^{high} gradients each",
                "by horizon, equal gradients",
            ]
        ]
        for method, d in record["minus_gluon"].items():
            updates, gradients = (record["over_gluon"][method][key] for key in ("equal_updates", "equal_gradients"))
            rows.append(
                [method, show(**d["slope"]), show(**d["upper_half"])]
                + [show(ends[-1]["ratio"], ends[-1]["ci95"]) for ends in (updates, gradients)]
                + [", ".join(f"{g['ratio']:.2f}" for g in gradients)]
            )
        out.append(markdown(rows).rstrip())
    return "\n".join(out) + "\n"


def picture(report: dict, path: Path) -> None:
    """Errors above (95% bands, the bounds dashed), local slopes below."""
    plt = pyplot()

    # Okabe and Ito's colours, a marker of its own for each method
    style = dict(zip([m.name for m in METHODS], [("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "v"),
                                                 ("#CC79A7", "D"), ("#E69F00", "x"), ("#56B4E9", "*"), ("#999999", "+")],
                     strict=True))  # fmt: skip
    horizons = np.array(report["horizons"], dtype=float)
    middle = np.sqrt(horizons[1:] * horizons[:-1])
    columns = len(report["results"])
    fig, axes = plt.subplots(2, columns, figsize=(4.7 * columns, 8.4), height_ratios=(3, 2), squeeze=False)
    for column, record in enumerate(report["results"].values()):
        above, below = axes[:, column]
        f = fit(report["horizons"], np.array([record["values"][m.name] for m in METHODS]), resamples=2000)
        for i, m in enumerate(METHODS):
            colour, marker = style[m.name]
            mean = np.array(record["values"][m.name]).mean(-1)
            low, high = np.quantile(np.exp(f["log_boot"][:, i]), (0.025, 0.975), axis=0)
            line = record["fits"][m.name]
            main = m.name == "Gluon" or m.name in PAPERS
            label = f"{m.name}: {line['slope']:.2f}"
            above.plot(horizons, mean, color=colour, marker=marker, ms=5, lw=1.8 if main else 1, label=label)
            above.fill_between(horizons, low, high, color=colour, alpha=0.2, lw=0)
            below.plot(middle, line["local_slopes"], color=colour, marker=marker, ms=4, lw=1.8 if main else 0.8)
            if line["bound"] is not None:
                rate = np.array([bound(m, K, record["radius"]) for K in horizons])
                above.plot(horizons, rate * mean[-1] / rate[-1] * 1.15, color=colour, ls=":", lw=1.2)
                local = np.diff(np.log(rate)) / np.diff(np.log(horizons))
                below.plot(middle, local, color=colour, ls=":", lw=1.2)
        above.set(xscale="log", yscale="log", title=record["title"])
        above.set_xscale("log", base=2)
        above.legend(fontsize=8, title="slope over all K (dotted: bound's rate)", title_fontsize=8)
        below.set_xscale("log", base=2)
        below.set(xlabel="horizon K (updates)", ylim=(-1.3, 0.25))
        below.axhline(0, color="#999999", lw=0.6)
        for ax in (above, below):
            ax.grid(alpha=0.25, which="both", lw=0.4)
    axes[0, 0].set_ylabel("error (mean over seeds, 95% band)")
    axes[1, 0].set_ylabel("local slope between neighbouring K")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def machine() -> dict[str, str]:
    """The machine and the versions."""
    return {"cpu": cpu_name(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def summary(report: dict) -> str:
    """Analyse the report in place. Returns its table."""
    analyse(report["horizons"], report["results"])
    return table(report)


def main(argv: Sequence[str] | None = None) -> dict:
    """Run, or only draw again. Returns the report."""
    parser = Parser(description="measured convergence rates of Gluon and MVR", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="K = 2^4 … 2^9 and 8 seeds: a check, not a measurement")
    parser.add_argument("--replot", action="store_true", help="tables and picture again, from rates.json")
    parser.add_argument("--seeds", type=int, default=None, help="default 16 (quick: 8)")
    parser.add_argument("--max-exponent", type=int, default=None, help="largest K is 2 to this; default 16 (quick: 9)")
    parser.add_argument("--out", type=Path, default=None, help="default results/rates (quick: results/rates-quick)")
    parser.add_argument("--threads", type=positive, default=1)
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    first, last = (4, 9) if args.quick else (6, 16)
    last = last if args.max_exponent is None else args.max_exponent
    count = (8 if args.quick else 16) if args.seeds is None else args.seeds
    if last < first + 2:
        raise UserError(f"--max-exponent {last} leaves fewer than three horizons; give at least {first + 2}")
    if count < 2:
        raise UserError(f"--seeds {count} leaves no spread to measure; give at least 2")
    torch.set_num_threads(args.threads)
    out = args.out or Path("results") / ("rates-quick" if args.quick else "rates")
    out.mkdir(parents=True, exist_ok=True)

    if args.replot:
        with as_written(out / "rates.json", "run without --replot"):
            report = json.loads((out / "rates.json").read_text())
            text = summary(report)
    else:
        horizons = [2**e for e in range(first, last + 1)]
        seeds = list(range(count))
        tune_to = 2 ** ((first + last) // 2)
        tune_seeds = list(range(10_000, 10_004 if args.quick else 10_008))
        began = time.perf_counter()
        results = run(horizons, seeds, tune_to, tune_seeds)
        report = {
            "command": shlex.join(["python", "-m", "experiments.rates", *argv]),
            "machine": machine(),
            "threads": args.threads,
            "wall_seconds": time.perf_counter() - began,
            "horizons": horizons,
            "seeds": seeds,
            "tuning_seeds": tune_seeds,
            "tuning_horizons": [K for K in horizons if tune_to >= K],
            "results": results,
        }
        text = summary(report)
    write_text(out / "rates.json", json.dumps(report, ensure_ascii=False) + "\n")
    write_text(out / "table.md", text)
    picture(report, out / "rates.png")
    print(text)
    return report


if __name__ == "__main__":
    with one_line_errors("experiments.rates"):
        main()
