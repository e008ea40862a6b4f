"""Runs become curves, and arms are compared: gradients, budgets, pages."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.comparison import Arm, Comparison, body, compare, curve_of, replace_section
from experiments.intervals import Curve, difference, interval, to_reach
from experiments.setup import evaluations
from reading.runs import Run, write_packed


def run_of(losses, passes=1, optimizer="gluon", name="seed0", diverged=None):
    """A run that ends at the last of the losses."""
    lines = [
        {"update": u, "tokens": 8 * u, "passes": passes * u, "seconds": 0.5 * u, "val_loss": loss} for u, loss in losses.items()
    ]
    return Run(name, Path("arm.jsonl"), {"optimizer": optimizer, "steps": max(losses)}, {}, lines, diverged, packed=True)


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


def test_records_become_curves():
    found = curve_of(run_of({0: 3.0, 2: 2.0, 4: 1.0}, passes=2), steps=2, share=2.0, speed=(10.0, 1.0))
    assert found == Curve((0.0, 2.0), (0.0, 8.0), (0.0, 82.0), (3.0, 2.0))
    lost = curve_of(run_of({0: 3.0, 2: 2.0}, diverged="the loss is nan"), steps=10)
    assert lost.updates == (0.0, 2.0, 10.0) and lost.losses == (3.0, 2.0, math.inf)


def test_a_deferred_run_is_placed_by_the_gradients_that_its_weights_took():
    """Metrics count evaluations: 2u+1 in the middle, where step u has begun, and 2K-1 at the end."""
    run = run_of({0: 3.0, 2: 2.0, 4: 1.0}, optimizer="mvr2")
    for point, passes in zip(run.metrics, (0, 5, 7), strict=True):
        point["passes"] = passes
    assert curve_of(run, steps=4).passes == (0, 3, 7)
    assert curve_of(run, steps=4, speed=(10.0, 1.0)).seconds == (0, 32, 74)
    run.config["steps"] = 8  # a run that continues has 9 passes there, not 7
    run.metrics[-1]["passes"] = 9
    assert curve_of(run, steps=4).passes == (0, 3, 7)
    # A longer Gluon run has the same losses at the same gradients, so the difference is 0.
    gluon = curve_of(run_of({0: 3.0, 3: 2.0, 7: 1.0, 9: 0.5}), steps=9)
    assert [gluon.at("passes", p) for p in (0, 3, 7)] == [3.0, 2.0, 1.0]
    assert difference({0: curve_of(run, steps=4)}, {0: gluon}, "passes")[1].mean == 0.0
    run.metrics[1] |= {"skipped": 1, "passes": 7}  # a skipped step evaluates too
    assert curve_of(run, steps=4).passes[1] == 7 - 3


def test_sections_of_a_page_are_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb")
    replace_section(page, "x", "new\n")
    replace_section(page, "y", "other")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb"


def comparison_of(folder, losses, passes):
    arms = tuple(Arm(key, key.upper(), {"lr": 0.1, "batch_size": 8}) for key in losses)
    made = Comparison("Two arms", arms, (0, 1), dict.fromkeys(losses, 4), folder / "runs", folder / "records")
    made.records.mkdir()
    for key in losses:
        runs = [run_of(curve, passes[key], name=f"seed{s}") for s, curve in enumerate(losses[key])]
        write_packed(made.records / f"{key}.jsonl", runs)
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


def test_a_page_names_every_machine_once(tmp_path):
    made = replace(comparison_of(tmp_path, {"base": []}, {"base": 1}), seeds=(0, 1, 2))
    runs = [run_of({0: 9.0, 4: 2.0}, name=f"seed{seed}") for seed in range(3)]
    on = [replace(run, environment={"device": device, "threads": 1}) for run, device in zip(runs, ("B", "A", "B"), strict=True)]
    write_packed(made.records / "base.jsonl", on)
    assert "Seeds 0, 1, 2; B and A, 1 thread(s) a run" in body(made, None, "picture.png", [])
