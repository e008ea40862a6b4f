"""Is this a record? Prints the row of docs/records.md for the runs of one setting, one seed each.

    python -m experiments.record runs/mine_seed* --target 3.28

That page states the rule. Every run counts, with its last validation: the setting and the length were chosen beforehand.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import Parser, UserError, one_line_errors
from common.tables import markdown
from experiments.statistics import student_cdf
from training.curves import curve, read_config, read_metrics

LEAST_SEEDS = 3
MOST_CHANCE = 0.01
# Options that may differ between the runs of one setting: where files are, and what does not change the computation.
_FREE = {
    "run_name", "results_dir", "overwrite", "resume", "seed", "data_dir", "micro_batch_size", "log_every", "checkpoint_every",
    "keep_checkpoints", "keep_every", "rank_timeout", "wandb", "wandb_project", "tensorboard",
}  # fmt: skip


def chance(losses: Sequence[float], target: float) -> float:
    """The p-value of a one-sided t test that the mean is below the target. 1 if a loss is not finite."""
    if not all(map(math.isfinite, losses)):
        return 1.0
    mean, spread = statistics.fmean(losses), statistics.stdev(losses)
    if spread == 0:
        return 0.0 if mean < target else 1.0
    return 1 - student_cdf((target - mean) / spread * math.sqrt(len(losses)), len(losses) - 1)


def row(folders: Sequence[Path], target: float) -> tuple[list[str], bool]:
    """The cells of the table's row, and whether the rule is met. Raises UserError for runs that do not belong together."""
    configs = [read_config(folder) for folder in folders]
    last = [_last(folder) for folder in folders]
    for folder, config, point in zip(folders, configs, last, strict=True):
        if not config:
            raise UserError(f"{folder} has no config.json; give the folders of runs")
        for key in sorted(set(config) | set(configs[0])):
            if key not in _FREE and config.get(key) != configs[0].get(key):
                raise UserError(f"{folder} and {folders[0]} differ in {key}; a record has one setting")
        if point["update"] != config.get("steps"):
            raise UserError(f"{folder} ends at update {point['update']} of {config.get('steps')}; only finished runs count")
    if len({config["seed"] for config in configs}) < len(configs):
        raise UserError("two runs have the same seed; a record needs one run per seed")
    if len(folders) < LEAST_SEEDS:
        raise UserError(f"a record needs at least {LEAST_SEEDS} seeds, not {len(folders)}")
    losses = [point["val_loss"] for point in last]
    p = chance(losses, target)
    cells = [str(configs[0]["optimizer"]), f"{last[0]['update']:,}", f"{last[0]['passes']:,}"]
    cells += [f"{statistics.fmean(point['seconds'] for point in last):,.0f} ({_machine(folders[0])})"]
    level = (
        f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}" if all(map(math.isfinite, losses)) else "diverged"
    )
    cells += [level, str(len(losses)), f"{p:.2g}"]
    return cells, p < MOST_CHANCE


def _last(folder: Path) -> dict[str, Any]:
    points = curve(read_metrics(folder))
    if not points:
        raise UserError(f"{folder} has no validation loss yet")
    return points[-1]


def _machine(folder: Path) -> str:
    try:
        launch = json.loads((folder / "environment.json").read_text())[-1]
        return f"{launch['ranks']} × {launch['device']}"
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return "unknown machine"


HEADS = ["optimizer", "updates", "gradients", "seconds", "validation loss ± σ", "seeds", "p"]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m experiments.record", description="Print a record's row for the runs of one setting.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folders of all runs of the setting")
    parser.add_argument("--target", type=float, default=3.28, help="the validation loss to beat")
    options = parser.parse_args(arguments)
    if not math.isfinite(options.target):
        raise UserError(f"--target must be a finite number, not {options.target}")
    cells, valid = row(options.runs, options.target)
    print(markdown([HEADS, cells]), end="")
    print(
        f"{'valid' if valid else 'no record'}: p {'<' if valid else '>='} {MOST_CHANCE} that the mean is below {options.target}"
    )


if __name__ == "__main__":
    with one_line_errors("record"):
        main()
