"""Gluon with momentum variance reduction: "Muon is Provably Faster with Momentum Variance Reduction" (Qian, Rammal, Kovalev,
Richtárik, arXiv 2512.16598; here "the paper"), and the two forms of "On the Convergence of Muon and Beyond" (Chang, Liu, Yuan,
arXiv 2509.15816) that compare with another batch.

    g_k = ∇f(X_k; ξ_k)        ĝ_k = ∇f(X_{k-1}; ξ_k), the same batch at the previous weights

    d_k = g_k + (1-q) (d_{k-1} - ĝ_k)                        d_0 = g_0
    M_k = β M_{k-1} + (1-β) d_k + γβ (g_k - ĝ_k)             M_0 = g_0

MVR-1 has q = 1, MVR-2 has γ = 0, MVR-3 has both. Each formula is split where ĝ_k ends and g_k begins:

    fold_old    d ← d - ĝ                M ← M - γ ĝ
    fold_new    d ← (1-q) d + g          M ← β M + (1-β) d + γβ g

No variant stores old weights, old gradients or old batches. Between steps the model holds X_{k-1}, and the update of M_{k-1}
is pending. When batch ξ_k arrives, a step evaluates it (ĝ_k), applies the update, folds ĝ_k, evaluates the batch again (g_k),
and folds g_k.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import NON_NEGATIVE, SHARE, Buffers, Closure, Group, Rule
from .gluon import Gluon


class SingleBatchMVR(Gluon):
    """Compares with the last step's gradient, ∇f(X_{k-1}; ξ_{k-1}): MVR1 of MUON-MVR. One gradient a step.

        M_k = β M_{k-1} + (1-β) g_k + γβ (g_k - g_{k-1})

    With the plain average E_k = β E_{k-1} + (1-β) g_k this is M_k = (1-γ) E_k + γ g_k. So E is all that is kept, and a step
    costs what Gluon's does. γ = 1-β is Nesterov momentum. Arguments: as `Gluon`, and `gamma`: γ ≥ 0.
    """

    rules: ClassVar[dict[str, Rule]] = {"gamma": NON_NEGATIVE}

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, gamma: float = 0.1, **options: Any) -> None:
        super().__init__(params, lr, momentum, gamma=gamma, **options)

    def lmo_input(self, group: Group, momentum: Tensor, gradient: Tensor | None) -> Tensor:
        """M = (1-γ) E + γ g."""
        if group["gamma"] == 0 or gradient is None:
            return momentum
        return torch.lerp(momentum, gradient, float(group["gamma"]))


class _TwoPasses(Gluon):
    """A variant that evaluates every batch twice. `step` needs a closure."""

    passes = 2

    def corrects(self, group: Group) -> bool:
        """Whether the group needs ĝ; if no group does, its pass is skipped."""
        raise NotImplementedError

    def fold_old(self, group: Group, buffers: Buffers, old: list[Tensor]) -> None:
        """Take ĝ into the buffers, in place."""
        raise NotImplementedError

    def _corrects(self, group: Group) -> bool:
        return group["norm"] != "adamw" and self.corrects(group)

    def _any_corrects(self) -> bool:
        return any(map(self._corrects, self.param_groups))

    def _check_closure(self, closure: Closure | None) -> Closure:
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that evaluates the batch's loss and calls backward(): it is "
                "called twice, at different weights"
            )
        return closure

    @torch.no_grad()
    def _fold_old(self) -> dict[Tensor, bool]:
        """Fold ĝ into the buffers that this rank owns.

        Returns the parameters whose ĝ counts, and whether each had one (a missing one is 0). It does not count before the first
        gradient of a parameter, which has nothing to correct.
        """
        counts: dict[Tensor, bool] = {}
        for group in filter(self._corrects, self.param_groups):
            counted = [p for p in group["params"] if self.state[p]["steps"] > 0]
            counts |= {p: p.grad is not None for p in counted}
            params = [p for p in counted if p.grad is not None and self._owns(p)]
            if params:
                self.fold_old(group, self._buffers(group, params), [self._gradient(p) for p in params])
        return counts


class _Deferred(_TwoPasses):
    """The order of the passes in MVR-1, -2 and -3: evaluate, update, fold ĝ, evaluate again, fold g."""

    deferred = True

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """One step. Returns the loss of the second pass, at the weights that the model then holds; leaves no gradient behind.

        `closure` is called at the previous weights and again, with the same random state, at the new ones. The first step,
        and the first after `flush`, has no previous weights: it calls the closure once and moves nothing. Raises TypeError
        without a closure. If the second pass raises, the momentum starts anew with the next gradient.
        """
        closure = self._check_closure(closure)
        old_counts = self._has_pending() and self._any_corrects()
        if old_counts:
            random_state = _RandomState(self)
            self._evaluate(closure)
            random_state.restore()
        self._apply_update()
        corrected = self._fold_old() if old_counts else {}
        try:
            loss = self._evaluate(closure)
        except BaseException:
            self._restart(corrected)
            raise
        self._fold_gradients(corrected)
        self._drop_gradients()
        return loss

    def _restart(self, corrected: dict[Tensor, bool]) -> None:
        """Restart the momenta that took in a ĝ whose g will never follow."""
        for group, p in self._params():
            if corrected.get(p, False):
                self.state[p] |= self._fresh_scalars(group)


class GluonMVR1(_Deferred):
    """Gluon-MVR-1, the paper's Algorithm 2 (3 with decreasing steps), STORM's momentum. Two gradients a step.

        M_k = g_k + β (M_{k-1} - ĝ_k)                                      γ = 1
        M_k = β M_{k-1} + (1-β) g_k + γβ (g_k - ĝ_k)                       any γ

    With the spectral norm and weight_decay > 0 it is the paper's Muon-MVR (Algorithm 1). γ < 1 is not the paper's: it is MARS's
    scale (Yuan et al., arXiv 2411.10438) and MVR2 of MUON-MVR. γ = 0 is Gluon, bit for bit.

    Arguments: as `Gluon`, and `gamma`: γ ≥ 0.
    """

    rules: ClassVar[dict[str, Rule]] = {"gamma": NON_NEGATIVE}

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, gamma: float = 1.0, **options: Any) -> None:
        super().__init__(params, lr, momentum, gamma=gamma, **options)

    def corrects(self, group: Group) -> bool:
        """γβ > 0."""
        return group["gamma"] * group["momentum"] > 0

    def fold_old(self, group: Group, buffers: Buffers, old: list[Tensor]) -> None:
        """M ← M - γ ĝ."""
        torch._foreach_add_(buffers["momentum_buffer"], old, alpha=-float(group["gamma"]))

    def fold_new(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """M ← β M + (1-β) g + γβ g."""
        self.fold(group, buffers, past, gradients)
        gamma, beta = float(group["gamma"]), past["momentum_buffer"]
        torch._foreach_add_(buffers["momentum_buffer"], gradients, alpha=gamma * beta)


class GluonMVR2(_Deferred):
    """Gluon-MVR-2, the paper's Algorithm 4: momentum over a variance-reduced gradient d. Two gradients a step.

        d_k = g_k + (1-q) (d_{k-1} - ĝ_k)
        M_k = β M_{k-1} + (1-β) d_k

    q = 1 is Gluon, bit for bit. Arguments: as `Gluon`, and `q` in (0, 1], the weight of the new gradient in d.
    """

    rules: ClassVar[dict[str, Rule]] = {"q": SHARE}

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, q: float = 0.5, **options: Any) -> None:
        super().__init__(params, lr, momentum, q=q, **options)

    def averages(self, group: Group) -> dict[str, float]:
        """M with β, d with 1-q."""
        return {"momentum_buffer": group["momentum"], "estimate": 1 - group["q"]}

    def corrects(self, group: Group) -> bool:
        """1-q > 0."""
        return group["q"] < 1

    def fold(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """d ← (1-q) d + q g, M ← β M + (1-β) d."""
        torch._foreach_lerp_(buffers["estimate"], gradients, 1 - past["estimate"])
        super().fold(group, buffers, past, buffers["estimate"])

    def fold_old(self, group: Group, buffers: Buffers, old: list[Tensor]) -> None:
        """d ← d - ĝ."""
        torch._foreach_sub_(buffers["estimate"], old)

    def fold_new(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """d ← (1-q) d + g, M ← β M + (1-β) d."""
        torch._foreach_mul_(buffers["estimate"], past["estimate"])
        torch._foreach_add_(buffers["estimate"], gradients)
        super().fold(group, buffers, past, buffers["estimate"])


class GluonMVR3(GluonMVR2):
    """Gluon-MVR-3, the paper's Algorithm 5: MVR-1 and MVR-2 combined. Two gradients a step.

        d_k = g_k + (1-q) (d_{k-1} - ĝ_k)
        M_k = β M_{k-1} + (1-β) d_k + γβ (g_k - ĝ_k)                       γ = 1

    q = 1 is MVR-1 and γ = 0 is MVR-2. Arguments: as `Gluon`, `q` in (0, 1], and `gamma`: γ ≥ 0.
    """

    rules: ClassVar[dict[str, Rule]] = {"gamma": NON_NEGATIVE}

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.9, q: float = 0.5, gamma: float = 1.0, **options: Any
    ) -> None:
        super().__init__(params, lr, momentum, q, gamma=gamma, **options)

    def corrects(self, group: Group) -> bool:
        """1-q > 0 or γβ > 0."""
        return super().corrects(group) or group["gamma"] * group["momentum"] > 0

    def fold_old(self, group: Group, buffers: Buffers, old: list[Tensor]) -> None:
        """d ← d - ĝ, M ← M - γ ĝ."""
        super().fold_old(group, buffers, old)
        torch._foreach_add_(buffers["momentum_buffer"], old, alpha=-float(group["gamma"]))

    def fold_new(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """d ← (1-q) d + g, M ← β M + (1-β) d + γβ g."""
        super().fold_new(group, buffers, past, gradients)
        gamma, beta = float(group["gamma"]), past["momentum_buffer"]
        torch._foreach_add_(buffers["momentum_buffer"], gradients, alpha=gamma * beta)


class PreviousBatchMVR(_TwoPasses):
    """Compares with the previous batch at these weights, ∇f(X_k; ξ_{k-1}): MVR3 of MUON-MVR. Two gradients a step.

        M_k = β M_{k-1} + (1-β) g_k + γβ (g_k - ∇f(X_k; ξ_{k-1}))

    A step is Gluon's, after which the same batch is evaluated again at the new weights. That gradient is the next step's ĝ, and
    it is folded at once: M ← M - γ ĝ. So both terms of a correction have the γ of the step before.

    Arguments: as `Gluon`, and `gamma`: γ ≥ 0.
    """

    rules: ClassVar[dict[str, Rule]] = {"gamma": NON_NEGATIVE}

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, gamma: float = 0.1, **options: Any) -> None:
        super().__init__(params, lr, momentum, gamma=gamma, **options)

    def corrects(self, group: Group) -> bool:
        """γ > 0."""
        return group["gamma"] > 0

    def fold_old(self, group: Group, buffers: Buffers, old: list[Tensor]) -> None:
        """M ← M - γ ĝ."""
        torch._foreach_add_(buffers["momentum_buffer"], old, alpha=-float(group["gamma"]))

    def fold_new(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """M ← β M + (1-β) g + γβ g, with the γ that ĝ was folded with."""
        self.fold(group, buffers, past, gradients)
        gamma, beta = group["evaluated_gamma"], past["momentum_buffer"]
        torch._foreach_add_(buffers["momentum_buffer"], gradients, alpha=gamma * beta)

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """One step. Returns the loss of the first pass, at the weights before the update; leaves no gradient behind.

        `closure` is called before the update and again, with the same random state, after it. Raises TypeError without one.
        """
        closure = self._check_closure(closure)
        before = _RandomState(self)
        loss = self._evaluate(closure)
        self._fold_gradients(self._evaluated())
        for group in self.param_groups:
            group["evaluated_gamma"] = 0.0
        self._apply_update()
        if self._any_corrects():
            after = _RandomState(self)
            before.restore()
            self._evaluate(closure)
            after.restore()
            counts = self._fold_old()
            for group, p in self._params():
                group["evaluated_gamma"] = float(group["gamma"])
                self.state[p]["evaluated"] = counts.get(p, False)
        self._drop_gradients()
        return loss

    def _evaluated(self) -> dict[Tensor, bool]:
        """The parameters whose momentum holds a ĝ, or would if it had not been missing."""
        return {
            p: self.state[p]["evaluated"]
            for group, p in self._params()
            if group["evaluated_gamma"] and group["norm"] != "adamw" and self.state[p]["steps"] > 0
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("evaluated_gamma", 0.0)

    def _fresh_scalars(self, group: Group) -> dict[str, Any]:
        return super()._fresh_scalars(group) | {"evaluated": False}


class _RandomState:
    """The generators that a pass may draw from (dropout), so that another pass can draw the same numbers."""

    def __init__(self, optimizer: Gluon) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for group in optimizer.param_groups for p in group["params"]} - {torch.device("cpu")}
        self._devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type == "cuda"}
        self._mps = torch.mps.get_rng_state() if any(d.type == "mps" for d in devices) else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
