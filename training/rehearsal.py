"""Tries an optimizer that is not ours on a small model before the run: how its step is meant, and whether it can resume.

The trial takes steps on a model of the same layers and parameter names, whose loss is a plain quadratic: its gradients are
exact and the same on every rank and device. It leaves the random state as it was.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError, say
from model import GPT, GPTConfig
from optim.base import LayerwiseOptimizer
from training.config import Config
from training.driver import Driver, Manner, NoPass, random_state, set_random_state, validating
from training.optimizers import build_optimizer, in_words, optimizer_class, refusal, takes_closure, why_not
from training.packing import from_bytes, leaves, to_bytes
from training.ranks import Ranks

_STEPS, _MANY, _SAVED_AT, _EARLY = 7, 40, 3, 2  # a trial's steps, its checkpoint, and when it shows in which manner it steps
_PLAIN = Manner(gradient_first=True, closure=False)


def drive(optimizer: Optimizer, model: nn.Module, config: Config, ranks: Ranks) -> Any:
    """Ours as it is. Another one in a `Driver`, if a trial on a small model shows that it trains. A collective.

    Raises UserError for a class that does not train, and for one that can't resume, unless the run has no checkpoints.
    """
    if isinstance(optimizer, LayerwiseOptimizer):
        return optimizer
    dtype = next(model.parameters()).dtype
    manner, weights, state = ranks.on_all(_rehearse, config, ranks.device, dtype)
    if len(set(ranks.gather(weights))) > 1:
        raise refusal(config, "equal gradients give other weights on each rank", everywhere=True)
    unsaved = next((why for why in ranks.gather(manner.unsaved) if why), "")
    if unsaved and config.checkpoint_every:
        raise refusal(
            config,
            f"a run could not resume, because {unsaved}; --checkpoint-every 0 trains without checkpoints",
            everywhere=True,
        )
    if unsaved and config.on_nan == "skip" and manner.moves_first:
        raise refusal(config, f"--on-nan skip can't take a step back, because {unsaved}", everywhere=True)
    if unsaved and ranks.first:
        say(f"optimizer = {config.optimizer}: this run writes no checkpoints, because {unsaved}")
    manner = replace(manner, unsaved=unsaved, per_rank=len(set(ranks.gather(state))) > 1)
    return Driver(optimizer, model, ranks, manner, skips=config.on_nan == "skip")


def _rehearse(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Manner, str, str]:
    """How the config's optimizer takes a step, and digests of the weights and of the state that it leaves."""
    unit = 2 * config.n_head
    width = min(config.d_model, unit * math.ceil(64 / unit))
    full = GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len)
    small = GPTConfig(min(config.vocab_size, 256), config.n_layer, config.n_head, width, min(config.seq_len, 64))
    with _random_state_kept(device):
        try:
            return _find_out(config, small, device, dtype)
        except UserError:
            raise
        except Exception as error:
            if small == full:
                raise refusal(config, why_not(error)) from None
        try:  # some can't take matrices so small
            return _find_out(config, full, device, dtype)
        except UserError:
            raise
        except Exception as error:
            raise refusal(config, why_not(error)) from None


def _find_out(config: Config, sizes: GPTConfig, device: torch.device, dtype: torch.dtype) -> tuple[Manner, str, str]:
    def trial(manner: Manner, steps: int = _STEPS) -> "_Trial":
        return _Trial(config, sizes, device, dtype, manner).run(steps)

    tried = _with_closure(trial) if takes_closure(optimizer_class(config.optimizer)) else trial(_PLAIN)
    if tried.unmoved():  # some gather gradients before they move
        tried = trial(tried.driver.manner, _MANY)
    if nothing := tried.unmoved():
        raise refusal(config, f"{_MANY} steps on a small model changed no weight of {nothing}")
    manner = replace(tried.driver.manner, moves_first=tried.moves_first, infinite=tried.infinite())
    return replace(manner, unsaved=_unsaved(trial, tried)), tried.digest(), tried.state_digest()


def _with_closure(trial: Callable[..., "_Trial"]) -> "_Trial":
    """The trial of a class whose step takes a closure, in the manner that the class means."""
    try:
        alone = trial(Manner())
    except NoPass:  # it ignores the closure
        return trial(_PLAIN)
    except Exception:
        for manner in (Manner(gradient_first=True), _PLAIN):  # SAM, say, needs a gradient before its step
            with suppress(Exception):
                return trial(manner)
        raise
    if alone.has_hooks():  # it works while the gradient is computed, so another gradient is another step
        return alone
    # A class that looks at the gradient before it calls the closure needs one there. For the others it makes no difference.
    try:
        other = trial(Manner(gradient_first=True), _EARLY)
    except Exception:
        return alone
    if other.early == alone.early or trial(Manner(), _EARLY).early != alone.early:  # (or it never does the same twice)
        return alone
    return trial(Manner(gradient_first=True))


def _unsaved(trial: Callable[..., "_Trial"], whole: "_Trial") -> str:
    """Why a run that resumes would not go on as if it had never stopped; empty if it does."""
    if isinstance(whole.saved, Exception):
        return f"its state can't be saved ({in_words(whole.saved)})"
    try:
        resumed = whole.resumed()
    except Exception as error:
        return f"it can't load its own state ({in_words(error)})"
    if resumed.digest() == whole.digest() or trial(whole.driver.manner, whole.steps).digest() != whole.digest():
        return ""  # (what never does the same twice can't do so after a resume)
    return "part of its state is not in its state_dict()"


class _Trial:
    """A small model, its optimizer, and a loss whose gradients are exact."""

    def __init__(self, config: Config, sizes: GPTConfig, device: torch.device, dtype: torch.dtype, manner: Manner) -> None:
        self._how = config, sizes, device, dtype, manner
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed)
        self.model = GPT(sizes).to(device, dtype)
        self.driver = Driver(build_optimizer(self.model, config), self.model, Ranks(0, 1, device), manner)
        self._params = list(self.model.parameters())
        self._start = self._at_step = self._weights()
        generator = torch.Generator().manual_seed(1)
        self._targets = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in self._params]
        self.steps = 0
        self.moves_first, self.early = False, ""
        self.saved: Any = None  # the weights and the state in the middle, or why they can't be saved

    def run(self, steps: int) -> "_Trial":
        """Take steps up to this one."""
        while self.steps < steps:
            self._at_step = self._weights()
            self.driver.step(self._closure)
            self.steps += 1
            if self.steps == _EARLY:
                with validating(self.driver):
                    pass
                self.early = self.digest()
            if self.steps == _SAVED_AT:
                self._save()
        return self

    def resumed(self) -> "_Trial":
        """Another one, which goes on from the middle of this one."""
        other = _Trial(*self._how)
        state, weights = from_bytes(self.saved)
        other.model.load_state_dict(weights)
        other.driver.load(state, lr_was_scheduled=False)
        other.steps = _SAVED_AT
        return other.run(self.steps)

    def unmoved(self) -> str:
        """A parameter of a group that has an lr above 0 and did not move; empty if every group did."""
        moved = {p: not torch.equal(p, start) for p, start in zip(self._params, self._start, strict=True)}
        names = {p: name for name, p in self.model.named_parameters()}
        for group in self.driver.param_groups:
            if float(group.get("lr", 1)) > 0 and group["params"] and not any(moved[p] for p in group["params"]):
                return names[group["params"][0]]
        return ""

    def has_hooks(self) -> bool:
        """Whether the class works while the gradient is computed."""
        return any(getattr(p, "_post_accumulate_grad_hooks", None) or p._backward_hooks for p in self._params)

    def infinite(self) -> frozenset[str]:
        """The places in a parameter's state that hold infinite numbers, though all is well."""
        if not all(p.isfinite().all() for p in self._params):
            return frozenset()
        found = (leaf for state in self.driver.state.values() for leaf in leaves(state))
        return frozenset(place for place, value in found if value.isinf().any())

    def digest(self) -> str:
        """A hash of the weights."""
        return _hash(to_bytes([p.detach().to("cpu") for p in self._params]))

    def state_digest(self) -> str:
        """A hash of the optimizer's state; empty if it can't be saved."""
        try:
            return _hash(to_bytes(self.driver.save()["optimizer"]))
        except Exception:
            return ""

    def _closure(self) -> Tensor:
        self.moves_first |= not all(map(torch.equal, self._params, self._at_step))
        total = torch.zeros((), device=self._params[0].device)
        scale = 1 + 0.5 * math.sin(self.steps)
        for p, target in zip(self._params, self._targets, strict=True):
            p.grad = None
            loss = (p - scale * target).square().sum() / math.sqrt(p.numel())
            loss.backward()
            total += loss.detach()
        return total

    def _weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._params]

    def _save(self) -> None:
        try:
            weights = {name: p.detach().to("cpu", copy=True) for name, p in self.model.state_dict().items()}
            self.saved = to_bytes((self.driver.save(), weights))
        except Exception as error:
            self.saved = error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)
