"""The whole training step (forward, backward, optimizer) of Gluon, its MVR variants and torch's AdamW, in turns.

    python benchmarks/training_step.py

Every contestant trains its own copy of the same model on the same tokens; the time within the closure is the gradient's, the
rest of the step the optimizer's. All ratios are medians of the rounds' ratios.
"""

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import (
    RESULTS,
    Clock,
    describe,
    goals_table,
    in_rounds,
    machine,
    milliseconds,
    ratio,
    spread,
    table,
    write,
)
from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3

# The model, sequences of a step, and the most rounds.
SETS = {
    "tiny": (GPTConfig(257, 1, 1, 32, 16), 2, 3),
    "quickstart": (GPTConfig(257, 4, 2, 128, 256), 8, 40),
    "gpt-6x384": (GPTConfig(257, 6, 6, 384, 512), 2, 12),
    "gpt-124m": (GPTConfig(), 16, 12),
}
OURS = {"Gluon": Gluon, "MVR-1": GluonMVR1, "MVR-2": GluonMVR2, "MVR-3": GluonMVR3}


class Entry:
    """One optimizer on its own copy of the model."""

    def __init__(self, name: str, model: GPT, tokens: Tensor) -> None:
        self.model, self.tokens = copy.deepcopy(model), tokens
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda)
        if name == "AdamW":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            groups = [
                {"params": list(self.model.blocks.parameters()), "norm": "spectral", "radius": 20.0},
                {"params": [self.model.embedding.weight], "norm": "sign", "radius": 100.0},
            ]
            self.optimizer = OURS[name](groups, lr=1e-3)
        self.clock = Clock(tokens.device)

    def _closure(self) -> Tensor:
        with self.clock.paused():
            with self.autocast:
                loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
            loss.backward()
        return loss

    def seconds(self) -> tuple[float, float]:
        """(the optimizer's seconds, the gradients')."""
        self.optimizer.zero_grad()
        return self.clock.time(lambda: self.optimizer.step(self._closure))


def run_set(name: str, device: torch.device, rounds: int, budget: float) -> dict[str, Any]:
    config, batch, most = SETS[name]
    torch.manual_seed(0)
    model = GPT(config).to(device)
    tokens = torch.randint(config.vocab_size, (batch, config.seq_len + 1), device=device)
    entries = {n: Entry(n, model, tokens) for n in (*OURS, "AdamW")}
    for entry in entries.values():
        for _ in range(2):
            entry.seconds()
    times = in_rounds({n: e.seconds for n, e in entries.items()}, min(rounds, most), budget)
    found = {}
    reference = times["Gluon"]
    for n, pairs in times.items():
        whole, own = [a + b for a, b in pairs], [a for a, _ in pairs]
        found[n] = {
            "step": spread(whole), "optimizer": spread(own), "gradients": spread([b for _, b in pairs]),
            "over_gluon": ratio(whole, [a + b for a, b in reference]),
            "optimizer_over_gluon": ratio(own, [a for a, _ in reference]), "seconds": pairs,
        }  # fmt: skip
    goals = [
        {"goal": f"{n}'s whole step / Gluon's", "measured": found[n]["over_gluon"], "sign": "≤", "bound": 2.05}
        for n in ("MVR-2", "MVR-3")
    ]
    measured = found["MVR-1"]["optimizer_over_gluon"]
    goals.append({"goal": "MVR-1's optimizer step / Gluon's", "measured": measured, "sign": "≤", "bound": 1.05})
    return {
        "model": vars(config), "tokens": batch * config.seq_len, "rounds": len(reference), "contestants": found, "goals": goals,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def set_page(name: str, result: dict[str, Any]) -> str:
    rows = []
    for n, found in result["contestants"].items():
        parts = [f"{found[k]['median'] * 1e3:.4g}" for k in ("gradients", "optimizer")]
        rows.append(
            [n, *milliseconds(found["step"]), f"{found['over_gluon']:.3g}", *parts, f"{found['optimizer_over_gluon']:.3g}"]
        )
    head = ["", "step, ms, median", "quartiles", "× Gluon", "gradients, ms", "optimizer, ms", "optimizer × Gluon"]
    m = result["model"]
    return (
        f"## {name}: {m['n_layer']} layers of d = {m['d_model']}, {result['parameters'] / 1e6:.3g}M parameters\n\n"
        f"{result['tokens']} tokens a step, sequences of {m['seq_len']}, {m['vocab_size']} outputs; "
        f"{result['rounds']} rounds.\n\n"
        f"{table(head, rows)}\n\n{goals_table(result['goals'])}\n"
    )


INTRO = """\
# The whole training step

Written by `python benchmarks/training_step.py`. {machine}

Copies of the same model on the same tokens take turns in every round; × is the median of the rounds' ratios. The time within
the closures is the gradients', the rest of the step the optimizer's.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sets", default="", help="comma-separated: " + ", ".join(SETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1000, help="at most so many")
    parser.add_argument("--budget", type=float, default=120, help="seconds of rounds per set, three rounds at least")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="", help="of the page; default: training_step_cpu or training_step_cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does the script run?")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    names = args.sets.split(",") if args.sets else ["quickstart", "gpt-124m" if device.type == "cuda" else "gpt-6x384"]
    if args.quick:
        names = ["tiny"]
    if unknown := set(names) - SETS.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    host = machine(device)
    results = {}
    for name in names:
        print(name, flush=True)
        results[name] = run_set(name, device, args.rounds, args.budget)
    host["load_at_end"] = round(os.getloadavg()[0], 2)
    page = "\n".join([INTRO.format(machine=describe(host)), *(set_page(n, r) for n, r in results.items())])
    path = write(args.out, args.name or f"training_step_{device.type}", page, {"machine": host, "sets": results})
    print(page)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
