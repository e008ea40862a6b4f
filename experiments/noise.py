"""What noise does to a run: training without any, and the size of the noise along a run. The measurements of experiments.why.

**Without noise** (`exact`): the same sequences at every step, so that each gradient is that of one fixed function. A gradient
at the previous weights is then the last step's own, and is kept and not computed again.

**The noise along a run** (`along`), from gradients g_b of n batches of m sequences each, at the weights X before an update and
X' after it. With D_b = g_b(X') - g_b(X), and g and D for the means over b,

    tr Σ / m = sum |g_b - g|² / (n-1)           |G|² = |g|² - tr Σ / (m n)
    S²       = sum |D_b - D|² / (n-1)           |D|² of the true change = |D|² - S² / n

Σ is the covariance of the gradient of one sequence. |G|², |D|² and G·G' are free of the noise of the mean. From these:

    noise scale  tr Σ / |G|²                    the batch, in sequences, whose noise is as large as the gradient
    S/σ          S / sqrt(tr Σ / m)             the noise of g - ĝ over that of g, on batches of one size
    |D|/|G|                                     how far the gradient moves in one update, in its own lengths
    γ*(B)        |D|² / (|D|² + S² m / B)       the γ for which γ (g - ĝ), on batches of B, has the least squared error from D
    cosine       G·G' / (|G| |G'|)              -1: the gradient turns round
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.setup import batches, build
from training.config import Config
from training.optimizers import is_deferred, schedule

Gradients = list[Tensor]  # one per parameter
Moments = dict[str, float]  # |G|², |G'|², G·G', |D|², and the traces of the covariance of g_b and of D_b
Lines = list[dict[str, Any]]  # of metrics


def mean_gradient(model: nn.Module, inputs: Tensor, targets: Tensor, micro: int) -> tuple[float, Gradients]:
    """The mean loss of the sequences (rows, T) and its gradient, from `micro` sequences at a time."""
    weights, total, sums = list(model.parameters()), 0.0, None
    for x, y in zip(inputs.split(micro), targets.split(micro), strict=True):
        loss = model(x, y) * (len(x) / len(inputs))
        parts = list(torch.autograd.grad(loss, weights))
        total += loss.item()
        if sums is None:
            sums = parts
        else:
            torch._foreach_add_(sums, parts)
    assert sums is not None
    return total, sums


def line_at(config: Config, update: int, started: float, loss: float) -> dict[str, Any]:
    """A line of metrics. `passes`: the gradients that the update took, which is one, since an exact run keeps the others."""
    tokens = update * config.batch_size * config.seq_len
    seconds = round(time.monotonic() - started, 3)
    return {"update": update, "tokens": tokens, "passes": update, "seconds": seconds, "train_loss": loss}


# Without noise --------------------------------------------------------------------------------------------------------


def exact(config: Config, every: int) -> Lines:
    """Train on the same `batch_size` sequences at every step. A line for every `every`-th update and the last.

    `train_loss` is the exact loss at the weights of `update`, `cosine` that of the gradients there and one update before, and
    `change` the length of their difference over that of the one before.
    """
    model, optimizer = build(config)
    with batches(config) as loader:
        inputs, targets = loader.batch(0)
    set_schedule, weights = schedule(optimizer, config), list(model.parameters())
    lines: Lines = []
    held: tuple[int, float, Gradients] | None = None  # the index of the weights, and the loss and the gradient there
    started = time.monotonic()

    def closure() -> Tensor:
        nonlocal held
        update = optimizer.updates
        if held is None or held[0] != update:
            loss, gradient = mean_gradient(model, inputs, targets, config.micro_batch_size or len(inputs))
            if update % every == 0 or update == config.steps:
                lines.append(line_at(config, update, started, loss) | ({} if held is None else compared(held[2], gradient)))
            held = update, loss, gradient
        for p, g in zip(weights, held[2], strict=True):
            p.grad = g.clone()
        return torch.tensor(held[1])

    for step in range(config.steps):
        set_schedule(step)
        optimizer.step(closure)
    if is_deferred(optimizer):
        optimizer.flush()
    closure()
    return lines


def compared(before: Gradients, after: Gradients) -> dict[str, float]:
    """The cosine of two gradients, and the length of their difference over that of the first."""
    a, b, product = inner(before, before), inner(after, after), inner(before, after)
    return {"cosine": product / math.sqrt(a * b), "change": math.sqrt(max(a + b - 2 * product, 0.0) / a)}


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product over all parameters, in float64."""
    return sum(float(torch.sum(x.double() * y.double())) for x, y in zip(a, b, strict=True))


# Along a run ----------------------------------------------------------------------------------------------------------


def along(config: Config, at: Sequence[int], pool: int, size: int) -> Lines:
    """Train as train_gpt.py does. At the updates `at`, measure the noise on `pool` batches of `size` sequences.

    Their text comes after the run's, so the run does not train on it. A line describes the step from X_u to X_{u+1}:
    `train_loss` is the pool's at X_u, and `moments` maps each kind of matrix to its moments.
    """
    model, optimizer = build(config)
    set_schedule = schedule(optimizer, config)
    names, weights = [name for name, _ in model.named_parameters()], list(model.parameters())
    micro = config.micro_batch_size or config.batch_size
    first = -(-config.steps * config.batch_size // size)
    with batches(Config.from_dict(config.to_dict() | {"batch_size": size})) as loader:
        held_out = [loader.batch(first + b) for b in range(pool)]

    def of_pool() -> tuple[float, list[Gradients]]:
        found = [mean_gradient(model, *batch, micro) for batch in held_out]
        return sum(loss for loss, _ in found) / pool, [gradient for _, gradient in found]

    lines: Lines = []
    started = time.monotonic()
    with batches(config) as loader:
        for step in range(max(at) + 1):
            set_schedule(step)
            batch, measured = loader.batch(step), step in at
            loss, before = of_pool() if measured else (math.nan, [])
            for p, g in zip(weights, mean_gradient(model, *batch, micro)[1], strict=True):
                p.grad = g
            optimizer.step()
            if measured:
                found = dict(zip(names, moments(before, of_pool()[1]), strict=True))
                lines.append(line_at(config, step, started, loss) | {"moments": by_kind(found)})
    return lines


def moments(before: Sequence[Gradients], after: Sequence[Gradients]) -> list[Moments]:
    """The moments of each parameter, from its gradients on the same batches at X and at X'. Moments add up."""
    found = []
    for old, new in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        moved = [b - a for a, b in zip(old, new, strict=True)]
        (g, sigma), (g2, _), (product, _) = spread(old, old), spread(new, new), spread(old, new)
        d, difference = spread(moved, moved)
        found.append({"g": g, "g2": g2, "product": product, "d": d, "sigma": sigma, "difference": difference})
    return found


def spread(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """Of two samples, drawn in pairs: the inner product of their true means, and the trace of their covariance; no bias."""
    x, y = torch.stack(list(a)).double(), torch.stack(list(b)).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    covariance = float(torch.sum((x - mean_x) * (y - mean_y))) / (len(x) - 1)
    return float(torch.sum(mean_x * mean_y)) - covariance / len(x), covariance


def by_kind(found: Mapping[str, Moments]) -> dict[str, Moments]:
    """The moments summed over the matrices of a kind, to six digits: `blocks.2.attention.q.weight` is a `q`."""
    kinds: dict[str, Moments] = {}
    for name, moment in found.items():
        kind = kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], dict.fromkeys(moment, 0.0))
        for key, value in moment.items():
            kind[key] += value
    return {kind: {key: float(f"{value:.6g}") for key, value in moment.items()} for kind, moment in kinds.items()}


def total(kinds: Mapping[str, Moments]) -> Moments:
    """The moments of all kinds together."""
    return {key: sum(moment[key] for moment in kinds.values()) for key in next(iter(kinds.values()))}


def summary(moment: Moments, size: int, gamma_at: Sequence[int]) -> dict[str, float]:
    """The quantities at the top of this file. `size`: sequences of a batch. nan where an estimated square is not positive."""
    g, g2, d = (moment[name] if moment[name] > 0 else math.nan for name in ("g", "g2", "d"))
    return {
        "noise_scale": size * moment["sigma"] / g,
        "noise_ratio": math.sqrt(moment["difference"] / moment["sigma"]) if moment["sigma"] > 0 else math.nan,
        "change": math.sqrt(d / g),
        "cosine": moment["product"] / math.sqrt(g * g2),
        **{f"gamma_{b}": d / (d + moment["difference"] * size / b) for b in gamma_at},
    }
