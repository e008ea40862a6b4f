"""Weights & Biases and TensorBoard, in addition to metrics.jsonl. Training continues whatever happens to them.

A tracker is started, fed and ended on a thread of its own. Training only puts lines into that thread's queue. If a
tracker is not installed, fails, or is so slow that its queue is full, its lines are lost and one warning is printed. Training
itself writes metrics.jsonl, which is complete.
"""

import queue
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.errors import say
from common.files import write_text
from training.config import Config


class Service(Protocol):
    """The interface of a tracker. A run of W&B has it."""

    def log(self, values: dict[str, Any]) -> object:
        """Take one line."""

    def finish(self) -> object:
        """Send what is left."""


class Tracker:
    """Hands lines to the service that `start` returns. One daemon thread makes all calls to the service."""

    LINES = 1000  # the most lines that may wait
    END_SECONDS = 30.0  # how long the end of a run waits at most

    def __init__(self, name: str, start: Callable[[], Service]) -> None:
        self._name, self._start = name, start
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(self.LINES)
        self._gone = self._dropping = False
        self._thread = threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any]) -> None:
        """Queue one line, or drop it if the queue is full. Never waits."""
        if self._gone:
            return
        try:
            self._queue.put_nowait(values)
        except queue.Full:
            if not self._dropping:
                say(f"{self._name} hangs or is slow: lines from update {values.get('update')} on are dropped; training goes on")
            self._dropping = True

    def close(self) -> None:
        """End the service. If that takes too long, leave it running."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=0 if self._gone else self.END_SECONDS)
        self._thread.join(self.END_SECONDS)
        if self._thread.is_alive() and not self._gone:
            say(f"{self._name} did not end within {self.END_SECONDS:g} seconds; it may miss the last lines")
        self._gone = True

    def _serve(self) -> None:
        try:
            service = self._start()
            while (values := self._queue.get()) is not None:
                service.log(values)
            service.finish()
        except BaseException as error:  # a tracker may even call sys.exit
            self._gone = True
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"{self._name} stopped ({reason}); training goes on without it")


def start_trackers(run_dir: Path, config: Config, update: int) -> list[Tracker]:
    """The trackers that the config asks for. The run continues at `update`; TensorBoard hides older lines from there on."""
    trackers = []
    if config.wandb:
        trackers.append(Tracker("Weights & Biases", partial(_wandb, run_dir, config)))
    if config.tensorboard:
        trackers.append(Tracker("TensorBoard", partial(_TensorBoard, run_dir / "tensorboard", update)))
    return trackers


def _wandb(run_dir: Path, config: Config) -> Service:
    try:
        import wandb
    except ImportError:
        raise RuntimeError("it needs the package wandb: pip install wandb") from None
    run = wandb.init(
        project=config.wandb_project, name=config.run_name, id=_wandb_id(run_dir), resume="allow", config=config.to_dict(),
        dir=str(run_dir),
    )  # fmt: skip
    run.define_metric("update")
    run.define_metric("*", step_metric="update")
    return run


def _wandb_id(run_dir: Path) -> str:
    """The run's name at W&B: the same after a resume, another after --overwrite, which removes this folder."""
    path = run_dir / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_text(path, uuid.uuid4().hex)
    return path.read_text()


class _TensorBoard:
    def __init__(self, folder: Path, update: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RuntimeError("it needs the package tensorboard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder), purge_step=update, flush_secs=10)

    def log(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name != "update":
                self._writer.add_scalar(name, value, values["update"])

    def finish(self) -> None:
        self._writer.close()
