"""AdamW (Loshchilov, Hutter, arXiv 1711.05101), for the groups with norm="adamw"."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .rules import NON_NEGATIVE, PAIR, Buffers, Group, Rule

DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


class AdamW:
    """What AdamW does in place of momentum and an LMO. It has the parts of `LayerwiseOptimizer` that differ between groups.

    `lr · radius` is its learning rate.
    """

    rules: ClassVar[dict[str, Rule]] = {"betas": PAIR, "eps": NON_NEGATIVE}

    def __init__(self, betas: tuple[float, float] = DEFAULTS["betas"], eps: float = DEFAULTS["eps"]) -> None:
        # Only adamw groups have these options: schedulers mistake `betas` in an optimizer's `defaults` for the momentum.
        self.defaults = {"betas": betas, "eps": eps}

    def averages(self, group: Group) -> dict[str, float]:
        """None: the formulas below have a bias correction of their own."""
        return {}

    def buffers(self, group: Group) -> list[str]:
        """m and v."""
        return ["momentum_buffer", "exp_avg_sq"]

    def correction(self, group: Group) -> dict[str, float]:
        """None: AdamW takes the gradient as it is."""
        return {}

    def fold(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """m ← β₁ m + (1-β₁) g, v ← β₂ v + (1-β₂) g²."""
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(buffers["momentum_buffer"], gradients, 1 - beta1)
        torch._foreach_mul_(buffers["exp_avg_sq"], beta2)
        torch._foreach_addcmul_(buffers["exp_avg_sq"], gradients, gradients, value=1 - beta2)

    def pending(self, group: Group) -> dict[str, Any]:
        """The betas of the pending update: a scheduler may cycle them before it is applied."""
        return {"pending_betas": tuple(group["betas"])}

    def inputs(self, group: Group, buffers: Buffers, steps: list[int], gradients: Iterable[Tensor | None]) -> list[Tensor]:
        """m̂ / (√v̂ + eps) of each parameter, bias-corrected by the `steps` gradients that it has taken so far."""
        alike: dict[int, list[int]] = {}
        for i, count in enumerate(steps):
            alike.setdefault(count, []).append(i)
        directions: dict[int, Tensor] = {}
        for count, members in alike.items():
            means, squares = ([buffers[name][i] for i in members] for name in self.buffers(group))
            correction1, correction2 = (1 - beta**count for beta in group["pending_betas"])
            divisors = torch._foreach_sqrt(squares)
            torch._foreach_div_(divisors, math.sqrt(correction2))
            torch._foreach_add_(divisors, group["eps"])
            torch._foreach_mul_(divisors, correction1)
            directions |= zip(members, torch._foreach_div(means, divisors), strict=True)
        return [directions[i] for i in range(len(steps))]
