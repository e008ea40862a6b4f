"""Checkpoints: plain safetensors and JSON, so that loading one executes nothing.

    results/<run>/checkpoints/step_0001000/
        model.safetensors            the weights, from rank 0
        optimizer-00000.safetensors  per rank, the buffers of the parameters that it owns
        state.json                   the position in the run, the optimizer's scalars, and the sha256 of the files

Ranks write their files into a hidden folder, each with its checksum beside it; when all are there, rank 0 writes
state.json and renames the folder, so a checkpoint is whole or not there. Ranks wait for each other through the file system
and not through collectives, so that writing can go on in a thread while training does. Any world size can load it.
"""

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from data.shards import atomic_file, sync_directory
from training.errors import UserError
from training.ranks import Ranks

_WAIT_SECONDS = 600.0


class Checkpointer:
    """Writes the checkpoints of a run in the background, and keeps the newest `keep` of them."""

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int) -> None:
        self._folder, self._ranks, self._keep = run_dir / "checkpoints", ranks, keep
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        # Tells the files of this launch from those that a killed one left half written.
        self._launch = ranks.agree(lambda: uuid.uuid4().hex[:8])
        if ranks.first and self._folder.exists():
            for stale in self._folder.glob(".step_*"):
                shutil.rmtree(stale, ignore_errors=True)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, position: dict[str, Any]) -> None:
        """Copy the state, and write it while training goes on. `position` goes into state.json as it is."""
        self.wait()
        names = {p: name for name, p in model.named_parameters()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        weights = {name: _copy(value) for name, value in model.state_dict().items()} if self._ranks.first else None
        buffers, scalars = {}, {}
        for p in params:
            state = optimizer.state[p]
            buffers |= {f"{names[p]}/{key}": _copy(value) for key, value in state.items() if isinstance(value, Tensor)}
            scalars[names[p]] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        state = {"format": 1, "step": step, **position, "optimizer": {"groups": groups, "state": scalars}}
        self._thread = threading.Thread(target=self._write, args=(step, weights, buffers, state), daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the write under way; what went wrong with it, if anything did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and self._ranks.first:
            print(f"checkpoint not written: {error}; the older ones are whole and the run goes on", flush=True)
        return error

    def _write(self, step: int, weights: dict[str, Tensor] | None, buffers: dict[str, Tensor], state: dict[str, Any]) -> None:
        name = f"step_{step:07d}"
        temporary = self._folder / f".{name}-{self._launch}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            _write_tensors(temporary / f"optimizer-{self._ranks.rank:05d}.safetensors", buffers)
            if weights is None:
                return
            _write_tensors(temporary / "model.safetensors", weights)
            state["files"] = self._collect(temporary)
            _write_json(temporary / "state.json", state)
            final = self._folder / name
            if final.exists():  # of an earlier life of this run; equal, or damaged
                shutil.rmtree(final)
            os.rename(temporary, final)
            sync_directory(self._folder)
            for old in list_checkpoints(self._folder)[self._keep :]:
                shutil.rmtree(old)
        except (OSError, UserError) as error:
            self._error = getattr(error, "strerror", None) or str(error)
            if self._ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _collect(self, folder: Path) -> dict[str, str]:
        """The checksums of all files, when every rank has written its own."""
        expected = ["model", *(f"optimizer-{rank:05d}" for rank in range(self._ranks.size))]
        deadline = time.monotonic() + _WAIT_SECONDS
        while missing := [name for name in expected if not (folder / f"{name}.sha256").exists()]:
            if time.monotonic() > deadline:
                raise UserError(f"{missing[0]}.safetensors did not come within {_WAIT_SECONDS:.0f} s from its rank")
            time.sleep(0.01)
        sums = {}
        for name in expected:
            sidecar = folder / f"{name}.sha256"
            sums[f"{name}.safetensors"] = sidecar.read_text()
            sidecar.unlink()
        return sums


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after its files were found whole. Raises UserError where they are not."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        files = state["files"]
        for name, expected in files.items():
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise UserError(f"{checkpoint / name} is damaged: its checksum is another than when it was written")
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint} is no whole checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} can't be read as a checkpoint ({error})") from None
    return state


def newest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder and its state; damaged ones are reported and passed over."""
    for checkpoint in list_checkpoints(folder):
        try:
            return checkpoint, read_state(checkpoint)
        except UserError as error:
            print(f"{error}; trying the checkpoint before it", flush=True)
    return None


def load(checkpoint: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Load weights and optimizer. Raises UserError where they belong to another model or another optimizer."""
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint} is of another model: {str(error).splitlines()[-1].strip()}") from None
    saved = state["optimizer"]
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    if order != [name for group in saved["groups"] for name in group["params"]]:
        raise UserError(f"{checkpoint} is of another optimizer: its parameter groups differ")
    where = {}
    for path in sorted(checkpoint.glob("optimizer-*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    loaded: dict[int, dict[str, Any]] = {}
    index = {name: i for i, name in enumerate(order)}
    for p, name in names.items():
        loaded[index[name]] = dict(saved["state"][name])
        for key, buffer in optimizer.state[p].items():
            if not isinstance(buffer, Tensor):
                continue
            if f"{name}/{key}" not in where:
                raise UserError(f"{checkpoint} is of another optimizer: it has no {key} of {name}")
            with safe_open(where[f"{name}/{key}"], "pt") as file:
                loaded[index[name]][key] = file.get_tensor(f"{name}/{key}")
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in saved["groups"]]
    for group in groups:
        group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights alone, atomically."""
    with atomic_file(path) as file:
        file.write(save({name: _copy(value) for name, value in model.state_dict().items()}))


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, and then its checksum beside it."""
    content = save(tensors)
    with atomic_file(path) as file:
        file.write(content)
    with atomic_file(path.with_suffix(".sha256")) as file:
        file.write(hashlib.sha256(content).hexdigest().encode())


def _write_json(path: Path, value: object) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())
