"""The rule of docs/records.md."""

import json

import numpy as np
import pytest

from common.errors import UserError
from experiments.record import chance, main, row


def write(folder, seed, loss, steps=10, **options):
    folder.mkdir()
    config = {"optimizer": "mvr2", "steps": steps, "seed": seed, "lr": 1e-3, "run_name": folder.name, **options}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"update": u, "tokens": u, "passes": max(0, 2 * u - 1), "seconds": 2.0 * u} for u in (0, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"val_loss": loss}) + "\n" for line in lines))
    return folder


def test_the_row_of_a_record(tmp_path, capsys):
    runs = [write(tmp_path / f"s{seed}", seed, loss) for seed, loss in enumerate((3.270, 3.271, 3.272))]
    cells, valid = row(runs, 3.28)
    assert valid and cells[:3] == ["mvr2", "10", "19"] and cells[4:6] == ["3.2710 ± 0.0010", "3"]
    assert not row(runs, 3.272)[1] and not row(runs, 3.0)[1]
    main([*map(str, runs)])
    assert "valid: p < 0.01" in capsys.readouterr().out


def test_the_rules_false_positive_rate():
    draws = np.random.default_rng(0).normal(3.28, 0.0013, (20_000, 4))
    share = np.mean([chance(losses.tolist(), 3.28) < 0.01 for losses in draws])
    assert 0.008 < share < 0.012


def test_a_run_that_diverged_counts(tmp_path):
    runs = [write(tmp_path / f"s{seed}", seed, loss) for seed, loss in enumerate((3.2, 3.2, 3.2, float("nan")))]
    assert not row(runs, 3.28)[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 0}, "same seed"),
        ({"lr": 2e-3}, "differ in lr"),
        ({"steps": 20}, "differ in steps"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, change, message):
    runs = [write(tmp_path / f"s{seed}", seed, 3.0) for seed in range(3)]
    runs.append(write(tmp_path / "odd", **({"seed": 3, "loss": 3.0} | change)))
    with pytest.raises(UserError, match=message):
        row(runs, 3.28)


def test_too_few_and_unfinished(tmp_path):
    runs = [write(tmp_path / f"s{seed}", seed, 3.0) for seed in range(2)]
    with pytest.raises(UserError, match="at least 3 seeds"):
        row(runs, 3.28)
    with pytest.raises(UserError, match="ends at update 10 of 20"):
        row([write(tmp_path / f"long{seed}", seed, 3.0, steps=20) for seed in range(3)], 3.28)
