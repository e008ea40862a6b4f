"""Gluon: momentum and a linear minimisation oracle per layer (Riabinin, Shulgin, Gruntkowska, Richtárik, "Gluon: Making
Muon & Scion Great Again!", arXiv 2505.13416). Muon, Scion, normalised SGD and sign momentum are its special cases."""

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from optim.norms import Norm, Spectral, get_norm
from optim.polar import work_dtype
from optim.sharding import Alone, Ownership, Replicated, Sharded, local, sharded_along

Closure = Callable[[], Any]

# A bucket holds at most so many elements (one parameter at least), so that a bucket can travel while another is computed
# and what the step holds beside the momentum stays small.
BUCKET_ELEMENTS = 2**25
# On a CPU where nothing travels: what fits its caches, and what malloc gives again instead of fresh pages.
CPU_BUCKET_ELEMENTS = 2**18


class Gluon(Optimizer):
    r"""Gluon with weight decay, for each layer i with its own norm:

        M_k     = β M_{k-1} + (1-β) g_k                      M_0 = g_0, the first gradient taken whole
        X_{k+1} = (1 - lr·weight_decay) X_k + lr·radius · LMO_i(M_k)

    `weight_decay` 0 is unconstrained Gluon, 1 is constrained Scion; the spectral norm with any value is Muon with decoupled
    decay. A parameter whose `.grad` is None keeps its weights, momentum and everything else.

    Arguments:
        params: parameters or groups; every option below but `process_group` can differ between groups.
        lr: the step size t before the radius, ≥ 0.
        momentum: β in [0, 1), the weight of the past.
        weight_decay: ≥ 0.
        norm: spectral, sign, colnorm, rownorm, frobenius, rms, auto (by shape), or adamw: AdamW in the same optimizer, with
            `betas`, `eps` and lr·radius as its learning rate.
        radius: of the ball, > 0.
        scale: the spectral norm's dimension factor: scion, muon, moonlight, none (see `optim.norms.spectral_factor`).
        polar: the polar factor: polar_express, newton_schulz, svd.
        process_group: the ranks that hold the same parameters and gradients and share the work: each matrix has one owner,
            which keeps its momentum. Default: the default group where torch.distributed is initialised. DTensor parameters
            (FSDP2) are shared over their own mesh instead.

    `step` leaves no gradient behind: `.grad` is None after it. Momentum is float32, or float64 for float64 parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        norm: str = "spectral",
        radius: float = 1.0,
        *,
        scale: str = "scion",
        polar: str = "polar_express",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        process_group: dist.ProcessGroup | None = None,
        **options: float | None,
    ) -> None:
        known = {name for cls in type(self).__mro__ if issubclass(cls, Gluon) for name in inspect.signature(cls).parameters}
        if unknown := options.keys() - known:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "norm": norm, "radius": radius,
            "scale": scale, "polar": polar, "betas": betas, "eps": eps, **options,
        }  # fmt: skip
        self._set_up(process_group)
        super().__init__(params, defaults)

    _starts_whole = True  # M_0 = g_0

    # ---- the step, and what a variant changes of it -------------------------------------------------------------------

    def step(self, closure: Closure | None = None, previous: Closure | None = None) -> Any:
        """Update the weights with the gradients in place, or with those that `closure` leaves.

        `closure` evaluates the whole batch, calls backward() and returns the loss; it zeroes, clips and unscales nothing.
        `previous` belongs to the variants that evaluate twice and is not called here. Returns the closure's loss.
        """
        loss = self._evaluate(closure) if closure is not None else None
        self._fold_gradients()
        self._apply_update()
        self._drop_gradients()
        return loss

    def flush(self) -> None:
        """Apply an update that is still pending (MVR-2, at the end of a run); does nothing elsewhere."""

    def _fold(self, group: dict[str, Any], states: list[dict[str, Any]], gradients: list[Tensor]) -> None:
        """M ← β M + (1-β) g, for parameters that have had a gradient before."""
        average([local(s["momentum_buffer"]) for s in states], gradients, group["momentum"], 1 - group["momentum"])

    def _start(self, state: dict[str, Any], gradient: Tensor) -> None:
        """M_0 = g_0."""
        local(state["momentum_buffer"]).copy_(gradient)

    def _takes_part(self, p: Tensor) -> bool:
        """Whether this step moves the parameter."""
        return p.grad is not None

    def _lmo_input(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What the LMO is taken of; local to this rank."""
        return local(self.state[p]["momentum_buffer"])

    def _buffer_names(self, group: dict[str, Any]) -> list[str]:
        return ["momentum_buffer", "exp_avg_sq"] if group["norm"] == "adamw" else ["momentum_buffer"]

    # ---- state ------------------------------------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Updates applied so far: the index of the weights that the model now holds."""
        return self.param_groups[0]["updates"]

    def _set_up(self, process_group: dist.ProcessGroup | None) -> None:
        self._ranks = _with_others(process_group)
        self._owners = Ownership()
        self._layout_checked = False
        self._ignore_zero_grad = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        updates = self.param_groups[0]["updates"] if self.param_groups else 0
        if not isinstance(param_group["params"], Tensor | set):  # torch refuses a set
            param_group["params"] = list(param_group["params"])
        self._check_unique(param_group["params"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise
        group["updates"] = updates
        # What the pending update was made with, whatever a scheduler sets before it is applied.
        group["pending"] = False
        group["pending_lr"] = group["pending_weight_decay"] = group["pending_radius"] = 0.0
        group["pending_betas"] = group["betas"]
        self._assign_owners(group)
        for p in group["params"]:
            # `steps` counts the gradients taken; `pending` says that the pending update moves this parameter.
            self.state[p] = {"steps": 0, "pending": False}
            if self._owns(p):
                self.state[p] |= {name: _buffer_like(p) for name in self._buffer_names(group)}

    def _check_unique(self, params: Tensor | Iterable[Any]) -> None:
        seen = {p for group in self.param_groups for p in group["params"]}
        for p in [params] if isinstance(params, Tensor) else params:
            p = p[1] if isinstance(p, tuple) else p  # (name, parameter)
            if isinstance(p, Tensor) and p in seen:
                raise ValueError(f"params must name every parameter once, got one of shape {tuple(p.shape)} twice")
            seen.add(p)

    def _check_group(self, group: dict[str, Any]) -> None:
        def require(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {group[name]!r}")

        def within(name: str, low: float, high: float = math.inf) -> bool:
            return is_number(group[name]) and low <= float(group[name]) < high

        require("lr", within("lr", 0), "a finite number ≥ 0")
        require("momentum", within("momentum", 0, 1), "a number in [0, 1)")
        require("weight_decay", within("weight_decay", 0), "a finite number ≥ 0")
        require("radius", within("radius", 0) and group["radius"] > 0, "a finite number > 0")
        require("eps", within("eps", 0), "a finite number ≥ 0")
        betas = group["betas"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        require("betas", pair and all(is_number(b) and 0 <= float(b) < 1 for b in betas), "two numbers in [0, 1)")
        get_norm("rms", torch.Size(()), group["scale"], group["polar"])
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"params must be real floating-point tensors, got one of dtype {p.dtype}")
            _norm(group, p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_owners"):  # unpickled or copied: process groups do not travel
            self._set_up(None)
            for group in self.param_groups:
                self._assign_owners(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but buffers keep their own dtype and storage, and take what this rank owns of a whole state.

        Raises ValueError where a buffer that this rank owns is missing, as in the state_dict of one rank of several (see
        `full_state_dict`).
        """
        mine = {
            p: {name: self.state[p][name] for name in self._buffer_names(group) if self._owns(p)}
            for group in self.param_groups
            for p in group["params"]
        }
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved = dict(zip(mine, (state_dict["state"].get(i, {}) for i in names), strict=False))
        if len(names) == len(mine):  # else torch's own message is the better one
            for p, buffers in mine.items():
                for name in buffers:
                    if name not in saved[p]:
                        raise ValueError(
                            f"the state_dict has no {name} for a parameter of shape {tuple(p.shape)}: it is another "
                            "optimizer's, or one rank's share; save full_state_dict() or use torch.distributed.checkpoint"
                        )
        super().load_state_dict(state_dict)
        for p, buffers in mine.items():
            kept = {name: value for name, value in self.state[p].items() if not isinstance(value, Tensor)}
            for name, buffer in buffers.items():
                _copy_buffer(buffer, saved[p][name])
            self.state[p] = kept | buffers

    def full_state_dict(self) -> dict[str, Any]:
        """The `state_dict` of the whole model, on every rank. A collective of the ranks that share the parameters."""
        full = self.state_dict()
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in enumerate(params):
            full["state"][i] = dict(full["state"][i])
            for name in self._buffer_names(group):
                buffer = self.state[p].get(name)
                if isinstance(p, DTensor):
                    buffer = buffer.full_tensor()
                elif self._ranks is not None:
                    buffer = _buffer_like(p) if buffer is None else buffer.clone()
                    dist.broadcast(buffer, dist.get_global_rank(self._ranks, self._owners[p]), group=self._ranks)
                full["state"][i][name] = buffer
        return full

    # ---- the parts of a step ----------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; ignored inside a pass that adds to the gradient of an earlier one."""
        if not self._ignore_zero_grad:
            super().zero_grad(set_to_none)

    def _evaluate(self, closure: Closure) -> Any:
        with torch.enable_grad():
            return closure()

    @torch.no_grad()
    def _fold_gradients(self) -> None:
        """Fold the gradients into the momenta that this rank owns; the update that they make is then pending."""
        for group in self.param_groups:
            states, gradients = [], []
            for p in group["params"]:
                state = self.state[p]
                state["pending"] = self._takes_part(p)
                state["steps"] += state["pending"]
                if not state["pending"] or not self._owns(p):
                    continue
                gradient = gradient_of(p, state["momentum_buffer"])
                if group["norm"] == "adamw":
                    _fold_adamw(state, gradient, group["betas"])
                elif state["steps"] == 1 and self._starts_whole:
                    self._start(state, gradient)
                else:
                    states.append(state)
                    gradients.append(gradient)
            if states:
                self._fold(group, states, gradients)
            group["pending"] = True
            for name in ("lr", "weight_decay", "radius"):
                group[f"pending_{name}"] = float(group[name])
            group["pending_betas"] = group["betas"]

    @torch.no_grad()
    def _apply_update(self) -> None:
        """Apply the pending update; while a bucket's directions travel, the next one's are computed."""
        if not self._has_pending():
            return
        travelling: deque[Bucket] = deque()
        for bucket in self._directions():
            travelling.append(bucket)
            if len(travelling) > 1:
                travelling.popleft().move_weights()
        while travelling:
            travelling.popleft().move_weights()
        self._count_update()

    def _directions(self) -> Iterator["Bucket"]:
        """The buckets of the pending update, each with its directions under way."""
        self._check_layout()
        gathering = None
        for bucket in self._buckets():
            bucket.gather()
            if gathering is not None:
                gathering.send_directions()
                yield gathering
            gathering = bucket
        if gathering is not None:
            gathering.send_directions()
            yield gathering

    def _count_update(self) -> None:
        for group in self.param_groups:
            group["pending"] = False
            group["updates"] += 1
            for p in group["params"]:
                self.state[p]["pending"] = False

    def _has_pending(self) -> bool:
        return any(group["pending"] for group in self.param_groups)

    def _drop_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    # ---- who does what ----------------------------------------------------------------------------------------------

    def _ranks_of(self, p: Tensor, group: dict[str, Any]) -> dist.ProcessGroup | None:
        """The ranks that need each other for the LMO of p; None where this rank has all that it needs."""
        if not isinstance(p, DTensor):
            return self._ranks
        if group["norm"] in ("sign", "adamw"):  # entry by entry
            return None
        along = sharded_along(p)
        return None if along is None else p.device_mesh.get_group(along[0])

    def _assign_owners(self, group: dict[str, Any]) -> None:
        matrices = group["norm"] in ("spectral", "auto")
        self._owners.assign(group["params"], matrices, lambda p: self._ranks_of(p, group))

    def _owns(self, p: Tensor) -> bool:
        """Whether this rank keeps (its piece of) the momentum of p."""
        return isinstance(p, DTensor) or self._ranks is None or self._owners[p] == self._ranks.rank()

    def _buckets(self) -> Iterator["Bucket"]:
        """The pending updates; matrices of one shape up to transposition go into one batched call, all into few messages."""
        for group in self.param_groups:
            if not group["pending"]:
                continue
            buckets: dict[object, list[Tensor]] = {}
            for p in group["params"]:
                shape = None
                if isinstance(_norm(group, p), Spectral):
                    shape = tuple(sorted((p.shape[0], math.prod(p.shape[1:]))))
                place = (p.device_mesh, p.placements) if isinstance(p, DTensor) else p.device
                buckets.setdefault((shape, p.dtype, place), []).append(p)
            for params in buckets.values():
                small = params[0].device.type == "cpu" and self._ranks_of(params[0], group) is None
                for part in _parts(params, CPU_BUCKET_ELEMENTS if small else BUCKET_ELEMENTS):
                    yield Bucket(self, group, part)

    def _check_layout(self) -> None:
        """Once: ranks that share the work must hold the same parameters, or they would wait for each other forever."""
        if self._layout_checked or self._ranks is None:
            return
        shapes = [(tuple(p.shape), str(p.dtype)) for g in self.param_groups for p in g["params"]
                  if not isinstance(p, DTensor)]  # fmt: skip
        if not shapes:
            return
        layouts: list[object] = [None] * self._ranks.size()
        dist.all_gather_object(layouts, shapes, group=self._ranks)
        if any(layout != shapes for layout in layouts):
            raise RuntimeError(
                "the ranks of process_group hold different parameters; pass the group of the ranks that hold the same ones"
            )
        self._layout_checked = True


class Bucket:
    """Parameters of one group whose directions are computed together and travel together."""

    def __init__(self, optimizer: Gluon, group: dict[str, Any], params: list[Tensor]) -> None:
        self._optimizer, self._group = optimizer, group
        self._params = sorted(params, key=optimizer._owners.__getitem__)
        self._norm = _norm(group, params[0])
        self._exchange = self._find_exchange()
        self._stream: torch.cuda.Stream | None = None

    def _find_exchange(self) -> Alone:
        p = self._params[0]
        ranks = self._optimizer._ranks_of(p, self._group)
        if ranks is None:
            return Alone()
        owners = [self._optimizer._owners[p] for p in self._params]
        # Directions travel in the dtype that they are computed in.
        dtype = _buffer_dtype(p)
        if isinstance(self._norm, Spectral):
            dtype = work_dtype(local(p).new_empty(0, dtype=dtype), self._norm.polar)
        return (Sharded if isinstance(p, DTensor) else Replicated)(self._params, owners, ranks, dtype)

    def gather(self) -> None:
        """Start to bring the momenta to their owners."""
        self._exchange.gather(self._lmo_inputs)

    def _lmo_inputs(self) -> list[Tensor | None]:
        optimizer, group = self._optimizer, self._group
        sharded = isinstance(self._exchange, Sharded)  # then even what stays is sent, since its owner may see a gradient
        inputs: list[Tensor | None] = []
        for p in self._params:
            state = optimizer.state[p]
            if not optimizer._owns(p) or not (sharded or state["pending"]):
                inputs.append(None)
            elif self._norm is None:
                inputs.append(_adamw_direction(state, group))
            else:
                inputs.append(optimizer._lmo_input(p, group))
        return inputs

    def send_directions(self) -> None:
        """Compute the directions of the members that this rank owns, and start to send them."""
        states = [self._optimizer.state[p] for p in self._params]
        members = [m if s["pending"] else None for m, s in zip(self._exchange.whole(), states, strict=True)]
        if self._norm is not None:
            _replace_by_directions(members, self._norm, [s.get("momentum_buffer") for s in states])
        self._exchange.spread(members)
        self._stream = _current_stream(self._params[0].device)

    def receive(self) -> tuple[list[Tensor | None], Tensor | None]:
        """Wait for the directions (the current stream does, on CUDA)."""
        stream = _current_stream(self._params[0].device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
        directions, flags = self._exchange.receive()
        if stream != self._stream:
            for direction in directions:
                if direction is not None:
                    direction.record_stream(stream)  # or its memory could be taken while this stream still reads it
        return directions, flags

    def move_weights(self) -> None:
        """Move the weights by the directions."""
        group = self._group
        step = group["pending_lr"] * group["pending_radius"]
        decay = group["pending_lr"] * group["pending_weight_decay"]
        directions, flags = self.receive()
        keep: list[Any] = [1 - decay] * len(directions)
        if flags is not None and decay:
            keep = list((1 - decay * flags.to(_buffer_dtype(self._params[0]))).unbind())
        alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for p, direction, kept in zip(self._params, directions, keep, strict=True):
            if direction is None:
                continue
            weights = local(p)
            if decay:
                weights.mul_(kept)
            targets, moves = alike.setdefault(self._norm.factor(p.shape) if self._norm else 1.0, ([], []))
            targets.append(weights)
            moves.append(direction.reshape(weights.shape))
        for factor, (targets, moves) in alike.items():
            torch._foreach_add_(targets, moves, alpha=-step * factor)


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: memory that is freed on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """What runs in here waits for what came before it, and not the other way round: on CUDA a stream of its own."""
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _with_others(ranks: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that share replicated parameters (default: all of them); None for one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ranks = ranks or dist.group.WORLD
    return ranks if ranks.size() > 1 else None


def is_number(value: object) -> bool:
    """A real number, or a tensor of one; True and False are none."""
    return (isinstance(value, Real) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


def average(momenta: list[Tensor], gradients: list[Tensor], beta: float, weight: float) -> None:
    """M ← β M + weight·g for every pair, in place."""
    if weight == 1 - beta:
        torch._foreach_lerp_(momenta, gradients, weight)
    else:
        torch._foreach_mul_(momenta, beta)
        torch._foreach_add_(momenta, gradients, alpha=weight)


def _parts(params: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The parameters in runs of at most `limit` elements, or of one parameter."""
    part: list[Tensor] = []
    for p in params:
        if part and sum(q.numel() for q in part) + p.numel() > limit:
            yield part
            part = []
        part.append(p)
    yield part


def _replace_by_directions(members: list[Tensor | None], norm: Norm, buffers: list[Tensor | None]) -> None:
    """Replace each LMO input of the list by its direction; matrices of one shape up to transposition in one call.

    An input that is no momentum buffer itself is overwritten or freed, so that it costs nothing at the peak.
    """
    present = [i for i, m in enumerate(members) if m is not None]
    if not present:
        return
    if not isinstance(norm, Spectral):
        for i in present:
            m = members[i]
            buffer = None if buffers[i] is None else local(buffers[i])
            ours = buffer is None or m.data_ptr() != buffer.data_ptr()
            members[i] = norm.direction(m.flatten(1) if m.ndim > 2 else m, overwrite=ours)
        return
    matrices = [members[i].flatten(1) for i in present]
    tall = [m.size(0) > m.size(1) for m in matrices]
    wide = [m.mT if t else m for m, t in zip(matrices, tall, strict=True)]
    stack = torch.empty((len(wide), *wide[0].shape), dtype=work_dtype(wide[0], norm.polar), device=wide[0].device)
    torch._foreach_copy_(list(stack.unbind()), wide)
    for i in present:
        members[i] = None
    del matrices, wide
    for i, t, direction in zip(present, tall, norm.direction(stack, overwrite=True).unbind(), strict=True):
        members[i] = direction.mT if t else direction


def _norm(group: dict[str, Any], p: Tensor) -> Norm | None:
    if group["norm"] == "adamw":
        return None
    return get_norm(group["norm"], p.shape, group["scale"], group["polar"], group.get("ns_steps"))


def _buffer_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _buffer_like(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=_buffer_dtype(p), requires_grad=False)


@torch.no_grad()
def _copy_buffer(buffer: Tensor, value: Tensor) -> None:
    """Copy a saved buffer into this one, whether either is whole or sharded."""
    if isinstance(buffer, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(buffer.device), buffer.device_mesh, buffer.placements)
    buffer.copy_(value)


def gradient_of(p: Tensor, buffer: Tensor) -> Tensor:
    """This rank's gradient in the buffer's dtype; None counts as zero."""
    if p.grad is None:
        return torch.zeros_like(local(buffer))
    if p.grad.is_sparse:
        raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
    gradient = p.grad
    if isinstance(p, DTensor) and gradient.placements != p.placements:  # tensor-parallel code may leave a partial sum
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient).to(buffer.dtype)


def _fold_adamw(state: dict[str, Any], gradient: Tensor, betas: tuple[float, float]) -> None:
    local(state["momentum_buffer"]).lerp_(gradient, 1 - betas[0])
    local(state["exp_avg_sq"]).mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


def _adamw_direction(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """m̂ / (√v̂ + eps), bias-corrected (Loshchilov, Hutter, arXiv 1711.05101)."""
    correction1, correction2 = (1 - beta ** state["steps"] for beta in group["pending_betas"])
    denominator = local(state["exp_avg_sq"]).sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
    return torch.div(local(state["momentum_buffer"]), denominator, out=denominator).div_(correction1)
