"""The studies end to end at a tiny size, and the pages that they write."""

import importlib
import json
import math
import re

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.shards import write_shard
from experiments import beta_lr, calibrate, figures, leaderboard, rates, sweep
from experiments.comparison import Arm, curve_of
from experiments.controls import DoubleAverage
from experiments.run_jobs import Job, pack
from optim import Gluon, GluonMVR2
from reading.runs import Run, read_packed, write_packed

SMALL = "--n-layer=1 --n-head=1 --d-model=8 --seq-len=8 --val-tokens=8 --val-every=1 --device=cpu"


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
    assert trials[0] == {"embed_radius": 100.0, "weight_decay": 0.0} if method.base else trials[0]["lr"] == method.recipe["lr"]
    assert all(trial.keys() == set(method.knobs) for trial in trials)
    for knob, low, high in (("lr", method.lr_from, 16 * method.lr_from), ("momentum", 0.05, 0.95), ("gamma", 0.02, 0.5),
                            ("embed_radius", 25, 400), ("weight_decay", 0.1, 10)):  # fmt: skip
        values = [1 - t[knob] if knob == "momentum" else t[knob] for t in trials[1:] if knob in t]
        places = sorted(int(len(values) * math.log(v / low) / math.log(high / low) * 0.9999 + 1e-3) for v in values)
        assert places in ([], list(range(len(values)))), knob


def test_every_method_draws_the_same():
    found = [[trial["lr"] / m.lr_from for trial in sweep.trials_of(m)[1:]] for m in sweep.METHODS.values() if not m.base]
    assert all(ratios == pytest.approx(found[0], rel=5e-3) for ratios in found)


def test_halving(tmp_path, monkeypatch):
    """Each rung keeps the better half. The loss is the distance of β from 0.5, plus a term that falls with the updates."""
    monkeypatch.setattr(Job, "loss_at", lambda job, run, steps: abs(job.options["momentum"] - 0.5) + 1 / steps)
    gluon = sweep.METHODS["gluon"]
    rungs = sweep.rungs_of(sweep.Place(tmp_path, tmp_path), "gluon", gluon, 40)
    assert [len(rung) for rung in rungs] == [16, 8, 4, 0]
    assert [{job.options["steps"] for job, _ in rung} for rung in rungs] == [{10}, {20}, {40}, set()]
    betas = sorted((t["momentum"] for t in sweep.trials_of(gluon)), key=lambda beta: abs(beta - 0.5))
    assert [job.options["momentum"] for job, _ in rungs[2]] == betas[:4]
    monkeypatch.setattr(Job, "loss_at", lambda job, run, steps: math.nan if steps == 20 else 1.0)
    assert len(sweep.rungs_of(sweep.Place(tmp_path, tmp_path), "gluon", gluon, 40)) == 2


@pytest.mark.parametrize("knob, best", [("lr", 0.02), ("lr", 1e-5), ("q", 0.97), ("momentum", 0.99)])
def test_the_range_grows_until_its_edge_is_not_the_best(tmp_path, monkeypatch, knob, best):
    """The loss is the distance of a knob from a best value that lies outside the range."""

    def place(value):
        return math.log(value if knob == "lr" else 1 - value + 1e-9)

    known = math.inf  # trials from this one on have no score yet

    def score(job, run, steps):
        number = int(job.folder.name.removeprefix("trial"))
        return math.nan if number >= known else abs(place(job.options[knob]) - place(best))

    monkeypatch.setattr(Job, "loss_at", score)
    folders, mvr2 = sweep.Place(tmp_path, tmp_path), sweep.METHODS["mvr2"]
    beyond = sweep.rungs_of(folders, "mvr2", mvr2, 40)[-1]
    values = [job.options[knob] for job, _ in beyond]
    assert {job.options["steps"] for job, _ in beyond} == {40} and beyond[0][0].folder.name == "trial16"
    assert len(values) >= 2 and beyond[-1][1] >= beyond[-2][1]  # the last trial is past the best one
    assert abs(place(values[-2]) - place(best)) < math.log(2)
    known = 17
    assert [job.folder.name for job, _ in sweep.rungs_of(folders, "mvr2", mvr2, 40)[-1]] == ["trial16", "trial17"]
    sweep.report(folders, {"mvr2": mvr2}, 40)
    assert json.loads((tmp_path / "sweep" / "best.json").read_text()) == {}  # not until all is known
    known = math.inf
    sweep.report(folders, {"mvr2": mvr2}, 40)
    found = json.loads((tmp_path / "sweep" / "best.json").read_text())["mvr2"]["trial"]
    assert found[knob] == values[-2]


def test_a_method_goes_on_from_the_best_setting_of_another(tmp_path):
    folders, radii = sweep.Place(tmp_path, tmp_path), sweep.METHODS["mvr2_radii"]
    with pytest.raises(UserError, match="mvr2 must be tuned first"):
        sweep.rungs_of(folders, "mvr2_radii", radii, 40)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "best.json").write_text('{"mvr2": {"trial": {"lr": 0.001, "momentum": 0.7, "q": 0.6}}}')
    (start, _), (job, _), *_ = sweep.rungs_of(folders, "mvr2_radii", radii, 40)[0]
    base = sweep.job_of(folders, "mvr2", sweep.METHODS["mvr2"], 7, {"lr": 0.001, "momentum": 0.7, "q": 0.6}, 10, 40)
    first, before = start.load().to_dict(), base.load().to_dict()
    differs = {name for name in first if first[name] != before[name]} - {"run_name", "results_dir"}
    assert differs == {"weight_decay"} and not first["weight_decay"]  # the first trial is the best one of the base
    assert 25 <= job.options["embed_radius"] <= 400 and 0.1 <= job.options["weight_decay"] <= 10


def test_records_are_read_without_the_package(tmp_path):
    """A class that was tuned and can't be imported here keeps its row: title, version, fixed options and knobs."""
    config = {"optimizer": "no_such_package:Best", "optimizer_options": {"alpha": 2}, "lr": 0.01, "momentum": 0.9}
    config |= {"q": None, "gamma": None, "beta1": None, "steps": 4}
    metrics = [{"update": u, "passes": u, "seconds": u, "tokens": u, "val_loss": 2.0} for u in (0, 4)]
    environment = {"package": "no_such_package 1.2"}
    (tmp_path / "sweep").mkdir()
    run = Run("trial00", tmp_path, config, environment, metrics)
    write_packed(tmp_path / "sweep" / "no_such_package.Best.jsonl", [run])
    method = sweep.methods_of(sweep.Place(tmp_path, tmp_path))["no_such_package.Best"]
    assert (method.title, method.knobs) == ("Best (no_such_package 1.2), alpha 2", ("lr", "momentum"))
    assert method.options == {"optimizer": "no_such_package:Best", "optimizer_options": {"alpha": 2}}
    assert curve_of(run, 4).passes == (0.0, 4.0)


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
@pytest.mark.parametrize("scale", figures.SCALES)
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
    if scale == "matched":
        assert f"--batch-size={16 if figure == 2 else 64}" in text and "1,999" in text
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
    "rates.json": (rates, "--replot"),
}  # fmt: skip


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"gradient": {"8": {}}, "gluon": {}, "lr": [1]}'])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, name, text):
    (module, words), path = DAMAGED[name], tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":  # its lines are checked elsewhere
        old = {"update": 4, "tokens": 0, "passes": 0, "seconds": 0.0, "val_loss": 1.0}
        runs = [{"run": run, "config": {}, "environment": {}, "metrics": [old]} for run in ("seed0", "trial00")]
        text = "\n".join(map(json.dumps, runs))
    path.write_text(text)
    places = ["--out", str(tmp_path)] if module is rates else ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=f"{path.name} is damaged or was written by another version") as caught:
        module.main([*words.split(), *places])
    assert "\n" not in str(caught.value) and path.read_text() == text


@pytest.mark.parametrize("words", ["--steps 0", "--steps -4", "--seeds 0", "--jobs 0", "--jobs two"])
@pytest.mark.parametrize("module", [figures, sweep, beta_lr])
def test_numbers_are_at_least_one(module, words):
    with pytest.raises(UserError, match="must be an integer of at least 1"):
        module.main(["--figure=1", *words.split()] if module is figures else words.split())


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
    runs = [read_packed(records / f"{key}.jsonl")["seed0"] for key in ("gluon", "mvr2_q0.5")]
    gluon, mvr2 = ({point["update"]: point for point in run.curve()} for run in runs)
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
            if job.finished(job.read()):
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
    inside = [job for job in started if int(job.folder.name[-2:]) < sweep.TRIALS]
    assert len(inside) == 3 * (16 + 8 + 4) and len(started) - len(inside) <= 2  # the rest lie beyond an edge
    tuned = len(started)
    best = json.loads((results / "sweep" / "best.json").read_text())
    lrs = [trial["lr"] for trial in sweep.trials_of(sweep.METHODS["gluon"])]
    assert best["gluon"]["trial"]["lr"] == min(lrs, key=lambda lr: abs(math.log(lr / 5e-4)))
    sweep.main([*words, "--steps", "40"])
    assert len(started) == tuned  # all of it was done
    sweep.main([*words, "--evaluate"])
    assert len(started) == tuned + 3 * 5
    assert (results / "sweep" / "evaluation.png").stat().st_size > 10_000
    sweep.main([*words, "--evaluate", "--decay", "--seeds", "2"])
    decayed = [job.options for job in started[tuned + 3 * 5 :]]
    assert len(decayed) == 3 * 2 and {(o["schedule"], o["warmdown_steps"], o["steps"]) for o in decayed} == {
        ("linear", 180, 600)
    }
    place = sweep.Place(tmp_path / "runs", results)
    text = leaderboard.leaderboard(leaderboard.evaluated(place), place.command).splitlines()
    assert "| -0.100 [-0.100, -0.100] **better** | `python" in text[2]  # with the decay too
    assert text[2].startswith("| MVR-2 |") and {line.split(" | ")[0] for line in text[3:]} == {"| Gluon", "| Muon"}
    assert "`python -m experiments.sweep --evaluate --methods torch.optim:Muon`" in "".join(text)
    assert "| 600 | 1,199 | 600 | > 1,200 | -0.100 [-0.100, -0.100] **better** |" in text[2]
    (gluon,) = (line for line in text if line.startswith("| Gluon |"))
    assert "| 600 | 600 | 600 | 600 |  |  |  | +0.100 [+0.100, +0.100] **worse** |" in gluon  # the last from the best
    done, batches = len(started), {"gluon": 64, "mvr2": 64, "gluon_2b": 128}
    larger = ["--methods", *batches, *words[4:], "--batch-size", "64"]
    sweep.main([*larger, "--steps", "40"])
    sweep.main([*larger, "--evaluate", "--seeds", "2"])
    assert {job.packed.stem: job.options["batch_size"] for job in started[done:]} == batches
    assert {job.packed.relative_to(results).parts[0] for job in started[done:]} == {"sweep_b64"}
    rows = json.loads((results / "sweep_b64" / "evaluation.json").read_text())
    assert {row["arm"]: row["options"]["batch_size"] for row in rows} == batches
    place = sweep.Place(tmp_path / "runs", results, 64)
    text = leaderboard.leaderboard(leaderboard.evaluated(place), place.command)
    assert "`python -m experiments.sweep --batch-size 64 --evaluate --methods mvr2`" in text and text.count("\n| ") == 3
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
    trial = read_packed(results / "sweep" / f"{key}.jsonl")["trial00"]
    assert (trial.config["lr"], trial.config["optimizer_options"]) == (1e-3, {"weight_decay": 0.5})
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
    assert calibrate.gradient_seconds(figures.config_of(arms[0], 1), repeats=4) > 0
    found = calibrate.update_seconds(arms, repeats=4)
    assert found.keys() == {"gluon", "mvr2", "previous_batch"} and min(found.values()) > 0


# ---- the page


def test_the_leaderboard_agrees_with_the_records():
    """The generated sections of the pages are what the command would write."""
    wrong = leaderboard.stale()
    assert not wrong, f"run python -m experiments.leaderboard: {', '.join(wrong)} differs from the records"


STUDIES = ["calibrate", "figures", "leaderboard", "beta_lr", "rates", "sweep", "why"]


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
