"""The methods, schedules and problems of experiments/rates.py, and the recursion that runs them.

It is a reference implementation: the recursion in `simulate` is the formula, in float64 with the exact polar factor, and shares
no code with the optimizers in `optim`.

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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

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
    """(alpha, q, gamma, t, b) that the theory prescribes for the horizon K; see above."""
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
