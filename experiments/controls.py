"""Optimizers that serve as controls. train_gpt.py takes them as `--optimizer experiments.controls:NAME`."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from optim import Gluon
from optim.rules import SHARE


class DoubleAverage(Gluon):
    """MVR-2 without its correction: ĝ_k is replaced by g_k, so one gradient a step is enough.

        d_k = q g_k + (1-q) d_{k-1}
        M_k = β M_{k-1} + (1-β) d_k

    MVR-2's gain over this comes from the correction. This method's gain over Gluon comes from the shape of the average alone.
    Arguments: those of `Gluon`, and `q` in (0, 1].
    """

    rules: ClassVar[dict[str, Any]] = {"q": SHARE}

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, q: float = 0.5, **options: Any) -> None:
        super().__init__(params, lr, momentum, q=q, **options)

    def averages(self, group: dict[str, Any]) -> dict[str, float]:
        """M with β, d with 1-q."""
        return {"momentum_buffer": group["momentum"], "estimate": 1 - group["q"]}

    def fold(
        self, group: dict[str, Any], buffers: dict[str, list[Tensor]], past: dict[str, float], gradients: list[Tensor]
    ) -> None:
        """d ← (1-q) d + q g, M ← β M + (1-β) d."""
        torch._foreach_lerp_(buffers["estimate"], gradients, 1 - past["estimate"])
        super().fold(group, buffers, past, buffers["estimate"])
