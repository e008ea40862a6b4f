"""What every layer-wise optimizer shares: options and their checks, state and state dicts, the parts of a step."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from .buckets import Bucket, buffer_dtype, split, travel_dtype
from .exchange import Alone, Ownership, Replicated, Sharded, local, sharded_along, shared_by
from .norms import Norm, Sign, get_norm

Closure = Callable[[], Any]
Group = dict[str, Any]
Buffers = dict[str, list[Tensor]]


class Rule(NamedTuple):
    """Which values an option allows."""

    allows: Callable[[Any], bool]
    allowed: str


def is_number(value: object) -> bool:
    """A real number, or a tensor of one; True and False are not numbers here."""
    return (isinstance(value, Real) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


NON_NEGATIVE = Rule(lambda v: is_number(v) and 0 <= float(v) < math.inf, "a finite number ≥ 0")
POSITIVE = Rule(lambda v: is_number(v) and 0 < float(v) < math.inf, "a finite number > 0")
PAST = Rule(lambda v: is_number(v) and 0 <= float(v) < 1, "a number in [0, 1)")
SHARE = Rule(lambda v: is_number(v) and 0 < float(v) <= 1, "a number in (0, 1]")
PAIR = Rule(lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(map(PAST.allows, v)), "two numbers in [0, 1)")
SWITCH = Rule(lambda v: isinstance(v, bool), "True or False")

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


class LayerwiseOptimizer(Optimizer):
    """Momentum, an LMO per layer, and the update. A subclass says how momentum takes in gradients; `Gluon` is the simplest.

    A step evaluates the gradient, folds it into the momentum, and moves the weights:

        X ← (1 - lr·weight_decay) X + lr·radius · LMO(M)

    What a subclass may override takes **local tensors**: this rank's part of each parameter. So a subclass works on one
    process, under DDP and with FSDP2 without knowing of them:

        averages     the buffers of a matrix, and the weight of the past in each
        fold         how the momentum takes in a gradient
        lmo_input    the input of the LMO, if it is not the momentum
        rules        the options that the subclass adds, and their allowed values
    """

    # The trainer reads these. `deferred`: the update of a step is applied within the next step, and by `flush` at the end.
    # `passes`: how many gradients a step evaluates.
    deferred: ClassVar[bool] = False
    passes: ClassVar[int] = 1

    rules: ClassVar[dict[str, Rule]] = {
        "lr": NON_NEGATIVE, "momentum": PAST, "weight_decay": NON_NEGATIVE, "radius": POSITIVE, "bias_correction": SWITCH,
    }  # fmt: skip

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
        betas: tuple[float, float] = ADAMW["betas"],
        eps: float = ADAMW["eps"],
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if unknown := options.keys() - self.option_rules().keys():
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        # Only adamw groups have these options: schedulers mistake `betas` in `defaults` for the momentum.
        self._adamw = {"betas": betas, "eps": eps}
        self._set_up(process_group)
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "norm": norm, "radius": radius,
            "bias_correction": bias_correction, "scale": scale, "polar": polar, **options,
        })  # fmt: skip

    # ---- what a variant changes -------------------------------------------------------------------------------------

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

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """Update the weights with the gradients in place, or with those that `closure` leaves. No gradient is left behind.

        `closure` evaluates the whole batch, calls backward() and returns the loss, which `step` returns. Older
        gradients are dropped before it is called, so it may zero them or not. Raises RuntimeError if it leaves no gradient.
        """
        loss = self._evaluate(closure) if closure is not None else None
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

    # ---- the parts of a step ----------------------------------------------------------------------------------------

    def _evaluate(self, closure: Closure) -> Any:
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

        `corrected` maps each parameter whose old gradient was folded before to whether it had one.
        """
        corrected = corrected or {}
        for group in self.param_groups:
            # The members of a call have the same weight of the past, so one call of the formula serves all of them.
            calls: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
            for p in group["params"]:
                state = self.state[p]
                # A gradient that is missing in one pass alone is 0.
                state["pending"] = p.grad is not None or corrected.get(p, False)
                if not state["pending"]:
                    continue
                past = self._advance(group, state)
                if self._owns(p):
                    params, gradients = calls.setdefault((p in corrected, tuple(past.items())), ([], []))
                    params.append(p)
                    gradients.append(self._gradient(p))
            for (again, past), (params, gradients) in calls.items():
                if group["norm"] == "adamw":
                    self._fold_adamw(group, params, gradients)
                else:
                    fold = self.fold_new if again else self.fold
                    fold(group, self._buffers(group, params), dict(past), gradients)
            group["pending"] = (
                *(float(group[name]) for name in ("lr", "radius", "weight_decay")),
                *(group["betas"] if group["norm"] == "adamw" else ()),
            )

    def fold_new(self, group: Group, buffers: Buffers, past: dict[str, float], gradients: list[Tensor]) -> None:
        """As `fold`, after an old gradient was folded (see `optim.mvr`)."""
        raise NotImplementedError

    def _advance(self, group: Group, state: dict[str, Any]) -> dict[str, float]:
        """Count one more gradient. Returns β_k for each buffer: β W_{k-1} / W_k with W_k = β W_{k-1} + 1 - β.

        That weight makes an average equal to one that starts from zero and is divided by W. Without bias correction the
        first gradient is taken whole, and later ones with β.
        """
        state["steps"] += 1
        past = {}
        for name, weight in self._averages(group):
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
        """Apply the pending update, if there is one. While a bucket's directions travel, the next bucket's are computed."""
        if not self._has_pending():
            return
        self._check_layout()
        gathering: Bucket | None = None
        travelling: Bucket | None = None
        for bucket in (*self._buckets(), None, None):
            if bucket is not None:
                bucket.gather()
            if gathering is not None:
                gathering.send_directions()
            if travelling is not None:
                travelling.move_weights()
            gathering, travelling = bucket, gathering
        for group in self.param_groups:
            group["pending"] = ()
            group["updates"] += 1
        for _, p in self._params():
            self.state[p]["pending"] = False

    def _has_pending(self) -> bool:
        return any(group["pending"] for group in self.param_groups)

    def _drop_gradients(self) -> None:
        for _, p in self._params():
            p.grad = None

    def _buckets(self) -> Iterator[Bucket]:
        """The pending update, bucket by bucket."""
        for group in self.param_groups:
            if not group["pending"]:
                continue
            lr, radius, weight_decay, *_ = group["pending"]
            for params in self._split(group):
                p = params[0]
                norm, ranks = _norm(group, p), self._ranks_of(group, p)
                sharded = ranks is not None and isinstance(p, DTensor)
                exchange = Alone()
                if ranks is not None:
                    kind: type[Any] = Sharded if sharded else Replicated
                    exchange = kind(params, self._owners, ranks, travel_dtype(p, norm))
                inputs = partial(self._lmo_inputs, group, params, needs_all=sharded)
                moves = [self.state[p]["pending"] for p in params]
                yield Bucket(params, norm, exchange, inputs, moves, lr * radius, lr * weight_decay)

    def _lmo_inputs(self, group: Group, params: list[Tensor], needs_all: bool) -> list[Tensor | None]:
        """This rank's part of the LMO's input of each parameter; None if it owns none, or if the parameter does not move.

        `needs_all`: this rank's part of a matrix is needed even if the matrix does not move here, because another rank may have
        a gradient.
        """
        wanted = [p for p in params if self._owns(p) and (needs_all or self.state[p]["pending"])]
        if group["norm"] == "adamw":
            inputs = self._adamw_directions(group, wanted)
        else:
            momenta = self._buffers(group, wanted)["momentum_buffer"]
            gradients = (None if p.grad is None else self._gradient(p) for p in wanted)
            inputs = [self.lmo_input(group, m, g) for m, g in zip(momenta, gradients, strict=True)]
        found = dict(zip(wanted, inputs, strict=True))
        return [found.get(p) for p in params]

    # ---- AdamW's two formulas, for the groups with norm="adamw" ------------------------------------------------------

    def _fold_adamw(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """m ← β₁ m + (1-β₁) g, v ← β₂ v + (1-β₂) g²."""
        buffers, (beta1, beta2) = self._buffers(group, params), group["betas"]
        torch._foreach_lerp_(buffers["momentum_buffer"], gradients, 1 - beta1)
        torch._foreach_mul_(buffers["exp_avg_sq"], beta2)
        torch._foreach_addcmul_(buffers["exp_avg_sq"], gradients, gradients, value=1 - beta2)

    def _adamw_directions(self, group: Group, params: list[Tensor]) -> list[Tensor]:
        """m̂ / (√v̂ + eps), bias-corrected by the gradients taken so far (Loshchilov, Hutter, arXiv 1711.05101)."""
        alike: dict[int, list[Tensor]] = {}
        for p in params:
            alike.setdefault(self.state[p]["steps"], []).append(p)
        directions: dict[Tensor, Tensor] = {}
        for steps, members in alike.items():
            buffers = self._buffers(group, members)
            correction1, correction2 = (1 - beta**steps for beta in group["pending"][-2:])
            divisors = torch._foreach_sqrt(buffers["exp_avg_sq"])
            torch._foreach_div_(divisors, math.sqrt(correction2))
            torch._foreach_add_(divisors, group["eps"])
            torch._foreach_mul_(divisors, correction1)
            quotients = torch._foreach_div(buffers["momentum_buffer"], divisors)
            directions.update(zip(members, quotients, strict=True))
        return [directions[p] for p in params]

    # ---- groups and state -------------------------------------------------------------------------------------------

    @classmethod
    def option_rules(cls) -> dict[str, Rule]:
        """The rules of the class and of those that it inherits from."""
        return {name: rule for c in reversed(cls.__mro__) for name, rule in vars(c).get("rules", {}).items()}

    def _set_up(self, process_group: dist.ProcessGroup | None) -> None:
        """The part of the state that neither a pickle nor a state dict holds."""
        self._ranks = shared_by(process_group)
        self._owners = Ownership()
        self._layout_checked = False
        self._loading: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def _params(self) -> Iterator[tuple[Group, Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    def _averages(self, group: Group) -> Iterable[tuple[str, float]]:
        return () if group["norm"] == "adamw" else self.averages(group).items()

    def _buffers(self, group: Group, params: list[Tensor]) -> Buffers:
        return {name: [local(self.state[p][name]) for p in params] for name in self._buffer_names(group)}

    def _buffer_names(self, group: Group) -> list[str]:
        return ["momentum_buffer", "exp_avg_sq"] if group["norm"] == "adamw" else list(self.averages(group))

    def _fresh_scalars(self, group: Group) -> dict[str, Any]:
        """`steps` counts the gradients taken; `pending` says that the pending update moves the parameter; the weights are W."""
        return {"steps": 0, "pending": False, **{f"{name}_weight": 0.0 for name, _ in self._averages(group)}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for a value that an option does not allow, and for a parameter that is already here."""
        updates = self.param_groups[0]["updates"] if self.param_groups else 0
        if not isinstance(param_group["params"], Tensor | set):  # torch refuses a set
            param_group["params"] = list(param_group["params"])
        self._check_unique(param_group["params"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["norm"] == "adamw":
                for name, value in self._adamw.items():
                    group.setdefault(name, value)
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise
        # `pending`: lr, radius, weight decay (and betas) of the pending update. A scheduler may change the group before then.
        group["pending"], group["updates"] = (), updates
        self._assign_owners(group)
        for p in group["params"]:
            self.state[p] = self._fresh_scalars(group)
            if self._owns(p):
                self.state[p] |= {name: self._new_buffer(p) for name in self._buffer_names(group)}

    def _check_unique(self, params: Any) -> None:
        seen = {p for _, p in self._params()}
        for p in [params] if isinstance(params, Tensor) else params:
            p = p[1] if isinstance(p, tuple) else p  # (name, parameter)
            if isinstance(p, Tensor) and p in seen:
                raise ValueError(f"params must name every parameter once, got one of shape {tuple(p.shape)} twice")
            if isinstance(p, Tensor):
                seen.add(p)

    def _check_group(self, group: Group) -> None:
        adamw = {"betas": PAIR, "eps": NON_NEGATIVE} if group["norm"] == "adamw" else {}
        for name, rule in (self.option_rules() | adamw).items():
            if not rule.allows(group[name]):
                raise ValueError(f"{name} must be {rule.allowed}, got {group[name]!r}")
        get_norm("rms", torch.Size(()), group["scale"], group["polar"])
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"params must be real floating-point tensors, got one of dtype {p.dtype}")
            _norm(group, p)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_owners"):  # unpickled or copied: process groups do not travel
            self._set_up(None)
            for group in self.param_groups:
                self._assign_owners(group)
        if self._loading:
            self._take_loaded()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with this rank's buffers. If this rank keeps some rows of a buffer, the state has a DTensor of them
        in the same memory, so that torch.distributed.checkpoint can join the rows. Does not communicate.
        """
        state = super().state_dict()
        for i, (group, p) in enumerate(self._params()):
            if self._ranks is None or isinstance(p, DTensor) or not self._owns(p) or self._owners.owner(p) is not None:
                continue
            mesh = DeviceMesh.from_group(self._ranks, p.device.type)
            as_rows = partial(DTensor.from_local, run_check=False, shape=p.shape, stride=p.stride())
            rows = {name: as_rows(self.state[p][name], mesh, [Shard(0)]) for name in self._buffer_names(group)}
            state["state"][i] = {**state["state"][i], **rows}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but buffers keep their own dtype and storage, and take what this rank owns of a whole state.

        Options that a group lacks stay as they are. Raises ValueError if a buffer that this rank owns is missing or has another
        shape, as in the state_dict of one rank of several (see `full_state_dict`).
        """
        before: Any = LayerwiseOptimizer._before_loading
        handle = self.register_load_state_dict_pre_hook(before)  # after the user's hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = []

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Check what is to be loaded, and keep its tensors away from torch, which would cast them to the parameter's dtype."""
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return None  # torch's own message is better
        loading = []
        for i, (group, p) in zip((i for g in groups for i in g["params"]), self._params(), strict=True):
            saved = dict(state_dict["state"].get(i, {}))
            buffers = {name: self.state[p][name] for name in self._buffer_names(group)} if self._owns(p) else {}
            for name, own in buffers.items():
                value = saved.get(name)
                share = isinstance(value, DTensor) and not isinstance(own, DTensor)  # rows, as `state_dict` gives them
                if not isinstance(value, Tensor) or (share and local(value).shape != own.shape):
                    raise ValueError(
                        f"the state_dict has no {name} for a parameter of shape {tuple(p.shape)}: it is another "
                        "optimizer's, or one rank's share; save full_state_dict() or use torch.distributed.checkpoint"
                    )
                if value.shape != p.shape:
                    raise ValueError(
                        f"the state_dict has a {name} of shape {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}"
                    )
            loading.append((saved, buffers))
        self._loading = loading
        # Options that a foreign or older group lacks keep their present values.
        filled = [
            {**{k: v for k, v in own.items() if k not in ("params", "pending", "param_names")}, "pending": (), **group}
            for own, group in zip(self.param_groups, groups, strict=True)
        ]
        return {**state_dict, "state": {}, "param_groups": filled}

    @torch.no_grad()
    def _take_loaded(self) -> None:
        """Copy the loaded state into the existing buffers."""
        for (group, p), (values, buffers) in zip(self._params(), self._loading, strict=True):
            scalars = self._fresh_scalars(group)
            if "steps" not in values:  # another optimizer's momentum counts as a full average
                scalars |= {"steps": 1, **{f"{name}_weight": 1.0 for name, _ in self._averages(group)}}
            others = {k: v for k, v in values.items() if k not in self._buffer_names(group)}
            self.state[p] = scalars | others | buffers
            for name, buffer in buffers.items():
                self._copy_buffer(p, buffer, values[name])

    def full_state_dict(self) -> dict[str, Any]:
        """The `state_dict` of the whole model, on every rank. A collective of the ranks that share the parameters."""
        full = self.state_dict()
        for i, (group, p) in enumerate(self._params()):
            whole = {name: self._whole_buffer(p, self.state[p].get(name)) for name in self._buffer_names(group)}
            full["state"][i] = {**full["state"][i], **whole}
        return full

    def _whole_buffer(self, p: Tensor, own: Tensor | None) -> Tensor:
        if isinstance(own, DTensor):
            return own.full_tensor()
        if self._ranks is None:
            assert own is not None
            return own
        whole = torch.zeros_like(p, dtype=buffer_dtype(p), memory_format=torch.contiguous_format, requires_grad=False)
        if own is not None:
            self._own_part(p, whole).copy_(own)
        dist.all_reduce(whole, group=self._ranks)
        return whole

    # ---- who owns what ----------------------------------------------------------------------------------------------

    def _split(self, group: Group) -> Iterator[list[Tensor]]:
        alone = all(self._ranks_of(group, p) is None for p in group["params"])
        return split(group["params"], lambda p: _norm(group, p), alone)

    def _ranks_of(self, group: Group, p: Tensor) -> dist.ProcessGroup | None:
        """The ranks that share the work of p's direction; None if this rank needs no other."""
        if not isinstance(p, DTensor):
            return self._ranks
        if _by_entries(group, p):
            return None
        along = sharded_along(p)
        return None if along is None else p.device_mesh.get_group(along[0])

    def _assign_owners(self, group: Group) -> None:
        for params in self._split(group):
            ranks = self._ranks_of(group, params[0])
            if ranks is not None:
                self._owners.assign(params, ranks, by_rows=all(_by_entries(group, p) for p in params))

    def _rows(self, p: Tensor) -> tuple[int, int]:
        """The rows of a replicated parameter whose momentum this rank keeps."""
        assert self._ranks is not None
        return self._owners.rows(p, self._ranks.rank(), self._ranks.size())

    def _owns(self, p: Tensor) -> bool:
        """Whether this rank keeps (some of) the momentum of p."""
        if isinstance(p, DTensor) or self._ranks is None:
            return True
        if p.numel() == 0:
            return False
        first, end = self._rows(p)
        return end > first

    def _own_part(self, p: Tensor, whole: Tensor) -> Tensor:
        """The local part of a tensor shaped like p that this rank owns."""
        if isinstance(p, DTensor):
            return local(whole)
        if self._ranks is None or not p.ndim:
            return whole
        first, end = self._rows(p)
        return whole[first:end]

    def _new_buffer(self, p: Tensor) -> Tensor:
        part = p if isinstance(p, DTensor) else self._own_part(p, p)
        return torch.zeros_like(part, dtype=buffer_dtype(p), requires_grad=False)

    def _copy_buffer(self, p: Tensor, buffer: Tensor, value: Tensor) -> None:
        """Copy a saved buffer into this one. Each may be whole, sharded or a slice."""
        if isinstance(buffer, DTensor):
            if not isinstance(value, DTensor):
                value = distribute_tensor(value.to(buffer.device), buffer.device_mesh, buffer.placements)
        elif isinstance(value, DTensor):
            value = local(value)
        else:
            value = self._own_part(p, value)
        buffer.copy_(value)

    def _gradient(self, p: Tensor) -> Tensor:
        """This rank's part of the gradient in the buffers' dtype; None counts as zero."""
        gradient = p.grad
        if gradient is None:
            return torch.zeros_like(local(self.state[p]["momentum_buffer"]))
        if gradient.is_sparse:
            raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
        if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
            gradient = gradient.redistribute(placements=p.placements)  # tensor-parallel code may leave a partial sum
        return self._own_part(p, gradient).to(buffer_dtype(p))

    def _check_layout(self) -> None:
        """Check once that the ranks hold the same parameters. If they did not, they would wait for each other forever."""
        if self._layout_checked or self._ranks is None:
            return
        shapes = [(tuple(p.shape), str(p.dtype)) for _, p in self._params() if not isinstance(p, DTensor)]
        if not shapes:
            return
        layouts: list[object] = [None] * self._ranks.size()
        dist.all_gather_object(layouts, shapes, group=self._ranks)
        if any(layout != shapes for layout in layouts):
            raise RuntimeError(
                "the ranks of process_group hold different parameters; pass the group of the ranks that hold the same ones"
            )
        self._layout_checked = True


def _norm(group: Group, p: Tensor) -> Norm | None:
    """The norm of a parameter; None for AdamW."""
    if group["norm"] == "adamw":
        return None
    return get_norm(group["norm"], p.shape, group["scale"], group["polar"], group.get("ns_steps"))


def _by_entries(group: Group, p: Tensor) -> bool:
    """Whether each entry of the direction depends on the same entry of the momentum alone."""
    norm = _norm(group, p)
    return norm is None or isinstance(norm, Sign)
