"""Write tables from the packed records: results/README.md's leaderboard and figures, and README.md's answer.

python -m experiments.leaderboard            rewrite the text between the pages' markers
python -m experiments.leaderboard --check    list the sections that differ from the records; exit code 2 if there is one
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import Parser, UserError, one_line_errors
from common.tables import markdown
from experiments import figures, sweep
from experiments.comparison import RESULTS, RUNS, compare, read_speed, replace_section, section
from experiments.figures import FIGURES, SMALL, Folders
from experiments.intervals import BUDGETS, Interval, difference, mean_curve

NOT_RUN = "Not run yet: `{}`."


def evaluated(folders: sweep.Place) -> list[dict[str, Any]]:
    """A row for each method at its best setting, lowest loss at equal updates first; no rows if Gluon has no run yet.

    A row of `compare` also gets `worth`, the updates after which Gluon's mean curve is where the method's is (and the ends of
    the interval of their difference), `behind_best`, the difference from the first row's method, and `decayed`, the row of the
    same setting with a linear decay.
    """
    comparisons = sweep.evaluation(folders)
    if not comparisons or not comparisons[0].curves(comparisons[0].baseline):
        return []
    comparison = comparisons[0]
    speed = read_speed(folders.calibration, folders.batch, comparison.arms)
    rows = sorted(compare(comparison, speed), key=lambda row: row["loss"].mean)
    arms = {arm.key: arm for arm in comparison.arms}
    gluon, best = (comparison.curves(arm) for arm in (comparison.baseline, arms[rows[0]["arm"]]))
    course = mean_curve(gluon.values())
    decayed = {row["arm"]: row for row in compare(sweep.evaluation(folders, decay=True)[0], None)}
    for row in rows:
        curves = comparison.curves(arms[row["arm"]])
        gap = row["equal_updates"]["difference"] if "equal_updates" in row else Interval(0.0, 0.0, 0.0, len(gluon))
        start = course.at("updates", row["updates"])
        row["worth"] = [course.reached(start + loss) for loss in (gap.mean, gap.high, gap.low)]
        row["course"], row["decayed"] = course.end("updates"), decayed.get(row["arm"])
        if row is not rows[0] and curves.keys() & best.keys():
            row["behind_best"] = difference(curves, best, "updates", row["updates"])[1]
    return rows


def leaderboard(rows: list[dict[str, Any]], command: str) -> str:
    """The full comparison, with the sweep's command that made each row."""
    heads = ["method", "setting", "validation loss [95%]", "updates", "gradients", "seconds"]
    gaps = ["minus Gluon: equal updates", "equal gradients", "equal seconds", "minus the best: equal updates"]
    lines = [[*heads, "worth in updates of Gluon", *gaps, "with linear decay", "minus Gluon", "command"]]
    for row in rows:
        cells = [row["label"], row["setting"], row["loss"].level]
        cells += [f"{row['updates']:,}", f"{row['passes']:,.0f}", f"{row['seconds']:,.0f}"]
        method = row["arm"] if row["arm"] in sweep.METHODS else row["options"]["optimizer"]
        behind = row["behind_best"].judged if "behind_best" in row else ""
        cells += [_worth(row), *_gaps(row, BUDGETS), behind, *_decayed(row)]
        lines.append([*cells, f"`{command} --evaluate --methods {method}`"])
    return _table(lines, command)


def answer(rows: list[dict[str, Any]], command: str) -> str:
    """A short form of the leaderboard, for README.md."""
    lines = [["method", "best setting", "loss [95%]", "gradients", "minus Gluon: equal updates", "equal gradients"]]
    for row in (row for row in rows if row["arm"] in sweep.SHORT):
        cells = [row["label"], row["setting"], row["loss"].level, f"{row['passes']:,.0f}"]
        lines.append([*cells, *_gaps(row, ("updates", "passes"))])
    return _table(lines, command)


def _gaps(row: dict[str, Any], budgets: Iterable[str]) -> list[str]:
    gaps = [row.get(f"equal_{budget}") for budget in budgets]
    return [gap["difference"].judged if gap else "" for gap in gaps]


def _decayed(row: dict[str, Any]) -> list[str]:
    """The loss with a linear decay, and its difference from Gluon's."""
    decayed = row["decayed"]
    return [decayed["loss"].level, *_gaps(decayed, ("updates",))] if decayed else ["", ""]


def _worth(row: dict[str, Any]) -> str:
    """The updates of Gluon that a method is worth, with their interval."""
    mean, low, high = (f"{at:,.0f}" if math.isfinite(at) else f"> {row['course']:,.0f}" for at in row["worth"])
    return mean if low == high else f"{mean} [{low}, {high}]"


def _table(lines: list[list[str]], command: str) -> str:
    return markdown(lines) if len(lines) > 1 else NOT_RUN.format(f"{command} && {command} --evaluate")


def figure_sections(folders: Folders) -> dict[str, str]:
    """The sections of the figures on the small model, by name, and how their differences change with the noise."""
    found, lines = {}, [["figure", "method", "minus Gluon at 8 or 2 sequences", "at 64 or 16 sequences"]]
    for number, figure in FIGURES.items():
        gaps: dict[str, list[str]] = {arm.label: [] for arm in figure.variants}
        for scale in SMALL:
            comparison = figures.plan(number, scale, 5, None, folders, {})
            base = comparison.curves(comparison.baseline)
            if base and any(map(comparison.curves, comparison.arms[1:])):
                speed = read_speed(folders.calibration, figure.batch[scale], comparison.arms)
                found[f"{scale} figure {number}"] = figures.page_of(comparison, number, scale, speed)
            else:
                command = f"python -m experiments.figures --figure {number} --scale {scale}"
                found[f"{scale} figure {number}"] = NOT_RUN.format(command)
            for arm in comparison.arms[1:]:
                own = comparison.curves(arm)
                gap = difference(own, base, "updates", figures.MATCHED_STEPS)[1].judged if own.keys() & base.keys() else ""
                gaps[arm.label].append(gap)
        lines += [[f"{number}", label, *cells] for label, cells in gaps.items()]
    return {**found, "noise": markdown(lines)}


def pages(folders: Folders) -> dict[Path, dict[str, str]]:
    """The generated sections of each page, by name."""
    places = (sweep.Place(folders.runs, folders.results, batch) for batch in (sweep.BATCH, sweep.NEAR_NOISE))
    (rows, command), near = ((evaluated(place), place.command) for place in places)
    tables = {"leaderboard": leaderboard(rows, command), "leaderboard near the noise scale": leaderboard(*near)}
    return {
        folders.results / "README.md": {**tables, **figure_sections(folders)},
        folders.results.parent / "README.md": {"answer": answer(rows, command)},
    }


def stale(folders: Folders | None = None) -> list[str]:
    """The sections that are missing or differ from the records."""
    folders = folders or Folders()
    return [
        f"{name} of {page.relative_to(folders.results.parent)}"
        for page, own in pages(folders).items()
        for name, text in own.items()
        if section(page.read_text(), name) != text.strip()
    ]


def main(argv: list[str]) -> None:
    """Rewrite or check the page."""
    parser = Parser(prog="experiments.leaderboard", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are [results]")
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args(argv)
    folders = Folders(RUNS, arguments.results)
    if arguments.check:
        if wrong := stale(folders):
            raise UserError(f"{', '.join(wrong)}: differs from the records; run python -m experiments.leaderboard")
        return
    written = pages(folders)
    for page, own in written.items():
        for name, text in own.items():
            replace_section(page, name, text)
    print(written[folders.results / "README.md"]["leaderboard"])


if __name__ == "__main__":
    with one_line_errors("experiments.leaderboard"):
        main(sys.argv[1:])
