"""The figures of "Muon is Provably Faster with Momentum Variance Reduction": run or resume what is missing, and draw.

    python scripts/reproduce.py --figure 3 --scale mini --jobs 2     two cores; needs scripts/sweep.py's best.json
    python scripts/reproduce.py --figure 1 --dry-run                 what it would run at full size, and what that costs
    python scripts/reproduce.py --figure 1                           GPUs, FineWeb: configs/*.py as they are
    python scripts/reproduce.py --figure 4 --scale mini --plot-only  draw again

Figures 1 and 2 compare Gluon with MVR-1 at B = 512 and B = 128, figure 3 with MVR-2, figure 4 with MVR-3 at α = 0.8 and
q = 0.5, whose meaning is open: three readings are run. `full` is GPT-124M on FineWeb-10B by the reference recipe. `mini` is
the same experiment on the byte model of configs/quickstart_gluon.py: 8 sequences stand for B = 512, 2 for B = 128; settings
are the sweep's best of each method, figure 4's readings keep their α and q at Gluon's best lr, and MVR-3 and the nested
form at their own best stand beside them. A seed is the initial weights and the order of the data, the same for all methods.

Three comparisons with Gluon, paired by seed, with 95% intervals (Student's t): at equal updates, at equal gradient
evaluations and at equal seconds. At mini scale the baseline of a two-gradient method runs twice as long, so that the
variant's end is compared with the Gluon that has used as much; elsewhere the curves are read where the shorter budget ends
(fair at a constant lr). Mini seconds are gradient evaluations times the calibrated time of one, plus the optimizer's
(scripts/calibrate.py); full ones are measured. Everything after `--` goes to train_gpt.py.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError, one_line_errors
from scripts.plot import COLOURS, INK, LOOK
from scripts.run_jobs import GOES_ON, ROOT, Job, records, run_all, validations
from scripts.statistics_of_runs import (
    TWO_GRADIENTS,
    Cost,
    Curve,
    Interval,
    Speed,
    Trial,
    cost,
    equal_evaluations,
    equal_seconds,
    equal_updates,
    flops_per_token,
    gradient_evaluations,
    interval,
    largest_rise,
    paired,
    replace_section,
)
from scripts.sweep import CONFIG, options_of
from training.config import Config, load_config

MINI_STEPS = {8: 200, 2: 400}
MINI_VAL_EVERY = {8: 10, 2: 20}


@dataclass(frozen=True)
class Series:
    """A line of a figure. `config` makes it at full size; `reading` fixes β, γ and q at mini scale, else they are tuned."""

    key: str
    label: str
    method: str
    config: str = ""
    reading: Trial | None = None


@dataclass(frozen=True)
class Figure:
    """Baseline first. `batch` is the mini scale's sequences a step."""

    title: str
    batch: int
    series: tuple[Series, ...]


READINGS = (
    Series("mvr3_beta08", "MVR-3 (a) β 0.8, γ 0.5", "mvr3", "mvr3_b512", Trial(0.0, momentum=0.8, gamma=0.5)),
    Series("mvr3_beta02", "MVR-3 (b) β 0.2, γ 0.5", "mvr3", "mvr3_b512_beta02", Trial(0.0, momentum=0.2, gamma=0.5)),
    Series("nested_beta08", "(c) nested, α 0.8, q 0.5", "nested", "mvr3_b512_nested", Trial(0.0, momentum=0.8, q=0.5)),
)
GLUON = Series("gluon", "Gluon", "gluon", "gluon_b512")
FIGURES = {
    1: Figure("Figure 1: Gluon and MVR-1, B = 512", 8, (GLUON, Series("mvr1", "MVR-1", "mvr1", "mvr1_b512"))),
    2: Figure(
        "Figure 2: Gluon and MVR-1, B = 128",
        2,
        (Series("gluon", "Gluon", "gluon", "gluon_b128"), Series("mvr1", "MVR-1", "mvr1", "mvr1_b128")),
    ),
    3: Figure("Figure 3: Gluon and MVR-2, B = 512", 8, (GLUON, Series("mvr2", "MVR-2", "mvr2", "mvr2_b512"))),
    4: Figure(
        "Figure 4: Gluon and MVR-3 in three readings, B = 512",
        8,
        (GLUON, *READINGS, Series("mvr3", "MVR-3, tuned", "mvr3"), Series("nested", "nested, tuned", "nested")),
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to run for a figure at a scale: for each series and seed a job, and how far its curve is read."""

    figure: Figure
    scale: str
    seeds: tuple[int, ...]
    steps: int
    jobs: dict[tuple[str, int], Job]
    configs: dict[str, Config]
    missing: tuple[str, ...]  # series whose settings the sweep has not found yet

    @property
    def series(self) -> list[Series]:
        return [series for series in self.figure.series if series.key in self.configs]


def make_plan(number: int, scale: str, seeds: int, steps: int | None, results: Path, best: Path, extra: dict[str, str]) -> Plan:
    """The jobs of a figure, seed by seed, so that a figure that is cut short has whole seeds."""
    figure = FIGURES[number]
    tuned = _tuned(best, figure.batch) if scale == "mini" else {}
    jobs, configs, missing = {}, {}, []
    length = steps or (MINI_STEPS[figure.batch] if scale == "mini" else 0)
    two = any(series.method in TWO_GRADIENTS for series in figure.series)
    for series in figure.series:
        if scale == "full":
            if not series.config:
                continue
            config, options, folder = f"configs/{series.config}.py", {}, results / "full" / series.config
            if steps:
                options["steps"] = steps
            launcher = _torchrun()
        else:
            trial = _setting(series, tuned)
            if trial is None:
                missing.append(series.label)
                continue
            longer = 2 if two and series.method == "gluon" else 1
            config, folder, launcher = CONFIG, results / "mini" / f"b{figure.batch}" / series.key, ()
            options = {
                **options_of(series.method), **trial, "batch_size": figure.batch, "steps": longer * length,
                "val_every": MINI_VAL_EVERY[figure.batch], "val_tokens": 16384,
                "checkpoint_every": max(1, length // 2), "keep_checkpoints": 1,
            }  # fmt: skip
        options |= extra
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        configs[series.key] = load_config(["--config", str(ROOT / config), *words])
        options["steps"] = configs[series.key].steps
        length = length or options["steps"]
        for seed in range(seeds):
            jobs[series.key, seed] = Job(folder / f"seed{seed}", config, {**options, "seed": seed}, launcher)
    ordered = {(key, seed): jobs[key, seed] for seed in range(seeds) for key in configs}
    return Plan(figure, scale, tuple(range(seeds)), length, ordered, configs, tuple(missing))


def _tuned(best: Path, batch: int) -> dict[str, dict[str, float]]:
    try:
        return json.loads(best.read_text()).get(f"b{batch}", {})
    except OSError:
        raise UserError(f"{best} is not there; tune first: python scripts/sweep.py") from None


def _setting(series: Series, tuned: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """Options of a mini run: a reading's own β, γ and q at Gluon's lr, else the sweep's best."""
    found = tuned.get("gluon" if series.reading else series.method)
    if found is None:
        return None
    if series.reading:
        return {**series.reading.options(series.method), "lr": found["lr"]}
    return {name: found[name] for name in Trial(0.0).options(series.method)}


def _torchrun() -> tuple[str, ...]:
    """How train_gpt.py starts on this machine's GPUs."""
    import torch

    count = torch.cuda.device_count()
    return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}") if count > 1 else ()


# What it costs --------------------------------------------------------------------------------------------------------


def dry_run(plan: Plan, speed: Speed | None) -> str:
    """The runs on paper."""
    rows = [("run", "B", "updates", "tokens", "shards", "gradients", *_time_heads(plan))]
    totals = [0.0, 0.0, 0]
    for series in plan.series:
        config = plan.configs[series.key]
        paper = cost_of(series.method, config)
        times = _times(plan, series, config, paper, speed)
        rows.append(
            (series.config if plan.scale == "full" else series.key, f"{config.batch_size}", f"{paper.updates:,}",
             f"{paper.tokens:,}", f"{paper.shards}", f"{paper.evaluations:,}", *map(_duration, times))
        )  # fmt: skip
        totals = [totals[0] + times[0], totals[1] + times[-1], max(totals[2], paper.shards)]
    seeds = len(plan.seeds)
    sums = [seeds * total for total in totals[: len(_time_heads(plan))]]
    rows.append((f"all, {seeds} seed{'s' if seeds > 1 else ''}", "", "", "", f"{totals[2]}", "", *map(_duration, sums)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    notes = [plan.figure.title + f", {plan.scale}", "", *lines, ""]
    if plan.scale == "full":
        config = next(iter(plan.configs.values()))
        mega = _flops(config) / 1e6
        notes.append(
            f"Time: {mega:.0f} MFLOP a token and gradient, a third of it for the {config.val_tokens:,} tokens of each "
            "validation,\nat an assumed 40% of the 989 TFLOP/s (bfloat16) of an H100 or H200. "
            f"Data: python -m data.fineweb --shards {totals[2]}"
        )
    else:
        notes.append(
            "Time: one core, from results/mini/calibration.json." if speed
            else "Time: assuming 8,000 tokens a second and gradient on one core; scripts/calibrate.py measures it."
        )  # fmt: skip
        notes += [f"No setting yet for {', '.join(plan.missing)}: run scripts/sweep.py"] if plan.missing else []
    notes += ["", *(" ".join(["python", *job.command[1:]]) for (_, seed), job in plan.jobs.items() if seed == 0)]
    return "\n".join(notes)


def cost_of(method: str, config: Config) -> Cost:
    """A run's cost from its config."""
    return cost(
        method, config.steps, config.batch_size, config.seq_len, _flops(config),
        validations=config.steps // config.val_every + 1, val_tokens=config.val_tokens,
    )  # fmt: skip


def _flops(config: Config) -> int:
    return flops_per_token(config.vocab_size, config.n_layer, config.d_model, config.seq_len)


def _time_heads(plan: Plan) -> tuple[str, ...]:
    return ("1 GPU", "8 GPUs") if plan.scale == "full" else ("1 core",)


def _times(plan: Plan, series: Series, config: Config, paper: Cost, speed: Speed | None) -> tuple[float, ...]:
    if plan.scale == "full":
        return paper.seconds(1), paper.seconds(8)
    if speed is None:
        return (paper.evaluations * config.batch_size * config.seq_len / 8000,)
    return (speed.seconds(series.method, paper.updates),)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# What came out --------------------------------------------------------------------------------------------------------


def read_curves(plan: Plan, series: Series) -> dict[int, Curve]:
    """The curves of the seeds that are done, by seed; a run that diverged stays at infinity."""
    curves = {}
    for seed in plan.seeds:
        job = plan.jobs[series.key, seed]
        state, found = job.state(), validations(job.folder)
        end = int(job.options["steps"])
        found = {update: loss for update, loss in sorted(found.items()) if update <= end}
        if state == "diverged":
            step = plan.configs[series.key].val_every
            found |= {update: math.inf for update in range(0, end + 1, step) if update not in found}
        elif not found or max(found) < (plan.steps if series.method == "gluon" else end):
            continue
        curves[seed] = Curve(tuple(found), tuple(found.values()))
    return curves


def read_speed(plan: Plan, calibration: Path) -> Speed | None:
    """Calibrated seconds at mini scale; at full size, what the runs themselves took."""
    if plan.scale == "mini":
        try:
            found = json.loads(calibration.read_text())["batches"][str(plan.figure.batch)]
        except (OSError, KeyError):
            return None
        return Speed(found["gradient"], found["update"])
    each: dict[str, list[float]] = {}
    for (key, _), job in plan.jobs.items():
        method = next(series.method for series in plan.series if series.key == key)
        if lines := [record for record in records(job.folder / "metrics.jsonl") if record["update"]]:
            each.setdefault(method, []).append(lines[-1]["seconds"] / lines[-1]["update"])
    return Speed(0.0, {method: statistics.fmean(values) for method, values in each.items()}) if "gluon" in each else None


def compare(plan: Plan, speed: Speed | None) -> list[dict]:
    """One row a series: its loss and its paired differences to the baseline."""
    base = read_curves(plan, plan.series[0]) if plan.series else {}
    rows = []
    for series in plan.series:
        curves = read_curves(plan, series)
        if not curves:
            continue
        config = plan.configs[series.key]
        row = {
            "series": series.key, "label": series.label, "method": series.method, "seeds": sorted(curves),
            "lr": config.lr, "momentum": config.momentum, "gamma": config.gamma, "inner": config.inner,
            "updates": plan.steps, "loss": interval([curve.at(plan.steps) for curve in curves.values()]),
            "rise": statistics.fmean(largest_rise(curve.losses[1:]) for curve in curves.values()),
        }  # fmt: skip
        common = curves.keys() & base.keys()
        if series.method != "gluon" and common:
            row["equal_updates"] = _difference(common, lambda s, c=curves: equal_updates(c[s], base[s]))
            row["equal_evaluations"] = _difference(
                common, lambda s, c=curves, m=series.method: equal_evaluations(m, c[s], base[s])
            )
            if speed and series.method in speed.update:
                row["equal_seconds"] = _difference(
                    common, lambda s, c=curves, m=series.method: equal_seconds(m, c[s], base[s], speed)
                )
        rows.append(row)
    return rows


def _difference(seeds: set[int], read: Callable[[int], tuple[float, float, float]]) -> dict:
    """Variant minus baseline over the seeds; the budget is the least that all of them reach."""
    values = {seed: read(seed) for seed in seeds}
    return {
        "budget": min(budget for budget, _, _ in values.values()),
        "difference": paired({s: v for s, (_, v, _) in values.items()}, {s: b for s, (_, _, b) in values.items()}),
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown. A difference below zero is in the variant's favour."""
    lines = [
        "| method | setting | seeds | validation loss [95%] | minus Gluon at equal updates | at equal gradient evaluations | "
        "at equal seconds | largest rise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    units = {"equal_updates": "updates", "equal_evaluations": "gradients", "equal_seconds": "s"}
    for row in rows:
        setting = f"lr {row['lr']:g}, β {row['momentum']:g}"
        if row["method"] in ("mvr1", "mvr2", "mvr3"):
            setting += f", γ {row['gamma']:g}"
        setting += f", q {row['inner']:g}" if row["method"] == "nested" else ""
        loss: Interval = row["loss"]
        cells = [row["label"], setting, f"{len(row['seeds'])}", loss.level + f" at {row['updates']}"]
        for key, unit in units.items():
            if key not in row:
                cells.append("" if row["method"] == "gluon" else "–")
                continue
            difference: Interval = row[key]["difference"]
            text = str(difference) if math.isfinite(difference.mean) else "diverged"
            cells.append(f"{text} **{difference.verdict}** ({row[key]['budget']:.0f} {unit})")
        cells.append(f"{row['rise']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(plan: Plan, speed: Speed | None, out: Path) -> None:
    """Above, the mean validation loss; below, the paired difference to Gluon with its 95% band; against the three costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {series.key: read_curves(plan, series) for series in plan.series}
    seconds = "Calibrated seconds" if plan.scale == "mini" else "Seconds"
    labels = ["Updates", "Gradient evaluations"] + ([seconds] if speed else [])
    base = curves[plan.series[0].key]

    def costs(method: str, updates: float) -> list[float]:
        return [updates, gradient_evaluations(method, updates)] + ([speed.seconds(method, updates)] if speed else [])

    def back(axis: int, value: float) -> float:
        """The baseline's updates at a cost."""
        return value if axis < 2 else speed.updates_for("gluon", value)

    with plt.rc_context({**LOOK, "axes.formatter.use_mathtext": False}):
        page, panels = plt.subplots(
            2, len(labels), figsize=(4.4 * len(labels), 6.6), sharex="col", squeeze=False,
            height_ratios=(1.7, 1), layout="constrained",
        )  # fmt: skip
        tops, lows, differences = [], [], [[] for _ in labels]
        for i, series in enumerate(plan.series):
            if not (own := curves[series.key]):
                continue
            colour, style = (
                (INK, "-") if series.method == "gluon" else (COLOURS[(i - 1) % len(COLOURS)], "-" if i < 4 else "--")
            )
            updates = sorted(set.intersection(*(set(curve.updates) for curve in own.values())))
            losses = [statistics.fmean(curve.at(update) for curve in own.values()) for update in updates]
            pairs = sorted(own.keys() & base.keys())
            shown = [
                loss for update, loss in zip(updates, losses, strict=True) if update >= plan.steps / 5 and math.isfinite(loss)
            ]
            lows += shown
            tops += shown[:1]
            at = [loss for update, loss in zip(updates, losses, strict=True) if update == plan.steps]
            end = f": {at[0]:.3f}" if at else ""
            for axis in range(len(labels)):
                x = [costs(series.method, update)[axis] for update in updates]
                keep = [j for j, update in enumerate(updates) if axis or update <= plan.steps]
                panels[0][axis].plot(
                    [x[j] for j in keep], [losses[j] for j in keep], style, color=colour, linewidth=1.8, marker="o",
                    markersize=3, markeredgewidth=0, label=f"{series.label}{end}",
                )  # fmt: skip
                if series.method == "gluon" or not pairs:
                    continue
                points = []
                for j, update in enumerate(updates):
                    other = back(axis, x[j])
                    if update and all(other <= base[seed].updates[-1] for seed in pairs):
                        gap = interval([own[seed].at(update) - base[seed].at(other) for seed in pairs])
                        points.append((x[j], gap))
                        ends = [end for end in (gap.low, gap.mean, gap.high) if math.isfinite(end)]
                        differences[axis] += ends if update >= plan.steps / 5 else []
                places = [place for place, _ in points]
                panels[1][axis].plot(places, [gap.mean for _, gap in points], style, color=colour, linewidth=1.5)
                if len(pairs) > 1:
                    ends = [gap.low for _, gap in points], [gap.high for _, gap in points]
                    panels[1][axis].fill_between(places, *ends, color=colour, alpha=0.13, linewidth=0)
        for axis, label in enumerate(labels):
            panels[1][axis].axhline(0, color=INK, linewidth=1)
            panels[1][axis].set_xlabel(label)
            panels[1][axis].set_xlim(left=0)
            for row in (0, 1):
                panels[row][axis].tick_params(length=0)
        panels[0][0].set_ylabel("Validation loss")
        panels[1][0].set_ylabel("Minus Gluon (95%)")
        for axis in range(len(labels)):
            if lows:
                low, high = min(lows), max(tops)
                panels[0][axis].set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
            low, high = min([0.0, *differences[axis]]), max([0.0, *differences[axis]])
            margin = 0.3 * (high - low) or 0.1
            panels[1][axis].set_ylim(low - margin, high + margin)
        seeds = sorted({len(own) for own in curves.values() if own})
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        page.suptitle(f"{plan.figure.title} ({plan.scale}, mean of {many} seeds)", fontsize=13, fontweight="bold")
        lines, names = panels[0][0].get_legend_handles_labels()
        page.legend(lines, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        page.savefig(out, dpi=140)
        plt.close(page)


def write(number: int, plan: Plan, results: Path, speed: Speed | None) -> str:
    """The picture, the table and the numbers of a figure, and its section of results/README.md."""
    if wrong := next(filter(None, (job.changed() for job in plan.jobs.values())), ""):
        raise UserError(wrong)
    rows = compare(plan, speed)
    if not rows:
        raise UserError(f"no run of figure {number} is done yet; leave out --plot-only")
    folder = results / plan.scale
    draw(plan, speed, folder / f"figure{number}.png")
    text = table(rows)
    (folder / f"figure{number}.md").write_text(f"# {plan.figure.title} ({plan.scale})\n\n{text}\n![](figure{number}.png)\n")
    plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
    (folder / f"figure{number}.json").write_text(json.dumps(plain, indent=1) + "\n")
    readme = results / "README.md"
    if readme.exists():
        body = f"{text}\n![{plan.figure.title}]({plan.scale}/figure{number}.png)"
        readme.write_text(replace_section(readme.read_text(), f"{plan.scale} figure {number}", body))
    return text


def _plain(value: object) -> object:
    """An interval as a dictionary, ready for JSON (which has no infinity)."""
    if isinstance(value, Interval):
        return {key: item if math.isfinite(item) else None for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _extra(words: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as a dictionary."""
    options, i = {}, 0
    while i < len(words):
        if not words[i].startswith("--"):
            raise UserError(f"{words[i]!r} belongs to no option; after -- write options of train_gpt.py as --key value")
        name, equals, value = words[i][2:].partition("=")
        if not equals:
            i += 1
            if i == len(words):
                raise UserError(f"--{name} needs a value")
            value = words[i]
        options[name.replace("-", "_")] = value
        i += 1
    return options


def main(argv: list[str]) -> None:
    """Plan; print, or run; draw."""
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--figure", type=int, choices=tuple(FIGURES), required=True)
    parser.add_argument("--scale", choices=("full", "mini"), default="full")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, … (default: 1 at full size, 5 at mini)")
    parser.add_argument(
        "--steps", type=int, help=f"updates (default: the config's; mini: {MINI_STEPS[8]}, B = 128 {MINI_STEPS[2]})"
    )
    parser.add_argument("--only", nargs="+", help="run these series alone (by the name of their folder)")
    parser.add_argument("--jobs", type=int, default=1, help="mini runs at once, one thread each [1]")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where results are [results]")
    parser.add_argument("--best", type=Path, help="the sweep's settings [RESULTS/sweep/best.json]")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and what it costs")
    parser.add_argument("--plot-only", action="store_true", help="draw what is there")
    arguments = parser.parse_args(own)
    seeds = arguments.seeds or (5 if arguments.scale == "mini" else 1)
    best = arguments.best or arguments.results / "sweep" / "best.json"
    plan = make_plan(arguments.figure, arguments.scale, seeds, arguments.steps, arguments.results, best, _extra(extra))
    calibration = arguments.results / "mini" / "calibration.json"
    if arguments.dry_run:
        print(dry_run(plan, read_speed(plan, calibration) if plan.scale == "mini" else None))
        return
    if not arguments.plot_only:
        if plan.missing:
            raise UserError(f"no setting yet for {', '.join(plan.missing)}; run scripts/sweep.py first")
        if plan.scale == "full":
            print(dry_run(plan, None))
            _need_gpu()
        wanted = [job for (key, _), job in plan.jobs.items() if not arguments.only or key in arguments.only]
        run_all(wanted, arguments.jobs if plan.scale == "mini" else 1)
    print(write(arguments.figure, plan, arguments.results, read_speed(plan, calibration)))


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("the full size needs a GPU; --scale mini runs on a CPU, --dry-run says what full would take")


if __name__ == "__main__":
    with one_line_errors("reproduce", interrupted=GOES_ON):
        main(sys.argv[1:])
