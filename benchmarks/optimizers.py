"""One optimizer step on the matrices of a GPT: our optimizers and torch's Muon in turns, and the matrix products alone.

    python -m benchmarks.optimizers                    small GPTs on a CPU; GPT-124M on CUDA

Every contestant starts a step with its own copy of the same gradients. The time inside closures is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Clock, goal, goals_table, in_rounds, main, milliseconds, ratio
from common.errors import one_line_errors
from common.tables import markdown
from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3
from optim.polar import has_bfloat16_units, work_dtype

# (layers, width)
SETS = {"tiny": (1, 32), "mini": (4, 64), "quickstart": (4, 128), "gpt-6x384": (6, 384), "gpt-124m": (12, 768)}
PRODUCTS = "the products alone"
CONTESTANTS = {"Gluon": Gluon, "MVR-1": GluonMVR1, "MVR-2": GluonMVR2, "MVR-3": GluonMVR3, "torch.optim.Muon": torch.optim.Muon}


def matrices(layers: int, width: int) -> list[torch.Size]:
    """The shapes of the hidden matrices of a GPT of this size."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=1, n_layer=layers, n_head=1, d_model=width, seq_len=1))
    return [p.shape for p in model.blocks.parameters()]


class Entry:
    """A contestant on its own copy of the tensors."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        self._params = [torch.nn.Parameter(w.clone()) for w in weights]
        self._gradients = gradients
        self._optimizer = make(self._params, lr=1e-4)
        self._clock = Clock(weights[0].device)

    def _closure(self) -> Tensor:
        with self._clock.inside():
            for p, g in zip(self._params, self._gradients, strict=True):
                p.grad = g.clone()
        return torch.zeros(())

    def seconds(self) -> float:
        return self._clock.time(lambda: self._optimizer.step(self._closure))[0]


class Products:
    """The products of five iterations on stacks of matrices of one shape up to transposition, into reused buffers."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._clock = Clock(weights[0].device)
        stacks = Counter(tuple(sorted(w.shape)) for w in weights)
        self._buffers = []
        for (m, k), n in stacks.items():
            x = torch.randn(n, m, k, device=weights[0].device)
            x = (x / torch.linalg.matrix_norm(x)[:, None, None]).to(work_dtype(x, "polar_express"))
            self._buffers.append((x, x.new_empty(n, m, m), x.new_empty(n, m, m), torch.empty_like(x)))
        self.flops = sum(5 * n * (4 * m * m * k + 2 * m**3) for (m, k), n in stacks.items())

    def _run(self) -> None:
        for x, gram, square, out in self._buffers:
            for _ in range(5):
                torch.bmm(x, x.mT, out=gram)
                torch.bmm(gram, gram, out=square)
                torch.bmm(square, x, out=out)

    def seconds(self) -> float:
        return self._clock.time(self._run)[0]


def run_set(name: str, device: torch.device, rounds: int, budget: float) -> tuple[str, dict[str, Any]]:
    """Every contestant on one set of matrices."""
    layers, width = SETS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = matrices(layers, width)
    weights = [torch.randn(s, generator=generator).mul_(0.02).to(device) for s in shapes]
    gradients = [torch.randn(s, generator=generator).mul_(0.01).to(device) for s in shapes]
    products = Products(weights)
    racers = {label: Entry(make, weights, gradients).seconds for label, make in CONTESTANTS.items()}
    racers[PRODUCTS] = products.seconds
    for racer in racers.values():
        for _ in range(2):
            racer()
    seconds = in_rounds(racers, rounds, budget)
    rows = [["", "ms, median", "quartiles", "× Gluon", "× products"]]
    for label, values in seconds.items():
        over = [f"{ratio(values, seconds[reference]):.3g}" for reference in ("Gluon", PRODUCTS)]
        rows.append([label, *milliseconds(values), *over])
    muon = ratio(seconds["Gluon"], seconds["torch.optim.Muon"])
    goals = []
    if name == "gpt-6x384":
        units = has_bfloat16_units(device)
        goals.append(goal(f"Gluon / torch.optim.Muon, {'with' if units else 'no'} bfloat16 units", muon, 1 if units else 0.2))
    if name == "gpt-124m" and device.type == "cuda":
        goals.append(goal("Gluon on the 72 matrices, ms", float(milliseconds(seconds["Gluon"])[0]), 4))
    text = (
        f"{len(shapes)} matrices of {layers} layers of d = {width}, {len(seconds['Gluon'])} rounds. The products are "
        f"{products.flops / 1e9:.4g} GFLOP, "
        f"{products.flops / min(seconds[PRODUCTS]) / 1e9:.4g} GFLOP/s at best.\n\n{markdown(rows)}\n{goals_table(goals)}"
    )
    return text, {"flops": products.flops, "seconds": seconds}


INTRO = """\
# An optimizer step on the matrices of a GPT

Written by `python -m benchmarks.optimizers`. {machine}

All contestants get copies of the same weights and gradients and take turns in every round. × is the
median of the rounds' ratios. Polar factors take five iterations. torch's Muon multiplies in bfloat16
on every device, ours only on a device with units for it. Time inside closures does not count. "The
products alone" are the matrix products of the five iterations, written into fixed buffers.
"""

if __name__ == "__main__":
    with one_line_errors("benchmarks.optimizers"):
        sets = {name: partial(run_set, name) for name in SETS}
        main(None, "optimizers", sets, {"cpu": "quickstart,gpt-6x384", "cuda": "gpt-124m"}, INTRO)
