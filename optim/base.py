"""What a layer-wise optimizer does: take gradients into the momentum, and move each layer by the LMO of it."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .adamw import DEFAULTS, AdamW
from .buckets import Bucket
from .exchange import Task, alone, in_turns, replicated, sharded
from .rules import Buffers, Closure, Group
from .state import LayerwiseState


class LayerwiseOptimizer(LayerwiseState):
    """Momentum, an LMO per layer, and the update. A subclass says how momentum takes in gradients; `Gluon` is the simplest.

    A step takes a gradient, folds it into the momentum, and moves the weights:

        X ← (1 - lr·weight_decay) X + lr·radius · LMO(M)

    What a subclass may override takes **local tensors**: this rank's part of each parameter. So a subclass works on one
    process, under DDP and with FSDP2 without knowing of them:

        averages     the buffers of a matrix, and the weight of the past in each
        fold         how the momentum takes in a gradient
        lmo_input    the input of the LMO, if it is not the momentum
        rules        the options that the subclass adds, and their allowed values
    """

    # The trainer reads these. `deferred`: the update of a step is applied within the next step, and by `flush` at the end.
    # `passes`: how many gradients a step takes.
    deferred: ClassVar[bool] = False
    passes: ClassVar[int] = 1

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        norm: str = "spectral",
        radius: float = 1.0,
        *,
        bias_correction: bool = True,
        scale: str = "scion",
        polar: str = "polar_express",
        view: str | None = None,
        betas: tuple[float, float] = DEFAULTS["betas"],
        eps: float = DEFAULTS["eps"],
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if unknown := options.keys() - self.option_rules().keys():
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "norm": norm, "radius": radius,
            "bias_correction": bias_correction, "scale": scale, "polar": polar, "view": view, **options,
        }  # fmt: skip
        super().__init__(params, defaults, AdamW(betas, eps), process_group)

    # What a variant changes --------------------------------------------------------------------------------------------

    def averages(self, group: Group) -> dict[str, float]:
        """The buffers of each parameter, and the weight of the past in each."""
        return {"momentum_buffer": group["momentum"]}

    def fold(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """Take the gradients into the momentum, in place.

        `buffers` maps each name of `averages` to a list of tensors, one for each gradient. `past` has the weight of the past to
        use for each, with bias correction; it is 0 for a first gradient.
        """
        raise NotImplementedError

    def lmo_input(self, group: Group, momentum: Tensor, gradient: Tensor | None) -> Tensor:
        """The input of the LMO. `gradient`: this rank's part of `.grad`, if it is there."""
        return momentum

    # The step ----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """Update the weights with the gradients in place, or with those that `closure` leaves. No gradient is left behind.

        `closure` takes the gradient of the whole batch: it calls backward() and returns the loss, which `step` returns. Older
        gradients are dropped before it is called, so it may zero them or not. Raises RuntimeError if it leaves no gradient.
        """
        loss = self._pass(closure) if closure is not None else None
        self._fold_gradients()
        self._apply_update()
        self._drop_gradients()
        return loss

    def flush(self) -> None:
        """Apply the pending update, at the end of a run. Does nothing if there is none."""
        self._apply_update()

    @property
    def updates(self) -> int:
        """Updates applied so far: the index of the weights that the model now holds."""
        return self.param_groups[0]["updates"]

    # The parts of a step -----------------------------------------------------------------------------------------------

    def _pass(self, closure: Closure) -> Any:
        """One pass: the gradients of one batch at the current weights."""
        self._drop_gradients()
        with torch.enable_grad():
            loss = closure()
        if all(p.grad is None for _, p in self._params()):
            raise RuntimeError(
                "the closure left no gradient: it must call backward(), and with FSDP2 its last backward must reduce (no "
                "set_requires_gradient_sync(False) there)"
            )
        return loss

    @torch.no_grad()
    def _fold_gradients(self, corrected: dict[Tensor, bool] | None = None) -> None:
        """Fold the gradients into the momenta that this rank owns. The update that they make is then pending.

        `corrected`: the parameters with a correction in this step, and whether each had a gradient at the other weights. One
        that has a gradient in one pass alone moves, and its other gradient is 0.
        """
        self._admit_replaced()
        corrected = corrected or {}
        for group in self.param_groups:
            formulas = self._formulas(group)
            # The members of a call have the same weight of the past, so one call of the formula serves all of them.
            calls: dict[tuple[tuple[str, float], ...], list[Tensor]] = {}
            for p in group["params"]:
                state = self.state[p]
                state["pending"] = p.grad is not None or corrected.get(p, False)
                if state["pending"]:
                    past = self._advance(group, state)
                    if self._shares.owns(p):
                        calls.setdefault(tuple(past.items()), []).append(p)
            for weights, params in calls.items():
                gradients = [self._shares.gradient(p) for p in params]
                formulas.fold(group, self._buffers(group, params), dict(weights), gradients)
            lr, radius, weight_decay = (float(group[name]) for name in ("lr", "radius", "weight_decay"))
            group |= {"pending": True, "pending_step": lr * radius, "pending_decay": lr * weight_decay}
            group |= formulas.pending(group)

    def _advance(self, group: Group, state: dict[str, Any]) -> dict[str, float]:
        """Count one more gradient. Returns β_k for each average: β W_{k-1} / W_k with W_k = β W_{k-1} + 1 - β.

        That weight makes an average equal to one that starts from zero and is divided by W. Without bias correction the
        first gradient is taken whole, and later ones with β.
        """
        state["steps"] += 1
        past = {}
        for name, weight in self._formulas(group).averages(group).items():
            beta, before = float(weight), state[f"{name}_weight"]
            if group["bias_correction"]:
                state[f"{name}_weight"] = after = beta * before + 1 - beta
                past[name] = beta * before / after
            else:
                state[f"{name}_weight"] = 1.0
                past[name] = beta if before else 0.0
        return past

    @torch.no_grad()
    def _apply_update(self) -> None:
        """Apply the pending update, if there is one."""
        if not self._has_pending():
            return
        self._admit_replaced()
        self._shares.check_layout([p for _, p in self._params()])
        in_turns(self._tasks())
        for group in self.param_groups:
            group["pending"] = False
            group["updates"] += 1
        for _, p in self._params():
            self.state[p]["pending"] = False

    def _has_pending(self) -> bool:
        return any(group["pending"] for group in self.param_groups)

    def _drop_gradients(self) -> None:
        for _, p in self._params():
            p.grad = None

    def _tasks(self) -> Iterator[Task]:
        """The pending update, bucket by bucket."""
        for group in self.param_groups:
            if not group["pending"]:
                continue
            for params in self._split(group, group["params"]):
                ranks = self._ranks_of(group, params[0])
                over_shards = ranks is not None and isinstance(params[0], DTensor)
                inputs = partial(self._lmo_inputs, group, params, needs_all=over_shards)
                moves = [self.state[p]["pending"] for p in params]
                norm = self._norm(group, params[0])
                bucket = Bucket(params, norm, inputs, moves, group["pending_step"], group["pending_decay"])
                if ranks is None:
                    yield alone(bucket)
                else:
                    yield (sharded if over_shards else replicated)(bucket, self._shares, ranks)

    def _lmo_inputs(self, group: Group, params: list[Tensor], needs_all: bool) -> list[Tensor | None]:
        """This rank's part of the LMO's input of each parameter; None if it owns none, or if the parameter does not move.

        `needs_all`: this rank's part of a matrix is needed even if the matrix does not move here, because another rank may have
        a gradient.
        """
        wanted = [p for p in params if self._shares.owns(p) and (needs_all or self.state[p]["pending"])]
        steps = [self.state[p]["steps"] for p in wanted]
        gradients = (None if p.grad is None else self._shares.gradient(p) for p in wanted)
        inputs = self._formulas(group).inputs(group, self._buffers(group, wanted), steps, gradients)
        found = dict(zip(wanted, inputs, strict=True))
        return [found.get(p) for p in params]

    def inputs(self, group: Group, buffers: Buffers, steps: list[int], gradients: Iterable[Tensor | None]) -> list[Tensor]:
        """The LMO's input of each parameter. `steps`: the gradients that each has taken so far."""
        return [self.lmo_input(group, m, g) for m, g in zip(buffers["momentum_buffer"], gradients, strict=True)]
