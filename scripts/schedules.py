"""Do schedules of γ and β pay, at equal gradient evaluations? Every arm is tuned alike, then run on fresh seeds.

    python scripts/schedules.py --jobs 2        # resumes; results/schedules/README.md, b2.json, b2_trials.md, b2.png
    python scripts/schedules.py --plan          # what it would run
    python scripts/schedules.py --plot-only

The model is the byte model of configs/quickstart_gluon.py at `--batch` sequences a step. A run may evaluate `--budget`
gradients of a batch and spends them on one whole schedule: constant lr, then linear to 0 over the last 30% of its updates. An
arm whose updates take more than one gradient makes fewer updates, so that the ends of all runs are compared at the same cost.
One arm spends the second gradient on a second batch, as a control of what it could have bought.

Tuning: twelve trials an arm at the full budget, on one seed that no evaluation uses, scored by the final validation loss.
Eight are a Latin hypercube over the unit cube of the knobs (`KNOBS`), the same points for every arm, which leaves out the
knobs that it lacks; then twice two, at a normal distance (0.15, then 0.08) from the best so far, the same steps for every
arm. An arm with more knobs has no more trials, and so pays for its knobs. Its best setting then runs on the seeds 0, 1, ….
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError, one_line_errors
from scripts.plot import COLOURS, INK, LOOK
from scripts.run_jobs import GOES_ON, ROOT, Job, final_loss, records, run_all
from scripts.statistics_of_runs import Interval, interval, paired, replace_section, strata
from scripts.sweep import CONFIG, TUNING_SEED

BUDGET = 600
DRAWS = 8
REFINEMENTS = ((2, 0.15), (2, 0.08))  # trials and the deviation of their steps in the unit cube
WARMDOWN = 0.3

# Least and most, log-uniform between them. `memory` is 1-β, and `memory_end` the share of it that is left at the end.
KNOBS = {
    "lr": (3e-4, 3e-3), "memory": (0.03, 0.6), "gamma": (0.02, 1.0), "memory_end": (0.02, 1.0), "gamma_end": (0.02, 1.0),
    "theory_lr": (4e-3, 4e-2),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A method with a schedule: what it fixes, and the knobs that are tuned."""

    label: str
    optimizer: str
    knobs: tuple[str, ...]
    fixed: dict[str, float | str] = field(default_factory=dict)
    batches: int = 1  # of the study's size that make one of the arm's

    def options(self, point: dict[str, float], updates: int) -> dict[str, float | str]:
        """The options of train_gpt.py at a point of the unit cube."""
        value = {name: float(f"{low * (high / low) ** point[name]:.3g}") for name, (low, high) in KNOBS.items()}
        options = {
            "optimizer": self.optimizer, "schedule": "linear", "steps": updates, "warmdown_steps": round(WARMDOWN * updates),
            **self.fixed,
        }  # fmt: skip
        for knob in self.knobs:
            if knob == "memory":
                options["momentum"] = round(1 - value["memory"], 5)
            elif knob == "memory_end":
                options["momentum_end"] = round(1 - value["memory"] * value["memory_end"], 5)
            else:
                options[knob.removeprefix("theory_")] = value[knob]
        return options


THEORY = {"schedule": "theory", "warmdown_steps": 0}
ARMS = {
    "gluon": Arm("Gluon", "gluon", ("lr", "memory")),
    "gluon_follow": Arm("Gluon, β follows", "gluon", ("lr", "memory", "memory_end")),
    "gluon_double": Arm("Gluon, twice the batch", "gluon", ("lr", "memory"), batches=2),
    "mvr1": Arm("MVR-1", "mvr1", ("lr", "memory", "gamma")),
    "mvr1_follow": Arm("MVR-1, β and γ follow", "mvr1", ("lr", "memory", "gamma", "memory_end", "gamma_end")),
    "mvr2": Arm("MVR-2", "mvr2", ("lr", "memory", "gamma")),
    "mvr2_follow": Arm("MVR-2, β and γ follow", "mvr2", ("lr", "memory", "gamma", "memory_end", "gamma_end")),
    "mvr2_late": Arm("MVR-2 in the warm-down alone", "mvr2", ("lr", "memory", "memory_end", "gamma_end"), {"gamma": 0.0}),
    "mvr2_half": Arm("MVR-2, correction from half", "mvr2", ("lr", "memory", "gamma"), {"correction_every": 2}),
    "gluon_theory": Arm("Gluon, theory's schedule", "gluon", ("theory_lr",), THEORY),
    "mvr2_theory": Arm("MVR-2, theory's schedule", "mvr2", ("theory_lr", "gamma"), THEORY),
}


# Trials ---------------------------------------------------------------------------------------------------------------


def draws(seed: int, count: int) -> list[dict[str, float]]:
    """A Latin hypercube over the knobs."""
    generator = random.Random(seed)
    columns = {name: strata(generator, count) for name in KNOBS}
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def steps_from(point: dict[str, float], stage: int) -> list[dict[str, float]]:
    """The trials of a refinement: normal steps from a point, cut off at the cube's faces."""
    count, deviation = REFINEMENTS[stage]
    generator = random.Random(TUNING_SEED + 1 + stage)
    return [{name: min(1.0, max(0.0, point[name] + generator.gauss(0.0, deviation))) for name in KNOBS} for _ in range(count)]


def passes(options: dict[str, float | str]) -> float:
    """Gradients of a batch that a run evaluates. The first step has no previous weights, and at γ = 0 no step needs them."""
    steps = int(options["steps"])
    if options["optimizer"] != "mvr2":
        return steps
    plain = 0
    if options["gamma"] == 0:  # until the lr falls
        plain = max(1, steps - int(options["warmdown_steps"]) + 1)
    return steps + (steps - max(1, plain)) / int(options.get("correction_every", 1))


def updates_within(options: Callable[[int], dict[str, float | str]], budget: int) -> int:
    """The most updates whose gradients are within the budget."""
    low, high = 1, budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passes(options(middle)) <= budget else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Study:
    """Where the runs are and what each may spend."""

    folder: Path
    batch: int
    budget: int

    def job(self, name: str, point: dict[str, float], seed: int, run: str) -> Job:
        """A run of an arm at a point. A trial is validated at its start and end, an evaluation ten times."""
        arm = ARMS[name]
        options = arm.options(point, updates_within(lambda updates: arm.options(point, updates), self.budget // arm.batches))
        every = options["steps"] if seed == TUNING_SEED else math.ceil(options["steps"] / 10)
        options |= {
            "batch_size": self.batch * arm.batches,
            "seed": seed,
            "val_every": every,
            "log_every": 20,
            "checkpoint_every": 0,
        }
        return Job(self.run_folder(name, run), CONFIG, options)

    @property
    def name(self) -> str:
        return f"b{self.batch}" + (f"_{self.budget}" if self.budget != BUDGET else "")

    def run_folder(self, name: str, run: str) -> Path:
        return self.folder / self.name / name / run

    def stages(self, name: str) -> list[list[Job]]:
        """The trials of an arm, as far as the scores of the stages before are known."""
        return [[self.job(name, point, TUNING_SEED, run) for run, point in stage] for stage in self._points(name)]

    def best(self, name: str) -> dict[str, float] | None:
        """The point of the least loss, once all trials are done."""
        stages = self._points(name)
        if len(stages) <= len(REFINEMENTS):
            return None
        return self._least(name, [trial for stage in stages for trial in stage])

    def evaluations(self, name: str, seeds: int) -> dict[int, Job]:
        """The runs of an arm's best setting by seed; none while a trial is missing."""
        point = self.best(name)
        return {} if point is None else {seed: self.job(name, point, seed, f"seed{seed}") for seed in range(seeds)}

    def _points(self, name: str) -> list[list[tuple[str, dict[str, float]]]]:
        named = [[(f"trial{i:02d}", point) for i, point in enumerate(draws(TUNING_SEED, DRAWS))]]
        for stage in range(len(REFINEMENTS)):
            done = [trial for trials in named for trial in trials]
            best = self._least(name, done)
            if best is None:
                break
            named.append([(f"trial{len(done) + i:02d}", point) for i, point in enumerate(steps_from(best, stage))])
        return named

    def _least(self, name: str, trials: list[tuple[str, dict[str, float]]]) -> dict[str, float] | None:
        scores = [final_loss(self.job(name, point, TUNING_SEED, run)) for run, point in trials]
        if any(map(math.isnan, scores)):
            return None
        if min(scores) == math.inf:
            raise UserError(f"every trial of {name} diverged; lower KNOBS in scripts/schedules.py")
        return trials[scores.index(min(scores))][1]


# Results --------------------------------------------------------------------------------------------------------------


def compare(study: Study, seeds: int) -> list[dict]:
    """One row an arm: its setting, its loss over the seeds, and the paired differences to both Gluons and to fixed γ and β."""
    speed = json.loads((study.folder.parent / "mini" / "calibration.json").read_text())["batches"][str(study.batch)]
    losses: dict[str, dict[int, float]] = {}
    rows = []
    for name in ARMS:
        jobs = study.evaluations(name, seeds)
        if found := {seed: loss for seed, job in jobs.items() if not math.isnan(loss := final_loss(job))}:
            losses[name] = found
            trials = [final_loss(job) for stage in study.stages(name) for job in stage]
            job = jobs[next(iter(found))]
            gradients = passes(job.options) * ARMS[name].batches
            seconds = gradients * speed["gradient"] + job.options["steps"] * speed["update"][ARMS[name].optimizer]
            rows.append(
                {"arm": name, "label": ARMS[name].label, "options": job.options, "gradients": gradients, "seconds": seconds,
                 "trials": trials, "losses": losses[name], "loss": interval(list(losses[name].values()))}
            )  # fmt: skip
    for row in rows:
        fixed = row["optimizer"] = ARMS[row["arm"]].optimizer
        others = ("gluon", "gluon_follow", "gluon_double")
        for key, other in [*((f"minus_{other}", other) for other in others), ("minus_fixed", fixed)]:
            if other in losses and other != row["arm"] and losses[other].keys() & losses[row["arm"]].keys():
                row[key] = paired(losses[row["arm"]], losses[other])
    return rows


def setting(options: dict[str, float | str]) -> str:
    """lr, β and γ, with where they end."""
    words = [f"lr {options['lr']:g}"]
    if "momentum" in options:
        words.append(f"β {options['momentum']:g}" + (f" → {options['momentum_end']:g}" if "momentum_end" in options else ""))
    if "gamma" in options:
        words.append(f"γ {options['gamma']:g}" + (f" → {options['gamma_end']:g}" if "gamma_end" in options else ""))
    return ", ".join(words)


def table(rows: list[dict]) -> str:
    """The rows as Markdown, the best loss first."""
    lines = [
        "| arm | best setting | updates | calibrated seconds | seeds | validation loss [95%] | minus Gluon | "
        "minus Gluon, β follows | minus Gluon, twice the batch | minus its method at fixed γ and β |",
        "|" + "---|" * 10,
    ]
    for row in sorted(rows, key=lambda row: row["loss"].mean):
        cells = [row["label"], setting(row["options"]), str(row["options"]["steps"]), f"{row['seconds']:.0f}"]
        cells += [str(row["loss"].n), row["loss"].level]
        for key in ("minus_gluon", "minus_gluon_follow", "minus_gluon_double", "minus_fixed"):
            same = key == "minus_fixed" and row["optimizer"] == "gluon"
            cells.append("" if key not in row or same else f"{row[key]} **{row[key].verdict}**")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def trials_table(study: Study) -> str:
    """Every trial, as Markdown."""
    lines = ["| arm | trial | setting | updates | validation loss |", "|---|---|---|---|---|"]
    for name, arm in ARMS.items():
        jobs = [job for stage in study.stages(name) for job in stage]
        scores = [final_loss(job) for job in jobs]
        for job, score in zip(jobs, scores, strict=True):
            if not math.isnan(score):
                text = "diverged" if score == math.inf else f"{score:.4f}"
                text = f"**{text}**" if score == min(scores) else text
                lines.append(
                    f"| {arm.label} | {job.folder.name[5:]} | {setting(job.options)} | {job.options['steps']} | {text} |"
                )
    return "\n".join(lines) + "\n"


def draw(study: Study, rows: list[dict], out: Path) -> None:
    """Left, the mean curves against gradient evaluations; right, the paired difference of the ends to Gluon's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(rows, key=lambda row: row["loss"].mean)
    with plt.rc_context(LOOK):
        page, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", width_ratios=(1.3, 1))
        ends = []
        for i, row in enumerate(rows):
            colour = INK if row["arm"] == "gluon" else COLOURS[i % (len(COLOURS) - 1)]
            style = "-" if row["arm"] == "gluon" or i < len(COLOURS) - 1 else "--"
            curves = []
            for seed in row["losses"]:
                lines = records(study.run_folder(row["arm"], f"seed{seed}") / "metrics.jsonl")
                gradients = ARMS[row["arm"]].batches
                curves.append([(gradients * line["passes"], line["val_loss"]) for line in lines if "val_loss" in line])
            points = [
                (statistics.fmean(place for place, _ in column), statistics.fmean(loss for _, loss in column))
                for column in zip(*curves, strict=True)
            ]
            left.plot(
                *zip(*points, strict=True), style, color=colour, linewidth=1.6, marker="o", markersize=3, markeredgewidth=0,
                label=f"{row['label']}: {row['loss'].mean:.3f}",
            )  # fmt: skip
            ends += [loss for place, loss in points if place >= study.budget / 5]
            if "minus_gluon" in row:
                gap = row["minus_gluon"]
                right.errorbar(
                    gap.mean, -i, xerr=[[gap.mean - gap.low], [gap.high - gap.mean]], fmt="o", color=colour, capsize=3
                )
        low, high = min(ends), max(ends)
        left.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        left.set_xlabel("Gradient evaluations")
        left.set_ylabel("Validation loss")
        left.legend(frameon=False, fontsize=9)
        right.axvline(0, color=INK, linewidth=1)
        right.set_yticks([-i for i, row in enumerate(rows)], [row["label"] for row in rows])
        right.set_xlabel("Final validation loss minus Gluon's (95%)")
        for panel in (left, right):
            panel.tick_params(length=0)
        page.suptitle(
            f"Schedules at {study.budget} gradients of {study.batch} sequences, mean of {rows[0]['loss'].n} seeds",
            fontsize=13, fontweight="bold",
        )  # fmt: skip
        page.savefig(out, dpi=140)
        plt.close(page)


def report(study: Study, seeds: int) -> None:
    """The numbers, the picture, and the sections of results/schedules/README.md for this batch."""
    rows = compare(study, seeds)
    if not rows:
        return
    name = study.name
    draw(study, rows, study.folder / f"{name}.png")
    (study.folder / f"{name}_trials.md").write_text(
        f"# Trials at {study.budget} gradients of {study.batch} sequences\n\n{trials_table(study)}"
    )
    plain = [
        {key: vars(value) if isinstance(value, Interval) else value for key, value in row.items() if key != "label"}
        for row in rows
    ]
    (study.folder / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n")
    readme = study.folder / "README.md"
    if readme.exists():
        body = f"{table(rows)}\n![{study.budget} gradients of {study.batch} sequences]({name}.png)"
        readme.write_text(replace_section(readme.read_text(), name, body))
    print(table(rows))


def main(argv: list[str]) -> None:
    """Tune stage by stage, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=2, help="sequences a step [2]")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"gradients of a batch that a run may evaluate [{BUDGET}]")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="evaluation's seeds 0, 1, … [5]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each [1]")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "schedules")
    parser.add_argument("--plan", action="store_true", help="print the runs and end")
    parser.add_argument("--plot-only", action="store_true", help="write the tables and the picture of what is there")
    arguments = parser.parse_args(argv)
    study = Study(arguments.out, arguments.batch, arguments.budget)
    if not arguments.plot_only:
        for stage in range(len(REFINEMENTS) + 1):
            jobs = [job for name in arguments.arms for trials in study.stages(name)[stage : stage + 1] for job in trials]
            if arguments.plan:
                print("\n".join(f"{job.state():8} {' '.join(job.command[1:])}" for job in jobs))
            else:
                run_all(jobs, arguments.jobs)
        found = [study.evaluations(name, arguments.seeds) for name in arguments.arms]
        final = [jobs[seed] for seed in range(arguments.seeds) for jobs in found if jobs]
        if arguments.plan:
            print("\n".join(f"{job.state():8} {' '.join(job.command[1:])}" for job in final))
        else:
            run_all(final, arguments.jobs)
    if not arguments.plan:
        study.folder.mkdir(parents=True, exist_ok=True)
        report(study, arguments.seeds)


if __name__ == "__main__":
    with one_line_errors("schedules", interrupted=GOES_ON):
        main(sys.argv[1:])
