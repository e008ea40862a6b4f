"""One style for all plots."""

from typing import Any

from common.errors import UserError

# Okabe and Ito's colours, which colour-blind readers can tell apart (without yellow, which is too pale for a line).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
STYLES = ("-", "--", ":", "-.")
INK = "#333333"
LOOK = {
    "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#999999", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "xtick.color": INK,
    "ytick.color": INK,
}  # fmt: skip


def pyplot() -> Any:
    """matplotlib.pyplot without a window. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; install it with: python -m pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
