"""Tune every method with the same budget, then compare the best settings over five seeds.

    python -m experiments.sweep --jobs 2                 tune; continues where it was stopped
    python -m experiments.sweep --evaluate --jobs 2      run the best settings, and write table, picture and leaderboard
    python -m experiments.sweep --methods gluon mvr2     some of the methods
    python -m experiments.sweep --methods torch.optim:Muon --lr 5e-3     any torch.optim.Optimizer (docs/compare.md)
    python -m experiments.sweep --plan                   print what would run next

The model is the byte model of configs/mini_gluon.py with 8 sequences a step and a constant lr. Every method has 16
trials on one seed that no evaluation uses: the recipe (lr 2.5e-4, β 0.9, q 0.5, γ 0.1; AdamW and Muon have lrs of their own)
and 15 from a Latin hypercube, with the same draws for all methods. The lr is log-uniform over a factor of 16, 1-β log-uniform
from 0.05 to 0.95, q uniform from 0.2 to 0.95, γ log-uniform from 0.02 to 0.5; a method uses the knobs that it has. Trials are
halved: all run for a quarter of the tuning length, the best 8 continue to half of it, and the best 4 to its end. The score is
the validation loss there. The tuning length is a third of the evaluation's. The budget is equal in updates: two-gradient
methods spend twice the gradients.

Two rows are controls. `double_average` is MVR-2 without its correction. `gluon_2b` is Gluon with twice the batch, another way
to spend a second gradient.
"""

import argparse
import inspect
import json
import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, as_written, one_line_errors, positive
from common.files import write_text
from common.jsons import jsonable
from common.tables import markdown
from experiments.comparison import CONFIG, Arm, Comparison, read_speed, study_parser, write
from experiments.figures import LR, Folders
from experiments.run_jobs import CONTINUES, ROOT, Job, plan_of, run_all
from reading.runs import read_packed
from training.config import load_config
from training.optimizers import accepted, optimizer_class

TRIALS, SURVIVORS = 16, (16, 8, 4)  # survivors: trials of each rung
TUNING_SEED = 1000
TUNE_STEPS, EVALUATE_STEPS = 200, 600
BATCH = 8


@dataclass(frozen=True)
class Method:
    """A method's fixed options, its knobs, its recipe, and the low end of its lr range."""

    title: str
    options: dict[str, Any]
    knobs: tuple[str, ...] = ("lr", "momentum")
    recipe: dict[str, float] = field(default_factory=lambda: {"lr": LR})
    lr_from: float = 1.25e-4


METHODS = {
    "gluon": Method("Gluon", {"optimizer": "gluon"}),
    "mvr1": Method("MVR-1", {"optimizer": "mvr1", "gamma": 1.0}),
    "mvr2": Method("MVR-2", {"optimizer": "mvr2"}, ("lr", "momentum", "q")),
    "mvr3": Method("MVR-3", {"optimizer": "mvr3", "gamma": 1.0}, ("lr", "momentum", "q")),
    "mvr1_gamma": Method("MVR-1 with γ < 1", {"optimizer": "mvr1"}, ("lr", "momentum", "gamma")),
    "single_batch": Method("single_batch", {"optimizer": "single_batch"}, ("lr", "momentum", "gamma")),
    "previous_batch": Method("previous_batch", {"optimizer": "previous_batch"}, ("lr", "momentum", "gamma")),
    "muon": Method(
        "torch.optim.Muon", {"optimizer": "torch.optim:Muon", "weight_decay": 0.0}, recipe={"lr": 5e-3}, lr_from=1.25e-3
    ),
    "adamw": Method("AdamW", {"optimizer": "adamw"}, ("lr", "beta1"), {"lr": 2e-3}, 5e-4),
    "double_average": Method(
        "MVR-2 without its correction", {"optimizer": "experiments.controls:DoubleAverage"}, ("lr", "momentum", "q")
    ),
    "gluon_2b": Method("Gluon, twice the batch", {"optimizer": "gluon", "batch_size": 2 * BATCH}),
}


def own_method(name: str, lr: float | None = None, options: str = "{}") -> Method:
    """The method of package.module:Class. Its knobs are those that its constructor takes and `options` (JSON) does not fix.

    `lr`: the recipe's, the centre of the range; None: the constructor's default. Raises UserError if the class can't be found,
    the options are not a JSON object, or there is no lr.
    """
    words = [f"--config={ROOT / CONFIG}", f"--optimizer={name}", f"--optimizer-options={options}"]
    fixed = load_config(words).optimizer_options
    kind = optimizer_class(name)
    if lr is None and "lr" in (parameters := inspect.signature(kind).parameters):
        lr = parameters["lr"].default
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise UserError(f"{name} needs the centre of its lr range, above 0: --lr 1e-3")
    lr = float(f"{lr:.3g}")
    takes = accepted(kind) - fixed.keys()
    knobs = [knob for knob in ("momentum", "q", "gamma") if knob in takes]
    if "betas" in takes and "momentum" not in accepted(kind):
        knobs.append("beta1")
    title = ", ".join([name.partition(":")[2], *(f"{option} {value}" for option, value in fixed.items())])
    return Method(title, {"optimizer": name, "optimizer_options": fixed}, ("lr", *knobs), {"lr": lr}, lr / 4)


def key_of(name: str) -> str:
    """The folder of a method's runs."""
    return name.replace(":", ".")


def methods_of(folders: Folders) -> dict[str, Method]:
    """METHODS and the classes that were tuned before, rebuilt from the record of their first trial; by folder."""
    found = dict(METHODS)
    for path in sorted((folders.results / "sweep").glob("*.jsonl")):
        recipe = read_packed(path).get("trial00") if path.stem not in METHODS else None
        with as_written(path, "restore it, or remove it to tune again"):
            if recipe and ":" in (name := recipe.config["optimizer"]):
                found[path.stem] = own_method(name, recipe.config["lr"], json.dumps(recipe.config["optimizer_options"]))
    return found


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
    """A column of a Latin hypercube: one draw from each of `count` equal parts of [0, 1), in random order."""
    values = [(i + generator.random()) / count for i in range(count)]
    generator.shuffle(values)
    return values


def job_of(folders: Folders, name: str, method: Method, number: int, steps: int, length: int) -> Job:
    """A trial's run. `length` is the tuning length; the run is validated at each rung."""
    options = {
        "batch_size": BATCH, **method.options, **trials_of(method)[number], "steps": steps, "seed": TUNING_SEED,
        "val_every": length // 4, "log_every": length // 4, "checkpoint_every": 0, "keep_checkpoints": 1,
    }  # fmt: skip
    folder = folders.runs / "sweep" / name / f"trial{number:02}"
    return Job(folder, folders.results / "sweep" / f"{name}.jsonl", CONFIG, options)


def rungs_of(folders: Folders, name: str, method: Method, length: int) -> list[list[tuple[Job, float]]]:
    """The jobs and scores of each rung known so far. A rung is known once all scores of the one before are."""
    going, rungs = list(range(TRIALS)), []
    for steps, kept in zip((length // 4, length // 2, length), SURVIVORS, strict=True):
        going = going[:kept]
        jobs = {i: job_of(folders, name, method, i, steps, length) for i in going}
        scores = {i: jobs[i].loss_at(jobs[i].read(), steps) for i in going}
        rungs.append([(jobs[i], scores[i]) for i in going])
        if any(map(math.isnan, scores.values())):
            break
        going = sorted((i for i in going if scores[i] < math.inf), key=lambda i: scores[i])
        if not going:
            advice = "lower its lr_from" if name in METHODS else "remove its records and choose a lower --lr"
            raise UserError(f"every trial of {name} diverged; {advice}")
    return rungs


def report(folders: Folders, methods: Mapping[str, Method], length: int) -> None:
    """Write best.json (every method's best trial) and table.md (all trials) from the finished runs."""
    best, rows = {}, [["method", "trial", "setting", f"at {length // 4}", f"at {length // 2}", f"at {length}"]]
    for name, method in methods.items():
        rungs = rungs_of(folders, name, method, length)
        if len(rungs) == len(SURVIVORS) and not any(math.isnan(score) for _, score in rungs[-1]):
            job, score = min(rungs[-1], key=lambda pair: pair[1])
            trial = {knob: job.options[knob] for knob in method.knobs}
            best[name] = {"trial": trial, "val_loss": score, "updates": length, "at_the_edge": _edges(method, trial)}
        scores = [{job.folder.name: score for job, score in rung} for rung in rungs]
        for job, _ in rungs[0]:
            setting = Arm("", "", {knob: job.options[knob] for knob in method.knobs}).setting
            cells = [_shown(found.get(job.folder.name)) for found in scores]
            cells += [""] * (len(SURVIVORS) - len(scores))
            rows.append([method.title, job.folder.name.removeprefix("trial"), setting, *cells])
    folder = folders.results / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "best.json", json.dumps(jsonable(best), indent=1) + "\n")
    head = f"`python -m experiments.sweep`, tuning seed {TUNING_SEED}. Validation loss at the updates of each rung."
    write_text(folder / "table.md", f"# The sweep\n\n{head}\n\n{markdown(rows)}")


def _edges(method: Method, trial: dict[str, float]) -> list[str]:
    """The knobs whose best value is the smallest or the largest that was tried."""
    trials = trials_of(method)
    return [knob for knob, value in trial.items() if value in (min(t[knob] for t in trials), max(t[knob] for t in trials))]


def _shown(score: float | None) -> str:
    if score is None or math.isnan(score):
        return ""
    return f"{score:.4f}" if score < math.inf else "diverged"


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation(folders: Folders, seeds: int = 5, steps: int = EVALUATE_STEPS) -> list[Comparison]:
    """One comparison of the best settings over seeds, Gluon first; no comparison if Gluon is not tuned yet."""
    path = folders.results / "sweep" / "best.json"
    if not path.exists():
        return []
    with as_written(path, "remove it; python -m experiments.sweep makes it again from the records"):
        trials = {
            name: {knob: float(value) for knob, value in found["trial"].items()}
            for name, found in json.loads(path.read_text()).items()
        }
    if "gluon" not in trials:
        return []
    every = min(50, max(1, steps // 4))
    common = {"batch_size": BATCH, "val_every": every, "log_every": every, "checkpoint_every": 500, "keep_checkpoints": 1}
    arms = tuple(
        Arm(name, method.title, {**common, **method.options, **trials[name]}, CONFIG)
        for name, method in methods_of(folders).items()
        if name in trials
    )
    lengths = {arm.key: 2 * steps if arm.key == "gluon" else steps for arm in arms}
    title = "Every method at its best setting"
    place = Path("sweep") / "evaluation"
    return [Comparison(title, arms, tuple(range(seeds)), lengths, folders.runs / place, folders.results / place)]


def main(argv: list[str]) -> None:
    """Tune or evaluate: run what is missing, then write the tables."""
    parser = study_parser("sweep", __doc__)
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"{', '.join(METHODS)}, or package.module:Class [all known]"
    )
    parser.add_argument("--lr", type=float, help="package.module:Class: centre of its lr range (the constructor's default)")
    parser.add_argument("--optimizer-options", metavar="JSON", help="package.module:Class: more options of its constructor")
    parser.add_argument("--evaluate", action="store_true", help="run the best settings over seeds instead of tuning")
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds of the evaluation [5]")
    parser.add_argument(
        "--steps", type=positive, help=f"updates (a multiple of 4; tuning {TUNE_STEPS}, evaluation {EVALUATE_STEPS})"
    )
    parser.add_argument("--plan", action="store_true", help="print the runs known so far and stop")
    arguments = parser.parse_args(argv)
    folders = Folders(arguments.runs, arguments.results)
    methods = _chosen(folders, arguments)
    if arguments.evaluate:
        _evaluate(folders, methods, arguments)
        return
    length = arguments.steps or TUNE_STEPS
    if length % 4:
        raise UserError(f"--steps {length} must be a multiple of 4, for the rungs of the halving")
    try:
        for rung in range(len(SURVIVORS)):
            known = [rungs_of(folders, name, method, length) for name, method in methods.items()]
            jobs = [job for rungs in known for job, _ in (rungs[rung] if len(rungs) > rung else [])]
            if arguments.plan:
                print(plan_of(jobs))
            else:
                run_all(jobs, arguments.jobs)
    finally:
        if not arguments.plan:
            known = methods_of(folders) | methods
            report(folders, {name: m for name, m in known.items() if name in methods or _begun(folders, name)}, length)


def _chosen(folders: Folders, arguments: argparse.Namespace) -> dict[str, Method]:
    """The methods of a command line, by folder. A class that was tuned before keeps its lr and options if none are given."""
    known, given = methods_of(folders), (arguments.lr, arguments.optimizer_options) != (None, None)
    names = arguments.methods or list(known)
    if given and not any(":" in name for name in names):
        raise UserError("--lr and --optimizer-options are for a package.module:Class in --methods")
    chosen = {}
    for name in names:
        if ":" in name and (given or key_of(name) not in known):
            chosen[key_of(name)] = own_method(name, arguments.lr, arguments.optimizer_options or "{}")
        elif key_of(name) in known:
            chosen[key_of(name)] = known[key_of(name)]
        else:
            raise UserError(f"no method {name}; the methods are {', '.join(known)}, and any package.module:Class")
    return chosen


def _begun(folders: Folders, name: str) -> bool:
    return (folders.results / "sweep" / f"{name}.jsonl").exists()


def _evaluate(folders: Folders, methods: Mapping[str, Method], arguments: argparse.Namespace) -> None:
    comparisons = evaluation(folders, arguments.seeds, arguments.steps or EVALUATE_STEPS)
    if not comparisons:
        raise UserError("Gluon is not tuned yet; run python -m experiments.sweep first")
    comparison = comparisons[0]
    if arguments.methods and (missing := methods.keys() - {arm.key for arm in comparison.arms}):
        raise UserError(f"{min(missing)} is not tuned yet; leave out --evaluate first")
    jobs = [job for job in comparison.jobs() if job.folder.parent.name in methods]
    if arguments.plan:
        print(plan_of(jobs))
        return
    run_all(jobs, arguments.jobs)
    if not comparison.curves(comparison.baseline):
        raise UserError("no run of Gluon is done yet; add gluon to --methods")
    speed = read_speed(folders.results / "figures" / "calibration.json", BATCH, comparison.arms)
    print(write(comparison, speed, folders.results / "sweep" / "evaluation", []))
    print("python -m experiments.leaderboard puts it into results/README.md")


if __name__ == "__main__":
    with one_line_errors("experiments.sweep", interrupted=CONTINUES):
        main(sys.argv[1:])
