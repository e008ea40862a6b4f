"""What a run tells: metrics.jsonl, Weights & Biases, a progress bar."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.config import Config
from training.errors import UserError
from training.ranks import Ranks

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets (SXM where there are several).
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


class Metrics:
    """Appends one JSON object a line to metrics.jsonl, on rank 0, and hands it to W&B where asked."""

    def __init__(self, run_dir: Path, config: Config, first: bool, keep_bytes: int) -> None:
        """`keep_bytes`: how much of an existing file stays; what came after a checkpoint is written again."""
        self._file = None
        self._wandb = None
        if not first:
            return
        self._file = open(run_dir / "metrics.jsonl", "ab")  # noqa: SIM115
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        if config.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project, name=config.run_name, id=config.run_name, resume="allow",
                config=config.to_dict(), dir=str(run_dir),
            )  # fmt: skip

    def write(self, **values: Any) -> None:
        """One line: update, tokens, passes, seconds, and losses."""
        if self._file is None:
            return
        try:
            self._file.write((json.dumps(values) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"metrics.jsonl can't be written ({error.strerror}); free some disk and --resume auto") from None
        if self._wandb:
            self._wandb.log(values)

    def durable_bytes(self) -> int:
        """The size of metrics.jsonl, after it is safely on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb:
            self._wandb.finish()


class Clock:
    """Seconds of training: stands still during validation and checkpoints, goes on after a resume."""

    def __init__(self, seconds: float) -> None:
        self._before, self._started = seconds, None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self._before + running


class Progress:
    """A bar with loss, speed and time left on rank 0; where there is no terminal, a plain line per validation."""

    def __init__(self, config: Config, ranks: Ranks, start: int, flops_per_token: int) -> None:
        self._config, self._first, self._start = config, ranks.first, start
        self._tokens = config.batch_size * config.seq_len
        self._flops = flops_per_token
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
        self._peak = ranks.size * next((flops for key, flops in PEAK_FLOPS.items() if key in name), 0.0)
        self._bar = tqdm(
            total=config.steps, initial=start, disable=None if ranks.first else True, unit="step", dynamic_ncols=True,
            desc=config.run_name,
        )  # fmt: skip
        self._shown: dict[str, str] = {}

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def show(self, update: int, passes: float, seconds: float, **losses: float) -> None:
        """Show losses; `passes` gradient evaluations took `seconds`, since this process started."""
        if not self._first:
            return
        self._shown |= {name: f"{loss:.4f}" for name, loss in losses.items()}
        if passes:
            speed = passes * self._tokens / seconds
            self._shown["tokens/s"] = f"{speed:,.0f}"
            if self._peak:
                self._shown["MFU"] = f"{speed * self._flops / self._peak:.1%}"
        self._bar.set_postfix(self._shown)
        if self._bar.disable and "val_loss" in losses:
            line = "   ".join(f"{name} {value}" for name, value in self._shown.items())
            if update > self._start:
                line += f"   {(self._config.steps - update) * seconds / (update - self._start):,.0f} s left"
            print(f"{self._config.run_name}   update {update}/{self._config.steps}   {line}", flush=True)

    def say(self, text: str) -> None:
        """Print a line on rank 0, between those of the bar."""
        if self._first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
