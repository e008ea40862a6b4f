"""The settings that decide a run's rounding and speed on a device: precision, compilation, determinism."""

from contextlib import ExitStack

import torch
from torch import nn

from common.errors import UserError
from optim.polar import has_bfloat16_units
from training.config import Config


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


def compiled(model: nn.Module, config: Config, device: torch.device, at_end: ExitStack) -> nn.Module:
    """The compiled model, if the config asks for it; else the model itself."""
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return model
    import torch._inductor.config as inductor

    if config.deterministic and hasattr(inductor, "deterministic"):  # torch 2.10 and newer
        _set(inductor, "deterministic", True, at_end)
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def _set(where: object, name: str, value: bool, at_end: ExitStack) -> None:
    at_end.callback(setattr, where, name, getattr(where, name))
    setattr(where, name, value)
