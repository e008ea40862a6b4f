"""How noisy is the correction? Measures S/σ along a run of Gluon.

The run is one of train_gpt.py's. Before and after each update, at the weights X and X', the gradients of a fixed pool of n
micro-batches are taken, which the run does not train on. In each layer's dual norm, with means over the pool's micro-batches b,

    σ² = n/(n-1) mean_b ‖g_b(X) - mean g(X)‖²                                      the noise of a gradient
    S² = n/(n-1) mean_b ‖(g_b(X') - g_b(X)) - mean (g(X') - g(X))‖²                the noise of a difference g - ĝ

S is the noise that MVR-1 adds at γ = 1 when it corrects its momentum.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.errors import UserError
from experiments.setup import batches, build
from optim.norms import Norm, get_norm
from training.config import Config
from training.optimizers import schedule


def noise_ratio(config: Config, pool: int) -> float:
    """S/σ: the median over the layers and over the second half of the run's updates. `pool`: its number of micro-batches."""
    ratios = []
    for norms, before, after in along(config, pool):
        layers = zip(norms, zip(*before, strict=True), zip(*after, strict=True), strict=True)
        ratios.append([_ratio(norm, old, new) for norm, old, new in layers])
    return statistics.median([ratio for update in ratios[len(ratios) // 2 :] for ratio in update])


def along(config: Config, pool: int) -> Iterator[tuple[list[Norm], list[list[Tensor]], list[list[Tensor]]]]:
    """For each update: the layers' norms, and the gradients of the pool's micro-batches before and after it.

    `before[b][i]` is the gradient of micro-batch b, of the run's batch size, in layer i.
    Raises UserError if the run is not Gluon's, the data too short, or a gradient not finite.
    """
    if config.optimizer != "gluon":
        raise UserError(f"the run must use gluon, not {config.optimizer}: leave --optimizer out")
    if pool < 2:
        raise UserError(f"the pool needs at least 2 micro-batches, not {pool}")
    model, optimizer = build(config)
    set_schedule, weights = schedule(optimizer, config), list(model.parameters())
    kinds = {p: group["norm"] for group in optimizer.param_groups for p in group["params"]}
    norms = [get_norm(kinds[p], p.shape, config.scale, "svd") for p in weights]

    def gradients(batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        found = list(torch.autograd.grad(model(*batch), weights))
        if not all(layer.isfinite().all() for layer in found):
            raise UserError("a gradient is not finite; give a lower --lr")
        return found

    with batches(config) as loader:
        if config.steps + pool > loader.steps:
            raise UserError(
                f"{config.steps} steps and a pool of {pool} need more data than {config.data_dir}'s {loader.steps} batches"
            )
        held_out = [loader.batch(config.steps + b) for b in range(pool)]
        before = [gradients(batch) for batch in held_out]
        for step in range(config.steps):
            set_schedule(step)
            for p, gradient in zip(weights, gradients(loader.batch(step)), strict=True):
                p.grad = gradient
            optimizer.step()
            after = [gradients(batch) for batch in held_out]
            yield norms, before, after
            before = after


def spread(norm: Norm, parts: Sequence[Tensor]) -> float:
    """The root mean squared dual distance of the parts from their mean, with n - 1 in the denominator."""
    mean = torch.stack(list(parts)).mean(0)
    return math.sqrt(sum(float(norm.dual_norm(part - mean)) ** 2 for part in parts) / (len(parts) - 1))


def _ratio(norm: Norm, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """S/σ of one layer at one update; 0 where no gradient reaches the layer."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    return spread(norm, differences) / max(spread(norm, before), 1e-30)
