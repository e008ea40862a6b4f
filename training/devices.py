"""The device of a rank: the best one that there is, or one line about why it can't be used."""

import os
import re
from pathlib import Path

import torch

from common.errors import UserError, say

# The oldest driver that runs programs of a major version of CUDA (NVIDIA, "CUDA minor version compatibility").
_DRIVERS = {"11": 450, "12": 525, "13": 580}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_WITHOUT = "--device cpu runs without it"


def _driver_trouble() -> str | None:
    """Why torch's CUDA can't use this machine's NVIDIA GPU; None if it has none, or if the user hides it."""
    cuda, hidden = torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if cuda is None or hidden or not (_DRIVER_FILE.exists() or Path("/dev/nvidiactl").exists()):
        return None
    text = _DRIVER_FILE.read_text() if _DRIVER_FILE.exists() else ""
    found = re.search(r"\b(\d{3,})\.[\d.]+", text)
    least = _DRIVERS.get(cuda.partition(".")[0])
    if found and least and int(found[1]) < least:
        remedy = f"install driver {least} or newer, or a torch for an older CUDA (see the FAQ)"
        return f"the NVIDIA driver {found[0]} is too old for torch {torch.__version__} (CUDA {cuda}): {remedy}; {_WITHOUT}"
    driver = f"the NVIDIA driver {found[0]}" if found else "an NVIDIA driver of unknown version"
    needs = f"CUDA {cuda} needs {least} or newer" if least else f"torch is built for CUDA {cuda}"
    return f"this machine has a GPU and {driver}, but torch can't use CUDA; {needs}, and nvidia-smi must work; {_WITHOUT}"


def choose_device(name: str) -> torch.device:
    """The device of this name, the first of its kind; "auto" is the fastest.

    Raises UserError if there is none, or if there is an NVIDIA GPU that torch's CUDA can't use.
    """
    if name in ("auto", "cuda") and not torch.cuda.is_available() and (trouble := _driver_trouble()):
        raise UserError(trouble)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available() or torch.cuda.device_count() == 0:
            raise UserError("--device cuda, but torch finds no CUDA device here; use --device cpu or a CUDA build of torch")
        return torch.device("cuda", 0)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but torch finds no Apple GPU here; use --device cpu")
    return torch.device(name)


def device_of_rank(name: str, rank: int) -> torch.device:
    """The device of one rank of several. On CUDA: the GPU with its number on this machine, or the only one that it sees, as
    Slurm often sets it up.
    """
    source = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), None)
    local_rank = number(source, 0, 2**20) if source else 0
    local_size = max(number("LOCAL_WORLD_SIZE", 1, 2**20, "1"), local_rank + 1)
    device = choose_device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count == 1:
        return device
    if source is None:
        local_rank = rank % count
        say(f"rank {rank} takes GPU {local_rank} of {count}, because LOCAL_RANK is not set; torchrun sets it")
    if local_size > count:
        raise UserError(f"torchrun started {local_size} processes on {count} GPUs; use --nproc_per_node={count}")
    return torch.device("cuda", local_rank)


def number(name: str, least: int, below: int, default: str | None = None) -> int:
    """The integer that the environment gives under this name. Raises UserError unless it is from `least` to below `below`."""
    text = os.environ.get(name, default)
    if text is None:
        raise UserError(f"RANK is set and {name} is not: start the ranks with torchrun, or unset RANK for one process")
    if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) < below:
        raise UserError(f"the environment's {name} = {text[:40]!r} must be an integer of at least {least}; torchrun sets it")
    return int(text)
