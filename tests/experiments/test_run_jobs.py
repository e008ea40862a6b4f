"""Runs of a study: their states, packing, and the processes that train them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.shards import write_shard
from experiments import sweep
from experiments.run_jobs import ROOT, Job, pack, run_all
from reading.runs import Run, read_packed, write_packed


def run_of(losses, name="seed0"):
    """A packed run with these losses, by update."""
    lines = [{"update": u, "tokens": 8 * u, "passes": u, "seconds": 0.5 * u, "val_loss": loss} for u, loss in losses.items()]
    return Run(name, Path("arm.jsonl"), {"optimizer": "gluon", "steps": max(losses)}, {}, lines, packed=True)


def test_states_of_a_run_and_its_record(tmp_path):
    job = Job(tmp_path / "runs" / "seed0", tmp_path / "arm.jsonl", "c.py", {"steps": 4, "lr": 0.1})
    assert job.state(job.read()) == "new"
    job.folder.mkdir(parents=True)
    lines = [json.dumps(point) for point in run_of({0: 1.0, 2: 3.0, 4: 0.5}).metrics]
    metrics = job.folder / "metrics.jsonl"
    metrics.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    (job.folder / "config.json").write_text('{"lr": 0.1, "compile": "auto"}')
    assert job.state(job.read()) == "begun"
    pack([job])
    assert not job.packed.exists()
    metrics.write_text("\n".join(lines) + "\n")
    assert job.state(job.read()) == "done"
    pack([job])
    metrics.unlink()  # the record is enough
    assert job.state(job.read()) == "done" and job.changed(job.read()) == ""
    assert [point["val_loss"] for point in read_packed(job.packed)["seed0"].curve()] == [1.0, 3.0, 0.5]
    assert "lr = 0.1, not 0.2" in Job(job.folder, job.packed, "c.py", {"steps": 4, "lr": 0.2}).changed(job.read())
    assert not Job(job.folder, job.packed, "c.py", {"steps": 4, "lr": 0.1, "compile": "on"}).changed(job.read())
    assert Job(job.folder, job.packed, "c.py", {"steps": 6}).state(job.read()) == "begun"
    metrics.write_text("\n".join(lines[:2]) + "\n")
    (job.folder / "diverged.txt").write_text("loss is nan\n")
    assert job.state(job.read()) == "diverged"
    pack([job])
    assert read_packed(job.packed)["seed0"].diverged == "loss is nan"


def test_a_run_without_the_validation_that_is_asked_for(tmp_path):
    """A longer run counts as done, but has no loss for an update at which it was not validated."""
    job = Job(tmp_path / "seed0", tmp_path / "arm.jsonl", "c.py", {"steps": 3})
    write_packed(job.packed, [run_of({0: 1.0, 2: 3.0, 4: 0.5})])
    assert [job.loss_at(job.read(), update) for update in (2, 4)] == [3.0, 0.5] and math.isnan(job.loss_at(job.read(), 5))
    with pytest.raises(UserError, match="seed0 was not validated at update 3; choose other --steps"):
        job.state(job.read())
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    (tmp_path / "sweep").mkdir()
    write_packed(tmp_path / "sweep" / "gluon.jsonl", [run_of({0: 1.0, 200: 3.0}, "trial00")])
    (tmp_path / "sweep" / "best.json").write_text("{}")
    with pytest.raises(UserError, match="trial00 was not validated at update 10"):
        sweep.main(["--methods", "gluon", "--steps", "40", *folders])
    assert (tmp_path / "sweep" / "best.json").read_text() == "{}"


def test_a_folder_that_can_not_be_made_is_told_before_the_first_run(tmp_path):
    (tmp_path / "file").write_text("")
    job = Job(tmp_path / "seed0", tmp_path / "file" / "arm.jsonl", "c.py", {"steps": 3})
    with pytest.raises(FileExistsError):
        pack([job])


# ---- processes


@pytest.fixture
def config(tmp_path):
    """A config of a tiny model, and data for 40,000 updates of it."""
    (tmp_path / "data").mkdir()
    for split, count in (("train", 2_600_000), ("val", 2000)):
        write_shard(tmp_path / "data" / f"x_{split}_000001.bin", np.arange(count, dtype=np.int64).astype(np.uint16) % 50)
    options = {
        "vocab_size": 64, "n_layer": 1, "n_head": 1, "d_model": 8, "seq_len": 8, "batch_size": 8, "val_tokens": 8,
        "val_every": 50_000, "log_every": 10, "checkpoint_every": 0, "device": "cpu", "data_dir": str(tmp_path / "data"),
    }  # fmt: skip
    path = tmp_path / "tiny.py"
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in options.items()) + "\n")
    return path


def jobs_of(config, **settings):
    """A job for each of the named settings."""
    folder, packed = config.parent / "runs", config.parent / "arm.jsonl"
    return [Job(folder / name, packed, str(config), {"optimizer": "gluon", **own}) for name, own in settings.items()]


@pytest.mark.slow
def test_a_run_that_diverges_is_done_and_one_that_fails_stops_the_study(config, capsys):
    good, bad = jobs = jobs_of(config, good={"steps": 3, "lr": 1e-3}, bad={"steps": 3, "lr": 1e30})
    run_all(jobs, 2)
    assert good.state(good.read()) == "done" and bad.state(bad.read()) == "diverged"
    packed = read_packed(good.packed)
    assert packed["good"].environment["threads"] == 1 and packed["good"].config["resume"] == "auto"
    assert "is not finite" in packed["bad"].diverged or "is nan" in packed["bad"].diverged
    assert math.isinf(bad.loss_at(bad.read(), 3))
    capsys.readouterr()
    run_all(jobs, 2)
    assert capsys.readouterr().out == "2 runs: 2 done, 0 to run\n"
    with pytest.raises(UserError, match=r"long failed: .*--steps"):
        run_all(jobs_of(config, long={"steps": 10_000_000}), 1)
    with pytest.raises(UserError, match="--lr must be"):
        run_all(jobs_of(config, wrong={"steps": 3, "lr": -1}), 1)


STUDY = """
import signal, sys
from common.errors import one_line_errors
from experiments.run_jobs import CONTINUES, run_all
from pathlib import Path
from tests.experiments.test_run_jobs import jobs_of
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without it
    with one_line_errors("study", interrupted=CONTINUES):
        run_all(jobs_of(Path(sys.argv[1]), a={"steps": 30_000}, b={"steps": 30_000}, c={"steps": 30_000}), 2)
"""


@pytest.mark.slow
def test_a_study_that_is_stopped_continues(config, tmp_path):
    """SIGTERM to the study, then Ctrl-C in its terminal: each time the two runs that had begun write a checkpoint."""
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    steps = []
    for number, group in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        process = subprocess.Popen(
            [sys.executable, str(script), str(config)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(process, lambda: all(launches_of(tmp_path / "runs" / name) > len(steps) for name in "ab"))
            time.sleep(0.5)
            os.killpg(process.pid, number) if group else process.send_signal(number)
            out, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, said
        assert said == "study: stopped; the same command continues\n"
        assert out == "3 runs: 0 done, 3 to run\n" and not (tmp_path / "runs" / "c").exists()
        steps.append([newest_step(tmp_path / "runs" / name) for name in "ab"])
    assert all(0 < first < second for first, second in zip(*steps, strict=True))


def launches_of(run):
    """How often a run was started and has logged since."""
    if not (run / "environment.json").exists() or not (run / "metrics.jsonl").exists():
        return 0
    launches = json.loads((run / "environment.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    return len(launches) if lines and json.loads(lines[-1])["update"] > launches[-1]["step"] + 10 else len(launches) - 1


def newest_step(run):
    return max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


def wait_for(process, what):
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
