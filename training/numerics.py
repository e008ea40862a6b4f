"""The settings that decide a run's rounding and speed on a device: precision, compilation, determinism."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError, say
from optim.polar import has_bfloat16_units
from training.config import Config
from training.ranks import Ranks


def choose_dtype(config: Config, device: torch.device) -> str:
    """float32, bfloat16 (autocast) or float64; "auto" is bfloat16 if the device has units for it.

    Raises UserError if the device lacks it.
    """
    if config.dtype == "float64" and device.type == "mps":
        raise UserError("Apple's GPUs have no float64; use --dtype float32, or --device cpu")
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if has_bfloat16_units(device) else "float32"


def set_switches(config: Config, at_end: ExitStack) -> None:
    """Set torch's switches for this run; `at_end` puts them back.

    Partial sums of a bfloat16 product are added in float32: the correction of MVR-1, -2 and -3 is a small difference of two
    gradients. `--deterministic` needs deterministic kernels, and the same choice among kernels in each run (Inductor times
    them otherwise). It does not need torch's filling of fresh memory, which costs a pass over each new tensor.
    """
    _set(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False, at_end)
    if config.deterministic:
        at_end.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True)
        _set(torch.utils.deterministic, "fill_uninitialized_memory", False, at_end)


def compiled(model: nn.Module, config: Config, ranks: Ranks, at_end: ExitStack) -> nn.Module:
    """The compiled model, if the config asks for it; else the model itself.

    Raises UserError if this machine lacks what compiling needs.
    """
    device = ranks.device
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return model
    if choose_dtype(config, device) == "bfloat16" and device.type == "cuda" and not has_bfloat16_units(device):
        if ranks.first:
            say("this GPU has no bfloat16 units, so the model is not compiled; it is with --dtype float32")
        return model
    check_compiler(device)
    if ranks.first:
        say("compiling the model; this takes one to three minutes")
    import torch._dynamo
    import torch._inductor.config as inductor

    at_end.callback(torch._dynamo.reset)  # torch compiles a function for a few models only, and runs later ones uncompiled
    if config.deterministic and hasattr(inductor, "deterministic"):  # torch 2.10 and newer
        _set(inductor, "deterministic", True, at_end)
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless there are a compiler and Python's headers. Triton builds its launcher with them, in C."""
    names = ("CC", "gcc", "clang", "cc") if device.type == "cuda" else ("CXX", "g++", "clang++")
    found = os.environ.get(names[0]) or any(map(shutil.which, names[1:]))
    lacking = [] if found else [f"a compiler ({names[1]})"]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton asks
    folders = [sysconfig.get_paths(scheme)["include"], *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").is_file() for folder in folders if folder):
        lacking.append("Python.h (python3-dev)")
    if lacking:
        raise UserError(f"compiling the model needs {' and '.join(lacking)}: install it, or use --compile off")


@contextmanager
def reproducible_products() -> Iterator[None]:
    """In this block, torch's error about cuBLAS that was set up before the run is a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise UserError(
            "--deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before a process's first product on the "
            "GPU; set it, and start Python again",
            everywhere=True,
        ) from None


def _set(where: object, name: str, value: bool, at_end: ExitStack) -> None:
    at_end.callback(setattr, where, name, getattr(where, name))
    setattr(where, name, value)
