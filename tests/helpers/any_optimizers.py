"""Small optimizers that are not ours, one for each way in which such a class can surprise the trainer."""

import random
from collections import deque
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class Plain(Optimizer):
    """Gradient descent with a closure that is called under `no_grad`. Its step returns no loss."""

    def __init__(self, params: Any, lr: float = 0.05, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.move(group, p, self.state[p])

    def move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=float(group["lr"]))


class NoClosure(Plain):
    @torch.no_grad()
    def step(self):
        super().step(lambda: None)


class IgnoresClosure(Plain):
    """Its step has a closure that it does not call. It passes over parameters without a gradient, as torch's do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(group, p, self.state[p])


class Sam(Plain):
    """Climbs along the gradient that it finds, if there is one; evaluates there; descends from where it was."""

    @torch.no_grad()
    def step(self, closure=None):
        climbs = [(p, p.grad * 0.05) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, climb in climbs:
            p.add_(climb)
        closure()
        for p, climb in climbs:
            p.sub_(climb)
        super().step(lambda: None)


class NeedsGradient(Plain):
    """Fails without a gradient before the closure is called."""

    def step(self, closure=None):
        assert all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"])
        super().step(closure)


class StopsAsking(Plain):
    """Calls its closure in eleven steps, and then no more."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr, steps=0)

    def step(self, closure=None):
        self.param_groups[0]["steps"] += 1
        if self.param_groups[0]["steps"] < 12:
            super().step(closure)


class TwoGradients(Plain):
    """Calls the closure twice, and moves between. It has a momentum."""

    def step(self, closure=None):
        super().step(closure)
        super().step(closure)

    def move(self, group, p, state):
        p.sub_(state.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.5), alpha=group["lr"])


class SecondDerivatives(Plain):
    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            torch.autograd.grad([p.grad.sum() for p in group["params"]], group["params"])


class Averaged(Plain):
    """Trains at one place and is to be validated at another: the average of the places so far."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr, training=False, seen=0)

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def _swap(self, training: bool) -> None:
        assert any(self.state.values()) or training, "no eval() before the first step"
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "other" in self.state[p]:
                        other = self.state[p]["other"].clone()
                        self.state[p]["other"].copy_(p)
                        p.copy_(other)
            group["training"] = training

    def step(self, closure=None):
        assert self.param_groups[0]["training"], "call train() before step()"
        super().step(closure)
        for group in self.param_groups:
            group["seen"] += 1

    def move(self, group, p, state):
        super().move(group, p, state)
        state.setdefault("other", torch.zeros_like(p)).lerp_(p, 1 / (group["seen"] + 1))


class Scheme:
    """Code that can't be saved."""

    def __init__(self) -> None:
        self.lock = __import__("threading").Lock()

    def __deepcopy__(self, memo: dict) -> "Scheme":  # as torch's load_state_dict does
        return self

    def __call__(self, text: str) -> int:
        return len(text)


class Exotic(Plain):
    """State of many kinds: dtypes, small floats and integers, words, containers, numbers as keys, parameters as keys."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr, kept=torch.bfloat16, scale=torch.tensor(0.5), last=(1, {"a"}), shared={})
        for group in self.param_groups:
            group["norms"] = dict.fromkeys(group["params"], 0.0)
            group["scheme"] = Scheme()  # code is not saved; the new optimizer has it

    def move(self, group, p, state):
        small = state.setdefault("small", torch.zeros_like(p, dtype=torch.bfloat16))
        counts = state.setdefault("counts", {0: torch.zeros(p.shape, dtype=torch.int8), "late": deque(maxlen=3)})
        small.lerp_(p.grad.to(small.dtype), 0.5)
        counts[0] += (p.grad > 0).to(torch.int8)
        counts["late"].append(float(p.grad.norm()))
        assert counts["late"].maxlen == 3 and small.dtype == group["kept"] and counts[0].dtype == torch.int8
        group["norms"][p] += counts["late"][0]
        group["scale"].mul_(0.9)
        p.sub_(small * counts[0] + group["norms"][p] * 1e-3, alpha=float(group["lr"] * group["scale"]))
        assert group["scheme"]("ab") == 2 and group["last"] == (1, {"a"})
        assert state.setdefault("word", ("ij", ["jk"])) == ("ij", ["jk"]) and state.setdefault("twice", small) is small
        p.mul_(1 - 1e-3 * torch.rand((), generator=state.setdefault("draws", torch.Generator().manual_seed(3))))


class Codes(Tensor):
    """A subclass of Tensor with data of its own."""


class Scaled(Tensor):
    """Made of two plain tensors, as low-bit optimizers keep their state. It can't be cloned or detached."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, rest, size, stride):
        return cls(**parts)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class LowBit(Plain):
    def move(self, group, p, state):
        codes = state.setdefault("codes", torch.zeros_like(p).as_subclass(Codes))
        state["codes"] = (codes * 0.9 + p.grad).as_subclass(Codes)
        assert type(state["codes"]) is Codes
        momentum = 0.9 * state["scaled"].codes * state["scaled"].scale + p.grad if "scaled" in state else p.grad
        scale = momentum.abs().max() / 127
        state["scaled"] = Scaled((momentum / scale).to(torch.int8), scale)
        p.sub_(state["codes"].as_subclass(Tensor) + momentum, alpha=group["lr"])


class EditsWhatItLoads(Plain):
    """Its loading moves and casts the values of the dictionary that it is given."""

    def move(self, group, p, state):
        momentum = state.setdefault("momentum", torch.zeros_like(p, dtype=torch.bfloat16))
        assert momentum.dtype is torch.bfloat16
        momentum.mul_(0.9).add_(p.grad)
        p.sub_(momentum, alpha=group["lr"])

    def load_state_dict(self, state_dict):
        for own in state_dict["state"].values():
            own["momentum"] = own.pop("momentum").float()
        super().load_state_dict(state_dict)


class Kind(Enum):
    MEAN = 1


class Memory:
    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.kind = Kind.MEAN


class HasObjects(Plain):
    """An object of the optimizer's own package in the state."""

    def move(self, group, p, state):
        memory = state.setdefault("memory", Memory())
        assert memory.kind is Kind.MEAN
        memory.mean = p.grad.clone() if memory.mean is None else memory.mean.lerp(p.grad, 0.5)
        p.sub_(memory.mean, alpha=group["lr"])


class ChangesGroup(Plain):
    """Changes options that stand in its defaults, its own lr among them."""

    def __init__(self, params: Any, lr: float = 0.05, d: float = 1.0) -> None:
        super().__init__(params, lr, d=d)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["d"] *= 1.5
            group["lr"] = group["lr"] * 0.8

    def move(self, group, p, state):
        p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Hooked(Plain):
    """What `state_dict()` must hold is put there by a hook."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.steps = 0
        self.register_state_dict_post_hook(lambda optimizer, state: {**state, "steps": optimizer.steps})
        self.register_load_state_dict_pre_hook(lambda optimizer, state: setattr(optimizer, "steps", state["steps"]))

    def step(self, closure=None):
        self.steps += 1
        super().step(closure)

    def move(self, group, p, state):
        p.sub_(p.grad, alpha=group["lr"] / self.steps)


class Draws(Plain):
    """Draws random numbers, of torch's generators and Python's."""

    def move(self, group, p, state):
        p.sub_(p.grad + 0.1 * torch.randn_like(p) * random.random(), alpha=group["lr"])


class Counts(Plain):
    """Keeps numbers where `state_dict` does not look."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.steps, self.scale, self.random = 0, torch.ones(()), random.Random(1)

    def step(self, closure=None):
        self.steps += 1
        self.scale.mul_(0.9)
        super().step(closure)

    def move(self, group, p, state):
        p.sub_(p.grad, alpha=group["lr"] / self.steps * float(self.scale) * self.random.random())


class Hidden(Plain):
    """Counts its steps where nobody looks."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.steps = [0]

    def step(self, closure=None):
        self.steps[0] += 1
        super().step(closure)

    def move(self, group, p, state):
        p.sub_(p.grad, alpha=group["lr"] / self.steps[0])


class HoldsCode(Plain):
    """Its state holds what can't be saved as data."""

    def move(self, group, p, state):
        state["lock"] = __import__("threading").Lock()
        super().move(group, p, state)


class HoldsCodeLate(Plain):
    """As above, but from the twelfth step on, which no trial reaches."""

    def move(self, group, p, state):
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 12:
            state["lock"] = __import__("threading").Lock()
        super().move(group, p, state)


class StartsInfinite(Plain):
    def move(self, group, p, state):
        state["best"] = state.get("best", torch.full((2,), torch.inf))
        state["best"][0].clamp_(max=float(p.grad.norm()))
        super().move(group, p, state)


class MovesFirst(Plain):
    """Moves the weights before it asks for the gradient there."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1.001)
        super().step(closure)


class HiddenMovesFirst(Hidden, MovesFirst):
    pass


class Frozen(Plain):
    def move(self, group, p, state):
        pass


class HalfFrozen(Plain):
    """Trains what has `use_muon` alone."""

    def move(self, group, p, state):
        if group["use_muon"]:
            super().move(group, p, state)


class OneGroup(Plain):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        if len(self.param_groups) != 1:
            raise ValueError("OneGroup doesn't support per-parameter options (parameter groups)")


class NoLr(Plain):
    def __init__(self, params: Any) -> None:
        Optimizer.__init__(self, params, {"power": 0.05})

    def move(self, group, p, state):
        p.sub_(p.grad, alpha=group["power"])


class OfModel(Plain):
    def __init__(self, model: torch.nn.Module, total_steps: int, lr: float = 0.05) -> None:
        super().__init__(model.parameters(), lr)


class Wraps(Plain):
    def __init__(self, params: Any, base_optimizer: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)


class PerRank(Plain):
    """Each rank keeps a state of its own: the momentum of every other parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        closure()
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                move = torch.zeros_like(p)
                if i % size == rank:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    move = m.lerp_(p.grad, 0.5).clone()
                if size > 1:
                    dist.broadcast(move, i % size)
                p.sub_(move, alpha=group["lr"])


class RanksDiffer(Plain):
    def move(self, group, p, state):
        super().move(group, p, state)
        if dist.is_initialized():
            p.add_(dist.get_rank() * 1e-3)


class Patient(Plain):
    """Moves from the eleventh step on."""

    def move(self, group, p, state):
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] > 10:
            super().move(group, p, state)
