"""The full training step (forward, backward, optimizer): ours, and the plain loops of `benchmarks/plain.py`, in turns.

    python -m benchmarks.training_step

Every contestant trains its own model of the same size on the same tokens.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Clock, goal, goals_table, in_rounds, main, milliseconds, ratio
from benchmarks.plain import PlainLoop
from common.errors import one_line_errors
from common.tables import markdown
from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, PreviousBatchMVR, SingleBatchMVR
from optim.polar import has_bfloat16_units

# The model, and the sequences of a step.
SETS = {
    "tiny": (GPTConfig(257, 1, 1, 32, 16), 2),
    "quickstart": (GPTConfig(257, 4, 2, 128, 256), 8),
    "gpt-6x384": (GPTConfig(50304, 6, 6, 384, 512), 4),
    "gpt-124m": (GPTConfig(), 16),
}
OURS = {
    "Gluon": Gluon, "SingleBatchMVR": SingleBatchMVR, "MVR-1": GluonMVR1, "MVR-2": GluonMVR2, "MVR-3": GluonMVR3,
    "PreviousBatchMVR": PreviousBatchMVR,
}  # fmt: skip
# Label, bfloat16, Muon.
PLAIN = [
    ("plain loop, AdamW, float32", False, False),
    ("plain loop, AdamW, bfloat16", True, False),
    ("plain loop, torch.optim.Muon, bfloat16", True, True),
]


class Ours:
    """One of our optimizers on a model of its own."""

    def __init__(self, name: str, config: GPTConfig, tokens: Tensor) -> None:
        torch.manual_seed(0)
        self._model, self._tokens = GPT(config).to(tokens.device), tokens
        self._autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=has_bfloat16_units(tokens.device))
        groups = [
            {"params": list(self._model.blocks.parameters()), "norm": "spectral", "radius": 20.0},
            {"params": [self._model.embedding.weight], "norm": "sign", "radius": 100.0},
        ]
        self._optimizer = OURS[name](groups, lr=1e-3)
        self._clock = Clock(tokens.device)

    def _closure(self) -> Tensor:
        with self._clock.inside():
            with self._autocast:
                loss = self._model(self._tokens[:, :-1], self._tokens[:, 1:])
            loss.backward()
        return loss

    def seconds(self) -> tuple[float, float]:
        """(the optimizer's seconds, the gradients')."""
        return self._clock.time(lambda: self._optimizer.step(self._closure))


class Plain:
    """A plain loop under the clock."""

    def __init__(self, config: GPTConfig, tokens: Tensor, bfloat16: bool, muon: bool) -> None:
        self._loop, self._clock = PlainLoop(config, tokens, bfloat16, muon), Clock(tokens.device)

    def _step(self) -> None:
        with self._clock.inside():
            self._loop.gradients()
        self._loop.step()

    def seconds(self) -> tuple[float, float]:
        """(the optimizers' seconds, the gradients')."""
        return self._clock.time(self._step)


def run_set(name: str, device: torch.device, rounds: int, budget: float) -> tuple[str, dict[str, Any]]:
    config, batch = SETS[name]
    tokens = torch.randint(config.vocab_size, (batch, config.seq_len + 1), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    racers = {label: Ours(label, config, tokens).seconds for label in OURS}
    racers |= {label: Plain(config, tokens, bfloat16, muon).seconds for label, bfloat16, muon in PLAIN}
    for racer in racers.values():
        for _ in range(2):
            racer()
    seconds = in_rounds(racers, rounds, budget)
    whole = {label: [a + b for a, b in pairs] for label, pairs in seconds.items()}
    fastest = "plain loop, AdamW, bfloat16"
    rows = [["", "step, ms, median", "quartiles", "× Gluon", "× plain AdamW in bfloat16", "gradients, ms", "optimizer, ms"]]
    for label, pairs in seconds.items():
        over = [f"{ratio(whole[label], whole[reference]):.3g}" for reference in ("Gluon", fastest)]
        parts = [milliseconds([pair[i] for pair in pairs])[0] for i in (1, 0)]
        rows.append([label, *milliseconds(whole[label]), *over, *parts])
    goals = [
        goal(f"{label}'s step / Gluon's", ratio(whole[label], whole["Gluon"]), 2.05)
        for label in ("MVR-1", "MVR-2", "MVR-3", "PreviousBatchMVR")
    ]
    bounds = {"quickstart": 1.05, "gpt-6x384": 1.25}
    if name in bounds:
        goals.append(
            goal("Gluon's step / the plain bfloat16 loop's with AdamW", ratio(whole["Gluon"], whole[fastest]), bounds[name])
        )
    text = (
        f"{config.n_layer} layers of d = {config.d_model}, {config.vocab_size} outputs, {batch} sequences of {config.seq_len} "
        f"tokens, {len(whole['Gluon'])} rounds.\n\n{markdown(rows)}\n{goals_table(goals)}"
    )
    return text, {"model": vars(config), "sequences": batch, "seconds": seconds}


INTRO = """\
# A training step

Written by `python -m benchmarks.training_step`. {machine}

Models of one size on the same tokens take turns in every round. × is the median of the rounds' ratios.
The plain loops are in `benchmarks/plain.py` and follow nanoGPT. Their model has LayerNorm, GELU and
learned positions instead of RMS norms, squared ReLU and rotary positions. Ours run in bfloat16
autocast on a device with units for it.
"""

if __name__ == "__main__":
    with one_line_errors("benchmarks.training_step"):
        sets = {name: partial(run_set, name) for name in SETS}
        main(None, "training_step", sets, {"cpu": "quickstart,gpt-6x384", "cuda": "gpt-124m"}, INTRO)
