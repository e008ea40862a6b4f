"""Saves checkpoints in a thread, while training continues.

Ranks write their files into a hidden folder and send rank 0 the checksums. When it has all of them, it writes state.json and
renames the folder, so a checkpoint is complete or absent. The checksums travel through the ranks' key-value store
and not through collectives, so a thread can write while training continues.
"""

import json
import math
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn
from torch.optim import Optimizer

from common.errors import UserError, say
from common.files import sync_directory, write_text
from training import checkpoint
from training.checkpoint import Copy, Position
from training.driver import Driver
from training.inputs import Identity
from training.ranks import Ranks

_WAIT_SECONDS = 600.0


class Saver:
    """Writes the checkpoints of a run in the background. Keeps the newest `keep`, and those at multiples of `keep_every`.

    `data`: what tells the run's data from others, for the checkpoints.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int, keep_every: int = 0, data: Identity | None = None) -> None:
        self._folder, self._ranks, self._keep, self._keep_every = run_dir / "checkpoints", ranks, keep, keep_every
        self._data = data
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        # Distinguishes the files of this launch from half-written ones that a killed launch left.
        self._launch = ranks.on_first(_name)
        if ranks.first:
            self._clean(before=math.inf)

    def _clean(self, before: float) -> None:
        """Remove hidden folders of steps before `before`."""
        for stale in self._folder.glob(".step_*"):
            if checkpoint.step_of(stale) < before:
                shutil.rmtree(stale, ignore_errors=True)

    def save(self, model: nn.Module, optimizer: Optimizer | Driver, position: Position, config: dict[str, Any]) -> None:
        """Copy the state, and write it while training continues. A collective."""
        self.wait()
        copy = checkpoint.copy_state(model, optimizer, self._ranks, position, config)
        self._thread = threading.Thread(target=self._write, args=(copy,))
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the current write. Returns what went wrong with it, if anything, and prints it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and self._ranks.first:
            say(f"checkpoint not written: {error}; the older ones are intact")
        return error

    def close(self) -> None:
        """Let the thread end. It does not wait for the files of other ranks, which may be dead."""
        if self._ranks.size == 1:
            self.wait()

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises UserError if it could not be written."""
        if error := self.wait():
            raise UserError(f"the last checkpoint could not be written ({error}); fix that, then use --resume auto")

    def _write(self, copy: Copy) -> None:
        """In the thread: write this rank's file. Rank 0 also writes the rest, and completes the checkpoint."""
        step, state = copy.state["step"], copy.state
        name = f"step_{step:07d}"
        temporary = self._folder / f".{name}-{self._launch}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            own, content = copy.own_file(self._ranks.rank)
            sums = {own: checkpoint.write(temporary / own, content)}
            if not self._ranks.first:
                self._report(step, sums)
                return
            if state["metrics_bytes"] is None:
                raise UserError("metrics.jsonl can't be written, and a checkpoint needs it")
            sums |= {"model.safetensors": checkpoint.write(temporary / "model.safetensors", save(copy.weights))}
            files = sums | self._collect(step)
            write_text(temporary / "state.json", json.dumps(state | {"data": self._data, "files": files}, indent=1))
            final = self._folder / name
            if final.exists():  # from an earlier launch of this run: equal, or damaged
                checkpoint.remove(final)
            os.rename(temporary, final)
            sync_directory(self._folder)
            for old in checkpoint.list_checkpoints(self._folder)[self._keep :]:
                if not self._keep_every or checkpoint.step_of(old) % self._keep_every:
                    checkpoint.remove(old)
            self._clean(before=step)
        except Exception as error:  # whatever it is, the run continues
            self._error = checkpoint.reason(error)
            if self._ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                self._report(step, {"error": f"{self._error} (rank {self._ranks.rank})"})

    def _key(self, step: int, rank: int) -> str:
        return f"{self._launch}/{step}/{rank}"

    def _report(self, step: int, sums: dict[str, str]) -> None:
        """Tell rank 0 the checksums of this rank's files, or what went wrong."""
        store = self._ranks.store
        assert store is not None
        try:
            store.set(self._key(step, self._ranks.rank), json.dumps(sums))
        except RuntimeError as error:  # the store is gone, and rank 0 with it
            self._error = checkpoint.reason(error)

    def _collect(self, step: int) -> dict[str, str]:
        """Wait for the checksums of the other ranks' files."""
        sums: dict[str, str] = {}
        store, deadline = self._ranks.store, time.monotonic() + _WAIT_SECONDS
        for rank in range(1, self._ranks.size):
            assert store is not None
            key = self._key(step, rank)
            while not store.check([key]):
                if time.monotonic() > deadline:
                    raise UserError(f"rank {rank} did not write its part within {_WAIT_SECONDS:.0f} s")
                time.sleep(0.01)
            sums |= json.loads(store.get(key))
            store.delete_key(key)
            if "error" in sums:
                raise UserError(sums["error"])
        return sums


def _name() -> str:
    return uuid.uuid4().hex[:8]
