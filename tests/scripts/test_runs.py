"""Reading runs from their folders: torn, repeated and malformed lines, names; and from packed files."""

import json
import math
from dataclasses import replace

import pytest

from common.errors import UserError
from reading.runs import read_packed, read_run, read_runs, write_packed


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
    assert read_run(run).metrics == [json.loads(text) for text in whole]


def test_a_repeated_update_counts_once_the_last_time(folder):
    run = folder(line(0, val_loss=5.0), line(20, val_loss=3.0), "", line(10, val_loss=4.0), line(20, val_loss=2.0))
    assert [(r["update"], r["val_loss"]) for r in read_run(run).curve()] == [(0, 5.0), (10, 4.0), (20, 2.0)]
    assert read_run(run).curve("train_loss") == []


def test_losses_that_are_not_finite(folder):
    run = folder(line(0, val_loss=5.0), line(1, val_loss=math.nan), line(2, val_loss=math.inf))
    assert len(read_run(run).curve()) == 3
    assert [r["update"] for r in read_run(run).finite()] == [0]


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
        read_run(folder(first, line(2, val_loss=1.0)))


def test_no_metrics(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "config, name",
    [('{"run_name": "b"}', "b"), ("{}", "a"), ("[]", "a"), ("{", "a"), ('{"run_name": 3}', "a"), (None, "a")],
)
def test_name(tmp_path, config, name):
    run = tmp_path / "a"
    run.mkdir()
    (run / "metrics.jsonl").write_text(line(0, val_loss=5.0))
    if config is not None:
        (run / "config.json").write_text(config)
    assert read_run(run).name == name


@pytest.mark.parametrize(
    "launches, environment", [('[{}, {"threads": 1}]', {"threads": 1}), ("[]", {}), ("{", {}), ("[3]", {})]
)
def test_the_environment_is_the_last_launchs(folder, launches, environment):
    run = folder(line(0, val_loss=5.0))
    (run / "environment.json").write_text(launches)
    assert read_run(run).environment == environment


def test_packing_keeps_all_of_a_run(folder, tmp_path):
    """Folder, packed file and packed again: the same run. A loss that is not finite is null in the file."""
    run = folder(line(0, val_loss=5.0), line(10, val_loss=math.nan, train_loss=4.0))
    (run / "config.json").write_text('{"run_name": "seed0", "lr": 0.1}')
    (run / "diverged.txt").write_text("the loss is nan\n")
    packed, again = tmp_path / "arm.jsonl", tmp_path / "again.jsonl"
    write_packed(packed, [read_run(run)])
    assert "NaN" not in packed.read_text()
    found = read_packed(packed)["seed0"]
    assert (found.name, found.label, found.config["lr"], found.diverged) == ("seed0", "arm seed0", 0.1, "the loss is nan")
    assert [r["update"] for r in found.curve()] == [0, 10] and math.isnan(found.curve()[1]["val_loss"])
    write_packed(again, read_packed(packed).values())
    assert again.read_bytes() == packed.read_bytes()


def test_a_packed_file_is_parsed_once_until_it_changes(folder, tmp_path, monkeypatch):
    packed, run = tmp_path / "arm.jsonl", read_run(folder(line(0, val_loss=5.0)))
    write_packed(packed, [run])
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert [len(read_packed(packed)) for _ in range(3)] == [1, 1, 1] and len(parsed) == 1
    write_packed(packed, [run, replace(run, name="other")])
    assert list(read_packed(packed)) == sorted([run.name, "other"]) and len(parsed) == 3


def test_folders_and_packed_files_alike(folder, tmp_path):
    run, packed = folder(line(0, val_loss=5.0)), tmp_path / "arm.jsonl"
    write_packed(packed, [replace(read_run(run), name=name) for name in ("seed1", "seed0")])
    assert [found.label for found in read_runs([packed, run])] == ["arm seed0", "arm seed1", run.name]
    packed.write_text("")
    with pytest.raises(UserError, match=r"arm\.jsonl is empty"):
        read_runs([packed])


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"run": "a"}',
        '{"run": "a", "config": {}, "metrics": []}',
        '{"run": "a", "config": {}, "environment": {}, "metrics": [{"update": 0}]}',
    ],
)
def test_a_damaged_packed_file_is_reported(tmp_path, text):
    path = tmp_path / "arm.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match="line 1 is not a packed run"):
        read_packed(path)
    with pytest.raises(UserError, match="cannot read"):
        read_packed(tmp_path / "none.jsonl")
