"""The folder of a run: made once, never overwritten by accident; what ran there, and where to go on from."""

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from data.shards import atomic_file
from training.checkpoint import newest_state, read_state
from training.config import Config
from training.errors import UserError

# What makes a checkpoint another experiment's; other options may change on the way.
_FIXED = (
    "seed", "shuffle", "batch_size", "seq_len", "vocab_size", "n_layer", "n_head", "d_model", "optimizer", "inner",
    "block_norm", "embed_norm",
)  # fmt: skip


def prepare_run(run_dir: Path, config: Config) -> tuple[Path | None, dict[str, Any] | None]:
    """Make the run's folder and describe the run in it; the checkpoint to start from and its state, or None.

    Raises UserError where the folder holds a run that this one neither resumes nor may overwrite, where there is nothing
    to resume at the path that was given, and where the checkpoint is of another experiment.
    """
    try:
        found = _find(run_dir, config)
        if found is None and run_dir.exists():
            shutil.rmtree(run_dir)
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if found is not None:
            _check_same_experiment(*found, config)
            _adopt_metrics(run_dir, *found)
        _describe(run_dir, config)
    except OSError as error:
        where = error.filename or run_dir
        raise UserError(f"{where} can't be written ({error.strerror}); choose another --results-dir") from None
    return found or (None, None)


def _find(run_dir: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """What to resume from. None: start fresh, with nothing of an older run in the way."""
    own = run_dir / "checkpoints"
    exists = run_dir.exists() and any(run_dir.iterdir())
    if config.resume == "auto":
        return newest_state(own)
    if config.resume:
        path = Path(config.resume)
        if not path.exists():
            raise UserError(f"--resume {path}: there is no such checkpoint; --resume auto takes this run's newest, if any")
        inside = path / "checkpoints"
        found = newest_state(inside) if inside.is_dir() else (path, read_state(path))
        if found is None:
            raise UserError(f"--resume {path}: that run has no whole checkpoint")
        if exists and found[0].resolve().parent != own.resolve() and not config.overwrite:
            raise UserError(f"{run_dir} holds another run; choose another --run-name, or --overwrite it")
        return found
    if exists and not config.overwrite:
        raise UserError(f"{run_dir} exists; --resume auto goes on with it, --overwrite replaces it, --run-name names another")
    return None


def _check_same_experiment(checkpoint: Path, state: dict[str, Any], config: Config) -> None:
    saved = Config.from_dict(state["config"], f"{checkpoint}'s config").to_dict()
    wanted = config.to_dict()
    if changed := [key for key in _FIXED if saved[key] != wanted[key]]:
        key = changed[0]
        raise UserError(f"{checkpoint} was trained with {key} = {saved[key]}, not {wanted[key]}: a resume can't change that")
    if state["step"] > config.steps:
        raise UserError(f"{checkpoint} is at step {state['step']}, past --steps {config.steps}")


def _adopt_metrics(run_dir: Path, checkpoint: Path, state: dict[str, Any]) -> None:
    """The metrics up to the checkpoint, also where it is another run's."""
    source, target = checkpoint.parent.parent / "metrics.jsonl", run_dir / "metrics.jsonl"
    size = source.stat().st_size if source.exists() else 0
    if size < state["metrics_bytes"]:
        raise UserError(f"{source} is shorter than when {checkpoint.name} was written; it belongs to the checkpoint")
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def _describe(run_dir: Path, config: Config) -> None:
    """The resolved config, the environment and the code's version."""
    root = Path(__file__).resolve().parent.parent
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "revision": _git(root, "rev-parse", "HEAD").strip(),
    }
    for name, text in (
        ("config.json", json.dumps(config.to_dict(), indent=1)),
        ("environment.json", json.dumps(environment, indent=1)),
        ("code.diff", _git(root, "diff", "HEAD")),
    ):
        with atomic_file(run_dir / name) as file:
            file.write(text.encode())


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
