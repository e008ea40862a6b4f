"""The evidence's arithmetic, against values known from elsewhere, and the studies end to end at a tiny size."""

import importlib
import json
import math
import re

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.shards import write_shard
from experiments import calibrate, figures, leaderboard, rates, sweep
from experiments import map as study_map
from experiments.comparison import Arm, Comparison, compare, curve_of, replace_section
from experiments.controls import DoubleAverage
from experiments.run_jobs import Job, _diverged, pack, packed_records
from experiments.setup import evaluations
from experiments.statistics import (
    Curve,
    difference,
    interval,
    largest_rise,
    paired,
    student_cdf,
    student_quantile,
    to_reach,
)
from optim import Gluon, GluonMVR2
from training.curves import curve

SMALL = "--n-layer=1 --n-head=1 --d-model=8 --seq-len=8 --val-tokens=8 --val-every=1 --device=cpu"


# ---- arithmetic


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


def test_pairs_use_common_seeds_and_cancel_common_noise():
    found = paired({0: 1.0, 1: 11.0, 7: 99.0}, {0: 2.0, 1: 12.0, 3: -5.0})
    assert (found.mean, found.low, found.high, found.n) == (-1.0, -1.0, -1.0, 2)
    with pytest.raises(ValueError, match="no seed"):
        paired({0: 1.0}, {1: 1.0})


def line(updates, losses, passes=1, seconds=1.0):
    """A curve with `passes` and `seconds` per update."""
    return Curve(tuple(updates), tuple(passes * u for u in updates), tuple(seconds * u for u in updates), tuple(losses))


def test_curves_are_read_on_straight_lines():
    found = line((0, 10, 20), (5.0, 3.0, 2.0), passes=2)
    assert [found.at("updates", u) for u in (0, 5, 10, 15, 20)] == [5.0, 4.0, 3.0, 2.5, 2.0]
    assert [found.at("passes", p) for p in (0, 10, 20, 30, 40)] == [5.0, 4.0, 3.0, 2.5, 2.0]
    with pytest.raises(ValueError, match="outside"):
        found.at("updates", 21)
    assert line((0, 10), (1.0, math.inf)).at("updates", 0) == 1.0
    # Of two validations at one cost the last counts.
    assert Curve((0, 1, 2), (0, 3, 3), (0, 1, 2), (5.0, 4.0, 3.0)).at("passes", 3) == 3.0


def test_equal_budgets():
    variant, baseline = line((0, 50, 100), (9.0, 3.0, 2.0), 2, 3.0), line((0, 100, 200), (9.0, 2.5, 1.5), 1, 1.5)
    found = {b: difference({0: variant}, {0: baseline}, b) for b in ("updates", "passes", "seconds")}
    assert (found["updates"][0], found["updates"][1].mean) == (100, -0.5)
    assert (found["passes"][0], found["passes"][1].mean) == (200, 0.5)
    assert (found["seconds"][0], found["seconds"][1].mean) == (300, 0.5)
    # A baseline that ends at 100 gradients: the variant is read at 50 updates.
    short = line((0, 100), (9.0, 2.5))
    assert difference({0: variant}, {0: short}, "passes")[1].mean == pytest.approx(0.5)


def test_a_rise_is_measured_from_the_lowest_loss_before():
    assert largest_rise([3.0, 2.0, 2.5, 1.0, 1.2]) == 0.5
    assert largest_rise([3.0, 2.0, 1.0]) == 0.0
    assert largest_rise([3.0, math.inf]) == math.inf


def test_gradient_evaluations():
    assert evaluations("gluon", 100) == evaluations("single_batch", 100) == evaluations("adamw", 100) == 100
    assert evaluations("mvr1", 100) == evaluations("mvr2", 100) == evaluations("mvr3", 100) == 199
    assert evaluations("previous_batch", 100) == 200
    assert evaluations("mvr2", 0) == 0


@pytest.mark.parametrize("each", [1, 2])
def test_gradients_that_the_weights_took(each):
    """A validation in the middle of a deferred run counts as many gradients as a run that ends there."""
    assert [to_reach(u, 1 + each * u if u else 0) for u in (0, 1, 2, 50)] == [0, *(1 + each * (u - 1) for u in (1, 2, 50))]
    assert all(to_reach(u, 2 * u + 1) == evaluations("mvr1", u) for u in range(1, 100))


def record(losses, passes=1, optimizer="gluon", **extra):
    """The record of a run that ends at the last of the losses."""
    lines = [
        {"update": u, "tokens": 8 * u, "passes": passes * u, "seconds": 0.5 * u, "val_loss": loss} for u, loss in losses.items()
    ]
    config = {"optimizer": optimizer, "steps": max(losses)}
    return {"run": "seed0", "config": config, "environment": {}, "metrics": lines, **extra}


def test_records_become_curves():
    found = curve_of(record({0: 3.0, 2: 2.0, 4: 1.0}, passes=2), steps=2, share=2.0, speed=(10.0, 1.0))
    assert found == Curve((0.0, 2.0), (0.0, 8.0), (0.0, 82.0), (3.0, 2.0))
    lost = curve_of(record({0: 3.0, 2: 2.0}, diverged="the loss is nan"), steps=10)
    assert lost.updates == (0.0, 2.0, 10.0) and lost.losses == (3.0, 2.0, math.inf)


def test_a_deferred_run_is_placed_by_the_gradients_that_its_weights_took():
    """Metrics count evaluations: 2u+1 in the middle, where step u has begun, and 2K-1 at the end."""
    run = record({0: 3.0, 2: 2.0, 4: 1.0}, optimizer="mvr2")
    for point, passes in zip(run["metrics"], (0, 5, 7), strict=True):
        point["passes"] = passes
    assert curve_of(run, steps=4).passes == (0, 3, 7)
    assert curve_of(run, steps=4, speed=(10.0, 1.0)).seconds == (0, 32, 74)
    run["config"]["steps"] = 8  # a run that continues has 9 passes there, not 7
    run["metrics"][-1]["passes"] = 9
    assert curve_of(run, steps=4).passes == (0, 3, 7)
    # A longer Gluon run has the same losses at the same gradients, so the difference is 0.
    gluon = curve_of(record({0: 3.0, 3: 2.0, 7: 1.0, 9: 0.5}), steps=9)
    assert [gluon.at("passes", p) for p in (0, 3, 7)] == [3.0, 2.0, 1.0]
    assert difference({0: curve_of(run, steps=4)}, {0: gluon}, "passes")[1].mean == 0.0
    run["metrics"][1] |= {"skipped": 1, "passes": 7}  # a skipped step evaluates too
    assert curve_of(run, steps=4).passes[1] == 7 - 3


def test_sections_of_a_page_are_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb")
    replace_section(page, "x", "new\n")
    replace_section(page, "y", "other")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb"


# ---- runs and records


def test_a_divergence_is_distinguished_from_a_failure():
    assert _diverged("train_gpt: step 3: the train_loss is nan; continue from the last checkpoint")
    assert _diverged("train_gpt: step 3: the loss is not finite, from blocks.0.mlp on (batch 3: sequences 24 to 31)")
    assert not _diverged("train_gpt: results/x can't be written (No space left on device)")
    assert not _diverged("RuntimeError: nan is inf")


def test_states_of_a_run_and_its_record(tmp_path):
    job = Job(tmp_path / "runs" / "seed0", tmp_path / "arm.jsonl", "c.py", {"steps": 4, "lr": 0.1})
    assert job.state() == "new"
    job.folder.mkdir(parents=True)
    lines = [json.dumps(point) for point in record({0: 1.0, 2: 3.0, 4: 0.5})["metrics"]]
    metrics = job.folder / "metrics.jsonl"
    metrics.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    (job.folder / "config.json").write_text('{"lr": 0.1}')
    assert job.state() == "begun"
    pack([job])
    assert not job.packed.exists()
    metrics.write_text("\n".join(lines) + "\n")
    assert job.state() == "done"
    pack([job])
    metrics.unlink()  # the record is enough
    assert job.state() == "done" and job.changed() == ""
    assert [point["val_loss"] for point in curve(packed_records(job.packed)["seed0"]["metrics"])] == [1.0, 3.0, 0.5]
    assert "lr = 0.1, not 0.2" in Job(job.folder, job.packed, "c.py", {"steps": 4, "lr": 0.2}).changed()
    assert Job(job.folder, job.packed, "c.py", {"steps": 6}).state() == "begun"
    metrics.write_text("\n".join(lines[:2]) + "\n")
    (job.folder / "diverged.txt").write_text("loss is nan\n")
    assert job.state() == "diverged"
    pack([job])
    assert packed_records(job.packed)["seed0"]["diverged"] == "loss is nan"


def test_a_damaged_record_is_reported(tmp_path):
    path = tmp_path / "arm.jsonl"
    for text in (
        "no json",
        "[]",
        '{"run": "a"}',
        '{"run": "a", "config": {}, "metrics": []}',
        '{"run": "a", "config": {}, "environment": {}, "metrics": [{"update": 0}]}',
    ):
        path.write_text(text + "\n")
        with pytest.raises(UserError, match="line 1 is not a packed run"):
            packed_records(path)


def comparison_of(folder, losses, passes):
    arms = tuple(Arm(key, key.upper(), {"lr": 0.1, "batch_size": 8}) for key in losses)
    made = Comparison("Two arms", arms, (0, 1), dict.fromkeys(losses, 4), folder / "runs", folder / "records")
    made.records.mkdir()
    for key in losses:
        text = [json.dumps(record(curve, passes[key]) | {"run": f"seed{s}"}) for s, curve in enumerate(losses[key])]
        (made.records / f"{key}.jsonl").write_text("\n".join(text) + "\n")
    return made


def test_a_comparison_of_records(tmp_path):
    made = comparison_of(
        tmp_path,
        {
            "base": [{0: 9.0, 2: 4.0, 4: 2.0}, {0: 9.0, 2: 5.0, 4: 3.0}],
            "mvr": [{0: 9.0, 2: 3.0, 4: 1.0}, {0: 9.0, 2: 4.0, 4: 2.2}],
        },
        {"base": 1, "mvr": 2},
    )
    base, row = compare(made, None)
    assert "equal_updates" not in base and base["loss"].mean == 2.5
    assert row["equal_updates"]["difference"].mean == pytest.approx(-0.9)
    assert row["equal_passes"]["budget"] == 4
    assert row["equal_passes"]["difference"].mean == pytest.approx(1.0)  # 3.0 and 4.0 against 2.0 and 3.0
    assert row["equal_seconds"]["difference"].mean == pytest.approx(-0.9)
    assert (row["updates"], row["passes"], row["seconds"]) == (4, 8.0, 2.0)
    slow = {"gradient": 1.0, "update": {"base": 0.0, "mvr": 2.0}}
    assert compare(made, slow)[1]["equal_seconds"] == {"budget": 4.0, "difference": interval([6.0 - 2.0, 6.5 - 3.0])}


# ---- the studies


def test_the_double_average_is_mvr2_if_the_weights_stay():
    """With lr 0 the correction vanishes (ĝ_k = g_k), so MVR-2 and its control have the same buffers."""
    found = []
    for kind in (GluonMVR2, DoubleAverage):
        p = torch.eye(3, dtype=torch.float64).requires_grad_()
        optimizer = kind([p], lr=0.0, momentum=0.7, q=0.4)
        for step in range(5):

            def closure(p=p, step=step):
                loss = (p * (p @ p + step)).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        found.append(optimizer.state[p]["momentum_buffer"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="q must be"):
        DoubleAverage([p], q=0.0)
    assert DoubleAverage.passes == Gluon.passes == 1


@pytest.mark.parametrize("name", sweep.METHODS)
def test_trials_are_the_recipe_and_a_latin_hypercube(name):
    method = sweep.METHODS[name]
    trials = sweep.trials_of(method)
    assert len(trials) == sweep.TRIALS and trials == sweep.trials_of(method)
    assert trials[0]["lr"] == method.recipe["lr"]
    assert all(trial.keys() == set(method.knobs) for trial in trials)
    for knob, low, high in (("lr", method.lr_from, 16 * method.lr_from), ("momentum", 0.05, 0.95), ("gamma", 0.02, 0.5)):
        values = [1 - t[knob] if knob == "momentum" else t[knob] for t in trials[1:] if knob in t]
        places = sorted(int(len(values) * math.log(v / low) / math.log(high / low) * 0.9999 + 1e-3) for v in values)
        assert places in ([], list(range(len(values)))), knob


def test_every_method_draws_the_same():
    found = [[trial["lr"] / m.lr_from for trial in sweep.trials_of(m)[1:]] for m in sweep.METHODS.values()]
    assert all(ratios == pytest.approx(found[0], rel=5e-3) for ratios in found)


def test_halving(tmp_path, monkeypatch):
    """Each rung keeps the better half. The loss is the distance of β from 0.5, plus a term that falls with the updates."""
    monkeypatch.setattr(Job, "loss_at", lambda job, steps: abs(job.options["momentum"] - 0.5) + 1 / steps)
    gluon = sweep.METHODS["gluon"]
    rungs = sweep.rungs_of(figures.Folders(tmp_path, tmp_path), "gluon", gluon, 40)
    assert [len(rung) for rung in rungs] == [16, 8, 4]
    assert [{job.options["steps"] for job, _ in rung} for rung in rungs] == [{10}, {20}, {40}]
    betas = sorted((t["momentum"] for t in sweep.trials_of(gluon)), key=lambda beta: abs(beta - 0.5))
    assert [job.options["momentum"] for job, _ in rungs[2]] == betas[:4]
    monkeypatch.setattr(Job, "loss_at", lambda job, steps: math.nan if steps == 20 else 1.0)
    assert len(sweep.rungs_of(figures.Folders(tmp_path, tmp_path), "gluon", gluon, 40)) == 2


OWN = {
    "torch.optim:Muon": ("Muon", {"lr", "momentum"}, 1e-3),
    "torch.optim:AdamW": ("AdamW", {"lr", "beta1"}, 1e-3),
    "torch.optim:Adagrad": ("Adagrad", {"lr"}, 1e-2),
    "optim:GluonMVR3": ("GluonMVR3", {"lr", "momentum", "q", "gamma"}, 1e-3),
    "examples.my_optimizer:TwoHorizons": ("TwoHorizons", {"lr", "momentum"}, 1e-3),
    "examples.my_optimizer:HiddenMVR1": ("HiddenMVR1", {"lr", "momentum", "gamma"}, 1e-3),
}


@pytest.mark.parametrize("name", OWN)
def test_a_users_class_has_the_knobs_of_its_constructor(name):
    title, knobs, lr = OWN[name]
    method = sweep.own_method(name)
    trials = sweep.trials_of(method)
    assert method.title == title and set(method.knobs) == knobs == trials[0].keys() and trials[0]["lr"] == lr
    lrs = [trial["lr"] for trial in trials[1:]]
    assert lr / 4 <= min(lrs) < lr / 3 and lr * 3 < max(lrs) <= lr * 4
    assert sweep.trials_of(sweep.own_method(name, lr=0.012345))[0]["lr"] == 0.0123


def test_options_fix_knobs_and_are_in_the_title():
    method = sweep.own_method("torch.optim:AdamW", options='{"betas": [0.5, 0.9], "eps": 1e-6}')
    assert (method.title, method.knobs) == ("AdamW, betas [0.5, 0.9], eps 1e-06", ("lr",))
    assert sweep.own_method("optim:GluonMVR2", options='{"q": 1}').knobs == ("lr", "momentum")


def test_tuning_and_evaluation_share_no_seed():
    assert sweep.TUNING_SEED > 100


@pytest.mark.parametrize("figure", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", ["full", "mini"])
def test_dry_run(figure, scale, tmp_path, capsys):
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    figures.main(["--figure", str(figure), "--scale", scale, "--dry-run", *folders])
    text = capsys.readouterr().out
    assert f"Figure {figure}" in text
    assert "train_gpt.py --config=" in text
    runs = [row for row in text.splitlines() if row.startswith(("gluon", "mvr"))]
    assert len(runs) == 1 + len(figures.FIGURES[figure].variants)
    if scale == "full" and figure == 3:
        assert "10,199" in text and "2,673,868,800" in text and "8 GPUs" in text
    if scale == "mini" and figure == 4:
        assert "3,000" in text and "5,999" in text
    assert not (tmp_path / "results").exists()


def test_mistakes_are_one_line(tmp_path):
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path)]
    with pytest.raises(UserError, match="needs a value"):
        figures.main(["--figure", "1", "--", "--lr"])
    with pytest.raises(UserError, match="no arm mvr9; the arms are gluon, mvr1"):
        figures.main(["--figure", "1", "--scale", "mini", "--only", "mvr9"])
    with pytest.raises(UserError, match="baseline is done yet"):
        figures.main(["--figure", "1", "--scale", "mini", "--plot-only", *folders])
    with pytest.raises(UserError, match="Gluon is not tuned yet"):
        sweep.main(["--evaluate", *folders])
    for words, said in [
        ("--methods mvr9", "no method mvr9; the methods are gluon, mvr1"),
        ("--methods torch.optim:Moun", "torch.optim has no Moun; did you mean Muon?"),
        ("--methods nowhere:Muon", "nowhere can't be imported"),
        ("--methods torch.nn:Linear", "is not a torch.optim.Optimizer"),
        ("--methods torch.optim:Muon --lr 0", "needs the centre of its lr range, above 0"),
        ("--methods torch.optim:Muon --optimizer-options [1]", "--optimizer-options must be option names and their values"),
        ("--methods gluon --lr 1e-3", "are for a package.module:Class"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            sweep.main([*words.split(), *folders])
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match="a multiple of 4"):
        sweep.main(["--steps", "6", *folders])


DAMAGED = {  # the files that a study reads, and what reads them
    "figures/calibration.json": (figures, "--figure 3 --scale mini --plot-only"),
    "sweep/best.json": (sweep, "--evaluate"),
    "sweep/a.Class.jsonl": (sweep, "--plan"),
    "figures/mini/b8/gluon.jsonl": (figures, "--figure 3 --scale mini --steps 2 --plot-only"),
    "map/noise.json": (study_map, "--steps 5 --plot-only"),
    "rates.json": (rates, "--replot"),
}  # fmt: skip


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"batches": {"8": {}}, "gluon": {}, "lr": [1]}'])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, monkeypatch, name, text):
    (module, words), path = DAMAGED[name], tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":  # its lines are checked elsewhere
        old = {"update": 4, "tokens": 0, "passes": 0, "seconds": 0.0, "val_loss": 1.0}
        runs = [{"run": run, "config": {}, "environment": {}, "metrics": [old]} for run in ("seed0", "trial00")]
        text = "\n".join(map(json.dumps, runs))
    path.write_text(text)
    monkeypatch.setattr(study_map, "differences", lambda *_: [{}])  # as if there were runs
    places = ["--out", str(tmp_path)] if module is rates else ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=f"{path.name} is damaged or was written by another version") as caught:
        module.main([*words.split(), *places])
    assert "\n" not in str(caught.value) and path.read_text() == text


@pytest.mark.parametrize("words", ["--steps 0", "--steps -4", "--seeds 0", "--jobs 0", "--jobs two"])
@pytest.mark.parametrize("module", [figures, sweep, study_map])
def test_numbers_are_at_least_one(module, words):
    with pytest.raises(UserError, match="must be an integer of at least 1"):
        module.main(["--figure=1", *words.split()] if module is figures else words.split())


def test_a_run_without_the_validation_that_is_asked_for(tmp_path):
    """A longer run counts as done, but has no loss for an update at which it was not validated."""
    job = Job(tmp_path / "seed0", tmp_path / "arm.jsonl", "c.py", {"steps": 3})
    job.packed.write_text(json.dumps(record({0: 1.0, 2: 3.0, 4: 0.5})) + "\n")
    assert [job.loss_at(update) for update in (2, 4)] == [3.0, 0.5] and math.isnan(job.loss_at(5))
    with pytest.raises(UserError, match="seed0 was not validated at update 3; choose other --steps"):
        job.state()
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "gluon.jsonl").write_text(json.dumps(record({0: 1.0, 200: 3.0}) | {"run": "trial00"}) + "\n")
    (tmp_path / "sweep" / "best.json").write_text("{}")
    with pytest.raises(UserError, match="trial00 was not validated at update 10"):
        sweep.main(["--methods", "gluon", "--steps", "40", *folders])
    assert (tmp_path / "sweep" / "best.json").read_text() == "{}"


def test_options_after_two_dashes_are_read_as_the_trainer_reads_them(tmp_path):
    folders = figures.Folders(tmp_path, tmp_path)
    arm = figures.plan(3, "mini", 1, 2, folders, figures.extra_options(["--lr", "1e-3", "--batch-size=4"])).arms[1]
    assert (arm.options["lr"], arm.options["batch_size"]) == (1e-3, 4) and arm.setting.startswith("lr 0.001, ")
    for words, said in [
        ("--lr fast", "--lr must be a finite number"),
        ("--lrr 1", "unknown option '--lrr'"),
        ("--seed 3", "--seed can't follow --"),
        ("--results-dir x", "--results-dir can't follow --"),
    ]:
        with pytest.raises(UserError, match=said):
            figures.main(["--figure", "3", "--scale", "mini", "--", *words.split()])


def test_a_folder_that_can_not_be_made_is_told_before_the_first_run(tmp_path):
    (tmp_path / "file").write_text("")
    job = Job(tmp_path / "seed0", tmp_path / "file" / "arm.jsonl", "c.py", {"steps": 3})
    with pytest.raises(FileExistsError):
        pack([job])


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_000001.bin", np.arange(2000, dtype=np.uint16) % 50)
    return folder


@pytest.mark.slow
def test_a_tiny_figure_end_to_end(tmp_path, data, capsys):
    """Two updates of a small model, and four of Gluon; then the same again from the records, without the runs."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "README.md").write_text("<!-- mini figure 3 -->\n<!-- end of mini figure 3 -->\n")
    command = ["--figure", "3", "--scale", "mini", "--seeds", "1", "--steps", "2", "--jobs", "2"]
    command += ["--results", str(results), "--runs", str(tmp_path / "runs")]
    words = [f"--data-dir={data}", *SMALL.split()]
    figures.main([*command, "--", *words])
    records = results / "figures" / "mini" / "b8"
    runs = [packed_records(records / f"{key}.jsonl")["seed0"] for key in ("gluon", "mvr2_q0.5")]
    gluon, mvr2 = ({point["update"]: point for point in curve(run["metrics"])} for run in runs)
    assert (max(gluon), [mvr2[u]["passes"] for u in sorted(mvr2)]) == (4, [0, 3, 3])
    assert curve_of(runs[1], steps=2).passes == (0, 1, 3)
    assert (results / "figures" / "figure3_mini.png").stat().st_size > 10_000
    rows = json.loads((results / "figures" / "figure3_mini.json").read_text())
    assert rows[1]["equal_updates"]["difference"]["mean"] == pytest.approx(mvr2[2]["val_loss"] - gluon[2]["val_loss"])
    assert rows[1]["equal_passes"]["budget"] == 3
    assert rows[1]["equal_passes"]["difference"]["mean"] == pytest.approx(mvr2[2]["val_loss"] - gluon[3]["val_loss"])
    page = (results / "README.md").read_text()
    assert "| MVR-2, q 0.5 | lr 0.00025, β 0.9, q 0.5, B 8 | 1 |" in page and "(figures/figure3_mini.png)" in page
    with pytest.raises(UserError, match=r"n_layer = 1, not 2"):
        figures.main([*command, "--", *words[:1], "--n-layer=2", *words[2:]])
    capsys.readouterr()
    figures.main([*command, "--runs", str(tmp_path / "elsewhere"), "--", *words])
    assert "3 done, 0 to run" in capsys.readouterr().out
    assert (results / "README.md").read_text() == page


@pytest.fixture
def tiny(tmp_path, data):
    """A config of a tiny model."""
    path = tmp_path / "tiny.py"
    lines = ["vocab_size = 64", *(word[2:].replace("-", "_") for word in SMALL.split() if "device" not in word)]
    path.write_text("\n".join([*lines, "device = 'cpu'", f"data_dir = {str(data)!r}"]) + "\n")
    return path


def test_the_sweep_to_its_leaderboard(tmp_path, monkeypatch, capsys):
    """Runs with known losses: the best setting is found, written to best.json, evaluated over seeds and ranked."""
    started = []

    def passes(update, end):
        """The gradients of MVR-2 at an update."""
        return 2 * update + (1 if 0 < update < end else -1 if update else 0)

    def run_all(jobs, at_once):
        """The loss is 1/update plus the distance of lr from 5e-4. MVR-2 is 0.1 better, and seeds differ."""
        for job in jobs:
            if job.finished():
                continue
            started.append(job)
            options, two = job.options, job.options["optimizer"] == "mvr2"
            job.folder.mkdir(parents=True, exist_ok=True)
            lines = [
                {"update": u, "tokens": u, "passes": passes(u, job.steps) if two else u, "seconds": u,
                 "val_loss": 2 + abs(math.log(options["lr"] / 5e-4)) + 1 / max(u, 1) - 0.1 * two + options["seed"] % 7 / 100}
                for u in range(0, job.steps + 1, options["val_every"])
            ]  # fmt: skip
            (job.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
            (job.folder / "config.json").write_text(json.dumps(options))
        pack(jobs)

    monkeypatch.setattr(sweep, "run_all", run_all)
    results = tmp_path / "results"
    words = ["--methods", "gluon", "mvr2", "torch.optim:Muon", "--results", str(results), "--runs", str(tmp_path / "runs")]
    sweep.main([*words, "--steps", "40"])
    assert len(started) == 3 * (16 + 8 + 4)
    best = json.loads((results / "sweep" / "best.json").read_text())
    lrs = [trial["lr"] for trial in sweep.trials_of(sweep.METHODS["gluon"])]
    assert best["gluon"]["trial"]["lr"] == min(lrs, key=lambda lr: abs(math.log(lr / 5e-4)))
    sweep.main([*words, "--steps", "40"])
    assert len(started) == 84  # all of it was done
    sweep.main([*words, "--evaluate"])
    assert len(started) == 84 + 3 * 5
    assert (results / "sweep" / "evaluation.png").stat().st_size > 10_000
    text = leaderboard.leaderboard(leaderboard.evaluated(figures.Folders(tmp_path / "runs", results))).splitlines()
    assert text[2].startswith("| MVR-2 |") and {line.split(" | ")[0] for line in text[3:]} == {"| Gluon", "| Muon"}
    assert "`python -m experiments.sweep --evaluate --methods torch.optim:Muon`" in "".join(text)
    assert "| 600 | 1,199 | 600 | -0.100 [-0.100, -0.100] **better** |" in text[2]
    capsys.readouterr()


@pytest.mark.slow
def test_a_users_class_from_tuning_to_the_leaderboard(tmp_path, tiny, monkeypatch, capsys):
    """Runs of up to 4 updates of a tiny model, one trial each: Gluon, and an example class that defers its updates."""
    monkeypatch.setattr(sweep, "SURVIVORS", (1, 1, 1))
    monkeypatch.setattr(sweep, "CONFIG", str(tiny))
    results, name = tmp_path / "results", "examples.my_optimizer:HiddenMVR1"
    places = ["--results", str(results), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    words = ["--methods", "gluon", name, *places]
    options = ["--lr", "1e-3", "--optimizer-options", '{"weight_decay": 0.5}']
    sweep.main([*words, "--steps", "4", *options])
    best = json.loads((results / "sweep" / "best.json").read_text())
    key = "examples.my_optimizer.HiddenMVR1"
    assert best.keys() == {"gluon", key} and best[key]["trial"].keys() == {"lr", "momentum", "gamma"}
    trial = packed_records(results / "sweep" / f"{key}.jsonl")["trial00"]
    assert (trial["config"]["lr"], trial["config"]["optimizer_options"]) == (1e-3, {"weight_decay": 0.5})
    assert "| HiddenMVR1, weight_decay 0.5 | 00 | lr 0.001, β 0.9, γ 0.1 |" in (results / "sweep" / "table.md").read_text()
    with pytest.raises(UserError, match=r"was run with lr = 0.001, not 0.002"):
        sweep.main([*words, "--steps", "4", "--lr", "2e-3", *options[2:]])
    capsys.readouterr()
    sweep.main([*words, "--steps", "4"])  # without options it uses those that were tuned
    assert "2 done, 0 to run" in capsys.readouterr().out
    sweep.main([*words, "--evaluate", "--seeds", "1", "--steps", "4"])
    assert "| HiddenMVR1, weight_decay 0.5 |" in capsys.readouterr().out
    (row,) = (row for row in json.loads((results / "sweep" / "evaluation.json").read_text()) if row["arm"] == key)
    assert (row["updates"], row["passes"], row["equal_passes"]["budget"]) == (4, 7, 7)
    assert (results / "sweep" / "evaluation.png").stat().st_size > 10_000


def test_calibration_times_every_arm(tiny):
    arms = tuple(
        Arm(kind, kind, {"optimizer": kind, "batch_size": 2}, config=str(tiny)) for kind in ("gluon", "mvr2", "previous_batch")
    )
    found = calibrate.calibrate(2, arms, repeats=4)
    assert found["gradient"] > 0 and found["update"].keys() == {"gluon", "mvr2", "previous_batch"}
    assert all(seconds > 0 for seconds in found["update"].values())


# ---- the page


def test_the_leaderboard_agrees_with_the_records():
    """The generated sections of the pages are what the command would write."""
    wrong = leaderboard.stale()
    assert not wrong, f"run python -m experiments.leaderboard: {', '.join(wrong)} differs from the records"


STUDIES = ["calibrate", "figures", "leaderboard", "limit", "map", "rates", "sweep"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_wrong_option_is_one_line(name):
    study = importlib.import_module(f"experiments.{name}")
    with pytest.raises(UserError, match=r"--bogus|required: --figure") as caught:
        study.main(["--bogus=1", "a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--quick", "--max-exponent=2"], ["--seeds=0"]])
def test_rates_need_horizons_and_seeds(words, tmp_path):
    with pytest.raises(UserError, match="give at least"):
        rates.main([*words, f"--out={tmp_path}"])
