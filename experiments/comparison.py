"""Arms compared with a baseline: runs, paired differences at equal updates, gradients and seconds, table and picture."""

import json
import math
import statistics
import textwrap
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import Parser, UserError, as_written, positive
from common.files import write_text
from common.jsons import jsonable
from common.pictures import COLOURS, INK, LOOK, STYLES, pyplot
from common.tables import markdown
from experiments.intervals import BUDGETS, Curve, difference, interval, largest_rise, to_reach
from experiments.run_jobs import ROOT, Job
from reading.runs import Run
from training.optimizers import is_deferred, optimizer_class

CONFIG = "configs/mini_gluon.py"  # the mini scale
RESULTS = ROOT / "results"
RUNS = ROOT / "runs"
UNITS = {"updates": "updates", "passes": "gradients", "seconds": "s"}

Curves = Mapping[int, Curve]  # by seed


def study_parser(name: str, about: str) -> Parser:
    """The command line of a study that runs train_gpt.py, with the options that all of them have."""
    parser = Parser(prog=f"experiments.{name}", description=about.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once on a CPU, one thread each [1]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs go [runs]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go [results]")
    return parser


@dataclass(frozen=True)
class Arm:
    """A line of a figure. `key` names its folder and file, `label` is for readers, `options` are those of train_gpt.py."""

    key: str
    label: str
    options: Mapping[str, Any]
    config: str = CONFIG

    @property
    def setting(self) -> str:
        """The options that distinguish an arm, in symbols."""
        symbols = {"lr": "lr", "momentum": "β", "q": "q", "gamma": "γ", "beta1": "β₁", "batch_size": "B"}
        symbols |= {"embed_radius": "radius", "weight_decay": "decay"}
        shown = {name: value for name, value in self.options.items() if (name, value) != ("weight_decay", 0)}
        return ", ".join(f"{symbol} {shown[name]:g}" for name, symbol in symbols.items() if name in shown)


@dataclass(frozen=True)
class Comparison:
    """Arms (the baseline first), seeds, and the folders of runs and records. `steps`: updates of each arm.

    Records are in `records`/ARM.jsonl, so that several comparisons can share an arm.
    """

    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: Mapping[str, int]
    runs: Path
    records: Path

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    @property
    def end(self) -> int:
        """The update at which the arms are compared: the end of the shortest."""
        return min(self.steps.values())

    def job(self, arm: Arm, seed: int) -> Job:
        options = {**arm.options, "steps": self.steps[arm.key], "seed": seed}
        return Job(self.runs / arm.key / f"seed{seed}", self.records / f"{arm.key}.jsonl", arm.config, options)

    def jobs(self) -> list[Job]:
        """The jobs seed by seed, so that an interrupted comparison has complete seeds."""
        return [self.job(arm, seed) for seed in self.seeds for arm in self.arms]

    def finished(self, arm: Arm) -> dict[int, Run]:
        """The finished runs, by seed."""
        jobs = {seed: self.job(arm, seed) for seed in self.seeds}
        return {seed: run for seed, job in jobs.items() if job.finished(run := job.read())}

    def curves(self, arm: Arm, speed: Mapping[str, Any] | None = None) -> dict[int, Curve]:
        """The curves of the finished runs, by seed. `speed` is a calibration; None takes the runs' own seconds."""
        pace = speed and (speed["gradient"], speed["update"][arm.key])
        share = arm.options.get("batch_size", 1) / self.baseline.options.get("batch_size", 1)
        with as_written(self.records / f"{arm.key}.jsonl", "restore it, or remove it to run again"):
            return {seed: curve_of(run, self.steps[arm.key], share, pace) for seed, run in self.finished(arm).items()}


def curve_of(run: Run, steps: int, share: float = 1.0, speed: tuple[float, float] | None = None) -> Curve:
    """A run's validations up to `steps`. After a divergence the loss is infinite.

    `passes` become the gradients that it took to reach the weights (`to_reach`); in the metrics of MVR-1, -2 or -3 only the
    last line counts so. Seconds that were measured in the run stay as they are: before the end they include the step in which
    the weights were validated.

    `share`: this run's batch over the baseline's, which is the weight of one gradient. `speed`: calibrated seconds of a
    gradient of the baseline, and of an update of this run without its gradients.
    """
    points = [point for point in run.curve() if point["update"] <= steps]
    if _deferred(run.config["optimizer"]):
        points = [
            point if _at_the_end(point, run.config) else point | {"passes": to_reach(point["update"], point["passes"])}
            for point in points
        ]
    if run.diverged is not None:
        last = points[-1] if points else {"update": 0, "passes": 0, "seconds": 0.0}
        passes = last["passes"] / last["update"] if last["update"] else 1.0
        points.append({"update": steps, "passes": passes * steps, "seconds": math.inf, "val_loss": math.inf})
    updates, passes = [float(point["update"]) for point in points], [share * float(point["passes"]) for point in points]
    if speed:
        seconds = [p * speed[0] + u * speed[1] for u, p in zip(updates, passes, strict=True)]
    else:
        seconds = [point["seconds"] for point in points]
    losses = [point["val_loss"] if math.isfinite(point["val_loss"]) else math.inf for point in points]
    return Curve(tuple(updates), tuple(passes), tuple(seconds), tuple(losses))


def _deferred(name: str) -> bool:
    """Whether an optimizer defers its updates. One whose package is not installed is none of ours, and does not."""
    with suppress(UserError):
        return is_deferred(optimizer_class(name))
    return False


def _at_the_end(point: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a line was written after a run's last step."""
    return point["update"] + point.get("skipped", 0) == config["steps"]


def read_speed(path: Path, batch: int, arms: tuple[Arm, ...]) -> dict[str, Any] | None:
    """Calibrated seconds of a gradient and of each arm's update (experiments.calibrate); None if one is missing."""
    if not path.exists():
        return None
    with as_written(path, "make it again with python -m experiments.calibrate, or remove it"):
        found = json.loads(path.read_text())
        gradient, update = found["gradient"].get(str(batch)), found["update"]
        if gradient is None or not all(arm.key in update for arm in arms):
            return None
        return {"gradient": float(gradient), "update": {arm.key: float(update[arm.key]) for arm in arms}}


def compare(comparison: Comparison, speed: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One row for each arm: its loss, and its paired differences from the baseline."""
    base = comparison.curves(comparison.baseline, speed)
    rows = []
    for arm in comparison.arms:
        curves = comparison.curves(arm, speed)
        if not curves:
            continue
        end = comparison.end
        some = next(iter(curves.values()))
        row = {
            "arm": arm.key, "label": arm.label, "setting": arm.setting, "options": dict(arm.options),
            "command": comparison.job(arm, comparison.seeds[0]).line,
            "seeds": sorted(curves), "updates": end, "passes": spent(some, "passes", end),
            "seconds": spent(some, "seconds", end),
            "loss": interval([c.at("updates", end) for c in curves.values()]),
            "rise": statistics.fmean(largest_rise(c.losses[1:]) for c in curves.values()),
        }  # fmt: skip
        if arm is not comparison.baseline and curves.keys() & base.keys():
            for budget in BUDGETS:
                at, gap = difference(curves, base, budget)
                row[f"equal_{budget}"] = {"budget": at, "difference": gap}
        rows.append(row)
    return rows


def spent(curve: Curve, budget: str, updates: float) -> float:
    """How much of a budget a run had spent at an update."""
    return replace(curve, losses=getattr(curve, budget)).at("updates", updates)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown. A difference below zero means that the variant is better."""
    heads = ["method", "setting", "seeds", "validation loss [95%]", f"minus {rows[0]['label']}, at equal updates"]
    lines = [[*heads, "at equal gradients", "at equal seconds", "largest rise"]]
    for row in rows:
        cells = [row["label"], row["setting"], f"{len(row['seeds'])}", f"{row['loss'].level} at {row['updates']:,}"]
        for budget, unit in UNITS.items():
            if f"equal_{budget}" not in row:
                cells.append("")
                continue
            gap = row[f"equal_{budget}"]
            cells.append(f"{gap['difference'].judged} ({gap['budget']:,.0f} {unit})")
        lines.append([*cells, f"{row['rise']:.3f}"])
    return markdown(lines)


def section(page: str, name: str) -> str | None:
    """The text between `<!-- name -->` and `<!-- end of name -->`; None if the page lacks these markers."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return page.partition(begin)[2].partition(end)[0].strip() if begin in page and end in page else None


def replace_section(page: Path, name: str, text: str) -> None:
    """Replace the text between the markers of `section`; a page without them stays as it is."""
    held = page.read_text() if page.exists() else ""
    if section(held, name) is not None:
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, _, rest = held.partition(begin)
        write_text(page, f"{head}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}")


def body(comparison: Comparison, speed: Mapping[str, Any] | None, picture: str, notes: list[str]) -> str:
    """A comparison as Markdown: table, notes, how it was made, picture."""
    rows = compare(comparison, speed)
    seeds = ", ".join(map(str, sorted({seed for row in rows for seed in row["seeds"]})))
    runs = [run for arm in comparison.arms for run in comparison.finished(arm).values()]
    device, threads, torch = (
        " and ".join(dict.fromkeys(str(run.environment.get(name, "?")) for run in runs)) or "?"
        for name in ("device", "threads", "torch")
    )
    if len({len(row["seeds"]) for row in rows}) > 1:
        seeds += " (a row with fewer has the first of these)"
    made = (
        f"Seeds {seeds}; {device}, {threads} thread(s) a run, torch {torch}; "
        f"seconds are {'calibrated' if speed else 'measured in the runs'}."
    )
    points = [_wrapped(note, "- ", "  ") for note in notes]
    return "\n".join([table(rows), *points, "", _wrapped(made), "", f"![{comparison.title}]({picture})"])


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def write(
    comparison: Comparison, speed: Mapping[str, Any] | None, out: Path, notes: list[str], shown: Collection[str] | None = None
) -> str:
    """The numbers, the picture and the page of a comparison: `out` with .json, .png and .md. Returns the page.

    `shown`: the arms in the picture, by key; None: all.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    arms = tuple(arm for arm in comparison.arms if shown is None or arm.key in shown)
    draw(replace(comparison, arms=arms), speed, out.with_suffix(".png"))
    page = body(comparison, speed, f"{out.name}.png", notes)
    write_text(out.with_suffix(".md"), f"# {comparison.title}\n\n{page}\n")
    write_text(out.with_suffix(".json"), json.dumps(jsonable(compare(comparison, speed)), indent=1, ensure_ascii=False) + "\n")
    return page


def draw(comparison: Comparison, speed: Mapping[str, Any] | None, out: Path) -> None:
    """Draw the mean validation loss and, below it, the paired difference from the baseline with a 95% band, for each budget."""
    plt = pyplot()
    curves = {arm.key: comparison.curves(arm, speed) for arm in comparison.arms}
    base, end = curves[comparison.baseline.key], comparison.end
    with plt.rc_context({**LOOK, "axes.formatter.use_mathtext": False}):
        page, panels = plt.subplots(2, 3, figsize=(13.2, 6.6), sharex="col", height_ratios=(1.7, 1), layout="constrained")
        lows, tops, gaps = [], [], {budget: [0.0] for budget in BUDGETS}
        for i, arm in enumerate(comparison.arms):
            if not (own := curves[arm.key]):
                continue
            colour = INK if arm is comparison.baseline else COLOURS[(i - 1) % len(COLOURS)]
            style = STYLES[max(i - 1, 0) // len(COLOURS) % len(STYLES)]
            places = sorted(set.intersection(*(set(c.updates) for c in own.values())))
            means = {u: statistics.fmean(c.at("updates", u) for c in own.values()) for u in places}
            late = [loss for u, loss in means.items() if u >= end / 5 and math.isfinite(loss)]
            lows, tops = lows + late, tops + late[:1]
            label = arm.label + (f": {means[end]:.3f}" if end in means else "")
            pairs = sorted(own.keys() & base.keys())
            for column, budget in enumerate(BUDGETS):
                x = {u: statistics.fmean(spent(c, budget, u) for c in own.values()) for u in places}
                shown = [u for u in places if column or u <= end]
                panels[0][column].plot(
                    [x[u] for u in shown], [means[u] for u in shown], style, color=colour, lw=1.8, label=label
                )
                if arm is comparison.baseline or not pairs:
                    continue
                least, points = min(base[s].end(budget) for s in pairs), {}
                for u in places[1:]:
                    at = {s: spent(own[s], budget, u) for s in pairs}
                    if math.isfinite(x[u]) and max(at.values()) <= least:
                        points[x[u]] = interval([own[s].at("updates", u) - base[s].at(budget, at[s]) for s in pairs])
                        ends = (points[x[u]].low, points[x[u]].mean, points[x[u]].high)
                        gaps[budget] += [e for e in ends if math.isfinite(e)] if u >= end / 5 else []
                panels[1][column].plot(points.keys(), [gap.mean for gap in points.values()], style, color=colour, lw=1.5)
                if len(pairs) > 1:
                    band = [gap.low for gap in points.values()], [gap.high for gap in points.values()]
                    panels[1][column].fill_between(list(points), *band, color=colour, alpha=0.13, lw=0)
        names = {
            "updates": "Updates",
            "passes": "Gradient evaluations",
            "seconds": "Calibrated seconds" if speed else "Seconds",
        }
        for column, budget in enumerate(BUDGETS):
            panels[1][column].axhline(0, color=INK, lw=1)
            panels[1][column].set(xlabel=names[budget], xlim=(0, None))
            low, high = min(gaps[budget]), max(gaps[budget])
            margin = 0.3 * (high - low) or 0.1
            panels[1][column].set_ylim(low - margin, high + margin)
            if lows:
                low, high = min(lows), max(tops)
                panels[0][column].set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
            for row in (0, 1):
                panels[row][column].tick_params(length=0)
        panels[0][0].set_ylabel("Validation loss")
        panels[1][0].set_ylabel(f"Minus {comparison.baseline.label} (95%)")
        page.suptitle(f"{comparison.title}, mean of {max(map(len, curves.values()))} seeds", fontsize=13, fontweight="bold")
        page.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        page.savefig(out, dpi=140)
        plt.close(page)
