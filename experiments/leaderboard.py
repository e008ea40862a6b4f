"""Write the tables of results/README.md from the packed records: the leaderboard, and the figures at mini scale.

python -m experiments.leaderboard            rewrite what stands between the page's marks
python -m experiments.leaderboard --check    say what is not what the records say; exit code 2 if anything is not
"""

import sys
from pathlib import Path

from common.errors import Parser, UserError, one_line_errors
from common.tables import markdown
from experiments import figures, sweep
from experiments.comparison import RESULTS, RUNS, compare, read_speed, replace_section, section
from experiments.figures import FIGURES, Folders

NOT_RUN = "Not run yet: `{}`."


def leaderboard(folders: Folders) -> str:
    """A row for each method at its best setting, lowest loss at equal updates first."""
    command = "python -m experiments.sweep --evaluate"
    comparisons = sweep.evaluation(folders)
    if not comparisons or not comparisons[0].curves(comparisons[0].baseline):
        return NOT_RUN.format(f"python -m experiments.sweep && {command}")
    comparison = comparisons[0]
    speed = read_speed(_calibration(folders), sweep.BATCH, comparison.arms)
    heads = ["method", "setting", "validation loss [95%]", "updates", "gradients", "seconds"]
    lines = [[*heads, "minus Gluon: equal updates", "equal gradients", "equal seconds", "command"]]
    for row in sorted(compare(comparison, speed), key=lambda row: row["loss"].mean):
        cells = [row["label"], row["setting"], row["loss"].level]
        cells += [f"{row['updates']:,}", f"{row['passes']:,.0f}", f"{row['seconds']:,.0f}"]
        for budget in ("updates", "passes", "seconds"):
            gap = row.get(f"equal_{budget}")
            cells.append(f"{gap['difference']} **{gap['difference'].verdict}**" if gap else "")
        method = row["arm"] if row["arm"] in sweep.METHODS else row["options"]["optimizer"]
        lines.append([*cells, f"`{command} --methods {method}`"])
    return markdown(lines)


def sections(folders: Folders) -> dict[str, str]:
    """The marked sections of the page, by name."""
    found = {"leaderboard": leaderboard(folders)}
    for number, figure in FIGURES.items():
        comparison = figures.plan(number, "mini", 5, None, folders, {})
        if comparison.curves(comparison.baseline) and any(map(comparison.curves, comparison.arms[1:])):
            speed = read_speed(_calibration(folders), figure.batch["mini"], comparison.arms)
            found[f"mini figure {number}"] = figures.page_of(comparison, number, "mini", speed)
        else:
            found[f"mini figure {number}"] = NOT_RUN.format(f"python -m experiments.figures --figure {number} --scale mini")
    return found


def stale(folders: Folders | None = None) -> list[str]:
    """The sections of results/README.md that are not there, or not what the records say."""
    folders = folders or Folders()
    page = (folders.results / "README.md").read_text()
    return [name for name, text in sections(folders).items() if section(page, name) != text.strip()]


def _calibration(folders: Folders) -> Path:
    return folders.results / "figures" / "calibration.json"


def main(argv: list[str]) -> None:
    """Rewrite or check the page."""
    parser = Parser(prog="experiments.leaderboard", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are [results]")
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args(argv)
    folders = Folders(RUNS, arguments.results)
    if arguments.check:
        if wrong := stale(folders):
            raise UserError(f"{', '.join(wrong)}: not what the records say; run python -m experiments.leaderboard")
        return
    for name, text in sections(folders).items():
        replace_section(folders.results / "README.md", name, text)
    print(leaderboard(folders))


if __name__ == "__main__":
    with one_line_errors("experiments.leaderboard"):
        main(sys.argv[1:])
