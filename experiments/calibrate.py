"""Measure the seconds of a gradient of the byte model, and of each optimizer's update, on one thread.

    OMP_NUM_THREADS=1 python -m experiments.calibrate        writes results/figures/calibration.json

The numbers are medians of processor time, because other work on a shared machine disturbs the clock. `update` is the time of
`step` without its gradients: momentum, correction, polar factors, the weights.
"""

import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.errors import Parser, UserError, one_line_errors, positive
from common.files import write_text
from common.machine import cpu_name
from experiments.comparison import RESULTS, Arm
from experiments.figures import FIGURES, SMALL, Folders, config_of, plan
from experiments.setup import build
from experiments.sweep import Place, evaluation


def calibrate(batch: int, arms: tuple[Arm, ...], repeats: int) -> dict[str, Any]:
    """Seconds of a gradient of `batch` sequences, and of each arm's update."""
    base = config_of(arms[0], 1)
    model, _ = build(base)
    tokens = torch.randint(base.vocab_size, (batch, base.seq_len + 1))
    times = []
    for _ in range(repeats):
        model.zero_grad()
        start = time.process_time()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        times.append(time.process_time() - start)
    made = [parameter.grad.clone() for parameter in model.parameters()]
    made_with = {arm.key: build(config_of(arm, 1)) for arm in arms}
    for _, optimizer in made_with.values():
        if hasattr(optimizer, "train"):  # the mode of a schedule-free optimizer
            optimizer.train()
    steps: dict[str, list[float]] = {arm.key: [] for arm in arms}
    inside = 0.0

    def closure(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        nonlocal inside
        start = time.process_time()
        for parameter, gradient in zip(parameters, made, strict=True):
            parameter.grad = gradient.clone()
        inside += time.process_time() - start
        return torch.zeros(())

    for _ in range(repeats):  # in turn, so that other work on the machine slows all arms alike
        for key, (trained, optimizer) in made_with.items():
            inside, start = 0.0, time.process_time()
            optimizer.step(partial(closure, list(trained.parameters())))
            steps[key].append(time.process_time() - start - inside)
    update = {key: statistics.median(values[2:]) for key, values in steps.items()}
    return {"gradient": statistics.median(times[2:]), "update": update}


def main(argv: list[str]) -> None:
    """Measure and write."""
    parser = Parser(prog="experiments.calibrate", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=positive, default=40, help="measurements of each time, 3 or more [40]")
    parser.add_argument("--out", type=Path, default=RESULTS / "figures" / "calibration.json")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 3:
        raise UserError(f"--repeats {arguments.repeats} must be at least 3: the first two do not count")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    arms: dict[int, dict[str, Arm]] = {}
    comparisons = [plan(number, scale, 1, None, Folders(), {}) for scale in SMALL for number in FIGURES]
    for comparison in [*comparisons, *evaluation(Place())]:
        for arm in comparison.arms:
            arms.setdefault(comparison.baseline.options["batch_size"], {})[arm.key] = arm
    batches = {str(batch): calibrate(batch, tuple(some.values()), arguments.repeats) for batch, some in arms.items()}
    found = {"cpu": cpu_name(), "torch": torch.__version__, "python": platform.python_version(), "threads": 1}
    write_text(arguments.out, json.dumps({**found, "batches": batches}, indent=1) + "\n")
    print(json.dumps(batches, indent=1))


if __name__ == "__main__":
    with one_line_errors("experiments.calibrate"):
        main(sys.argv[1:])
