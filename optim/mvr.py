"""Gluon with momentum variance reduction: "Muon is Provably Faster with Momentum Variance Reduction" (Qian, Rammal,
Kovalev, Richtárik) and "On the Convergence of Muon and Beyond" (Chang, Liu, Yuan, arXiv 2509.15816).

    M_k = β M_{k-1} + (1-β) g_k + γβ (g_k - ĝ_k)

The variants differ in ĝ_k and here in nothing but the order of their passes: none keeps an old gradient, an old batch or
old weights. Each holds one momentum buffer and one gradient buffer, as Gluon does. γ = 0 is Gluon, bit for bit.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.gluon import Bucket, Closure, Gluon, average, beside, gradient_of, is_number
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
        return torch.lerp(average_, gradient_of(p, average_), group["gamma"])


class _TwoPasses(_MVR):
    """A variant that evaluates the gradient of a batch twice, so `step` needs a closure.

    `correction_fraction` f < 1 evaluates only the shared micro-batches S, a fraction f of the batch, twice: the correction
    is γβ (g_S - ĝ_S), both means over S, beside (1-β) g with the mean g over the whole batch.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        gamma: float = 0.1,
        *,
        correction_fraction: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, momentum, gamma, correction_fraction=correction_fraction, **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        fraction = group["correction_fraction"]
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"correction_fraction must be a number in (0, 1], got {fraction!r}")

    def _corrects(self, group: dict[str, Any]) -> bool:
        """Whether the second evaluation counts for this group."""
        return group["gamma"] > 0 and group["norm"] != "adamw"

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        """What this step's gradient and its correction weigh in the average: 1-β, and γβ or 0."""
        raise NotImplementedError

    def _gradient_weight(self, group: dict[str, Any]) -> float:
        """What `.grad` weighs in the average once the batch has been evaluated."""
        plain, correction = self._weights(group)
        return plain + correction if group["correction_fraction"] == 1 else plain

    def _check_ready(self, closure: Closure | None, rest: Closure | None) -> None:
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

        fractions = {float(group["correction_fraction"]) for group in self.param_groups}
        if len(fractions) > 1:
            raise ValueError(f"correction_fraction must be the same in all groups, got {sorted(fractions)}")
        if fractions != {1.0} and rest is None:
            raise TypeError(
                f"correction_fraction={fractions.pop()} needs step(closure, previous, rest): closure and previous evaluate "
                "the micro-batches that both passes share, rest the others"
            )
        if fractions == {1.0} and rest is not None:
            raise TypeError("rest has no micro-batches to evaluate with correction_fraction=1: closure takes all of them")

    def _evaluate_rest(self, rest: Closure | None, loss: Any) -> Any:
        """Add the gradient of the micro-batches that are not shared; returns the loss of the whole batch.

        `.grad` holds f g_S, for MVR-2 together with ĝ's share. (1-β) g + γβ g_S = (1-β) (c f g_S + (g - f g_S)) with
        c = (1-β + γβ/f) / (1-β): what is there is scaled by c, the rest adds g - f g_S, and the sum weighs 1-β.
        """
        if rest is None:
            return loss
        kept = []
        for group in self.param_groups:
            plain, correction = self._weights(group)
            with_gradient = [p for p in group["params"] if p.grad is not None]
            kept += with_gradient
            gradients = [local(p.grad) for p in with_gradient if self.state[p]["steps"] > 0]
            if gradients and correction:
                with torch.no_grad():
                    torch._foreach_mul_(gradients, (plain + correction / group["correction_fraction"]) / plain)
        more = self._evaluate_again(rest, kept)
        return loss if more is None else more if loss is None else loss + more

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
        return [(gradient, 0 if gradient is None else _version(gradient)) for gradient in sharded]


class GluonMVR2(_TwoPasses):
    """MVR-2: ĝ_k = ∇f(X_{k-1}; ξ_k), this batch at the previous weights (STORM at γ = 1). Two gradients a step.

    The update is deferred: between steps the model holds X_{k-1} and the update from M_{k-1} is pending. A step evaluates
    its batch there (ĝ_k), scales `.grad`, applies the update, evaluates the batch again onto the same `.grad` (g_k), and
    folds the sum into the momentum. So K steps make K-1 updates, and `flush` the last one. After `flush` there are no
    previous weights: the next step is Gluon's.

    `inner` = q in (0, 1] chooses the nested form: exact MVR cleans the gradient, d_k = g_k + (1-q)(d_{k-1} - ĝ_k), and
    ordinary momentum averages it, M_k = β M_{k-1} + (1-β) d_k. `gamma` is not used then; it costs one more buffer.

    `correction_fraction` = f < 1 takes the correction from a fraction f of the micro-batches, S, at 1 + f gradients a step:

        M_k = β M_{k-1} + (1-β) g_k + γβ (g_{k,S} - ĝ_{k,S})
        nested: d_k = (1-q) d_{k-1} + q g_k + (1-q) (g_{k,S} - ĝ_{k,S})

    `overlap=True` computes the pending update's directions and starts to exchange them before the pass at the previous
    weights, which does not need them, and applies them after it: the same weights bit for bit. The price is one buffer of
    the size of an update. On CUDA the directions are computed on a stream of their own; collectives are asynchronous
    everywhere. (Where the pass itself communicates over the same process group, as with FSDP2, its messages queue behind.)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        gamma: float = 0.1,
        *,
        inner: float | None = None,
        correction_fraction: float = 1.0,
        overlap: bool = False,
        **options: Any,
    ) -> None:
        self.overlap = overlap
        self._corrected = False
        super().__init__(params, lr, momentum, gamma, inner=inner, correction_fraction=correction_fraction, **options)

    def step(self, closure: Closure | None = None, previous: Closure | None = None, rest: Closure | None = None) -> Any:
        """One step; returns the loss of the second pass, at the weights that the model then holds.

        `previous` (default: `closure`) is called for the pass at the previous weights; under DDP it may run in `no_sync`,
        since the second pass reduces the sum of both. With `correction_fraction` < 1, `closure` and `previous` evaluate the
        shared micro-batches and `rest` the others, each scaled so that all backwards together give the mean over the whole
        batch (and the losses of `closure` and `rest` add up to its loss); under DDP only the last backward of `rest` needs
        to reduce.

        Raises TypeError without a closure, or where `rest` and `correction_fraction` do not go together; RuntimeError where
        `.grad` is not empty at the start, or where something replaced it between the passes and so removed the correction.
        """
        self._check_ready(closure, rest)
        self._corrected = self._has_pending() and any(self._corrects(group) for group in self.param_groups)
        kept: list[Tensor] = []
        if self._corrected:
            if self.overlap:
                self._launch()
            random_state = _RandomState(self)
            self._evaluate(previous or closure)
            random_state.restore()
            kept = self._scale_gradients()
        self._apply_update()
        loss = self._evaluate_again(closure, kept)
        loss = self._evaluate_rest(rest, loss)
        self._fold_gradients()
        self._drop_gradients()
        return loss

    def flush(self) -> None:
        """Apply the pending update, as at the end of a run."""
        self._apply_update()

    @torch.no_grad()
    def _launch(self) -> None:
        """Compute the pending update's directions beside what follows, and start to send them.

        What a pass that failed has left under way is still the pending update's.
        """
        if self._launched is None:
            with beside(self.param_groups[0]["params"][0].device):
                self._launched = list(super()._directions())

    def _directions(self) -> Iterable[Bucket]:
        launched, self._launched = self._launched, None
        return super()._directions() if launched is None else launched

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Gluon.load_state_dict`."""
        for bucket in self._directions() if self._launched is not None else ():
            bucket.receive()  # of the momenta that are now replaced
        super().load_state_dict(state_dict)

    def _set_up(self, process_group: dist.ProcessGroup | None) -> None:
        super()._set_up(process_group)
        self._launched: list[Bucket] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"overlap": self.overlap, "_corrected": self._corrected}

    def _recursion(self, group: dict[str, Any]) -> tuple[float, float, str]:
        """(β, γ, buffer) of the recursion that the correction goes into."""
        if group["inner"] is not None:
            return 1 - group["inner"], 1.0, "estimate"
        return group["momentum"], group["gamma"], "momentum_buffer"

    def _corrects(self, group: dict[str, Any]) -> bool:
        beta, gamma, _ = self._recursion(group)
        return gamma * beta > 0 and group["norm"] != "adamw"

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        beta, gamma, _ = self._recursion(group)
        return 1 - beta, gamma * beta if self._corrected and self._corrects(group) else 0.0

    @torch.no_grad()
    def _scale_gradients(self) -> list[Tensor]:
        """Turn ĝ into its share of the sum that the momentum takes, and drop it where there are no previous weights.

        Returns the parameters whose second gradient must be added to it.
        """
        kept = []
        for group in self.param_groups:
            plain, correction = self._weights(group)
            gradients = []
            for p in group["params"]:
                if not self._corrects(group) or self.state[p]["steps"] == 0:
                    p.grad = None
                elif p.grad is not None:
                    gradients.append(local(p.grad))
                    kept.append(p)
            if gradients:
                correction /= group["correction_fraction"]
                torch._foreach_mul_(gradients, -correction / (plain + correction))
        return kept

    def _fold(self, group: dict[str, Any], states: list[dict[str, Any]], gradients: list[Tensor]) -> None:
        beta, _, buffer = self._recursion(group)
        average([local(s[buffer]) for s in states], gradients, beta, self._gradient_weight(group))
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

    `correction_fraction` = f < 1 evaluates a fraction f of the micro-batches again, at 1 + f gradients a step. With S_k the
    shared micro-batches of step k, which should be the same positions in every batch,

        M_k = β M_{k-1} + (1-β) g_k + γβ (∇f_{S_k}(X_k; ξ_k) - ∇f_{S_{k-1}}(X_k; ξ_{k-1})),

    so that what S_{k-1} added to M_{k-1} at X_{k-1} is what is subtracted again at X_k.
    """

    def step(self, closure: Closure | None = None, previous: Closure | None = None, rest: Closure | None = None) -> Any:
        """One step; returns the loss of the first pass, at the weights before the update.

        `previous` (default: `closure`) is called for the evaluation at the new weights; unlike MVR-2's it must reduce its
        gradients over the ranks. `rest` is as in `GluonMVR2.step`; where `closure` runs in DDP's `no_sync` because `rest`
        reduces for both, give a `previous` that reduces. Raises as `GluonMVR2.step` does.
        """
        self._check_ready(closure, rest)
        corrects = any(self._corrects(group) for group in self.param_groups)
        before = _RandomState(self)
        loss = self._evaluate(closure)
        loss = self._evaluate_rest(rest, loss)
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
        average([local(s["momentum_buffer"]) for s in states], gradients, group["momentum"], self._gradient_weight(group))

    def _weights(self, group: dict[str, Any]) -> tuple[float, float]:
        return 1 - group["momentum"], group["evaluated_gamma"] * group["momentum"]

    def _forget_evaluation(self) -> None:
        for group in self.param_groups:
            group["evaluated_gamma"] = 0.0
            for p in group["params"]:
                self.state[p]["evaluated"] = False

    @torch.no_grad()
    def _subtract_gradients(self) -> None:
        """M ← M - γ ĝ; the next step's β multiplies it with the rest. (`.grad` is f ĝ_S.)"""
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
                    gradients.append(gradient_of(p, state["momentum_buffer"]))
            if momenta:
                torch._foreach_add_(momenta, gradients, alpha=-group["gamma"] / group["correction_fraction"])


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

    When autograd reaches the parameter (a leaf's hook sees that), `.grad` must be what it was; after that it is only added
    to. DDP may move it: into its bucket at any time, so a view of something larger counts as a bucket, and its contents,
    which share one version, are not watched. FSDP2 adds without autograd.
    """

    def __init__(self, p: Tensor) -> None:
        self._p, self._gradient, self._version = p, p.grad, _version(p.grad)
        self._reached = self._zeroed = self._was_dropped = False
        self._hook = p.register_hook(self._before_addition)

    def _before_addition(self, _: Tensor) -> None:
        if not self._reached and self._p.grad is self._gradient and not _is_part(self._gradient):
            self._zeroed = _version(self._gradient) != self._version
        self._reached = True
        self._dropped()

    def _dropped(self) -> bool:
        gradient = self._p.grad
        self._was_dropped = self._was_dropped or gradient is None or not (gradient is self._gradient or _is_part(gradient))
        return self._was_dropped

    def release(self) -> None:
        self._hook.remove()

    def check(self) -> None:
        if self._dropped() or self._zeroed:
            raise RuntimeError(
                f"the .grad of a parameter of shape {tuple(self._p.shape)} was "
                f"{'changed' if self._zeroed else 'replaced'} between the two passes, which removes the correction: the "
                "closure must zero no gradients (model.zero_grad(), p.grad = None)"
            )


def _version(gradient: Tensor) -> int:
    """Grows whenever the gradient is written; a DTensor may be written as such, or its local tensor."""
    return gradient._version + (local(gradient)._version if isinstance(gradient, DTensor) else 0)


def _is_part(gradient: Tensor) -> bool:
    """Whether it is a view of something larger."""
    return local(gradient).untyped_storage().nbytes() > local(gradient).nbytes
