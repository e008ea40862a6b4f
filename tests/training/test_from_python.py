"""Runs from Python, as in a notebook: several in one process, which is unchanged afterwards."""

import json
import pickle
import signal
import threading
from pathlib import Path

import pytest
import torch

from common.errors import Diverged, UserError
from data.tokenize_text import tokenize_documents
from train_gpt import Config, train

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a tiny byte model, and data for it."""
    folder = tmp_path_factory.mktemp("python")
    texts = [f"Page {n}: {n} and {n} are {2 * n}; {n} times {n} are {n * n}. " * 4 for n in range(200)]
    tokenize_documents(texts, folder / "data", "bytes", val_fraction=0.1)
    return {
        "results_dir": str(folder / "runs"), "data_dir": str(folder / "data"), "device": "cpu", "vocab_size": 257,
        "n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 32, "batch_size": 4, "block_radius": 20.0,
        "embed_radius": 100.0, "lr": 1e-3, "steps": 4, "val_every": 2, "val_tokens": 256, "log_every": 1,
    }  # fmt: skip


def ours():
    return [thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"]  # which tqdm keeps for all bars


@pytest.fixture(autouse=True)
def the_process_is_left_as_it_was():
    """No test here may leave a signal handler, a thread, or torch's deterministic mode."""
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], set(ours())
    assert not torch.are_deterministic_algorithms_enabled()
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert set(ours()) <= threads
    assert not torch.are_deterministic_algorithms_enabled()


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_two_runs_in_one_process(options):
    first = train(Config(run_name="first", optimizer="mvr2", deterministic=True, **options))
    assert first == Path(options["results_dir"]) / "first" and (first / "model.safetensors").is_file()
    again = train(Config(run_name="again", optimizer="mvr2", **options))
    assert [line["update"] for line in metrics(first) if "val_loss" in line] == [0, 2, 4]
    assert metrics(again) == metrics(first)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    longer = options | {"steps": 6}
    assert metrics(train(Config(run_name="first", optimizer="mvr2", resume="auto", **longer)))[-1]["update"] == 6


def test_a_mistake_is_an_exception(options):
    with pytest.raises(UserError, match="lr must be"):
        Config(lr=-1.0)
    folder = train(Config(run_name="there", **options))
    with pytest.raises(UserError, match="exists; --resume auto continues it"):
        train(Config(run_name="there", **options))
    train(Config(run_name="there", overwrite=True, **options))
    assert metrics(folder)[-1]["update"] == 4


def test_a_failed_run_releases_everything(options):
    """Above all the folder's lock: the same run can start again even while its exception is kept, as in a notebook."""
    thrown = options | {"lr": 1e30, "deterministic": True, "checkpoint_every": 1}
    with pytest.raises(Diverged, match="finite") as kept:
        train(Config(run_name="fails", **thrown))
    assert metrics(train(Config(run_name="fails", overwrite=True, **options)))[-1]["update"] == 4
    assert str(pickle.loads(pickle.dumps(kept.value))) == str(kept.value)  # as a process hands it to another


def test_in_another_thread(options):
    """Python allows no signal handlers there."""
    done = []
    thread = threading.Thread(target=lambda: done.append(train(Config(run_name="thread", **options))))
    thread.start()
    thread.join()
    assert metrics(done[0])[-1]["update"] == 4


def test_ctrl_c_saves_and_returns(options, monkeypatch):
    from data.loader import BatchLoader

    batch = BatchLoader.batch
    monkeypatch.setattr(
        BatchLoader, "batch", lambda self, k: (k == 2 and signal.raise_signal(signal.SIGINT), batch(self, k))[1]
    )
    folder = train(Config(run_name="stopped", **options))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000003"]
    assert not (folder / "model.safetensors").exists()
