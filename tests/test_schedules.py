"""How lr, β and γ move along a run, and the study of it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import schedules
from scripts.schedules import ARMS, KNOBS, Study, draws, passes, steps_from, updates_within
from train_gpt import schedule
from training.config import Config

LINEAR = Config(optimizer="mvr2", schedule="linear", steps=100, warmdown_steps=40, lr=2.0, momentum=0.8, gamma=0.1)


def test_they_follow_the_lr_in_proportion():
    config = replace(LINEAR, momentum_end=1.0, gamma_end=0.9)
    for step in range(61):
        assert schedule(config, step) == {"lr": 2.0, "momentum": 0.8, "gamma": 0.1}
    for step in range(60, 100):
        left = (100 - step) / 40
        found = schedule(config, step)
        assert found["lr"] == pytest.approx(2 * left, rel=1e-12)
        assert 1 - found["momentum"] == pytest.approx(0.2 * left, rel=1e-12)  # 1-β ∝ lr, as in the theory of MVR
        assert found["gamma"] == pytest.approx(0.9 - 0.8 * left, rel=1e-12)


def test_they_stay_where_they_are_not_asked_to_move():
    assert {(schedule(LINEAR, step)["momentum"], schedule(LINEAR, step)["gamma"]) for step in range(100)} == {(0.8, 0.1)}


def test_a_warm_up_moves_the_lr_alone():
    config = replace(LINEAR, warmup_steps=3, momentum_end=0.99)
    assert [schedule(config, step) for step in range(4)] == [
        {"lr": lr, "momentum": 0.8, "gamma": 0.1} for lr in (0.5, 1.0, 1.5, 2.0)
    ]


@given(
    steps=st.integers(1, 300), warmdown=st.integers(0, 400), momentum=st.floats(0, 0.999), end=st.floats(0, 1),
    gamma=st.floats(0, 2), gamma_end=st.floats(0, 2), share=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_every_step_is_one_that_an_optimizer_takes(steps, warmdown, momentum, end, gamma, gamma_end, share):
    config = replace(
        LINEAR, steps=steps, warmdown_steps=warmdown, momentum=momentum, momentum_end=end, gamma=gamma, gamma_end=gamma_end
    )
    found = schedule(config, int(share * steps))
    assert 0 <= found["momentum"] < 1
    assert min(gamma, gamma_end) - 1e-12 <= found["gamma"] <= max(gamma, gamma_end) + 1e-12
    assert 0 < found["lr"] <= 2.0


@pytest.mark.parametrize("optimizer, lr, weight", [("gluon", -3 / 4, -1 / 2), ("mvr2", -2 / 3, -2 / 3)])
def test_the_theorys_powers(optimizer, lr, weight):
    config = replace(LINEAR, optimizer=optimizer, schedule="theory")
    assert schedule(config, 0) == {"lr": 2.0, "momentum": 0.0, "gamma": 0.1}
    found = schedule(config, 63)
    assert found["lr"] == pytest.approx(2 * 64**lr) and 1 - found["momentum"] == pytest.approx(64**weight)


# ---- the study


def test_a_latin_hypercube_has_one_draw_in_each_stratum():
    points = draws(7, 8)
    for name in KNOBS:
        assert sorted(math.floor(8 * point[name]) for point in points) == list(range(8))
    assert draws(7, 8) == points != draws(8, 8)


def test_refinements_stay_in_the_cube_and_are_the_same_steps_for_all():
    corner, middle = dict.fromkeys(KNOBS, 1.0), dict.fromkeys(KNOBS, 0.5)
    for stage, (count, deviation) in enumerate(schedules.REFINEMENTS):
        near_corner, near_middle = steps_from(corner, stage), steps_from(middle, stage)
        assert len(near_corner) == len(near_middle) == count
        for a, b in zip(near_corner, near_middle, strict=True):
            for name in KNOBS:
                assert 0 <= a[name] <= 1 and abs(b[name] - 0.5) < 4 * deviation
                assert a[name] == pytest.approx(min(1.0, b[name] + 0.5)) or b[name] in (0.0, 1.0)


@pytest.mark.parametrize("name", ARMS)
def test_the_options_of_an_arm_are_a_config_and_fit_the_budget(name):
    arm = ARMS[name]
    for point in (dict.fromkeys(KNOBS, 0.0), dict.fromkeys(KNOBS, 0.5), dict.fromkeys(KNOBS, 1.0)):
        updates = updates_within(lambda updates, point=point: arm.options(point, updates), 200)
        options = arm.options(point, updates)
        config = replace(Config(), batch_size=2, **options)
        low, high = KNOBS["theory_lr" if "theory_lr" in arm.knobs else "lr"]
        assert low <= config.lr <= high
        assert passes(options) <= 200 < passes(arm.options(point, updates + 1))
        # What MVR-2 evaluates twice is what the trainer's schedule says.
        twice = [schedule(config, step)["gamma"] > 0 for step in range(1, updates)] if config.optimizer == "mvr2" else []
        assert passes(options) == updates + sum(twice) / config.correction_every


def test_the_study_end_to_end(tmp_path, monkeypatch):
    """With a trainer that answers at once: every arm has as many trials, the best of them is evaluated, the page is filled."""
    import json

    def run(jobs, at_once):
        for job in jobs:
            lr = float(job.options["lr"])
            loss = abs(math.log(lr / 1e-3)) + (0.01 * job.options["seed"]) * (job.options["optimizer"] == "mvr1")
            job.folder.mkdir(parents=True, exist_ok=True)
            steps = job.options["steps"]
            lines = [{"update": u, "passes": u, "val_loss": loss + 1 - u / steps} for u in (0, steps)]
            (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(schedules, "run_all", run)
    (tmp_path / "mini").mkdir()
    speed = {"gradient": 1.0, "update": {"gluon": 0.5, "mvr1": 0.5, "mvr2": 0.5}}
    (tmp_path / "mini" / "calibration.json").write_text(json.dumps({"batches": {"2": speed}}))
    tmp_path = tmp_path / "schedules"
    tmp_path.mkdir()
    (tmp_path / "README.md").write_text("<!-- b2_20 -->\n<!-- end of b2_20 -->\n")
    schedules.main(["--budget", "20", "--seeds", "2", "--out", str(tmp_path), "--arms", "gluon", "mvr1", "mvr2"])
    assert Study(tmp_path, 2, schedules.BUDGET).name == "b2"
    study = Study(tmp_path, 2, 20)
    double = study.job("gluon_double", draws(1, 2)[0], 0, "x").options
    assert (double["steps"], double["batch_size"]) == (10, 4)
    for name in ("gluon", "mvr1", "mvr2"):
        trials = [job for stage in study.stages(name) for job in stage]
        assert len(trials) == 12 and len({job.folder for job in trials}) == 12
        lrs = [abs(math.log(job.options["lr"] / 1e-3)) for job in trials]
        assert abs(math.log(study.evaluations(name, 1)[0].options["lr"] / 1e-3)) == min(lrs)
    rows = json.loads((tmp_path / "b2_20.json").read_text())
    assert [row["arm"] for row in rows] == ["gluon", "mvr1", "mvr2"]
    assert [row["seconds"] for row in rows] == [30, 30, 19 + 5]  # 20 and 20 gradients, 20 updates; 19 and 10
    difference = next(row for row in rows if row["arm"] == "mvr1")["minus_gluon"]
    assert difference["mean"] == pytest.approx(0.005) and difference["n"] == 2
    page = (tmp_path / "README.md").read_text()
    assert "| MVR-1 |" in page and "b2_20.png" in page and (tmp_path / "b2_20.png").stat().st_size > 1000
    assert "MVR-2" in (tmp_path / "b2_20_trials.md").read_text()
