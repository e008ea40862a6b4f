"""An optimizer around another one, so that the trainer can build it: SAM (Foret et al., arXiv 2010.01412) with AdamW.

    python train_gpt.py --config configs/quickstart_gluon.py --run-name sam --lr 1e-3 --optimizer examples.sam:SAM

A package's SAM needs another optimizer in its constructor, which no option can hold. A class like this one makes both. It can
live in a file next to the config.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SAM(torch.optim.AdamW):
    """AdamW with the gradient a distance `rho` up the hill. Its step takes two gradients, so it needs a closure."""

    def __init__(self, params: Any, lr: float = 1e-3, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take the gradient here, climb along it, take the gradient there, return, and let AdamW descend with it."""
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        here, gradients = [p.clone() for p in params], [p.grad.clone() for p in params]
        length = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_add_(params, torch._foreach_mul(gradients, self.rho / (length + 1e-12)))
        closure()
        torch._foreach_copy_(params, here)
        super().step()
        return loss
