"""Tune every method with the same budget, then compare the best settings over five seeds.

    python -m experiments.sweep --jobs 2                 tune; continues where it was stopped
    python -m experiments.sweep --evaluate --jobs 2      run the best settings, and write table, picture and leaderboard
    python -m experiments.sweep --evaluate --decay --jobs 2    the same settings with a linear decay over the last 30%
    python -m experiments.sweep --methods gluon mvr2     some of the methods
    python -m experiments.sweep --methods torch.optim:Muon --lr 5e-3     any torch.optim.Optimizer (docs/compare.md)
    python -m experiments.sweep --batch-size 64          another sweep, at this batch, with records of its own
    python -m experiments.sweep --plan                   print what would run next

The model is the byte model of configs/mini_gluon.py with 8 sequences a step and a constant lr. Every method has 16
trials on one seed that no evaluation uses: the recipe (lr 2.5e-4, β 0.9, q 0.5, γ 0.1; AdamW and Muon have lrs of their own)
and 15 from a Latin hypercube, with the same draws for all methods. The lr is log-uniform over a factor of 16, 1-β log-uniform
from 0.05 to 0.95, q uniform from 0.2 to 0.95, γ log-uniform from 0.02 to 0.5; a method uses the knobs that it has. Trials are
halved: all run for a quarter of the tuning length, the best 8 continue to half of it, and the best 4 to its end. The score is
the validation loss there. Where the best value of a knob is the smallest or the largest that was tried, the range grows: more
trials follow, each further out, as long as they improve. The tuning length is a third of the evaluation's. The budget is equal
in updates: two-gradient methods spend twice the gradients.

Two rows are controls. `double_average` is MVR-2 without its correction. `gluon_2b` is Gluon with twice the batch, another way
to spend a second gradient. The rows `..._radii` keep a method's best setting and tune two knobs more, with 16 trials of their
own: the embedding's radius (log-uniform over a factor of 16; only its ratio to the blocks' matters) and the weight decay
(log-uniform from 0.1 to 10, or none).
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
BATCH, NEAR_NOISE = 8, 64  # sequences a step of the two leaderboards; the second is near the gradient's noise scale
DECAY = 0.3  # the last part of a run, in which --decay lets the lr fall to 0


@dataclass(frozen=True)
class Place(Folders):
    """The folders of a sweep with `batch` sequences a step."""

    batch: int = BATCH

    @property
    def name(self) -> str:
        return "sweep" if self.batch == BATCH else f"sweep_b{self.batch}"

    @property
    def records(self) -> Path:
        return self.results / self.name

    @property
    def command(self) -> str:
        return "python -m experiments.sweep" + ("" if self.batch == BATCH else f" --batch-size {self.batch}")


@dataclass(frozen=True)
class Method:
    """A method's fixed options, its knobs, its recipe, the low end of its lr range, and the method that it goes on from.

    `batches`: its batch size, as a multiple of that of the other methods.
    """

    title: str
    options: dict[str, Any]
    knobs: tuple[str, ...] = ("lr", "momentum")
    recipe: dict[str, float] = field(default_factory=lambda: {"lr": LR})
    lr_from: float = 1.25e-4
    base: str = ""
    batches: int = 1

    def common(self, folders: Place) -> dict[str, Any]:
        """The options of all its runs."""
        return {"batch_size": self.batches * folders.batch, **_base_of(folders, self), **self.options}


def _radii(base: str, title: str) -> Method:
    """A tuned method with two knobs more."""
    return Method(f"{title}, radii and decay tuned", {}, ("embed_radius", "weight_decay"), base=base)


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
    "muon_adamw": Method(
        "torch.optim.Muon, AdamW on the embedding",
        {"optimizer": "experiments.contestants:MuonAdamW"},
        recipe={"lr": 2e-3},
        lr_from=5e-4,
    ),
    "adamw": Method("AdamW", {"optimizer": "adamw"}, ("lr", "beta1"), {"lr": 2e-3}, 5e-4),
    "double_average": Method(
        "MVR-2 without its correction", {"optimizer": "experiments.controls:DoubleAverage"}, ("lr", "momentum", "q")
    ),
    "gluon_2b": Method("Gluon, twice the batch", {"optimizer": "gluon"}, batches=2),
    "gluon_radii": _radii("gluon", "Gluon"),
    "mvr1_gamma_radii": _radii("mvr1_gamma", "MVR-1 with γ < 1"),
    "mvr2_radii": _radii("mvr2", "MVR-2"),
}
# The methods in README.md: those of the papers, and what they must be compared with. The picture shows these, and those that
# --methods names.
SHORT = (
    "gluon", "mvr1", "mvr1_gamma", "mvr2", "mvr3", "adamw", "muon_adamw", "gluon_2b", "experiments.contestants.Transported",
    "pytorch_optimizer.SOAP",
)  # fmt: skip
OWN_KNOBS = ("lr", "momentum", "q", "gamma", "beta1")  # of package.module:Class


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
    return _described(name, fixed, ("lr", *knobs), lr)


def _described(name: str, fixed: Mapping[str, Any], knobs: tuple[str, ...], lr: float, package: str = "") -> Method:
    title = name.partition(":")[2] + (package and f" ({package})")
    title = ", ".join([title, *(f"{option} {value}" for option, value in fixed.items())])
    return Method(title, {"optimizer": name, "optimizer_options": fixed}, knobs, {"lr": lr}, lr / 4)


def key_of(name: str) -> str:
    """The folder of a method's runs."""
    return name.replace(":", ".")


def methods_of(folders: Place) -> dict[str, Method]:
    """METHODS, and the classes that were tuned before, rebuilt from the record of their first trial; by folder.

    The packages of those classes need not be installed.
    """
    found = dict(METHODS)
    for path in sorted(folders.records.glob("*.jsonl")):
        recipe = read_packed(path).get("trial00") if path.stem not in METHODS else None
        with as_written(path, "restore it, or remove it to tune again"):
            if recipe and ":" in (name := recipe.config["optimizer"]):
                knobs = tuple(knob for knob in OWN_KNOBS if recipe.config.get(knob) is not None)
                package = recipe.environment.get("package", "")
                fixed = recipe.config.get("optimizer_options")
                found[path.stem] = _described(name, fixed or {}, knobs, recipe.config["lr"], package)
    return found


def _base_of(folders: Place, method: Method) -> dict[str, Any]:
    """The options and the best setting of the method that another goes on from. Raises UserError if it is not tuned yet."""
    if not method.base:
        return {}
    best = best_of(folders)
    if method.base not in best:
        raise UserError(f"{method.title}: {method.base} must be tuned first; add it to --methods")
    return {**METHODS[method.base].options, **best[method.base]}


def best_of(folders: Place) -> dict[str, dict[str, float]]:
    """The best setting of every method that is tuned."""
    path = folders.records / "best.json"
    if not path.exists():
        return {}
    with as_written(path, "remove it; python -m experiments.sweep makes it again from the records"):
        found = json.loads(path.read_text())
        return {name: {knob: float(value) for knob, value in of["trial"].items()} for name, of in found.items()}


# Tuning ---------------------------------------------------------------------------------------------------------------


def trials_of(method: Method, count: int = TRIALS) -> list[dict[str, float]]:
    """The settings of a method: the recipe, then a Latin hypercube with the same draws for every method."""
    generator = random.Random(TUNING_SEED)
    lrs, pasts, qs, gammas, radii, decays = (strata(generator, count - 1) for _ in range(6))
    radius = load_config([f"--config={ROOT / CONFIG}"]).embed_radius
    recipe = {"momentum": 0.9, "beta1": 0.9, "q": 0.5, "gamma": 0.1, "embed_radius": radius, "weight_decay": 0.0}
    recipe |= method.recipe
    drawn = [
        {
            "lr": method.lr_from * 16**u,
            "momentum": 1 - 0.05 * 19**v,
            "beta1": 1 - 0.05 * 19**v,
            "q": 0.2 + 0.75 * w,
            "gamma": 0.02 * 25**x,
            "embed_radius": radius * 16 ** (y - 0.5),
            "weight_decay": 0.1 * 100**z,
        }
        for u, v, w, x, y, z in zip(lrs, pasts, qs, gammas, radii, decays, strict=True)
    ]
    return [{knob: float(f"{trial[knob]:.3g}") for knob in method.knobs} for trial in [recipe, *drawn]]


def strata(generator: random.Random, count: int) -> list[float]:
    """A column of a Latin hypercube: one draw from each of `count` equal parts of [0, 1), in random order."""
    values = [(i + generator.random()) / count for i in range(count)]
    generator.shuffle(values)
    return values


def job_of(folders: Place, name: str, method: Method, number: int, trial: dict[str, float], steps: int, length: int) -> Job:
    """A trial's run. `length` is the tuning length; the run is validated at each rung."""
    options = {
        **method.common(folders), **trial, "steps": steps, "seed": TUNING_SEED,
        "val_every": length // 4, "log_every": length // 4, "checkpoint_every": 0, "keep_checkpoints": 1,
    }  # fmt: skip
    folder = folders.runs / folders.name / name / f"trial{number:02}"
    return Job(folder, folders.records / f"{name}.jsonl", CONFIG, options)


def rungs_of(folders: Place, name: str, method: Method, length: int) -> list[list[tuple[Job, float]]]:
    """The jobs and scores of each rung known so far, and of the trials beyond an edge as the last one.

    A rung is known once all scores of the one before are.
    """
    trials, rungs = trials_of(method), []
    going = list(range(TRIALS))
    for steps, kept in zip((length // 4, length // 2, length), SURVIVORS, strict=True):
        going = going[:kept]
        jobs = {i: job_of(folders, name, method, i, trials[i], steps, length) for i in going}
        scores = {i: jobs[i].loss_at(jobs[i].read(), steps) for i in going}
        rungs.append([(jobs[i], scores[i]) for i in going])
        if any(map(math.isnan, scores.values())):
            return rungs
        going = sorted((i for i in going if scores[i] < math.inf), key=lambda i: scores[i])
        if not going:
            advice = "lower its lr_from" if name in METHODS else "remove its records and choose a lower --lr"
            raise UserError(f"every trial of {name} diverged; {advice}")
    beyond: list[tuple[Job, float]] = []
    best, score = trials[going[0]], scores[going[0]]
    for knob, up in _edges(method, best):
        while (further := _further(best, knob, up)) != best:
            job = job_of(folders, name, method, TRIALS + len(beyond), further, length, length)
            beyond.append((job, job.loss_at(job.read(), length)))
            if not beyond[-1][1] < score:  # worse, or not known yet
                break
            best, score = further, beyond[-1][1]
        if beyond and math.isnan(beyond[-1][1]):
            break
    return [*rungs, beyond]


def _edges(method: Method, best: dict[str, float]) -> list[tuple[str, bool]]:
    """The knobs whose best value is the largest (True) or the smallest (False) of the 16."""
    ranges = {knob: [trial[knob] for trial in trials_of(method)] for knob in method.knobs}
    return [(knob, best[knob] == max(tried)) for knob, tried in ranges.items() if best[knob] in (min(tried), max(tried))]


def _further(trial: dict[str, float], knob: str, up: bool) -> dict[str, float]:
    """The trial with a knob further out: by a factor of 2, or, for what must stay below 1, half of the way to 1."""
    value = trial[knob]
    if knob in ("momentum", "beta1"):
        value = 1 - (1 - value) / 2 if up else max(0.0, 1 - 2 * (1 - value))
    elif knob == "q" and up:
        value = (1 + value) / 2 if value < 0.98 else 1.0
    else:
        value *= 2 if up else 0.5
    return trial | {knob: float(f"{value:.3g}")}


def report(folders: Place, methods: Mapping[str, Method], length: int) -> None:
    """Write best.json (every method's best trial) and table.md (all trials) from the finished runs."""
    best, rows = {}, [["method", "trial", "setting", f"at {length // 4}", f"at {length // 2}", f"at {length}"]]
    for name, method in methods.items():
        rungs = rungs_of(folders, name, method, length)
        ended = rungs.pop() if len(rungs) > len(SURVIVORS) else []
        if len(rungs) == len(SURVIVORS):
            found = [(job, score) for job, score in rungs[-1] + ended if not math.isnan(score)]
            if len(found) == len(rungs[-1]) + len(ended):
                job, score = min(found, key=lambda pair: pair[1])
                best[name] = {"trial": {knob: job.options[knob] for knob in method.knobs}, "val_loss": score, "updates": length}
        scores = [{job.folder.name: score for job, score in rung} for rung in rungs]
        scores += [{}] * (len(SURVIVORS) - len(scores))
        scores[-1] |= {job.folder.name: score for job, score in ended}
        for job, _ in rungs[0] + ended:
            setting = Arm("", "", {knob: job.options[knob] for knob in method.knobs}).setting
            cells = [_shown(found.get(job.folder.name)) for found in scores]
            rows.append([method.title, job.folder.name.removeprefix("trial"), setting, *cells])
    folders.records.mkdir(parents=True, exist_ok=True)
    write_text(folders.records / "best.json", json.dumps(jsonable(best), indent=1) + "\n")
    head = f"`{folders.command}`, tuning seed {TUNING_SEED}. Validation loss at the updates of each rung."
    tail = f"Trials from {TRIALS} on lie beyond the range, where its edge was the best."
    write_text(folders.records / "table.md", f"# The sweep\n\n{head}\n{tail}\n\n{markdown(rows)}")


def _shown(score: float | None) -> str:
    if score is None or math.isnan(score):
        return ""
    return f"{score:.4f}" if score < math.inf else "diverged"


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation(folders: Place, seeds: int = 5, steps: int = EVALUATE_STEPS, decay: bool = False) -> list[Comparison]:
    """One comparison of the best settings over seeds, Gluon first; no comparison if Gluon is not tuned yet.

    `decay`: the lr falls linearly to 0 over the last part. Until then a run is that of the constant lr, bit for bit.
    """
    trials = best_of(folders)
    if "gluon" not in trials:
        return []
    every = min(50, max(1, steps // 4))
    common = {"val_every": every, "log_every": every, "checkpoint_every": 500, "keep_checkpoints": 1}
    common |= {"schedule": "linear", "warmdown_steps": round(DECAY * steps)} if decay else {}
    arms = tuple(
        Arm(name, method.title, {**common, **method.common(folders), **trials[name]}, CONFIG)
        for name, method in methods_of(folders).items()
        if name in trials
    )
    lengths = {arm.key: 2 * steps if arm.key == "gluon" and not decay else steps for arm in arms}
    title = "Every method at its best setting"
    part = "decayed" if decay else "evaluation"
    return [Comparison(title, arms, tuple(range(seeds)), lengths, folders.runs / folders.name / part, folders.records / part)]


def main(argv: list[str]) -> None:
    """Tune or evaluate: run what is missing, then write the tables."""
    parser = study_parser("sweep", __doc__)
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"{', '.join(METHODS)}, or package.module:Class [all known]"
    )
    parser.add_argument("--lr", type=float, help="package.module:Class: centre of its lr range (the constructor's default)")
    parser.add_argument("--optimizer-options", metavar="JSON", help="package.module:Class: more options of its constructor")
    parser.add_argument("--batch-size", type=positive, default=BATCH, help=f"sequences a step [{BATCH}]")
    parser.add_argument("--evaluate", action="store_true", help="run the best settings over seeds instead of tuning")
    parser.add_argument("--decay", action="store_true", help="with --evaluate: the lr falls to 0 over the last 30%%")
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds of the evaluation [5]")
    parser.add_argument(
        "--steps", type=positive, help=f"updates (a multiple of 4; tuning {TUNE_STEPS}, evaluation {EVALUATE_STEPS})"
    )
    parser.add_argument("--plan", action="store_true", help="print the runs known so far and stop")
    arguments = parser.parse_args(argv)
    folders = Place(arguments.runs, arguments.results, arguments.batch_size)
    methods = _chosen(folders, arguments)
    if arguments.evaluate:
        _evaluate(folders, methods, arguments)
        return
    length = arguments.steps or TUNE_STEPS
    if length % 4:
        raise UserError(f"--steps {length} must be a multiple of 4, for the rungs of the halving")
    for based in (False, True):  # a method that goes on from another's best setting comes second
        of_stage = {name: method for name, method in methods.items() if bool(method.base) == based}
        if not of_stage:
            continue
        try:
            _tune(folders, of_stage, length, arguments)
        finally:
            if not arguments.plan:
                known = methods_of(folders) | of_stage
                report(folders, {name: m for name, m in known.items() if name in of_stage or _begun(folders, name)}, length)


def _tune(folders: Place, methods: Mapping[str, Method], length: int, arguments: argparse.Namespace) -> None:
    """Run what is not known yet, rung by rung, and then the trials beyond an edge."""
    unknown = True
    while unknown:
        known = [rungs_of(folders, name, method, length) for name, method in methods.items()]
        trials = [trial for rungs in known for rung in rungs for trial in rung]
        jobs = list({job.folder: job for job, _ in trials}.values())  # the last rung of each
        if arguments.plan:
            print(plan_of(jobs))
            return
        run_all(jobs, arguments.jobs)
        unknown = any(math.isnan(score) for _, score in trials)


def _chosen(folders: Place, arguments: argparse.Namespace) -> dict[str, Method]:
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


def _begun(folders: Place, name: str) -> bool:
    return (folders.records / f"{name}.jsonl").exists()


def _evaluate(folders: Place, methods: Mapping[str, Method], arguments: argparse.Namespace) -> None:
    comparisons = evaluation(folders, arguments.seeds, arguments.steps or EVALUATE_STEPS, arguments.decay)
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
    if not arguments.decay:  # with a decay only the ends can be compared; the leaderboard has them
        speed = read_speed(folders.calibration, folders.batch, comparison.arms)
        shown = {*SHORT, *(methods if arguments.methods else ())}
        print(write(comparison, speed, folders.records / "evaluation", [], shown))
    if folders.batch in (BATCH, NEAR_NOISE):
        print("python -m experiments.leaderboard puts it into results/README.md")


if __name__ == "__main__":
    with one_line_errors("experiments.sweep", interrupted=CONTINUES):
        main(sys.argv[1:])
