"""Shared by the tests of the optimizers: a table of variants, a small model, closures and comparisons."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import BY_NAME, MuonMVR

# Three different numbers, none the complement of another, so that mixing them up changes the weights.
BETA, GAMMA, Q = 0.8, 0.3, 0.4

CLASSES = {name: kind for name, kind in BY_NAME.items() if name != "muon_mvr"}
OPTIONS: dict[str, dict[str, float]] = {
    "gluon": {},
    "mvr1": {"gamma": GAMMA},
    "mvr2": {"q": Q},
    "mvr3": {"gamma": GAMMA, "q": Q},
    "single_batch": {"gamma": GAMMA},
    "previous_batch": {"gamma": GAMMA},
}
VARIANTS = {name: partial(cls, **OPTIONS[name]) for name, cls in CLASSES.items()}
NORMS = ["spectral", "sign", "colnorm", "rownorm", "frobenius", "rms", "auto", "adamw"]

ONE_PASS = ["gluon", "single_batch"]
DEFERRED = ["mvr1", "mvr2", "mvr3"]
TWO_PASSES = [*DEFERRED, "previous_batch"]
ALL = [*VARIANTS, "muon_mvr"]

variants = pytest.mark.parametrize("variant", VARIANTS)
all_classes = pytest.mark.parametrize("variant", ALL)
one_pass = pytest.mark.parametrize("variant", ONE_PASS)
deferred = pytest.mark.parametrize("variant", DEFERRED)
two_passes = pytest.mark.parametrize("variant", TWO_PASSES)


class Net(nn.Module):
    """Layers of every kind, float64, in the groups that `groups` makes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.conv = nn.Conv1d(1, 4, 3)
        self.gain = nn.Parameter(torch.ones(6))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2 + (p is self.gain))

    def forward(self, batch: Tensor) -> Tensor:
        x = self.embedding(batch) * self.gain
        x = x + self.second(torch.tanh(self.first(x)))
        y = self.conv(x.mean(1)[:, None]).mean((1, 2))
        return (x @ self.embedding.weight.T).flatten(0, 1).logsumexp(-1).mean() + y.square().mean() - x[:, :, 0].sin().mean()

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.first.weight, self.second.weight, self.conv.weight], "view": "convolution"},
            {"params": [self.embedding.weight], "norm": "sign", "radius": 2.0},
            {"params": [self.gain], "norm": "rms", "weight_decay": 0.1},
            {"params": [self.first.bias, self.second.bias, self.conv.bias], "norm": "adamw"},
        ]


def make(variant: str, net: Net, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of any class for this model."""
    options = {"lr": 0.02, "momentum": BETA} | options
    if variant == "muon_mvr":
        return MuonMVR(net.parameters(), is_approx=True, **options)
    return VARIANTS[variant](net.groups(), **options)


def batch(k: int) -> Tensor:
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(k))


def closure_of(net: nn.Module, k: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = net(batch(k))
        loss.backward()
        return loss

    return closure


class Script:
    """A closure whose n-th call leaves the gradients of the n-th row: one per parameter, or None."""

    def __init__(self, params: Iterable[Tensor], *rows: list[Tensor | None]) -> None:
        self.params, self.rows, self.calls = list(params), list(rows), 0

    def __call__(self) -> int:
        row = self.rows[self.calls]
        self.calls += 1
        terms = [(p * g).sum() for p, g in zip(self.params, row, strict=True) if g is not None]
        if terms:
            sum(terms).backward()
        return self.calls


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], schedule: Any = None) -> list[list[Tensor]]:
    """The weights after each step, and after a flush."""
    path = []
    for k in steps:
        optimizer.step(closure_of(net, k))
        if schedule is not None:
            schedule.step()
        path.append(weights(net))
    optimizer.flush()
    return [*path, weights(net)]


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_path(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The largest relative distance between corresponding tensors."""
    return max(float((x - y).detach().norm() / y.detach().norm()) for x, y in zip(a, b, strict=True))


def vector(*entries: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(entries, dtype=dtype)


def parameter(*entries: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(vector(*entries, dtype=dtype))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def momentum(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    return optimizer.state[p]["momentum_buffer"]


def rms_move(m: Tensor, lr: float) -> Tensor:
    """lr · LMO(m) in the rms norm."""
    return -lr * m / m.square().mean().sqrt()


# ---- MuonMVR, whose caller writes the loop ----------------------------------------------------------------------------------

MUON_OPTIONS: dict[str, Any] = {
    "lr": 0.05, "momentum": 0.9, "gamma": 0.3, "weight_decay": 0.1, "adamw_betas": (0.8, 0.95), "eps": 1e-6,
}  # fmt: skip


class MuonNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(4))
        self.double()

    def forward(self, x, y):
        return (self.second(torch.tanh(self.first(x))) * self.gain - y).square().mean()


def muon_batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(6, 5, dtype=torch.float64, generator=generator)
        yield x, torch.randn(6, 4, dtype=torch.float64, generator=generator) + x[:, :4].sin()


def make_muon(net, **options):
    return MuonMVR(net.parameters(), polar="svd", **MUON_OPTIONS | options)


def standard_loop(net, optimizer, data, in_place=False):
    """Loop 1 of its README (MVR-3) or, with is_approx=True, loop 4 (MVR-1): first the previous batch at the current weights."""
    path, previous = [], None
    for batch in data:
        if previous is not None:
            net(*previous).backward()
            optimizer.update_last_grad()
            optimizer.zero_grad(set_to_none=not in_place)
        net(*batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        previous = batch
        path.append(weights(net))
    return path
