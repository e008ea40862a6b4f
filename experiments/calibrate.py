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
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from common.errors import Parser, UserError, one_line_errors, positive
from common.files import write_text
from common.machine import cpu_name
from experiments.comparison import RESULTS, Arm
from experiments.figures import FIGURES, SMALL, Folders, config_of, plan
from experiments.setup import build
from experiments.sweep import Place, evaluation
from training.config import Config


def gradient_seconds(config: Config, repeats: int) -> float:
    """Seconds of a gradient of a batch."""
    model, _ = build(config)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.seq_len + 1))
    times = []
    for _ in range(repeats):
        model.zero_grad()
        start = time.process_time()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        times.append(time.process_time() - start)
    return statistics.median(times[2:])


def update_seconds(arms: Iterable[Arm], repeats: int) -> dict[str, float]:
    """Seconds of each arm's update, which do not depend on the batch."""
    made_with = {arm.key: build(config_of(arm, 1)) for arm in arms}
    for _, optimizer in made_with.values():
        if hasattr(optimizer, "train"):  # the mode of a schedule-free optimizer
            optimizer.train()
    model, _ = next(iter(made_with.values()))
    made = [torch.randn_like(parameter) for parameter in model.parameters()]
    steps: dict[str, list[float]] = {key: [] for key in made_with}
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
    return {key: statistics.median(values[2:]) for key, values in steps.items()}


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
    comparisons = [plan(number, scale, 1, None, Folders(), {}) for scale in SMALL for number in FIGURES]
    comparisons += evaluation(Place())
    arms = {arm.key: arm for comparison in comparisons for arm in comparison.arms}
    batches = {config.batch_size: config for config in (config_of(c.baseline, 1) for c in comparisons)}
    found = {
        "cpu": cpu_name(), "torch": torch.__version__, "python": platform.python_version(), "threads": 1,
        "gradient": {str(batch): gradient_seconds(batches[batch], arguments.repeats) for batch in sorted(batches)},
        "update": update_seconds(arms.values(), arguments.repeats),
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    write_text(arguments.out, text + "\n")
    print(text)


if __name__ == "__main__":
    with one_line_errors("experiments.calibrate"):
        main(sys.argv[1:])
