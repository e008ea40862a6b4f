"""MuonMVR of "On the Convergence of Muon and Beyond" (Chang, Liu, Yuan, arXiv 2509.15816): Muon with variance reduction,
momentum from zero and MARS's clipping. The caller hands in the gradient to compare with."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .gluon import Gluon
from .rules import NON_NEGATIVE, PAIR, SWITCH, Buffers, Group, Rule


class MuonMVR(Gluon):
    r"""Muon with momentum variance reduction for matrices, AdamW for the rest. For each matrix of shape (d_out, d_in):

        C_k     = g_k + γβ/(1-β) · (g_k - last_k)            no correction while there is no `last`
        C_k     ← C_k / max(1, ‖C_k‖_F)                      the clipping of MARS (Yuan et al., arXiv 2411.10438)
        M_k     = β M_{k-1} + (1-β) C_k                      from M = 0
        X_{k+1} = (1 - lr·weight_decay) X_k - lr · 0.2 √max(d_out, d_in) · UVᵀ of M_k

    `last` is the previous step's gradient with `is_approx=True` (that paper's MVR1; `update_last_grad` does nothing then), else
    what `update_last_grad` recorded: the gradient of the previous batch at the current weights (its MVR3), or of the current
    batch at the previous weights (its MVR2). It stays until another one is recorded. γ = 0 is Muon with clipped gradients.
    `SingleBatchMVR`, `PreviousBatchMVR` and `GluonMVR1` make the same corrections without a stored gradient, batch or model.

    Arguments:
        params: parameters or groups. A group with `use_muon=True` goes to Muon (tensors of more than two dimensions as
            (o, i·k…)), one with `use_muon=False` to AdamW. Parameters and groups without it are split: 2-D parameters to
            Muon, the rest to AdamW, in a group of each.
        lr: the learning rate of both, ≥ 0.
        momentum: β in [0, 1).
        gamma: γ ≥ 0, the scale of the correction.
        is_approx: compare with the previous step's own gradient instead of one that is recorded.
        weight_decay: decoupled, of both, ≥ 0.
        ns_steps: iterations of the polar factor, ≥ 1 (`svd` has none).
        adamw_betas, eps: of AdamW.
        polar: newton_schulz, polar_express, svd.
        process_group: as in `Gluon`. DTensor parameters (FSDP2) are refused: use `PreviousBatchMVR` or `GluonMVR1`.

    A step with `is_approx=False`, previous batch first:

        if previous is not None:
            loss(*previous).backward()
            optimizer.update_last_grad()      # a copy, so .grad may be zeroed in place or reused
            optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()                      # leaves no gradient
        previous = batch

    With gradient accumulation, `previous` and `batch` are lists of micro-batches: every loss is divided by their number, and
    `update_last_grad` is called once, after the last backward of the previous step's list. The accumulation loop printed in
    the README of MUON-MVR goes wrong here: it adds the previous micro-batch's gradient onto the current one's, records the
    sum, and its `zero_grad` ("keeping the gradients for the current batch") then drops both. So `step` never finds a
    gradient, and nothing is trained.
    """

    rules: ClassVar[dict[str, Rule]] = {
        "gamma": NON_NEGATIVE,
        "is_approx": SWITCH,
        "use_muon": SWITCH,
        "ns_steps": Rule(lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "an integer ≥ 1"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        momentum: float = 0.95,
        gamma: float = 0.025,
        is_approx: bool = False,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        adamw_betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        polar: str = "newton_schulz",
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not PAIR.allows(adamw_betas):
            raise ValueError(f"adamw_betas must be {PAIR.allowed}, got {adamw_betas!r}")
        super().__init__(
            params, lr, momentum, weight_decay, scale="moonlight", polar=polar, betas=adamw_betas, eps=eps,
            process_group=process_group, gamma=gamma, is_approx=is_approx, ns_steps=ns_steps,
        )  # fmt: skip

    @torch.no_grad()
    def update_last_grad(self) -> None:
        """Record the gradients that lie in `.grad` as those that the next steps compare with.

        They are copied. A parameter whose `.grad` is None gets no record, so it gets no correction.
        """
        self._admit_replaced()
        for group, p in self._params():
            if group["use_muon"] and not group["is_approx"]:
                self.state[p]["recorded"] = p.grad is not None
                self._record(p)

    def _record(self, p: Tensor) -> None:
        if p.grad is not None and self._shares.owns(p):
            self.state[p]["last_grad"].copy_(self._shares.gradient(p))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group without `use_muon` becomes two, of the 2-D parameters and of the rest."""
        group = dict(param_group)
        params = group["params"]
        if "use_muon" not in group and not isinstance(params, set):  # torch refuses a set
            params = [params] if isinstance(params, Tensor) else list(params)
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]  # torch takes (name, parameter) too
            matrices = [p.ndim == 2 for p in tensors]
            for use_muon in sorted(set(matrices), reverse=True):
                part = [p for p, matrix in zip(params, matrices, strict=True) if matrix == use_muon]
                self.add_param_group(group | {"params": part, "use_muon": use_muon})
            return
        group["norm"] = "spectral" if group.get("use_muon") else "adamw"
        if "adamw_betas" in group:
            group["betas"] = group.pop("adamw_betas")
        super().add_param_group(group)

    def _check_group(self, group: Group) -> None:
        for p in group["params"]:
            if group["use_muon"] is True and p.ndim < 2:
                raise ValueError(
                    f"use_muon=True needs parameters of 2 dimensions or more, got one of shape {tuple(p.shape)}: put it "
                    "into a group with use_muon=False"
                )
            if isinstance(p, DTensor):
                raise ValueError(
                    "params must be plain tensors for MuonMVR, got a DTensor: use SingleBatchMVR, PreviousBatchMVR or "
                    "GluonMVR1 with FSDP2"
                )
        super()._check_group(group)

    def buffers(self, group: Group) -> list[str]:
        """M and the gradient to compare with."""
        return [*super().buffers(group), "last_grad"]

    def _fresh_scalars(self, group: Group) -> dict[str, Any]:
        return super()._fresh_scalars(group) | ({"recorded": False} if group["use_muon"] else {})

    @torch.no_grad()
    def _fold_gradients(self, corrected: dict[Tensor, bool] | None = None) -> None:
        self._admit_replaced()
        muon = [p for group, p in self._params() if group["use_muon"] and p.grad is not None]
        for p in muon:  # if nothing is recorded, `last` is g itself: no correction
            if not self.state[p]["recorded"]:
                self._record(p)
        super()._fold_gradients(corrected)
        for group, p in self._params():
            if group["is_approx"] and group["use_muon"] and p.grad is not None:
                self._record(p)
                self.state[p]["recorded"] = True

    def fold(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """C ← g + γβ/(1-β) (g - last), clipped; M ← β M + (1-β) C from M = 0, so it needs no bias correction."""
        beta = float(group["momentum"])
        share = float(group["gamma"]) * beta / (1 - beta)
        corrected = torch._foreach_lerp(buffers["last_grad"], gradients, 1 + share)
        # Divide by max(1, norm) on the device: an `if norm > 1` would make the host wait for every matrix.
        divisors = torch._foreach_norm(corrected)
        torch._foreach_clamp_min_(divisors, 1.0)
        torch._foreach_div_(corrected, divisors)
        torch._foreach_lerp_(buffers["momentum_buffer"], corrected, 1 - beta)
