"""Tune every method with the same budget, then compare the best settings over five seeds.

    python -m experiments.sweep --jobs 2                 tune; resumes where it was stopped
    python -m experiments.sweep --evaluate --jobs 2      run the best settings, and write table, picture and leaderboard
    python -m experiments.sweep --methods gluon mvr2     some of the methods
    python -m experiments.sweep --plan                   say what would run next

The model is the byte model of configs/quickstart_gluon.py with 8 sequences a step and a constant lr. Every method has 16
trials on one seed that no evaluation uses: the recipe (lr 2.5e-4, β 0.9, q 0.5, γ 0.1; for AdamW and Muon lrs of their own)
and 15 of a Latin hypercube, with the same draws for all methods. The lr is log-uniform over a factor of 16, 1-β log-uniform
from 0.05 to 0.95, q uniform from 0.2 to 0.95, γ log-uniform from 0.02 to 0.5; a method uses the knobs that it has. Trials are
halved: all run for a quarter of the tuning length, the better 8 go on to a half, the better 4 to its end. The score is the
validation loss there. Tuning is a third of the evaluation's length. The budget is equal in updates: two-gradient methods spend
twice the gradients.

Two rows are controls. `double_average` is MVR-2 without its correction. `gluon_2b` is Gluon with twice the batch, another way
to spend a second gradient.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors
from common.jsons import jsonable
from common.tables import markdown
from experiments.comparison import CONFIG, RESULTS, RUNS, Arm, Comparison, read_speed, write
from experiments.figures import LR, Folders
from experiments.run_jobs import GOES_ON, Job, run_all
from training.curves import curve

TRIALS, SURVIVORS = 16, (16, 8, 4)  # of each rung
TUNING_SEED = 1000
TUNE_STEPS, EVALUATE_STEPS = 336, 1000
BATCH = 8


@dataclass(frozen=True)
class Method:
    """What is fixed of a method, its knobs, and the range of its lr around the recipe's."""

    title: str
    options: dict[str, Any]
    knobs: tuple[str, ...] = ("lr", "momentum")
    recipe: dict[str, float] = field(default_factory=lambda: {"lr": LR})
    lr_from: float = 1.25e-4


# It has no radii, so the config's are set back to the defaults; a matrix then moves by lr.
MUON = {"optimizer": "torch.optim:Muon", "weight_decay": 0.0, "block_radius": 50.0, "embed_radius": 3000.0}
METHODS = {
    "gluon": Method("Gluon", {"optimizer": "gluon"}),
    "mvr1": Method("MVR-1", {"optimizer": "mvr1", "gamma": 1.0}),
    "mvr2": Method("MVR-2", {"optimizer": "mvr2"}, ("lr", "momentum", "q")),
    "mvr3": Method("MVR-3", {"optimizer": "mvr3", "gamma": 1.0}, ("lr", "momentum", "q")),
    "mvr1_gamma": Method("MVR-1 with γ < 1", {"optimizer": "mvr1"}, ("lr", "momentum", "gamma")),
    "single_batch": Method("single_batch", {"optimizer": "single_batch"}, ("lr", "momentum", "gamma")),
    "previous_batch": Method("previous_batch", {"optimizer": "previous_batch"}, ("lr", "momentum", "gamma")),
    "muon": Method("torch.optim.Muon", MUON, recipe={"lr": 5e-3}, lr_from=1.25e-3),
    "adamw": Method("AdamW", {"optimizer": "adamw"}, ("lr", "beta1"), {"lr": 2e-3}, 5e-4),
    "double_average": Method(
        "MVR-2 without its correction", {"optimizer": "experiments.controls:DoubleAverage"}, ("lr", "momentum", "q")
    ),
    "gluon_2b": Method("Gluon, twice the batch", {"optimizer": "gluon", "batch_size": 2 * BATCH}),
}


# Tuning ---------------------------------------------------------------------------------------------------------------


def trials_of(method: Method, count: int = TRIALS) -> list[dict[str, float]]:
    """The settings of a method: the recipe, then a Latin hypercube with the same draws for every method."""
    generator = random.Random(TUNING_SEED)
    lrs, pasts, qs, gammas = (strata(generator, count - 1) for _ in range(4))
    recipe = {"momentum": 0.9, "beta1": 0.9, "q": 0.5, "gamma": 0.1, **method.recipe}
    drawn = [
        {
            "lr": method.lr_from * 16**u,
            "momentum": 1 - 0.05 * 19**v,
            "beta1": 1 - 0.05 * 19**v,
            "q": 0.2 + 0.75 * w,
            "gamma": 0.02 * 25**x,
        }
        for u, v, w, x in zip(lrs, pasts, qs, gammas, strict=True)
    ]
    return [{knob: float(f"{trial[knob]:.3g}") for knob in method.knobs} for trial in [recipe, *drawn]]


def strata(generator: random.Random, count: int) -> list[float]:
    """A column of a Latin hypercube: [0, 1) cut into `count` strata, a draw in each, in random order."""
    values = [(i + generator.random()) / count for i in range(count)]
    generator.shuffle(values)
    return values


def job_of(folders: Folders, name: str, trial: dict[str, float], number: int, steps: int, length: int) -> Job:
    """A trial's run. `length` is the tuning length; the run is validated at each rung."""
    options = {
        "batch_size": BATCH, **METHODS[name].options, **trial, "steps": steps, "seed": TUNING_SEED,
        "val_every": length // 4, "log_every": length // 4, "checkpoint_every": 0, "keep_checkpoints": 1,
    }  # fmt: skip
    folder = folders.runs / "sweep" / name / f"trial{number:02}"
    return Job(folder, folders.results / "sweep" / f"{name}.jsonl", CONFIG, options)


def loss_at(job: Job, steps: int) -> float:
    """The validation loss at an update; infinite if the run diverged, nan if it is not there yet."""
    record = job.record()
    if record is None:
        return math.nan
    found = {point["update"]: point["val_loss"] for point in curve(record["metrics"])}
    return found.get(steps, math.inf if "diverged" in record else math.nan)


def rungs_of(folders: Folders, name: str, length: int) -> list[list[tuple[Job, float]]]:
    """The jobs of each rung that is known so far, with their scores: a rung needs all scores of the one before."""
    trials = trials_of(METHODS[name])
    going, rungs = list(range(len(trials))), []
    for steps, kept in zip((length // 4, length // 2, length), SURVIVORS, strict=True):
        going = going[:kept]
        jobs = {i: job_of(folders, name, trials[i], i, steps, length) for i in going}
        scores = {i: loss_at(jobs[i], steps) for i in going}
        rungs.append([(jobs[i], scores[i]) for i in going])
        if any(map(math.isnan, scores.values())):
            break
        going = sorted((i for i in going if scores[i] < math.inf), key=lambda i: scores[i])
        if not going:
            raise UserError(f"every trial of {name} diverged; lower its lr_from in experiments/sweep.py")
    return rungs


def report(folders: Folders, names: Iterable[str], length: int) -> None:
    """Write best.json (every method's best trial) and table.md (all trials) from what is done."""
    best, rows = {}, [["method", "trial", "setting", f"at {length // 4}", f"at {length // 2}", f"at {length}"]]
    for name in names:
        rungs = rungs_of(folders, name, length)
        if len(rungs) == len(SURVIVORS) and not any(math.isnan(score) for _, score in rungs[-1]):
            job, score = min(rungs[-1], key=lambda pair: pair[1])
            trial = {knob: job.options[knob] for knob in METHODS[name].knobs}
            best[name] = {"trial": trial, "val_loss": score, "updates": length, "at_the_edge": _edges(name, trial)}
        scores = [{job.folder.name: score for job, score in rung} for rung in rungs]
        for job, _ in rungs[0]:
            setting = Arm("", "", {knob: job.options[knob] for knob in METHODS[name].knobs}).setting
            cells = [_shown(found.get(job.folder.name)) for found in scores]
            cells += [""] * (len(SURVIVORS) - len(scores))
            rows.append([METHODS[name].title, job.folder.name.removeprefix("trial"), setting, *cells])
    folder = folders.results / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best.json").write_text(json.dumps(jsonable(best), indent=1) + "\n")
    head = f"`python -m experiments.sweep`, tuning seed {TUNING_SEED}. Validation loss at the updates of each rung."
    (folder / "table.md").write_text(f"# The sweep\n\n{head}\n\n{markdown(rows)}")


def _edges(name: str, trial: dict[str, float]) -> list[str]:
    """The knobs whose best value is the least or the greatest that was tried."""
    trials = trials_of(METHODS[name])
    return [knob for knob, value in trial.items() if value in (min(t[knob] for t in trials), max(t[knob] for t in trials))]


def _shown(score: float | None) -> str:
    if score is None or math.isnan(score):
        return ""
    return f"{score:.4f}" if score < math.inf else "diverged"


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation(folders: Folders, seeds: int = 5, steps: int = EVALUATE_STEPS) -> list[Comparison]:
    """The best settings over seeds, Gluon first; an empty list if Gluon is not tuned yet."""
    try:
        best = json.loads((folders.results / "sweep" / "best.json").read_text())
    except OSError:
        best = {}
    if "gluon" not in best:
        return []
    common = {"batch_size": BATCH, "val_every": 50, "log_every": 50, "checkpoint_every": 500, "keep_checkpoints": 1}
    arms = tuple(
        Arm(name, method.title, {**common, **method.options, **best[name]["trial"]})
        for name, method in METHODS.items()
        if name in best
    )
    lengths = {arm.key: 2 * steps if arm.key == "gluon" else steps for arm in arms}
    title = "Every method at its best setting"
    place = Path("sweep") / "evaluation"
    return [Comparison(title, arms, tuple(range(seeds)), lengths, folders.runs / place, folders.results / place)]


def main(argv: list[str]) -> None:
    """Tune or evaluate: run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(prog="experiments.sweep", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--evaluate", action="store_true", help="run the best settings over seeds instead of tuning")
    parser.add_argument("--seeds", type=int, default=5, help="of the evaluation [5]")
    parser.add_argument(
        "--steps", type=int, help=f"updates (a multiple of 4; tuning {TUNE_STEPS}, evaluation {EVALUATE_STEPS})"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each [1]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs go [runs]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go [results]")
    parser.add_argument("--plan", action="store_true", help="print the runs that are known so far, and end")
    arguments = parser.parse_args(argv)
    folders = Folders(arguments.runs, arguments.results)
    if arguments.evaluate:
        _evaluate(folders, arguments)
        return
    length = arguments.steps or TUNE_STEPS
    if length % 4:
        raise UserError(f"--steps {length} must be a multiple of 4, for the rungs of the halving")
    try:
        for rung in range(len(SURVIVORS)):
            known = [rungs_of(folders, name, length) for name in arguments.methods]
            jobs = [job for rungs in known for job, _ in (rungs[rung] if len(rungs) > rung else [])]
            if arguments.plan:
                print("\n".join(f"{job.state():8} {' '.join(job.command[1:])}" for job in jobs))
            else:
                run_all(jobs, arguments.jobs)
    finally:
        if not arguments.plan:
            report(folders, [name for name in METHODS if name in arguments.methods or _begun(folders, name)], length)


def _begun(folders: Folders, name: str) -> bool:
    return (folders.results / "sweep" / f"{name}.jsonl").exists()


def _evaluate(folders: Folders, arguments: argparse.Namespace) -> None:
    comparisons = evaluation(folders, arguments.seeds, arguments.steps or EVALUATE_STEPS)
    if not comparisons:
        raise UserError("Gluon is not tuned yet; run python -m experiments.sweep first")
    comparison = comparisons[0]
    jobs = [job for job in comparison.jobs() if job.folder.parent.name in arguments.methods]
    if arguments.plan:
        print("\n".join(f"{job.state():8} {' '.join(job.command[1:])}" for job in jobs))
        return
    run_all(jobs, arguments.jobs)
    if not comparison.curves(comparison.baseline):
        raise UserError("no run of Gluon is done yet; add gluon to --methods")
    speed = read_speed(folders.results / "figures" / "calibration.json", BATCH, comparison.arms)
    print(write(comparison, speed, folders.results / "sweep" / "evaluation", []))
    print("python -m experiments.leaderboard takes it into results/README.md")


if __name__ == "__main__":
    with one_line_errors("experiments.sweep", interrupted=GOES_ON):
        main(sys.argv[1:])
