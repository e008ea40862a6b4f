"""Builds a run's optimizer from its options: ours by name, any `torch.optim.Optimizer` by package.module:Class."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from common.errors import UserError
from model import GPT
from optim import BY_NAME, Gluon, MuonMVR, adamw
from optim.base import LayerwiseOptimizer
from training.config import Config

OPTIMIZERS: dict[str, type[Optimizer]] = {**BY_NAME, "adamw": Gluon}
# Options that not every optimizer has. Those that the user sets are passed on; one that the constructor lacks is an error.
_GIVEN = ("momentum", "gamma", "q", "weight_decay", "bias_correction", "eps")


def build_optimizer(model: GPT, config: Config) -> Optimizer:
    """The run's optimizer, with two groups: the matrices of the blocks, and the tied embedding.

    Optimizers with norms also get scale, polar, and each group's norm and radius. MuonMVR trains the embedding with AdamW. Any
    other optimizer gets two plain groups. `embed_options` is for the second group.
    Raises UserError for an optimizer that can't be found or built.
    """
    kind = optimizer_class(config.optimizer)
    groups: list[dict[str, Any]] = [
        {"params": list(model.blocks.parameters())},
        {"params": [model.embedding.weight]},
    ]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    options: dict[str, Any] = {name: value for name in _GIVEN if (value := getattr(config, name)) is not None}
    if (config.beta1, config.beta2) != (None, None):
        beta1, beta2 = adamw.DEFAULTS["betas"]
        betas = (beta1 if config.beta1 is None else config.beta1, beta2 if config.beta2 is None else config.beta2)
        options["adamw_betas" if issubclass(kind, MuonMVR) else "betas"] = betas
    if issubclass(kind, MuonMVR):
        groups[0]["use_muon"], groups[1]["use_muon"] = True, False
        options["is_approx"] = config.compare_with == "last_step"
    elif issubclass(kind, LayerwiseOptimizer):
        norms = ("adamw", "adamw") if config.optimizer == "adamw" else (config.block_norm, config.embed_norm)
        for group, norm, radius in zip(groups, norms, (config.block_radius, config.embed_radius), strict=True):
            group |= {"norm": norm, "radius": 1.0 if norm == "adamw" else radius}  # AdamW's learning rate is lr itself
        options |= {"scale": config.scale, "polar": config.polar}
    options |= config.optimizer_options or {}
    of_group = kind.option_rules().keys() if issubclass(kind, LayerwiseOptimizer) else set()
    of_embedding = config.embed_options or {}
    _refuse(config, [name for name in options if name not in accepted(kind)], kind)
    _refuse(config, [name for name in of_embedding if name not in accepted(kind) | of_group], kind)
    groups[1] |= of_embedding
    try:
        return kind(groups, lr=config.lr, **options)  # type: ignore[call-arg]  # each has its own
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer = {config.optimizer}: {' '.join(str(error).split())}") from None


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that `optimizer` names. Raises UserError if it can't be found or is not an optimizer."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"optimizer = {name}: {module_name} can't be imported ({' '.join(str(error).split())[:200]})") from None
    found = getattr(module, class_name, None)
    if found is None:
        near = difflib.get_close_matches(class_name, dir(module), n=1)
        raise UserError(
            f"optimizer = {name}: {module_name} has no {class_name}" + (f"; did you mean {near[0]}?" if near else "")
        )
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UserError(f"optimizer = {name}: {class_name} is not a torch.optim.Optimizer")
    return found


def updates_of(optimizer: Optimizer, steps: int) -> int:
    """The index of the weights that the model holds, after `steps` steps that were not skipped."""
    return getattr(optimizer, "updates", steps)


def is_deferred(optimizer: Optimizer) -> bool:
    """Whether the optimizer applies the update of a step within the next one."""
    return bool(getattr(optimizer, "deferred", False))


def schedule(optimizer: Optimizer, config: Config) -> Callable[[int], None]:
    """A function that sets every group's lr (and momentum) for a step.

    linear: the lr of each group rises over the warm-up and falls over the warm-down. theory: the papers' decreasing steps, with
    their momentum (Gluon: 1-β = (k+1)^(-1/2), t ∝ (k+1)^(-3/4); with two gradients a step, 1-β = t = (k+1)^(-2/3)).
    """
    first_lr = [float(group["lr"]) for group in optimizer.param_groups]
    power, weight = (-2 / 3, -2 / 3) if getattr(optimizer, "passes", 1) == 2 else (-3 / 4, -1 / 2)

    def set_step(step: int) -> None:
        factor = (step + 1) ** power if config.schedule == "theory" else linear_factor(config, step)
        for group, lr in zip(optimizer.param_groups, first_lr, strict=True):
            _set_lr(group, lr * min(1.0, factor))
            if config.schedule == "theory" and "momentum" in group:
                group["momentum"] = 1 - (step + 1) ** weight

    return set_step


def linear_factor(config: Config, step: int) -> float:
    """The factor of the lr at a step, for the schedules constant and linear."""
    factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "linear" and config.warmdown_steps:
        factor = min(factor, (config.steps - step) / min(config.warmdown_steps, config.steps))
    return factor


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def accepted(kind: type[Optimizer]) -> set[str]:
    """The options that a constructor takes. Ours pass on the options that they do not name."""
    names = set(inspect.signature(kind).parameters)
    if issubclass(kind, LayerwiseOptimizer) and "options" in names:
        names |= kind.option_rules().keys() | inspect.signature(LayerwiseOptimizer).parameters.keys()
    return names - {"params", "options", "process_group"}


def _refuse(config: Config, names: list[str], kind: type[Optimizer]) -> None:
    if names:
        has = ", ".join(sorted(accepted(kind)))
        raise UserError(f"{names[0]} is not an option of optimizer = {config.optimizer}; its options are {has}")
