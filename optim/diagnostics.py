"""What momentum variance reduction does in a run, layer by layer: measured beside the training, never inside it.

The optimizers do not know of this module, so it costs nothing where it is not called. Its functions evaluate closures of
the same kind as `step` takes (a mean loss, backward() onto `.grad`) at weights that the caller kept with `snapshot`, and
leave weights, gradients and random state as they found them.

Notation of `optim.mvr`: M_k = β M_{k-1} + (1-β) g_k + γβ d_k with the correction's d_k = g_k - ĝ_k. Lists of tensors are in
the order of `parameters(optimizer)`. For one process, or under DDP for what this rank owns; not for DTensors.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.gluon import Gluon
from optim.mvr import GluonMVR1, GluonMVR3
from optim.norms import get_norm

Closure = Callable[[], Any]
KINDS = ("mvr1", "mvr2", "mvr3")


def parameters(optimizer: Gluon) -> list[Tensor]:
    """The parameters, group after group."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in params):
        raise NotImplementedError("diagnostics are for whole parameters: measure in one process or under DDP, not with FSDP2")
    return params


@torch.no_grad()
def snapshot(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the weights, to come back to."""
    return [p.detach().clone() for p in params]


def gradient(params: Sequence[Tensor], closure: Closure, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The gradient that `closure` leaves at `weights` (default: as they are), in float32 at least; None counts as zero.

    The parameters' values and `.grad` and the random state are put back, so that each call sees the same dropout masks.
    """
    kept, gradients = snapshot(params), [p.grad for p in params]
    devices = {p.device for p in params if p.device.type == "cuda"}
    try:
        _set(params, weights if weights is not None else kept, None)
        with torch.random.fork_rng(devices), torch.enable_grad():
            closure()
        return [
            torch.zeros_like(p, dtype=_wide(p)) if p.grad is None else p.grad.detach().to(_wide(p), copy=True) for p in params
        ]
    finally:
        _set(params, kept, gradients)


def difference(
    params: Sequence[Tensor],
    closure: Closure,
    weights: Sequence[Tensor],
    previous_weights: Sequence[Tensor],
    kind: str = "mvr2",
    previous_closure: Closure | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """(g, d = g - ĝ): g of `closure` at `weights`, and ĝ as the kind has it.

    mvr1: `previous_closure` (the last batch) at `previous_weights`; mvr2: `closure` there; mvr3: `previous_closure` at
    `weights`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "mvr2" and previous_closure is None:
        raise ValueError(f"previous_closure must be the last batch's closure for kind={kind!r}, got None")
    g = gradient(params, closure, weights)
    old = closure if kind == "mvr2" else previous_closure
    hat = gradient(params, old, weights if kind == "mvr3" else previous_weights)
    return g, [a - b for a, b in zip(g, hat, strict=True)]


def momenta(optimizer: Gluon, gradients: Sequence[Tensor] | None = None) -> list[Tensor | None]:
    """Copies of M_k of the last step: what its LMO was taken of. None where another rank owns it.

    Gluon and MVR-2 keep it. MVR-1 keeps E_k, and M_k = (1-γ) E_k + γ g_k: `gradients` must be that g_k. MVR-3 has already
    subtracted γ ĝ_{k+1}: `gradients` must be that ĝ_{k+1}, the last batch at the current weights. γ is the groups' present
    one for MVR-1. Raises TypeError where `gradients` are missing.
    """
    needed = isinstance(optimizer, GluonMVR1 | GluonMVR3) and any(group["gamma"] > 0 for group in optimizer.param_groups)
    if needed and gradients is None:
        raise TypeError(f"momenta of {type(optimizer).__name__} need the last batch's gradients, got None")
    result: list[Tensor | None] = []
    for i, p in enumerate(parameters(optimizer)):
        state, group = optimizer.state[p], _group_of(optimizer, p)
        m = state.get("momentum_buffer")
        if m is not None:
            m = m.clone()
            if needed and isinstance(optimizer, GluonMVR1) and group["norm"] != "adamw" and state["steps"]:
                m.lerp_(gradients[i].to(m.dtype), group["gamma"])
            elif needed and isinstance(optimizer, GluonMVR3) and state["evaluated"]:
                m.add_(gradients[i].to(m.dtype), alpha=group["evaluated_gamma"])
        result.append(m)
    return result


def dual_norms(optimizer: Gluon, tensors: Sequence[Tensor | None]) -> list[float | None]:
    """The dual norm of each tensor in its layer's own norm, max over ‖Z‖ ≤ 1 of ⟨M, Z⟩: what a unit step gains to first order.

    None where there is no tensor, or no norm (adamw).
    """
    result: list[float | None] = []
    for p, m in zip(parameters(optimizer), tensors, strict=True):
        group = _group_of(optimizer, p)
        if m is None or group["norm"] == "adamw":
            result.append(None)
        else:
            result.append(get_norm(group["norm"], p.shape, group["scale"], group["polar"]).dual_norm(m).item())
    return result


def inner(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> float:
    """⟨a, b⟩ over all entries of two tensors or lists of tensors, summed in float64."""
    pairs = [(a, b)] if isinstance(a, Tensor) else zip(a, b, strict=True)
    return math.fsum(torch.dot(x.flatten().double(), y.flatten().double()).item() for x, y in pairs)


def relative_size(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> float:
    """‖a‖/‖b‖ (Euclidean, pooled over lists), such as ‖g - ĝ‖/‖g‖; nan where b = 0."""
    return math.sqrt(_over(inner(a, a), inner(b, b)))


def rounding_noise(exact: Sequence[Tensor] | Tensor, rounded: Sequence[Tensor] | Tensor) -> float:
    """‖d̃ - d‖/‖d‖ for a correction d and the same in lower precision, d̃; nan where d = 0.

    g and ĝ have rounding errors of a size that does not shrink with the step, while g - ĝ does.
    """
    if isinstance(exact, Tensor):
        exact, rounded = [exact], [rounded]
    return relative_size([r - e for e, r in zip(exact, rounded, strict=True)], exact)


def best_gamma(d1: Sequence[Tensor] | Tensor, d2: Sequence[Tensor] | Tensor) -> float:
    r"""γ* = ⟨d₁, d₂⟩ / ‖(d₁+d₂)/2‖², from the d = g - ĝ of two independent micro-batches of one size.

    The control-variate formula: with Δ = E d, the change of the true gradient, E‖Δ - γ d‖² is least at γ = ‖Δ‖²/E‖d‖², and
    ⟨d₁, d₂⟩ is an unbiased estimate of ‖Δ‖² because the two noises are independent. d is that of both together.
    It is for one step and memoryless: it ignores the error that the momentum already carries, and that the noise of d is
    correlated with that of g (and, for MVR-1 and MVR-3, with that of M_{k-1}). nan where d = 0; noise can make it negative.
    """
    if isinstance(d1, Tensor):
        d1, d2 = [d1], [d2]
    mean = [(a + b) / 2 for a, b in zip(d1, d2, strict=True)]
    return _over(inner(d1, d2), inner(mean, mean))


def best_gamma_with_memory(
    momentum: Sequence[Tensor], g: Sequence[Tensor], d: Sequence[Tensor], target: Sequence[Tensor], beta: float
) -> float:
    """γ that brings M_k = β M_{k-1} + (1-β) g + γβ d nearest to `target`, an independent estimate of ∇f(X_k).

    -⟨A, d⟩/(β‖d‖²) with A = β M_{k-1} + (1-β) g - target: `best_gamma` with all that it ignores. nan where d or β is 0.
    """
    a = [beta * m + (1 - beta) * x - t for m, x, t in zip(momentum, g, target, strict=True)]
    return _over(-inner(a, d), beta * inner(d, d))


def tracking_error(momentum: Sequence[Tensor], target1: Sequence[Tensor], target2: Sequence[Tensor]) -> float:
    """‖M - ∇f‖²/‖∇f‖² from two independent estimates of ∇f, whose own noise drops out of both products."""
    a, b = ([m - t for m, t in zip(momentum, target, strict=True)] for target in (target1, target2))
    return _over(inner(a, b), inner(target1, target2))


@dataclass(frozen=True)
class Layer:
    """One parameter's diagnostics; None where there is nothing to measure."""

    name: str
    momentum_dual_norm: float | None
    gradient_dual_norm: float | None
    relative_difference: float  # ‖g - ĝ‖/‖g‖
    best_gamma: float
    rounding_noise: float | None  # ‖d̃ - d‖/‖d‖
    rounding_ratio: float | None  # ‖d̃‖/‖d‖


Halves = tuple[Sequence[Tensor], Sequence[Tensor]]


def layers(
    optimizer: Gluon,
    named_parameters: Iterable[tuple[str, Tensor]],
    momentum: Sequence[Tensor | None],
    gradients: Halves,
    differences: Halves,
    low_precision: Halves | None = None,
) -> list[Layer]:
    """All of this per layer, in the order of `parameters(optimizer)`.

    `gradients` and `differences` are the g and the d = g - ĝ of two independent micro-batches of one size (see
    `difference`), and `low_precision` is the same d evaluated under autocast.
    """
    names = {id(p): name for name, p in named_parameters}
    g, d = _mean(*gradients), _mean(*differences)
    low = _mean(*low_precision) if low_precision is not None else [None] * len(d)
    return [
        Layer(
            names.get(id(p), "?"),
            of_momentum,
            of_gradient,
            relative_size(d[i], g[i]),
            best_gamma(differences[0][i], differences[1][i]),
            None if low[i] is None else rounding_noise(d[i], low[i]),
            None if low[i] is None else relative_size(low[i], d[i]),
        )
        for i, (p, of_momentum, of_gradient) in enumerate(
            zip(parameters(optimizer), dual_norms(optimizer, momentum), dual_norms(optimizer, g), strict=True)
        )
    ]


@torch.no_grad()
def _set(params: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor | None] | None) -> None:
    for i, (p, w) in enumerate(zip(params, weights, strict=True)):
        p.copy_(w)
        p.grad = None if gradients is None else gradients[i]


def _group_of(optimizer: Gluon, p: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _mean(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [(x + y) / 2 for x, y in zip(a, b, strict=True)]


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
