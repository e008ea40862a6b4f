"""The evidence's arithmetic, against values known from elsewhere, and its scripts end to end at a tiny size."""

import json
import math

import numpy as np
import pytest

from common.errors import UserError
from data.shards import write_shard
from model import GPT, GPTConfig
from scripts import reproduce, sweep
from scripts.run_jobs import Job, _diverged, _keep_validations, validations
from scripts.statistics_of_runs import (
    Curve,
    Speed,
    cost,
    equal_evaluations,
    equal_seconds,
    equal_updates,
    first_stage,
    flops_per_token,
    gradient_evaluations,
    interval,
    largest_rise,
    less_momentum,
    paired,
    second_stage,
    student_cdf,
    student_quantile,
    updates_for,
)

METHODS = ("gluon", "mvr1", "mvr2", "mvr3", "nested")


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)]
)
def test_quantiles_are_those_of_the_tables(df, quantile):
    assert student_quantile(0.975, df) == pytest.approx(quantile, rel=1e-5)
    assert student_cdf(-quantile, df) == pytest.approx(0.025, abs=1e-6)


def test_interval_of_known_values():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])  # mean 3, deviation √2.5, half width 2.77645·√2.5/√5
    assert (found.mean, found.n) == (3.0, 5)
    assert found.high - 3 == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert found.low + found.high == pytest.approx(6)


def test_interval_covers_the_mean_95_times_in_100():
    generator = np.random.default_rng(0)
    found = [interval(list(row)) for row in generator.standard_normal((4000, 5))]
    assert 0.94 < np.mean([i.low < 0 < i.high for i in found]) < 0.96


def test_verdicts():
    assert interval([-1.0, -1.1, -0.9]).verdict == "better"
    assert interval([1.0, 1.1, 0.9]).verdict == "worse"
    assert interval([1.0, -1.1, 0.4]).verdict == "undecided"
    assert interval([-1.0]).verdict == "undecided"
    assert interval([-1.0, math.inf]).verdict == "undecided"


def test_pairs_use_the_seeds_that_both_have_and_cancel_what_they_share():
    found = paired({0: 1.0, 1: 11.0, 7: 99.0}, {0: 2.0, 1: 12.0, 3: -5.0})
    assert (found.mean, found.low, found.high, found.n) == (-1.0, -1.0, -1.0, 2)
    with pytest.raises(ValueError, match="no seed"):
        paired({0: 1.0}, {1: 1.0})


def test_curves_are_read_on_straight_lines():
    curve = Curve((0, 10, 20), (5.0, 3.0, 2.0))
    assert [curve.at(u) for u in (0, 5, 10, 15, 20)] == [5.0, 4.0, 3.0, 2.5, 2.0]
    with pytest.raises(ValueError, match="outside"):
        curve.at(21)
    assert Curve((0, 10), (1.0, math.inf)).at(0) == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_and_updates_are_inverse(method):
    for updates in (1, 2, 7, 100):
        assert updates_for(method, gradient_evaluations(method, updates)) == updates
    assert gradient_evaluations(method, 0) == 0
    assert gradient_evaluations(method, 100) == {"mvr2": 199, "nested": 199, "mvr3": 200}.get(method, 100)


def test_equal_budgets():
    variant, baseline = Curve((0, 50, 100), (9.0, 3.0, 2.0)), Curve((0, 100, 200), (9.0, 2.5, 1.5))
    assert equal_updates(variant, baseline) == (100, 2.0, 2.5)
    budget, ours, theirs = equal_evaluations("mvr2", variant, baseline)
    assert (budget, ours, theirs) == (199, 2.0, pytest.approx(1.51))
    # A baseline that ends at 100: the variant is read at 50.5 updates.
    assert equal_evaluations("mvr2", variant, Curve((0, 100), (9.0, 2.5))) == (100, pytest.approx(2.99), 2.5)
    speed = Speed(1.0, {"gluon": 0.5, "mvr3": 1.0})  # 1.5 s and 3 s an update
    budget, ours, theirs = equal_seconds("mvr3", variant, baseline, speed)
    assert budget == pytest.approx(300)
    assert (ours, theirs) == (pytest.approx(2.0), pytest.approx(1.5))


def test_a_rise_is_measured_from_the_lowest_loss_before():
    assert largest_rise([3.0, 2.0, 2.5, 1.0, 1.2]) == 0.5
    assert largest_rise([3.0, 2.0, 1.0]) == 0.0
    assert largest_rise([3.0, math.inf]) == math.inf


def test_flops_are_the_models():
    config = GPTConfig(257, 2, 2, 32, 64)
    assert flops_per_token(257, 2, 32, 64) == GPT(config).flops_per_token(64)
    assert flops_per_token(50304, 12, 768, 1024) == pytest.approx(855e6, rel=1e-3)


def test_cost_of_the_reference_run():
    paper = cost("gluon", 5100, 512, 1024, 854_654_976)
    assert (paper.tokens, paper.shards, paper.evaluations) == (2_673_868_800, 27, 5100)
    assert paper.seconds(1) == pytest.approx(2_673_868_800 * 854_654_976 / (0.4 * 989e12))
    assert paper.seconds(1) == pytest.approx(8 * paper.seconds(8))
    assert cost("mvr2", 5100, 512, 1024, 1).flops == 10199 * 512 * 1024
    assert cost("gluon", 1, 100_000_000, 1, 1).shards == 2  # the last target is one token more
    assert cost("gluon", 0, 1, 1, 6, validations=2, val_tokens=10).flops == 40


def test_trials_are_few_seeded_and_stratified():
    trials = second_stage(1e-3, seed=5, count=3)
    assert trials == second_stage(1e-3, seed=5, count=3) != second_stage(1e-3, seed=6, count=3)
    assert sorted(trial.momentum for trial in trials) == [0.8, 0.9, 0.95]
    for values, low, high in (
        ([math.log2(trial.lr / 1e-3) for trial in trials], -0.5, 0.5),
        ([math.log(trial.gamma) for trial in trials], math.log(0.02), math.log(0.5)),
        ([trial.q for trial in trials], 0.2, 0.9),
    ):
        strata = sorted(int(3 * (value - low) / (high - low)) for value in values)
        assert strata == [0, 1, 2]
    assert [trial.lr for trial in first_stage((1.0, 2.0))] == [1.0, 2.0]
    least = second_stage(1e-3, seed=5, count=3)[0]
    assert [(t.lr, t.gamma, t.momentum) for t in less_momentum(least, 2)] == [
        (least.lr, least.gamma, pytest.approx(2 * least.momentum - 1))
    ]
    assert trials[0].options("gluon").keys() == {"lr", "momentum"}
    assert trials[0].options("mvr3").keys() == {"lr", "momentum", "gamma"}
    assert trials[0].options("nested").keys() == {"lr", "momentum", "inner"}


@pytest.mark.parametrize("best, tried", [(0.8, [0.9, 0.8, 0.6]), (0.9, [0.9, 0.8, 0.858579]), (0.2, [0.9, 0.8, 0.6])])
def test_the_sweep_searches_along_beta(tmp_path, monkeypatch, best, tried):
    """Doubled where that won, else between; the loss is the distance of β from `best`."""
    monkeypatch.setattr(sweep, "DRAWS", 0)
    monkeypatch.setattr(sweep, "final_loss", lambda job: abs(job.options["momentum"] - best) + abs(job.options["lr"] - 1.4e-3))
    first, _, third, fourth = sweep.trials_of(tmp_path, "mvr1", 8, 100)
    assert [first[0].momentum, third[0].momentum, fourth[0].momentum] == tried


def test_tuning_and_evaluation_share_no_seed():
    assert sweep.TUNING_SEED > 100


def test_sections_of_a_page_are_replaced():
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb"
    assert reproduce.replace_section(page, "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb"
    assert reproduce.replace_section(page, "y", "new") == page


def test_a_run_that_diverged_is_told_from_one_that_failed():
    assert _diverged("train_gpt: step 3: the train_loss of the weights that it left is nan; go on from the last checkpoint")
    assert _diverged("train_gpt: step 3: the loss is not finite, from blocks.0.mlp on (batch 3: sequences 24 to 31)")
    assert not _diverged("train_gpt: results/x can't be written (No space left on device)")
    assert not _diverged("RuntimeError: nan is inf")


def test_states_of_a_run(tmp_path):
    job = Job(tmp_path / "run", "c.py", {"steps": 4})
    assert job.state() == "new"
    job.folder.mkdir()
    lines = [json.dumps({"update": u, "val_loss": 1.0 + u}) for u in (0, 2)]
    (job.folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"update": 4, "val_lo')
    assert job.state() == "begun"
    assert validations(job.folder) == {0: 1.0, 2: 3.0}
    (job.folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"update": 4, "val_loss": 0.5})]))
    assert job.state() == "done"
    _keep_validations(job.folder)  # then it is extended to 6, and the validation at 4 is not in metrics.jsonl any more
    (job.folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"update": 6, "val_loss": 0.25})]))
    assert sorted(validations(job.folder).items()) == [(0, 1.0), (2, 3.0), (4, 0.5), (6, 0.25)]
    (job.folder / "diverged.txt").write_text("loss is nan\n")
    assert job.state() == "diverged"


@pytest.mark.parametrize("figure", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", ["full", "mini"])
def test_dry_run(figure, scale, tmp_path, capsys):
    best = tmp_path / "best.json"
    found = {method: {"lr": 0.002, "momentum": 0.9, "gamma": 0.1, "inner": 0.5} for method in METHODS}
    best.write_text(json.dumps({"b8": found, "b2": found}))
    reproduce.main(
        ["--figure", str(figure), "--scale", scale, "--dry-run", "--best", str(best), "--results", str(tmp_path / "results")]
    )
    text = capsys.readouterr().out
    assert f"Figure {figure}" in text
    assert "train_gpt.py --config=" in text
    runs = [line for line in text.splitlines() if line.startswith(("gluon", "mvr", "nested"))]
    assert len(runs) == (2 if figure < 4 else 4 if scale == "full" else 6)
    if scale == "full" and figure == 3:
        assert "10,199" in text
        assert "2,673,868,800" in text
        assert "8 GPUs" in text
    assert not (tmp_path / "results").exists()


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"sweep\.py"):
        reproduce.main(["--figure", "1", "--scale", "mini", "--results", str(tmp_path)])
    with pytest.raises(UserError, match="needs a value"):
        reproduce.main(["--figure", "1", "--", "--lr"])


def test_a_tiny_figure_end_to_end(tmp_path, capsys):
    """Two updates of a small model, twice Gluon's for the two-gradient baseline; then the same again, from what is there."""
    data, results = tmp_path / "data", tmp_path / "results"
    data.mkdir()
    for split in ("train", "val"):
        write_shard(data / f"x_{split}_000001.bin", np.arange(2000, dtype=np.uint16) % 50)
    results.mkdir()
    (results / "README.md").write_text("<!-- mini figure 3 -->\n<!-- end of mini figure 3 -->\n")
    best = tmp_path / "best.json"
    best.write_text(
        json.dumps({"b8": {"gluon": {"lr": 1e-3, "momentum": 0.9}, "mvr2": {"lr": 1e-3, "momentum": 0.9, "gamma": 0.1}}})
    )
    command = ["--figure", "3", "--scale", "mini", "--seeds", "1", "--steps", "2", "--jobs", "2"]
    command += ["--results", str(results), "--best", str(best)]
    small = f"--data-dir={data} --n-layer=1 --n-head=1 --d-model=8 --seq-len=8 --val-tokens=8 --batch-size=2 --val-every=1"
    reproduce.main([*command, "--", *small.split()])
    runs = results / "mini" / "b8"
    assert max(validations(runs / "gluon" / "seed0")) == 4
    assert max(validations(runs / "mvr2" / "seed0")) == 2
    assert (results / "mini" / "figure3.png").stat().st_size > 10_000
    rows = json.loads((results / "mini" / "figure3.json").read_text())
    gluon, mvr2 = (validations(runs / key / "seed0") for key in ("gluon", "mvr2"))
    assert rows[1]["equal_updates"]["difference"]["mean"] == pytest.approx(mvr2[2] - gluon[2])
    assert rows[1]["equal_evaluations"]["budget"] == 3
    assert rows[1]["equal_evaluations"]["difference"]["mean"] == pytest.approx(mvr2[2] - gluon[3])
    assert "| MVR-2 | lr 0.001, β 0.9, γ 0.1 | 1 |" in (results / "README.md").read_text()
    before = (runs / "gluon" / "seed0" / "metrics.jsonl").stat().st_mtime_ns
    best.write_text(best.read_text().replace('"gamma": 0.1', '"gamma": 0.2'))
    with pytest.raises(UserError, match=r"gamma = 0\.1, not 0\.2"):
        reproduce.main([*command, "--plot-only", "--", *small.split()])
    best.write_text(best.read_text().replace('"gamma": 0.2', '"gamma": 0.1'))
    reproduce.main([*command, "--", *small.split()])
    assert "2 done, 0 to run" in capsys.readouterr().out
    assert (runs / "gluon" / "seed0" / "metrics.jsonl").stat().st_mtime_ns == before
