"""experiments/limit.py on made-up records: the pairs of runs, the page and the picture."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from experiments import limit as study
from experiments.comparison import RESULTS
from experiments.figures import Folders


def made_up(folder, loss, seeds=(0, 1)):
    """Records of every arm, whose loss is `loss(optimizer, β, batch, seed)` at every validation."""
    comparison = study.plan(Folders(folder, folder), len(seeds))
    for arm in comparison.arms:
        for seed in seeds:
            job = comparison.job(arm, seed)
            job.packed.parent.mkdir(parents=True, exist_ok=True)
            at = loss(arm.options["optimizer"], arm.options["momentum"], arm.options["batch_size"], seed)
            points = [
                {"update": u, "tokens": u, "passes": u, "seconds": u, "val_loss": at} for u in range(0, study.STEPS + 1, 50)
            ]
            config = {"optimizer": arm.options["optimizer"], "steps": study.STEPS}
            with job.packed.open("a") as file:
                file.write(json.dumps({"run": job.folder.name, "config": config, "environment": {}, "metrics": points}) + "\n")


def test_differences_are_paired_with_gluon(tmp_path, capsys):
    made_up(tmp_path, lambda optimizer, beta, batch, seed: 2.0 + seed - batch / 80 + (optimizer == "mvr1") + beta)
    study.main(["--plot-only", "--seeds", "2", "--runs", str(tmp_path), "--results", str(tmp_path)])
    out = capsys.readouterr().out
    rows = study.rows_of(study.plan(Folders(tmp_path, tmp_path), 2))
    assert [row["arm"].options["batch_size"] for row in rows] == [8, 8, 152, 8, 24]
    assert [round(row["gaps"][300].mean, 3) for row in rows] == [0.0, 1.0, -2.7, 0.6, -1.1]
    assert all(row["gaps"][300].low == pytest.approx(row["gaps"][300].high) for row in rows)  # the seeds cancel
    assert out.count("**worse**") == out.count("**better**") == 6
    assert (tmp_path / "limit" / "limit.png").stat().st_size > 10_000
    assert (tmp_path / "limit" / "README.md").read_text() in out


def test_the_page_agrees_with_the_records():
    rows = study.rows_of(study.plan(Folders(Path("no runs"), RESULTS), 3))
    assert study.page(rows) == (RESULTS / "limit" / "README.md").read_text()


def test_nothing_to_draw_is_one_line(tmp_path):
    with pytest.raises(UserError, match="leave out --plot-only"):
        study.main(["--plot-only", "--runs", str(tmp_path), "--results", str(tmp_path)])
