"""experiments/beta_lr.py on made-up records: the pairs of runs, the page and the picture."""

import json
import math
from pathlib import Path

import pytest

from common.errors import UserError
from experiments import beta_lr as study
from experiments.comparison import RESULTS
from experiments.figures import Folders


def made_up(folder, steps, loss):
    """Records of every cell, whose loss at both horizons is `loss(method, lr, weight of the new gradient)`."""
    (folder / "map").mkdir(parents=True)
    for cell in study.cells():
        job = study.job_of(Folders(folder, folder), cell, 0, steps)
        method, lr, value = cell
        at = loss(method, lr, value if method == "mvr2" else 1 - value)
        lines = [{"update": u, "tokens": u, "passes": u, "seconds": u, "val_loss": at} for u in (0, steps // 5, steps)]
        record = {"run": job.folder.name, "config": {}, "environment": {}, "metrics": lines}
        with job.packed.open("a") as file:
            file.write(json.dumps(record) + "\n")


def test_cells_are_paired_with_gluon_at_the_same_lr_and_beta(tmp_path):
    made_up(tmp_path, 10, lambda method, lr, weight: {"gluon": weight, "mvr1": weight + lr, "mvr2": 3.0 + weight}[method])
    rows = study.differences(study.losses(Folders(tmp_path, tmp_path), 10, 1), 10)
    assert len(rows) == len(study.LRS) * (len(study.BETAS) + len(study.QS))
    for row in rows:
        wanted = row["lr"] if row["method"] == "mvr1" else 3.0 + row["weight"] - 0.1  # Gluon at β = 0.9
        assert row["difference"].mean == pytest.approx(wanted)


def test_the_cells_in_which_it_helps_are_counted(tmp_path, capsys):
    made_up(tmp_path, 10, lambda m, lr, weight: 0.0 if m == "gluon" else 400 * lr - weight)
    study.main(["--plot-only", "--steps", "10", "--runs", str(tmp_path), "--results", str(tmp_path)])
    capsys.readouterr()
    page = (tmp_path / "map" / "README.md").read_text()
    helps = [sum(400 * lr < weight for lr in study.LRS for weight in study.WEIGHTS[m]) for m in ("mvr1", "mvr2")]
    assert [f"in {helps[0]} of 25 cells" in page, f"in {helps[1]} of 20 cells" in page] == [True, True]
    assert "## MVR-1 minus Gluon at the same β; rows: 1-β, 2 updates" in page and "10 updates" in page
    assert (tmp_path / "map" / "map.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "map" / "map.json").read_text())) == 2 * 45


def test_a_diverged_run_is_no_gain(tmp_path):
    cell = ("mvr1", study.LRS[0], 0.9)
    base = ("gluon", study.LRS[0], 0.9)
    rows = study.differences({(cell, 0): {10: math.inf}, (base, 0): {10: 1.0}}, 10)
    assert [str(row["difference"]) for row in rows] == ["diverged"]


def test_the_page_agrees_with_the_records():
    folders = Folders(Path("no runs"), RESULTS)
    found = study.losses(folders, study.STEPS, 1)
    rows = [row for horizon in (study.STEPS // study.SHARE, study.STEPS) for row in study.differences(found, horizon)]
    assert study.page(rows) == (RESULTS / "map" / "README.md").read_text()


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="a multiple of 5"):
        study.main(["--steps", "7"])
    with pytest.raises(UserError, match="no pair of runs"):
        study.main(["--plot-only", "--runs", str(tmp_path), "--results", str(tmp_path)])
