"""Bad input to the trainer gives one line on stderr, exit code 2 and no traceback, and changes nothing on disk.

test_config.py tests options and config files, test_commands.py the environment and the real commands. Here are shards,
checkpoints, folders and the ranks. Most tests run in this process, those that need ranks in forked ones.
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import train_gpt
from common.errors import one_line_errors
from data.shards import Manifest, shard_info, write_manifest, write_shard
from tests.helpers.train_runs import Trainer, data, files_below, trainer  # noqa: F401
from training.config import load_config


@pytest.fixture
def refused(trainer, data, tmp_path, monkeypatch, capfd):  # noqa: F811
    """A function that runs the trainer in this process, in a new folder with a copy of the data. Returns its error line."""
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a config's folder may be added to it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(options: str) -> str:
        before = files_below(tmp_path)
        words = Trainer(tmp_path / "results", tmp_path / "data").words("run", options)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught, one_line_errors("train_gpt"):
            train_gpt.train(load_config(words))
        said = capfd.readouterr().err
        assert caught.value.code == 2
        assert said.count("\n") == 1 and said.startswith("train_gpt: ") and len(said) < 1000, said
        after = files_below(tmp_path)
        assert all(after.get(path) == content for path, content in before.items())
        return said

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- data

TRAIN, SECOND, VAL = "data/tiny_train_000001.bin", "data/tiny_train_000002.bin", "data/tiny_val_000000.bin"


def header(position: int, value: int) -> Callable[[], None]:
    def edit() -> None:
        raw = bytearray(Path(TRAIN).read_bytes())
        raw[4 * position : 4 * position + 4] = value.to_bytes(4, "little")
        Path(TRAIN).write_bytes(raw)

    return edit


def manifest(**changes: object) -> Callable[[], None]:
    def write() -> None:
        names = [Path(name) for name in (TRAIN, SECOND, VAL)]
        files = {path.name: shard_info(path) for path in names}
        entry = Manifest("bytes", 61, "a test", "none", files)
        for key, value in changes.items():
            setattr(entry, key, value)
        write_manifest("data", entry)

    return write


def manifest_text(text: str) -> Callable[[], object]:
    return lambda: Path("data/manifest.json").write_text(text)


def append_byte() -> None:
    with open(TRAIN, "ab") as file:
        file.write(b"x")


def folder_for_a_shard() -> None:
    Path(TRAIN).unlink()
    Path(TRAIN).mkdir()


def token_at(index: int, token: int, path: str = TRAIN) -> Callable[[], None]:
    def edit() -> None:
        tokens = np.fromfile(path, dtype="<u2")[512:]
        tokens[index] = token
        write_shard(path, tokens)

    return edit


def notes_alone() -> None:
    shutil.rmtree("data")
    Path("data").mkdir()
    Path("data/notes.txt").write_text("mine")


def nothing() -> None:
    pass


BAD_DATA = {
    "no folder": (lambda: shutil.rmtree("data"), "", "data: no such data directory"),
    "a file for a folder": (lambda: (shutil.rmtree("data"), Path("data").write_text("x")), "", "no such data directory"),
    "an empty folder": (lambda: (shutil.rmtree("data"), Path("data").mkdir()), "", "holds no val shards"),
    "no train shards": (lambda: [Path(name).unlink() for name in (TRAIN, SECOND)], "", "holds no train shards"),
    "no val shard": (lambda: Path(VAL).unlink(), "", "holds no val shards"),
    "a gap": (lambda: Path(SECOND).rename("data/tiny_train_000003.bin"), "", "tiny_train_000002.bin: missing, though"),
    "truncated": (lambda: os.truncate(TRAIN, 5000), "", "tiny_train_000001.bin: truncated, 5000 of"),
    "truncated header": (lambda: os.truncate(VAL, 10), "", "10 bytes are too few for a shard's header"),
    "empty": (lambda: os.truncate(SECOND, 0), "", "0 bytes are too few"),
    "too long": (append_byte, "", "1 bytes after the last of its"),
    "foreign": (lambda: Path(TRAIN).write_bytes(b"%PDF-1.7" * 500), "", "not a token shard"),
    "another magic": (header(0, 20240801), "", "not a token shard (magic 20240801"),
    "another version": (header(1, 2), "", "shard version 2"),
    "no tokens": (header(2, 0), "", "its header says 0 tokens"),
    "a negative count": (header(2, 2**32 - 5), "", "its header says -5 tokens"),
    "a folder for a shard": (folder_for_a_shard, "", "is not a file"),
    "a token outside the vocabulary": (token_at(3, 61), "--shuffle false", "token 61 (number 3 of the shard, needed at step 0"),
    "a smaller vocabulary": (nothing, "--vocab-size 40 --shuffle false", "is outside the model's vocabulary of 40"),
    "manifest: a larger vocabulary": (manifest(vocab_size=62), "", "its vocabulary of 62 does not fit the model's 61"),
    "manifest: a token outside": (manifest(vocab_size=50), "", "outside its vocabulary of 50"),
    "manifest: a shard is missing": (lambda: (manifest()(), Path(SECOND).unlink()), "", "listed in manifest.json but missing"),
    "manifest: another shard": (lambda: (manifest()(), write_shard(SECOND, np.arange(99) % 61)), "", "not the same file"),
    "manifest: empty": (manifest_text(""), "", "manifest.json: damaged"),
    "manifest: a list": (manifest_text("[]"), "", "manifest.json: damaged"),
    "manifest: a foreign path": (manifest_text('{"files": {"../x": {}}}'), "", "manifest.json: damaged"),
    "more steps than tokens": (nothing, "--steps 9999", "9999 steps need 1,279,873 tokens"),
    "a batch of more than all": (nothing, "--batch-size 4096", "need"),
    "a sequence of more than all": (nothing, "--seq-len 30000", "need"),
    "a validation of more than all": (nothing, "--val-tokens 999999", "val_tokens = 999,999 must be"),
    "a validation of less than a sequence": (nothing, "--val-tokens 15", "val_tokens = 15 must be"),
    "a foreign folder for the embedded text": (notes_alone, "--text sotu --vocab-size 257", "holds no"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(refused, case):
    damage, options, says = BAD_DATA[case]
    damage()
    assert says in refused(options)
    assert not list(Path(".").glob("results/run/checkpoints/*"))


def test_a_token_outside_the_vocabulary_of_the_validation(refused):
    token_at(5, 60000, VAL)()
    assert "token 60000 (number 5 of the shard) is outside the model's vocabulary of 61" in refused("")


# ---- checkpoints


@pytest.fixture(scope="module")
def saved(trainer):  # noqa: F811
    """A run of MVR-2 with checkpoints at steps 2 and 4, made in this process."""
    train_gpt.train(load_config(trainer.words("saved", "--optimizer mvr2 --steps 4 --checkpoint-every 2")))
    return trainer.results / "saved"


def resealed(name: str, content: bytes) -> Callable[[Path], None]:
    """Replace a file and its checksum."""

    def replace(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)
        state = json.loads((checkpoint / "state.json").read_text())
        state["files"][name] = hashlib.sha256(content).hexdigest()
        (checkpoint / "state.json").write_text(json.dumps(state))

    return replace


def state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        values = json.loads((checkpoint / "state.json").read_text())
        change(values)
        (checkpoint / "state.json").write_text(json.dumps(values))

    return edit


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def tensors(**shapes: tuple[int, ...]) -> bytes:
    return safetensors.torch.save({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()})


def untouched(checkpoint: Path) -> None:
    pass


MVR2 = "--optimizer mvr2"
BAD_CHECKPOINTS = {
    "another seed": (untouched, f"{MVR2} --seed 1", "was trained with seed = 0, not 1"),
    "another batch": (untouched, f"{MVR2} --batch-size 4", "was trained with batch_size = 8, not 4"),
    "another length": (untouched, f"{MVR2} --seq-len 8", "was trained with seq_len = 16, not 8"),
    "another order": (untouched, f"{MVR2} --shuffle false", "was trained with shuffle = True, not False"),
    "another depth": (untouched, f"{MVR2} --n-layer 1", "was trained with n_layer = 2, not 1"),
    "another width": (untouched, f"{MVR2} --d-model 32", "was trained with d_model = 16, not 32"),
    "other heads": (untouched, f"{MVR2} --n-head 4", "was trained with n_head = 2, not 4"),
    "another vocabulary": (untouched, f"{MVR2} --vocab-size 64", "was trained with vocab_size = 61, not 64"),
    "another optimizer": (untouched, "--optimizer mvr3", "was trained with optimizer = mvr2, not mvr3"),
    "another comparison": (
        state(lambda s: s["config"].update(optimizer="muon_mvr")), "--optimizer muon_mvr --compare-with previous_batch",
        "was trained with compare_with = last_step, not previous_batch",
    ),
    "an older format": (
        state(lambda s: s.update(format=1)), MVR2,
        "is of an older version, in which mvr1, mvr2 and mvr3 were other algorithms; train again",
    ),
    "the format before this one": (state(lambda s: s.update(format=2)), MVR2, "continue with the revision"),
    "an unknown format": (state(lambda s: s.update(format=4)), MVR2, "state.json is malformed"),
    "another norm": (untouched, f"{MVR2} --block-norm sign", "was trained with block_norm = spectral, not sign"),
    "past the steps": (untouched, f"{MVR2} --steps 3", "is at step 4, past --steps 3"),
    "an unknown option": (state(lambda s: s["config"].update(momentun=1)), MVR2, "unknown option 'momentun'"),
    "a wrong option": (state(lambda s: s["config"].update(lr="fast")), MVR2, "lr must be a finite number"),
    "a config of another type": (state(lambda s: s.update(config=[])), MVR2, "must map option names to values"),
    "the weights are a pickle": (resealed("model.safetensors", pickle.dumps(Malice())), MVR2, "belongs to another model"),
    "the momentum is a pickle": (resealed("optimizer-00000.safetensors", pickle.dumps(Malice())), MVR2, "another optimizer"),
    "weights of another model": (
        resealed("model.safetensors", tensors(other__weight=(3, 3))), MVR2, "belongs to another model",
    ),
    "weights of another shape": (resealed("model.safetensors", tensors(embedding__weight=(3, 3))), MVR2, "another model"),
    "no momentum": (resealed("optimizer-00000.safetensors", tensors(x=(1,))), MVR2, "it has no momentum_buffer of"),
    "the state of another class": (
        state(lambda s: s["config"].update(optimizer="muon_mvr")), "--optimizer muon_mvr", "it has no exp_avg_sq of"
    ),
    "no groups": (state(lambda s: s["optimizer"].update(groups=[])), MVR2, "its parameter groups differ"),
    "groups that are numbers": (state(lambda s: s["optimizer"].update(groups=[1, 2])), MVR2, "belongs to another optimizer"),
    "no state of a parameter": (state(lambda s: s["optimizer"]["state"].popitem()), MVR2, "belongs to another optimizer"),
    "metrics that were cut": (lambda c: os.truncate(c.parent.parent / "metrics.jsonl", 9), MVR2, "shorter than when"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(refused, saved, tmp_path, case):
    shutil.copytree(saved, tmp_path / "results" / "run")
    damage, options, says = BAD_CHECKPOINTS[case]
    damage(tmp_path / "results" / "run" / "checkpoints" / "step_0000004")
    assert says in refused(f"{options} --resume {tmp_path}/results/run/checkpoints/step_0000004")
    assert not Path("executed").exists()


def test_resume_from_a_bad_path(refused, saved, tmp_path):
    assert "nowhere: there is no such checkpoint; --resume auto takes" in refused("--resume nowhere")
    Path("empty").mkdir()
    assert "is not a complete checkpoint: state.json is missing" in refused("--resume empty")
    Path("run/checkpoints").mkdir(parents=True)
    assert "that run has no checkpoint that can be used (there is none)" in refused("--resume run")
    Path("file").write_text("x")
    assert "can't be read as a checkpoint" in refused("--resume file")
    shutil.copytree(saved, tmp_path / "results" / "run")
    assert "holds another run; choose another --run-name" in refused(f"{MVR2} --resume {saved}")


def test_a_run_of_the_older_version(refused, saved, tmp_path):
    """Its config has options that no longer exist, and its checkpoints belong to other algorithms."""
    run = tmp_path / "results" / "run"
    shutil.copytree(saved, run)
    for checkpoint in (run / "checkpoints").iterdir():
        state(lambda s: s.update(format=1) or s["config"].update(gamma_end=-1.0))(checkpoint)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"gamma_end": -1.0}))
    why = "step_0000004 is of an older version, in which mvr1, mvr2 and mvr3 were other algorithms; train again"
    assert f"{why}); --overwrite starts the run again" in refused(f"{MVR2} --resume auto")
    assert f"that run has no checkpoint that can be used ({run}/checkpoints/{why})" in refused(f"{MVR2} --resume {run}")
    assert "exists; --resume auto continues it, --overwrite replaces it" in refused(MVR2)


# ---- optimizers

TO_FIND = {
    "--optimizer no_such_package:Adam": "no_such_package can't be imported (No module named 'no_such_package')",
    "--optimizer torch.optim.nowhere:Adam": "torch.optim.nowhere can't be imported (No module named 'torch.optim.nowhere')",
    "--optimizer :Adam": "can't be imported",
    "--optimizer torch.optim:": "torch.optim has no",
    "--optimizer torch.optim:Mion": "torch.optim has no Mion; did you mean Muon?",
    "--optimizer torch.nn:Linear": "Linear is not a torch.optim.Optimizer",
    "--optimizer torch:manual_seed": "manual_seed is not a torch.optim.Optimizer",
    "--optimizer mine:Broken --config {folder}/mine_config.py": "mine can't be imported (invalid syntax (mine.py, line 1))",
    "--optimizer raises:Mine --config {folder}/mine_config.py": "raises can't be imported (division by zero)",
}
LACKING = {
    "--optimizer mvr1 --q 0.5": "q is not an option of optimizer = mvr1; its options are betas, bias_correction, eps, gamma",
    "--optimizer mvr2 --gamma 0.5": "gamma is not an option of optimizer = mvr2",
    "--optimizer gluon --gamma 0.5": "gamma is not an option of optimizer = gluon",
    "--optimizer single_batch --q 0.5": "q is not an option of optimizer = single_batch",
    "--optimizer muon_mvr --q 0.5": "q is not an option of optimizer = muon_mvr",
    "--optimizer muon_mvr --no-bias-correction": "bias_correction is not an option of optimizer = muon_mvr",
    "--optimizer torch.optim:AdamW --momentum 0.9": "momentum is not an option of optimizer = torch.optim:AdamW; its options",
    "--optimizer torch.optim:Muon --q 0.5": "q is not an option of optimizer = torch.optim:Muon",
    '--optimizer gluon --optimizer-options {{"nesterov":true}}': "nesterov is not an option of optimizer = gluon",
    '--optimizer mvr1 --optimizer-options {{"params":1}}': "params is not an option of optimizer = mvr1",
}
WRONG = {
    '--optimizer gluon --optimizer-options {{"momentum":1.5}}': "optimizer = gluon: momentum must be",
    '--optimizer gluon --embed-options {{"momentum":"high"}}': "optimizer = gluon: momentum must be",
    '--optimizer gluon --embed-options {{"nesterov":true}}': "nesterov is not an option of optimizer = gluon",
    '--optimizer torch.optim:AdamW --optimizer-options {{"betas":3}}': "optimizer = torch.optim:AdamW: ",
    '--optimizer torch.optim:AdamW --embed-options {{"momentun":0.9}}': "momentun is not an option of optimizer = torch",
    "--optimizer torch.optim:Optimizer": "optimizer = torch.optim:Optimizer: ",
    '--optimizer gluon --optimizer-options {{"lr":1}}': "multiple values for keyword argument 'lr'",
}


@pytest.mark.parametrize("options", [*TO_FIND, *LACKING, *WRONG])
def test_bad_optimizer(refused, tmp_path, options):
    """An optimizer that can't be found, an option that it lacks, a value that it refuses."""
    (tmp_path / "mine_config.py").write_text("steps = 3\n")
    (tmp_path / "mine.py").write_text("lr = = 1\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    assert (TO_FIND | LACKING | WRONG)[options] in refused(options.format(folder=tmp_path))
    assert not Path("results/run").exists()


def test_bad_optimizer_in_a_config(refused, tmp_path):
    (tmp_path / "own.py").write_text("optimizer = 'mvr1'\nq = 0.5\n")
    assert "q is not an option of optimizer = mvr1" in refused(f"--config {tmp_path}/own.py --optimizer mvr1")


# ---- folders


def test_results_that_cannot_be_written(refused, saved, tmp_path):
    Path("file").write_text("x")
    for folder in ("file", "file/deeper", "/proc/nowhere", "/sys/kernel/nowhere"):  # /proc and /sys refuse even root
        assert "can't be written" in refused(f"--results-dir {folder}")
    Path("results").mkdir()
    Path("results/run").write_text("x")
    assert "run can't be written (Not a directory)" in refused("")
    assert "run can't be written (Not a directory)" in refused("--overwrite")


def test_an_existing_run(refused, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "results" / "run")
    assert "exists; --resume auto continues it" in refused("")
    assert "exists; --resume auto continues it" in refused(MVR2)


# ---- the machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_missing_device(refused):
    assert "torch finds no CUDA device here; use --device cpu" in refused("--device cuda")
    if not torch.backends.mps.is_available():
        assert "torch finds no Apple GPU here" in refused("--device mps")


# ---- several ranks


BAD_RANKS = {
    "a batch that they do not divide": (3, "", "a batch of 8 sequences cannot be divided among 3 ranks"),
    "no data": (2, "--data-dir nowhere", "nowhere: no such data directory"),
    "more steps than tokens": (2, "--steps 9999", "9999 steps need"),
    "no checkpoint": (2, "--resume nowhere", "there is no such checkpoint"),
    "a file for a folder": (2, "--results-dir pyproject.toml", "can't be written (Not a directory)"),
    "another model": (2, "--resume {saved} --d-model 32 --optimizer mvr2", "was trained with d_model = 16, not 32"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_RANKS)
def test_bad_input_of_several_ranks(trainer, saved, case):  # noqa: F811
    ranks, options, says = BAD_RANKS[case]
    before = files_below(saved)
    assert says in trainer.run("ranks", options.format(saved=saved), ranks=ranks).refusal()
    assert files_below(saved) == before
