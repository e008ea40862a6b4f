"""How an optimizer that is not ours takes a step, what it remembers, and at which weights it wants to be validated."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from training.packing import Packer, equal
from training.ranks import Ranks


@dataclass(frozen=True)
class Manner:
    """What a trial on a small model has found out about a class (see `training/rehearsal.py`).

    `gradient_first`: the gradient is in `.grad` before its step begins. `closure`: its step gets a closure.
    `moves_first`: it moves the weights before its last pass. `infinite`: its values that may be infinite. `unsaved`: why a
    run can't resume. `per_rank`: each rank has a state of its own.
    """

    gradient_first: bool = False
    closure: bool = True
    moves_first: bool = False
    infinite: frozenset[str] = frozenset()
    unsaved: str = ""
    per_rank: bool = False


_NUMBERS = (bool, int, float, Tensor, random.Random)


class NotFiniteError(Exception):
    """Ends a pass whose loss or gradient is not finite. All ranks raise it."""


class NoPass(UserError):
    """A step of an optimizer that took no gradient."""


class Driver:
    """An optimizer that is not ours, with the face of ours: `step(closure)` takes passes and returns the loss.

    A closure of its step may be called more than once, and under `no_grad`. What else is asked of it goes to the optimizer.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, ranks: Ranks, manner: Manner, skips: bool = False) -> None:
        self.optimizer, self.manner = optimizer, manner
        self.ranks, self._goes_back = ranks, skips and manner.moves_first
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._packer = Packer(dict(model.named_parameters()), type(optimizer), ranks.device)
        self._built = self._packer.pack([_options(group) for group in optimizer.param_groups], "param_groups")
        self._numbers_built = self._numbers()
        self.has_modes = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
        self.trains = True  # and not: is validated
        self._began = False
        if self.has_modes:
            self.optimizer.train()  # type: ignore[attr-defined]

    @property
    def has_other_weights(self) -> bool:
        """Whether the weights to validate may differ from those to train. (Before the first step some have no `eval()`.)"""
        return self.has_modes and self._began

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Take a step. Returns the mean loss over the ranks at the weights that the model held before.

        (A class that applies its update within the next step, `deferred`, says the loss itself.) Raises UserError if the step
        takes no pass, and NotFiniteError with the weights and the state as they were.
        """
        losses: list[Tensor] = []

        def one_pass() -> Tensor:
            with torch.enable_grad():
                losses.append(self.ranks.mean(closure()))  # the same on all ranks, so that they decide the same
            return losses[-1].clone()

        self._began = True
        for p in self._params:
            p.grad = None
        before = ([p.detach().clone() for p in self._params], self.save()) if self._goes_back else None
        try:
            if self.manner.gradient_first:
                one_pass()
            step: Any = self.optimizer.step
            returned = step(one_pass) if self.manner.closure else step()
        except NotFiniteError:
            if before:
                with torch.no_grad():
                    torch._foreach_copy_(self._params, before[0])
                self.load(before[1], lr_was_scheduled=False)
            raise
        if not losses:
            raise NoPass(f"{type(self.optimizer).__name__}: its step took no gradient of the batch", everywhere=True)
        return returned if isinstance(returned, Tensor) and getattr(self, "deferred", False) else losses[0]

    def save(self) -> dict[str, Any]:
        """What a resume needs besides the weights, as data on the host. Raises TypeError for what is not data."""
        state = self._packer.pack(self.optimizer.state_dict(), "")
        numbers = {name: value for name, value in self._numbers().items() if not equal(value, self._numbers_built.get(name))}
        drawn = self._packer.pack(random_state(self.ranks.device), "")
        return {"optimizer": state, "built": self._built, "numbers": numbers, "random": drawn}

    def _numbers(self) -> dict[str, Any]:
        """What many classes leave out of `state_dict()`: numbers, and generators of numbers, that are attributes."""
        found = {name: value for name, value in vars(self.optimizer).items() if type(value) in _NUMBERS}
        return self._packer.pack(found, "")

    def load(self, saved: dict[str, Any], lr_was_scheduled: bool) -> None:
        """Take back what `save` gave.

        The groups keep the options that the user has changed since, and the lr that they were built with if the schedule
        had set it. Everything else in them comes from the checkpoint, because a class may change it.
        """
        optimizer, unpack = self.optimizer, self._packer.unpack
        fresh, built = optimizer.state_dict(), [_options(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(unpack(saved["optimizer"], fresh))
        state = unpack(saved["optimizer"], fresh)  # again, because a class may have changed the first
        if isinstance(state.get("state"), dict):
            for i, p in enumerate(self._params):
                own, theirs = optimizer.state.get(p), state["state"].get(i)
                if isinstance(own, dict) and isinstance(theirs, dict):  # torch casts state to the dtype of the weights
                    own.update({key: value for key, value in theirs.items() if key in own and _recast(own[key], value)})
        groups = state.get("param_groups")
        for i, (group, now, then) in enumerate(zip(optimizer.param_groups, self._built, saved["built"], strict=True)):
            if isinstance(groups, list) and len(groups) == len(built) and isinstance(groups[i], dict):
                group.update(_options(groups[i]))
            kept = {key for key in now.keys() & then.keys() if not equal(now[key], then[key])}
            if lr_was_scheduled:
                kept |= {"lr"} & now.keys()
            group.update({key: built[i][key] for key in kept})
        now, then = self._numbers(), self._numbers_built | saved.get("numbers", {})
        differing = {name: value for name, value in then.items() if not equal(value, now.get(name))}
        vars(optimizer).update(unpack(differing, None))
        self._began = True
        set_random_state(unpack(saved["random"], None), self.ranks.device)


@contextmanager
def validating(optimizer: Any) -> Iterator[None]:
    """Within, the model holds the weights to validate and to publish, for a class that has others while it trains."""
    if not (isinstance(optimizer, Driver) and optimizer.has_other_weights and optimizer.trains):
        yield
        return
    optimizer.trains = False
    optimizer.eval()
    yield
    optimizer.train()
    optimizer.trains = True


def can_resume(optimizer: Any) -> bool:
    """Whether a checkpoint can hold all that the optimizer needs."""
    return not (isinstance(optimizer, Driver) and optimizer.manner.unsaved)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that an optimizer may draw from."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if device.type != "cpu":
        state["device"] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if device.type != "cpu" and "device" in state:
        getattr(torch, device.type).set_rng_state(state["device"])


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _recast(own: Any, saved: Any) -> bool:
    """Whether torch's loading has changed a value: the dtype or the device of a tensor, or a word."""
    if isinstance(saved, str):
        return own != saved
    if isinstance(own, Tensor) and isinstance(saved, Tensor):
        return own.dtype != saved.dtype or own.device != saved.device
    if isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(own) == len(saved):
        return any(map(_recast, own, saved))
    if isinstance(own, dict) and isinstance(saved, dict):
        return any(_recast(own[key], saved[key]) for key in own.keys() & saved.keys())
    return False
