"""Where does the correction pay? Maps the loss of MVR-1 and MVR-2 minus Gluon's over lr and the weight of the new gradient.

    python -m experiments.beta_lr --plan              what would run, and for how long
    python -m experiments.beta_lr --jobs 2            run or resume, and draw; about 1.5 hours of one core
    python -m experiments.beta_lr --plot-only         draw again, from the packed records

MVR-1 (γ = 1) runs over (lr, β) and is compared with Gluon at the same lr and β. MVR-2 runs over (lr, q) at β = 0.9 and is
compared with Gluon at that lr and β = 0.9. Both maps show two horizons, a fifth of the run and its end; the lr is constant, so
the start of a run is the same as a shorter run.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors, positive
from common.files import write_text
from common.jsons import jsonable
from common.pictures import INK, LOOK, pyplot
from common.tables import markdown
from experiments.comparison import CONFIG, study_parser
from experiments.figures import ASSUMED_TOKENS, Folders, duration
from experiments.intervals import interval
from experiments.run_jobs import CONTINUES, ROOT, Job, plan_of, run_all
from experiments.setup import evaluations
from training.config import load_config

LRS = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)
BETAS = (0.05, 0.2, 0.5, 0.8, 0.9)
QS = (0.2, 0.35, 0.5, 0.8)
WEIGHTS = {"mvr1": tuple(sorted(round(1 - beta, 6) for beta in BETAS)), "mvr2": QS}  # of the new gradient; rows of a map
STEPS, SHARE = 600, 5  # the long horizon, and how much shorter the other is
BATCH = 8

Cell = tuple[str, float, float]  # method, lr, and β (gluon, mvr1) or q (mvr2)


def cells() -> list[Cell]:
    """All runs of one seed. Gluon's runs at β = 0.9 serve both maps."""
    gluon = [("gluon", lr, beta) for lr in LRS for beta in BETAS]
    return gluon + [("mvr1", lr, beta) for lr in LRS for beta in BETAS] + [("mvr2", lr, q) for lr in LRS for q in QS]


def job_of(folders: Folders, cell: Cell, seed: int, steps: int) -> Job:
    """The run of a cell."""
    method, lr, value = cell
    knob = {"momentum": 0.9, "q": value} if method == "mvr2" else {"momentum": value}
    options = {
        "optimizer": method, "lr": lr, **knob, **({"gamma": 1.0} if method == "mvr1" else {}), "batch_size": BATCH,
        "steps": steps, "seed": seed, "val_every": steps // SHARE, "log_every": steps // SHARE,
        "checkpoint_every": 0, "keep_checkpoints": 1,
    }  # fmt: skip
    name = f"lr{lr:g}_{'q' if method == 'mvr2' else 'beta'}{value:g}_seed{seed}"
    return Job(folders.runs / "map" / method / name, folders.results / "map" / f"{method}.jsonl", CONFIG, options)


def losses(folders: Folders, steps: int, seeds: int) -> dict[tuple[Cell, int], dict[int, float]]:
    """Validation losses at both horizons of every finished run; infinite where it diverged."""
    found = {}
    for cell in cells():
        for seed in range(seeds):
            job = job_of(folders, cell, seed, steps)
            run = job.read()
            ends = {update: job.loss_at(run, update) for update in (steps // SHARE, steps)}
            if not math.isnan(ends[steps]):
                found[cell, seed] = ends
    return found


def differences(found: dict[tuple[Cell, int], dict[int, float]], horizon: int) -> list[dict[str, Any]]:
    """A row for each cell of the two maps: method minus Gluon, paired by seed."""
    rows = []
    for method, lr, value in cells():
        base = ("gluon", lr, 0.9 if method == "mvr2" else value)
        seeds = [seed for cell, seed in found if cell == (method, lr, value) and (base, seed) in found]
        if method != "gluon" and seeds:
            gaps = [_gap(found[(method, lr, value), seed][horizon], found[base, seed][horizon]) for seed in seeds]
            weight = value if method == "mvr2" else round(1 - value, 6)
            rows.append({"method": method, "lr": lr, "weight": weight, "horizon": horizon, "difference": interval(gaps)})
    return rows


def _gap(variant: float, baseline: float) -> float:
    return variant - baseline if math.isfinite(variant) and math.isfinite(baseline) else math.inf


def page(rows: list[dict[str, Any]]) -> str:
    """The maps as Markdown."""
    names = {"mvr1": "MVR-1 minus Gluon at the same β; rows: 1-β", "mvr2": "MVR-2 minus Gluon, β = 0.9; rows: q"}
    seeds = max(row["difference"].n for row in rows)
    made = f"Made by `python -m experiments.beta_lr`, {seeds} seed{'s' * (seeds > 1)}. Below zero: the correction helps."
    out = ["# Where the correction pays", "", made]
    out.append("")
    for horizon in sorted({row["horizon"] for row in rows}):
        for method, name in names.items():
            mine = [row for row in rows if row["method"] == method and row["horizon"] == horizon]
            table = [["", *(f"lr {lr:g}" for lr in LRS)]]
            for weight in WEIGHTS[method]:
                line = {
                    row["lr"]: str(row["difference"]).removesuffix(" (one seed)") for row in mine if row["weight"] == weight
                }
                table.append([f"{weight:g}", *(line.get(lr, "") for lr in LRS)])
            if mine:
                below = sum(row["difference"].mean < 0 for row in mine)
                count = f"The correction lowers the loss in {below} of {len(mine)} cells."
                out += [f"## {name}, {horizon:,} updates", "", markdown(table), count, ""]
    return "\n".join([*out, "![the maps](map.png)", ""])


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw four maps: two methods, two horizons."""
    plt = pyplot()
    horizons = sorted({row["horizon"] for row in rows})
    finite = [abs(row["difference"].mean) for row in rows if math.isfinite(row["difference"].mean)]
    most = sorted(finite)[int(0.8 * (len(finite) - 1))] if finite else 1.0
    with plt.rc_context({**LOOK, "axes.grid": False}):
        figure, panels = plt.subplots(len(horizons), 2, figsize=(11, 4 * len(horizons)), layout="constrained", squeeze=False)
        for i, horizon in enumerate(horizons):
            for j, method in enumerate(("mvr1", "mvr2")):
                panel, mine = panels[i][j], [row for row in rows if (row["method"], row["horizon"]) == (method, horizon)]
                weights = WEIGHTS[method]
                grid = [[math.nan] * len(LRS) for _ in weights]
                for row in mine:
                    x, y, mean = LRS.index(row["lr"]), weights.index(row["weight"]), row["difference"].mean
                    grid[y][x] = min(max(mean, -most), most)
                    shown = f"{mean:+.3f}" if math.isfinite(mean) else "diverged"
                    colour = "white" if abs(grid[y][x]) > 0.7 * most else INK
                    panel.text(x, y, shown, ha="center", va="center", fontsize=9, color=colour)
                picture = panel.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", aspect="auto", alpha=0.8)
                panel.set_xticks(range(len(LRS)), [f"{lr:g}" for lr in LRS])
                panel.set_yticks(range(len(weights)), [f"{weight:g}" for weight in weights])
                panel.set(xlabel="lr", ylabel="1-β" if method == "mvr1" else "q")
                name = "MVR-1 minus Gluon at this β" if method == "mvr1" else "MVR-2 minus Gluon, β = 0.9"
                panel.set_title(f"{name}, {horizon:,} updates", fontsize=11, loc="left")
                panel.tick_params(length=0)
        figure.colorbar(picture, ax=panels, label="validation loss minus Gluon's", shrink=0.7)
        figure.savefig(out, dpi=130)
        plt.close(figure)


def main(argv: list[str]) -> None:
    """Run what is missing, then write the maps."""
    parser = study_parser("beta_lr", __doc__)
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"the long horizon, a multiple of {SHARE} [{STEPS}]")
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds, from 0 on [1]")
    parser.add_argument("--plan", action="store_true", help="print the runs and stop")
    parser.add_argument("--plot-only", action="store_true", help="draw what is there")
    arguments = parser.parse_args(argv)
    folders, steps = Folders(arguments.runs, arguments.results), arguments.steps
    if steps % SHARE:
        raise UserError(f"--steps {steps} must be a multiple of {SHARE}: the short horizon is a {SHARE}th of it")
    jobs = [job_of(folders, cell, seed, steps) for seed in range(arguments.seeds) for cell in cells()]
    if arguments.plan:
        print(plan_of(jobs))
        passes = sum(evaluations(job.options["optimizer"], steps) for job in jobs)
        tokens = passes * BATCH * load_config(["--config", str(ROOT / CONFIG)]).seq_len
        print(f"{len(jobs)} runs, {passes:,} gradients: {duration(tokens / ASSUMED_TOKENS)} of one core")
        return
    if not arguments.plot_only:
        run_all(jobs, arguments.jobs)
    found = losses(folders, steps, arguments.seeds)
    rows = [row for horizon in (steps // SHARE, steps) for row in differences(found, horizon)]
    if not rows:
        raise UserError("no pair of runs is done yet; leave out --plot-only")
    out = folders.results / "map"
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, out / "map.png")
    write_text(out / "map.json", json.dumps(jsonable(rows), indent=1) + "\n")
    write_text(out / "README.md", page(rows))
    print(page(rows))


if __name__ == "__main__":
    with one_line_errors("experiments.beta_lr", interrupted=CONTINUES):
        main(sys.argv[1:])
