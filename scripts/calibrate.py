"""Measure, on one thread, what a gradient of the byte model costs and what each optimizer's update costs beside it.

    OMP_NUM_THREADS=1 python scripts/calibrate.py        writes results/mini/calibration.json

Medians of processor time, which other work on the machine disturbs less than it does the clock on the wall.
`update` is the time of `step` without its gradients: momentum, correction, polar factors, the weights.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from model import GPT, GPTConfig
from scripts.run_jobs import ROOT
from scripts.sweep import CONFIG, METHODS_AT, TITLES, options_of
from train_gpt import build_optimizer
from training.config import load_config


def calibrate(batch: int, methods: tuple[str, ...], repeats: int) -> dict:
    """Seconds of a gradient and of each method's update."""
    torch.manual_seed(0)
    base = load_config(["--config", str(ROOT / CONFIG), f"--batch-size={batch}"])
    model = GPT(GPTConfig(base.vocab_size, base.n_layer, base.n_head, base.d_model, base.seq_len))
    tokens = torch.randint(base.vocab_size, (batch, base.seq_len + 1))
    times = []
    for _ in range(repeats):
        model.zero_grad()
        start = time.process_time()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        times.append(time.process_time() - start)
    made = [parameter.grad.clone() for parameter in model.parameters()]
    models = {method: copy.deepcopy(model) for method in methods}
    optimizers = {method: _optimizer(method, models[method]) for method in methods}
    steps: dict[str, list[float]] = {method: [] for method in methods}
    inside = 0.0

    def closure(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        nonlocal inside
        start = time.process_time()
        for parameter, gradient in zip(parameters, made, strict=True):
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        inside += time.process_time() - start
        return torch.zeros(())

    for method in methods:
        models[method].zero_grad()
    for _ in range(repeats):  # in turn, so that what else the machine does falls on all alike
        for method in methods:
            parameters = list(models[method].parameters())
            inside, start = 0.0, time.process_time()
            optimizers[method].step(partial(closure, parameters))
            steps[method].append(time.process_time() - start - inside)
    update = {method: statistics.median(values[2:]) for method, values in steps.items()}
    return {"gradient": statistics.median(times[2:]), "update": update}


def _optimizer(method: str, model: GPT) -> torch.optim.Optimizer:
    words = [f"--{name}={value}" for name, value in options_of(method).items()]
    words += ["--inner=0.5"] if method == "nested" else []
    return build_optimizer(model, load_config(["--config", str(ROOT / CONFIG), *words]))


def main(argv: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mini" / "calibration.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    batches = {str(batch): calibrate(batch, tuple(TITLES), arguments.repeats) for batch in METHODS_AT}
    found = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "batches": batches}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
