"""The formulas as published: float64, the SVD, a copy of the previous weights, one parameter at a time."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Gradient = Callable[..., list[Tensor | None]]  # (weights, batch) -> one gradient per parameter, None where it has none
Schedule = Callable[[int], float]
DEFERRED = ("mvr1", "mvr2", "mvr3")


def lmo(m: Tensor, norm: str) -> Tensor:
    """argmin over the unit ball of ⟨M, Z⟩, with Scion's dimension factors."""
    if not m.any():
        return torch.zeros_like(m)
    if norm == "spectral":
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        return -math.sqrt(m.shape[0] / m.shape[1]) * u @ vh
    if norm == "sign":
        return -torch.sign(m) / (m.shape[1] if m.ndim > 1 else 1)
    if norm == "colnorm":
        return -math.sqrt(m.shape[0]) * m / m.norm(dim=0, keepdim=True)
    if norm == "rownorm":
        return -m / (math.sqrt(m.shape[1]) * m.norm(dim=1, keepdim=True))
    if norm == "frobenius":
        return -m / m.norm()
    if norm == "rms":
        return -m / m.square().mean().sqrt()
    raise ValueError(norm)


class Average:
    """The weight of the past in an average of gradients.

    With bias correction β_k = β W_{k-1} / W_k, where W_k = β W_{k-1} + (1-β) and W_{-1} = 0. Without it, 0 and then β.
    """

    def __init__(self, bias_correction: bool) -> None:
        self.bias_correction, self.total = bias_correction, 0.0

    def past(self, beta: float) -> float:
        before, self.total = self.total, beta * self.total + (1 - beta)
        if self.bias_correction:
            return beta * before / self.total
        return beta if before else 0.0


class Parameter:
    """M and d of one parameter, and the weights of their averages."""

    def __init__(self, weight: Tensor, bias_correction: bool) -> None:
        self.m, self.d = torch.zeros_like(weight), torch.zeros_like(weight)
        self.m_average, self.d_average = Average(bias_correction), Average(bias_correction)
        self.started = False

    def lmo_input(
        self, variant: str, g: Tensor | None, hat: Tensor | None, corrected: bool, beta: float, gamma: float, q: float
    ) -> Tensor | None:
        """Take this step's gradients. Returns None if the parameter has none, and so does not move."""
        corrected = corrected and self.started  # otherwise there are no previous weights
        if g is None and (hat is None or not corrected):
            return None
        g = torch.zeros_like(self.m) if g is None else g
        hat = torch.zeros_like(self.m) if hat is None else hat
        beta, rest = self.m_average.past(beta), self.d_average.past(1 - q)
        self.started = True
        if corrected:
            self.d = g + rest * (self.d - hat)
            self.m = beta * self.m + (1 - beta) * self.d + gamma * beta * (g - hat)
        else:
            self.d = rest * self.d + (1 - rest) * g
            self.m = beta * self.m + (1 - beta) * self.d
        return (1 - gamma) * self.m + gamma * g if variant == "single_batch" else self.m


def trajectory(
    variant: str,
    weights: Sequence[Tensor],
    gradient: Gradient,
    batches: Sequence[object],
    norms: Sequence[str],
    radii: Sequence[float],
    lr: Schedule,
    beta: Schedule,
    gamma: Schedule = lambda _: 1.0,
    decay: float = 0.0,
    q: Schedule = lambda _: 0.5,
    bias_correction: bool = True,
    flushes: Iterable[int] = (),
) -> list[list[Tensor]]:
    """X_0 … X_K of gluon, mvr1, mvr2, mvr3, single_batch or previous_batch.

    `gradient(weights, batch)` is g_k, `gradient(weights, batch, old=True)` is ĝ_k. A flush comes after a step of `flushes`.
    """
    x = [w.detach().clone().double() for w in weights]
    path = [x]
    parameters = [Parameter(w, bias_correction) for w in x]
    x_old: list[Tensor] | None = None
    for k, batch in enumerate(batches):
        scale = gamma(k - 1) if variant == "previous_batch" and k else 0.0 if variant in ("gluon", "mvr2") else gamma(k)
        new_weight = q(k) if variant in ("mvr2", "mvr3") else 1.0
        g = gradient(x, batch)
        hat = None
        if scale > 0 or new_weight < 1:
            if variant in DEFERRED and x_old is not None:
                hat = gradient(x_old, batch, old=True)
            elif variant == "previous_batch" and k:
                hat = gradient(x, batches[k - 1], old=True)
        x_old, x = (None if k in flushes else x), [w.clone() for w in x]
        for i, p in enumerate(parameters):
            m = p.lmo_input(variant, g[i], hat and hat[i], hat is not None, beta(k), scale, new_weight)
            if m is not None:
                x[i] = (1 - lr(k) * decay) * x[i] + lr(k) * radii[i] * lmo(m, norms[i])
        path.append(x)
    return path


def muon_mvr_trajectory(x, gradient, steps, last_of, settings, betas, eps):
    """MuonMVR's weights after each step. `last_of(k, x, x_old, g_old)` is what step k compares with, or None."""
    path, x_old, g_old = [], None, None
    first, second = ([torch.zeros_like(w) for w in x] for _ in range(2))
    for k, micro_batches in enumerate(steps):
        g = gradient(x, micro_batches)
        last = last_of(k, x, x_old, g_old)
        x_old, g_old = x, g
        lr, beta, gamma, decay = settings(k).values()
        moved = []
        for i, w in enumerate(x):
            if w.ndim == 2:
                c = g[i] if last is None else g[i] + gamma * beta / (1 - beta) * (g[i] - last[i])
                if c.norm() > 1:
                    c = c / c.norm()
                first[i] = beta * first[i] + (1 - beta) * c
                u, _, vh = torch.linalg.svd(first[i], full_matrices=False)
                update = 0.2 * math.sqrt(max(w.shape)) * u @ vh
            else:
                first[i] = betas[0] * first[i] + (1 - betas[0]) * g[i]
                second[i] = betas[1] * second[i] + (1 - betas[1]) * g[i] ** 2
                m, v = first[i] / (1 - betas[0] ** (k + 1)), second[i] / (1 - betas[1] ** (k + 1))
                update = m / (v.sqrt() + eps)
            moved.append((1 - lr * decay) * w - lr * update)
        x = moved
        path.append(x)
    return path
