"""Checkpoints: plain data, so that loading one executes nothing.

    runs/<run>/checkpoints/step_0001000/
        model.safetensors            the weights, from rank 0
        optimizer-00000.safetensors  per rank: the optimizer's tensors that this rank writes
        optimizer-00000.pt           in its place for an optimizer that is not ours: its state_dict(), as data
        state.json                   the position in the run, the optimizer's scalars, and the sha256 of the files

Any world size can load a checkpoint, and so can a model that FSDP2 shards (its own checkpoints hold full tensors, from
rank 0). `training/saver.py` writes them.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from common.errors import UserError, say
from common.files import atomic_file
from optim.base import LayerwiseOptimizer
from training.driver import Driver
from training.optimizers import in_words, writes_lr
from training.packing import from_bytes, to_bytes
from training.ranks import Ranks

_FORMAT = 3
_NAME = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class Position:
    """Where a run is: the counters that its parts start from when it resumes.

    `step`: batches taken, which is the index of the next one. `sequences`: sequences whose gradient was computed.
    `skipped`: steps that were not finite. `validated`: the last update that was validated, -1 for none. `seconds`:
    training time without validation. `metrics_bytes`: the length of metrics.jsonl; None if it can't be written.
    """

    step: int = 0
    sequences: int = 0
    skipped: int = 0
    validated: int = -1
    seconds: float = 0.0
    metrics_bytes: int | None = 0

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "Position":
        """The position that a checkpoint's state holds; without a state, the start."""
        return cls() if state is None else cls(**{name: state[key] for name, key in _KEYS.items()})


# The names of a position's counters in state.json.
_KEYS = {field.name: field.name for field in fields(Position)} | {"sequences": "evaluated"}


@dataclass(frozen=True)
class Copy:
    """What a checkpoint holds, on the host. `weights` is empty except on rank 0; `buffers` is what this rank writes.

    `packed`: the state of an optimizer that is not ours, on the ranks that write it, or why there is none.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Any]
    packed: Any = None

    def own_file(self, rank: int) -> tuple[str, bytes]:
        """Name and content of the file that this rank writes, besides the weights."""
        name = f"optimizer-{rank:05d}"
        if isinstance(self.packed, Exception):
            raise UserError(f"the optimizer's state can't be saved: {in_words(self.packed)}")
        return (f"{name}.safetensors", save(self.buffers)) if self.packed is None else (f"{name}.pt", to_bytes(self.packed))


def copy_state(
    model: nn.Module, optimizer: Optimizer | Driver, ranks: Ranks, position: Position, config: dict[str, Any]
) -> Copy:
    """Copy the weights, the optimizer's state and the position. A collective."""
    names = {p: name for name, p in model.named_parameters()}
    counters = {key: getattr(position, name) for name, key in _KEYS.items()}
    state = {"format": _FORMAT, **counters, "config": config}
    if isinstance(optimizer, Driver):
        packed: Any = None
        try:
            if ranks.first or optimizer.manner.per_rank:
                packed = optimizer.save()
        except Exception as error:  # whatever a class of others raises; the run goes on
            packed = error
        order = [names.get(p, "") for group in optimizer.param_groups for p in group["params"]]
        return Copy(copies(model.state_dict(), ranks.first), {}, state | {"optimizer": {"groups": [{"params": order}]}}, packed)
    tensors: dict[str, Tensor] = {}
    slices = set()  # names of tensors that hold some rows; other ranks have the rest
    scalars: dict[str, dict[str, Any]] = {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        scalars[names[p]] = {}
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor):
                scalars[names[p]][key] = value
                continue
            tensors[f"{names[p]}/{key}"] = value
            if isinstance(optimizer, LayerwiseOptimizer) and value.shape != p.shape:
                slices.add(f"{names[p]}/{key}")
    # The first of the ranks that hold a full tensor writes it. (A DTensor is gathered and written by rank 0.)
    held = ranks.gather([name for name, value in tensors.items() if not isinstance(value, DTensor)])
    earlier = {name for names_there in held[: ranks.rank] for name in names_there}
    buffers: dict[str, Tensor] = {}
    for name, value in tensors.items():
        keep = ranks.first if isinstance(value, DTensor) else name in slices or name not in earlier
        buffers |= copies({name: value}, keep)
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state["optimizer"] = {"groups": groups, "state": scalars}
    return Copy(copies(model.state_dict(), ranks.first), buffers, state)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    match = _NAME.search(checkpoint.name)
    assert match is not None
    return int(match[1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are complete. Raises UserError if they are not."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        files = state["files"]
        if state["format"] == 1:
            raise UserError(
                f"{checkpoint} is of an older version, in which mvr1, mvr2 and mvr3 were other algorithms; train again"
            )
        if state["format"] == 2:
            raise UserError(
                f"{checkpoint} is of an older version, which kept an optimizer's pending update in another form; continue "
                "with the revision that environment.json names, or train again"
            )
        counts = [state[key] for name, key in _KEYS.items() if name != "seconds"]
        if state["format"] != _FORMAT or "model.safetensors" not in files or any(type(count) is not int for count in counts):
            raise ValueError("state.json is malformed")
        state["config"], state["optimizer"]["groups"], float(state["seconds"])  # KeyError if one is missing
        for name, expected in files.items():
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise UserError(f"{checkpoint / name} is damaged: its checksum has changed since it was written")
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"{checkpoint} can't be read as a checkpoint ({why})") from None
    return state


def newest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint of a folder and its state; damaged ones are reported and skipped."""
    for checkpoint in list_checkpoints(folder):
        try:
            return checkpoint, read_state(checkpoint)
        except UserError as error:
            say(f"{error}; trying the checkpoint before it")
    return None


def has_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint, complete or damaged."""
    return bool(list_checkpoints(folder))


def load(checkpoint: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer | Driver) -> None:
    """Load weights and optimizer. Raises UserError if they belong to another model or another optimizer.

    One of ours keeps the options that it was built with; its counters and its pending update come from the checkpoint.
    """
    try:
        weights, own = load_file(checkpoint / "model.safetensors"), model.state_dict()
        model.load_state_dict({name: _shard_like(value, own.get(name)) for name, value in weights.items()})
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint} belongs to another model: {str(error).splitlines()[-1].strip()}") from None
    names = {p: name for name, p in model.named_parameters()}
    order = [names.get(p, "") for group in optimizer.param_groups for p in group["params"]]
    try:
        saved = state["optimizer"]
        if order != [name for group in saved["groups"] for name in group["params"]]:
            raise UserError(f"{checkpoint} belongs to another optimizer: its parameter groups differ")
        if isinstance(optimizer, Driver):
            _load_packed(checkpoint, state, optimizer)
            return
        index = {name: i for i, name in enumerate(order)}
        groups = []
        for group, built in zip(saved["groups"], optimizer.param_groups, strict=True):
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
            options = {key: built[key] for key in built if key in optimizer.defaults or key in ("betas", "eps")}
            groups.append({**values, **options, "params": [index[name] for name in group["params"]]})
        buffers = _load_buffers(checkpoint, state["files"], {names[p]: optimizer.state.get(p, {}) for p in names})
        loaded = {i: dict(saved["state"][name]) | buffers[name] for name, i in index.items()}
        optimizer.load_state_dict({"state": loaded, "param_groups": groups})
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint} belongs to another optimizer: {reason(error)}") from None


def _load_packed(checkpoint: Path, state: dict[str, Any], optimizer: Driver) -> None:
    """Load the state of an optimizer that is not ours. Raises UserError if it is not this optimizer's."""
    files = sorted(name for name in state["files"] if name.startswith("optimizer-") and name.endswith(".pt"))
    ranks = optimizer.ranks
    if len(files) not in (1, ranks.size):
        raise UserError(
            f"{checkpoint} was written by {len(files)} ranks, and {state['config']['optimizer']} keeps a state of its own on "
            f"each; resume it on {len(files)} ranks"
        )
    try:
        content = (checkpoint / files[ranks.rank if len(files) > 1 else 0]).read_bytes()
        optimizer.load(from_bytes(content), writes_lr(state["config"]))
    except Exception as error:  # whatever a class of others raises
        raise UserError(f"{checkpoint} belongs to another optimizer: {in_words(error)}") from None


def _load_buffers(checkpoint: Path, files: dict[str, str], states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """The tensors of the optimizer's state by parameter, from the files that hold all or some of their rows.

    An optimizer that already has its state gets the tensors that it has here. One that creates its state in the first step gets
    all.
    """
    with ExitStack() as stack:
        parts: dict[str, list[Any]] = {}
        for name in sorted(name for name in files if name.startswith("optimizer-")):
            file = stack.enter_context(safe_open(checkpoint / name, "pt"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                parts.setdefault(key, []).append(file)
        loaded: dict[str, dict[str, Tensor]] = {}
        for name, state in states.items():
            wanted = [key for key, value in state.items() if isinstance(value, Tensor)]
            if not state:
                wanted = [key.rpartition("/")[2] for key in parts if key.rpartition("/")[0] == name]
            for key in wanted:
                if f"{name}/{key}" not in parts:
                    raise ValueError(f"it has no {key} of {name}")
            pieces = {key: [file.get_tensor(f"{name}/{key}") for file in parts[f"{name}/{key}"]] for key in wanted}
            loaded[name] = {key: torch.cat(piece) if len(piece) > 1 else piece[0] for key, piece in pieces.items()}
    return loaded


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights alone, atomically. Raises UserError if they can't be written."""
    try:
        with atomic_file(path) as file:
            file.write(save(copies(model.state_dict(), keep=True)))
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); --resume auto tries again") from None


def copies(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the host, for the ranks that keep them. DTensors are gathered, so every rank must call this."""
    copies = {}
    for name, value in tensors.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            copies[name] = whole.detach().to("cpu", copy=True).contiguous()
    return copies


def _shard_like(value: Tensor, own: Tensor | None) -> Tensor:
    """This rank's share of a full tensor, if its own is a DTensor."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def write(path: Path, content: bytes) -> str:
    """Write a file. Returns its checksum."""
    with atomic_file(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a half-removed one is never taken for a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}-removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def reason(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
