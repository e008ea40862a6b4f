"""Draw the validation loss of any number of runs against updates, gradient evaluations and seconds, side by side.

    python -m scripts.plot runs/gluon_b512 runs/mvr2_b512 --out curves.png
    python -m scripts.plot results/figures/mini/b8/*.jsonl        packed files of runs too

A method that takes two gradients per update looks too good against updates alone, so all three are shown. The last numbers
are also printed as a table.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import Parser, UserError, one_line_errors
from common.pictures import COLOURS, LOOK, STYLES, pyplot
from common.tables import aligned
from training.curves import curve, read_metrics, run_name, unpacked

AXES = {"update": "Updates", "passes": "Gradient evaluations", "seconds": "Seconds"}


@dataclass
class Run:
    """The validations of a run, in order."""

    name: str
    update: list[float]
    passes: list[float]
    seconds: list[float]
    val_loss: list[float]


def read_run(folder: Path) -> Run:
    """The validations of a run. Raises UserError if none is finite yet."""
    points = curve(read_metrics(folder))
    if not any(math.isfinite(point["val_loss"]) for point in points):
        raise UserError(f"{folder / 'metrics.jsonl'} has no finite val_loss yet; leave this run out until its first validation")
    return Run(run_name(folder), *([point[key] for point in points] for key in (*AXES, "val_loss")))


def y_limits(runs: list[Run]) -> tuple[float, float]:
    """Limits of the loss axis that show the end of the curves. Their first fifth, and a diverging run, may be cut off."""
    low = min(loss for run in runs for loss in run.val_loss if math.isfinite(loss))
    tops = [max(_tail(run)) for run in runs]
    span = min(tops) - low
    high = min(max(tops), low + 3 * span) if span > 0 else max(tops)
    margin = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin


def _tail(run: Run) -> list[float]:
    """The finite losses after the first fifth of the run; all finite losses if there are none after it."""
    finite = [pair for pair in zip(run.update, run.val_loss, strict=True) if math.isfinite(pair[1])]
    return [loss for update, loss in finite if update >= run.update[-1] / 5] or [loss for _, loss in finite]


def last(run: Run) -> float:
    """The last finite validation loss."""
    return next(loss for loss in reversed(run.val_loss) if math.isfinite(loss))


def draw(runs: list[Run], out: Path, title: str) -> None:
    """Write the picture."""
    plt = pyplot()
    with plt.rc_context({**LOOK, "text.parse_math": False}):  # so that "$" in a run's name is not read as math
        figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharey=True, layout="constrained")
        for panel, (key, label) in zip(panels, AXES.items(), strict=True):
            for i, run in enumerate(runs):
                x = getattr(run, key)
                colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
                panel.plot(
                    x,
                    run.val_loss,
                    style,
                    color=colour,
                    linewidth=1.8,
                    marker="o" if len(x) <= 40 else None,
                    markersize=3.5,
                    markeredgewidth=0,
                    label=f" {run.name}  ({last(run):.3f})",  # a leading underscore would hide it
                )
                panel.plot(x[-1:], run.val_loss[-1:], "o", color=colour, markersize=6, markeredgecolor="white")
            panel.set_xlabel(label, labelpad=6)
            panel.set_xlim(left=0)
            panel.margins(x=0.03)
            panel.xaxis.set_major_locator(plt.MaxNLocator(6, integer=key != "seconds"))
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
            panel.tick_params(length=0)
        panels[0].set_ylabel("Validation loss", labelpad=6)
        panels[0].set_ylim(*y_limits(runs))
        figure.suptitle(title, fontsize=14, fontweight="bold")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        lines, labels = panels[0].get_legend_handles_labels()
        columns = max(1, min(len(runs), 140 // (max(map(len, labels)) + 6)))
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=160)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            plt.close(figure)


def table(runs: list[Run]) -> str:
    """Each run's last validation, aligned."""
    rows = [("run", "val loss", "updates", "gradients", "seconds")]
    rows += [
        (run.name, f"{last(run):.4f}", f"{run.update[-1]:,.0f}", f"{run.passes[-1]:,.0f}", f"{run.seconds[-1]:,.1f}")
        for run in runs
    ]
    return aligned(rows)


def main(argv: list[str]) -> None:
    """Read, print, draw."""
    parser = Parser(prog="plot", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run, or a packed file of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/curves.png"), help="picture (default: %(default)s)")
    parser.add_argument("--title", default="Validation loss", help="heading (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {arguments.out} must be a file that ends in .png, .pdf or .svg")
    folders = unpacked(arguments.runs)
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)
    draw(runs, arguments.out, arguments.title)
    print(table(runs))
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    with one_line_errors("plot"):
        main(sys.argv[1:])
