"""What would a perfect correction give? MVR-1 without the noise of its correction, as Gluon without momentum on larger batches.

    python -m experiments.limit --jobs 2       run or resume what is missing, and draw; about 10 minutes of two cores
    python -m experiments.limit --plot-only    draw again, from the packed records

If g - ĝ had no noise, the M of MVR-1 with γ = 1 would be an unbiased estimate of the gradient at the present weights, and its
variance (1-β)/(1+β) of a batch's: that of Gluon's average, without the average's lag. A batch of (1+β)/(1-β) times the size has
the same variance and no bias either. So Gluon with β = 0 on such batches is MVR-1 at its best, and stands in for it here. The
runs with 8 sequences a step are those of figures 1 and 3.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors, positive
from common.files import write_text
from common.pictures import COLOURS, INK, LOOK, pyplot
from common.tables import markdown
from experiments.comparison import Arm, Comparison, study_parser
from experiments.figures import GLUON, LR, MVR1, Folders
from experiments.intervals import difference, interval
from experiments.run_jobs import CONTINUES, run_all

TITLE = "The limit of a perfect correction"
BATCH, STEPS = 8, 300
PLACES = (100, 200, STEPS)


def plan(folders: Folders, seeds: int) -> Comparison:
    """Gluon, and for two values of β MVR-1 and its limit."""
    arms = [_on_batches(GLUON, GLUON.label, BATCH)]
    for arm in MVR1[:2]:
        beta = arm.options["momentum"]
        perfect = Arm("gluon_beta0", f"{arm.label}, perfect correction", {**GLUON.options, "momentum": 0.0})
        arms += [
            _on_batches(arm, arm.label, BATCH),
            _on_batches(perfect, perfect.label, round(BATCH * (1 + beta) / (1 - beta))),
        ]
    place, steps = Path("figures") / "mini", {arm.key: STEPS for arm in arms}
    return Comparison(TITLE, tuple(arms), tuple(range(seeds)), steps, folders.runs / place, folders.results / place)


def _on_batches(arm: Arm, label: str, batch: int) -> Arm:
    return Arm(f"b{batch}/{arm.key}", label, {**arm.options, "lr": LR, "batch_size": batch})


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Each arm's loss at the end, and its paired differences from Gluon at PLACES."""
    base, rows = comparison.curves(comparison.baseline), []
    for arm in comparison.arms:
        curves = comparison.curves(arm)
        if curves.keys() & base.keys():
            loss = interval([c.at("updates", STEPS) for c in curves.values()])
            gaps = {u: difference(curves, base, "updates", u)[1] for u in PLACES}
            rows.append({"arm": arm, "curves": curves, "loss": loss, "gaps": gaps})
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [["method", "setting", "seeds", f"loss at {STEPS} [95%]", *(f"minus Gluon, at {u}" for u in PLACES)]]
    for row in rows:
        gaps = [row["gaps"][u].judged if row is not rows[0] else "" for u in PLACES]
        lines.append([row["arm"].label, row["arm"].setting, f"{len(row['curves'])}", row["loss"].level, *gaps])
    head = "Made by `python -m experiments.limit`. Below zero: better than Gluon."
    return "\n".join([f"# {TITLE}", "", head, "", markdown(lines), "![the curves](limit.png)", ""])


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw the mean validation losses against updates."""
    plt = pyplot()
    with plt.rc_context(LOOK):
        figure, panel = plt.subplots(figsize=(8, 4.6), layout="constrained")
        for i, row in enumerate(rows):
            places = [u for u in next(iter(row["curves"].values())).updates if 50 <= u <= STEPS]
            means = [statistics.fmean(c.at("updates", u) for c in row["curves"].values()) for u in places]
            style = "-" if row["arm"].options["batch_size"] == BATCH else "--"
            label = f"{row['arm'].label} ({row['arm'].setting})"
            panel.plot(places, means, style, color=INK if i == 0 else COLOURS[(i - 1) // 2], lw=1.8, label=label)
        panel.set(xlabel="Updates", ylabel="Validation loss")
        panel.legend(frameon=False)
        figure.savefig(out, dpi=130)
        plt.close(figure)


def main(argv: list[str]) -> None:
    """Run what is missing, then write the page and the picture."""
    parser = study_parser("limit", __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0 on [3]")
    parser.add_argument("--plot-only", action="store_true", help="draw what is there")
    arguments = parser.parse_args(argv)
    folders = Folders(arguments.runs, arguments.results)
    comparison = plan(folders, arguments.seeds)
    if not arguments.plot_only:
        run_all(comparison.jobs(), arguments.jobs)
    rows = rows_of(comparison)
    if not rows:
        raise UserError("no run of Gluon is done yet; leave out --plot-only")
    out = folders.results / "limit"
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, out / "limit.png")
    write_text(out / "README.md", page(rows))
    print(page(rows))


if __name__ == "__main__":
    with one_line_errors("experiments.limit", interrupted=CONTINUES):
        main(sys.argv[1:])
