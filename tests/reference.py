"""The recursions as the papers print them: float64, the SVD, a snapshot of the previous weights, one matrix at a time."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradient = Callable[[list[Tensor], object], list[Tensor | None]]


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


def trajectory(
    variant: str,
    weights: Sequence[Tensor],
    gradient: Gradient,
    batches: Sequence[object],
    norms: Sequence[str],
    radii: Sequence[float],
    lr: Callable[[int], float],
    beta: Callable[[int], float],
    gamma: Callable[[int], float],
    decay: float,
    inner: float | None = None,
) -> list[list[Tensor]]:
    """X_0 … X_K of Gluon or MVR-1, -2, -3 (or the nested form), from `gradient(weights, batch)`."""
    x = [w.detach().clone().double() for w in weights]
    path = [[w.clone() for w in x]]
    m: list[Tensor] = []
    d: list[Tensor] = []
    x_old: list[Tensor] = []
    g_old: list[Tensor] = []
    for k, batch in enumerate(batches):
        b, c = beta(k), gamma(k)
        g = gradient(x, batch)
        if k == 0:
            m, d = [t.clone() for t in g], [t.clone() for t in g]
        else:
            if variant == "mvr1":
                hat = g_old
            elif variant == "mvr2":
                hat = gradient(x_old, batch)
            elif variant == "mvr3":
                hat, c = gradient(x, batches[k - 1]), gamma(k - 1)
            else:
                hat, c = g, 0.0
            if inner is not None:
                d = [gi + (1 - inner) * (di - hi) for gi, di, hi in zip(g, d, hat, strict=True)]
                m = [b * mi + (1 - b) * di for mi, di in zip(m, d, strict=True)]
            elif variant == "mvr1" and c != gamma(k - 1):  # where γ moves: the definition by the average E
                e = _average(batches, path, gradient, beta, k)
                m = [(1 - c) * ei + c * gi for ei, gi in zip(e, g, strict=True)]
            else:
                m = [b * mi + (1 - b) * gi + c * b * (gi - hi) for mi, gi, hi in zip(m, g, hat, strict=True)]
        g_old, x_old = g, [w.clone() for w in x]
        x = [
            (1 - lr(k) * decay) * w + lr(k) * radius * lmo(mi, norm)
            for w, mi, norm, radius in zip(x, m, norms, radii, strict=True)
        ]
        path.append([w.clone() for w in x])
    return path


def _average(batches: Sequence[object], path: list[list[Tensor]], gradient: Gradient, beta: Callable, k: int) -> list[Tensor]:
    """E_k = β E_{k-1} + (1-β) g_k, from the start."""
    e = gradient(path[0], batches[0])
    for j in range(1, k + 1):
        g = gradient(path[j], batches[j])
        e = [beta(j) * ei + (1 - beta(j)) * gi for ei, gi in zip(e, g, strict=True)]
    return e
