"""The trainer as it is started: the environment of a rank, and real commands. A mistake gives one line and exit code 2."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from common.errors import one_line_errors
from tests.helpers.train_runs import ROOT, Done, data, files_below, free_port, trainer  # noqa: F401

RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{free}", "LOCAL_RANK": "0"}
BAD_ENVIRONMENTS = {
    "RANK in words": ({"RANK": "first"}, "the environment's RANK = 'first' must be an integer"),
    "RANK negative": ({"RANK": "-1"}, "the environment's RANK = '-1'"),
    "WORLD_SIZE zero": ({"WORLD_SIZE": "0"}, "the environment's WORLD_SIZE = '0'"),
    "WORLD_SIZE in words": ({"WORLD_SIZE": "two"}, "the environment's WORLD_SIZE = 'two'"),
    "WORLD_SIZE broken": ({"WORLD_SIZE": "1.5"}, "the environment's WORLD_SIZE = '1.5'"),
    "WORLD_SIZE missing": ({"WORLD_SIZE": None}, "RANK is set and WORLD_SIZE is not"),
    "LOCAL_RANK in words": ({"LOCAL_RANK": "x"}, "the environment's LOCAL_RANK = 'x'"),
    "MASTER_ADDR missing": ({"MASTER_ADDR": None}, "RANK is set and MASTER_ADDR is not"),
    "MASTER_ADDR unknown": ({"MASTER_ADDR": "no.such.host.invalid", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "can't be found"),
    "MASTER_PORT missing": ({"MASTER_PORT": None}, "RANK is set and MASTER_PORT is not"),
    "MASTER_PORT in words": ({"MASTER_PORT": "http"}, "the environment's MASTER_PORT = 'http'"),
    "MASTER_PORT too large": ({"MASTER_PORT": "70000"}, "the environment's MASTER_PORT = '70000'"),
    "MASTER_PORT taken": ({"MASTER_PORT": "{taken}"}, "is taken; choose another"),
    "nobody else comes": ({"WORLD_SIZE": "2"}, "the ranks can't meet at 127.0.0.1"),
}  # fmt: skip


@pytest.mark.slow
def test_bad_environments(trainer):  # noqa: F811
    """All at once, each in its own process, because a rank ends its process."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        runs = {}
        for number, (case, (changes, _)) in enumerate(BAD_ENVIRONMENTS.items()):
            ports = {"free": free_port(), "taken": taken.getsockname()[1]}
            environment = {key: value.format(**ports) for key, value in (RANK | changes).items() if value is not None}
            runs[case] = trainer.start(f"environment-{number}", "--rank-timeout 2", **environment)
        for case, running in runs.items():
            message = own_lines(running.done()).refusal()
            assert BAD_ENVIRONMENTS[case][1] in message, case
            assert not running.folder.exists()


def own_lines(done: Done) -> Done:
    """Without the lines that torch's C++ logs about a network that does not work."""
    done.err = "".join(line + "\n" for line in done.err.splitlines() if not line.startswith(("[W", "[E", "[rank")))
    return done


# ---- the real commands

COMMANDS = {
    "--lrr 1": "unknown option '--lrr'; did you mean --lr?",
    "--steps many": "--steps must be an integer",
    "--config configs/mvr9_b512.py": "no config file",
    "--config {folder}/broken.py": "broken.py, line 2: ",
    "--config {folder}/raises.py": "raises.py, line 1: ZeroDivisionError",
    "--confg configs/mvr1_b512.py": "unknown option '--confg'; did you mean --config?",
    "--optimizer mvr4": "optimizer must be one of gluon",
    "--optimizer-options nesterov": "--optimizer-options must be option names and their values",
    "--n-head 5": "must be a multiple of 2 * n_head",
    "--run-name a/b": "a folder name of 1 to 200 bytes",
    "--momentum 1": "--momentum must be a finite number of at least 0 and below 1",
    "lr 1": "does not belong to an option",
    "--data-dir {data} --vocab-size 61 --steps 3 --seq-len 16 --batch-size 4 --val-tokens 512 --resume x": "no such checkpoint",
}  # fmt: skip


@pytest.mark.slow
def test_real_commands(tmp_path, data):  # noqa: F811
    """All at once: most are refused before torch is imported."""
    (tmp_path / "broken.py").write_text("lr = 1\nsteps = = 2\n")
    (tmp_path / "raises.py").write_text("lr = 1 / 0\n")
    before = files_below(tmp_path)
    started = {
        words: subprocess.Popen(
            [sys.executable, "train_gpt.py", *words.format(folder=tmp_path, data=data).split()], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for words in COMMANDS
    }  # fmt: skip
    for words, process in started.items():
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err.count("\n"), out) == (2, 1, ""), (words, out, err)
        assert err.startswith("train_gpt: ") and COMMANDS[words] in err, err
    assert files_below(tmp_path) == before


@pytest.mark.slow
def test_options_are_checked_before_torch_is_imported():
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['train_gpt.py', '--steps', '0']; import runpy; "
    done = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('train_gpt.py', run_name='__main__')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("train_gpt: --steps must be an integer of at least 1")


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [("/dev/full", 2, "x: input/output: No space left on device\n"), ("a closed pipe", 141, ""), ("ascii", 0, "")],
)
@pytest.mark.parametrize("length", [1, 100_000])  # written at the end, and at once
def test_output_that_can_not_be_written(output, code, said, length):
    program = f"from common.errors import one_line_errors\nwith one_line_errors('x'):\n    print('β' * {length})"
    reader, writer = os.pipe()
    if output == "/dev/full":
        os.dup2(os.open(output, os.O_WRONLY), writer)
    elif output == "ascii":
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    os.close(reader)
    environment = os.environ | {"PYTHONIOENCODING": "ascii" if output == "ascii" else "utf-8"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, said)


def raised(error: Exception):
    raise error


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.empty(2**50),
        lambda: raised(MemoryError()),
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
        lambda: raised(torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")),
    ],
)
def test_out_of_memory(capsys, act):
    with pytest.raises(SystemExit) as caught, one_line_errors("x"):
        act()
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("x: out of memory; choose smaller sizes")
