"""Tune every method with the same budget: as many trials, as many updates, the same lrs, the same text and seed.

    python scripts/sweep.py                      # resumes; results/sweep/table.md, best.json, sweep.json
    python scripts/sweep.py --batch 2 --methods gluon mvr1
    python scripts/sweep.py --plan               # what it would run

The model is the byte model of configs/quickstart_gluon.py. For each method (Gluon, MVR-1, MVR-2, MVR-3, and the nested
form of MVR-2) a trial is one run of `--steps` updates at a constant lr on one tuning seed, which no evaluation uses; its
score is the final validation loss. First stage: three lrs, a factor of two apart, at β = 0.9, γ = 0.1, q = 0.5. Second: a
Latin hypercube of three draws around the first stage's best lr (within a factor √2) over lr, β and γ or q, the same draws
for all methods. Then two trials along β, which turned out to matter most, with the best often at the least tried: the best so
far with 1 - β doubled; and doubled again where that won, else 1 - β times √2. The best of the eight is the method's setting.
The budget is equal in updates; the methods with two gradients an update spend twice the gradients on it.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError, one_line_errors
from scripts.run_jobs import GOES_ON, ROOT, Job, final_loss, run_all
from scripts.statistics_of_runs import Trial, first_stage, gradient_evaluations, less_momentum, replace_section, second_stage

TITLES = {"gluon": "Gluon", "mvr1": "MVR-1", "mvr2": "MVR-2", "mvr3": "MVR-3", "nested": "nested MVR-2"}
LRS = (7e-4, 1.4e-3, 2.8e-3)
DRAWS = 3
TUNING_SEED = 1000
CONFIG = "configs/quickstart_gluon.py"
METHODS_AT = {8: tuple(TITLES), 2: ("gluon", "mvr1")}  # sequences a step: B = 512 and B = 128 of the paper


def options_of(method: str) -> dict[str, str]:
    """What makes a method, as an option of train_gpt.py."""
    return {"optimizer": "mvr2" if method == "nested" else method}


def job_of(folder: Path, method: str, batch: int, trial: Trial, steps: int) -> Job:
    """A trial's run. Only its start and its end are validated."""
    options = {
        **options_of(method), **trial.options(method), "batch_size": batch, "steps": steps, "seed": TUNING_SEED,
        "val_every": steps, "log_every": 10, "checkpoint_every": 0,
    }  # fmt: skip
    return Job(folder / f"b{batch}" / f"{method}_{_name(method, trial)}", CONFIG, options)


def _name(method: str, trial: Trial) -> str:
    return "_".join(f"{name[:5]}{value:g}" for name, value in trial.options(method).items())


def trials_of(folder: Path, method: str, batch: int, steps: int) -> list[list[Trial]]:
    """The stages whose trials are known so far: a stage needs the scores of those before it."""

    def best(trials: list[Trial]) -> Trial | None:
        scores = [final_loss(job_of(folder, method, batch, trial, steps)) for trial in trials]
        if any(map(math.isnan, scores)):
            return None
        if min(scores) == math.inf:
            raise UserError(f"every lr of the first stage diverged for {method}; lower LRS in scripts/sweep.py")
        return trials[scores.index(min(scores))]

    stages = [first_stage(LRS)]
    if first := best(stages[0]):
        stages.append(second_stage(first.lr, TUNING_SEED, DRAWS))
        if second := best([*stages[0], *stages[1]]):
            stages.append(less_momentum(second, 2))
            if third := best([*stages[0], *stages[1], *stages[2]]):
                stages.append(less_momentum(third, 2 if third == stages[2][0] else math.sqrt(2)))
    return stages


def report(folder: Path, batches: dict[int, int]) -> None:
    """Write sweep.json (every trial), best.json (every method's best) and table.md from what is done."""
    rows, best = [], {}
    for batch, steps in batches.items():
        for method in METHODS_AT[batch]:
            scored = []
            for stage, trials in enumerate(trials_of(folder, method, batch, steps), start=1):
                for trial in trials:
                    job = job_of(folder, method, batch, trial, steps)
                    if not math.isnan(loss := final_loss(job)):
                        scored.append((loss, stage, trial))
            if not scored:
                continue
            low = min(scored, key=lambda row: row[0])
            complete = len(scored) == len(LRS) + DRAWS + 2
            best.setdefault(f"b{batch}", {})[method] = {
                **low[2].options(method), "val_loss": low[0], "trials": len(scored), "complete": complete, "updates": steps,
            }  # fmt: skip
            rows += [
                {"batch": batch, "method": method, "stage": stage, **asdict(trial), "updates": steps,
                 "val_loss": loss if math.isfinite(loss) else None, "best": trial == low[2]}
                for loss, stage, trial in scored
            ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "best.json").write_text(json.dumps(best, indent=1) + "\n")
    (folder / "table.md").write_text(table(rows))
    readme = folder.parent / "README.md"
    if readme.exists():
        readme.write_text(
            replace_section(
                readme.read_text(), "sweep", best_table(best) + "\nAt the same lr and β, one seed:\n\n" + same_settings(rows)
            )
        )


def best_table(best: dict[str, dict[str, dict]]) -> str:
    """The setting of every method, as Markdown."""
    lines = ["| sequences a step | method | lr | β | γ or q | validation loss | trials | updates a trial |", "|" + "---|" * 8]
    for batch, methods in best.items():
        for method, found in methods.items():
            scale = f"γ {found['gamma']:g}" if "gamma" in found else f"q {found['inner']:g}" if "inner" in found else ""
            lines.append(
                f"| {batch[1:]} | {TITLES[method]} | {found['lr']:g} | {found['momentum']:g} | {scale} | "
                f"{found['val_loss']:.4f} | {found['trials']} | {found['updates']} |"
            )
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> str:
    """Every trial, one line each; the best of a method in bold."""
    lines = [
        "# The sweep",
        "",
        "`python scripts/sweep.py` made it; its rules are in the script's first lines. Score: final validation loss,",
        f"tuning seed {TUNING_SEED}. The same number of trials and of updates for every method.",
        "",
        "| sequences a step | method | stage | updates | gradients | lr | β | γ or q | validation loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        method = row["method"]
        scale = "" if method == "gluon" else f"q {row['q']:g}" if method == "nested" else f"γ {row['gamma']:g}"
        loss = "diverged" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        gradients = round(gradient_evaluations(method, row["updates"]))
        loss = f"**{loss}**" if row["best"] else loss
        lines.append(
            f"| {row['batch']} | {TITLES[method]} | {row['stage']} | {row['updates']} | {gradients} | {row['lr']:g} | "
            f"{row['momentum']:g} | {scale} | {loss} |"
        )
    diverged = sum(row["val_loss"] is None for row in rows)
    spent = sum(gradient_evaluations(row["method"], row["updates"]) for row in rows)
    updates = sum(row["updates"] for row in rows)
    lines += ["", f"{len(rows)} trials, {updates:,} updates, {spent:,.0f} gradient evaluations; {diverged} diverged."]
    return "\n".join(lines) + "\n\n## At the same lr and β\n\n" + same_settings(rows)


def same_settings(rows: list[dict]) -> str:
    """Each method's loss minus Gluon's at the same lr and β (one seed), where both were tried, as Markdown."""
    found = {(row["batch"], row["lr"], row["momentum"], row["method"]): row for row in rows if row["val_loss"] is not None}
    others = [method for method in TITLES if method != "gluon"]
    lines = ["| sequences a step | lr | β | Gluon | " + " | ".join(f"{TITLES[m]}, minus Gluon" for m in others) + " |"]
    lines.append("|" + "---|" * (4 + len(others)))
    for (batch, lr, beta, method), row in sorted(found.items()):
        if method != "gluon":
            continue
        cells = []
        for other in others:
            there = found.get((batch, lr, beta, other))
            scale = "" if there is None else f"q {there['q']:g}" if other == "nested" else f"γ {there['gamma']:g}"
            cells.append("" if there is None else f"{there['val_loss'] - row['val_loss']:+.3f} ({scale})")
        if any(cells):
            lines.append(f"| {batch} | {lr:g} | {beta:g} | {row['val_loss']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--batch", type=int, choices=tuple(METHODS_AT), help="sequences a step (default: both)")
    parser.add_argument("--methods", nargs="+", choices=tuple(TITLES), help="default: all")
    parser.add_argument("--steps", type=int, default=100, help="updates of a trial at 8 sequences, twice at 2 [100]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each [1]")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "sweep")
    parser.add_argument("--plan", action="store_true", help="print the runs and end")
    arguments = parser.parse_args(argv)
    updates = {8: arguments.steps, 2: 2 * arguments.steps}
    batches = [arguments.batch] if arguments.batch else list(METHODS_AT)
    wanted = [(b, m) for b in batches for m in METHODS_AT[b] if not arguments.methods or m in arguments.methods]
    try:
        for stage in range(4):
            jobs = []
            for batch, method in wanted:
                stages = trials_of(arguments.out, method, batch, updates[batch])
                jobs += [job_of(arguments.out, method, batch, t, updates[batch]) for s in stages[stage : stage + 1] for t in s]
            if arguments.plan and jobs:
                print("\n".join(f"{job.state():8} {' '.join(job.command[1:])}" for job in jobs))
            elif not arguments.plan:
                run_all(jobs, arguments.jobs)
    finally:
        if not arguments.plan:
            report(arguments.out, updates)


if __name__ == "__main__":
    with one_line_errors("sweep", interrupted=GOES_ON):
        main(sys.argv[1:])
