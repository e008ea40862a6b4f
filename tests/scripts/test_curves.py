"""Reading metrics.jsonl: torn and repeated lines, malformed lines, names of runs."""

import json
import math

import pytest

from common.errors import UserError
from training.curves import curve, finite, read_metrics, run_name


def line(update, **losses):
    return json.dumps({"update": update, "tokens": 64 * update, "passes": 2 * update, "seconds": 0.5 * update, **losses})


@pytest.fixture
def folder(tmp_path):
    def write(*lines):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        return tmp_path

    return write


@pytest.mark.parametrize("cut", [1, 10, 40, -1])
def test_a_torn_last_line_is_left_out(folder, cut):
    whole = [line(0, val_loss=5.0), line(1, train_loss=4.0)]
    run = folder(*whole, line(2, train_loss=3.0)[:cut])
    assert read_metrics(run) == [json.loads(text) for text in whole]


def test_a_repeated_update_counts_once_the_last_time(folder):
    run = folder(line(0, val_loss=5.0), line(20, val_loss=3.0), "", line(10, val_loss=4.0), line(20, val_loss=2.0))
    assert [(r["update"], r["val_loss"]) for r in curve(read_metrics(run))] == [(0, 5.0), (10, 4.0), (20, 2.0)]
    assert curve(read_metrics(run), "train_loss") == []


def test_losses_that_are_not_finite(folder):
    run = folder(line(0, val_loss=5.0), line(1, val_loss=math.nan), line(2, val_loss=math.inf))
    assert len(curve(read_metrics(run))) == 3
    assert [r["update"] for r in finite(read_metrics(run))] == [0]


@pytest.mark.parametrize(
    "first, said",
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not an object"),
        (json.dumps({"update": 1, "val_loss": 2.0}), "line 1 has not all of update"),
        (line(1).replace("64", '"64"'), "as numbers"),
        (line(1).replace("64", "1" + "0" * 400), "as numbers"),
        (line(1).replace("64", "NaN"), "as numbers"),
        (line(1).replace("64", "true"), "as numbers"),
        (line(1, val_loss="low"), "val_loss that is not a number"),
        (line(1, train_loss=None), "train_loss that is not a number"),
    ],
)
def test_what_is_refused(folder, first, said):
    with pytest.raises(UserError, match=said):
        read_metrics(folder(first, line(2, val_loss=1.0)))


def test_no_metrics(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "config, name",
    [('{"run_name": "b"}', "b"), ("{}", "a"), ("[]", "a"), ("{", "a"), ('{"run_name": 3}', "a"), (None, "a")],
)
def test_name(tmp_path, config, name):
    run = tmp_path / "a"
    run.mkdir()
    if config is not None:
        (run / "config.json").write_text(config)
    assert run_name(run) == name
