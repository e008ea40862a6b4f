"""Compare runs: a table in the terminal, a page of their curves that any browser can show offline, and a picture.

    python -m scripts.compare runs/gluon_b512 runs/mvr1_b512
    python -m scripts.compare runs/* --png curves.png           a picture too
    python -m scripts.compare runs/* --watch                    again every 10 seconds until the runs are done
    python -m scripts.compare results/figures/mini/b8/*.jsonl   packed files of runs too

Runs that differ only in their seed are drawn as one line: their mean, with a band from the lowest to the highest. A method that
takes two gradients per update looks too good against updates alone, so curves are also drawn against gradient evaluations and
seconds.
"""

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from common.errors import Parser, UserError, one_line_errors
from common.files import write_text
from common.pictures import COLOURS, LOOK, STYLES, pyplot
from common.tables import aligned
from reading.runs import AXES, LOSSES, Run, read_runs

TEMPLATE = Path(__file__).with_name("compare.html")
# Options that do not change what a run computes.
_ASIDE = (
    "run_name", "results_dir", "overwrite", "resume", "other_data", "checkpoint_every", "keep_checkpoints", "keep_every",
    "rank_timeout", "wandb", "wandb_project", "tensorboard",
)  # fmt: skip
MOST_POINTS = 2000  # of a curve; more are averaged, because twenty long runs would make a page of 100 MB


@dataclass
class Group:
    """Runs that differ only in their seed, with their labels."""

    runs: list[Run]
    labels: list[str]
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> list[Any]:
        return [run.config.get("seed") for run in self.runs]


def read_groups(paths: Iterable[Path]) -> list[Group]:
    """The runs at these paths, grouped. Raises UserError if one has no finite validation loss yet."""
    runs = read_runs(paths)
    for run in runs:
        if not run.finite():
            raise UserError(f"{run.source} has no finite val_loss yet; leave this run out until its first validation")
    return group_by_seed(runs)


def labels_of(runs: list[Run]) -> list[str]:
    """The label of each run; where several have the same, the shortest end of its path that is unique."""
    labels = [run.label for run in runs]
    return [label if labels.count(label) == 1 else _place(run, runs) for run, label in zip(runs, labels, strict=True)]


def _place(run: Run, runs: list[Run]) -> str:
    same = [_parts(other) for other in runs if other.label == run.label]
    parts = _parts(run)
    depth = next((n for n in range(1, len(parts)) if [p[-n:] for p in same].count(parts[-n:]) == 1), len(parts))
    return "/".join(parts[-depth:])


def _parts(run: Run) -> tuple[str, ...]:
    return (*run.path.resolve().parts, *([run.name] if run.packed else []))


def group_by_seed(runs: list[Run]) -> list[Group]:
    """Group the runs whose options differ only in the seed. A run without options stays alone."""
    groups: dict[str, Group] = {}
    for run, label in zip(runs, labels_of(runs), strict=True):
        options = {key: value for key, value in run.config.items() if key not in (*_ASIDE, "seed")}
        key = json.dumps(options, sort_keys=True) if run.config else label
        # A seed that the group already has is a repeated run, which goes into another group.
        while key in groups and run.config.get("seed") in groups[key].seeds:
            key += "'"
        group = groups.setdefault(key, Group([], []))
        group.runs.append(run)
        group.labels.append(label)
    found = list(groups.values())
    names = [_common_name(group) for group in found]
    for group, name in zip(found, names, strict=True):
        group.name = name if names.count(name) == 1 else group.labels[0]
    differing = differing_options(found)
    for group in found:
        group.options = {key: group.runs[0].config.get(key) for key in differing}
    return found


def _common_name(group: Group) -> str:
    if len(group.runs) == 1:
        return group.labels[0]
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*group.labels, strict=False))
    start = "".join(letters[0] for letters in shared)
    start = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", start)
    parents = {run.path.resolve().parent for run in group.runs}
    return start or (parents.pop().name if len(parents) == 1 else "") or group.labels[0]


def differing_options(groups: list[Group]) -> list[str]:
    """The options in which the groups differ, in the order of the config."""
    configs = [group.runs[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if key not in (*_ASIDE, "seed"))
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


# The terminal ---------------------------------------------------------------------------------------------------------


def figures(group: Group) -> dict[str, str]:
    """A group's figures as text: the mean over its seeds, and for losses also the standard deviation.

    If some seeds are further on than others, all are read at the last update that all have.
    """
    curves = [run.curve() for run in group.runs]
    if shared := set.intersection(*({point["update"] for point in points} for points in curves)):
        curves = [[point for point in points if point["update"] <= max(shared)] for points in curves]
    lasts = [points[-1] for points in curves]
    bests = [min(points, key=lambda point: (not math.isfinite(point["val_loss"]), point["val_loss"])) for points in curves]
    speeds = [last["tokens"] / last["seconds"] for last in lasts if last["seconds"] > 0]

    def mean(key: str) -> str:
        value = statistics.fmean(last[key] for last in lasts)
        return f"{value:,.1f}" if key == "seconds" else f"{value:,.0f}"

    at = statistics.fmean(best["update"] for best in bests)
    return {
        "final": _loss([last["val_loss"] for last in lasts]),
        "best": f"{_loss([best['val_loss'] for best in bests])} at {at:,.0f}",
        "updates": mean("update"),
        "gradients": mean("passes"),
        "tokens": mean("tokens"),
        "seconds": mean("seconds"),
        "tokens/s": f"{statistics.fmean(speeds):,.0f}" if speeds else "-",
    }


def _loss(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "not finite"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def tables(groups: list[Group]) -> str:
    """A table of what the runs reached, and below it a table of the options in which they differ."""
    of = [figures(group) for group in groups]
    several = any(len(group.runs) > 1 for group in groups)
    head = ["run", *(["seeds"] if several else []), *of[0]]
    rows = [
        [group.name, *([str(len(group.runs))] if several else []), *row.values()] for group, row in zip(groups, of, strict=True)
    ]
    text = aligned([head, *rows])
    if options := list(groups[0].options):
        text += "\n\n" + aligned([["run", *options], *([g.name, *(_text(g.options[key]) for key in options)] for g in groups)])
    return text


# The page -------------------------------------------------------------------------------------------------------------


def page_data(groups: list[Group]) -> dict[str, Any]:
    """All that the page shows, ready for JSON."""
    return {
        "axes": AXES,
        "groups": [
            {
                "name": group.name,
                "seeds": group.seeds if len(group.runs) > 1 else [],
                "figures": figures(group),
                "options": {key: _text(value) for key, value in group.options.items()},
                **{loss: drawn(group, loss) for loss in LOSSES},
            }
            for group in groups
        ],
    }


def drawn(group: Group, loss: str) -> dict[str, list[float | None]]:
    """A group's curve by axis, with `mean`, `low` and `high` over its seeds at the updates that all of them have.

    Each axis is averaged over the seeds too, because the seconds differ. A loss that is not finite becomes None.
    """
    by_update = [{point["update"]: point for point in run.curve(loss)} for run in group.runs]
    updates = sorted(set.intersection(*(set(points) for points in by_update)))
    rows = [[points[update] for points in by_update] for update in updates]
    columns = {axis: [statistics.fmean(point[axis] for point in row) for row in rows] for axis in AXES}
    losses = [[float(point[loss]) for point in row] for row in rows]
    columns |= {"mean": list(map(statistics.fmean, losses)), "low": list(map(min, losses)), "high": list(map(max, losses))}
    size = -(-len(rows) // MOST_POINTS) or 1
    return {name: [_short(statistics.fmean(part)) for part in _pieces(values, size)] for name, values in columns.items()}


def _pieces(values: list[float], size: int) -> Iterable[list[float]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _short(value: float) -> float | None:
    """The value to seven digits, the precision of a float32 loss; None if it is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def write_page(out: Path, groups: list[Group], title: str, reload_seconds: float = 0) -> None:
    """Write the page. It reloads itself if `reload_seconds` is not 0. Raises UserError if it can't be written."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("plotly is not installed; install it with: python -m pip install -r requirements.txt") from None
    data = page_data(groups) | {"title": title, "reload": reload_seconds}
    # Escape "<", so that no name can end the script element.
    parts = {"@DATA@": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"), "@PLOTLY@": get_plotlyjs()}
    page = re.sub("|".join(parts), lambda match: parts[match[0]], TEMPLATE.read_text(encoding="utf-8"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None


# The picture ----------------------------------------------------------------------------------------------------------

PANELS = {"update": "Updates", "passes": "Gradient evaluations", "seconds": "Seconds"}


def draw(groups: list[Group], out: Path, title: str) -> None:
    """Draw the validation losses against each of `PANELS`, side by side. Raises UserError if the file can't be written."""
    plt = pyplot()
    curves = [{key: _numbers(values) for key, values in drawn(group, "val_loss").items()} for group in groups]
    with plt.rc_context({**LOOK, "text.parse_math": False}):  # so that "$" in a run's name is not read as math
        figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharey=True, layout="constrained")
        for panel, (key, label) in zip(panels, PANELS.items(), strict=True):
            for i, (group, curve) in enumerate(zip(groups, curves, strict=True)):
                x, mean = curve[key], curve["mean"]
                colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
                ends = [loss for loss in mean if math.isfinite(loss)][-1:]
                last = f"{ends[0]:.3f}" if ends else "not finite"
                panel.plot(
                    x, mean, style, color=colour, linewidth=1.8, marker="o" if len(x) <= 40 else None, markersize=3.5,
                    markeredgewidth=0, label=f" {group.name}  ({last})",  # a leading underscore would hide it
                )  # fmt: skip
                panel.plot(x[-1:], mean[-1:], "o", color=colour, markersize=6, markeredgecolor="white")
                if len(group.runs) > 1:
                    panel.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
            panel.set_xlabel(label, labelpad=6)
            panel.set_xlim(left=0)
            panel.margins(x=0.03)
            panel.xaxis.set_major_locator(plt.MaxNLocator(6, integer=key != "seconds"))
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
            panel.tick_params(length=0)
        panels[0].set_ylabel("Validation loss", labelpad=6)
        panels[0].set_ylim(*y_limits([list(zip(curve["update"], curve["mean"], strict=True)) for curve in curves]))
        figure.suptitle(title, fontsize=14, fontweight="bold")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        lines, labels = panels[0].get_legend_handles_labels()
        columns = max(1, min(len(groups), 140 // (max(map(len, labels)) + 6)))
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=160)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            plt.close(figure)


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def y_limits(curves: list[list[tuple[float, float]]]) -> tuple[float | None, float | None]:
    """Limits of the loss axis that show the ends of the curves of (update, loss) pairs.

    The first fifth of a curve may be cut off, and so may a run that diverges. (None, None) if no loss is finite.
    """
    found = [[pair for pair in curve if math.isfinite(pair[1])] for curve in curves]
    lows, tops = [], []
    for curve, points in zip(curves, found, strict=True):
        if points:
            lows.append(min(loss for _, loss in points))
            tops.append(max([loss for update, loss in points if update >= curve[-1][0] / 5] or [loss for _, loss in points]))
    if not lows:
        return None, None
    low, span = min(lows), min(tops) - min(lows)
    high = min(max(tops), low + 3 * span) if span > 0 else max(tops)
    margin = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin


# The command ----------------------------------------------------------------------------------------------------------


def watch(paths: list[Path], out: Path, png: Path | None, title: str, seconds: float) -> None:
    """Print the tables and write the page every few seconds, until every run has made all its updates or Ctrl-C."""
    interactive = sys.stdout.isatty()
    while True:
        found = [run for path in paths for run in (read_runs([path]) if not _is_new(path) else [])]
        runs = [run for run in found if run.finite()]
        waiting = sum(map(_is_new, paths)) + len(found) - len(runs)
        going = [run for run in runs if run.curve()[-1]["update"] < run.config.get("steps", math.inf)]
        done = not going and not waiting
        if interactive:
            print("\033[H\033[J", end="")
        if runs:
            show(group_by_seed(runs), out, png, title, 0 if done else seconds)
        print(f"\n{out}   {len(going)} of {len(runs) + waiting} running, {waiting} before their first validation", flush=True)
        if done:
            return
        time.sleep(seconds)


def _is_new(path: Path) -> bool:
    """Whether this is the folder of a run that has written no metrics yet."""
    return path.is_dir() and not (path / "metrics.jsonl").exists()


def show(groups: list[Group], out: Path, png: Path | None, title: str, reload_seconds: float = 0) -> None:
    """Write the page and the picture, and print the tables."""
    write_page(out, groups, title, reload_seconds)
    if png:
        draw(groups, png, title)
    print(tables(groups))


def picture_file(path: Path, option: str) -> Path:
    """The path if it can be a picture's; else raises UserError."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{option} {path} must be a file that ends in .png, .pdf or .svg")
    return path


def main(argv: list[str]) -> None:
    """Read, print, write the page and the picture."""
    parser = Parser(prog="compare", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a packed file of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="the page (default: %(default)s)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also write a picture: .png, .pdf or .svg")
    parser.add_argument("--title", default="Runs", help="heading of the page (default: %(default)s)")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="repeat every SECONDS (default: 10)"
    )
    arguments = parser.parse_args(argv)
    out, png, title = arguments.out, arguments.png, arguments.title
    if out.suffix != ".html":
        raise UserError(f"--out {out} must be a file that ends in .html")
    if png is not None:
        picture_file(png, "--png")
    if arguments.watch is not None:
        if not 1 <= arguments.watch <= 86400:
            raise UserError(f"--watch {arguments.watch:g} must be from 1 second to a day")
        return watch(arguments.runs, out, png, title, arguments.watch)
    show(read_groups(arguments.runs), out, png, title)
    print("\n" + "\n".join(str(path) for path in (out, png) if path))


if __name__ == "__main__":
    with one_line_errors("compare"):
        main(sys.argv[1:])
