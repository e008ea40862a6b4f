"""The picture of the curves: reading, drawing, errors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from scripts import compare, plot
from scripts.compare import y_limits

matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]


def validation(update: int, val_loss: float, gradients: int = 1) -> str:
    record = {"update": update, "tokens": 2048 * update, "passes": gradients * update, "seconds": 0.5 * update}
    return json.dumps({**record, "val_loss": val_loss})


def train(update: int) -> str:
    return json.dumps({"update": update, "tokens": 1, "passes": 1, "seconds": 1.0, "train_loss": 3.0})


@pytest.fixture
def run_folder(tmp_path):
    def write(name: str, *lines: str, config: str | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        if config is not None:
            (folder / "config.json").write_text(config)
        return folder

    return write


def curve(end: float, gradients: int = 1, count: int = 11) -> list[str]:
    return [validation(20 * i, end + 4 * math.exp(-i), gradients) for i in range(count)]


def test_limits_show_the_end():
    good = [(i, 16 if i == 0 else 3 + 1 / i) for i in range(101)]
    low, high = y_limits([good])
    assert low < 3.01 < 3.05 < high < 3.1  # from update 20 on: 3.05 to 3.01
    low, high = y_limits([good, [(i, 3.2 if i < 50 else 1e9) for i in range(101)]])
    assert low < 3.01 < high < 3.5
    assert y_limits([[(0, 5.0), (1, 4.0), (100, math.nan)]])[1] > 5.0
    assert y_limits([[(0, math.nan)]]) == (None, None)


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_draws_and_prints(run_folder, tmp_path, capsys):
    runs = [run_folder(f"run{i}", *curve(2 - i / 10, 1 + i % 2)) for i in range(9)]  # more runs than colours
    out = tmp_path / "new" / "curves.png"
    plot.main([*map(str, runs), "--out", str(out), "--title", "Some $title_x"])
    width, height = size(out)
    assert width > 1.5 * height > 500
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[:10]}) == 1  # aligned
    assert lines[0].split()[:5] == ["run", "final", "best", "updates", "gradients"]
    assert lines[2].split()[:6] == ["run1", "1.9002", "1.9002", "at", "200", "200"]
    assert lines[-1] == str(out)


@pytest.mark.parametrize("name", ["_hidden", "$x", "a" * 150, "ä%"])
def test_draws_odd_names_and_single_points(run_folder, tmp_path, name, recwarn):
    other = run_folder("other", validation(0, 5.0), validation(10, math.nan), validation(20, math.inf))
    out = tmp_path / "curves.png"
    plot.main([str(run_folder(name, validation(0, 5.0))), str(other), "--out", str(out)])
    assert size(out)
    svg = out.with_suffix(".svg")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.main([str(tmp_path / name), "--out", str(svg)])
    assert f"{name}  (5.000)" in svg.read_text()  # the legend has it
    assert [str(warning.message) for warning in recwarn] == []


def test_runs_of_one_name_are_told_apart(run_folder, tmp_path, capsys):
    runs = [run_folder(name, *curve(2.0), config='{"run_name": "same"}') for name in "ab"]
    plot.main([*map(str, runs), "--out", str(tmp_path / "x.png")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["a", "b"]


def test_seeds_are_one_line_with_a_band(run_folder, tmp_path):
    """The picture of `compare --png` is that of `plot`; the legend has the mean over the seeds."""
    runs = [run_folder(f"g_seed{i}", *curve(2.0 + i), config=json.dumps({"lr": 0.1, "seed": i})) for i in range(2)]
    png, svg = tmp_path / "x.png", tmp_path / "x.svg"
    compare.main([*map(str, runs), "--out", str(tmp_path / "x.html"), "--png", str(png)])
    assert size(png) and (tmp_path / "x.html").exists()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.main([*map(str, runs), "--out", str(svg)])
    assert "g  (2.500)" in svg.read_text() and "FillBetweenPolyCollection" in svg.read_text()
    with pytest.raises(UserError, match=r"--png x.html must be a file that ends in"):
        compare.main([str(runs[0]), "--png", "x.html"])


WRONG_METRICS = [
    ([], "no finite val_loss yet"),
    ([train(1)], "no finite val_loss yet"),
    ([validation(1, math.nan)], "no finite val_loss yet"),
    (["{", validation(1, 2.0)], "metrics.jsonl, line 1 is not JSON"),
    (["[1]", validation(1, 2.0)], "line 1 is not an object"),
    (['{"update": 1, "val_loss": 2.0}'], "line 1 has not all of update passes seconds"),
    (['{"update": "1", "passes": 1, "seconds": 1, "val_loss": 2.0}'], "line 1 numbers"),
    (['{"update": 1' + "0" * 400 + ', "passes": 1, "seconds": 1, "val_loss": 2.0}'], "line 1 numbers"),
    (['{"update": 1, "tokens": 1, "passes": 1, "seconds": 1, "val_loss": "low"}'], "line 1 val_loss that is not a number"),
]


@pytest.mark.parametrize("lines, expected", WRONG_METRICS, ids=[expected for _, expected in WRONG_METRICS])
def test_wrong_metrics(run_folder, lines, expected):
    with pytest.raises(UserError) as caught:
        compare.read_groups([run_folder("a", *lines)])
    message = str(caught.value)
    assert all(word in message for word in expected.split()) and len(message.splitlines()) == 1


def test_wrong_command_lines(run_folder, tmp_path):
    good = str(run_folder("good", *curve(2.0)))
    (tmp_path / "file").write_text("")
    for words, expected in [
        ([], "RUN_DIR"),
        ([good, "--colour", "red"], "--colour"),
        ([good, "--out"], "--out"),
        ([str(tmp_path / "none")], "cannot read none/metrics.jsonl runs/run"),
        ([str(tmp_path / "file")], "cannot read"),
        ([good, "--out", str(tmp_path / "x.txt")], "--out x.txt ends in .png"),
        ([good, "--out", str(tmp_path / "file" / "x.png")], "cannot write file/x.png"),
        ([good, "--out", str(tmp_path)], "--out ends in .png"),
        ([good, "--out", ""], "--out ends in .png"),
    ]:
        with pytest.raises(UserError) as caught:
            plot.main(words)
        message = str(caught.value)
        assert all(word in message for word in expected.split()) and len(message.splitlines()) == 1, message


def test_packed_runs(tmp_path, capsys):
    """A packed file stands for all runs in it."""
    metrics = [[json.loads(line) for line in curve(end)] for end in (2.0, 1.0)]
    metrics[1][3]["val_loss"] = None  # it was not finite
    packed = tmp_path / "arm.jsonl"
    runs = [{"run": f"seed{i}", "config": {"lr": i}, "environment": {}, "metrics": lines} for i, lines in enumerate(metrics)]
    packed.write_text("\n".join(map(json.dumps, runs)) + "\n")
    plot.main([str(packed), "--out", str(tmp_path / "x.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["arm", "seed0", "2.0002"], ["arm", "seed1", "1.0002"]]
    with pytest.raises(UserError, match=r"arm\.jsonl, seed2 has no finite val_loss yet"):
        packed.write_text(json.dumps(runs[0] | {"run": "seed2", "metrics": []}) + "\n")
        plot.main([str(packed), "--out", str(tmp_path / "x.png")])


@pytest.mark.slow
def test_as_a_command():
    command = [sys.executable, "-m", "scripts.plot", "nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("plot: cannot read nowhere") and len(ended.stderr.splitlines()) == 1
