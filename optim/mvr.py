"""Gluon with momentum variance reduction: "Muon is Provably Faster with Momentum Variance Reduction" (Qian, Rammal, Kovalev,
Richtárik, arXiv 2512.16598; here "the paper"), and the two forms of "On the Convergence of Muon and Beyond" (Chang, Liu, Yuan,
arXiv 2509.15816) that compare with another batch.

    g_k = ∇f(X_k; ξ_k)        ĝ_k = ∇f(X_{k-1}; ξ_k), the same batch at the previous weights

The averages of old gradients were taken at old weights. ĝ_k and g_k say how far this batch's gradient has moved since. So
move the averages as far, and then take in g_k as ever:

    correct    d ← d + (g - ĝ)            M ← M + γ (g - ĝ)
    fold       d ← (1-q) d + q g          M ← β M + (1-β) d                 (q = 1: d is g)

A variant is which averages move, and how far: M by γ (MVR-1), d by 1 (MVR-2), or both (MVR-3). From d_0 = M_0 = g_0:

    d_k = g_k + (1-q) (d_{k-1} - ĝ_k)
    M_k = β M_{k-1} + (1-β) d_k + γβ (g_k - ĝ_k)

No variant stores old weights, old gradients or old batches. Between steps the model holds X_{k-1}, and the update of M_{k-1}
is pending. When batch ξ_k arrives, a step takes its gradient ĝ_k, applies the update, subtracts ĝ_k from the averages, takes
the gradient g_k, adds it to the averages, and folds it.
"""

from collections.abc import Callable, Container
from typing import Any, ClassVar

import torch
from torch import Tensor

from .gluon import Gluon
from .rules import NON_NEGATIVE, SHARE, Buffers, Closure, Group, Rule


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
    """A variant that takes two gradients of every batch. `step` needs a closure."""

    passes = 2

    def correction(self, group: Group) -> dict[str, float]:
        """The averages that move along with g - ĝ, and how far."""
        raise NotImplementedError

    def _moved(self, group: Group) -> dict[str, float]:
        """The correction, without what moves nothing."""
        return {name: float(scale) for name, scale in self._formulas(group).correction(group).items() if scale}

    def _corrects(self) -> bool:
        """Whether ĝ is worth its pass."""
        return any(map(self._moved, self.param_groups))

    def _with_history(self) -> dict[Tensor, bool]:
        """The parameters whose averages move, and whether each has a gradient. Before its first gradient there are none."""
        groups = filter(self._moved, self.param_groups)
        return {p: p.grad is not None for group in groups for p in group["params"] if self.state[p]["steps"]}

    @torch.no_grad()
    def _move_averages(self, sign: int, params: Container[Tensor], how_far: Callable[[Group], dict[str, float]]) -> None:
        """Move the averages of these parameters along with the gradients in `.grad`, or against them (sign -1)."""
        for group in self.param_groups:
            scales = how_far(group)
            members = [p for p in group["params"] if p in params and p.grad is not None and self._shares.owns(p)]
            if scales and members:
                buffers, gradients = self._buffers(group, members), [self._shares.gradient(p) for p in members]
                for name, scale in scales.items():
                    torch._foreach_add_(buffers[name], gradients, alpha=sign * scale)

    def _needed(self, closure: Closure | None) -> Closure:
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that evaluates the batch's loss and calls backward(): it is "
                "called twice, at different weights"
            )
        return closure


class _Deferred(_TwoPasses):
    """The order of the passes in MVR-1, -2 and -3: ĝ, update, g."""

    deferred = True

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """One step. Returns the loss of the second pass, at the weights that the model then holds; leaves no gradient behind.

        `closure` is called at the previous weights and again, with the same random state, at the new ones. The first step,
        and the first after `flush`, has no previous weights: it calls the closure once and moves nothing. Raises TypeError
        without a closure. If the second pass raises, the momentum starts anew with the next gradient.
        """
        closure = self._needed(closure)
        corrected: dict[Tensor, bool] = {}
        if self._has_pending() and self._corrects():
            random_state = _RandomState(self)
            self._pass(closure)
            random_state.restore()
            self._apply_update()
            corrected = self._with_history()
            self._move_averages(-1, corrected, self._moved)
        else:
            self._apply_update()
        try:
            loss = self._pass(closure)
        except BaseException:
            self._restart(corrected)
            raise
        self._move_averages(+1, corrected, self._moved)
        self._fold_gradients(corrected)
        self._drop_gradients()
        return loss

    def _moved(self, group: Group) -> dict[str, float]:
        """The correction of the averages that keep some of their past: the fold loses what it moved in the others."""
        past = self._formulas(group).averages(group)
        return {name: scale for name, scale in super()._moved(group).items() if past[name]}

    def _restart(self, corrected: dict[Tensor, bool]) -> None:
        """Restart the momenta from which a ĝ was subtracted whose g will never follow."""
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

    def correction(self, group: Group) -> dict[str, float]:
        """M ← M + γ (g - ĝ)."""
        return {"momentum_buffer": group["gamma"]}


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

    def correction(self, group: Group) -> dict[str, float]:
        """d ← d + (g - ĝ)."""
        return {"estimate": 1.0}

    def fold(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """d ← (1-q) d + q g, M ← β M + (1-β) d."""
        torch._foreach_lerp_(buffers["estimate"], gradients, 1 - past["estimate"])
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

    def correction(self, group: Group) -> dict[str, float]:
        """d ← d + (g - ĝ), M ← M + γ (g - ĝ)."""
        return {"estimate": 1.0, "momentum_buffer": group["gamma"]}


class PreviousBatchMVR(_TwoPasses):
    """Compares with the previous batch at these weights, ∇f(X_k; ξ_{k-1}): MVR3 of MUON-MVR. Two gradients a step.

        M_k = β M_{k-1} + (1-β) g_k + γβ (g_k - ∇f(X_k; ξ_{k-1}))

    A step is Gluon's, after which the same batch's gradient is taken again, at the new weights. It is the next step's ĝ and is
    subtracted at once: M ← M - γ ĝ. The next step begins with M ← M + γ g, with the γ of the step before.

    Arguments: as `Gluon`, and `gamma`: γ ≥ 0.
    """

    rules: ClassVar[dict[str, Rule]] = {"gamma": NON_NEGATIVE}

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, gamma: float = 0.1, **options: Any) -> None:
        super().__init__(params, lr, momentum, gamma=gamma, **options)

    def correction(self, group: Group) -> dict[str, float]:
        """M ← M + γ (g - ĝ)."""
        return {"momentum_buffer": group["gamma"]}

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """One step. Returns the loss of the first pass, at the weights before the update; leaves no gradient behind.

        `closure` is called before the update and again, with the same random state, after it. Raises TypeError without one.
        """
        closure = self._needed(closure)
        before = _RandomState(self)
        loss = self._pass(closure)
        self._admit_replaced()
        held = {p: self.state[p]["old"] for group, p in self._params() if group["old_gamma"] and self.state[p]["steps"]}
        self._move_averages(+1, held, lambda group: {"momentum_buffer": group["old_gamma"]})
        self._fold_gradients(held)
        for group in self.param_groups:
            group["old_gamma"] = 0.0
        self._apply_update()
        if self._corrects():
            after = _RandomState(self)
            before.restore()
            self._pass(closure)
            after.restore()
            subtracted = self._with_history()
            self._move_averages(-1, subtracted, self._moved)
            for group, p in self._params():
                group["old_gamma"] = self._moved(group).get("momentum_buffer", 0.0)
                self.state[p]["old"] = subtracted.get(p, False)
        self._drop_gradients()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("old_gamma", 0.0)  # the γ of the ĝ that M is without; 0 if there is none

    def _fresh_scalars(self, group: Group) -> dict[str, Any]:
        return super()._fresh_scalars(group) | {"old": False}  # whether that ĝ was there


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
