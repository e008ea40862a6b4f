"""Gluon with momentum variance reduction: "Muon is Provably Faster with Momentum Variance Reduction" (Qian, Rammal,
Kovalev, Richtárik) and "On the Convergence of Muon and Beyond" (Chang, Liu, Yuan, arXiv 2509.15816).

    M_k = β M_{k-1} + (1-β) g_k + γβ (g_k - ĝ_k)

The variants differ in ĝ_k and here in nothing but the order of their passes: none keeps an old gradient, an old batch or
old weights. Each holds one momentum buffer and one gradient buffer, as Gluon does. γ = 0 is Gluon, bit for bit.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.gluon import Closure, Gluon, average, is_number
from optim.sharding import local


class _MVR(Gluon):
    """Gluon with a correction; `gamma` is γ ≥ 0."""

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, gamma: float = 0.1, **options: Any) -> None:
        super().__init__(params, lr, momentum, gamma=gamma, **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        gamma = group["gamma"]
        if not is_number(gamma) or not 0 <= float(gamma) < math.inf:
            raise ValueError(f"gamma must be a finite number ≥ 0, got {gamma!r}")


class GluonMVR1(_MVR):
    """MVR-1: ĝ_k = ∇f(X_{k-1}; ξ_{k-1}), the last step's gradient. One gradient a step; γ = 1-β is Nesterov momentum.

    With E_k = β E_{k-1} + (1-β) g_k the recursion is M_k = (1-γ) E_k + γ g_k, so E is all that is kept.
    """

    def _lmo_input(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        average_ = super()._lmo_input(p, group)
        if group["gamma"] == 0 or p.grad is None:
            return average_
        return torch.lerp(average_, local(p.grad).to(average_.dtype), group["gamma"])


class _TwoPasses(_MVR):
    """A variant that evaluates the gradient of a batch twice, so `step` needs a closure."""

    def _corrects(self, group: dict[str, Any]) -> bool:
        """Whether the second evaluation counts for this group."""
        return group["gamma"] > 0 and group["norm"] != "adamw"

    def _check_ready(self, closure: Closure | None) -> None:
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that evaluates the batch's loss and calls backward(): it is "
                "called twice, at different weights"
            )
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(self).__name__}.step found gradients of an earlier pass: call zero_grad() before it, and backward() "
                "only inside the closure"
            )

    def _evaluate_again(self, closure: Closure, kept: Sequence[Tensor] = ()) -> Any:
        """A second pass, which must leave the gradients of the first one in place for the parameters of `kept`."""
        guards = [_Kept(p) for p in kept]
        self._ignore_zero_grad = True
        try:
            loss = self._evaluate(closure)
        finally:
            self._ignore_zero_grad = False
            for guard in guards:
                guard.release()
        for guard in guards:
            guard.check()
        return loss

    def _evaluate(self, closure: Closure) -> Any:
        """A pass. With FSDP2, one that reduces nothing leaves its gradient where it can be neither scaled nor subtracted."""
        before = self._sharded_gradients()
        loss = super()._evaluate(closure)
        after = self._sharded_gradients()
        if before and all(a is b and v == w for (a, v), (b, w) in zip(before, after, strict=True)):
            raise RuntimeError(
                f"{type(self).__name__}: a pass left no gradient in .grad of the sharded parameters, and the correction "
                "would be wrong without a word: with FSDP2 both passes must reduce, so do not call "
                "set_requires_gradient_sync(False) for the last micro-batch of a pass"
            )
        return loss

    def _sharded_gradients(self) -> list[tuple[Tensor | None, int]]:
        """The gradients of the DTensors, and how often each has been written."""
        sharded = [p.grad for g in self.param_groups for p in g["params"] if isinstance(p, DTensor) and p.requires_grad]
        return [(gradient, 0 if gradient is None else local(gradient)._version) for gradient in sharded]


class GluonMVR2(_TwoPasses):
    """MVR-2: ĝ_k = ∇f(X_{k-1}; ξ_k), this batch at the previous weights (STORM at γ = 1). Two gradients a step.

    The update is deferred: between steps the model holds X_{k-1} and the update from M_{k-1} is pending. A step evaluates
    its batch there (ĝ_k), scales `.grad`, applies the update, evaluates the batch again onto the same `.grad` (g_k), and
    folds the sum into the momentum. So K steps make K-1 updates, and `flush` the last one. After `flush` there are no
    previous weights: the next step is Gluon's.

    `inner` = q in (0, 1] chooses the nested form: exact MVR cleans the gradient, d_k = g_k + (1-q)(d_{k-1} - ĝ_k), and
    ordinary momentum averages it, M_k = β M_{k-1} + (1-β) d_k. `gamma` is not used then; it costs one more buffer.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        gamma: float = 0.1,
        *,
        inner: float | None = None,
        **options: Any,
    ) -> None:
        self._corrected = False
        super().__init__(params, lr, momentum, gamma, inner=inner, **options)

    def step(self, closure: Closure | None = None, previous: Closure | None = None) -> Any:
        """One step; returns the loss of the second pass, at the weights that the model then holds.

        `previous` (default: `closure`) is called for the pass at the previous weights; under DDP it may run in `no_sync`,
        since the second pass reduces the sum of both. Raises TypeError without a closure; RuntimeError where `.grad` is not
        empty at the start, or where something replaced it between the passes and so removed the correction.
        """
        self._check_ready(closure)
        self._corrected = self._has_pending() and any(self._corrects(group) for group in self.param_groups)
        kept: list[Tensor] = []
        if self._corrected:
            random_state = _RandomState(self)
            self._evaluate(previous or closure)
            random_state.restore()
            kept = self._scale_gradients()
        self._apply_update()
        loss = self._evaluate_again(closure, kept)
        self._fold_gradients()
        self._drop_gradients()
        return loss

    def flush(self) -> None:
        """Apply the pending update, as at the end of a run."""
        self._apply_update()

    def _recursion(self, group: dict[str, Any]) -> tuple[float, float, str]:
        """(β, γ, buffer) of the recursion that the correction goes into."""
        if group["inner"] is not None:
            return 1 - group["inner"], 1.0, "estimate"
        return group["momentum"], group["gamma"], "momentum_buffer"

    def _corrects(self, group: dict[str, Any]) -> bool:
        beta, gamma, _ = self._recursion(group)
        return gamma * beta > 0 and group["norm"] != "adamw"

    @torch.no_grad()
    def _scale_gradients(self) -> list[Tensor]:
        """Turn ĝ into its share of the sum that the momentum takes, and drop it where there are no previous weights.

        Returns the parameters whose second gradient must be added to it.
        """
        kept = []
        for group in self.param_groups:
            beta, gamma, _ = self._recursion(group)
            gradients = []
            for p in group["params"]:
                if not self._corrects(group) or self.state[p]["steps"] == 0:
                    p.grad = None
                elif p.grad is not None:
                    gradients.append(local(p.grad))
                    kept.append(p)
            if gradients:
                torch._foreach_mul_(gradients, -gamma * beta / (1 - beta + gamma * beta))
        return kept

    def _fold(self, group: dict[str, Any], states: list[dict[str, Any]], gradients: list[Tensor]) -> None:
        beta, gamma, buffer = self._recursion(group)
        weight = 1 - beta + (gamma * beta if self._corrected else 0)
        average([local(s[buffer]) for s in states], gradients, beta, weight)
        if group["inner"] is not None:
            super()._fold(group, states, [local(s["estimate"]) for s in states])

    def _start(self, state: dict[str, Any], gradient: Tensor) -> None:
        super()._start(state, gradient)
        if "estimate" in state:
            local(state["estimate"]).copy_(gradient)

    def _buffer_names(self, group: dict[str, Any]) -> list[str]:
        nested = group["inner"] is not None and group["norm"] != "adamw"
        return [*super()._buffer_names(group), *(["estimate"] if nested else [])]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        inner = group["inner"]
        if inner is not None and not (is_number(inner) and 0 < inner <= 1):
            raise ValueError(f"inner must be None or a number in (0, 1], got {inner!r}")


class GluonMVR3(_TwoPasses):
    """MVR-3: ĝ_k = ∇f(X_k; ξ_{k-1}), the previous batch at these weights. Two gradients a step.

    A step is Gluon's, after which the same batch is evaluated again at the new weights: that gradient is ĝ_{k+1}, and the
    momentum takes its share, -γ ĝ_{k+1}, at once. γ of the next step's correction is so this step's, in both of its terms.
    """

    def step(self, closure: Closure | None = None, previous: Closure | None = None) -> Any:
        """One step; returns the loss of the first pass, at the weights before the update.

        `previous` (default: `closure`) is called for the evaluation at the new weights; unlike MVR-2's it must reduce its
        gradients over the ranks. Raises as `GluonMVR2.step` does.
        """
        self._check_ready(closure)
        corrects = any(self._corrects(group) for group in self.param_groups)
        before = _RandomState(self)
        loss = self._evaluate(closure)
        self._fold_gradients()
        self._forget_evaluation()
        self._apply_update()
        self._drop_gradients()
        if corrects:
            after = _RandomState(self)
            before.restore()
            self._evaluate_again(previous or closure)
            after.restore()
            self._subtract_gradients()
            self._drop_gradients()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # γ of the evaluation that the momentum holds already, 0 for none; per parameter, whether it had a gradient there.
        self.param_groups[-1]["evaluated_gamma"] = 0.0
        for p in self.param_groups[-1]["params"]:
            self.state[p]["evaluated"] = False

    def _takes_part(self, p: Tensor) -> bool:
        return p.grad is not None or self.state[p]["evaluated"]

    def _fold(self, group: dict[str, Any], states: list[dict[str, Any]], gradients: list[Tensor]) -> None:
        beta = group["momentum"]
        weight = 1 - beta + group["evaluated_gamma"] * beta
        average([local(s["momentum_buffer"]) for s in states], gradients, beta, weight)

    def _forget_evaluation(self) -> None:
        for group in self.param_groups:
            group["evaluated_gamma"] = 0.0
            for p in group["params"]:
                self.state[p]["evaluated"] = False

    @torch.no_grad()
    def _subtract_gradients(self) -> None:
        """M ← M - γ ĝ; the next step's β multiplies it with the rest."""
        for group in self.param_groups:
            if not self._corrects(group):
                continue
            group["evaluated_gamma"] = float(group["gamma"])
            momenta, gradients = [], []
            for p in group["params"]:
                state = self.state[p]
                state["evaluated"] = p.grad is not None and state["steps"] > 0
                if state["evaluated"] and self._owns(p):
                    momenta.append(local(state["momentum_buffer"]))
                    gradients.append(local(p.grad).to(state["momentum_buffer"].dtype))
            if momenta:
                torch._foreach_add_(momenta, gradients, alpha=-group["gamma"])


class _RandomState:
    """The generators that a pass may draw from (dropout), so that another pass can draw the same."""

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


class _Kept:
    """Watches that a pass adds to the gradient that lies in `p.grad` already.

    DDP may move the sum into its bucket and put a view of that into `.grad`; autograd then added to the old tensor first,
    so its version tells that apart from a `.grad` that was dropped. What zeroes the old tensor in place changes its version
    before autograd gets there, which a leaf's hook sees. (Not watched so: FSDP2, which adds without autograd, and views of
    DDP's buckets, which all share one version.)
    """

    def __init__(self, p: Tensor) -> None:
        self._p, self._gradient = p, p.grad
        self._version = local(p.grad)._version
        gradient = local(p.grad)
        self._reached = gradient.untyped_storage().nbytes() > gradient.nbytes
        self._zeroed = False
        self._hook = p.register_hook(self._before_first_addition)

    def _before_first_addition(self, _: Tensor) -> None:
        if not self._reached:
            self._reached = True
            self._zeroed = self._changed()

    def _changed(self) -> bool:
        return local(self._gradient)._version != self._version

    def release(self) -> None:
        self._hook.remove()

    def check(self) -> None:
        replaced = self._p.grad is None or (self._p.grad is not self._gradient and not self._changed())
        if replaced or self._zeroed:
            raise RuntimeError(
                f"the .grad of a parameter of shape {tuple(self._p.shape)} was {'replaced' if replaced else 'changed'} "
                "between the two passes, which removes the correction: the closure must zero no gradients "
                "(model.zero_grad(), p.grad = None)"
            )
