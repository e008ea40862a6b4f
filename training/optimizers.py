"""Builds a run's optimizer from its options: ours by name, any `torch.optim.Optimizer` by package.module:Class."""

import importlib
import inspect
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
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
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_GIVEN = ("momentum", "gamma", "q", "weight_decay", "bias_correction", "eps")


def build_optimizer(model: GPT, config: Config) -> Optimizer:
    """The run's optimizer, with two groups: the matrices of the blocks, and the tied embedding; or those of `param_groups`.

    Optimizers with norms also get scale, polar, and each group's norm and radius. MuonMVR trains the embedding with AdamW. Any
    other optimizer gets plain groups. `embed_options` is for the second group.
    Raises UserError for an optimizer that can't be found or built.
    """
    kind = optimizer_class(config.optimizer)
    groups = _groups(model, config)
    options: dict[str, Any] = {name: value for name in _GIVEN if (value := getattr(config, name)) is not None}
    if (config.beta1, config.beta2) != (None, None):
        beta1, beta2 = adamw.DEFAULTS["betas"]
        betas = (beta1 if config.beta1 is None else config.beta1, beta2 if config.beta2 is None else config.beta2)
        options["adamw_betas" if issubclass(kind, MuonMVR) else "betas"] = betas
    embeddings = [all(p is model.embedding.weight for p in group["params"]) for group in groups]
    if issubclass(kind, MuonMVR):
        groups = [{"use_muon": not embedding} | group for group, embedding in zip(groups, embeddings, strict=True)]
        options["is_approx"] = config.compare_with == "last_step"
    elif issubclass(kind, LayerwiseOptimizer):
        groups = [_normed(group, embedding, config) for group, embedding in zip(groups, embeddings, strict=True)]
        options |= {"scale": config.scale, "polar": config.polar}
    options |= config.optimizer_options or {}
    of_group = kind.option_rules().keys() if issubclass(kind, LayerwiseOptimizer) else set()
    of_groups = [config.embed_options or {}]
    if issubclass(kind, LayerwiseOptimizer):
        of_groups += [own for _, own in config.param_groups or ()]
        of_group = of_group | ({"use_muon"} if issubclass(kind, MuonMVR) else set())
    if not _takes_any(kind):
        _refuse(config, [name for name in options if name not in accepted(kind)], kind)
        _refuse(config, [name for own in of_groups for name in own if name not in accepted(kind) | of_group], kind)
    groups[-1] |= of_groups[0]
    if not issubclass(kind, LayerwiseOptimizer):
        return _construct(kind, groups, options, model, config)
    try:
        return kind(groups, lr=config.lr, **options)
    except (TypeError, ValueError) as error:
        raise refusal(config, _line(error)) from None


def _groups(model: GPT, config: Config) -> list[dict[str, Any]]:
    """The parameter groups: the first pattern that matches a parameter's name takes it."""
    left = dict(model.named_parameters())
    if config.param_groups is None:
        groups: list[dict[str, Any]] = [{"params": list(model.blocks.parameters())}, {"params": [model.embedding.weight]}]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, left.values()))
        return groups
    if config.embed_options:
        raise UserError("embed_options and param_groups exclude each other; give the embedding's options in its group")
    groups, names = [], list(left)
    for pattern, options in config.param_groups:
        taken = [name for name in left if fnmatchcase(name, pattern)]
        if not taken:
            again = any(fnmatchcase(name, pattern) for name in names)
            why = "an earlier pattern has taken its parameters" if again else f"the names are {names[0]} … {names[-1]}"
            raise UserError(f"param_groups: nothing is left for the pattern {pattern!r}; {why}")
        groups.append({"params": [left.pop(name) for name in taken], **options})
    if left:
        raise UserError(f"""param_groups: no pattern matches {next(iter(left))}; end with ["*", {{}}]""")
    return groups


def _normed(group: dict[str, Any], embedding: bool, config: Config) -> dict[str, Any]:
    """A group with its norm and radius: its own, or the config's for the blocks or the embedding."""
    norm = config.embed_norm if embedding else config.block_norm
    norm = group.get("norm", "adamw" if config.optimizer == "adamw" else norm)
    radius = config.embed_radius if embedding else config.block_radius
    return {"norm": norm, "radius": 1.0 if norm == "adamw" else radius} | group  # AdamW's learning rate is lr itself


def _construct(
    kind: type[Optimizer], groups: list[dict[str, Any]], options: dict[str, Any], model: GPT, config: Config
) -> Optimizer:
    """An optimizer that is not ours. One that takes no groups with options gets all parameters in one."""
    named = [(name, p) for name, p in model.named_parameters()]
    arguments = dict(inspect.signature(kind).parameters)
    first = next(iter(arguments), "params")
    arguments.pop(first, None)
    of_model: dict[str, Any] = {"model": model, **dict.fromkeys(("named_parameters", "named_params"), named)}
    of_model |= {"params": groups} if first != "params" else {}
    given: dict[str, Any] = {} if "lr" not in arguments and not _takes_any(kind) else {"lr": config.lr}
    given |= {name: value for name, value in of_model.items() if name in arguments} | options
    for name in (name for _, own in config.param_groups or () for name in own if name not in accepted(kind)):
        if near := get_close_matches(name, accepted(kind), n=1, cutoff=0.8):
            raise refusal(config, f"{name} in param_groups is none of its options; did you mean {near[0]}?")
    for name, argument in [(first, None), *arguments.items()]:
        if name in given or (argument and (argument.default is not argument.empty or argument.kind in _VARIADIC)):
            continue
        if "optimizer" in name:
            raise refusal(config, f"its constructor needs {name}; write a class that makes both, as examples/sam.py does")
        if argument:
            raise refusal(config, f"""its constructor needs {name}; give it with --optimizer-options '{{"{name}": ...}}'""")
    plain = not (config.param_groups or config.embed_options)
    if first in of_model and not plain:
        raise refusal(config, f"its constructor takes {first} and no groups, so param_groups and embed_options have no place")
    choices: list[Any] = [of_model[first]] if first in of_model else [groups, *[[p for _, p in named]] * plain]
    failure: Exception | None = None
    for params in choices:
        try:
            return kind(params, **given)
        except Exception as error:  # whatever a class of others raises
            failure = failure or error
    assert failure is not None
    plain_words = isinstance(failure, TypeError | ValueError) and "use_muon" not in str(failure)
    raise refusal(config, _line(failure) if plain_words else why_not(failure))


def refusal(config: Config, why: str, everywhere: bool = False) -> UserError:
    """The error that names the run's optimizer."""
    return UserError(f"optimizer = {config.optimizer}: {why}", everywhere)


def in_words(error: BaseException) -> str:
    """An error of a class that is not ours, on one short line. If it says nothing, the line of code that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    text = _line(error) or (f"{frames[-1].line}" if frames else "")
    return f"{type(error).__name__}: {text[:200]}"


def why_not(error: Exception) -> str:
    """Why a class that is not ours can't be used here."""
    text = in_words(error)
    frames = traceback.extract_tb(error.__traceback__)
    lacks = isinstance(error, KeyError) and error.args and "group" in (frames[-1].line or "") and error.args[0]
    if lacks or "use_muon" in text:
        name = lacks or "use_muon"
        return f"""it needs {name} in each group; give it with --param-groups '[["*", {{"{name}": ...}}]]'"""
    if any(sign in text for sign in ("create_graph", "does not require grad", "grad_fn")):
        return "it needs second derivatives (create_graph=True), and the trainer computes gradients alone"
    if "process group" in text.lower():
        return f"it needs a process group ({text}); start it with torchrun"
    return f"it fails ({text})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def takes_closure(kind: type[Optimizer]) -> bool:
    """Whether `step` has a place for a closure."""
    _, *others = inspect.signature(kind.step).parameters.values()
    return any(p.name == "closure" or p.kind is not p.KEYWORD_ONLY for p in others)


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
        near = get_close_matches(class_name, dir(module), n=1)
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
    """A function that sets every group's lr (and momentum) for a step. It leaves alone what the schedule does not change.

    linear: the lr of each group rises over the warm-up and falls over the warm-down. theory: the papers' decreasing steps, with
    their momentum (Gluon: 1-β = (k+1)^(-1/2), t ∝ (k+1)^(-3/4); with two gradients a step, 1-β = t = (k+1)^(-2/3)).
    """
    if not writes_lr(config.to_dict()):
        return lambda step: None
    if any("lr" not in group for group in optimizer.param_groups):
        raise refusal(config, "its groups have no lr; --schedule constant without --warmup-steps needs none", everywhere=True)
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


def writes_lr(config: dict[str, Any]) -> bool:
    """Whether a run with these options sets the lr. If not, it is the optimizer's own affair."""
    return config["schedule"] != "constant" or config["warmup_steps"] > 0


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


def _takes_any(kind: type[Optimizer]) -> bool:
    """Whether a constructor that is not ours takes options that it does not name."""
    return not issubclass(kind, LayerwiseOptimizer) and any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values()
    )


def _refuse(config: Config, names: list[str], kind: type[Optimizer]) -> None:
    if names:
        has = ", ".join(sorted(accepted(kind)))
        raise UserError(f"{names[0]} is not an option of optimizer = {config.optimizer}; its options are {has}")
