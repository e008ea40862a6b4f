"""Draw the validation loss of runs against updates, gradient evaluations and seconds, side by side.

    python -m scripts.plot runs/gluon_b512 runs/mvr2_b512 --out curves.png

This is the picture of `scripts.compare --png` and its table, without the page.
"""

import sys
from pathlib import Path

from common.errors import Parser, one_line_errors
from scripts.compare import draw, picture_file, read_groups, tables


def main(argv: list[str]) -> None:
    """Read, draw, print."""
    parser = Parser(prog="plot", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run, or a packed file of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/curves.png"), help="picture (default: %(default)s)")
    parser.add_argument("--title", default="Validation loss", help="heading (default: %(default)s)")
    arguments = parser.parse_args(argv)
    out = picture_file(arguments.out, "--out")
    groups = read_groups(arguments.runs)
    draw(groups, out, arguments.title)
    print(f"{tables(groups)}\n\n{out}")


if __name__ == "__main__":
    with one_line_errors("plot"):
        main(sys.argv[1:])
