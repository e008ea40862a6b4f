"""What a run reports: metrics.jsonl, trackers, a progress bar."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.errors import UserError, say
from training.checkpoint import Position
from training.config import Config
from training.ranks import Ranks
from training.trackers import Tracker, start_trackers

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets. The first name that the card's name contains counts.
# A name without a suffix is the SXM part if there are several; NVL and PCIe parts are slower.
# AMD's are FLOP a clock and unit (1,024 in CDNA 2, 2,048 in 3, 4,096 in 4) × units × clock; rocm.docs.amd.com.
# Half of an MI250X is a device.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800 PCIe": 756e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI355X": 2516e12, "MI350X": 2307e12, "MI325X": 1307e12,
    "MI300X": 1307e12, "MI250X": 191.5e12, "MI210": 181e12,
}  # fmt: skip


def peak_flops(card: str) -> float:
    """The bfloat16 peak of the card of this name, FLOP/s; 0 if it is not known, as for a part of a card (MIG)."""
    if re.search(r" (Ti|D|Laptop|MIG|/)( |$)", card):  # the driver calls both of two cards "AMD Instinct MI250X / MI250"
        return 0.0
    return next((flops for part, flops in PEAK_FLOPS.items() if part in card), 0.0)


class Metrics:
    """Appends one JSON object a line to metrics.jsonl, on rank 0, and sends it to the trackers that the config names.

    If the disk is full, lines wait in memory until there is room again.
    """

    def __init__(self, run_dir: Path, config: Config, ranks: Ranks, keep_bytes: int | None) -> None:
        """`keep_bytes`: how much of an existing file stays. Lines after the checkpoint are cut off and written again."""
        self._file: int | None = None
        self._trackers: list[Tracker] = []
        self._waiting, self._size = b"", keep_bytes or 0
        ranks.on_first(self._open, run_dir, config)

    def _open(self, run_dir: Path, config: Config) -> None:
        path, update = run_dir / "metrics.jsonl", -1
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            os.ftruncate(self._file, self._size)
            for line in os.pread(self._file, self._size, 0).splitlines()[-1:]:
                update = json.loads(line)["update"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} can't be continued ({error})") from None
        self._trackers = start_trackers(run_dir, config, update + 1)

    def write(self, **values: Any) -> None:
        """Write one line: update, tokens, passes, seconds, losses."""
        if self._file is None:
            return
        self._waiting += (json.dumps(values) + "\n").encode()
        self._flush()
        for tracker in self._trackers:
            tracker.log(values)

    def _flush(self) -> bool:
        """Write the waiting lines; never leaves part of a line. Returns whether all are written."""
        assert self._file is not None
        try:
            while self._waiting:
                written = os.pwrite(self._file, self._waiting, self._size)
                self._size, self._waiting = self._size + written, self._waiting[written:]
        except OSError as error:
            self._size = self._cut()
            say(f"metrics.jsonl can't be written ({error.strerror}); its lines wait in memory")
        return not self._waiting

    def _cut(self) -> int:
        """Take a partly written line back into memory. Returns the size of the lines before it."""
        assert self._file is not None
        content = os.pread(self._file, self._size, 0)
        whole = content.rfind(b"\n") + 1
        self._waiting = content[whole:] + self._waiting
        os.ftruncate(self._file, whole)
        return whole

    def durable_bytes(self) -> int | None:
        """Put metrics.jsonl safely on disk and return its size; None if it can't be."""
        if self._file is None:
            return 0
        try:
            if self._flush():
                os.fsync(self._file)
                return self._size
        except OSError as error:
            say(f"metrics.jsonl can't be written ({error.strerror})")
        return None

    def finish(self) -> None:
        """Write the waiting lines. Raises UserError if that fails."""
        if self.durable_bytes() is None:
            raise UserError("the end of metrics.jsonl can't be written; free some disk, then --resume auto")

    def close(self) -> None:
        """Close the file and the trackers, also after an error. Does nothing the second time."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
        while self._trackers:
            self._trackers.pop().close()


class Clock:
    """Counts the seconds of training. It stops during validation and while a checkpoint is copied.

    It waits for the device's queue when it starts and stops, so that queued work is counted where it belongs.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device, self._before = device, seconds
        self._started: float | None = None

    def start(self) -> None:
        """Start to count."""
        self._wait()
        self._started = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside this block, no time is counted."""
        self._wait()
        self._before, self._started = self.seconds, None
        yield
        self.start()

    @property
    def seconds(self) -> float:
        """Seconds of training so far; the host does not wait for the device."""
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self._before + running

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class Progress:
    """A bar with loss, speed and time left, on rank 0; without a terminal, a plain line per validation."""

    def __init__(self, config: Config, ranks: Ranks, position: Position, flops_per_token: int) -> None:
        self._config, self._first = config, ranks.first
        self._start, self._seconds = position.step, position.seconds
        self._flops = flops_per_token
        self._window = position.sequences, position.seconds  # at the last line
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
        self._peak = ranks.size * peak_flops(name)
        self._bar = tqdm(
            total=config.steps, initial=position.step, disable=None if ranks.first else True, unit="step", dynamic_ncols=True,
            desc=config.run_name,
        )  # fmt: skip
        self._shown: dict[str, str] = {}

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def show(self, update: int, sequences: int, seconds: float, **losses: float) -> None:
        """Show losses. The run has computed the gradients of `sequences` sequences so far, in `seconds`.

        The speed is measured since the last line, so the slow first steps affect the first line only.
        """
        if not self._first:
            return
        self._shown |= {name: f"{loss:.4f}" for name, loss in losses.items()}
        passed, took = sequences - self._window[0], seconds - self._window[1]
        if passed:
            speed = passed * self._config.seq_len / took
            self._shown["tokens/s"] = f"{speed:,.0f}"
            if self._peak:
                self._shown["MFU"] = f"{speed * self._flops / self._peak:.1%}"
        self._bar.set_postfix(self._shown)
        line_due = self._bar.disable and "val_loss" in losses
        if passed and (line_due or not self._bar.disable):
            self._window = sequences, seconds
        if line_due:
            fields = (name for name in ("val_loss", "train_loss", "tokens/s", "MFU") if name in self._shown)
            line = "   ".join(f"{name} {self._shown[name]}" for name in fields)
            self._shown.clear()  # the next line must not show a training loss from before this one
            if update > self._start:
                each = (seconds - self._seconds) / (update - self._start)
                line += f"   {(self._config.steps - update) * each:,.0f} s left"
            say(f"{self._config.run_name}   update {update}/{self._config.steps}   {line}")

    def say(self, text: str) -> None:
        """Print a line on rank 0, between those of the bar."""
        if self._first:
            with suppress(OSError), self._bar.external_write_mode(file=sys.stdout):
                say(text)

    def close(self) -> None:
        self._bar.close()
