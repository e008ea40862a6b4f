"""experiments/why.py: the page from made-up records, and the study end to end at a tiny size."""

import json

import pytest

from common.errors import UserError
from data.tokenize_text import tokenize_documents
from experiments import why
from experiments.comparison import RESULTS
from reading.runs import read_packed

SEEDS = (0, 1, 2)
MOMENT = {"g": 1.0, "g2": 1.0, "product": -0.5, "d": 4.0, "sigma": 8.0, "difference": 2.0}


def made_up(results, loss):
    """Records of all four parts, whose loss is `loss(arm, lr, seed)` at every update."""
    for part, arms in (("exact", why.EXACT), ("double", why.EXACT[2:]), ("near", why.ARMS), ("along", (why.KEPT,))):
        folder = results / "why" / part
        folder.mkdir(parents=True)
        for arm in arms:
            runs = []
            for lr in why.LRS:
                for seed in SEEDS:
                    at = loss(arm, lr, seed)
                    lines = [{"update": u, "tokens": u, "passes": u, "seconds": u} for u in range(0, 301, 20)]
                    if part == "near":
                        lines = [line | {"val_loss": at} for line in lines]
                    elif part == "along":
                        lines = [line | {"train_loss": at, "moments": {"q": MOMENT, "v": MOMENT}} for line in lines]
                    else:
                        lines = [line | {"train_loss": at, "cosine": -0.5, "change": 2.0} for line in lines]
                    config = {"lr": lr, "seed": seed}
                    runs.append({"run": why.name_of(lr, seed), "config": config, "environment": {}, "metrics": lines})
            (folder / f"{arm}.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))


def place(arm, lr, seed):
    """Gluon with β = 0.9 at 1, without momentum at 2, MVR-1 at 1.9; the seeds and lrs differ by more than the methods."""
    return {why.KEPT: 1.0, why.DROPPED: 2.0, "mvr1_beta0.9": 1.9, "mvr2_q0.5": 0.95}.get(arm, 1.5) + 3 * seed + 1e4 * lr


def test_the_page_says_where_each_method_lies(tmp_path, capsys):
    made_up(tmp_path, place)
    why.main(["--plot-only", "--results", str(tmp_path)])
    text = (tmp_path / "why" / "README.md").read_text()
    assert text in capsys.readouterr().out
    rows = {row["key"]: row for row in why.rows_of(why.read(tmp_path)["near"], 2.5e-4, "val_loss", 300)}
    mvr1, mvr2 = rows["mvr1_beta0.9"], rows["mvr2_q0.5"]
    assert (mvr1["share"], mvr2["share"]) == (pytest.approx(0.9), pytest.approx(-0.05))
    gap = mvr1["gaps"][why.KEPT]
    assert (gap.mean, gap.low, gap.high) == (pytest.approx(0.9), pytest.approx(0.9), pytest.approx(0.9))  # paired by seed
    assert text.count("+0.900 [+0.900, +0.900] **worse** | -0.100 [-0.100, -0.100] **better** | 0.90 |") == 4
    prose = " ".join(text.split())
    assert "differ by at most 1e-01" in prose  # MVR-1 and no momentum in float64
    # |G|² = 2, tr Σ = 8·16, |D|² = 8 and S² = 4 over both kinds together
    assert "| 40 | 64 [64, 64] | 0.5 [0.5, 0.5] | 2 [2, 2] | -0.5 [-0.5, -0.5] | 0.667 [0.667, 0.667] |" in text
    assert r"at lr 0.00025 γ\* is 0.94, and γ = 1 is 0.900 behind γ = 0" in prose
    assert (tmp_path / "why" / "why.png").stat().st_size > 10_000


def test_seeds_that_a_method_lacks_are_left_out(tmp_path):
    made_up(tmp_path, place)
    path = tmp_path / "why" / "near" / "mvr1_beta0.9.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"seed": 2' not in line))
    rows = {row["key"]: row for row in why.rows_of(why.read(tmp_path)["near"], 2.5e-4, "val_loss", 300)}
    assert rows["mvr1_beta0.9"]["loss"].n == rows["mvr1_beta0.9"]["gaps"][why.KEPT].n == 2
    assert rows["mvr1_beta0.9"]["share"] == pytest.approx(0.9)


def test_the_page_agrees_with_the_records():
    assert why.page(why.read(RESULTS)) == (RESULTS / "why" / "README.md").read_text()


def test_nothing_to_draw_is_one_line(tmp_path):
    with pytest.raises(UserError, match="leave out --plot-only"):
        why.main(["--plot-only", "--results", str(tmp_path)])


@pytest.mark.slow
def test_the_study_runs_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    """All four parts on a tiny model, in real processes; a second call runs nothing."""
    texts = [f"{number} is a number, and {number * 7 % 13} is one too. " * 9 for number in range(60)]
    tokenize_documents(texts, tmp_path / "data", "bytes", in_val=lambda number, _: number == 0)
    config = tmp_path / "tiny.py"
    config.write_text(
        f"data_dir = {str(tmp_path / 'data')!r}\nvocab_size = 257\nseq_len = 8\nn_layer = 1\nn_head = 1\nd_model = 8\n"
        "block_radius = 20.0\nembed_radius = 100.0\nval_tokens = 16\nshuffle = True\ndtype = 'float32'\n"
    )
    arms = (why.KEPT, why.DROPPED, "mvr1_beta0.9")
    for name, value in {
        "CONFIG": str(config), "LRS": (1e-3,), "EXACT_STEPS": 2, "DOUBLE_STEPS": 2, "NEAR_STEPS": 2, "EXACT_BATCH": 2,
        "DOUBLE_BATCH": 2, "MEASURED_AT": (0, 2),
        "NEAR_BATCH": 2, "POOL": 2, "PART": 2, "PREDICTED": (2,), "ARMS": {arm: why.ARMS[arm] for arm in arms}, "EXACT": arms,
    }.items():  # fmt: skip
        monkeypatch.setattr(why, name, value)
    words = ["--seeds", "1", "--jobs", "2", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    why.main(words)
    assert "differ by at most" in " ".join(capsys.readouterr().out.split())
    (run,) = read_packed(tmp_path / "why" / "along" / f"{why.KEPT}.jsonl").values()
    assert run.name == "lr0.001_seed0" and run.environment["threads"] == 1
    page = (tmp_path / "why" / "README.md").read_bytes()
    why.main(words)
    out = capsys.readouterr().out
    assert "0 runs to measure" in out and "3 runs: 3 done, 0 to run" in out
    assert (tmp_path / "why" / "README.md").read_bytes() == page
