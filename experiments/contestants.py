"""Optimizers to compare with, each from its formula. train_gpt.py takes them as `--optimizer experiments.contestants:NAME`."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from optim import Gluon


class Transported(Gluon):
    """Scion with transport (arXiv 2605.18528): one gradient a step, taken ahead of the weights.

        Y_k = X_k + β/(1-β) (X_k - X_{k-1})
        M_k = β M_{k-1} + (1-β) ∇f(Y_k; ξ_k)

    Transport removes the lag of the average, as γ = 1 does: for a quadratic f without noise M_k is ∇f(X_k). It needs no second
    gradient and adds no noise. Arguments: those of `Gluon`. `step` needs a closure.
    """

    def _admit(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Make room for X_{k-1}: whole on every rank, because every rank takes the gradient at Y_k."""
        super()._admit(group, params)
        for p in params:
            self.state[p]["last_weights"] = torch.zeros_like(p)

    def step(self, closure: Any = None) -> Any:
        """One step. Returns the loss at Y_k."""
        held = [(p, group["momentum"], self.state[p]) for group in self.param_groups for p in group["params"]]
        here = [p.detach().clone() for p, _, _ in held]
        with torch.no_grad():
            for p, beta, state in held:
                if state["steps"]:
                    p.add_(p - state["last_weights"], alpha=beta / (1 - beta))
            with torch.enable_grad():
                self.zero_grad()
                loss = closure()
            for (p, _, state), x in zip(held, here, strict=True):
                p.copy_(x)
                state["last_weights"] = x
        super().step()
        return loss


class WarmNesterov(Gluon):
    """Nesterov momentum whose β rises from 0.85 over the first 300 updates, as the public recipes of Muon do.

        β_k = 0.85 + (β - 0.85) min(1, k/300)        M_k = β_k M_{k-1} + (1-β_k) g_k

    The LMO's input is β_k M_k + (1-β_k) g_k. A β below 0.85 stays. Arguments: those of `Gluon`.
    """

    def averages(self, group: dict[str, Any]) -> dict[str, float]:
        """M with β_k."""
        return {"momentum_buffer": self._beta(group)}

    def lmo_input(self, group: dict[str, Any], momentum: Tensor, gradient: Tensor | None) -> Tensor:
        """β_k M_k + (1-β_k) g_k."""
        return momentum if gradient is None else torch.lerp(momentum, gradient, 1 - self._beta(group))

    @staticmethod
    def _beta(group: dict[str, Any]) -> float:
        first = min(0.85, group["momentum"])
        return first + (group["momentum"] - first) * min(1.0, group["updates"] / 300)


class MuonAdamW(Optimizer):
    """torch.optim.Muon for every group but the last, and AdamW for that one, the embedding, as torch's page advises.

    One lr serves both: Muon's steps are scaled to the RMS of AdamW's (`adjust_lr_fn="match_rms_adamw"`).
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        muon = Muon(params[:-1], lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(params[-1:], lr, betas, weight_decay=weight_decay)
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both, on this optimizer's own groups and state. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in zip(self.parts, (self.param_groups[:-1], self.param_groups[-1:]), strict=True):
            part.state, part.param_groups = self.state, groups
            part.step()
        return loss
