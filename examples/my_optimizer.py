"""Two optimizers that are not in `optim/`. They train like the others in one process, under DDP and with FSDP2:

    python train_gpt.py --config configs/quickstart_gluon.py --run-name two_horizons \
        --optimizer examples.my_optimizer:TwoHorizons --optimizer-options '{"slow": 0.95}'

A subclass of `Gluon` overrides the methods that differ; `optim.base.LayerwiseOptimizer` lists them. They get lists of this
rank's tensors, one for each parameter with a gradient, so a formula is a few `torch._foreach` calls.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from optim import Gluon, GluonMVR1
from optim.rules import NON_NEGATIVE, PAST, Rule


class TwoHorizons(Gluon):
    """A fast and a slow average together, as in AdEMAMix (Pagliardini et al., arXiv 2409.03137), in front of an LMO:

    E_k = β E_{k-1} + (1-β) g_k        S_k = β_s S_{k-1} + (1-β_s) g_k        M_k = E_k + α S_k

    Arguments: those of `Gluon`, `slow`: β_s in [0, 1), and `alpha`: α ≥ 0, which must not change during a run.
    """

    rules: ClassVar[dict[str, Rule]] = {"slow": PAST, "alpha": NON_NEGATIVE}  # new options, and the values they allow

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.9, slow: float = 0.99, alpha: float = 0.5, **options: Any
    ) -> None:
        super().__init__(params, lr, momentum, slow=slow, alpha=alpha, **options)

    def averages(self, group: dict[str, Any]) -> dict[str, float]:
        """The buffers, and how much of its past each keeps. `momentum_buffer` is the LMO's input."""
        return {"momentum_buffer": group["momentum"], "slow": group["slow"]}

    def fold(
        self, group: dict[str, Any], buffers: dict[str, list[Tensor]], past: dict[str, float], gradients: list[Tensor]
    ) -> None:
        """Take in the gradients. `past` holds the weights that `averages` returns, with bias correction."""
        torch._foreach_add_(buffers["momentum_buffer"], buffers["slow"], alpha=-group["alpha"])  # M is E again
        super().fold(group, buffers, past, gradients)  # E ← β E + (1-β) g
        torch._foreach_lerp_(buffers["slow"], gradients, 1 - past["slow"])  # S ← β_s S + (1-β_s) g
        torch._foreach_add_(buffers["momentum_buffer"], buffers["slow"], alpha=group["alpha"])


class HiddenMVR1(GluonMVR1):
    """MVR-1 for the hidden layers, and Gluon for the groups with the sign norm: the head and the embedding."""

    def correction(self, group: dict[str, Any]) -> dict[str, float]:
        """The averages that move along with g - ĝ, and how far."""
        return {} if group["norm"] == "sign" else super().correction(group)
