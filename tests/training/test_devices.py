"""Which device a rank gets, and what is said about a GPU that can't be used or a model that can't be compiled."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from model import GPT, GPTConfig
from tests.helpers.pretended import pretended
from training import devices, numerics, ranks
from training.config import Config
from training.devices import choose_device, device_of_rank
from training.ranks import Ranks


@pytest.fixture
def launched(monkeypatch):
    """A function that sets what the launcher says, and the number of GPUs."""
    with pretended("cuda"):

        def set_up(cards: int, **environment: int) -> None:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID"):
                monkeypatch.delenv(name, raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, str(value))
            monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)

        yield set_up


@pytest.mark.parametrize(
    ("cards", "environment", "rank", "card"),
    [
        (8, {"LOCAL_RANK": 5, "LOCAL_WORLD_SIZE": 8, "SLURM_LOCALID": 0}, 13, 5),  # torchrun
        (4, {"SLURM_LOCALID": 3}, 7, 3),
        (1, {"LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}, 3, 0),  # one visible GPU for each rank
        (1, {"SLURM_LOCALID": 3}, 3, 0),
    ],
)
def test_the_gpu_of_a_rank(launched, capsys, cards, environment, rank, card):
    launched(cards, **environment)
    assert device_of_rank("auto", rank) == torch.device("cuda", card)
    assert capsys.readouterr().out == ""


def test_a_rank_without_a_local_rank_says_which_gpu_it_takes(launched, capsys):
    launched(4)
    assert device_of_rank("cuda", 6) == torch.device("cuda", 2)
    assert capsys.readouterr().out.startswith("rank 6 takes GPU 2 of 4, because LOCAL_RANK is not set")


def test_more_processes_than_gpus(launched):
    launched(2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    with pytest.raises(UserError, match="started 4 processes on 2 GPUs; use --nproc_per_node=2"):
        device_of_rank("auto", 1)


@pytest.mark.parametrize("uuids", [("a", "b"), ("a", "a")])
def test_two_ranks_on_one_gpu_are_refused(launched, monkeypatch, uuids):
    launched(1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    store = dist.HashStore()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuids[1]))
    store.set("gpu1", f"{ranks.socket.gethostname()} {uuids[0]}")
    if uuids[0] != uuids[1]:
        ranks._check_shared(store, 0, 2)
    else:
        with pytest.raises(UserError, match="2 ranks have the same GPU; start one for each, as torchrun"):
            ranks._check_shared(store, 0, 2)


# ---- a GPU that can't be used

NVIDIA = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Aug 17 00:00:00 UTC 2023\nGCC version:  gcc 12.2.0\n"


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A function that puts a driver of this version beside a torch that is built for CUDA and finds no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path / "version")

    def install(version: str | None, cuda: str | None = "13.0") -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        if version is not None:
            (tmp_path / "version").write_text(NVIDIA.format(version))

    return install


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_old_driver_is_named(driver, device):
    driver("535.104.05")
    with pytest.raises(UserError) as caught:
        choose_device(device)
    said = str(caught.value)
    assert "the NVIDIA driver 535.104.05 is too old" in said and "(CUDA 13.0): install driver 580 or newer" in said
    assert "\n" not in said and said.endswith("--device cpu runs without it")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_new_driver_that_does_not_work_is_named(driver):
    driver("580.95.05")
    with pytest.raises(UserError, match=r"has a GPU and the NVIDIA driver 580.95.05, but torch can't use CUDA"):
        choose_device("auto")


def test_no_gpu_a_hidden_gpu_and_a_cpu_build_are_no_trouble(driver, monkeypatch):
    driver(None)
    assert choose_device("auto") == torch.device("cpu")
    driver("535.104.05", cuda=None)
    assert choose_device("auto") == torch.device("cpu")
    driver("535.104.05")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == torch.device("cpu")


# ---- a model that can't be compiled


def compile_on(device: str, **options: str) -> bool:
    """Whether the model is compiled on this device."""
    model = GPT(GPTConfig(61, 1, 1, 16, 8))
    with ExitStack() as at_end:
        made = numerics.compiled(model, Config(**options), Ranks(0, 1, torch.device(device)), at_end)
    return made is not model


@pytest.mark.parametrize(("device", "compiler"), [("cuda", "gcc"), ("cpu", r"g\+\+")])
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, device, compiler):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(numerics, "has_bfloat16_units", lambda _: True)
    with pytest.raises(UserError, match=rf"a compiler \({compiler}\).*: install it, or use --compile off"):
        compile_on(device, compile="on")


def test_missing_headers_of_python_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(numerics.sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "gcc")
    with pytest.raises(UserError, match=r"the model needs Python.h \(python3-dev\): install it, or use --compile off"):
        numerics.check_compiler(torch.device("cuda"))
    (tmp_path / "Python.h").touch()
    numerics.check_compiler(torch.device("cuda"))


def test_before_compiling_a_line_says_so_and_afterwards_dynamo_is_reset(monkeypatch, capsys):
    monkeypatch.setattr(numerics, "check_compiler", lambda _: None)
    reset = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: reset.append(True))
    assert compile_on("cpu", compile="on")
    assert capsys.readouterr().out == "compiling the model; this takes one to three minutes\n" and reset == [True]


def test_a_gpu_without_bfloat16_units_says_that_it_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setattr(numerics, "check_compiler", lambda _: None)
    with pretended("cuda"):
        assert not compile_on("cuda", dtype="bfloat16")
        assert (
            capsys.readouterr().out
            == "this GPU has no bfloat16 units, so the model is not compiled; it is with --dtype float32\n"
        )
        assert compile_on("cuda", dtype="float32")


def test_cublas_that_was_set_up_too_early_is_named():
    with pytest.raises(UserError, match="needs CUBLAS_WORKSPACE_CONFIG=:4096:8"), numerics.reproducible_products():
        raise RuntimeError("Deterministic behavior was enabled with ..., set CUBLAS_WORKSPACE_CONFIG=:4096:8")
    with pytest.raises(RuntimeError, match="another"), numerics.reproducible_products():
        raise RuntimeError("another")
