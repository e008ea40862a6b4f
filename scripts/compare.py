"""Compare runs: a table in the terminal, and a page of their curves that any browser can show offline.

    python -m scripts.compare runs/gluon_b512 runs/mvr1_b512
    python -m scripts.compare runs/* --watch                    again every 10 seconds until the runs are done

Runs that differ only in their seed are drawn as one line: their mean, with a band from the lowest to the highest.
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
from common.tables import aligned
from training.curves import AXES, LOSSES, curve, finite, read_config, read_metrics, run_name, unpacked

TEMPLATE = Path(__file__).with_name("compare.html")
# Options that do not change what a run computes.
_ASIDE = (
    "run_name", "results_dir", "overwrite", "resume", "checkpoint_every", "keep_checkpoints", "keep_every", "rank_timeout",
    "wandb", "wandb_project", "tensorboard",
)  # fmt: skip
MOST_POINTS = 2000  # of a curve on the page; more are averaged, because twenty long runs would make a page of 100 MB


@dataclass
class Run:
    """One run: its folder, its saved options, the lines of its metrics."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    label: str = ""


@dataclass
class Group:
    """Runs that differ only in their seed."""

    runs: list[Run]
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> list[Any]:
        return [run.config.get("seed") for run in self.runs]


def read_run(folder: Path) -> Run:
    """A run's options and metrics. Raises UserError if it has no finite validation loss yet."""
    run = Run(folder, read_config(folder), read_metrics(folder))
    if not finite(run.metrics):
        raise UserError(f"{folder / 'metrics.jsonl'} has no finite val_loss yet; leave this run out until its first validation")
    return run


def name_runs(runs: list[Run]) -> None:
    """Label each run with its name or, if others have that name too, with the shortest end of its path that is unique."""
    for run in runs:
        run.label = run_name(run.folder)
    names = [run.label for run in runs]
    for run in runs:
        if names.count(run.label) > 1:
            same = [other.folder.resolve().parts for other in runs if run_name(other.folder) == run_name(run.folder)]
            parts = run.folder.resolve().parts
            depth = next((n for n in range(1, len(parts)) if [p[-n:] for p in same].count(parts[-n:]) == 1), len(parts))
            run.label = "/".join(parts[-depth:])


def group_by_seed(runs: list[Run]) -> list[Group]:
    """Group the runs whose options differ only in the seed. A run without options stays alone."""
    name_runs(runs)
    groups: dict[str, Group] = {}
    for run in runs:
        options = {key: value for key, value in run.config.items() if key not in (*_ASIDE, "seed")}
        key = json.dumps(options, sort_keys=True) if run.config else run.label
        # A seed that the group already has is a repeated run, which goes into another group.
        while key in groups and run.config.get("seed") in groups[key].seeds:
            key += "'"
        groups.setdefault(key, Group([])).runs.append(run)
    found = list(groups.values())
    names = [_common_name(group.runs) for group in found]
    for group, name in zip(found, names, strict=True):
        group.name = name if names.count(name) == 1 else group.runs[0].label
    differing = differing_options(found)
    for group in found:
        group.options = {key: group.runs[0].config.get(key) for key in differing}
    return found


def _common_name(runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0].label
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.label for run in runs), strict=False))
    start = "".join(letters[0] for letters in shared)
    start = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", start)
    parents = {run.folder.resolve().parent for run in runs}
    return start or (parents.pop().name if len(parents) == 1 else "") or runs[0].label


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
    curves = [curve(run.metrics) for run in group.runs]
    if shared := set.intersection(*({record["update"] for record in records} for records in curves)):
        curves = [[record for record in records if record["update"] <= max(shared)] for records in curves]
    lasts = [records[-1] for records in curves]
    bests = [min(records, key=lambda record: (not math.isfinite(record["val_loss"]), record["val_loss"])) for records in curves]
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
    by_update = [{record["update"]: record for record in curve(run.metrics, loss)} for run in group.runs]
    updates = sorted(set.intersection(*(set(records) for records in by_update)))
    rows = [[records[update] for records in by_update] for update in updates]
    columns = {axis: [statistics.fmean(record[axis] for record in row) for row in rows] for axis in AXES}
    losses = [[float(record[loss]) for record in row] for row in rows]
    columns |= {"mean": list(map(statistics.fmean, losses)), "low": list(map(min, losses)), "high": list(map(max, losses))}
    size = -(-len(rows) // MOST_POINTS) or 1
    return {name: [_short(statistics.fmean(part)) for part in _parts(values, size)] for name, values in columns.items()}


def _parts(values: list[float], size: int) -> Iterable[list[float]]:
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


# The command ----------------------------------------------------------------------------------------------------------


def watch(folders: list[Path], out: Path, title: str, seconds: float) -> None:
    """Print the tables and write the page every few seconds, until every run has made all its updates or Ctrl-C."""
    interactive = sys.stdout.isatty()
    while True:
        runs, waiting = [], []
        for folder in folders:
            try:
                runs.append(read_run(folder))
            except UserError:
                if not folder.is_dir():
                    raise
                waiting.append(folder)  # it has not validated yet
        going = [run for run in runs if curve(run.metrics)[-1]["update"] < run.config.get("steps", math.inf)]
        done = not going and not waiting
        if interactive:
            print("\033[H\033[J", end="")
        if runs:
            groups = group_by_seed(runs)
            write_page(out, groups, title, 0 if done else seconds)
            print(tables(groups))
        print(f"\n{out}   {len(going)} of {len(folders)} running, {len(waiting)} before their first validation", flush=True)
        if done:
            return
        time.sleep(seconds)


def main(argv: list[str]) -> None:
    """Read, print, write the page."""
    parser = Parser(prog="compare", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a packed file of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="the page (default: %(default)s)")
    parser.add_argument("--title", default="Runs", help="heading of the page (default: %(default)s)")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="repeat every SECONDS (default: 10)"
    )
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".html":
        raise UserError(f"--out {arguments.out} must be a file that ends in .html")
    if arguments.watch is not None:
        if not 1 <= arguments.watch <= 86400:
            raise UserError(f"--watch {arguments.watch:g} must be from 1 second to a day")
        return watch(arguments.runs, arguments.out, arguments.title, arguments.watch)
    groups = group_by_seed([read_run(folder) for folder in unpacked(arguments.runs)])
    write_page(arguments.out, groups, arguments.title)
    print(tables(groups))
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    with one_line_errors("compare"):
        main(sys.argv[1:])
