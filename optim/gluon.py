"""Gluon: momentum and a linear minimisation oracle per layer (Riabinin, Shulgin, Gruntkowska, Richtárik, "Gluon: Making
Muon & Scion Great Again!", arXiv 2505.13416). Muon, Scion, normalised SGD and sign momentum are its special cases."""

import torch
from torch import Tensor

from .base import LayerwiseOptimizer
from .rules import Buffers, Group


class Gluon(LayerwiseOptimizer):
    r"""Gluon with weight decay, for each layer i with its own norm:

        M_k     = β M_{k-1} + (1-β) g_k                      M_0 = g_0
        X_{k+1} = (1 - lr·weight_decay) X_k + lr·radius · LMO_i(M_k)

    `weight_decay` 0 is unconstrained Gluon, 1 is constrained Scion; the spectral norm with any value is Muon with decoupled
    decay. A parameter whose `.grad` is None keeps its weights, its momentum and everything else.

    Arguments:
        params: parameters or groups; every option but `process_group` can differ between groups.
        lr: the step size t before the radius, ≥ 0.
        momentum: β in [0, 1), the weight of the past.
        weight_decay: ≥ 0.
        norm: spectral, sign, colnorm, rownorm, frobenius, rms, auto (by shape), or adamw: AdamW in the same optimizer, with
            `betas`, `eps` and lr·radius as its learning rate.
        radius: of the ball, > 0.
        bias_correction: use β_k = β W_{k-1} / W_k with W_k = β W_{k-1} + 1 - β instead of β, which makes M an average that
            starts from zero and is divided by the sum of its weights, as in the code of Muon, Scion and Gluon. With False,
            M_0 = g_0 and then β, as the papers write it: the first gradient then weighs 1/(1-β) times a later one.
        scale: the spectral norm's dimension factor: scion, muon, moonlight, none (see `optim.norms.spectral_factor`).
        polar: the polar factor: polar_express, newton_schulz, svd.
        view: what the group's tensors of three dimensions or more are. "convolution": (o, i, k, …), one matrix (o, i·k…).
            "stack": (…, d_out, d_in), such as the weights of experts; each matrix has its own polar factor and the dimension
            factor of its own shape. Required for three dimensions; four and more are a convolution by default.
        process_group: the ranks that hold the same parameters and gradients and share the work. Default: the default group if
            torch.distributed is initialised. DTensor parameters (FSDP2) are shared over their own mesh instead.

    `step` leaves no gradient behind. Momentum is float32, or float64 for float64 parameters.
    """

    def fold(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """M ← β M + (1-β) g."""
        torch._foreach_lerp_(buffers["momentum_buffer"], gradients, 1 - past["momentum_buffer"])
