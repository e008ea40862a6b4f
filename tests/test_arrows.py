"""The imports between the parts of this repository go one way. Checked in the syntax trees of its files."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {
    "common", "data", "model", "optim", "training", "reading", "train_gpt",
    "configs", "scripts", "experiments", "benchmarks", "examples", "tests",
}  # fmt: skip
# The parts that each part may import. A part that is not listed may import all but `LEAVES`.
MAY = {
    "common": set(),
    "model": set(),
    "optim": set(),
    "data": {"common"},
    "training": {"common", "data", "model", "optim"},
    "reading": {"common", "data", "model", "training"},
    "train_gpt": {"common", "data", "model", "optim", "training"},
}
# No other part imports these.
LEAVES = {"configs", "scripts", "experiments", "benchmarks", "examples", "tests"}


def modules(part):
    """The Python files of a part: a package or one module."""
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{part}.py"]


def imported(path):
    """The top-level names that a file imports anywhere. Relative imports are left out: they are of its own package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("part", sorted(OURS - {"tests"}))
def test_arrows_run_one_way(part):
    if not (ROOT / part).is_dir() and not (ROOT / f"{part}.py").exists():
        pytest.skip(f"{part} is not there")
    allowed = MAY.get(part, OURS - LEAVES) | {part}
    for path in modules(part):
        wrong = (set(imported(path)) & OURS) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_optimizers_import_only_torch():
    """The package is installed under another name, so it also imports its own modules relatively."""
    for path in modules("optim"):
        foreign = set(imported(path)) - set(sys.stdlib_module_names) - {"torch"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"
